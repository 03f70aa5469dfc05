"""The replays: wrap-around, never an unwritten row, and stacks of frames that never cross an episode's start."""
import numpy as np
import pytest
import torch

import iq_atari
import iq_discrete


def test_rows_stay_together_and_none_unwritten_is_drawn():
    replay = iq_discrete.Replay(10, [((2,), torch.float32), ((), torch.int64)], "cpu")
    for i in range(1, 8):
        replay.add(torch.full((1, 2), float(i)), torch.tensor([i]))
        rows, number = replay.sample(200)
        assert (rows == number[:, None]).all()
        assert set(number.tolist()) == set(range(1, i + 1))


@pytest.mark.parametrize("n", [1, 3, 4])
def test_the_oldest_rows_are_overwritten(n):
    replay = iq_discrete.Replay(10, [((), torch.int64)], "cpu")
    for i in range(0, 36, n):
        replay.add(torch.arange(i, i + n))
    assert set(replay.sample(500)[0].tolist()) == set(range(36 - 10, 36))


def test_state_dict_restores_what_was_written():
    one, other = (iq_discrete.Replay(10, [((), torch.int64)], "cpu") for _ in range(2))
    one.add(torch.arange(1, 8))
    other.load_state_dict(one.state_dict())
    assert other.written == 7 and set(other.sample(300)[0].tolist()) == set(range(1, 8))


def play(replay, steps, num_envs, rng, log):
    """Random episodes whose frames carry (environment, episode, time); returns every true transition by its action."""
    episode, time = np.zeros(num_envs, int), np.zeros(num_envs, int)

    def frames(envs):
        image = torch.zeros(len(envs), 84, 84, dtype=torch.uint8)
        for row, e in enumerate(envs):
            image[row, 0, :3] = torch.tensor([e + 1, episode[e] + 1, time[e] + 1])
        return image

    replay.start(torch.arange(num_envs), frames(range(num_envs)))
    for step in range(steps):
        action = torch.arange(num_envs) + num_envs * step
        before = [(e + 1, episode[e] + 1, time[e] + 1) for e in range(num_envs)]
        time += 1
        done = (rng.random(num_envs) < 0.2) | (time > 20)
        replay.add(action, frames(range(num_envs)), torch.as_tensor(done, dtype=torch.float32))
        log.update({int(a): (b, bool(d)) for a, b, d in zip(action, before, done)})
        for e in np.flatnonzero(done):
            episode[e], time[e] = episode[e] + 1, 0
        if done.any():
            replay.start(torch.as_tensor(np.flatnonzero(done)), frames(np.flatnonzero(done)))
        check_stacks(replay.sample(8), log)


def check_stacks(batch, log):
    """Each of the five frames is the one of its time, or zero before the episode's start."""
    for obs, action, next_obs, terminated in zip(*batch):
        (env, episode, time), done = log[int(action)]
        assert bool(terminated) == done
        for stack, last in ((obs, time), (next_obs, time + 1)):
            for k in range(4):
                t = last - 3 + k
                expected = [env, episode, t] if t >= 1 else [0, 0, 0]
                assert stack[k, 0, :3].tolist() == expected


@pytest.mark.parametrize("num_envs", [1, 3])
def test_stacks_are_rebuilt_by_index(num_envs):
    torch.manual_seed(0)
    log, capacity = {}, 40
    replay = iq_atari.Replay(capacity * num_envs, num_envs, "cpu")
    play(replay, 130, num_envs, np.random.default_rng(0), log)  # more than three times round
    batch = replay.sample(3000)
    check_stacks(batch, log)
    drawn = set(batch.action.tolist())
    newest = max(log)
    assert all(a > newest - capacity * num_envs for a in drawn)  # nothing overwritten
    recent = {a for a in log if a > newest - 20 * num_envs}
    assert recent <= drawn  # and everything that is there can be drawn


def test_frames_take_at_most_7100_bytes_a_transition():
    replay = iq_atari.Replay(1000, 2, "cpu")
    tensors = [v for v in vars(replay).values() if isinstance(v, torch.Tensor)]
    assert sum(t.numel() * t.element_size() for t in tensors) / 1000 <= 7100


def test_frame_replay_state_dict_restores():
    log, rng = {}, np.random.default_rng(1)
    one, other = (iq_atari.Replay(60, 2, "cpu") for _ in range(2))
    play(one, 50, 2, rng, log)
    other.load_state_dict(one.state_dict())
    check_stacks(other.sample(200), log)
