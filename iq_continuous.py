# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0", "gymnasium[classic-control,mujoco]==1.4.0", "numpy==2.4.6", "tyro==1.0.17",
#   "tqdm==4.70.1", "wandb==0.31.0", "moviepy==2.2.1",
# ]
# ///
"""Inverse soft-Q Learning (IQ-Learn, arXiv:2106.12142): imitation online, with continuous actions.

A critic Q(s, a) and a tanh-Gaussian actor π, trained as in soft actor-critic, but for the reward that the critic
implies, r = Q(s,a) − γ V(s') with V(s) = Q(s,ã) − τ log π(ã|s), ã ~ π(·|s). The critic minimises

    L = −E_expert[r] + (1−γ)·E_expert[V(s)] + E[r²]/(4α)

over demonstrations and the agent's own play (`--value-loss`: other second terms), never reading the environment's reward.

    python iq_continuous.py --env-id Hopper-v5

scores 3455 ± 76 of an expert's 3500 over seeds 101 to 105, from one trajectory and 40,000 steps, 4 minutes of one core
(cloning alone: 2480 ± 971); HalfCheetah-v5 5583 ± 17 of 5632 after 30,000 (106 to 110; cloning 5537 ± 19); Walker2d-v5
5190 ± 59 of 5227 after 120,000 (104 to 106; cloning 595 ± 208); Ant-v5 4852 ± 122 of 5016 after 400,000, an update for
eight of them, 17 minutes (116 to 120; cloning 1455 ± 528); Humanoid-v5 5071 ± 369 of 5336 after 300,000, an update for
three of them, 33 minutes (104 to 106; cloning 655 ± 151).

Departures from the paper are marked DEVIATION where they act; `--preset paper` turns off those that can be.
`diff iq_discrete.py iq_continuous.py` shows what an actor needs.
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

SCRIPT = "iq_continuous"
# Mean return of uniformly random actions, 100 episodes, seeds 0 to 99; measured when an environment is missing.
RANDOM_RETURN = {"Hopper": 15.4, "HalfCheetah": -289.6, "Walker2d": 0.9, "Ant": -53.6, "Humanoid": 112.4,
                 "Pendulum": -1199.9, "InvertedPendulum": 4.4}
# Settings that differ per environment, by its name without the version; a flag that is given always wins.
# DEVIATION: 128 + 128 rows (published: 256), `v0_expert` for all, τ 0.01 for Ant and Humanoid: PAPER has the published.
SETTINGS: dict[str, dict] = {
    "HalfCheetah": {"anneal_lr": 0.5, "restart_rate": 0.005, "total_timesteps": 30_000},
    "Hopper": {"gamma": 0.97, "temperature": 0.1, "total_timesteps": 40_000},  # DEVIATION: else it swings
    "Walker2d": {"pretrain_updates": 5_000, "cloning_weight": 0.05,  # cloning fades by 50,000
                 "anneal_lr": 0.5, "total_timesteps": 120_000},
    "Ant": {"obs_dims": 27,  # without the contact forces: 3,498 instead of 127 at 20,000 steps (seed 1, an older expert)
            "pretrain_updates": 5_000, "cloning_weight": 0.05, "anneal_lr": 0.5, "restart_rate": 0.005,
            "target_rate": 0.02,  # DEVIATION: an Ant on its back stays there; V of it falls e-fold in 1/((1−γ)rate) updates
            "num_envs": 8, "updates_per_step": 0.125,  # DEVIATION: falls are rare, so eight steps for an update
            "total_timesteps": 400_000, "cloning_steps": 400_000, "learning_starts": 5_000, "eval_every": 25_000,
            "eval_episodes": 20, "checkpoint_every": 50_000},  # each holds the replay, 0.4 GB at last
    "Humanoid": {"obs_dims": 45,  # positions and velocities, which are what its expert saw
                 "pretrain_updates": 5_000, "cloning_weight": 0.05, "anneal_lr": 0.33, "restart_rate": 0.005,
                 "num_envs": 8, "updates_per_step": 0.33, "total_timesteps": 300_000, "cloning_steps": 150_000,  # as Ant
                 "learning_starts": 5_000, "eval_every": 25_000, "checkpoint_every": 50_000},  # 0.9 GB in the end
    "Pendulum": {"total_timesteps": 5_000, "eval_every": 1_000},
    "InvertedPendulum": {"total_timesteps": 5_000, "eval_every": 1_000},
}
# `--preset paper`: the published settings, except their 500,000 steps; PAPER_SETTINGS has those that differ per environment.
PAPER = {"standardize_obs": False, "layer_norm": False, "bound_targets": False, "average_rate": 0.0, "batch_size": 256,
         "value_loss": "v0_expert", "temperature": 0.01, "actor_lr": 3e-5, "critic_lr": 3e-4}
PAPER_SETTINGS: dict[str, dict] = {
    "HalfCheetah": {"value_loss": "value"},
    "Ant": {"value_loss": "value", "temperature": 0.001, "obs_dims": 27},  # the rest was reported to read 0 in old mujoco-py
    "Humanoid": {"temperature": 1.0},
}


# ----------------------------------------------------------------------------------------------- Args
@dataclass
class Args:
    # The task
    env_id: str = "HalfCheetah-v5"  # a gymnasium environment with bounded continuous actions
    seed: int = 1  # of everything: demonstrations drawn, networks, environments
    preset: Literal["ours", "paper"] = "ours"  # the settings that flags start from; the published ones for comparison
    pretrain_updates: int = 0  # updates that clone the actor, before any play
    total_timesteps: int = 50_000  # environment steps, summed over the environments
    learning_starts: int = 1_280  # steps of the untrained/cloned actor before the first update; at most a tenth of the run
    num_envs: int = 1  # environments stepped side by side
    # Demonstrations
    demos: str | None = None  # an .npz file or a Minari dataset id (default: the bundled file)
    num_demos: int = 1  # trajectories, drawn by the seed; 0 for all
    subsample_freq: int = 1  # keep every k-th transition of a trajectory, from a random offset
    dones_are: Literal["terminations", "time-limits"] | None = None  # what a file's `dones` mark
    # The objective (the letters of the equations in brackets)
    gamma: float = 0.99  # discount [γ]
    temperature: float = 0.01  # entropy temperature of value and policy, fixed [τ]
    divergence: Literal["chi2"] = "chi2"  # the distance; iq_discrete.py has the others [φ]
    chi2_alpha: float = 0.5  # of the χ² term, E[r²]/(4α) [α]
    chi2_rows: Literal["expert", "both"] = "both"  # rows that the χ² term averages over: expert's, or policy's too
    value_loss: Literal["value", "value_expert", "v0", "v0_expert"] = "v0_expert"  # V−γV': all | expert; (1−γ)V: s0 | expert
    bound_targets: bool = True  # clip a target's V(s') at ±4α/(1−γ) if χ² is on both halves; turn off for large temperatures
    target_rate: float = 0.005  # Polyak rate of the target critic for V(s')
    average_rate: float = 0.0005  # rate of a moving average of the actor, evaluated and saved in its place; 0: none
    cloning_weight: float = 0.0  # weight of cloning in the actor's loss, on expert rows
    cloning_steps: int = 50_000  # steps over which that weight fades to zero
    # The network
    hidden_size: int = 256  # units of a layer
    layer_norm: bool = True  # LayerNorm in the critic
    obs_dims: int = 0  # number of an observation's first entries that the networks see; 0: all
    standardize_obs: bool = True  # standardise observations by the demonstrations
    # Optimisation
    actor_lr: float = 3e-5  # of Adam, actor
    critic_lr: float = 3e-4  # of Adam, critic
    anneal_lr: float = 0.0  # share of the run, its last, over which both fall linearly to zero; 0: none
    batch_size: int = 128  # expert rows, and as many policy rows
    buffer_size: int = 1_000_000  # transitions of the agent's own that are kept
    updates_per_step: float = 1.0  # gradient updates per environment step
    restart_rate: float = 0.0  # probability, at a step, that play breaks off and begins anew: more starts are seen
    # The run
    eval_every: int = 5_000  # steps (in pretraining: updates) between evaluations; 0: none at all
    eval_episodes: int = 10  # episodes of an evaluation
    out_dir: str = "runs"  # where run directories go
    run_name: str | None = None  # the run's directory (default: environment, script, seed, time)
    track: bool = False  # log to Weights & Biases
    wandb_project_name: str = "iq-learn"  # its project
    wandb_entity: str | None = None  # its team
    capture_video: bool = False  # record the last evaluation's first episode
    save_model: bool = True  # write model.pt
    checkpoint_every: int = 10_000  # steps or updates between checkpoints; 0: only at the end or when stopped
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


def preset(args: Args) -> dict:
    """The settings that an environment starts from, under flags that are given."""
    name = env_name(args.env_id)
    return SETTINGS.get(name, {}) if args.preset == "ours" else PAPER | PAPER_SETTINGS.get(name, {})


def start_within(args: Args) -> Args:
    """`--learning-starts` cut to a tenth of the run, so that a short one trains too."""
    if not args.total_timesteps:
        return args
    return replace(args, learning_starts=max(1, min(args.learning_starts, args.total_timesteps // 10)))


def parse_args(argv: list[str] | None = None) -> Args:
    """Flags over the environment's settings over the defaults; with `--resume`, over the stopped run's own.

    Raises:
        BadInput: `--resume` with no run there, of another script, or with a setting that must not change.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = tyro.cli(Args, args=[flag for flag in argv if flag not in ("-h", "--help")])  # help comes with the settings
    if args.evaluate is not None:  # the environment is the model's own
        return tyro.cli(Args, args=argv, default=replace(Args(), env_id=""))
    if args.resume is None:
        return tyro.cli(Args, args=argv, default=replace(Args(), **preset(args)))
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
    began = start_within(replace(args, total_timesteps=stored.total_timesteps)).learning_starts
    if began == stored.learning_starts:  # the flag as it was given then
        args = replace(args, learning_starts=began)
    for name, value in asdict(args).items():
        old = getattr(stored, name)
        check(value == old or name in MAY_CHANGE_ON_RESUME,
              f"--{name.replace('_', '-')} {value}: the run in {run_dir} has {old}, and a resumed run keeps it")
    return args if stored.total_timesteps else start_within(args)  # it has not played yet


def validate(args: Args) -> None:
    """Check the numbers among the flags. Raises BadInput."""
    rules = {
        "at least 1": (lambda x: x >= 1, "num_envs subsample_freq batch_size buffer_size eval_episodes hidden_size "
                       "learning_starts cloning_steps"),
        "at least 0 and finite": (lambda x: 0 <= x < np.inf, "seed pretrain_updates total_timesteps num_demos "
                       "temperature cloning_weight obs_dims eval_every checkpoint_every"),
        "at most 2 million (evaluation seeds, 100,000 + 1,000 times it, have 31 bits)": (lambda x: x <= 2_000_000, "seed"),
        "above 0 and finite": (lambda x: 0 < x < np.inf, "actor_lr critic_lr updates_per_step chi2_alpha"),
        "at least 0 and below 1": (lambda x: 0 <= x < 1, "gamma"),
        "from 0 to 1": (lambda x: 0 <= x <= 1, "average_rate anneal_lr restart_rate"),
        "above 0 and at most 1": (lambda x: 0 < x <= 1, "target_rate"),
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
    if not args.evaluate and args.bound_targets and args.chi2_rows == "both" and args.temperature >= 0.5:
        print(f"warning: --bound-targets leaves the entropy out of V's bound, and with --temperature {args.temperature} it "
              "counts: take --no-bound-targets", file=sys.stderr)
    check(args.buffer_size >= args.num_envs, f"--buffer-size {args.buffer_size}: expected --num-envs or more")


def check_compiler(device) -> None:
    """Compile something small: raises BadInput where `torch.compile` cannot work, without a C++ compiler say."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except Exception as error:
        raise BadInput(f"--compile: {str(error).splitlines()[0]}") from None


# ---------------------------------------------------------------------------------------- Environment
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
    try:
        envs = gym.make_vec(args.env_id, num_envs=num_envs, vectorization_mode="sync", wrappers=[Plain],
                            vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP},
                            **({"render_mode": render_mode} if render_mode else {}))  # not every constructor takes it
    except Exception as error:  # each constructor has its own
        raise BadInput(f"--env-id {args.env_id}: {' '.join(str(error).split())}") from None
    obs_space, action_space = envs.single_observation_space, envs.single_action_space
    check(not isinstance(action_space, gym.spaces.Discrete),
          f"--env-id {args.env_id}: its actions are discrete, which iq_discrete.py is for")
    check(isinstance(action_space, gym.spaces.Box) and len(action_space.shape) == 1
          and (np.abs([action_space.low, action_space.high], dtype=float) < 1e30).all(),  # float32's limits: none too
          f"--env-id {args.env_id}: its action space is {action_space}, expected a bounded Box of one dimension")
    check(action_space.dtype.kind == "f" and (action_space.low < action_space.high).all(),
          f"--env-id {args.env_id}: its action space is {action_space}, expected real numbers from a low to a higher bound")
    check(isinstance(obs_space, gym.spaces.Box) and len(obs_space.shape) > 0,
          f"--env-id {args.env_id}: its observation space is {obs_space}, expected a Box of one dimension or more")
    if render_mode:  # told before training, not after it
        try:
            envs.reset()
            if np.ndim(envs.envs[0].render()) != 3:
                raise ValueError("it renders no array [H, W, 3]")
        except Exception as error:  # each simulator has its own: no display, a package missing
            raise BadInput(f"--capture-video: {args.env_id} cannot be rendered here (without a display, MuJoCo "
                           f"takes the environment variable MUJOCO_GL=egl): "
                           f"{' '.join(str(error).split()) or type(error).__name__}") from None
    return envs


# ------------------------------------------------------------------------------------------- Networks
class Standardize(nn.Module):
    """(x − mean) / deviation, clipped at ±limit: within the networks, so that a saved one takes raw observations."""

    def __init__(self, obs_shape: tuple[int, ...], limit: float):
        super().__init__()
        self.limit = limit
        self.register_buffer("mean", torch.zeros(obs_shape))
        self.register_buffer("std", torch.ones(obs_shape))

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return ((obs - self.mean) / self.std).clamp(-self.limit, self.limit).flatten(1)


def mlp(inputs: int, hidden_size: int, outputs: int, layer_norm: bool = False) -> nn.Sequential:
    """Two hidden layers of ReLU units."""
    layers = []
    for size in (inputs, hidden_size):
        norm = nn.LayerNorm(hidden_size) if layer_norm else nn.Identity()  # DEVIATION: the paper has none
        layers += [nn.Linear(size, hidden_size), norm, nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(hidden_size, outputs))


class QNetwork(nn.Module):
    """Q(s, a): observations `[B, *obs_shape]` and actions `[B, A]` in [−1, 1] to `[B]`; A is `num_actions`."""

    def __init__(self, obs_shape: tuple[int, ...], num_actions: int, hidden_size: int = 256, layer_norm: bool = False,
                 obs_limit: float = 10.0):
        super().__init__()
        self.sizes = {"obs_shape": tuple(obs_shape), "num_actions": num_actions, "hidden_size": hidden_size,
                      "layer_norm": layer_norm, "obs_limit": obs_limit}
        self.standardize = Standardize(obs_shape, obs_limit)
        self.layers = mlp(int(np.prod(obs_shape)) + num_actions, hidden_size, 1, layer_norm)

    def forward(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        return self.layers(torch.cat([self.standardize(obs), action], 1)).squeeze(1)


def inner_bounds(low: list[float], high: list[float]) -> torch.Tensor:
    """Both bounds as float32 `[2, A]`, rounded towards each other, so that no action comes out beyond them."""
    exact = torch.tensor([low, high], dtype=torch.float64)
    near = exact.float()
    beyond = torch.stack([near[0] < exact[0], near[1] > exact[1]])
    return torch.where(beyond, torch.nextafter(near, near.flip(0)), near)


class Actor(nn.Module):
    """π(·|s): observations `[B, *obs_shape]` to mean and log-deviation, each `[B, A]`, of a Gaussian whose tanh is the
    action in [−1, 1]. It knows the environment's units of action."""

    LOG_STD = (-5.0, 2.0)  # least and greatest

    def __init__(self, obs_shape: tuple[int, ...], low: list[float], high: list[float], hidden_size: int = 256,
                 obs_limit: float = 10.0):
        super().__init__()
        self.sizes = {"obs_shape": tuple(obs_shape), "low": list(low), "high": list(high), "hidden_size": hidden_size,
                      "obs_limit": obs_limit}
        self.register_buffer("bounds", inner_bounds(low, high), persistent=False)
        self.register_buffer("center", (torch.tensor(high) + torch.tensor(low)) / 2)
        self.register_buffer("scale", (torch.tensor(high) - torch.tensor(low)) / 2)
        self.standardize = Standardize(obs_shape, obs_limit)
        self.layers = mlp(int(np.prod(obs_shape)), hidden_size, 2 * len(low))

    def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, log_std = self.layers(self.standardize(obs)).chunk(2, dim=1)
        least, greatest = self.LOG_STD
        return mean, least + (greatest - least) * (torch.tanh(log_std) + 1) / 2

    @torch.no_grad()
    def act(self, obs: torch.Tensor) -> torch.Tensor:
        """The deterministic action, tanh of the mean, in the environment's units `[B, A]`."""
        return self.to_env(torch.tanh(self(obs)[0]))

    def to_env(self, action: torch.Tensor) -> torch.Tensor:
        """[−1, 1] to the environment's units."""
        return (self.center + self.scale * action).clamp(*self.bounds)

    def from_env(self, action: torch.Tensor) -> torch.Tensor:
        """The environment's units to [−1, 1]."""
        return ((action - self.center) / self.scale).clamp(-1, 1)


def log_density(mean: torch.Tensor, log_std: torch.Tensor, before_tanh: torch.Tensor) -> torch.Tensor:
    """log π `[B]` of the actions tanh(before_tanh) in [−1, 1]: the Gaussian's less log |d tanh|, exact and stable."""
    gaussian = -((before_tanh - mean) / log_std.exp()) ** 2 / 2 - log_std - np.log(2 * np.pi) / 2
    log_slope = 2 * (np.log(2) - before_tanh - F.softplus(-2 * before_tanh))  # log(1 − tanh²)
    return (gaussian - log_slope).sum(1)


def sample_action(mean: torch.Tensor, log_std: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """ã ~ π(·|s) in [−1, 1] `[B, A]`, reparameterised, and log π(ã|s) `[B]`, of what the actor has for s."""
    before_tanh = mean + log_std.exp() * torch.randn_like(mean)
    return torch.tanh(before_tanh), log_density(mean, log_std, before_tanh)


# --------------------------------------------------------------------------- Demonstrations and replay
class Batch(NamedTuple):
    """Transitions; the environment's reward is not among them."""

    obs: torch.Tensor  # [B, *obs_shape] float32
    action: torch.Tensor  # [B, A] float32, in [−1, 1]
    next_obs: torch.Tensor  # [B, *obs_shape] float32, at an episode's end the true last observation
    terminated: torch.Tensor  # [B] float32, 1 where the episode ended by itself, not by a time limit


class Demonstrations(NamedTuple):
    """The expert's transitions on the device, and what is reported of them."""

    transitions: Batch
    initial_obs: torch.Tensor  # [episodes, *obs_shape], each trajectory's first state, kept before subsampling
    expert_return: float  # mean return of the trajectories used; NaN without rewards in the file


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


def check_demonstrations(where: str, data: dict[str, np.ndarray], args: Args, low, high) -> None:
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
    check(actions.dtype.kind == "f" and actions.shape[1:] == low.shape,
          f"{where}: actions are {actions.dtype} of shape {actions.shape}, expected float32 of shape (T, {len(low)})")
    check(np.isfinite(actions).all(), f"{where}: actions hold NaN or infinite values")
    outside = (~np.isclose(actions, actions.clip(low, high), 1e-6, 1e-6)).any(1).sum()  # but for float32's rounding
    if outside:  # as many published files record them, before the environment clips them
        print(f"warning: {outside} of {len(actions)} actions lie beyond the bounds of {args.env_id} and are clipped",
              file=sys.stderr)
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


def load_demonstrations(args: Args, obs_shape: tuple[int, ...], actor: Actor, device) -> Demonstrations:
    """The drawn trajectories' transitions, checked and on the device.

    Raises:
        BadInput: whatever is wrong with the file, in the fields that are read.
    """
    names = ["observations", "actions", "terminations", "truncations", "episode_lengths", "env_id"]
    where, data = read_demonstrations(args, names)
    low, high = (actor.to_env(torch.tensor(end)).cpu().numpy() for end in (-1.0, 1.0))
    check_demonstrations(where, data, args, low, high)
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

    actions = actor.from_env(tensor(data["actions"][step].astype(np.float32)))
    transitions = Batch(tensor(obs[row]), actions, tensor(obs[row + 1]),
                        tensor(data["terminations"][step].astype(np.float32)))
    print(f"loaded {len(chosen)} of {len(lengths)} episodes, {len(t)} of their {lengths[chosen].sum()} transitions, "
          f"expert return {np.mean(returns):.1f} ± {np.std(returns):.1f}, device {device}", flush=True)
    return Demonstrations(transitions, tensor(obs[first_obs]), float(np.mean(returns)))


def draw(demos: Demonstrations, n: int) -> Batch:
    """`n` transitions drawn with replacement, on their device."""
    action = demos.transitions.action
    index = torch.randint(len(action), (n,), device=action.device)
    return Batch(*(field.index_select(0, index) for field in demos.transitions))


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
def soft_value(critic, actor: Actor, obs: torch.Tensor, temperature: float) -> torch.Tensor:
    """V(s) = Q(s,ã) − τ log π(ã|s) `[B]` with one fresh ã ~ π(·|s) (paper, §3)."""
    action, log_prob = sample_action(*actor(obs))
    return critic(obs, action) - temperature * log_prob


def implied_reward(critic, actor: Actor, obs, action, next_obs, terminated, gamma: float, temperature: float):
    """The reward that Q implies, r = Q(s,a) − γ(1−d)·V(s') (Eq. 11), `[B]`; actions `[B, A]` in the environment's
    units. V(s') is a sample of one action."""
    q = critic(obs, actor.from_env(action))
    return q - gamma * (1 - terminated.float()) * soft_value(critic, actor, next_obs, temperature)


def iq_loss(critic, target, actor: Actor, batch: Batch, fresh, n_expert: int, initial_obs: torch.Tensor, args: Args):
    """The critic's IQ-Learn loss, to be minimised: −E_expert[r] + value term + E[r²]/(4α), Eq. 9 to 11 and §5.1 to 5.3.

    Args:
        batch: `[B]` rows, the first `n_expert` of them the expert's, the others the policy's.
        fresh: ã ~ π(·|s) `[B, A]` and log π(ã|s) `[B]` at the batch's states, without gradient.
        initial_obs: `[M, *obs_shape]` states where episodes start, for `--value-loss v0`.

    Returns:
        The loss, and what is logged: tensors whose mean is taken where it is reported.
    """
    obs, action, next_obs, terminated = batch
    γ, τ, α = args.gamma, args.temperature, args.chi2_alpha
    assert obs.shape == next_obs.shape and action.shape == fresh[0].shape and terminated.shape == (len(obs),)
    with torch.no_grad():  # V(s') carries no gradient: the target critic's
        next_V = soft_value(target, actor, next_obs, τ)
        if args.bound_targets and args.chi2_rows == "both":  # DEVIATION: |r| ≤ about 4α, so |V| ≤ this, but for entropy
            next_V = next_V.clamp(-4 * α / (1 - γ), 4 * α / (1 - γ))
        next_V = (1 - terminated) * next_V
    # One pass for Q(s,a) and Q(s,ã), over the rows whose value the loss reads. V(s) has gradient to the critic alone.
    n_value = {"value": len(obs), "v0": 0}.get(args.value_loss, n_expert)
    q = critic(torch.cat([obs, obs[:n_value]]), torch.cat([action, fresh[0][:n_value]]))
    q, V = q[: len(obs)], q[len(obs) :] - τ * fresh[1][:n_value]
    # DEVIATION: φ acts on one sampled s', which adds γ²·Var V(s')/(4α) to the loss where dynamics are random.
    r = q - γ * next_V
    r_expert, r_policy = r[:n_expert], r[n_expert:]

    terms = {"expert_term": -r_expert.mean()}  # χ²: φ(r) = r − r²/(4α), its second part is the last term
    if args.value_loss == "value":  # telescoped over the mixture of both occupancies, §5.1
        terms["value_term"] = (V - γ * next_V).mean()
    elif args.value_loss == "value_expert":  # telescoped over the expert's occupancy
        terms["value_term"] = (V - γ * next_V[:n_expert]).mean()
    elif args.value_loss == "v0":  # not telescoped: (1 − γ)·E_ρ0[V(s0)]
        with torch.no_grad():  # the actor has none of this gradient either
            initial_action, log_prob = sample_action(*actor(initial_obs))
        V = critic(initial_obs, initial_action) - τ * log_prob
        terms["value_term"] = (1 - γ) * V.mean()
    else:  # v0_expert: with χ² on both halves it leaves r > 0 on expert rows, a bonus for surviving
        terms["value_term"] = (1 - γ) * V.mean()
    rows = r_expert if args.chi2_rows == "expert" else r
    terms["chi2_term"] = (rows**2).mean() / (4 * α)
    loss = sum(terms.values())
    logged = {"loss": loss, **terms, "value": V, "reward_expert": r_expert}
    if len(r_policy):
        logged["reward_policy"] = r_policy
    return loss, logged


def actor_loss(critic, obs: torch.Tensor, fresh, temperature: float) -> torch.Tensor:
    """E[τ log π(ã|s) − Q(s,ã)], to be minimised over expert and policy states (§4.4 and Algorithm 1 print the opposite
    sign: there it is to be maximised)."""
    action, log_prob = fresh
    return (temperature * log_prob - critic(obs, action)).mean()


def cloning_loss(mean: torch.Tensor, log_std: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
    """−E_expert[log π(a|s)]. DEVIATION: actions beyond ±0.999 count as that, since the density is infinite at ±1."""
    return -log_density(mean, log_std, torch.atanh(action.clamp(-0.999, 0.999))).mean()


# ------------------------------------------------------------------------------------------- Evaluate
def evaluate(actor, args: Args, device, stop: "Run | None" = None, frames: list | None = None):
    """Returns of `--eval-episodes` whole episodes of the deterministic policy, on environments of its own.

    One episode in each of that many environments, so that long ones count like short ones; `actor` None plays
    uniformly random actions. RGB frames of the first episode are appended to `frames`.

    Returns:
        float64 `[episodes]` in the environment's own reward, or None when a signal stopped it.
    """
    n = args.eval_episodes
    envs = make_envs(args, n, "rgb_array" if frames is not None else None)
    seed = 100_000 + 1_000 * args.seed if actor is not None else 0  # far from the training environments' seeds
    obs, _ = envs.reset(seed=seed)
    envs.action_space.seed(seed)
    returns, running = np.zeros(n), np.ones(n, bool)
    while running.any() and not (stop and stop.signum):
        if frames is not None and running[0]:
            frames.append(envs.envs[0].render())
        if actor is None:
            action = envs.action_space.sample()
        else:
            with torch.no_grad():
                action = actor.act(torch.as_tensor(obs, dtype=torch.float32, device=device)).cpu().numpy()
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


def load_model(path: str, device="cpu") -> tuple[Actor, QNetwork, dict]:
    """The actor and the critic of a model.pt, and what was saved with them (γ, temperature, environment, ...).

    Raises:
        BadInput: no such file, or not a model of this script.
    """
    check(os.path.isfile(path), f"{path}: no such file")
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        check(saved["script"] == SCRIPT, f"{path}: a model of {saved['script']}.py: play it with that script")
        actor, critic = Actor(**saved["actor_sizes"]).to(device), QNetwork(**saved["critic_sizes"]).to(device)
        actor.load_state_dict(saved["actor"])
        critic.load_state_dict(saved["critic"])
    except (*UNREADABLE, LookupError, TypeError, pickle.UnpicklingError) as error:
        raise BadInput(f"{path}: not a model of {SCRIPT}.py ({type(error).__name__})") from None
    return actor, critic, saved


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

    def check_finite(self, *more: torch.Tensor) -> None:
        """SystemExit 1 unless the last terms, the networks and `more` are finite."""
        parameters = [*self.parts["actor"].parameters(), *self.parts["critic"].parameters()]
        if not all(bool(torch.isfinite(x).all()) for x in (*self.terms.values(), *parameters, *more)):
            print(f"{SCRIPT}.py: training is not finite after {self.updates} updates; a smaller --critic-lr or "
                  f"--actor-lr helps; the last checkpoint in {self.dir}, if any, is kept", file=sys.stderr)
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


def make_update(actor, critic, target, average, optimizers, n_expert: int, args: Args):
    """One gradient step of critic and actor as a function of tensors alone: the compile boundary.

    Passes with B rows in all, of them n_expert the expert's: actor on s (shared by V(s), the actor's loss and its cloning
    term) and on s', target critic on s', critic on (s, a) and the value rows at once, critic on (s, ã) again after its step.
    None can go: s' is no row's s, and V(s') is by the target's weights, without gradient; the actor's loss needs Q(s, ã) of
    all rows with gradient to ã, by the critic after its step, the critic's loss without it and before. `--value-loss v0`
    adds actor and critic on the initial states.
    """
    actor_optimizer, critic_optimizer = optimizers
    actor_parameters = list(actor.parameters())
    polyak = ((target, critic, args.target_rate), (average, actor, args.average_rate))
    moves = [(mean, parameter, rate) for follower, leader, rate in polyak if follower is not None
             for mean, parameter in zip(follower.parameters(), leader.parameters())]
    averages = [list(column) for column in zip(*moves)]  # means, parameters, rates: one call for all costs least

    def clone(batch: Batch) -> dict[str, torch.Tensor]:
        loss = cloning_loss(*actor(batch.obs), batch.action)
        actor_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        actor_optimizer.step()
        return {"cloning_loss": loss.detach()}

    def update(batch: Batch, initial_obs: torch.Tensor, cloning_weight: torch.Tensor) -> dict[str, torch.Tensor]:
        mean, log_std = actor(batch.obs)
        fresh = sample_action(mean, log_std)
        torch._dynamo.graph_break()  # in one graph the critic's backward would free what the actor's still needs
        loss, terms = iq_loss(critic, target, actor, batch, [x.detach() for x in fresh], n_expert, initial_obs, args)
        critic_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        critic_optimizer.step()

        terms["actor_loss"] = actor_loss(critic, batch.obs, fresh, args.temperature)
        terms["entropy"] = -fresh[1].mean()
        loss = terms["actor_loss"]
        if args.cloning_weight:  # DEVIATION: the paper's actor has no such term
            terms["cloning_loss"] = cloning_loss(*[x[:n_expert] for x in (mean, log_std, batch.action)])
            loss = loss + cloning_weight * terms["cloning_loss"]
        actor_optimizer.zero_grad(set_to_none=True)
        loss.backward(inputs=actor_parameters)  # through the critic, not into it
        actor_optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(*averages)
        return {name: term.detach() for name, term in terms.items()}

    return clone, torch.compile(update) if args.compile else update


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
    if args.eval_every and envs.envs[0].spec.max_episode_steps is None:
        print(f"warning: {args.env_id} is registered without max_episode_steps: an evaluation lasts until each of its "
              "episodes ends", file=sys.stderr)
    if args.capture_video:
        make_envs(args, 1, "rgb_array").close()
    obs_shape, action_space = envs.single_observation_space.shape, envs.single_action_space
    limit = 10.0 if args.standardize_obs else np.inf  # in deviations; raw observations are not clipped
    actor = Actor(obs_shape, action_space.low.tolist(), action_space.high.tolist(), args.hidden_size, limit).to(device)
    demos = load_demonstrations(args, obs_shape, actor, device)
    check(args.obs_dims <= np.prod(obs_shape),
          f"--obs-dims {args.obs_dims}: an observation has shape {obs_shape}; give --obs-dims 0 for all of it")
    critic = QNetwork(obs_shape, len(action_space.low), args.hidden_size, args.layer_norm, limit).to(device)
    if args.standardize_obs:  # DEVIATION: the paper has raw observations
        mean, std = demos.transitions.obs.mean(0), deviation(demos.transitions.obs, args.obs_dims or None)
        for network in (actor, critic):
            network.standardize.mean.copy_(mean)
            network.standardize.std.copy_(std)
    if args.obs_dims:  # DEVIATION: the others, divided by infinity, enter as 0
        print(f"the networks see the first {args.obs_dims} entries of an observation (--obs-dims)", flush=True)
        for network in (actor, critic):
            network.standardize.std.view(-1)[args.obs_dims :] = np.inf
    target = deepcopy(critic)
    average = deepcopy(actor) if args.average_rate else None  # DEVIATION: the paper has the last iterate
    policy = average or actor  # what is evaluated and saved
    learning_rates = (args.actor_lr, args.critic_lr)  # to Adam as tensors, so that a compiled update follows them
    optimizers = [torch.optim.Adam(network.parameters(), lr=torch.tensor(lr, device=device), fused=True)
                  for network, lr in zip((actor, critic), learning_rates)]
    pretrain, total, n = args.pretrain_updates, args.total_timesteps, args.batch_size
    args = args if args.resume else start_within(args)
    starts = args.learning_starts
    fields = [(obs_shape, torch.float32), (action_space.shape, torch.float32), (obs_shape, torch.float32),
              ((), torch.float32)]
    replay = Replay(args.buffer_size if total or args.resume else 1, fields, device)
    initial = Replay(10_000, [(obs_shape, torch.float32)], device)  # states that episodes start from
    initial.add(demos.initial_obs)
    clone, update = make_update(actor, critic, target, average, optimizers, n, args)

    parts = {"actor": actor, "critic": critic, "target": target, "average": average, "actor_optimizer": optimizers[0],
             "critic_optimizer": optimizers[1], "replay": replay, "initial": initial}
    run = Run(args, device, demos, parts, policy, pretrain, total, f"iq {args.env_id}")
    with run, run.bar:
        obs = torch.as_tensor(envs.reset(seed=args.seed + run.step)[0], dtype=torch.float32, device=device)
        if run.step or not args.resume:  # else it is among those of the checkpoint
            initial.add(obs)
        while run.running():
            playing = run.updates >= pretrain
            if playing:  # one step in each environment
                with torch.no_grad():
                    action = sample_action(*actor(obs))[0]
                    env_action = actor.to_env(action).cpu().numpy()
                if not np.isfinite(env_action).all():  # which some environments fail on
                    run.check_finite(action)
                next_obs, _, terminated, truncated, info = envs.step(env_action)
                true_next, done = next_obs, terminated | truncated
                if done.any():  # next_obs is the next episode's first observation there
                    true_next = next_obs.copy()
                    true_next[done] = np.stack(info["final_obs"][done])
                    initial.add(torch.as_tensor(next_obs[done], dtype=torch.float32, device=device))
                replay.add(obs, action, torch.as_tensor(true_next, dtype=torch.float32, device=device),
                           torch.as_tensor(terminated, dtype=torch.float32, device=device))
                if args.restart_rate:  # DEVIATION: the paper plays whole episodes; the replay takes this as a time limit
                    cut = (torch.rand(args.num_envs) < args.restart_rate).numpy() & ~done
                    if cut.any():
                        next_obs, _ = envs.reset(options={"reset_mask": cut})
                        initial.add(torch.as_tensor(next_obs[cut], dtype=torch.float32, device=device))
                obs = torch.as_tensor(next_obs, dtype=torch.float32, device=device)
                run.step += args.num_envs
                if args.anneal_lr:  # DEVIATION: the paper's are constant
                    left = max(0.0, 1 - run.step / total)
                    for optimizer, lr in zip(optimizers, learning_rates):
                        optimizer.param_groups[0]["lr"].fill_(lr * min(1.0, left / args.anneal_lr))

            due = max(0, run.step - starts) * args.updates_per_step if playing else run.updates + 1 - pretrain
            while run.updates < pretrain + int(due):
                if playing:  # expert rows first
                    batch = Batch(*(torch.cat(rows) for rows in zip(draw(demos, n), replay.sample(n))))
                    fade = args.cloning_weight * max(0.0, 1 - run.step / args.cloning_steps)
                    run.terms = update(batch, initial.sample(n)[0], torch.full((), fade, device=device))
                else:
                    run.terms = clone(draw(demos, n))  # DEVIATION: the paper's actor starts from nothing
                    if average:  # before play it is the actor itself, so that it starts where play does
                        average.load_state_dict(actor.state_dict())
                run.updates += 1

            run.tick(run.step, args.num_envs) if playing else run.tick(run.updates, 1)
        run.report(last=True)
        run.save()
        envs.close()
        return run.finish({"actor": policy.state_dict(), "actor_sizes": policy.sizes, "critic": critic.state_dict(),
                           "critic_sizes": critic.sizes}, envs.metadata.get("render_fps") or 30)


def play(args: Args) -> None:
    """Evaluate a saved model in the environment that it was trained in, and print the final line."""
    check(args.resume is None, "--evaluate: it plays a model, and --resume trains on: give one of them")
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    actor, _, saved = load_model(args.evaluate, device)
    check(args.env_id in ("", saved["env_id"]),
          f"--evaluate {args.evaluate}: a model of {saved['env_id']}, and --env-id is {args.env_id}: leave it out")
    args = replace(args, env_id=saved["env_id"])
    validate(args)
    start, frames, run_dir = time.time(), [] if args.capture_video else None, Path(args.evaluate).resolve().parent
    check(frames is None or os.access(run_dir, os.W_OK), f"--capture-video: {run_dir} cannot be written to")
    returns = evaluate(actor, args, device, None, frames)
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
