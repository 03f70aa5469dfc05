# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0", "gymnasium[classic-control,box2d]==1.4.0", "numpy==2.4.6", "tyro==1.0.17",
#   "tqdm==4.70.1", "wandb==0.31.0", "moviepy==2.2.1",
# ]
# ///
"""Inverse soft-Q Learning (IQ-Learn, arXiv:2106.12142): imitation online, with discrete actions.

One network Q(s, a) is the policy, softmax(Q/τ), and the reward, r = Q(s,a) − γ V(s'). It minimises

    L = −E_expert[φ(r)] + (value term)    with χ²: −E_expert[r] + (value term) + E[r²]/(4α)

over demonstrations and the agent's own play. The value term is E[V(s) − γ V(s')] over both (`--value-loss value`), but
(1−γ)·E_expert[V(s)] (`v0_expert`) in the CartPole run below, and play is left out on LunarLander: see SETTINGS. The
environment's reward is never read in training.

    python iq_discrete.py --env-id CartPole-v1 --num-demos 1 --subsample-freq 20

scores 500.0 ± 0.0 over seeds 111 to 115 after 20,000 steps, from 25 transitions (cloning 372.4 ± 105.7), a
normalized score of 0.95 for the first time after 4,000 to 6,000; a minute or two of one core. The README has the rest.

Departures from the paper are marked DEVIATION where they act. This is the first of the five scripts:
`diff iq_discrete.py iq_atari.py` shows what pixels need.
"""
import csv
import importlib.util
import json
import os
import pickle
import re
import shlex
import shutil
import signal
import struct
import sys
import threading
import time
import zipfile
import zlib
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from gymnasium.vector import AutoresetMode
from tqdm import tqdm

SCRIPT = "iq_discrete"
# Mean return of uniformly random actions, 100 episodes, seeds 0 to 99; measured when an environment is missing.
RANDOM_RETURN = {"CartPole": 23.0, "Acrobot": -498.2, "LunarLander": -186.5}
# Tasks that look the same in a mirror: which entry of the observation its image has at each place, counted from 1, minus for
# the other sign; then which action stands for each.
MIRROR = {"CartPole": ((-1, -2, -3, -4), (1, 0)), "Acrobot": ((1, -2, 3, -4, -5, -6), (2, 1, 0)),
          "LunarLander": ((-1, 2, -3, 4, -5, -6, 8, 7), (0, 3, 2, 1))}
# Settings that differ per environment, by its name without the version; a flag that is given always wins.
SETTINGS: dict[str, dict] = {
    # DEVIATION: 489 from 25 transitions after 10,000 steps (24 seeds of a vectorised copy), 384 with `value`, τ 1, α 50.
    # It pays for surviving: imitating one that only pushes left, and falls, scores 9 with `--absorbing`, 478 without;
    # the flag changes nothing with the bundled demonstrations, none of which ends by itself.
    "CartPole": {"gamma": 0.97, "temperature": 0.1, "chi2_alpha": 0.05, "value_loss": "v0_expert",
                 "absorbing": True, "target_rate": 0.01, "average_rate": 0.0005},
    "Acrobot": {"temperature": 0.1, "total_timesteps": 10_000},
    # DEVIATION: as τ 0.01, α 0.5 with Q 100 times as large, so that the first policies are soft. Only expert rows are in
    # the loss (iq_offline.py's): play is not trained on. With play in it (`--value-loss value --chi2-rows both`) 11 instead
    # of 162 from one trajectory, and 276 instead of 277 from ten, not mirrored. Mirrored, 272 from one trajectory.
    "LunarLander": {"temperature": 1.0, "chi2_alpha": 50.0, "value_loss": "value_expert", "chi2_rows": "expert",
                    "hidden_size": 256, "learning_rate": 3e-4, "average_rate": 0.0005, "mirror": True},
    "GridWorld": {"total_timesteps": 5_000},
}
# Where walls, start or goal of the GridWorld are random. DEVIATION: 4,000 of 4,500 updates are on demonstrations alone. In
# walls that no demonstration has 96 of 100 goals are reached, by the MLP 25.
RANDOM_GRID = {"network": "cnn", "hidden_size": 16, "num_demos": 0, "pretrain_updates": 4_000, "total_timesteps": 500,
               "eval_every": 1_000, "value_loss": "value_expert", "chi2_alpha": 5.0, "temperature": 0.1}


# ----------------------------------------------------------------------------------------------- Args
@dataclass
class Args:
    # The task
    env_id: str = "CartPole-v1"  # a gymnasium environment with discrete actions, or GridWorld-v0
    seed: int = 1  # of everything: demonstrations drawn, networks, environments
    pretrain_updates: int = 0  # updates on demonstrations alone, before any play
    total_timesteps: int = 20_000  # environment steps, summed over the environments
    num_envs: int = 1  # environments stepped side by side
    # GridWorld-v0 only
    grid_size: int = 8  # cells along a side
    random_walls: bool = False  # new walls each episode
    random_start: bool = False  # a new start each episode (off: top left)
    random_goal: bool = False  # a new goal each episode (off: bottom right)
    stay_action: bool = False  # a fifth action that stays
    # Demonstrations
    demos: str | None = None  # an .npz file or a Minari dataset id (default: the bundled file)
    num_demos: int = 10  # trajectories, drawn by the seed; 0 for all
    subsample_freq: int = 1  # keep every k-th transition of a trajectory, from a random offset
    mirror: bool = False  # learn from the transitions' mirror images, too (CartPole, Acrobot, LunarLander)
    dones_are: Literal["terminations", "time-limits"] | None = None  # what a file's `dones` mark
    # The objective (the letters of the equations in brackets)
    objective: Literal["iq", "bc"] = "iq"  # IQ-Learn, or behavioural cloning with the same network
    gamma: float = 0.99  # discount [γ]
    temperature: float = 0.01  # entropy temperature of value and policy [τ]; 0 for the hard maximum
    divergence: Literal["chi2", "tv", "kl", "forward_kl", "hellinger", "js", "w1"] = "chi2"  # distance [φ]
    chi2_alpha: float | None = None  # of the χ² term, E[r²]/(4α) [α] (default: 0.5 with chi2, else no χ² term)
    chi2_rows: Literal["expert", "both"] = "both"  # rows that the χ² term averages over: expert's, or policy's too
    value_loss: Literal["value", "value_expert", "v0", "v0_expert"] = "value"  # V−γV': all | expert; (1−γ)V: s0 | expert
    absorbing: bool = False  # at a termination V(s') is an absorbing state's, not 0 (v0 forms, χ² on both, φ(r) = r)
    gradient_penalty: float = 10.0  # weight of the gradient penalty [λ], with w1 alone
    q_bound: float | None = None  # |Q| bounded by a tanh; 0 for none (default: 10 with tv, else none)
    target_rate: float = 0.0  # Polyak rate of a target network for V(s'); 0: none, V(s') has gradient
    average_rate: float = 0.0  # rate of a moving average of the weights, evaluated and saved in their place; 0: none
    # The network
    network: Literal["mlp", "cnn"] = "mlp"  # the CNN is for GridWorld
    hidden_size: int = 64  # units (cnn: channels) of a layer
    standardize_obs: bool = False  # standardise observations by the demonstrations
    obs_noise: float = 0.0  # standard deviation of Gaussian noise on training observations
    # Optimisation
    learning_rate: float = 1e-3  # of Adam
    batch_size: int = 32  # expert rows, and as many policy rows
    buffer_size: int = 100_000  # transitions of the agent's own that are kept
    updates_per_step: float = 1.0  # gradient updates per environment step (bc: as many in all, without play)
    # The run
    eval_every: int = 2_000  # steps (in pretraining: updates) between evaluations; 0: none at all
    eval_episodes: int = 20  # episodes of an evaluation
    out_dir: str = "runs"  # where run directories go
    run_name: str | None = None  # the run's directory (default: environment, script, seed, time)
    track: bool = False  # log to Weights & Biases
    wandb_project_name: str = "iq-learn"  # its project
    wandb_entity: str | None = None  # its team
    capture_video: bool = False  # record the last evaluation's first episode
    save_model: bool = True  # write model.pt
    checkpoint_every: int = 2_000  # steps or updates between checkpoints; 0: only at the end or when stopped
    resume: str | None = None  # a run directory to continue
    evaluate: str | None = None  # a model.pt to play instead of training
    cuda: bool = True  # use a GPU if there is one
    compile: bool = False  # torch.compile loss and gradient


MAY_CHANGE_ON_RESUME = {"total_timesteps", "eval_every", "eval_episodes", "track", "wandb_project_name",
                        "wandb_entity", "capture_video", "save_model", "checkpoint_every", "resume"}


class BadInput(Exception):
    """A mistake that the user can mend, told in one sentence; exit status 2."""


def check(condition: bool, message: str) -> None:
    """Raise `BadInput(message)` unless `condition` holds."""
    if not condition:
        raise BadInput(message)


def env_name(env_id: str) -> str:
    """The name without version, namespace and module: `Hopper-v5` and `mine:Hopper-v5` give `Hopper`."""
    return re.split("[/:]", re.sub(r"-v\d+$", "", env_id))[-1]


def parse_args(argv: list[str] | None = None) -> Args:
    """Flags over the environment's settings over the defaults; with `--resume`, over the stopped run's own.

    Raises:
        BadInput: `--resume` with no run there, of another script, or with a setting that must not change; `--evaluate`
            with no model there.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = tyro.cli(Args, args=[flag for flag in argv if flag not in ("-h", "--help")])  # help comes with the settings
    if args.evaluate is not None:  # the environment is the model's own, and so are its switches
        own = load_model(args.evaluate)[1]["args"]
        switches = {name: own[name] for name in ("grid_size", *GRID_SWITCHES)}
        return tyro.cli(Args, args=argv, default=replace(Args(), env_id="", **switches))
    if args.resume is None:
        settings = dict(SETTINGS.get(env_name(args.env_id), {}))
        if args.env_id == "GridWorld-v0" and (args.random_walls or args.random_start or args.random_goal):
            settings |= RANDOM_GRID
        if args.divergence != "chi2":  # without chi2 its term is added only for a given --chi2-alpha
            settings.pop("chi2_alpha", None)
            if settings.pop("absorbing", False):  # else no term of the v0 forms reads play's r: use `value`
                settings.pop("value_loss")
        return tyro.cli(Args, args=argv, default=replace(Args(), **settings))
    run_dir = Path(args.resume)
    check(os.path.isfile(run_dir / "checkpoint.pt"), f"--resume {run_dir}: no checkpoint.pt found there")
    try:
        stored = json.loads((run_dir / "args.json").read_text())
        script = stored.pop("script")
        stored = Args(**stored) if script == SCRIPT else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadInput(f"--resume {run_dir}: its args.json cannot be used ({error})") from None
    check(stored is not None, f"--resume {run_dir}: a run of {script}.py, expected one of {SCRIPT}.py")
    stored = replace(stored, out_dir=str(run_dir.resolve().parent), run_name=run_dir.resolve().name)
    args = tyro.cli(Args, args=argv, default=stored)
    if (Path(args.out_dir) / args.run_name).resolve() == run_dir.resolve():  # the same place in other words
        args = replace(args, out_dir=stored.out_dir, run_name=stored.run_name)
    if args.demos and os.path.abspath(args.demos) == stored.demos:
        args = replace(args, demos=stored.demos)
    for name, value in asdict(args).items():
        old = getattr(stored, name)
        check(value == old or name in MAY_CHANGE_ON_RESUME,
              f"--{name.replace('_', '-')} {value}: the run in {run_dir} has {old}, and a resumed run keeps it")
    return args


def validate(args: Args) -> None:
    """Check the numbers among the flags. Raises BadInput."""
    rules = {
        "at least 1": (lambda x: x >= 1, "num_envs subsample_freq batch_size buffer_size eval_episodes hidden_size"),
        "at least 0 and finite": (lambda x: 0 <= x < np.inf, "seed pretrain_updates total_timesteps num_demos "
                       "temperature gradient_penalty obs_noise eval_every checkpoint_every"),
        "at most 2 million (evaluation seeds, 100,000 + 1,000 times it, have 31 bits)": (lambda x: x <= 2_000_000, "seed"),
        "above 0 and finite": (lambda x: 0 < x < np.inf, "learning_rate updates_per_step"),
        "at least 0 and below 1": (lambda x: 0 <= x < 1, "gamma"),
        "from 0 to 1": (lambda x: 0 <= x <= 1, "target_rate average_rate"),
        "at least 3": (lambda x: x >= 3, "grid_size"),
    }
    for rule, (holds, names) in rules.items():
        for name in names.split():
            value = getattr(args, name)
            check(holds(value), f"--{name.replace('_', '-')} {value}: expected {rule}")
    for name, value in asdict(args).items():  # larger sizes overflow in numpy and torch
        check(not isinstance(value, int) or value < 2**53, f"--{name.replace('_', '-')} {value}: expected less than 2^53")
    check(not args.track or importlib.util.find_spec("wandb"), "--track: it needs `pip install wandb`")
    check(not args.capture_video or importlib.util.find_spec("moviepy"), "--capture-video: it needs `pip install moviepy`")
    check(not args.capture_video or args.evaluate or args.eval_every,
          "--capture-video: with --eval-every 0 there is no evaluation to record")
    check(args.buffer_size >= args.num_envs, f"--buffer-size {args.buffer_size}: expected --num-envs or more")
    check(args.chi2_alpha is None or 0 < args.chi2_alpha < np.inf,
          f"--chi2-alpha {args.chi2_alpha}: expected above 0 and finite")
    check(args.q_bound is None or 0 <= args.q_bound < np.inf, f"--q-bound {args.q_bound}: expected at least 0 and finite")


def check_compiler(device) -> None:
    """Compile something small: raises BadInput where `torch.compile` cannot work, without a C++ compiler say."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except Exception as error:
        raise BadInput(f"--compile: {str(error).splitlines()[0]}") from None


# ---------------------------------------------------------------------------------------- Environment
class GridWorld(gym.Env):
    """A grid with walls on 20 % of its cells: walk from the start to the goal (GridWorld-v0).

    Observation: float32 `[3, size, size]`, planes of walls, agent and goal. Actions: up, down, left, right and,
    with `stay_action`, stay. Reward 1 at the goal, which terminates; truncated after `4·size` steps.
    """

    metadata = {"render_modes": ["rgb_array", "ansi"], "render_fps": 8}
    MOVES = np.array([(-1, 0), (1, 0), (0, -1), (0, 1), (0, 0)])

    def __init__(self, size: int = 8, random_walls: bool = False, random_start: bool = False,
                 random_goal: bool = False, stay_action: bool = False, render_mode: str | None = None):
        self.size, self.render_mode = size, render_mode
        self.random_walls, self.random_start, self.random_goal = random_walls, random_start, random_goal
        self.observation_space = gym.spaces.Box(0.0, 1.0, (3, size, size), np.float32)
        self.action_space = gym.spaces.Discrete(5 if stay_action else 4)
        if not random_walls:  # the one layout of this size, whatever the seed
            self.walls = self._draw_walls(np.random.default_rng(0))

    def _draw_walls(self, rng: np.random.Generator) -> np.ndarray:
        """Walls bool `[size, size]` with both corners free and connected."""
        while True:
            walls = np.zeros(self.size**2, bool)
            walls[1 + rng.choice(self.size**2 - 2, round(0.2 * self.size**2), replace=False)] = True
            walls = walls.reshape(self.size, self.size)
            if self.distances(walls, (self.size - 1, self.size - 1))[0, 0] >= 0:
                return walls

    @staticmethod
    def distances(walls: np.ndarray, goal: tuple[int, int]) -> np.ndarray:
        """Steps from every cell to `goal`, int `[size, size]`; −1 where it cannot be reached."""
        distance = np.full(walls.shape, -1)
        distance[goal], frontier = 0, [goal]
        for row, column in frontier:
            for r, c in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
                if 0 <= r < len(walls) and 0 <= c < len(walls) and not walls[r, c] and distance[r, c] < 0:
                    distance[r, c] = distance[row, column] + 1
                    frontier.append((r, c))
        return distance

    def _observation(self) -> np.ndarray:
        planes = np.zeros(self.observation_space.shape, np.float32)
        planes[0] = self.walls
        planes[1][self.agent] = planes[2][self.goal] = 1
        return planes

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        if self.random_walls:
            self.walls = self._draw_walls(self.np_random)
        self.agent, self.goal, self.steps = (0, 0), (self.size - 1, self.size - 1), 0
        if self.random_goal:  # any cell that the top left corner is connected to
            cells = np.argwhere(self.distances(self.walls, (0, 0)) > 0)
            self.goal = tuple(map(int, self.np_random.choice(cells)))
        if self.random_start:
            cells = np.argwhere(self.distances(self.walls, self.goal) > 0)
            self.agent = tuple(map(int, self.np_random.choice(cells)))
        return self._observation(), {}

    def step(self, action: int):
        row, column = map(int, self.agent + self.MOVES[action])
        if 0 <= row < self.size and 0 <= column < self.size and not self.walls[row, column]:
            self.agent = (row, column)
        self.steps += 1
        terminated = self.agent == self.goal
        truncated = not terminated and self.steps >= 4 * self.size
        return self._observation(), float(terminated), terminated, truncated, {}

    def render(self):
        if self.render_mode == "ansi":
            grid = np.where(self.walls, "#", ".")
            grid[self.goal], grid[self.agent] = "G", "A"
            return "\n".join("".join(row) for row in grid) + "\n"
        image = np.where(self.walls[..., None], (60, 60, 60), (235, 235, 235)).astype(np.uint8)
        image[self.goal], image[self.agent] = (40, 160, 70), (40, 90, 200)
        return image.repeat(32, 0).repeat(32, 1)


gym.register("GridWorld-v0", entry_point=GridWorld)
GRID_SWITCHES = ("random_walls", "random_start", "random_goal", "stay_action")


class Plain(gym.Wrapper):
    """Observations as copies, since an environment may write the next one over the last, actions in the space's own dtype,
    rewards as numbers, also where they are arrays of one, and no infos, which a vector environment would have to stack."""

    def reset(self, **options):
        return np.array(self.env.reset(**options)[0]), {}

    def step(self, action):
        obs, reward, terminated, truncated, _ = self.env.step(np.asarray(action, self.env.action_space.dtype)[()])
        return np.array(obs), np.asarray(reward).item(), terminated, truncated, {}


def make_envs(args: Args, num_envs: int, render_mode: str | None = None) -> gym.vector.VectorEnv:
    """Environments stepped together. SAME_STEP: the default autoreset would store a fake transition from an
    episode's end to the next one's start; here the true last observation is `info["final_obs"]`.

    Raises:
        BadInput: an unknown environment, or one whose spaces this script does not handle.
    """
    check(not re.search("NoFrameskip|^ALE/", args.env_id),
          f"--env-id {args.env_id}: an Atari game, which iq_atari.py is for")
    check(args.env_id != "GridWorld", "--env-id GridWorld: expected GridWorld-v0")  # else without its switches
    grid = {"size": args.grid_size} | {switch: getattr(args, switch) for switch in GRID_SWITCHES}
    try:
        envs = gym.make_vec(args.env_id, num_envs=num_envs, vectorization_mode="sync", wrappers=[Plain],
                            vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP},
                            **({"render_mode": render_mode} if render_mode else {}),  # not every constructor takes it
                            **(grid if args.env_id == "GridWorld-v0" else {}))
    except Exception as error:  # each constructor has its own
        raise BadInput(f"--env-id {args.env_id}: {' '.join(str(error).split())}") from None
    obs_space, action_space = envs.single_observation_space, envs.single_action_space
    check(not isinstance(action_space, gym.spaces.Box),
          f"--env-id {args.env_id}: its actions are continuous, which iq_continuous.py is for")
    check(isinstance(action_space, gym.spaces.Discrete) and action_space.start == 0,
          f"--env-id {args.env_id}: its action space is {action_space}, expected Discrete(n) from 0")
    check(isinstance(obs_space, gym.spaces.Box) and len(obs_space.shape) > 0,
          f"--env-id {args.env_id}: its observation space is {obs_space}, expected a Box of one dimension or more")
    if render_mode:  # told before training, not after it
        try:
            envs.reset()
            if np.ndim(envs.envs[0].render()) != 3:
                raise ValueError("it renders no array [H, W, 3]")
        except Exception as error:  # each simulator has its own: no display, a package missing
            raise BadInput(f"--capture-video: {args.env_id} cannot be rendered here: "
                           f"{' '.join(str(error).split()) or type(error).__name__}") from None
    return envs


# ------------------------------------------------------------------------------------------- Networks
class QNetwork(nn.Module):
    """Q(s, ·): observations `[B, *obs_shape]` to `[B, num_actions]`.

    It holds the observation statistics, so that a saved network takes raw observations; what enters the layers is
    clipped at ±`obs_limit`. With `q_bound` the output is `q_bound·tanh(x/q_bound)`.
    """

    def __init__(self, obs_shape: tuple[int, ...], num_actions: int, network: str = "mlp", hidden_size: int = 64,
                 q_bound: float = 0.0, obs_limit: float = 10.0):
        super().__init__()
        self.sizes = {"obs_shape": tuple(obs_shape), "num_actions": num_actions, "network": network,
                      "hidden_size": hidden_size, "q_bound": q_bound, "obs_limit": obs_limit}
        self.q_bound, self.obs_limit = q_bound, obs_limit
        self.register_buffer("obs_mean", torch.zeros(obs_shape))
        self.register_buffer("obs_std", torch.ones(obs_shape))
        if network == "mlp":
            self.layers = nn.Sequential(
                nn.Flatten(),
                nn.Linear(int(np.prod(obs_shape)), hidden_size), nn.ReLU(),
                nn.Linear(hidden_size, hidden_size), nn.ReLU(),
                nn.Linear(hidden_size, num_actions),
            )
        else:
            self.layers = GridCNN(obs_shape, num_actions, hidden_size)

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        q = self.layers(((obs - self.obs_mean) / self.obs_std).clamp(-self.obs_limit, self.obs_limit))
        return self.q_bound * torch.tanh(q / self.q_bound) if self.q_bound else q


class GridCNN(nn.Module):
    """A fully convolutional network over the grid, read out at the agent's cell (under `--obs-noise` with a little of
    the others): planning is the same computation wherever the agent stands, so what is learned on some walls carries to
    others."""

    def __init__(self, obs_shape: tuple[int, ...], num_actions: int, channels: int):
        super().__init__()
        self.first = nn.Conv2d(obs_shape[0], channels, 3, padding=1)
        self.repeated = nn.Conv2d(channels, channels, 3, padding=1)
        self.head = nn.Linear(channels, num_actions)
        self.depth = 2 * obs_shape[-1]  # information travels one cell a layer

    def forward(self, planes: torch.Tensor) -> torch.Tensor:
        first = self.first(planes)
        x = F.relu(first)
        for _ in range(self.depth):
            x = F.relu(first + self.repeated(x))
        return self.head((x * planes[:, 1:2]).sum((2, 3)))


# --------------------------------------------------------------------------- Demonstrations and replay
class Batch(NamedTuple):
    """Transitions; the environment's reward is not among them."""

    obs: torch.Tensor  # [B, *obs_shape] float32
    action: torch.Tensor  # [B] int64
    next_obs: torch.Tensor  # [B, *obs_shape] float32, at an episode's end the true last observation
    terminated: torch.Tensor  # [B] float32, 1 where the episode ended by itself, not by a time limit


class Demonstrations(NamedTuple):
    """The expert's transitions on the device, and what is reported of them."""

    transitions: Batch
    initial_obs: torch.Tensor  # [episodes, *obs_shape], first states, kept before subsampling; then their images (--mirror)
    expert_return: float  # mean return of the trajectories used; NaN without rewards in the file
    end_rate: float  # share of their transitions, before subsampling, that ended an episode by themselves


UNREADABLE = (ValueError, OSError, EOFError, MemoryError, RuntimeError, struct.error, zipfile.BadZipFile, zlib.error)


def read_npz(path: str, names: list[str] | None = None) -> dict[str, np.ndarray]:
    """The named arrays of an .npz file (None: its keys alone); nothing else is read and nothing is ever unpickled.

    Raises:
        BadInput: no such file, not an .npz, cut off, pickled or other strange content, or a name missing.
    """
    check(os.path.isfile(path), f"--demos {path}: no such file")
    check(zipfile.is_zipfile(path), f"--demos {path}: not an .npz file, or one that is cut off")
    try:
        with np.load(path, allow_pickle=False) as file:
            if names is None:
                return dict.fromkeys(file.files)
            missing = [name for name in names if name not in file.files]
            check(not missing, f"--demos {path}: keys {missing} are missing, it has {file.files}")
            arrays = {name: file[name] for name in names}
    except UNREADABLE as error:
        raise BadInput(f"--demos {path}: cannot be read as plain arrays: {' '.join(str(error).split())}") from None
    strange = [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]
    check(not strange, f"--demos {path}: {strange} hold something else than an array")
    return arrays


def read_minari(dataset_id: str) -> dict[str, np.ndarray]:
    """A Minari dataset as the arrays of the .npz format.

    Raises:
        BadInput: `minari` is not installed, or no such dataset.
    """
    try:
        import minari
    except ImportError:
        raise BadInput(f"--demos {dataset_id}: a Minari dataset needs `pip install minari[hdf5,hf]`") from None
    try:
        dataset = minari.load_dataset(dataset_id, download=True)
        episodes = list(tqdm(dataset.iterate_episodes(), total=dataset.total_episodes, desc="reading", disable=None))
    except Exception as error:  # minari raises many kinds: no such dataset, no network, a broken file
        raise BadInput(f"--demos {dataset_id}: Minari cannot load it: {' '.join(str(error).split())}") from None
    names = ("observations", "actions", "terminations", "truncations", "rewards")
    check(episodes and all(isinstance(getattr(e, name), np.ndarray) for e in episodes for name in names),
          f"--demos {dataset_id}: it holds no episodes, or some of their {', '.join(names)} are not plain arrays")
    arrays = {name: np.concatenate([getattr(e, name) for e in episodes]) for name in names}
    return arrays | {"episode_lengths": np.array([len(e.actions) for e in episodes]),
                     "env_id": np.array(dataset.env_spec.id if dataset.env_spec else "unknown")}


def demonstrations_path(args: Args) -> str:
    """`--demos`, or the bundled file beside this script. Raises BadInput if there is neither."""
    if args.demos is not None:
        return args.demos
    name = args.env_id.replace("/", "-")
    if args.env_id == "GridWorld-v0":
        name += "".join(f"-{switch.replace('_', '-')}" for switch in GRID_SWITCHES if getattr(args, switch))
    path = Path(__file__).resolve().parent / "demos" / f"{name}.npz"
    check(os.path.isfile(path), f"--demos: none bundled for {name} ({path} is not there), so give an .npz file with "
          "observations, actions, terminations, truncations, episode_lengths and env_id, or a Minari dataset id")
    return str(path)


def read_demonstrations(args: Args, *formats: list[str]) -> tuple[str, dict[str, np.ndarray]]:
    """Where they came from, for messages, and the arrays of the first format whose first name is in the file, with
    `rewards` if it is there beside observations. Raises BadInput (also for `dones` unexplained)."""
    path = demonstrations_path(args)
    where = f"--demos {path}"
    print(f"loading demonstrations from {path}", flush=True)
    if not path.endswith(".npz") and not os.path.exists(path) and re.search(r"-v\d+$", path):
        return where, read_minari(path)
    keys = read_npz(path)
    likely = max(formats, key=lambda names: len(keys.keys() & set(names)))
    names = next((names for names in formats if names[0] in keys), likely)
    names = names + [name for name in ("rewards",) if name in keys and "observations" in names]
    ends = {"terminations", "truncations"}
    if "dones" not in keys or ends <= keys.keys() or not ends <= set(names):
        return where, read_npz(path, names)
    if "terminations" in keys:  # training reads no truncations
        return where, read_npz(path, [name for name in names if name != "truncations"])
    check(args.dones_are is not None, f"{where}: it has `dones`, which do not tell an episode that ended by itself, "
          "where V(s') is 0, from one that a time limit cut: give --dones-are terminations or time-limits")
    data = read_npz(path, [name for name in names if name not in ends] + ["dones"])
    dones, ended = data["dones"], args.dones_are == "terminations"
    no = np.zeros(dones.shape, bool)
    return where, data | {"terminations": dones if ended else no, "truncations": no if ended else dones}


def check_demonstrations(where: str, data: dict[str, np.ndarray], args: Args, num_actions: int) -> None:
    """Episode lengths, actions, ends and environment as the format has them. Raises BadInput."""
    lengths, actions = data["episode_lengths"], data["actions"]
    check(lengths.ndim == 1 and lengths.dtype.kind in "iu" and (lengths > 0).all(),
          f"{where}: episode_lengths of {lengths.dtype} and shape {lengths.shape}, with values {np.unique(lengths)[:5]}, "
          "expected positive integers")
    check(len(lengths) > 0, f"{where}: it holds no episodes")
    check(actions.ndim > 0 and (lengths <= len(actions)).all(),
          f"{where}: episode_lengths up to {lengths.max()}, and actions of shape {actions.shape}")
    lengths = data["episode_lengths"] = lengths.astype(np.int64)
    for name in ("actions", "dones", "terminations", "truncations", "rewards"):
        if name in data:
            check(data[name].shape[:1] == (lengths.sum(),), f"{where}: {name} of shape {data[name].shape}, expected "
                  f"{lengths.sum()}, the sum of episode_lengths")
    check(actions.dtype.kind in "iu" and actions.ndim == 1,
          f"{where}: actions are {actions.dtype} of shape {actions.shape}, expected int64 of shape (T,)")
    check((actions >= 0).all() and (actions < num_actions).all(),
          f"{where}: actions from {actions.min()} to {actions.max()}, {args.env_id} has 0 to {num_actions - 1}")
    for name in ("dones", "terminations", "truncations"):
        if name in data:
            check(data[name].ndim == 1 and data[name].dtype.kind in "biuf" and np.isin(data[name], (0, 1)).all(),
                  f"{where}: {name} of {data[name].dtype} and shape {data[name].shape}, with values "
                  f"{np.unique(data[name])[:5]}, expected true or false")
    inside = np.setdiff1d(np.flatnonzero(data.get("terminations", [])), np.cumsum(lengths) - 1)
    if len(inside):
        print(f"warning: {where}: {len(inside)} terminations before the end of an episode, the first at action {inside[0]}; "
              "are episode_lengths right?", file=sys.stderr)
    if "rewards" in data:
        check(data["rewards"].ndim == 1 and data["rewards"].dtype.kind in "biuf",
              f"{where}: rewards of {data['rewards'].dtype} and shape {data['rewards'].shape}, expected a number "
              "for each action")
    recorded = data["env_id"].reshape(-1)[0] if data["env_id"].size else "unknown"
    recorded = recorded.decode(errors="replace") if isinstance(recorded, bytes) else str(recorded)
    check(env_name(recorded) in (env_name(args.env_id), "unknown"),
          f"{where}: recorded in {recorded}, and --env-id is {args.env_id}")
    if recorded.split(":")[-1] != args.env_id.split(":")[-1]:
        print(f"warning: demonstrations of {recorded} are used for {args.env_id}", file=sys.stderr)
    check(args.num_demos <= len(lengths), f"--num-demos {args.num_demos}: {where} holds {len(lengths)} episodes; "
          "0 takes all of them")


def choose_transitions(args: Args, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`--num-demos` episodes drawn by the seed, and every `--subsample-freq`-th transition of each, from a random
    offset (a short episode keeps at least one).

    Returns:
        The episodes `[E]`, and for each transition `[N]` its episode's place among them and its time.
    """
    rng = np.random.default_rng(args.seed)
    chosen = rng.permutation(len(lengths))[: args.num_demos or len(lengths)]
    times = [np.arange(rng.integers(min(args.subsample_freq, length)), length, args.subsample_freq)
             for length in lengths[chosen]]
    return chosen, np.repeat(np.arange(len(chosen)), [len(t) for t in times]), np.concatenate(times)


def load_demonstrations(args: Args, obs_shape: tuple[int, ...], num_actions: int, device) -> Demonstrations:
    """The drawn trajectories' transitions, checked and on the device.

    Raises:
        BadInput: whatever is wrong with the file, in the fields that are read.
    """
    names = ["observations", "actions", "terminations", "truncations", "episode_lengths", "env_id"]
    where, data = read_demonstrations(args, names)
    check_demonstrations(where, data, args, num_actions)
    obs, lengths = data["observations"], data["episode_lengths"]
    check(obs.dtype.kind == "f", f"{where}: observations are {obs.dtype}, expected float32")
    check(obs.shape[1:] == tuple(obs_shape),
          f"{where}: an observation has shape {obs.shape[1:]}, one of {args.env_id} has {tuple(obs_shape)}")
    check(len(obs) == (lengths + 1).sum(), f"{where}: {len(obs)} observations, expected {(lengths + 1).sum()}, one "
          "more than its length for each episode")
    with np.errstate(over="ignore"):
        obs = obs.astype(np.float32)
    check(np.isfinite(obs).all(), f"{where}: observations hold values that are NaN or infinite in float32")

    chosen, place, t = choose_transitions(args, lengths)
    first_action = (np.cumsum(lengths) - lengths)[chosen]
    first_obs = first_action + chosen  # an episode has one observation more than actions
    row, step = first_obs[place] + t, first_action[place] + t
    returns = np.nan
    if "rewards" in data:
        rewards = data["rewards"].astype(np.float64)  # whatever they are stored in
        returns = [rewards[i : i + length].sum() for i, length in zip(first_action, lengths[chosen])]

    def tensor(x, dtype=torch.float32):
        return torch.as_tensor(x, dtype=dtype, device=device)

    actions = data["actions"][step].astype(np.int64)
    transitions = Batch(tensor(obs[row]), tensor(actions, torch.int64), tensor(obs[row + 1]),
                        tensor(data["terminations"][step].astype(np.float32)))
    print(f"loaded {len(chosen)} of {len(lengths)} episodes, {len(t)} of their {lengths[chosen].sum()} transitions, "
          f"expert return {np.mean(returns):.1f} ± {np.std(returns):.1f}, device {device}", flush=True)
    ended = data["terminations"][first_action + lengths[chosen] - 1]
    return Demonstrations(transitions, tensor(obs[first_obs]), float(np.mean(returns)), ended.sum() / lengths[chosen].sum())


def draw(demos: Demonstrations, n: int) -> Batch:
    """`n` transitions drawn with replacement, on their device."""
    action = demos.transitions.action
    index = torch.randint(len(action), (n,), device=action.device)
    return Batch(*(field.index_select(0, index) for field in demos.transitions))


def mirrored(x: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """The image of `x` `[N, n]` in the mirror: its entries in this order and with these signs (MIRROR)."""
    index = torch.tensor(order, device=x.device)
    return x[:, index.abs() - 1] * index.sign()


def add_images(demos: Demonstrations, name: str, num_actions: int) -> Demonstrations:
    """The demonstrations of environment `name` and, behind them, their mirror images: an expert could have shown those.
    Without images, and with a warning, where the sizes are not those in MIRROR.

    DEVIATION: the paper has what was recorded alone.

    Raises:
        BadInput: MIRROR has no such environment.
    """
    check(name in MIRROR, f"--mirror: {name} is not known to look the same in a mirror, only {', '.join(MIRROR)}")
    obs_order, action_order = MIRROR[name]
    obs, action, next_obs, terminated = demos.transitions
    if (obs.shape[1:], num_actions) != ((len(obs_order),), len(action_order)):
        print(f"warning: no mirror images: observations of shape {tuple(obs.shape[1:])} and {num_actions} actions, "
              f"{name} has ({len(obs_order)},) and {len(action_order)}", file=sys.stderr)
        return demos
    images = Batch(mirrored(obs, obs_order), torch.tensor(action_order, device=action.device)[action],
                   mirrored(next_obs, obs_order), terminated)
    print(f"and their mirror images, {2 * len(obs)} transitions in all (--mirror)", flush=True)
    return demos._replace(transitions=Batch(*map(torch.cat, zip(demos.transitions, images))),
                          initial_obs=torch.cat([demos.initial_obs, mirrored(demos.initial_obs, obs_order)]))


def deviation(obs: torch.Tensor, seen: int | None = None) -> torch.Tensor:
    """Standard deviation of each entry of observations `[N, *obs_shape]`, at least 0.01 for near-constant ones; it
    prints how many of the first `seen` entries (None: all) vary by less."""
    std = obs.std(0, correction=0)
    if small := int(((std > 1e-6) & (std < 0.01)).view(-1)[:seen].sum()):  # 1e-6: rounding
        print(f"{small} entries of an observation have a standard deviation below 0.01 and are divided by 0.01: "
              "rescale them if only their unit is small", flush=True)
    return std.clamp(min=0.01)


class Replay:
    """Rows of tensors, preallocated on the device: the oldest are overwritten, none unwritten is drawn. BadInput where they
    cannot be allocated."""

    def __init__(self, size: int, fields: list[tuple[tuple[int, ...], torch.dtype]], device):
        try:
            self.storage = [torch.zeros(size, *shape, dtype=dtype, device=device) for shape, dtype in fields]
        except RuntimeError as error:
            raise BadInput(f"--buffer-size {size}: {str(error).splitlines()[0]}") from None
        self.size, self.written, self.device = size, 0, device

    def add(self, *rows: torch.Tensor) -> None:
        """Write `[n]` rows, a tensor for each field."""
        n = len(rows[0])
        index = torch.arange(self.written, self.written + n, device=self.device) % self.size
        for field, values in zip(self.storage, rows, strict=True):
            field.index_copy_(0, index, values)
        self.written += n

    def sample(self, n: int) -> list[torch.Tensor]:
        """`n` rows drawn with replacement from those written."""
        index = torch.randint(min(self.written, self.size), (n,), device=self.device)
        return [field.index_select(0, index) for field in self.storage]

    def state_dict(self) -> dict:
        return {"written": self.written, "storage": [field[: self.written].clone() for field in self.storage]}

    def load_state_dict(self, state: dict) -> None:
        self.written = state["written"]
        for field, rows in zip(self.storage, state["storage"], strict=True):
            field[: len(rows)] = rows


# --------------------------------------------------------------------------------------- IQ objective
def soft_value(q: torch.Tensor, temperature: float) -> torch.Tensor:
    """V(s) = τ·logsumexp_a(Q(s,a)/τ) `[B]` of Q(s,·) `[B, A]`; at τ = 0 the maximum (paper, §3 and Eq. 10)."""
    if temperature == 0:
        return q.max(dim=-1).values
    return temperature * torch.logsumexp(q / temperature, dim=-1)


def implied_reward(network: nn.Module, obs, action, next_obs, terminated, gamma: float, temperature: float, end_value=0.0):
    """The reward that Q implies, r = Q(s,a) − γV(s') (Eq. 11), `[B]` for transitions as in `Batch`; where an episode ended
    by itself V(s') is `end_value`: saved["end_value"] of `load_model`, 0 but with `--absorbing`."""
    q, ended = network(obs).gather(1, action[:, None]).squeeze(1), terminated.float()
    return q - gamma * ((1 - ended) * soft_value(network(next_obs), temperature) + ended * end_value)


def phi(divergence: str, r: torch.Tensor) -> torch.Tensor:
    """The concave φ(r) = −f*(−r) of a statistical distance (§4 and appendix B), elementwise.

    Below `margin`, just inside the domain (kl: before exp(−r) explodes), φ goes on along its tangent there, since a clamp
    would leave a row without gradient. For chi2 this is the linear part only: −r²/(4α) is a separate term of the loss.
    DEVIATION: forward_kl has its tangent below 0.01 instead of a parametrisation that keeps r positive.
    """
    if divergence in ("chi2", "tv", "w1"):
        return r
    function, derivative, margin = {
        "kl": (lambda x: 1 - torch.exp(-x), lambda x: np.exp(-x), -5.0),  # KL(policy‖expert); all r, but explodes
        "forward_kl": (lambda x: 1 + torch.log(x), lambda x: 1 / x, 0.01),  # KL(expert‖policy); r > 0
        "hellinger": (lambda x: x / (1 + x), lambda x: (1 + x) ** -2, -0.9),  # r > −1, beyond it is convex
        "js": (lambda x: torch.log(2 - torch.exp(-x)), lambda x: 1 / (2 * np.exp(x) - 1), -0.6),  # r > −log 2
    }[divergence]
    inside = r.clamp(min=margin)
    return function(inside) + derivative(margin) * (r - inside)


def absorbing_value(expert_rate, policy_rate, args: Args):
    """V of the absorbing state that follows an episode's own end, for the v0 forms with χ² where φ(r) = r.

    Without its second term the loss is least at r = 4α·ρ_expert/(ρ_expert + ρ_policy): 0 where only the policy goes, 4α
    where only the expert does. In the absorbing state ρ is the share of transitions that lead there, and r repeats for
    ever, so V = r/(1−γ). With V = 0 instead these forms would pay for surviving longer than an expert whose episodes end.

    Args:
        expert_rate, policy_rate: share of each one's transitions that ended an episode by itself; the first above 0.
    """
    return 4 * (args.chi2_alpha or 0.5) / (1 - args.gamma) * expert_rate / (expert_rate + policy_rate)


def iq_loss(network, target, batch: Batch, n_expert: int, initial_obs: torch.Tensor, args: Args, end_value=0.0):
    """The IQ-Learn loss, to be minimised: −E_expert[φ(r)] + value term (χ²: φ(r) = r and + E[r²]/(4α)), Eq. 9 to 11 and
    §5.1 to 5.3.

    Args:
        batch: `[B]` rows, the first `n_expert` of them the expert's, the others the policy's.
        initial_obs: `[M, *obs_shape]` states where episodes start, for `--value-loss v0`.
        end_value: V(s') where an episode ended by itself, a scalar.

    Returns:
        The loss, and what is logged: tensors whose mean is taken where it is reported.
    """
    obs, action, next_obs, terminated = batch
    γ, τ = args.gamma, args.temperature
    assert obs.shape == next_obs.shape and action.shape == terminated.shape == (len(obs),)
    if target is None:  # one pass for s and s'; V(s') carries gradient, as the paper has it without a target network
        q = network(torch.cat([obs, next_obs]))
        V, next_V = soft_value(q, τ).chunk(2)
        q = q[: len(obs)]
    else:
        q = network(obs)
        V = soft_value(q, τ)
        with torch.no_grad():
            next_V = soft_value(target(next_obs), τ)
    next_V = torch.where(terminated.bool(), end_value, next_V)  # DEVIATION: with `--absorbing` the end's value is not 0
    # DEVIATION: φ acts on one sampled s', which adds γ²·Var V(s')/(4α) to the loss where dynamics are random.
    r = q.gather(1, action[:, None]).squeeze(1) - γ * next_V
    r_expert, r_policy = r[:n_expert], r[n_expert:]

    terms = {"expert_term": -phi(args.divergence, r_expert).mean()}
    if args.value_loss == "value":  # telescoped over the mixture of both occupancies, §5.1
        terms["value_term"] = (V - γ * next_V).mean()
    elif args.value_loss == "value_expert":  # telescoped over the expert's occupancy
        terms["value_term"] = (V - γ * next_V)[:n_expert].mean()
    elif args.value_loss == "v0":  # not telescoped: (1 − γ)·E_ρ0[V(s0)]
        terms["value_term"] = (1 - γ) * soft_value(network(initial_obs), τ).mean()
    else:  # v0_expert: with χ² on both halves it leaves r > 0 on expert rows, a bonus for surviving (`--absorbing`)
        terms["value_term"] = (1 - γ) * V[:n_expert].mean()
    α = args.chi2_alpha or (0.5 if args.divergence == "chi2" else None)
    if α:
        rows = r_expert if args.chi2_rows == "expert" else r
        terms["chi2_term"] = (rows**2).mean() / (4 * α)
    if args.divergence == "w1":
        terms["gradient_penalty"] = args.gradient_penalty * gradient_penalty(network, batch, n_expert)
    loss = sum(terms.values())
    logged = {"loss": loss, **terms, "value": V, "reward_expert": r_expert}
    if len(r_policy):
        logged["reward_policy"] = r_policy
    return loss, logged


def gradient_penalty(network, batch: Batch, n_expert: int) -> torch.Tensor:
    """E[(‖∇Q‖ − 1)²] on interpolates of expert and policy inputs (with expert rows alone: of pairs of them).

    DEVIATION: the 1-Lipschitz constraint of Table 2 is on r, this penalty acts on Q. The action of an interpolate is
    the same mixture of the two one-hot actions, so that Q there is that mixture of two outputs.
    """
    obs, action = batch.obs[:n_expert], batch.action[:n_expert]
    other = torch.arange(len(batch.obs) - n_expert, len(batch.obs), device=obs.device)
    if len(batch.obs) == n_expert:
        other = other.roll(1)
    mix = torch.rand(n_expert, device=obs.device)
    mix_obs = mix.view(-1, *[1] * (obs.dim() - 1))
    between = (mix_obs * obs + (1 - mix_obs) * batch.obs[other]).requires_grad_()
    q = network(between)
    q = mix * q.gather(1, action[:, None]).squeeze(1) + (1 - mix) * q.gather(1, batch.action[other][:, None]).squeeze(1)
    (gradient,) = torch.autograd.grad(q.sum(), between, create_graph=True)
    return ((gradient.flatten(1).norm(dim=1) - 1) ** 2).mean()


def bc_loss(network, batch: Batch):
    """Behavioural cloning, the baseline: cross-entropy of softmax(Q) at the expert's actions."""
    q = network(batch.obs)
    loss = F.cross_entropy(q, batch.action)
    return loss, {"loss": loss, "accuracy": (q.argmax(1) == batch.action).float().mean()}


def sample_action(network, obs: torch.Tensor, temperature: float) -> torch.Tensor:
    """a ~ π(·|s) = softmax(Q(s,·)/τ), `[B]`; by the Gumbel maximum, which is exact at any τ and greedy at 0."""
    q = network(obs)
    return (q - temperature * torch.empty_like(q).exponential_().log()).argmax(1)


# ------------------------------------------------------------------------------------------- Evaluate
def evaluate(network, args: Args, device, stop: "Run | None" = None, frames: list | None = None):
    """Returns of `--eval-episodes` whole episodes of the greedy policy, on environments of its own.

    One episode in each of that many environments, so that long ones count like short ones; `network` None plays
    uniformly random actions. RGB frames of the first episode are appended to `frames`.

    Returns:
        float64 `[episodes]` in the environment's own reward, or None when a signal stopped it.
    """
    n = args.eval_episodes
    envs = make_envs(args, n, "rgb_array" if frames is not None else None)
    seed = 100_000 + 1_000 * args.seed if network is not None else 0  # far from the training environments' seeds
    obs, _ = envs.reset(seed=seed)
    envs.action_space.seed(seed)
    returns, running = np.zeros(n), np.ones(n, bool)
    while running.any() and not (stop and stop.signum):
        if frames is not None and running[0]:
            frames.append(envs.envs[0].render())
        if network is None:
            action = envs.action_space.sample()
        else:
            with torch.no_grad():
                action = network(torch.as_tensor(obs, dtype=torch.float32, device=device)).argmax(1).cpu().numpy()
        obs, reward, terminated, truncated, _ = envs.step(action)
        returns += np.where(running, reward, 0)
        running &= ~(terminated | truncated)
    envs.close()
    return None if running.any() else returns


def random_return(args: Args, measure: bool = True) -> float:
    """Mean return of random actions: from the table, else of 20 episodes played now, NaN without `measure`."""
    if (name := env_name(args.env_id)) in RANDOM_RETURN and ":" not in args.env_id:  # else a namesake of one's own
        return RANDOM_RETURN[name]
    if not measure:
        return np.nan
    print(f"measuring the return of random actions in {args.env_id}, 20 episodes", flush=True)
    return float(evaluate(None, replace(args, eval_episodes=20), "cpu").mean())


def write_video(frames: list, fps: int, path: Path) -> None:
    """Write RGB frames `[H, W, 3]` uint8 as an mp4 file."""
    from moviepy import ImageSequenceClip

    path.parent.mkdir(parents=True, exist_ok=True)
    ImageSequenceClip(list(frames), fps=fps).write_videofile(str(path), logger=None)


def final_line(returns, expert: float, random: float, steps: int, updates: int, seconds: float, run_dir) -> str:
    """The last line on stdout; `normalized` is 0 for a random policy and 1 for the demonstrations' mean return."""
    mean, std, n = (returns.mean(), returns.std(), len(returns)) if returns is not None else (np.nan, np.nan, 0)
    normalized = (mean - random) / (expert - random) if expert != random else np.nan
    return (f"final eval_return={mean:.4f} std={std:.4f} episodes={n} expert={expert:.4f} random={random:.4f} "
            f"normalized={normalized:.4f} steps={steps} updates={updates} seconds={seconds:.1f} run_dir={run_dir}")


def load_model(path: str, device="cpu") -> tuple[QNetwork, dict]:
    """The network of a model.pt, ready to act, and what was saved with it (γ, temperature, environment, ...).

    Raises:
        BadInput: no such file, or not a model of this script.
    """
    check(os.path.isfile(path), f"{path}: no such file")
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        check(saved["script"] == SCRIPT, f"{path}: a model of {saved['script']}.py: play it with that script")
        network = QNetwork(**saved["sizes"]).to(device)
        network.load_state_dict(saved["network"])
    except (*UNREADABLE, LookupError, TypeError, pickle.UnpicklingError) as error:
        raise BadInput(f"{path}: not a model of {SCRIPT}.py ({type(error).__name__})") from None
    return network, saved


# ---------------------------------------------------------------------------------------------- Train
def save_atomically(content: dict, path: Path) -> None:
    """torch.save that leaves the old file or the new one, whenever the process is killed."""
    torch.save(content, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


class Run:
    """A run's directory, counters, rows and checkpoints: `pretrain` updates on demonstrations, then `total` steps.
    From its creation to the end of `with`, SIGINT and SIGTERM only set `signum`, which the loop reads between two steps; a
    second one acts at once. Python lets the main thread alone catch them: in another they act as ever."""

    def __init__(self, args: Args, device, demos, parts: dict, policy, pretrain: int, total: int, label: str):
        self.args, self.device, self.demos, self.policy = args, device, demos, policy
        self.pretrain, self.total, self.signum = pretrain, total, 0
        self.terms, self.due = {}, False  # what the last update logged; whether a report is still to be made
        self.parts = {name: part for name, part in parts.items() if part is not None}
        self.random = random_return(args, measure=args.eval_every > 0)
        name = args.run_name or f"{re.sub('[/:]', '-', args.env_id)}__{SCRIPT}__{args.seed}__{time.time_ns() // 10**6}"
        in_main = threading.current_thread() is threading.main_thread()
        self.handlers = {s: signal.signal(s, self.receive) for s in (signal.SIGINT, signal.SIGTERM) if in_main}
        try:
            self.open_directory(Path(args.out_dir) / name)
        except BaseException:
            self.__exit__()
            raise
        self.every = args.eval_every or max(1, (pretrain + total) // 20)  # steps between rows of metrics.csv
        self.returns, self.frames = None, [] if args.capture_video else None
        self.bar = tqdm(total=pretrain + total, initial=min(self.updates, pretrain) + self.step, unit="step",
                        disable=None, desc=label)

    def open_directory(self, path: Path) -> None:
        """Make it, or go on from its checkpoint. Raises BadInput."""
        self.dir, self.rows, self.wandb, args = path, [], None, self.args
        self.step, self.updates, seconds = 0, 0, 0.0
        if args.resume:
            check(os.access(path, os.W_OK), f"--resume {path}: it cannot be written to")
            try:
                stored = torch.load(path / "checkpoint.pt", map_location=self.device, weights_only=True)
                for name, part in self.parts.items():
                    part.load_state_dict(stored[name])
                torch.set_rng_state(stored["rng"].cpu())
                if self.device.type == "cuda" and stored["cuda_rng"] is not None:  # batches are drawn there
                    torch.cuda.set_rng_state(stored["cuda_rng"].cpu(), self.device)
                self.step, self.updates, seconds = stored["step"], stored["updates"], stored["seconds"]
                self.terms, self.due = stored["terms"], stored["due"]
            except (*UNREADABLE, LookupError, TypeError, AttributeError, pickle.UnpicklingError) as error:
                raise BadInput(f"--resume {path}: its checkpoint.pt is not one of this run "
                               f"({type(error).__name__})") from None
        else:
            check(not os.path.exists(path), f"--run-name: {path} exists already; take another name"
                  + f", or --resume {path}" * os.path.isfile(path / "checkpoint.pt"))
            try:
                path.mkdir(parents=True)
            except OSError as error:
                raise BadInput(f"--out-dir {args.out_dir}: {error}") from None
            shutil.copy(__file__, path)
        self.first_step, self.first_updates, self.first_time = self.step, self.updates, time.time()
        self.start = self.first_time - seconds
        if args.resume and (path / "metrics.csv").exists():  # rows after the checkpoint are dropped, to be written anew
            try:
                rows, now = csv.DictReader((path / "metrics.csv").read_text().splitlines()), (self.step, self.updates)
                self.rows = [row for row in rows if (int(row["step"]), int(row["updates"])) <= now]
            except (ValueError, TypeError, KeyError) as error:
                raise BadInput(f"--resume {path}: its metrics.csv cannot be read ({type(error).__name__})") from None
            self.write_rows()  # now: the next checkpoint may come before the next row
        if args.track:
            import wandb

            earlier = sorted((path / "wandb").glob("*run-*-*"))  # of a run that is resumed: its id ends the name
            try:
                wandb.init(project=args.wandb_project_name, entity=args.wandb_entity, config=asdict(args), name=path.name,
                           dir=path, id=earlier[-1].name.split("-")[-1] if earlier else None, resume="allow",
                           allow_val_change=True)
            except Exception as error:  # no login, a setting that it does not know
                if not args.resume:
                    shutil.rmtree(path)
                raise BadInput(f"--track: {error}") from None
            self.wandb = wandb
        demos = os.path.abspath(args.demos) if args.demos and os.path.isfile(args.demos) else args.demos  # from anywhere
        (path / "args.tmp").write_text(json.dumps({"script": SCRIPT} | asdict(args) | {"demos": demos}, indent=2))
        os.replace(path / "args.tmp", path / "args.json")  # the old one or the new one, whenever the process is killed

    def __enter__(self):
        if self.due and self.running():
            self.report()

    def __exit__(self, *_):
        for s, handler in self.handlers.items():
            signal.signal(s, handler)

    def receive(self, signum, _frame):
        self.signum = signum
        self.__exit__()

    def ended(self) -> bool:
        return self.updates >= self.pretrain and self.step >= self.total

    def running(self) -> bool:
        return not self.signum and not self.ended()

    def tick(self, clock: int, steps: int) -> None:
        """`clock` (steps; in pretraining updates) has grown by `steps`: move the bar, report and save where that is due."""
        self.bar.update(steps)
        if clock % self.every < steps:  # it has passed a multiple
            self.due = True
            if not self.ended():
                self.report()
        if self.args.checkpoint_every and clock % self.args.checkpoint_every < steps:
            self.save()
        if self.total and not self.step and self.updates == self.pretrain:
            self.first_time = time.time()  # steps per second are those of play

    def report(self, last: bool = False) -> None:
        """Evaluate and write a row of metrics.csv; not after a signal: a resumed run makes up for one that was due."""
        self.check_finite()
        if self.signum:
            return
        self.due = True
        if self.args.eval_every:
            self.returns = evaluate(self.policy, self.args, self.device, self, self.frames if last else None)
        if self.signum:
            return
        step, updates, now = self.step, self.updates, time.time()
        mean, std = (self.returns.mean(), self.returns.std()) if self.returns is not None else (np.nan, np.nan)
        count, first = (step, self.first_step) if step else (updates, self.first_updates)  # before play: updates
        row = {"step": step, "updates": updates, "eval_return_mean": round(float(mean), 4),
               "eval_return_std": round(float(std), 4),
               "steps_per_second": round((count - first) / (now - self.first_time), 1) if count > first else np.nan,
               "seconds": round(now - self.start, 1)} | {name: float(term.mean()) for name, term in self.terms.items()}
        self.rows = [old for old in self.rows if (int(old["step"]), int(old["updates"])) < (step, updates)] + [row]
        self.write_rows()
        self.due = False
        if self.wandb:
            self.wandb.log(row, step=min(updates, self.pretrain) + step)  # one that grows from row to row
        if self.returns is not None:
            self.bar.set_postfix(eval_return=f"{mean:.1f}")
            self.bar.write(f"step {step}, update {updates}: eval_return {mean:.1f} ± {std:.1f}")

    def write_rows(self) -> None:
        """Write metrics.csv anew: the old file or the new one, whenever the process is killed."""
        names = dict.fromkeys(name for row in self.rows for name in row)
        with open(self.dir / "metrics.tmp", "w", newline="") as file:
            writer = csv.DictWriter(file, names, restval="nan")
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(self.dir / "metrics.tmp", self.dir / "metrics.csv")

    def check_finite(self) -> None:
        """SystemExit 1 unless the last terms and the network are finite."""
        if not all(bool(torch.isfinite(x).all()) for x in (*self.terms.values(), *self.parts["network"].parameters())):
            print(f"{SCRIPT}.py: training is not finite after {self.updates} updates; a smaller --learning-rate or a "
                  f"larger --temperature helps; the last checkpoint in {self.dir}, if any, is kept", file=sys.stderr)
            raise SystemExit(1)

    def save(self) -> None:
        self.check_finite()
        save_atomically({name: part.state_dict() for name, part in self.parts.items()} |
                        {"rng": torch.get_rng_state(), "step": self.step, "updates": self.updates,
                         "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
                         "terms": self.terms, "due": self.due, "seconds": time.time() - self.start},
                        self.dir / "checkpoint.pt")

    def finish(self, model: dict, fps: int) -> Path:
        """Save the model and the video, and print the last line; SystemExit where a signal stopped the run."""
        self.bar.close()
        args, expert = self.args, self.demos.expert_return
        called = sys.argv[0] if __name__ == "__main__" else f"{SCRIPT}.py"
        if args.save_model:
            about = {"temperature": args.temperature, "gamma": args.gamma, "args": asdict(args),
                     "expert_return": expert, "random_return": self.random}
            save_atomically({"script": SCRIPT, "env_id": args.env_id} | about | model, self.dir / "model.pt")
        if self.frames:
            video = self.dir / "videos" / f"step_{self.step}.mp4"
            write_video(self.frames, fps, video)
            if self.wandb:  # gymnasium no longer uploads videos by itself
                self.wandb.log({"video": self.wandb.Video(str(video))})
        if self.wandb:
            self.wandb.finish()
        if self.signum:
            resume = shlex.join(["python", called, "--resume", str(self.dir)])
            print(f"stopped at step {self.step}, update {self.updates}; to continue: {resume}", flush=True)
            raise SystemExit(128 + self.signum)
        seconds = self.rows[-1]["seconds"]  # as the last row of metrics.csv has it
        print(final_line(self.returns, expert, self.random, self.step, self.updates, seconds, self.dir), flush=True)
        return self.dir


def make_gradient(loss_of, parameters: list[torch.Tensor], compiled: bool):
    """A function that calls `loss_of(*tensors)`, which returns a loss and its terms, replaces the gradient on `parameters`
    by that of the loss, and returns the terms detached: the compile boundary."""
    def add_gradient(*tensors) -> dict[str, torch.Tensor]:
        loss, terms = loss_of(*tensors)
        loss.backward(inputs=parameters)
        return {name: term.detach() for name, term in terms.items()}

    if compiled:
        traces_backward = torch._dynamo.config.patch(trace_autograd_ops=True)  # in the loss's graph; set for this alone
        add_gradient = traces_backward(torch.compile(add_gradient, fullgraph=True))

    def gradient(*tensors) -> dict[str, torch.Tensor]:
        for parameter in parameters:  # as `optimizer.zero_grad()` does, without its hooks
            parameter.grad = None
        return add_gradient(*tensors)

    return gradient


def make_update(network, target, average, optimizer, n_expert: int, args: Args):
    """One gradient step as a function of tensors alone."""
    polyak = ((target, network, args.target_rate), (average, network, args.average_rate))
    moves = [(mean, parameter, rate) for follower, leader, rate in polyak if follower is not None
             for mean, parameter in zip(follower.parameters(), leader.parameters())]
    averages = [list(column) for column in zip(*moves)]  # means, parameters, rates: one call for all costs least

    def loss_of(batch: Batch, initial_obs: torch.Tensor, end_value):
        if args.obs_noise:
            batch = batch._replace(obs=batch.obs + args.obs_noise * torch.randn_like(batch.obs),
                                   next_obs=batch.next_obs + args.obs_noise * torch.randn_like(batch.obs))
            initial_obs = initial_obs + args.obs_noise * torch.randn_like(initial_obs)
        if args.objective == "bc":
            return bc_loss(network, batch)
        return iq_loss(network, target, batch, n_expert, initial_obs, args, end_value)

    gradient = make_gradient(loss_of, list(network.parameters()), args.compile)

    def update(batch: Batch, initial_obs: torch.Tensor, end_value=0.0) -> dict[str, torch.Tensor]:
        terms = gradient(batch, initial_obs, end_value)
        optimizer.step()
        if averages:
            with torch.no_grad():
                torch._foreach_lerp_(*averages)
        return terms

    return update


def train(args: Args) -> Path:
    """Train from demonstrations and the agent's own play; returns the run directory. `Args()` are the plain defaults,
    `parse_args(["--env-id", X])` those of a task.

    Raises:
        BadInput: before anything is written.
        SystemExit: 1 when training became non-finite, 130 or 143 when a signal stopped it.
    """
    validate(args)
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    if args.compile:
        check_compiler(device)
    envs = make_envs(args, args.num_envs)
    if args.eval_every and envs.envs[0].spec.max_episode_steps is None and args.env_id != "GridWorld-v0":
        print(f"warning: {args.env_id} is registered without max_episode_steps: an evaluation lasts until each of its "
              "episodes ends", file=sys.stderr)
    if args.capture_video:
        make_envs(args, 1, "rgb_array").close()
    obs_shape, num_actions = envs.single_observation_space.shape, int(envs.single_action_space.n)
    check(args.network == "mlp" or args.env_id == "GridWorld-v0" and not args.standardize_obs,
          f"--network cnn: it is for GridWorld-v0, not {args.env_id}, and takes its observations as they are")
    for name in ("grid_size", *GRID_SWITCHES):
        check(args.env_id == "GridWorld-v0" or getattr(args, name) == getattr(Args(), name),
              f"--{name.replace('_', '-')}: it is for GridWorld-v0, not {args.env_id}")
    demos = load_demonstrations(args, obs_shape, num_actions, device)
    if args.mirror:
        demos = add_images(demos, env_name(args.env_id), num_actions)

    q_bound = args.q_bound if args.q_bound is not None else 10.0 * (args.divergence == "tv")
    limit = 10.0 if args.standardize_obs else np.inf  # in deviations; raw observations are not clipped
    network = QNetwork(obs_shape, num_actions, args.network, args.hidden_size, q_bound, limit).to(device)
    if args.standardize_obs:
        network.obs_mean.copy_(demos.transitions.obs.mean(0))
        network.obs_std.copy_(deviation(demos.transitions.obs))
    target = deepcopy(network) if args.target_rate else None  # DEVIATION: with discrete actions the paper has none
    average = deepcopy(network) if args.average_rate else None  # DEVIATION: the paper has the last iterate
    policy = average or network  # what is evaluated and saved
    optimizer = torch.optim.Adam(network.parameters(), lr=args.learning_rate, fused=True)
    pretrain, total, n = args.pretrain_updates, args.total_timesteps, args.batch_size
    if args.objective == "bc":  # it reads the demonstrations alone: the same updates, and no play
        pretrain, total = pretrain + int(total * args.updates_per_step), 0
    both = args.value_loss == "value" or args.chi2_rows == "both" or args.divergence == "w1"  # else play is not trained on
    fields = [(obs_shape, torch.float32), ((), torch.int64), (obs_shape, torch.float32), ((), torch.float32)]
    replay = Replay(args.buffer_size if total or args.resume else 1, fields, device)
    initial = Replay(10_000, [(obs_shape, torch.float32)], device)  # states that episodes start from
    initial.add(demos.initial_obs)
    update = make_update(network, target, average, optimizer, n, args)
    absorbing = (args.absorbing and args.objective == "iq" and demos.end_rate > 0 and args.value_loss.startswith("v0")
                 and args.chi2_rows == "both" and (args.divergence == "chi2" or args.chi2_alpha is not None)
                 and args.divergence in ("chi2", "tv", "w1"))  # φ(r) = r
    if args.absorbing and not absorbing and not SETTINGS.get(env_name(args.env_id), {}).get("absorbing"):
        print("warning: --absorbing does nothing here: it needs demonstrations that end by themselves, --objective iq, "
              "--value-loss v0 or v0_expert, --chi2-rows both and --divergence chi2 (or tv, w1 with --chi2-alpha)",
              file=sys.stderr)

    def value_at_end() -> torch.Tensor:
        """0 without `--absorbing`; before play as if the policy were the expert, whose rows are all that is read then."""
        ends = replay.storage[3][: replay.written] if replay.written else torch.full((1,), demos.end_rate, device=device)
        return absorbing_value(demos.end_rate, ends.mean(), args) if absorbing else torch.zeros((), device=device)

    parts = {"network": network, "target": target, "average": average, "optimizer": optimizer, "replay": replay,
             "initial": initial}
    run = Run(args, device, demos, parts, policy, pretrain, total, f"{args.objective} {args.env_id}")
    with run, run.bar:
        end_value = value_at_end()
        obs = torch.as_tensor(envs.reset(seed=args.seed + run.step)[0], dtype=torch.float32, device=device)
        if run.step or not args.resume:  # else it is among those of the checkpoint
            initial.add(obs)
        while run.running():
            playing = run.updates >= pretrain
            if playing:  # one step in each environment
                with torch.no_grad():
                    action = sample_action(network, obs, args.temperature)
                next_obs, _, terminated, truncated, info = envs.step(action.cpu().numpy())
                true_next, done = next_obs, terminated | truncated
                if done.any():  # next_obs is the next episode's first observation there
                    true_next = next_obs.copy()
                    true_next[done] = np.stack(info["final_obs"][done])
                    initial.add(torch.as_tensor(next_obs[done], dtype=torch.float32, device=device))
                replay.add(obs, action, torch.as_tensor(true_next, dtype=torch.float32, device=device),
                           torch.as_tensor(terminated, dtype=torch.float32, device=device))
                obs = torch.as_tensor(next_obs, dtype=torch.float32, device=device)
                run.step += args.num_envs

            updates_due = pretrain + int(run.step * args.updates_per_step) if playing else run.updates + 1
            while run.updates < updates_due:
                batch = draw(demos, n)
                if playing and both:  # expert rows first
                    batch = Batch(*(torch.cat(rows) for rows in zip(batch, replay.sample(n))))
                    if absorbing:
                        end_value = value_at_end()
                run.terms = update(batch, initial.sample(n)[0] if args.value_loss == "v0" else batch.obs[:0], end_value)
                run.updates += 1

            run.tick(run.step, args.num_envs) if playing else run.tick(run.updates, 1)
        run.report(last=True)
        run.save()
        envs.close()
        cloned = {"temperature": 1.0} if args.objective == "bc" else {}  # its policy is softmax(Q)
        model = {"network": policy.state_dict(), "sizes": policy.sizes, "end_value": float(value_at_end())}
        return run.finish(model | cloned, envs.metadata.get("render_fps") or 30)


def play(args: Args) -> None:
    """Evaluate a saved model in the environment that it was trained in, and print the final line."""
    check(args.resume is None, "--evaluate: it plays a model, and --resume trains on: give one of them")
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    network, saved = load_model(args.evaluate, device)
    check(args.env_id in ("", saved["env_id"]),
          f"--evaluate {args.evaluate}: a model of {saved['env_id']}, and --env-id is {args.env_id}: leave it out")
    for name in ("grid_size", *GRID_SWITCHES):
        own, given = saved["args"][name], getattr(args, name)
        check(given == own, f"--{name.replace('_', '-')} {given}: the model in {args.evaluate} was trained with {own}")
    args = replace(args, env_id=saved["env_id"])
    validate(args)
    start, frames, run_dir = time.time(), [] if args.capture_video else None, Path(args.evaluate).resolve().parent
    check(frames is None or os.access(run_dir, os.W_OK), f"--capture-video: {run_dir} cannot be written to")
    returns = evaluate(network, args, device, None, frames)
    random = saved["random_return"] if np.isfinite(saved["random_return"]) else random_return(args)
    if frames:
        write_video(frames, make_envs(args, 1).metadata.get("render_fps") or 30, run_dir / "videos" / "evaluate.mp4")
    print(final_line(returns, saved["expert_return"], random, 0, 0, time.time() - start, run_dir))


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    sys.stderr = sys.stderr or open(os.devnull, "w")  # closed: bars are written to it
    for stream in (sys.stdout, sys.stderr):  # ± and γ where the locale has none
        getattr(stream, "reconfigure", lambda **_: None)(errors="replace")
    try:
        args = parse_args(argv)
        train(args) if args.evaluate is None else play(args)
    except BadInput as error:
        print(f"{SCRIPT}.py: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if not re.search("allocate|overflowed", str(error)):  # so says torch of a batch or a network too large for memory
            raise
        print(f"{SCRIPT}.py: {str(error).splitlines()[0]}; a smaller --batch-size or network needs less", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # stdout went into `head`, say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to be flushed
        return 141
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: os._exit(143))  # until a run has a handler of its own
    sys.exit(main())
