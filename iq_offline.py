# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0", "gymnasium[classic-control,box2d,mujoco]==1.4.0", "numpy==2.4.6",
#   "tyro==1.0.17", "tqdm==4.70.1", "wandb==0.31.0", "moviepy==2.2.1",
# ]
# ///
"""Inverse soft-Q Learning (IQ-Learn, arXiv:2106.12142): imitation offline, from logged data alone.

Integer actions: one network Q(s, a) is the policy, softmax(Q/τ), and the reward, r = Q(s,a) − γ V(s'). Float actions:
a critic Q(s, a) beside a tanh-Gaussian actor π. On expert rows alone it minimises, for χ² (Eq. 12 of the paper),

    L = E_expert[V(s) − Q(s,a)] + E_expert[r²]/(4α),    V(s) = τ·logsumexp_a(Q(s,a)/τ) or Q(s,ã) − τ·log π(ã|s)

No environment is stepped but to evaluate, and none is needed: `--demos my.npz --num-demos 0` trains and saves.

    python iq_offline.py --env-id CartPole-v1 --num-demos 1 --subsample-freq 20

scores 499.4 ± 1.3 over seeds 111 to 115 from 25 transitions, their mirror images and 3,000 updates (cloning: 495.7 ±
7.9), a few seconds of one core; over 20 more seeds (of 15 trajectories, four of them among those five) 453.5 ± 105.7
(cloning: 405.7 ± 115.3).

Departures from the paper are marked DEVIATION where they act. Derived from iq_discrete.py, where play is:
`diff iq_discrete.py iq_offline.py` shows what logged data and continuous actions need.
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

SCRIPT = "iq_offline"
# Mean return of uniformly random actions, 100 episodes, seeds 0 to 99; measured when an environment is missing.
RANDOM_RETURN = {"CartPole": 23.0, "Acrobot": -498.2, "LunarLander": -186.5, "Pendulum": -1199.9,
                 "Hopper": 15.4, "HalfCheetah": -289.6, "Walker2d": 0.9, "Ant": -53.6, "Humanoid": 112.4}
# Tasks that look the same in a mirror: which entry of the observation its image has at each place, counted from 1, minus for
# the other sign; then which action stands for each, from 0, or which entries, as of an observation, where it is continuous.
MIRROR = {"CartPole": ((-1, -2, -3, -4), (1, 0)), "Acrobot": ((1, -2, 3, -4, -5, -6), (2, 1, 0)),
          "LunarLander": ((-1, 2, -3, 4, -5, -6, 8, 7), (0, 3, 2, 1)), "Pendulum": ((1, -2, -3), (-1,))}
MUJOCO = {"hidden_size": 256}
# Settings that differ per environment, by its name without the version; a flag that is given always wins.
SETTINGS: dict[str, dict] = {
    # DEVIATION, all three: the transitions are mirrored. From one trajectory 499 / −84 / 227, 446 / −97 / 34 without.
    # DEVIATION, CartPole: the paper has τ 0.001 and two layers; its expert is linear.
    "CartPole": {"standardize_obs": False, "hidden_layers": 0, "temperature": 0.1, "chi2_alpha": 5.0,
                 "learning_rate": 1e-2, "mirror": True, "total_updates": 3_000},
    # DEVIATION, Acrobot and LunarLander: with τ and α this large the loss is near cloning's; LunarLander's weights decay.
    "Acrobot": {"standardize_obs": False, "hidden_layers": 0, "temperature": 1.0,  # linear, as its expert
                "chi2_alpha": 50.0, "learning_rate": 1e-2, "mirror": True, "total_updates": 3_000},
    "LunarLander": {"standardize_obs": False, "hidden_size": 256, "weight_decay": 0.1, "temperature": 1.0,
                    "chi2_alpha": 50.0, "mirror": True, "total_updates": 3_000},
    "Pendulum": {"mirror": True},  # DEVIATION: from five trajectories −175 of −135, −405 without
    "Hopper": MUJOCO | {"gamma": 0.97, "temperature": 0.1},  # DEVIATION: as in iq_continuous.py
    "HalfCheetah": MUJOCO, "Walker2d": MUJOCO,
    "Ant": MUJOCO | {"obs_dims": 27},  # positions, velocities: iq_continuous.py
    "Humanoid": MUJOCO | {"obs_dims": 45, "num_demos": 0},  # all, as fewer than ten are bundled
}


# ----------------------------------------------------------------------------------------------- Args
@dataclass
class Args:
    # The task
    env_id: str | None = None  # where to evaluate, whose demonstrations and settings to take (else settings of the file's)
    seed: int = 1  # of everything: demonstrations drawn, networks, evaluation
    total_updates: int = 10_000  # gradient updates
    # Demonstrations
    demos: str | None = None  # an .npz file or a Minari dataset id (default: the bundled file)
    num_demos: int = 10  # trajectories, drawn by the seed; 0 for all
    subsample_freq: int = 1  # keep every k-th transition of a trajectory, from a random offset
    mirror: bool = False  # learn from the transitions' mirror images, too (CartPole, Acrobot, LunarLander, Pendulum)
    holdout: float = 0.0  # share of those trajectories that is kept out of training, to measure on
    dones_are: Literal["terminations", "time-limits"] | None = None  # what a file's `dones` mark
    # The objective (the letters of the equations in brackets)
    objective: Literal["iq", "bc"] = "iq"  # IQ-Learn, or behavioural cloning with the same network
    gamma: float = 0.99  # discount [γ]
    temperature: float = 0.01  # entropy temperature of value and policy [τ]; 0 for the hard maximum
    divergence: Literal["chi2", "tv", "kl", "forward_kl", "hellinger", "js", "w1"] = "chi2"  # distance [φ]
    chi2_alpha: float | None = None  # of the χ² term, E[r²]/(4α) [α] (default: 0.5 with chi2, else no χ² term)
    value_loss: Literal["value_expert", "v0", "v0_expert"] = "value_expert"  # V−γV' on expert rows; (1−γ)V at s0 | on them
    gradient_penalty: float = 10.0  # weight of the gradient penalty [λ], with w1 alone
    q_bound: float | None = None  # |Q| bounded by a tanh; 0 for none (default: 10 with tv, else none)
    target_rate: float | None = None  # Polyak rate of a target network for V(s'), 0: none (default: 0.005 if continuous)
    average_rate: float = 0.002  # rate of a moving average of the policy's weights, evaluated and saved instead; 0: none
    cloning_weight: float = 0.1  # weight of cloning in the actor's loss, with continuous actions
    # The network
    hidden_size: int = 64  # units of a hidden layer
    hidden_layers: int = 2  # of the networks; 0: linear in the observation
    obs_dims: int = 0  # number of an observation's first entries that the networks see; 0: all
    standardize_obs: bool = True  # standardise observations by the demonstrations
    # Optimisation
    learning_rate: float = 1e-3  # of Adam, with discrete actions
    actor_lr: float = 3e-4  # of Adam for the actor, with continuous actions
    critic_lr: float = 3e-4  # of Adam for the critic, with continuous actions
    weight_decay: float = 0.0  # of AdamW
    batch_size: int = 128  # expert rows
    # The run
    eval_every: int = 2_000  # updates between evaluations; 0: none at all
    eval_episodes: int = 20  # episodes of an evaluation
    out_dir: str = "runs"  # where run directories go
    run_name: str | None = None  # the run's directory (default: environment, script, seed, time)
    track: bool = False  # log to Weights & Biases
    wandb_project_name: str = "iq-learn"  # its project
    wandb_entity: str | None = None  # its team
    capture_video: bool = False  # record the last evaluation's first episode
    save_model: bool = True  # write model.pt
    checkpoint_every: int = 1_000  # updates between checkpoints; 0: only at the end or when stopped
    resume: str | None = None  # a run directory to continue
    evaluate: str | None = None  # a model.pt to play instead of training
    cuda: bool = True  # use a GPU if there is one
    compile: bool = False  # torch.compile loss and gradient


MAY_CHANGE_ON_RESUME = {"total_updates", "eval_every", "eval_episodes", "track", "wandb_project_name",
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


def recorded_in(path: str | None) -> str:
    """The environment that an .npz file or a Minari dataset names; empty where it does not, or cannot be read: loading says
    what is wrong."""
    if path and not os.path.exists(path) and re.search(r"-v\d+$", path):
        try:
            import minari

            return minari.load_dataset(path, download=True).env_spec.id
        except Exception:
            return ""
    try:
        with np.load(path, allow_pickle=False) as file:
            name = file["env_id"].reshape(-1)[0]
            return name.decode(errors="replace") if isinstance(name, bytes) else str(name)
    except (*UNREADABLE, LookupError, TypeError, AttributeError):
        return ""


def parse_args(argv: list[str] | None = None) -> Args:
    """Flags over the environment's settings over the defaults; with `--resume`, over the stopped run's own.

    Raises:
        BadInput: `--resume` with no run there, of another script, or with a setting that must not change.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = tyro.cli(Args, args=[flag for flag in argv if flag not in ("-h", "--help")])  # help comes with the settings
    if args.resume is None or args.evaluate is not None:
        env_id = args.env_id or recorded_in(args.demos)
        settings = dict(SETTINGS.get(env_name(env_id), {}))
        if settings and args.env_id is None:
            print(f"settings of {env_id}, in which {args.demos} was recorded", flush=True)
        if args.divergence != "chi2":  # without chi2 its term is added only for a given --chi2-alpha
            settings.pop("chi2_alpha", None)
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
        "at least 1": (lambda x: x >= 1, "subsample_freq batch_size eval_episodes hidden_size"),
        "at least 0 and finite": (lambda x: 0 <= x < np.inf, "seed total_updates num_demos temperature gradient_penalty "
                       "cloning_weight hidden_layers weight_decay obs_dims eval_every checkpoint_every"),
        "at most 2 million (evaluation seeds, 100,000 + 1,000 times it, have 31 bits)": (lambda x: x <= 2_000_000, "seed"),
        "above 0 and finite": (lambda x: 0 < x < np.inf, "learning_rate actor_lr critic_lr"),
        "at least 0 and below 1": (lambda x: 0 <= x < 1, "gamma holdout"),
        "from 0 to 1": (lambda x: x is None or 0 <= x <= 1, "target_rate average_rate"),
    }
    for rule, (holds, names) in rules.items():
        for name in names.split():
            value = getattr(args, name)
            check(holds(value), f"--{name.replace('_', '-')} {value}: expected {rule}")
    for name, value in asdict(args).items():  # larger sizes overflow in numpy and torch
        check(not isinstance(value, int) or value < 2**53, f"--{name.replace('_', '-')} {value}: expected less than 2^53")
    check(not args.track or importlib.util.find_spec("wandb"), "--track: it needs `pip install wandb`")
    check(not args.capture_video or importlib.util.find_spec("moviepy"), "--capture-video: it needs `pip install moviepy`")
    check(not args.capture_video or args.evaluate or args.eval_every and args.env_id,
          "--capture-video: without --env-id or with --eval-every 0 there is no evaluation to record")
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
class Spaces(NamedTuple):
    """The sizes and bounds of a task; `num_actions` is 0 where actions are continuous, the bounds are empty elsewhere."""

    obs_shape: tuple[int, ...]
    num_actions: int
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]


class Plain(gym.Wrapper):
    """Observations as copies, since an environment may write the next one over the last, actions in the space's own dtype,
    rewards as numbers, also where they are arrays of one, and no infos, which a vector environment would have to stack."""

    def reset(self, **options):
        return np.array(self.env.reset(**options)[0]), {}

    def step(self, action):
        obs, reward, terminated, truncated, _ = self.env.step(np.asarray(action, self.env.action_space.dtype)[()])
        return np.array(obs), np.asarray(reward).item(), terminated, truncated, {}


def make_envs(args: Args, num_envs: int, render_mode: str | None = None) -> gym.vector.VectorEnv:
    """Environments stepped together, to evaluate in.

    Raises:
        BadInput: an unknown environment, or one whose spaces this script does not handle.
    """
    check(not re.search("NoFrameskip|^ALE/", args.env_id or ""),
          f"--env-id {args.env_id}: an Atari game, which iq_atari.py is for")
    try:
        envs = gym.make_vec(args.env_id, num_envs=num_envs, vectorization_mode="sync", wrappers=[Plain],
                            vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP},
                            **({"render_mode": render_mode} if render_mode else {}))  # not every constructor takes it
    except Exception as error:  # each constructor has its own
        raise BadInput(f"--env-id {args.env_id}: {' '.join(str(error).split())}") from None
    obs_space, action_space = envs.single_observation_space, envs.single_action_space
    discrete = isinstance(action_space, gym.spaces.Discrete) and action_space.start == 0
    continuous = (isinstance(action_space, gym.spaces.Box) and len(action_space.shape) == 1
                  and action_space.dtype.kind == "f" and (action_space.low < action_space.high).all())
    check(discrete or continuous, f"--env-id {args.env_id}: its action space is {action_space}, expected Discrete(n) from 0 "
          "or a Box of shape (n,) of real numbers from a low to a higher bound")
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


def env_spaces(args: Args) -> Spaces | None:
    """Sizes and bounds of `--env-id`; None without one, or where it is not installed and nothing is evaluated."""
    if args.env_id is None:
        return None
    try:
        envs = make_envs(args, 1)
    except BadInput as error:
        if args.eval_every:
            raise
        print(f"warning: {error}; sizes are taken from the demonstrations", file=sys.stderr)
        return None
    if args.eval_every and envs.envs[0].spec.max_episode_steps is None:
        print(f"warning: {args.env_id} is registered without max_episode_steps: an evaluation lasts until each of its "
              "episodes ends", file=sys.stderr)
    obs_space, action_space = envs.single_observation_space, envs.single_action_space
    envs.close()
    if isinstance(action_space, gym.spaces.Discrete):
        return Spaces(obs_space.shape, int(action_space.n), (), ())
    return Spaces(obs_space.shape, 0, tuple(action_space.low.tolist()), tuple(action_space.high.tolist()))


# ------------------------------------------------------------------------------------------- Networks
class QNetwork(nn.Module):
    """Q(s, ·): observations `[B, *obs_shape]` to `[B, num_actions]`; with `action_dim`, Q(s, a): those and actions
    `[B, action_dim]` in [−1, 1] to `[B]`.

    It holds the observation statistics, so that a saved network takes raw observations. With `q_bound` the output
    is `q_bound·tanh(x/q_bound)`.
    """

    def __init__(self, obs_shape: tuple[int, ...], num_actions: int, action_dim: int = 0, hidden_size: int = 64,
                 hidden_layers: int = 2, q_bound: float = 0.0, obs_limit: float = 10.0):
        super().__init__()
        self.sizes = {"obs_shape": tuple(obs_shape), "num_actions": num_actions, "action_dim": action_dim,
                      "hidden_size": hidden_size, "hidden_layers": hidden_layers, "q_bound": q_bound, "obs_limit": obs_limit}
        self.q_bound, self.obs_limit = q_bound, obs_limit
        self.register_buffer("obs_mean", torch.zeros(obs_shape))
        self.register_buffer("obs_std", torch.ones(obs_shape))
        self.layers = mlp(int(np.prod(obs_shape)) + action_dim, hidden_size, hidden_layers, num_actions or 1)

    def forward(self, obs: torch.Tensor, action: torch.Tensor | None = None) -> torch.Tensor:
        x = ((obs - self.obs_mean) / self.obs_std).clamp(-self.obs_limit, self.obs_limit).flatten(1)
        q = self.layers(x) if action is None else self.layers(torch.cat([x, action], 1)).squeeze(1)
        return self.q_bound * torch.tanh(q / self.q_bound) if self.q_bound else q


def inner_bounds(low: list[float], high: list[float]) -> torch.Tensor:
    """Both bounds as float32 `[2, A]`, rounded towards each other, so that no action comes out beyond them."""
    exact = torch.tensor([low, high], dtype=torch.float64)
    near = exact.float()
    beyond = torch.stack([near[0] < exact[0], near[1] > exact[1]])
    return torch.where(beyond, torch.nextafter(near, near.flip(0)), near)


class Actor(nn.Module):
    """π(·|s): observations `[B, *obs_shape]` to mean and log-deviation, each `[B, A]`, of a Gaussian whose tanh is the
    action in [−1, 1]. It holds the observation statistics and knows the environment's units of action."""

    LOG_STD = (-5.0, 2.0)  # least and greatest

    def __init__(self, obs_shape: tuple[int, ...], low: list[float], high: list[float], hidden_size: int = 64,
                 hidden_layers: int = 2, obs_limit: float = 10.0):
        super().__init__()
        self.sizes = {"obs_shape": tuple(obs_shape), "low": list(low), "high": list(high), "hidden_size": hidden_size,
                      "hidden_layers": hidden_layers, "obs_limit": obs_limit}
        self.obs_limit = obs_limit
        self.register_buffer("bounds", inner_bounds(low, high), persistent=False)
        self.register_buffer("center", (torch.tensor(high) + torch.tensor(low)) / 2)
        self.register_buffer("scale", (torch.tensor(high) - torch.tensor(low)) / 2)
        self.register_buffer("obs_mean", torch.zeros(obs_shape))
        self.register_buffer("obs_std", torch.ones(obs_shape))
        self.layers = mlp(int(np.prod(obs_shape)), hidden_size, hidden_layers, 2 * len(low))

    def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = ((obs - self.obs_mean) / self.obs_std).clamp(-self.obs_limit, self.obs_limit).flatten(1)
        mean, log_std = self.layers(x).chunk(2, dim=1)
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


def mlp(inputs: int, hidden_size: int, hidden_layers: int, outputs: int) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    widths = [inputs, *[hidden_size] * hidden_layers]
    hidden = [layer for pair in zip(widths, widths[1:]) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(widths[-1], outputs))


# --------------------------------------------------------------------------- Demonstrations and replay
class Batch(NamedTuple):
    """Transitions; the environment's reward is not among them."""

    obs: torch.Tensor  # [B, *obs_shape] float32
    action: torch.Tensor  # [B] int64, or [B, action_dim] float32 in [−1, 1]
    next_obs: torch.Tensor  # [B, *obs_shape] float32, at an episode's end the true last observation
    terminated: torch.Tensor  # [B] float32, 1 where the episode ended by itself, not by a time limit


class Demonstrations(NamedTuple):
    """The expert's transitions on the device, and what is reported of them."""

    transitions: Batch
    initial_obs: torch.Tensor  # [episodes, *obs_shape], first states, kept before subsampling; then their images (--mirror)
    expert_return: float  # mean return of the trajectories used; NaN without rewards in the file
    holdout: Batch | None  # transitions of the trajectories kept out
    spaces: Spaces  # sizes and bounds
    env_id: str  # the environment they were recorded in


SIZES = ("num_actions", "action_low", "action_high")  # read where no environment tells them
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
    match dataset.action_space:
        case gym.spaces.Box(low=low, high=high):
            arrays |= {"action_low": low, "action_high": high}
        case gym.spaces.Discrete(n=n, start=start):
            arrays |= {"num_actions": np.array(start + n)}
    return arrays | {"episode_lengths": np.array([len(e.actions) for e in episodes]),
                     "env_id": np.array(dataset.env_spec.id if dataset.env_spec else "unknown")}


def demonstrations_path(args: Args) -> str:
    """`--demos`, or the bundled file beside this script. Raises BadInput if there is neither."""
    if args.demos is not None:
        return args.demos
    check(args.env_id is not None, "--demos: give an .npz file or a Minari dataset id, or --env-id for a bundled one")
    name = args.env_id.replace("/", "-")
    path = Path(__file__).resolve().parent / "demos" / f"{name}.npz"
    check(os.path.isfile(path), f"--demos: none bundled for {name} ({path} is not there), so give an .npz file with "
          "observations, actions, terminations, truncations, episode_lengths and env_id, or a Minari dataset id")
    return str(path)


def read_demonstrations(args: Args, optional: tuple[str, ...], *formats: list[str]) -> tuple[str, dict[str, np.ndarray]]:
    """Where they came from, for messages, and the arrays of the first format whose first name is in the file, with the
    `optional` ones if they are there beside observations. Raises BadInput (also for `dones` unexplained)."""
    path = demonstrations_path(args)
    where = f"--demos {path}"
    print(f"loading demonstrations from {path}", flush=True)
    if not path.endswith(".npz") and not os.path.exists(path) and re.search(r"-v\d+$", path):
        return where, read_minari(path)
    keys = read_npz(path)
    likely = max(formats, key=lambda names: len(keys.keys() & set(names)))
    names = next((names for names in formats if names[0] in keys), likely)
    names = names + [name for name in optional if name in keys and "observations" in names]
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


def check_demonstrations(where: str, data: dict[str, np.ndarray], args: Args) -> None:
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
    check(actions.dtype.kind in "iu" and actions.ndim == 1 or actions.dtype.kind == "f" and actions.ndim == 2,
          f"{where}: actions are {actions.dtype} of shape {actions.shape}, expected int64 of shape (T,), or float32 of "
          "shape (T, n) where they are continuous")
    check(actions.dtype.kind != "f" or np.isfinite(actions).all(), f"{where}: actions hold NaN or infinite values")
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
    data["env_id"] = recorded
    if args.env_id is not None:
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


def find_spaces(where: str, data: dict[str, np.ndarray], spaces: Spaces | None) -> Spaces:
    """Sizes and bounds of the environment, else of the file, else of the data, or of the task in MIRROR that the file names;
    checked against the actions.

    Raises:
        BadInput: actions or observations that do not fit, or sizes or bounds in the file that are none.
    """
    actions, obs_shape = data["actions"], data["observations"].shape[1:]
    if spaces is not None:
        check(obs_shape == tuple(spaces.obs_shape),
              f"{where}: an observation has shape {obs_shape}, one of --env-id has {tuple(spaces.obs_shape)}")
        found, expected = actions.dtype.kind == "f", spaces.num_actions == 0
        check(found == expected, f"{where}: actions are {actions.dtype}, "
              f"and the actions of --env-id are {'continuous' if expected else 'discrete'}")
        data = data | dict(zip(SIZES, map(np.array, spaces[1:])))
    if actions.dtype.kind != "f":
        obs_order, action_order = MIRROR.get(env_name(data["env_id"]), ((), ()))  # a known task may have more than are shown
        known = len(action_order) if obs_shape == (len(obs_order),) else 0
        count = data.get("num_actions", max(known, int(actions.max()) + 1))
        check(actions.min() >= 0, f"{where}: actions from {actions.min()}, expected 0 or more")
        check(np.shape(count) == () and np.asarray(count).dtype.kind in "iu" and count > 0,
              f"{where}: num_actions of {np.asarray(count).dtype} and shape {np.shape(count)}, with values "
              f"{np.unique(count)[:5]}, expected one whole number, 1 or more")
        check(count <= 65_536, f"{where}: {count} actions, expected 65,536 or fewer")
        check((actions < count).all(),
              f"{where}: actions from {actions.min()} to {actions.max()}, expected 0 to {count - 1}")
        return Spaces(obs_shape, int(count), (), ())
    dim = actions.shape[1]
    if spaces is not None:
        check(len(spaces.action_low) == dim,
              f"{where}: actions of {dim} dimensions, those of --env-id have {len(spaces.action_low)}")
    low, high = (data.get(name, np.full(dim, sign * np.inf)) for sign, name in zip((-1, 1), SIZES[1:]))
    for name, bound in zip(SIZES[1:], (low, high)):
        check(bound.shape == (dim,) and bound.dtype.kind in "iuf" and not np.isnan(bound).any(),
              f"{where}: {name} of {bound.dtype} and shape {bound.shape}, with values {np.unique(bound)[:5]}, expected "
              f"{dim} numbers")
    no_low, no_high = (~(np.abs(bound) < 1e30) for bound in (low, high))  # float32's limits stand for none, too
    if (no_low | no_high).any():
        print(f"warning: action dimensions {np.flatnonzero(no_low | no_high).tolist()} lack a bound, which is taken from "
              "the demonstrations' extremes" + "; action_low and action_high in the file would tell it" * (spaces is None),
              file=sys.stderr)
        low, high = np.where(no_low, actions.min(0), low), np.where(no_high, actions.max(0), high)
        low, high = np.where(no_low & (low == high), low - 1, low), np.where(no_high & (low == high), high + 1, high)
    check((low < high).all(), f"{where}: action_low {low} and action_high {high}, expected low below high")
    beyond = (~np.isclose(actions, actions.clip(low, high), 1e-6, 1e-6)).any(1)  # but for float32's rounding
    if beyond.any():
        print(f"warning: {beyond.sum()} of {len(actions)} actions lie beyond the bounds, by up to "
              f"{np.maximum(low - actions, actions - high).max():.3g}, and are clipped", file=sys.stderr)
    return Spaces(obs_shape, 0, tuple(map(float, low)), tuple(map(float, high)))


def load_demonstrations(args: Args, spaces: Spaces | None, device) -> Demonstrations:
    """The drawn trajectories' transitions, checked and on the device; `spaces` of the environment, if there is one.

    Raises:
        BadInput: whatever is wrong with the file, in the fields that are read.
    """
    names = ["observations", "actions", "terminations", "truncations", "episode_lengths", "env_id"]
    where, data = read_demonstrations(args, ("rewards",) if spaces else ("rewards", *SIZES), names)
    check_demonstrations(where, data, args)
    obs, lengths = data["observations"], data["episode_lengths"]
    check(obs.dtype.kind == "f" and obs.ndim > 1, f"{where}: observations are {obs.dtype} of shape {obs.shape}, expected "
          "float32 of shape (N, ...)")
    check(len(obs) == (lengths + 1).sum(), f"{where}: {len(obs)} observations, expected {(lengths + 1).sum()}, one "
          "more than its length for each episode")
    with np.errstate(over="ignore"):
        obs = obs.astype(np.float32)
    check(np.isfinite(obs).all(), f"{where}: observations hold values that are NaN or infinite in float32")
    spaces = find_spaces(where, data, spaces)

    chosen, place, t = choose_transitions(args, lengths)
    kept_out = int(np.ceil(round(args.holdout * len(chosen), 9)))
    check(kept_out < len(chosen), f"--holdout {args.holdout}: it keeps out whole episodes, {kept_out} of {len(chosen)}, "
          "and none would be left")
    train, held = place < len(chosen) - kept_out, place >= len(chosen) - kept_out
    used = chosen[: len(chosen) - kept_out]
    first_action = (np.cumsum(lengths) - lengths)[chosen]
    first_obs = first_action + chosen  # an episode has one observation more than actions
    row, step = first_obs[place] + t, first_action[place] + t
    returns = np.nan
    if "rewards" in data:
        rewards = data["rewards"].astype(np.float64)  # whatever they are stored in
        returns = [rewards[i : i + length].sum() for i, length in zip(first_action, lengths[used])]

    def tensor(x, dtype=torch.float32):
        return torch.as_tensor(x, dtype=dtype, device=device)

    if spaces.num_actions:
        actions = tensor(data["actions"][step].astype(np.int64), torch.int64)
        if len(np.unique(data["actions"][step[train]])) == 1:
            print(f"warning: {where}: the transitions used hold action {actions[0]} alone", file=sys.stderr)
    else:
        low, high = map(np.array, spaces[2:])
        actions = tensor((2 * (data["actions"][step] - low) / (high - low) - 1).clip(-1, 1).astype(np.float32))
    rows = Batch(tensor(obs[row]), actions, tensor(obs[row + 1]), tensor(data["terminations"][step].astype(np.float32)))
    print(f"loaded {len(used)} of {len(lengths)} episodes, {train.sum()} of their {lengths[used].sum()} transitions, "
          f"{kept_out} episodes kept out, expert return {np.mean(returns):.1f} ± {np.std(returns):.1f}, device {device}",
          flush=True)
    transitions, kept = (Batch(*(field[tensor(mask, torch.bool)] for field in rows)) for mask in (train, held))
    return Demonstrations(transitions, tensor(obs[first_obs[: len(used)]]), float(np.mean(returns)),
                          kept if kept_out else None, spaces, data["env_id"])


def draw(demos: Demonstrations, n: int) -> Batch:
    """`n` transitions drawn with replacement, on their device."""
    action = demos.transitions.action
    index = torch.randint(len(action), (n,), device=action.device)
    return Batch(*(field.index_select(0, index) for field in demos.transitions))


def mirrored(x: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """The image of `x` `[N, n]` in the mirror: its entries in this order and with these signs (MIRROR)."""
    index = torch.tensor(order, device=x.device)
    return x[:, index.abs() - 1] * index.sign()


def add_images(demos: Demonstrations, name: str) -> Demonstrations:
    """The demonstrations of environment `name` and, behind them, their mirror images: an expert could have shown those.
    Without images, and with a warning, where sizes or bounds are not those in MIRROR.

    DEVIATION: the paper has what was recorded alone.

    Raises:
        BadInput: MIRROR has no such environment.
    """
    check(name in MIRROR, f"--mirror: {name} is not known to look the same in a mirror, only {', '.join(MIRROR)}"
          + "; --env-id tells which task it is" * (name == "unknown"))
    obs_order, action_order = MIRROR[name]
    obs, action, next_obs, terminated = demos.transitions
    obs_shape, num_actions, low, high = demos.spaces
    count = len(action_order) if 0 in action_order else 0  # of discrete actions; entries are counted from 1
    fits = num_actions == count if count else [-x for x in low] == list(high) and len(low) == len(action_order)
    if obs_shape != (len(obs_order),) or not fits:
        print(f"warning: no mirror images: observations of shape {tuple(obs_shape)} and {num_actions or 'continuous'} "
              f"actions, {name} has ({len(obs_order)},) and {count or 'continuous ones with bounds ±x'}", file=sys.stderr)
        return demos
    image = torch.tensor(action_order, device=action.device)[action] if count else mirrored(action, action_order)
    images = Batch(mirrored(obs, obs_order), image, mirrored(next_obs, obs_order), terminated)
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


# --------------------------------------------------------------------------------------- IQ objective
def soft_value(q: torch.Tensor, temperature: float) -> torch.Tensor:
    """V(s) = τ·logsumexp_a(Q(s,a)/τ) `[B]` of Q(s,·) `[B, A]`; at τ = 0 the maximum (paper, §3 and Eq. 10)."""
    if temperature == 0:
        return q.max(dim=-1).values
    return temperature * torch.logsumexp(q / temperature, dim=-1)


def q_value(network, actor, obs, action) -> torch.Tensor:
    """Q(s,a) `[B]`."""
    return network(obs, action) if actor else network(obs).gather(1, action[:, None]).squeeze(1)


def state_value(network, actor, obs, temperature: float) -> torch.Tensor:
    """V(s) `[B]`: the soft value of Q(s,·), or with an actor Q(s,ã) − τ·log π(ã|s) of one fresh ã ~ π(·|s).

    Its gradient goes to the critic, never to the actor.
    """
    if actor is None:
        return soft_value(network(obs), temperature)
    with torch.no_grad():
        fresh, log_prob = sample_action(*actor(obs))
    return network(obs, fresh) - temperature * log_prob


def implied_reward(network, actor, obs, action, next_obs, terminated, gamma: float, temperature: float):
    """The reward that Q implies, r = Q(s,a) − γ(1−d)·V(s') (Eq. 11), `[B]`; actions as the environment takes them."""
    q = q_value(network, actor, obs, actor.from_env(action) if actor else action)
    return q - gamma * (1 - terminated.float()) * state_value(network, actor, next_obs, temperature)


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


def iq_loss(network, target, actor, batch: Batch, initial_obs: torch.Tensor, args: Args):
    """The IQ-Learn loss on expert rows, to be minimised: −E[φ(r)] + value term (χ²: φ(r) = r and + E[r²]/(4α)), Eq. 9 to 12.

    Args:
        actor: None where actions are discrete.
        batch: `[B]` rows of the expert.
        initial_obs: `[M, *obs_shape]` states where episodes start, for `--value-loss v0`.

    Returns:
        The loss, and what is logged: tensors whose mean is taken where it is reported.
    """
    obs, action, next_obs, terminated = batch
    γ, τ = args.gamma, args.temperature
    assert obs.shape == next_obs.shape and len(action) == len(obs) and terminated.shape == (len(obs),)
    if actor is None and target is None:  # one pass for s and s'; V(s') carries gradient, as the paper has it offline
        q = network(torch.cat([obs, next_obs]))
        Q, (V, next_V) = q[: len(obs)].gather(1, action[:, None]).squeeze(1), soft_value(q, τ).chunk(2)
    else:
        Q, V = q_value(network, actor, obs, action), state_value(network, actor, obs, τ)
        with torch.set_grad_enabled(target is None):  # with a target network V(s') carries none
            next_V = state_value(target or network, actor, next_obs, τ)
    next_V = (1 - terminated) * next_V
    # DEVIATION: φ acts on one sampled s', which adds γ²·Var V(s')/(4α) to the loss where dynamics are random.
    r = Q - γ * next_V

    terms = {}
    if args.value_loss == "value_expert" and args.divergence in ("chi2", "tv", "w1"):
        terms["cloning_term"] = (V - Q).mean()  # Eq. 12, γV(s') of the two terms below cancels; τ·cross-entropy if discrete
    else:
        terms["expert_term"] = -phi(args.divergence, r).mean()
        if args.value_loss == "value_expert":  # telescoped over the expert's occupancy, §5.1
            terms["value_term"] = (V - γ * next_V).mean()
        elif args.value_loss == "v0":  # not telescoped: (1 − γ)·E_ρ0[V(s0)]
            terms["value_term"] = (1 - γ) * state_value(network, actor, initial_obs, τ).mean()
        else:  # v0_expert
            terms["value_term"] = (1 - γ) * V.mean()
    α = args.chi2_alpha or (0.5 if args.divergence == "chi2" else None)
    if α:
        terms["chi2_term"] = (r**2).mean() / (4 * α)
    if args.divergence == "w1":
        terms["gradient_penalty"] = args.gradient_penalty * gradient_penalty(network, actor, batch)
    loss = sum(terms.values())
    return loss, {"loss": loss, **terms, "value": V, "reward_expert": r}


def actor_loss(network, actor, batch: Batch, args: Args):
    """E[τ·log π(ã|s) − Q(s,ã)] on expert states, to be minimised: §4.4 and Algorithm 1 print the opposite sign.

    DEVIATION: `--cloning-weight` adds −log π(a|s) of the expert's actions. Nothing bounds Q(s,ã) off the data, and
    an actor that leaves the data has nothing else that brings it back: without it Hopper from four trajectories scored 952
    after 5,000 updates, with 0.1 3,204, the level of the expert of then (cloning 3,198; one seed).
    """
    mean, log_std = actor(batch.obs)
    fresh, log_prob = sample_action(mean, log_std)
    terms = {"actor_entropy_term": args.temperature * log_prob.mean(), "actor_q_term": -network(batch.obs, fresh).mean()}
    if args.cloning_weight:
        terms["actor_cloning_term"] = -args.cloning_weight * log_policy((mean, log_std), batch.action).mean()
    return sum(terms.values()), terms


def gradient_penalty(network, actor, batch: Batch) -> torch.Tensor:
    """E[(‖∇Q‖ − 1)²] on interpolates of pairs of expert rows.

    DEVIATION: the 1-Lipschitz constraint of Table 2 is on r, this penalty acts on Q. The action of an interpolate is
    the same mixture of the two actions; of two one-hot ones, so that Q there is that mixture of two outputs.
    """
    obs, action = batch.obs, batch.action
    other_obs, other_action = obs.roll(1, 0), action.roll(1, 0)
    mix = torch.rand(len(obs), device=obs.device)
    mix_obs = mix.view(-1, *[1] * (obs.dim() - 1))
    between = [(mix_obs * obs + (1 - mix_obs) * other_obs).requires_grad_()]
    if actor is None:
        q = network(between[0])
        q = mix * q.gather(1, action[:, None]).squeeze(1) + (1 - mix) * q.gather(1, other_action[:, None]).squeeze(1)
    else:
        between.append((mix[:, None] * action + (1 - mix[:, None]) * other_action).requires_grad_())
        q = network(*between)
    gradients = torch.autograd.grad(q.sum(), between, create_graph=True)
    return ((torch.cat([g.flatten(1) for g in gradients], 1).norm(dim=1) - 1) ** 2).mean()


def log_policy(output, action: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """log π(a|s) `[B]` of softmax(Q(s,·)/τ) for `output` Q(s,·) `[B, A]`, of a hard maximum at τ = 1e-6; or of an actor's
    `(mean, log_std)`, whose actions beyond ±0.999 count as that, in cloning and in held-out likelihoods (DEVIATION: the
    density is infinite at ±1)."""
    if isinstance(output, tuple):
        return log_density(*output, torch.atanh(action.clamp(-0.999, 0.999)))
    return F.log_softmax(output / max(temperature, 1e-6), 1).gather(1, action[:, None]).squeeze(1)


def bc_loss(network, actor, batch: Batch):
    """Behavioural cloning, the baseline: −log π(a|s) of softmax(Q), or of the actor, whose critic stays untrained: no reward
    is implied then."""
    output = (actor or network)(batch.obs)
    loss = -log_policy(output, batch.action).mean()
    return loss, {"loss": loss} | ({} if actor else {"accuracy": (output.argmax(1) == batch.action).float().mean()})


def act(network, actor, obs: torch.Tensor) -> torch.Tensor:
    """The greedy action, as the environment takes it: argmax_a Q(s,a) `[B]`, or the actor's mode `[B, action_dim]`."""
    return actor.act(obs) if actor else network(obs).argmax(1)


# ------------------------------------------------------------------------------------------- Evaluate
def evaluate(network, actor, args: Args, device, stop: "Run | None" = None, frames: list | None = None):
    """Returns of `--eval-episodes` whole episodes of the greedy policy, on environments of its own.

    One episode in each of that many environments, so that long ones count like short ones; `network` None plays
    uniformly random actions. RGB frames of the first episode are appended to `frames`.

    Returns:
        float64 `[episodes]` in the environment's own reward, or None when a signal stopped it.
    """
    n = args.eval_episodes
    envs = make_envs(args, n, "rgb_array" if frames is not None else None)
    seed = 100_000 + 1_000 * args.seed if network is not None else 0  # far from those of demonstrations
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
                action = act(network, actor, torch.as_tensor(obs, dtype=torch.float32, device=device)).cpu().numpy()
        if isinstance(envs.action_space, gym.spaces.Box):  # a model's bounds may be its demonstrations' extremes
            action = action.clip(envs.action_space.low, envs.action_space.high)
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
    return float(evaluate(None, None, replace(args, eval_episodes=20), "cpu").mean())


@torch.no_grad()
def holdout_terms(network, actor, batch: Batch, temperature: float) -> dict[str, torch.Tensor]:
    """Of trajectories kept out: mean log π(a|s), and the share of actions that the greedy policy has too (continuous:
    the root mean square of its difference, in [−1, 1])."""
    output = (actor or network)(batch.obs)
    terms = {"holdout_log_likelihood": log_policy(output, batch.action, temperature).mean()}
    if actor:
        error = torch.tanh(output[0]) - batch.action
        return terms | {"holdout_error": error.square().mean().sqrt()}
    return terms | {"holdout_accuracy": (output.argmax(1) == batch.action).float().mean()}


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


def load_model(path: str, device="cpu") -> tuple[QNetwork, Actor | None, dict]:
    """The network of a model.pt, its actor (None where actions are discrete), ready to act, and what was saved with
    them (γ, temperature, environment, ...).

    Raises:
        BadInput: no such file, or not a model of this script.
    """
    check(os.path.isfile(path), f"{path}: no such file")
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        check(saved["script"] == SCRIPT, f"{path}: a model of {saved['script']}.py: play it with that script")
        network, actor = QNetwork(**saved["sizes"]).to(device), None
        network.load_state_dict(saved["network"])
        if saved["actor"] is not None:
            actor = Actor(**saved["actor_sizes"]).to(device)
            actor.load_state_dict(saved["actor"])
    except (*UNREADABLE, LookupError, TypeError, pickle.UnpicklingError) as error:
        raise BadInput(f"{path}: not a model of {SCRIPT}.py ({type(error).__name__})") from None
    return network, actor, saved


# ---------------------------------------------------------------------------------------------- Train
def save_atomically(content: dict, path: Path) -> None:
    """torch.save that leaves the old file or the new one, whenever the process is killed."""
    torch.save(content, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


class Run:
    """A run's directory, counters, rows and checkpoints. From its creation to the end of `with`, SIGINT and SIGTERM only
    set `signum`, which the loop reads between two updates; a second one acts at once. Python lets the main thread alone
    catch them: in another they act as ever."""

    def __init__(self, args: Args, device, demos, parts: dict, policy: tuple):
        self.args, self.device, self.demos, self.policy = args, device, demos, policy
        self.pretrain, self.total, self.signum = args.total_updates, 0, 0  # all of it is on demonstrations alone
        self.env_id, self.evaluated = args.env_id or demos.env_id, args.env_id is not None and args.eval_every > 0
        self.temperature = 1.0 if args.objective == "bc" else args.temperature  # of the policy that is learned
        self.terms, self.due = {}, False  # what the last update logged; whether a report is still to be made
        self.parts = {name: part for name, part in parts.items() if part is not None}
        self.random = random_return(replace(args, env_id=self.env_id), measure=self.evaluated)
        name = args.run_name or f"{re.sub('[/:]', '-', self.env_id)}__{SCRIPT}__{args.seed}__{time.time_ns() // 10**6}"
        in_main = threading.current_thread() is threading.main_thread()
        self.handlers = {s: signal.signal(s, self.receive) for s in (signal.SIGINT, signal.SIGTERM) if in_main}
        try:
            self.open_directory(Path(args.out_dir) / name)
        except BaseException:
            self.__exit__()
            raise
        self.every = args.eval_every or max(1, args.total_updates // 20)  # updates between rows of metrics.csv
        self.returns, self.frames = None, [] if args.capture_video else None
        self.bar = tqdm(total=self.pretrain, initial=self.updates, unit="update", disable=None,
                        desc=f"{args.objective} {demos.env_id}")

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
        if self.evaluated:
            self.returns = evaluate(*self.policy, self.args, self.device, self, self.frames if last else None)
        if self.signum:
            return
        held = holdout_terms(*self.policy, self.demos.holdout, self.temperature) if self.demos.holdout else {}
        terms = {name: float(term.mean()) for name, term in (self.terms | held).items()}
        updates, now = self.updates, time.time()
        mean, std = (self.returns.mean(), self.returns.std()) if self.returns is not None else (np.nan, np.nan)
        pace = (updates - self.first_updates) / (now - self.first_time) if updates > self.first_updates else np.nan
        row = {"step": 0, "updates": updates, "eval_return_mean": round(float(mean), 4),
               "eval_return_std": round(float(std), 4),
               "steps_per_second": round(pace, 1),
               "seconds": round(now - self.start, 1)} | terms
        self.rows = [old for old in self.rows if int(old["updates"]) < updates] + [row]
        self.write_rows()
        self.due = False
        if self.wandb:
            self.wandb.log(row, step=updates)
        shown = {name: value for name, value in terms.items() if name == "loss" or name in held}
        if self.returns is not None:
            shown |= {"eval_return": mean, "sd": std}
        self.bar.write(f"update {updates}: " + ", ".join(f"{name} {value:.4g}" for name, value in shown.items()))

    def write_rows(self) -> None:
        """Write metrics.csv anew: the old file or the new one, whenever the process is killed."""
        names = dict.fromkeys(name for row in self.rows for name in row)
        with open(self.dir / "metrics.tmp", "w", newline="") as file:
            writer = csv.DictWriter(file, names, restval="nan")
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(self.dir / "metrics.tmp", self.dir / "metrics.csv")

    def check_finite(self) -> None:
        """SystemExit 1 unless the last terms and the networks are finite."""
        parameters = [x for name in ("network", "actor") if name in self.parts for x in self.parts[name].parameters()]
        if not all(bool(torch.isfinite(x).all()) for x in (*self.terms.values(), *parameters)):
            print(f"{SCRIPT}.py: training is not finite after {self.updates} updates; a smaller --learning-rate "
                  "(continuous actions: --critic-lr and --actor-lr) or a larger --temperature helps; the last "
                  f"checkpoint in {self.dir}, if any, is kept", file=sys.stderr)
            raise SystemExit(1)

    def save(self) -> None:
        self.check_finite()
        save_atomically({name: part.state_dict() for name, part in self.parts.items()} |
                        {"rng": torch.get_rng_state(), "step": self.step, "updates": self.updates,
                         "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
                         "terms": self.terms, "due": self.due, "seconds": time.time() - self.start},
                        self.dir / "checkpoint.pt")

    def finish(self, model: dict) -> Path:
        """Save the model and the video, and print the last line; SystemExit where a signal stopped the run."""
        self.bar.close()
        args, expert = self.args, self.demos.expert_return
        called = sys.argv[0] if __name__ == "__main__" else f"{SCRIPT}.py"
        if args.save_model:
            about = {"temperature": self.temperature, "gamma": args.gamma, "args": asdict(args),
                     "expert_return": expert, "random_return": self.random}
            save_atomically({"script": SCRIPT, "env_id": self.env_id} | about | model, self.dir / "model.pt")
        if self.frames:
            video = self.dir / "videos" / f"update_{self.updates}.mp4"
            write_video(self.frames, make_envs(args, 1).metadata.get("render_fps") or 30, video)
            if self.wandb:  # gymnasium no longer uploads videos by itself
                self.wandb.log({"video": self.wandb.Video(str(video))})
        if self.wandb:
            self.wandb.finish()
        if self.signum:
            resume = shlex.join(["python", called, "--resume", str(self.dir)])
            print(f"stopped at update {self.updates}; to continue: {resume}", flush=True)
            raise SystemExit(128 + self.signum)
        if not self.evaluated and args.save_model:
            home = {"GridWorld-v0": "iq_discrete:", "PointMaze-v0": "iq_ilo:"}.get(self.env_id, "")  # the script it is in
            env_id = "ENVIRONMENT" if self.env_id == "unknown" else shlex.quote(home + self.env_id)
            command = shlex.join(["python", called, "--evaluate", str(self.dir / "model.pt")])
            level = " (the level without its switches)" if home else ""  # a file of demonstrations does not say which
            print(f"not evaluated; where the environment is installed{level}: {command} --env-id {env_id}")
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


def make_update(network, target, actor, average, optimizer, actor_optimizer, args: Args):
    """One gradient step as a function of tensors alone."""
    polyak = ((target, network, args.target_rate), (average, actor or network, args.average_rate))
    moves = [(mean, parameter, rate) for follower, leader, rate in polyak if follower is not None
             for mean, parameter in zip(follower.parameters(), leader.parameters())]
    averages = [list(column) for column in zip(*moves)]  # means, parameters, rates: one call for all costs least
    if args.objective == "bc":  # triples: a loss, the network that it trains, its optimiser
        losses = [(lambda batch, _: bc_loss(network, actor, batch), actor or network, actor_optimizer or optimizer)]
    else:
        losses = [(lambda batch, initial_obs: iq_loss(network, target, actor, batch, initial_obs, args), network, optimizer)]
        if actor:  # through the critic, not into it
            losses.append((lambda batch, _: actor_loss(network, actor, batch, args), actor, actor_optimizer))
    steps = [(optimizer, make_gradient(loss_of, list(owner.parameters()), args.compile))
             for loss_of, owner, optimizer in losses]

    def update(batch: Batch, initial_obs: torch.Tensor) -> dict[str, torch.Tensor]:
        terms = {}
        for optimizer, gradient in steps:
            terms |= gradient(batch, initial_obs)
            optimizer.step()
        if averages:
            with torch.no_grad():
                torch._foreach_lerp_(*averages)
        return terms

    return update


def train(args: Args) -> Path:
    """Train from demonstrations alone; returns the run directory. `Args()` are the plain defaults,
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
    if args.capture_video:
        make_envs(args, 1, "rgb_array").close()
    demos = load_demonstrations(args, env_spaces(args), device)
    if args.mirror:
        demos = add_images(demos, env_name(args.env_id or demos.env_id))
    obs_shape, num_actions, action_low, action_high = demos.spaces
    check(args.obs_dims <= np.prod(obs_shape),
          f"--obs-dims {args.obs_dims}: an observation has shape {obs_shape}; give --obs-dims 0 for all of it")

    idle = ("actor_lr", "critic_lr", "cloning_weight") if num_actions else ("learning_rate",)
    usual = Args(**SETTINGS.get(env_name(args.env_id or demos.env_id), {}))
    for name in (name for name in idle if getattr(args, name) != getattr(usual, name)):
        print(f"warning: --{name.replace('_', '-')} does nothing with {'discrete' if num_actions else 'continuous'} actions",
              file=sys.stderr)
    q_bound = args.q_bound if args.q_bound is not None else 10.0 * (args.divergence == "tv")
    size = (args.hidden_size, args.hidden_layers)
    limit = 10.0 if args.standardize_obs else np.inf  # in deviations; raw observations are not clipped
    network = QNetwork(obs_shape, num_actions, len(action_low), *size, q_bound, limit).to(device)
    actor = None if num_actions else Actor(obs_shape, action_low, action_high, *size, limit).to(device)
    if args.standardize_obs:  # DEVIATION: the paper has raw observations
        mean, std = demos.transitions.obs.mean(0), deviation(demos.transitions.obs, args.obs_dims or None)
        for module in filter(None, (network, actor)):
            module.obs_mean.copy_(mean)
            module.obs_std.copy_(std)
    if args.obs_dims:  # DEVIATION: the others, divided by infinity, enter as 0
        print(f"the networks see the first {args.obs_dims} entries of an observation (--obs-dims)", flush=True)
        for module in filter(None, (network, actor)):
            module.obs_std.view(-1)[args.obs_dims :] = np.inf
    # With continuous actions V(s') comes from a target network, without gradient, as the paper has it online.
    args = replace(args, target_rate=args.target_rate if args.target_rate is not None else 0.0 if num_actions else 0.005)
    target = deepcopy(network) if args.target_rate else None  # DEVIATION: with discrete actions the paper has none
    average = deepcopy(actor or network) if args.average_rate else None  # DEVIATION: the paper has the last iterate
    # What is evaluated and saved.
    saved_network, saved_actor = (network, average or actor) if actor else (average or network, None)
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.learning_rate if num_actions else args.critic_lr,
                                  weight_decay=args.weight_decay, fused=True)
    actor_optimizer = torch.optim.AdamW(actor.parameters(), lr=args.actor_lr, weight_decay=args.weight_decay,
                                        fused=True) if actor else None
    n = args.batch_size
    update = make_update(network, target, actor, average, optimizer, actor_optimizer, args)

    parts = {"network": network, "target": target, "actor": actor, "average": average, "optimizer": optimizer,
             "actor_optimizer": actor_optimizer}
    run = Run(args, device, demos, parts, (saved_network, saved_actor))
    with run, run.bar:
        while run.running():
            initial = demos.initial_obs
            if args.value_loss == "v0":
                initial = initial[torch.randint(len(initial), (n,), device=device)]
            run.terms = update(draw(demos, n), initial)
            run.updates += 1
            run.tick(run.updates, 1)
        run.report(last=True)
        run.save()
        return run.finish({"network": saved_network.state_dict(), "sizes": network.sizes,
                           "actor": saved_actor and saved_actor.state_dict(), "actor_sizes": actor and actor.sizes})


def play(args: Args) -> None:
    """Evaluate a saved model in `--env-id`, or in the environment of its demonstrations, and print the final line."""
    check(args.resume is None, "--evaluate: it plays a model, and --resume trains on: give one of them")
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    network, actor, saved = load_model(args.evaluate, device)
    args = replace(args, env_id=args.env_id or saved["env_id"])
    validate(args)
    check(env_name(args.env_id) == env_name(saved["env_id"]) or saved["env_id"] == "unknown",
          f"--evaluate {args.evaluate}: a model of {saved['env_id']}, and --env-id is {args.env_id}")
    check(args.env_id != "unknown", f"--evaluate {args.evaluate}: its demonstrations name no environment; give --env-id")
    spaces = env_spaces(replace(args, eval_every=1))  # here it must be installed
    own = (tuple(network.sizes["obs_shape"]), network.sizes["num_actions"], network.sizes["action_dim"])
    there = (spaces.obs_shape, spaces.num_actions, len(spaces.action_low))
    fewer = 0 < own[1] < there[1] and (own[0], own[2]) == (there[0], there[2])  # its expert never took the last actions
    check(own == there or fewer,
          f"--evaluate {args.evaluate}: observations, actions and action dimensions {own}, {args.env_id} has {there}")
    start, frames, run_dir = time.time(), [] if args.capture_video else None, Path(args.evaluate).resolve().parent
    check(frames is None or os.access(run_dir, os.W_OK), f"--capture-video: {run_dir} cannot be written to")
    returns = evaluate(network, actor, args, device, None, frames)
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
