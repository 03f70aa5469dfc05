"""Training that really learns, from the bundled demonstrations, and a control that must not."""
import gymnasium as gym
import numpy as np
import pytest

import iq_discrete


def final_return(capsys, *flags) -> float:
    assert iq_discrete.main([*flags]) == 0
    return float(capsys.readouterr().out.split("eval_return=")[-1].split()[0])


def test_cartpole_from_250_transitions(tmp_path, capsys):
    """Random actions give 23."""
    score = final_return(capsys, "--num-demos", "10", "--subsample-freq", "20", "--seed", "3", "--total-timesteps", "4000",
                         "--eval-every", "4000", "--out-dir", str(tmp_path))
    assert score >= 450


def test_cartpole_from_an_expert_that_never_moves_but_left(tmp_path, capsys):
    """The control: a reward that merely says «survive» would score 500 here too."""
    env = gym.make("CartPole-v1")
    observations, lengths = [], []
    for seed in range(10):
        observations.append(env.reset(seed=seed)[0])
        ended, length = False, 0
        while not ended:
            obs, _, terminated, truncated, _ = env.step(0)
            observations.append(obs)
            ended, length = terminated or truncated, length + 1
        lengths.append(length)
    ends = np.zeros(sum(lengths), bool)
    ends[np.cumsum(lengths) - 1] = True
    np.savez(tmp_path / "left.npz", observations=np.array(observations), actions=np.zeros(sum(lengths), np.int64),
             terminations=ends, truncations=np.zeros_like(ends), episode_lengths=np.array(lengths),
             env_id=np.array("CartPole-v1"))
    score = final_return(capsys, "--demos", str(tmp_path / "left.npz"), "--seed", "3", "--total-timesteps", "6000",
                         "--eval-every", "6000", "--out-dir", str(tmp_path))
    assert score < 50


@pytest.mark.parametrize("objective", ["iq", "bc"])
def test_the_fixed_grid_within_200_updates(tmp_path, capsys, objective):
    """Success is 1; random actions reach the goal in none of 20 episodes."""
    score = final_return(capsys, "--env-id", "GridWorld-v0", "--objective", objective, "--total-timesteps", "200",
                         "--eval-every", "200", "--seed", "3", "--out-dir", str(tmp_path))
    assert score == 1.0
