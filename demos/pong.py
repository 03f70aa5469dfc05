"""An expert for Pong: PPO on the positions of ball and paddles, then for every rally the best of eight of its tries.

The policy sees what a learner sees, the 84×84 frames of `AtariVectorEnv`, reduced to a ball and two paddles. It is played
greedily but for a share of random actions: without them it can fall into a rally that never ends, and its eight tries of a
rally, on cloned emulator states, would be one. The try that scores first is played. Some rallies are meant to be lost:
an imitator that never saw the serve after a lost rally can lose the whole game with its first one.
"""
from pathlib import Path

import ale_py
import cv2
import gymnasium as gym
import numpy as np
import torch
from ale_py import ALEInterface, AtariVectorEnv, roms
from gymnasium.vector import AutoresetMode
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecEnv, VecMonitor

ACTIONS = np.array([0, 2, 3])  # stay, up, down among the game's six
ROWS, COLUMNS = np.arange(14, 77, dtype=np.float32), np.arange(11, 74, dtype=np.float32)  # the field between paddles
# Stages of training: decisions, learning rate, discount, entropy bonus, share of random actions, cost of a decision,
# cost of an action that is not the last one. The first rallies on and on; the second, in which time costs, learns to
# score; the third, in which changes cost too, learns to play calmly, which is quicker to imitate. A training with a
# bonus of 0.003 or less, and random actions in its last stage alone, stood at 1.8 a game after 4.5 million: it lost
# the same serve every time.
STAGES = [
    (2_162_688, 1e-3, 0.99, 0.01, 0.03, 0.0, 0.0),
    (2_621_440, 5e-4, 0.99, 0.003, 0.03, 0.002, 0.0),
    (1_310_720, 3e-4, 0.99, 0.001, 0.03, 0.002, 0.005),
]
NOISE = 0.03  # share of random actions in a try
LOST = 0.1  # share of the rallies that are meant to be lost; and are, where one of the eight tries loses


def see(frames: np.ndarray) -> np.ndarray:
    """Frames uint8 `[n, 84, 84]` to `[n, 5]`: ball in sight, ball x and y, own paddle's y, the opponent's y."""
    contrast = np.abs(frames[:, 14:77].astype(np.float32) - 87)  # 87 is the field's grey
    contrast *= contrast > 12
    ball = contrast[:, :, 11:74]
    mass = ball.sum((1, 2))
    seen, mass = mass > 60, np.maximum(mass, 1)
    x, y = (ball.sum(1) @ COLUMNS / mass - 42) / 32, (ball.sum(2) @ ROWS / mass - 45) / 32

    def paddle(column):
        weight = contrast[:, :, column]
        total = weight.sum(1)
        return np.where(total > 0, (weight @ ROWS / np.maximum(total, 1) - 45) / 32, 0)

    return np.stack([seen, seen * x, seen * y, paddle(74), paddle(9)], 1).astype(np.float32)


def features(history: np.ndarray) -> np.ndarray:
    """The last four sights `[n, 4, 5]` and their differences, where the ball was in sight in both: `[n, 4, 9]`."""
    change = np.zeros((len(history), 4, 4), np.float32)
    change[:, 1:] = 4 * (history[:, 1:, 1:] - history[:, :-1, 1:]) * history[:, 1:, :1] * history[:, :-1, :1]
    return np.clip(np.concatenate([history, change], 2), -2, 2)


class PongFeatures(VecEnv):
    """Many games of Pong for stable-baselines3, with the features above."""

    def __init__(self, num_envs: int, seed: int, noise: float, cost: float, change: float):
        self.env = AtariVectorEnv("pong", num_envs, reward_clipping=False, autoreset_mode=AutoresetMode.SAME_STEP)
        self.first_seed, self.noise, self.cost, self.change = seed, noise, np.float32(cost), np.float32(change)
        self.rng = np.random.default_rng(seed)
        super().__init__(num_envs, gym.spaces.Box(-2, 2, (4, 9), np.float32), gym.spaces.Discrete(3))

    def reset(self):
        obs, _ = self.env.reset(seed=self.first_seed)
        self.history = np.repeat(see(obs[:, -1])[:, None], 4, 1)
        self.chosen = np.zeros(self.num_envs, int)
        return features(self.history)

    def step_async(self, actions):
        self.changed, self.chosen = actions != self.chosen, actions
        random = self.rng.random(self.num_envs) < self.noise
        self.actions = np.where(random, self.rng.choice(ACTIONS, self.num_envs), ACTIONS[actions])

    def step_wait(self):
        obs, reward, terminated, truncated, _ = self.env.step(self.actions)
        self.history = np.concatenate([self.history[:, 1:], see(obs[:, -1])[:, None]], 1)
        infos, done = [{} for _ in reward], terminated | truncated
        for i in np.flatnonzero(done):
            infos[i]["terminal_observation"] = features(self.history[i : i + 1])[0]
            self.history[i] = self.history[i, -1]
        return features(self.history), reward.astype(np.float32) - self.cost - self.change * self.changed, done, infos

    def close(self):
        self.env.close()

    def get_attr(self, name, indices=None):
        return [None] * self.num_envs

    def set_attr(self, name, value, indices=None):
        raise NotImplementedError

    def env_method(self, name, *args, indices=None, **kwargs):
        raise NotImplementedError

    def env_is_wrapped(self, wrapper, indices=None):
        return [False] * self.num_envs


def train_expert(path: Path, seed: int = 0) -> PPO:
    """PPO through the stages; each stage is kept at `path`-<stage>, so that a second call goes on from there."""
    model = None
    for number, (steps, rate, gamma, entropy, noise, cost, change) in enumerate(STAGES):
        stage = path.with_name(f"{path.name}-{number}.zip")
        env = VecMonitor(PongFeatures(32, 1000 * (number + 1) + seed, noise, cost, change))
        settings = {"learning_rate": rate, "gamma": gamma, "ent_coef": entropy}
        if stage.exists():
            model = PPO.load(stage, device="cpu")
            continue
        if model is None:
            model = PPO("MlpPolicy", env, n_steps=128, batch_size=1024, n_epochs=4, gae_lambda=0.95, clip_range=0.2,
                        policy_kwargs={"net_arch": [128, 128]}, seed=seed, device="cpu", **settings)
        else:
            model = PPO.load(path.with_name(f"{path.name}-{number - 1}.zip"), env=env, device="cpu",
                             custom_objects=settings)
        model.learn(steps, progress_bar=False)
        model.save(stage)
    return model


def decide(emulator: ALEInterface, action: int) -> tuple[int, np.ndarray]:
    """One decision as `AtariVectorEnv` takes it, 4 frames and the maximum of the last two: reward and frame."""
    legal, reward, screens = emulator.getMinimalActionSet(), 0, []
    for _ in range(4):
        reward += emulator.act(legal[action])
        screens.append(emulator.getScreenGrayscale())
    return reward, cv2.resize(np.maximum(screens[2], screens[3]), (84, 84), interpolation=cv2.INTER_AREA)


def plan_game(model: PPO, emulators: list[ALEInterface], no_ops: int, rng: np.random.Generator) -> list[int]:
    """The actions of one game. For each rally every emulator plays a try from the same state, and the first to score
    is kept, or, where the rally is meant to be lost, the first to lose. If none does within 400 decisions, one that
    scores, else one that is still in play, else the longest."""
    first = emulators[0]
    first.reset_game()
    for _ in range(no_ops):
        first.act(first.getMinimalActionSet()[0])
    screen = cv2.resize(first.getScreenGrayscale(), (84, 84), interpolation=cv2.INTER_AREA)
    history, actions, score = np.repeat(see(screen[None])[:, None], 4, 1), [], [0, 0]
    while max(score) < 21:
        state = first.cloneState()
        for emulator in emulators:
            emulator.restoreState(state)
        histories, tries = np.repeat(history, len(emulators), 0), [[] for _ in emulators]
        result, playing = np.zeros(len(emulators)), np.ones(len(emulators), bool)
        wanted = -1 if rng.random() < LOST else 1
        for _ in range(400):
            greedy, _ = model.predict(features(histories), deterministic=True)
            chosen = ACTIONS[np.where(rng.random(len(greedy)) < NOISE, rng.integers(3, size=len(greedy)), greedy)]
            for i in np.flatnonzero(playing):
                reward, frame = decide(emulators[i], chosen[i])
                histories[i] = np.concatenate([histories[i, 1:], see(frame[None])])
                tries[i].append(int(chosen[i]))
                result[i], playing[i] = reward, reward == 0
            if (result == wanted).any() or not playing.any():
                break
        merit = 3000 * (result == wanted) + 1000 * (result > 0) + 1000 * (result >= 0)
        best = int(np.argmax(merit + [len(t) for t in tries]))
        actions += tries[best]
        score[0 if result[best] > 0 else 1] += result[best] != 0
        history = histories[best : best + 1].copy()
        first.restoreState(emulators[best].cloneState())
    return actions


def record(episodes: int, seed: int, cache: Path) -> dict[str, np.ndarray]:
    """Demonstrations as seeds, actions and returns, played again on the vector environment that loads them."""
    model = train_expert(cache)
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    emulators = []
    for _ in range(8):
        emulators.append(ALEInterface())
        emulators[-1].setFloat("repeat_action_probability", 0.0)
        emulators[-1].loadROM(roms.get_rom_path("pong"))
    seeds = np.arange(seed, seed + episodes)
    envs = AtariVectorEnv("pong", episodes, reward_clipping=False, autoreset_mode=AutoresetMode.SAME_STEP)
    _, info = envs.reset(seed=seeds)
    games = [plan_game(model, emulators, no_ops, rng) for no_ops in info["episode_frame_number"]]
    lengths, returns, running = np.array([len(game) for game in games]), np.zeros(episodes), np.ones(episodes, bool)
    for t in range(lengths.max()):
        _, reward, terminated, truncated, _ = envs.step(np.array([game[t] if t < len(game) else 0 for game in games]))
        returns += np.where(running, reward, 0)
        running &= ~(terminated | truncated)
        assert (running == (t + 1 < lengths)).all(), "the vector environment ends a game at another time"
    return {"seeds": seeds, "actions": np.concatenate(games).astype(np.int64), "episode_lengths": lengths,
            "returns": returns, "env_id": np.array("PongNoFrameskip-v4")}
