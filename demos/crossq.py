"""Trained experts for the MuJoCo tasks: CrossQ of sbx-rl, until the mean return is near the paper's experts.

Some are trained with disturbed actions, since a gait that only just balances falls over in an imitator's hands: under
noise of 0.1 Ant's fell from 4,315 to 3,765, and trained on under noise from 4,985 to 4,739. Recorded play is not disturbed.

Training keeps its state in `<cache>/<environment>/`, every 5,000 steps (Humanoid's and Walker2d's every 25,000), and goes on
from there; progress.csv in it holds the mean and standard deviation of 10 deterministic episodes each time, and of 10 that
are disturbed by the same noise. The policy that is recorded is the one with the highest mean less standard deviation of the
latter; where TAUGHT names the environment, the first good one whose episodes can be cloned, and training stops with it.
"""
import csv
from collections.abc import Callable
from pathlib import Path

import gymnasium as gym
import numpy as np
from sbx import CrossQ
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

# environment: mean return at which training stops, that of the paper's expert (Walker2d's a little less); most steps
TARGETS = {
    "Hopper-v5": (3533, 145_000),
    "HalfCheetah-v5": (5098, 200_000),
    "Walker2d-v5": (5150, 700_000),
    "Ant-v5": (4700, 260_000),
    "Humanoid-v5": (5313, 575_000),
}
SIMULATOR = ("cinert", "cvel", "qfrc_actuator", "cfrc_ext")  # what follows positions and velocities in the observations
LEFT_OUT = {"Ant-v5": SIMULATOR[-1:], "Humanoid-v5": SIMULATOR}
# environment: standard deviation of the noise on actions, as a share of their bound, and the step from which on training
# has it (Hopper's never: there it only chooses the policy)
NOISE = {"HalfCheetah-v5": (0.2, 0), "Ant-v5": (0.2, 145_000), "Humanoid-v5": (0.1, 0), "Hopper-v5": (0.1, np.inf)}
# environment: steps between evaluations, environments side by side (else 5,000 and 1)
PACE = {"Humanoid-v5": (25_000, 8), "Walker2d-v5": (25_000, 16)}
# 48 updates in one call, after three steps of 16 environments: some 200 steps a second on two cores, one by one 57 to 80
# on one core
LEARNER = {"Walker2d-v5": {"train_freq": 3, "learning_starts": 2_000}}
# Where most good policies cannot be cloned: of six of Walker2d's that return 5200 to 5420 four read 0.02 to 0.10 normalized.
TAUGHT = {"Walker2d-v5"}
NETWORK = {"net_arch": {"pi": [256, 256], "qf": [256, 256]}}


class DisturbedActions(gym.ActionWrapper):
    """Gaussian noise on the actions, a share of their bound, drawn by the environment's generator."""

    def __init__(self, env: gym.Env, deviation: float):
        super().__init__(env)
        self.deviation = deviation

    def action(self, action: np.ndarray) -> np.ndarray:
        bound = self.action_space.high
        noise = self.deviation * bound * self.np_random.normal(size=action.shape)
        return np.clip(action + noise, -bound, bound).astype(np.float32)


def make_env(env_id: str, noise: float) -> gym.Env:
    """The environment as the expert sees it: Ant and Humanoid by positions and velocities alone, 27 and 45 observations."""
    env = gym.make(env_id, **{f"include_{name}_in_observation": False for name in LEFT_OUT.get(env_id, ())})
    return DisturbedActions(env, noise) if noise else env


def returns_of(model, env_id: str, noise: float, episodes: int = 10) -> np.ndarray:
    """Returns `[episodes]` of the deterministic policy, seeds 10,000 and on, its actions disturbed by `noise`."""
    env, returns = make_env(env_id, noise), []
    for episode in range(episodes):
        obs, _ = env.reset(seed=10_000 + episode)
        total, ended = 0.0, False
        while not ended:
            obs, reward, terminated, truncated, _ = env.step(model.predict(obs, deterministic=True)[0])
            total, ended = total + float(reward), terminated or truncated
        returns.append(total)
    return np.array(returns)


def policy_of(model) -> Callable:
    """The deterministic action of `model` at an observation of the full length, as `record.py` plays it."""
    seen = model.observation_space.shape[0]
    return lambda env, obs: model.predict(obs[:seen], deterministic=True)[0]


def expert(env_id: str, cache: Path, teaches: Callable) -> Callable:
    """The trained policy, as `record.py` plays it; training goes on where `cache` stops.

    `teaches(policy)` tells whether its episodes can be cloned; asked only where TAUGHT says.
    """
    folder = cache / env_id
    folder.mkdir(parents=True, exist_ok=True)
    progress, model_path, replay_path = folder / "progress.csv", folder / "model.zip", folder / "replay.pkl"
    best = folder / "best.zip"
    rows = []
    if progress.exists():
        with open(progress) as file:
            rows = [tuple(map(float, row)) for row in csv.reader(file)]
    target, most = TARGETS[env_id]
    noise, noise_from = NOISE.get(env_id, (0.0, 0))
    chunk, num_envs = PACE.get(env_id, (5_000, 1))

    def good(row):  # one lucky evaluation of a swinging policy is no expert: it must also be steady
        _, mean, _, disturbed, sd = row
        return mean >= target and sd < 0.1 * disturbed

    def reached():
        return best.exists() if env_id in TAUGHT else any(map(good, rows))

    def envs():
        now = noise if (rows[-1][0] if rows else 0) >= noise_from else 0.0
        return DummyVecEnv([lambda: Monitor(make_env(env_id, now))] * num_envs)

    if model_path.exists():
        model = CrossQ.load(model_path, env=envs())
        model.load_replay_buffer(replay_path)
    else:
        model = CrossQ("MlpPolicy", envs(), seed=0, buffer_size=most, gradient_steps=-1,  # an update for each step
                       policy_kwargs=NETWORK, **LEARNER.get(env_id, {}))
    while not reached() and model.num_timesteps < most:
        model.set_env(envs())
        model.learn(chunk, reset_num_timesteps=False)
        plain = returns_of(model, env_id, 0.0)
        disturbed = returns_of(model, env_id, noise) if noise else plain
        rows.append((model.num_timesteps, plain.mean(), plain.std(), disturbed.mean(), disturbed.std()))
        print(f"{env_id}: {model.num_timesteps} steps, return {plain.mean():.0f} ± {plain.std():.0f}, disturbed "
              f"{disturbed.mean():.0f} ± {disturbed.std():.0f}", flush=True)
        if (good(rows[-1]) and teaches(policy_of(model)) if env_id in TAUGHT
                else rows[-1][3] - rows[-1][4] == max(mean - sd for *_, mean, sd in rows)):
            model.save(best)
        model.save(model_path)
        model.save_replay_buffer(replay_path)
        with open(progress, "w", newline="") as file:
            csv.writer(file).writerows(rows)
    assert best.exists(), f"no good policy of {env_id} could be cloned within {most} steps"
    return policy_of(CrossQ.load(best))
