import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gymnasium as gym  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def left_only(tmp_path_factory) -> str:
    """Demonstrations of CartPole by an expert that only pushes left, about 9 steps an episode: the control of every
    learning test, since a reward that merely says «survive» would score 500 with it too."""
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
    path = tmp_path_factory.mktemp("left") / "left.npz"
    np.savez(path, observations=np.array(observations), actions=np.zeros(sum(lengths), np.int64), terminations=ends,
             truncations=np.zeros_like(ends), episode_lengths=np.array(lengths), env_id=np.array("CartPole-v1"),
             num_actions=np.array(2))
    return str(path)
