"""GridWorld, and what reaches the replay at the end of an episode."""
import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import iq_atari
import iq_discrete


@pytest.mark.parametrize("switches", [{}, {"random_walls": True}, {"random_walls": True, "random_start": True,
                                                                    "random_goal": True, "stay_action": True}])
@pytest.mark.parametrize("size", [3, 8])
def test_gridworld_is_a_valid_environment(switches, size):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        check_env(gym.make("GridWorld-v0", size=size, **switches).unwrapped, skip_render_check=True)


def test_gridworld_switches_are_independent():
    def starts(**switches):
        env = gym.make("GridWorld-v0", **switches).unwrapped
        layouts = []
        for seed in range(10):
            obs, _ = env.reset(seed=seed)
            assert obs.shape == (3, 8, 8) and obs.dtype == np.float32
            assert obs[0].sum() == 13  # 20 % of 64 cells
            assert env.distances(env.walls, env.goal)[env.agent] > 0  # the goal can be reached
            assert obs[1].argmax() == np.ravel_multi_index(env.agent, (8, 8)) and obs[1].sum() == 1
            assert obs[2].argmax() == np.ravel_multi_index(env.goal, (8, 8)) and obs[2].sum() == 1
            layouts.append(obs)
        return [len({obs[plane].tobytes() for obs in layouts}) > 1 for plane in range(3)]

    assert starts() == [False, False, False]
    assert starts(random_walls=True) == [True, False, False]
    assert starts(random_start=True) == [False, True, False]
    assert starts(random_goal=True) == [False, False, True]


def test_gridworld_moves_rewards_and_ends():
    env = gym.make("GridWorld-v0", size=3, stay_action=True).unwrapped
    env.reset(seed=0)
    env.walls[:] = False
    positions = []
    for action in (1, 3, 0, 2, 4, 0):  # down, right, up, left, stay, up against the edge
        _, reward, terminated, truncated, _ = env.step(action)
        positions.append(env.agent)
        assert reward == 0 and not terminated and not truncated
    assert positions == [(1, 0), (1, 1), (0, 1), (0, 0), (0, 0), (0, 0)]
    env.walls[0, 1] = True
    env.step(3)
    assert env.agent == (0, 0)
    for action in (1, 1, 3):
        env.step(action)
    _, reward, terminated, truncated, _ = env.step(3)
    assert (reward, terminated, truncated) == (1.0, True, False)


def test_gridworld_truncates_after_four_times_its_size():
    env = gym.make("GridWorld-v0", size=5, stay_action=True)
    env.reset(seed=0)
    ends = [env.step(4)[2:4] for _ in range(20)]
    assert ends == [(False, False)] * 19 + [(False, True)]


def test_gridworld_renders():
    env = gym.make("GridWorld-v0", size=4, render_mode="ansi")
    env.reset(seed=0)
    text = env.render()
    assert text[0] == "A" and text.strip()[-1] == "G" and text.count("#") == 3
    env = gym.make("GridWorld-v0", size=4, render_mode="rgb_array")
    env.reset(seed=0)
    assert env.render().shape == (128, 128, 3) and env.render().dtype == np.uint8


def test_the_bundled_grid_expert_walks_shortest_paths():
    data = np.load(iq_discrete.demonstrations_path(iq_discrete.Args(env_id="GridWorld-v0")))
    env = gym.make("GridWorld-v0").unwrapped
    env.reset(seed=0)
    assert (data["episode_lengths"] == env.distances(env.walls, env.goal)[0, 0]).all()


class Counter(gym.Env):
    """Observes its episode and step; terminates or is truncated after three steps."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gym.spaces.Discrete(2)
    episode = -1

    def __init__(self, ending="truncated", render_mode=None):
        self.ending = ending

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.time = self.episode + 1, 0
        return np.array([self.episode, 0], np.float32), {}

    def step(self, action):
        self.time += 1
        done = self.time == 3
        obs = np.array([self.episode, self.time], np.float32)
        return obs, np.nan, done and self.ending == "terminated", done and self.ending == "truncated", {}


@pytest.mark.parametrize("ending", ["truncated", "terminated"])
@pytest.mark.parametrize("num_envs", [1, 3])
def test_the_stored_next_observation_is_the_true_last_one(tmp_path, monkeypatch, ending, num_envs):
    """No transition crosses from an episode into the next; only a termination masks V(s'); reward NaN changes nothing."""
    gym.register("Counter-v0", entry_point=Counter, kwargs={"ending": ending})
    np.savez(tmp_path / "demos.npz", observations=np.zeros((5, 2), np.float32), actions=np.zeros(4, np.int64),
             terminations=np.zeros(4, bool), truncations=np.zeros(4, bool), episode_lengths=np.array([4]),
             env_id=np.array("Counter-v0"))
    replays = []
    original = iq_discrete.Replay.__init__
    monkeypatch.setattr(iq_discrete.Replay, "__init__", lambda self, *a: (original(self, *a), replays.append(self))[0])
    iq_discrete.train(iq_discrete.Args(env_id="Counter-v0", demos=str(tmp_path / "demos.npz"), num_demos=1, batch_size=4,
                                       num_envs=num_envs, total_timesteps=30, eval_every=0, out_dir=str(tmp_path)))
    replay = replays[0]
    obs, _, next_obs, terminated = (field[: replay.written] for field in replay.storage)
    assert len(obs) == 30
    assert (next_obs[:, 0] == obs[:, 0]).all() and (next_obs[:, 1] == obs[:, 1] + 1).all()
    assert (terminated == (next_obs[:, 1] == 3) * (ending == "terminated")).all()
    initial, ends = replays[1], num_envs * (30 // num_envs // 3)
    assert initial.written == 1 + num_envs + ends and (initial.storage[0][: initial.written, 1] == 0).all()


class Games:
    """Two games side by side as frames of 100·game + 10·episode + time; three steps, the end by turns a termination and a
    truncation. What the emulator gives at an end is the next episode's first stack, and the last one in `final_obs`."""

    single_action_space = gym.spaces.Discrete(6)

    def stacks(self):
        return np.stack([np.full((4, 84, 84), 100 * game + 10 * self.episode + self.time, np.uint8) for game in range(2)])

    def reset(self, seed=None):
        self.episode = self.time = 0
        return self.stacks(), {}

    def step(self, action):
        self.time += 1
        done = np.full(2, self.time == 3)
        last, info, terminated = self.stacks(), {}, done & (self.episode % 2 == 0)
        if self.time == 3:
            info["final_obs"] = last
            self.episode, self.time = self.episode + 1, 0
        return self.stacks(), np.full(2, np.nan), terminated, done & ~terminated, info

    def close(self):
        pass


def test_what_the_games_played_leave_in_the_replay(tmp_path, monkeypatch):
    """As above for iq_atari.py; and expert rows come first in a batch, and initial states are those that episodes start
    from."""
    np.savez(tmp_path / "demos.npz", observations=np.full((5, 84, 84), 255, np.uint8), actions=np.zeros(4, np.int64),
             terminations=np.zeros(4, bool), truncations=np.zeros(4, bool), episode_lengths=np.array([4]),
             env_id=np.array("PongNoFrameskip-v4"))
    batches, make_update = [], iq_atari.make_update
    monkeypatch.setattr(iq_atari, "make_envs", lambda *_: Games())

    def noting(*parts):
        update = make_update(*parts)
        return lambda batch, initial: (batches.append((batch, initial)), update(batch, initial))[1]

    monkeypatch.setattr(iq_atari, "make_update", noting)
    iq_atari.train(iq_atari.Args(demos=str(tmp_path / "demos.npz"), num_demos=1, batch_size=16, num_envs=2, eval_every=0,
                                 pretrain_updates=0, total_timesteps=36, updates_per_step=0.5, value_loss="v0",
                                 chi2_rows="both", buffer_size=200, out_dir=str(tmp_path)))
    seen = set()
    for batch, initial in batches:
        assert (batch.obs[:16, 3] == 255).all() and len(batch.obs) == 32
        obs, next_obs = batch.obs[16:, 3, 0, 0].int(), batch.next_obs[16:, 3, 0, 0].int()
        assert (next_obs == obs + 1).all() and (obs % 10 < 3).all()
        ends = (next_obs % 10 == 3) & (next_obs // 10 % 2 == 0)
        assert (batch.terminated[16:] == ends).all()
        seen |= set(next_obs.tolist())
        starts = initial[:, 3, 0, 0]
        assert ((starts == 255) | (starts % 10 == 0)).all()
    assert {3, 13, 103, 113} <= seen
    assert {x for _, initial in batches for x in initial[:, 3, 0, 0].tolist()} >= {255, 0, 100, 10, 110, 40, 140}
