# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0", "gymnasium[classic-control,box2d,mujoco]==1.4.0", "numpy==2.4.6", "tyro==1.0.17",
#   "tqdm==4.70.1", "wandb==0.31.0", "moviepy==2.2.1",
# ]
# ///
"""Inverse soft-Q Learning (IQ-Learn, arXiv:2106.12142): imitation from observations only, and state-only rewards.

The demonstrations hold states and no actions. IQ-Learn's reward r = Q(s,a) − γ V(s') still needs an action that led
from the expert's s to its s'. By default an inverse-dynamics model p(a|s,s'), fitted on the agent's own play, infers it:

    L = −E_expert[E_{a ~ p(a|s,s')} r] + (1−γ)·E_expert[V(s)] + E[r²]/(4α)

On CartPole, Acrobot, LunarLander the second term is E_expert[V(s) − γ V(s')], the third over expert rows: see SETTINGS.
Discrete actions (the policy is softmax(Q/τ)) and continuous ones (a tanh-Gaussian actor), as the environment has them.
The environment's reward is never read in training, and the file's `actions` are never opened.

    python iq_ilo.py --env-id CartPole-v1

scores 500.0 ± 0.0 over seeds 111 to 115 after 10,000 steps, from one demonstration of 500 steps, in half a minute of a core;
LunarLander-v3 257.6 ± 21.9 of 283.2 from one, 274.8 ± 6.4 of 280.1 from 10 (`--mirror`); Hopper-v5 3490 ± 12 of 3500 from
one and 3505 ± 8 of 3499 from 10, over seeds 104 to 106 after 80,000 steps, in 12 minutes.

`state_reward` gives back a reward of the state alone. Departures from the paper are marked DEVIATION where they act.
`diff iq_continuous.py iq_ilo.py` shows what missing actions need.
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

SCRIPT = "iq_ilo"
# Mean return of uniformly random actions, 100 episodes, seeds 0 to 99; measured when an environment is missing.
RANDOM_RETURN: dict[str, float] = {"CartPole": 23.0, "Acrobot": -498.2, "LunarLander": -186.5, "Hopper": 15.4,
                                   "HalfCheetah": -289.6, "Walker2d": 0.9, "Ant": -53.6, "Humanoid": 112.4,
                                   "Pendulum": -1199.9, "InvertedPendulum": 4.4}
# Tasks that look the same in a mirror: which entry of the observation its image has at each place, counted from 1, minus for
# the other sign.
MIRROR = {"CartPole": (-1, -2, -3, -4), "Acrobot": (1, -2, 3, -4, -5, -6), "LunarLander": (-1, 2, -3, 4, -5, -6, 8, 7)}
# Settings that differ per environment, by its name without the version; a flag that is given always wins.
# DEVIATION: in these discrete tasks the loss reads the expert's rows alone, as iq_offline.py's; a model of the agent's play
# names their actions. With χ² on both halves LunarLander had −375 and −314 from one demonstration, not 22 and 201 (seeds
# 1, 2, an earlier expert). The price: r is not trained where the expert never was; PLAYED's two flags train it there, too.
DISCRETE = {"learning_starts": 500, "value_loss": "value_expert", "chi2_rows": "expert", "target_rate": 0.0,
            "layer_norm": False, "standardize_obs": False, "batch_size": 32}
PLAYED = {"value_loss": "value", "chi2_rows": "both"}  # instead, where --missing-action names no action of the expert's
SETTINGS: dict[str, dict] = {
    "CartPole": DISCRETE | {"temperature": 0.1, "hidden_size": 64, "total_timesteps": 10_000, "eval_every": 2_000},
    "Acrobot": DISCRETE | {"temperature": 0.1, "hidden_size": 64, "total_timesteps": 10_000, "eval_every": 2_000},
    "LunarLander": DISCRETE | {"learning_starts": 5_000, "temperature": 1.0, "chi2_alpha": 50.0,
                               "mirror": True,  # DEVIATION: 258 from one trajectory, 135 without; τ and α, too
                               "hidden_size": 512, "standardize_obs": True},  # from ten, unmirrored, 270; 259 with 256, raw
    # Half of the play is random and observations are noisy, so that the reward is smooth over the whole plane. For the
    # imitation alone --obs-noise 0 --temperature 0.01 is better.
    "PointMaze": {"hidden_size": 64, "batch_size": 64, "num_demos": 0, "actor_lr": 3e-4, "average_rate": 0.002,
                  "temperature": 0.1, "obs_noise": 0.06, "learning_starts": 4_000, "total_timesteps": 8_000,
                  "eval_every": 2_000},
    "Hopper": {"gamma": 0.97, "temperature": 0.1,  # DEVIATION: as in iq_continuous.py
               "anneal_lr": 0.5, "total_timesteps": 80_000},
    "Ant": {"obs_dims": 27,  # positions and velocities. DEVIATION: much play, a quick target critic, as in iq_continuous.py
            "target_rate": 0.02, "anneal_lr": 0.5, "num_envs": 8, "updates_per_step": 0.25, "learning_starts": 5_000,
            "total_timesteps": 400_000, "eval_every": 25_000, "checkpoint_every": 50_000},  # each holds the replay, 0.4 GB
    "Humanoid": {"obs_dims": 45},  # positions and velocities
    "Pendulum": {"total_timesteps": 5_000, "eval_every": 1_000},
    "InvertedPendulum": {"total_timesteps": 5_000, "eval_every": 1_000},
}


# ----------------------------------------------------------------------------------------------- Args
@dataclass
class Args:
    # The task
    env_id: str = "CartPole-v1"  # a gymnasium environment with discrete or bounded continuous actions, or PointMaze-v0
    seed: int = 1  # of everything: demonstrations drawn, networks, environments
    total_timesteps: int = 30_000  # environment steps, summed over the environments
    learning_starts: int = 1_280  # steps of uniformly random actions before the first update; at most half of the run
    num_envs: int = 1  # environments stepped side by side
    # PointMaze-v0 only
    barrier: Literal["right", "left"] = "right"  # the side that the barrier reaches out from
    random_start: bool = False  # episodes start anywhere (off: below the barrier)
    # Demonstrations
    demos: str | None = None  # an .npz file or a Minari dataset id (default: the bundled file)
    num_demos: int = 1  # trajectories, drawn by the seed; 0 for all
    subsample_freq: int = 1  # keep every k-th transition of a trajectory, from a random offset
    mirror: bool = False  # learn from the transitions' mirror images, too (CartPole, Acrobot, LunarLander)
    dones_are: Literal["terminations", "time-limits"] | None = None  # what a file's `dones` mark
    # The objective (the letters of the equations in brackets)
    missing_action: Literal["idm", "policy", "replay"] = "idm"  # expert's a: inferred from (s,s'); from π; any replay row's
    gamma: float = 0.99  # discount [γ]
    temperature: float = 0.01  # entropy temperature of value and policy, fixed [τ]
    divergence: Literal["chi2"] = "chi2"  # the distance; iq_discrete.py has the others [φ]
    chi2_alpha: float = 0.5  # of the χ² term, E[r²]/(4α) [α]
    chi2_rows: Literal["expert", "both"] = "both"  # rows that the χ² term averages over: expert's, or policy's too
    value_loss: Literal["value", "value_expert", "v0", "v0_expert"] = "v0_expert"  # V−γV': all | expert; (1−γ)V: s0 | expert
    bound_targets: bool = True  # clip a target's V(s') at ±4α/(1−γ) if χ² is on both halves; turn off for large temperatures
    target_rate: float = 0.005  # Polyak rate of the target critic for V(s'); 0: none, V(s') has gradient
    average_rate: float = 0.0005  # rate of a moving average of the weights, evaluated and saved in their place; 0: none
    # The network
    hidden_size: int = 256  # units of a layer
    layer_norm: bool = True  # LayerNorm in the critic
    obs_dims: int = 0  # number of an observation's first entries that the networks see; 0: all
    standardize_obs: bool = True  # standardise observations by the demonstrations
    obs_noise: float = 0.0  # standard deviation of Gaussian noise on training observations
    # Optimisation
    actor_lr: float = 3e-5  # of Adam, actor
    critic_lr: float = 3e-4  # of Adam, critic
    anneal_lr: float = 0.0  # share of the run, its last, over which both fall linearly to zero; 0: none
    idm_lr: float = 1e-3  # of Adam, inverse-dynamics model
    batch_size: int = 128  # expert rows, and as many policy rows
    buffer_size: int = 1_000_000  # transitions of the agent's own that are kept
    updates_per_step: float = 1.0  # gradient updates per environment step
    reward_updates: int = 2_000  # updates of the reward network behind `state_reward`, after training; 0: it is Q
    # The run
    eval_every: int = 5_000  # steps between evaluations; 0: none at all
    eval_episodes: int = 10  # episodes of an evaluation
    out_dir: str = "runs"  # where run directories go
    run_name: str | None = None  # the run's directory (default: environment, script, seed, time)
    track: bool = False  # log to Weights & Biases
    wandb_project_name: str = "iq-learn"  # its project
    wandb_entity: str | None = None  # its team
    capture_video: bool = False  # record the last evaluation's first episode
    save_model: bool = True  # write model.pt
    checkpoint_every: int = 4_000  # steps between checkpoints; 0: only at the end or when stopped
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


def settings(args: Args) -> dict:
    """The environment's settings, for the way in which the missing action is treated."""
    own = SETTINGS.get(env_name(args.env_id), {})
    return own | PLAYED if own.get("value_loss") == "value_expert" and args.missing_action != "idm" else own


def start_within(args: Args) -> Args:
    """`--learning-starts` cut to half of the run, so that a short one trains too."""
    if not args.total_timesteps:
        return args
    return replace(args, learning_starts=max(1, min(args.learning_starts, args.total_timesteps // 2)))


def parse_args(argv: list[str] | None = None) -> Args:
    """Flags over the environment's settings over the defaults; with `--resume`, over the stopped run's own.

    Raises:
        BadInput: `--resume` with no run there, of another script, or with a setting that must not change; `--evaluate`
            with no model there.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = tyro.cli(Args, args=[flag for flag in argv if flag not in ("-h", "--help")])  # help comes with the settings
    if args.evaluate is not None:  # the environment is the model's own, and so are its switches
        own = load_model(args.evaluate)[-1]["args"]
        switches = {name: own[name] for name in MAZE_SWITCHES}
        return tyro.cli(Args, args=argv, default=replace(Args(), env_id="", **switches))
    if args.resume is None:
        return tyro.cli(Args, args=argv, default=replace(Args(), **settings(args)))
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
    """Check the numbers among the flags, and that the choices go together. Raises BadInput."""
    rules = {
        "at least 1": (lambda x: x >= 1, "num_envs subsample_freq batch_size buffer_size eval_episodes hidden_size "
                       "learning_starts"),
        "at least 0 and finite": (lambda x: 0 <= x < np.inf, "seed total_timesteps num_demos temperature obs_dims "
                       "obs_noise reward_updates eval_every checkpoint_every"),
        "at most 2 million (evaluation seeds, 100,000 + 1,000 times it, have 31 bits)": (lambda x: x <= 2_000_000, "seed"),
        "above 0 and finite": (lambda x: 0 < x < np.inf, "actor_lr critic_lr idm_lr updates_per_step chi2_alpha"),
        "at least 0 and below 1": (lambda x: 0 <= x < 1, "gamma"),
        "from 0 to 1": (lambda x: 0 <= x <= 1, "target_rate average_rate anneal_lr"),
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
    bounded = not args.evaluate and args.bound_targets and args.target_rate and args.chi2_rows == "both"
    if bounded and args.temperature >= 0.5:
        print(f"warning: --bound-targets leaves the entropy out of V's bound, and with --temperature {args.temperature} it "
              "counts: take --no-bound-targets", file=sys.stderr)
    check(args.buffer_size >= args.num_envs, f"--buffer-size {args.buffer_size}: expected --num-envs or more")
    expert_alone = args.value_loss == "value_expert" or args.value_loss != "value" and args.chi2_rows == "expert"
    check(args.missing_action != "policy" or not expert_alone,
          f"--missing-action policy: with --value-loss {args.value_loss} and --chi2-rows {args.chi2_rows} the policy's own "
          "actions on expert rows say nothing of the expert: take --value-loss v0_expert with --chi2-rows both, or "
          "--missing-action idm")


def check_compiler(device) -> None:
    """Compile something small: raises BadInput where `torch.compile` cannot work, without a C++ compiler say."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except Exception as error:
        raise BadInput(f"--compile: {str(error).splitlines()[0]}") from None


# ---------------------------------------------------------------------------------------- Environment
class PointMaze(gym.Env):
    """A point pushed about the unit square, round a barrier to the goal.

    Observation: float32 `[4]`, position and velocity. Action: a force in [−1, 1]². Reward: −distance to the goal; the
    point should stay there. The barrier reaches from one side across 60 % of the width at half height. 100 steps.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}
    START, GOAL = np.array([0.5, 0.2]), np.array([0.5, 0.8])
    WIDTH, HEIGHT = 0.6, 0.5  # of the barrier
    TIME_STEP, FORCE, FRICTION = 0.1, 0.05, 0.2  # either velocity is at most 0.05 / 0.2
    STEPS = 100

    def __init__(self, barrier: str = "right", random_start: bool = False, render_mode: str | None = None):
        self.barrier, self.random_start, self.render_mode = barrier, random_start, render_mode
        low, high = np.array([0, 0, -0.25, -0.25], np.float32), np.array([1, 1, 0.25, 0.25], np.float32)
        self.observation_space = gym.spaces.Box(low, high)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.span = (1 - self.WIDTH, 1.0) if barrier == "right" else (0.0, self.WIDTH)  # of the barrier, in x

    def blocks(self, start: np.ndarray, end: np.ndarray) -> np.ndarray:
        """Whether the barrier lies across the straight way from `start` to `end`, each `[..., 2]`."""
        below, above = start[..., 1] - self.HEIGHT, end[..., 1] - self.HEIGHT
        share = below / np.where(below == above, 1, below - above)
        x = start[..., 0] + share * (end[..., 0] - start[..., 0])
        return ((below < 0) != (above < 0)) & (self.span[0] <= x) & (x <= self.span[1])

    def distances(self, position: np.ndarray) -> np.ndarray:
        """Length of the shortest way to the goal from positions `[..., 2]`: straight, or by the barrier's free end."""
        corner = np.array([self.span[0] if self.barrier == "right" else self.span[1], self.HEIGHT])
        straight = np.linalg.norm(position - self.GOAL, axis=-1)
        around = np.linalg.norm(position - corner, axis=-1) + np.linalg.norm(corner - self.GOAL)
        return np.where(self.blocks(position, self.GOAL), around, straight)

    def _observation(self) -> np.ndarray:
        return np.concatenate([self.position, self.velocity]).astype(np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.position = self.START + self.np_random.uniform(-0.05, 0.05, 2)
        if self.random_start:
            self.position = self.np_random.uniform(0, 1, 2)
        self.velocity, self.steps = np.zeros(2), 0
        return self._observation(), {}

    def step(self, action: np.ndarray):
        force = np.clip(np.asarray(action, np.float64), -1, 1)
        self.velocity = (1 - self.FRICTION) * self.velocity + self.FORCE * force
        moved = self.position + self.TIME_STEP * self.velocity
        end = np.clip(moved, 0, 1)
        self.velocity[end != moved] = 0  # it slides along the square's edges
        if self.blocks(self.position, end):  # and along the barrier, on its own side
            end[1] = self.HEIGHT + np.sign(self.position[1] - self.HEIGHT) * 1e-3
            self.velocity[1] = 0
        self.position, self.steps = end, self.steps + 1
        reward = -float(np.linalg.norm(self.position - self.GOAL))
        return self._observation(), reward, False, self.steps >= self.STEPS, {}

    def render(self) -> np.ndarray:
        """RGB `[256, 256, 3]`: agent white, goal a red star, the barrier grey."""
        x, y = np.meshgrid((np.arange(256) + 0.5) / 256, (255.5 - np.arange(256)) / 256)
        image = np.full((256, 256, 3), (25, 30, 60), np.uint8)
        image[(abs(y - self.HEIGHT) < 0.01) & (self.span[0] <= x) & (x <= self.span[1])] = (150, 150, 150)
        dx, dy = x - self.GOAL[0], y - self.GOAL[1]
        point = abs((np.arctan2(dx, dy) / (2 * np.pi) * 5) % 1 - 0.5)  # 0.5 at a tip of the star, 0 between two
        image[np.hypot(dx, dy) < 0.02 + 0.05 * point] = (220, 30, 30)
        image[np.hypot(x - self.position[0], y - self.position[1]) < 0.02] = (255, 255, 255)
        return image


gym.register("PointMaze-v0", entry_point=PointMaze)
MAZE_SWITCHES = ("barrier", "random_start")


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
    check(args.env_id != "PointMaze", "--env-id PointMaze: expected PointMaze-v0")  # else without its switches
    maze = {switch: getattr(args, switch) for switch in MAZE_SWITCHES}
    try:
        envs = gym.make_vec(args.env_id, num_envs=num_envs, vectorization_mode="sync", wrappers=[Plain],
                            vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP},
                            **({"render_mode": render_mode} if render_mode else {}),  # not every constructor takes it
                            **(maze if args.env_id == "PointMaze-v0" else {}))
    except Exception as error:  # each constructor has its own
        raise BadInput(f"--env-id {args.env_id}: {' '.join(str(error).split())}") from None
    obs_space, action_space = envs.single_observation_space, envs.single_action_space
    if isinstance(action_space, gym.spaces.Discrete):
        usable = action_space.start == 0
    else:
        usable = (isinstance(action_space, gym.spaces.Box) and len(action_space.shape) == 1
                  and (np.abs([action_space.low, action_space.high], dtype=float) < 1e30).all()  # float32's limits: none too
                  and action_space.dtype.kind == "f" and (action_space.low < action_space.high).all())
    check(usable, f"--env-id {args.env_id}: its action space is {action_space}, expected Discrete(n) from 0, or a "
          "bounded Box of one dimension of real numbers from a low to a higher bound")
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
    """Q(s, a): observations `[B, *obs_shape]` and actions to `[B]`. Discrete actions, int64 `[B]`, choose one of the
    `num_actions` outputs; continuous ones, float32 `[B, A]` in [−1, 1], are inputs, and A is `num_actions`."""

    def __init__(self, obs_shape: tuple[int, ...], num_actions: int, discrete: bool, hidden_size: int = 256,
                 layer_norm: bool = False, obs_limit: float = 10.0):
        super().__init__()
        self.sizes = {"obs_shape": tuple(obs_shape), "num_actions": num_actions, "discrete": discrete,
                      "hidden_size": hidden_size, "layer_norm": layer_norm, "obs_limit": obs_limit}
        self.discrete = discrete
        self.standardize = Standardize(obs_shape, obs_limit)
        inputs, outputs = (0, num_actions) if discrete else (num_actions, 1)
        self.layers = mlp(int(np.prod(obs_shape)) + inputs, hidden_size, outputs, layer_norm)

    def forward(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        if self.discrete:
            return self.each(obs).gather(1, action[:, None]).squeeze(1)
        return self.layers(torch.cat([self.standardize(obs), action], 1)).squeeze(1)

    def each(self, obs: torch.Tensor) -> torch.Tensor:
        """Q(s, ·) of discrete actions `[B, A]`."""
        return self.layers(self.standardize(obs))


class Softmax(nn.Module):
    """Discrete actions, int64 `[B]`: π(a|s) = softmax(Q(s,·)/τ). There is no actor, and V(s) is exact."""

    def __init__(self, critic: QNetwork):
        super().__init__()
        self.critic = critic

    def sample(self, obs: torch.Tensor, temperature: float) -> torch.Tensor:
        """a ~ π(·|s); by the Gumbel maximum, which is exact at any τ and greedy at 0."""
        q = self.critic.each(obs)
        return (q - temperature * torch.empty_like(q).exponential_().log()).argmax(1)

    def value(self, critic: QNetwork, obs: torch.Tensor, temperature: float) -> torch.Tensor:
        """V(s) `[B]`, see `soft_value`."""
        return self.soft_value(critic.each(obs), temperature)

    @staticmethod
    def soft_value(q: torch.Tensor, temperature: float) -> torch.Tensor:
        """V(s) = τ·logsumexp_a(Q(s,a)/τ) `[B]` of Q(s,·) `[B, A]`; at τ = 0 the maximum (paper, §3 and Eq. 10)."""
        return temperature * torch.logsumexp(q / temperature, 1) if temperature else q.max(1).values

    def q_and_value(self, critic: QNetwork, obs: torch.Tensor, action: torch.Tensor, temperature: float):
        """Q(s,a) of the first `len(action)` rows and V(s) of all, in one pass of the critic."""
        q = critic.each(obs)
        return q[: len(action)].gather(1, action[:, None]).squeeze(1), self.soft_value(q, temperature)

    def marginal(self, function: QNetwork, obs: torch.Tensor, temperature: float) -> torch.Tensor:
        """E_{a ~ π(·|s)}[function(s, a)] `[B]`, exact."""
        q = self.critic.each(obs)
        weights = torch.softmax(q / temperature, 1) if temperature else F.one_hot(q.argmax(1), q.shape[1])
        return (weights * function.each(obs)).sum(1)

    @torch.no_grad()
    def act(self, obs: torch.Tensor) -> torch.Tensor:
        """The greedy action, in the environment's numbers `[B]`."""
        return self.critic.each(obs).argmax(1)

    def uniform(self, n: int) -> torch.Tensor:
        """Uniformly random actions `[n]`."""
        return torch.randint(self.critic.sizes["num_actions"], (n,), device=self.critic.standardize.mean.device)

    def to_env(self, action: torch.Tensor) -> torch.Tensor:
        return action

    def from_env(self, action: torch.Tensor) -> torch.Tensor:
        return action


def inner_bounds(low: list[float], high: list[float]) -> torch.Tensor:
    """Both bounds as float32 `[2, A]`, rounded towards each other, so that no action comes out beyond them."""
    exact = torch.tensor([low, high], dtype=torch.float64)
    near = exact.float()
    beyond = torch.stack([near[0] < exact[0], near[1] > exact[1]])
    return torch.where(beyond, torch.nextafter(near, near.flip(0)), near)


class TanhGaussian(nn.Module):
    """Continuous actions, float32 `[B, A]` in [−1, 1]: the tanh of a Gaussian whose mean and log-deviation are the
    actor's outputs. V(s) is a sample of one action. It knows the environment's units of action."""

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
        return gaussian(self.layers(self.standardize(obs)))

    def sample_with_log(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """ã ~ π(·|s), reparameterised, and log π(ã|s) `[B]`."""
        mean, log_std = self(obs)
        before_tanh = mean + log_std.exp() * torch.randn_like(mean)
        return torch.tanh(before_tanh), log_density(mean, log_std, before_tanh)

    def sample(self, obs: torch.Tensor, temperature: float) -> torch.Tensor:
        """a ~ π(·|s); the temperature is in the actor's loss."""
        return self.sample_with_log(obs)[0]

    def value(self, critic: QNetwork, obs: torch.Tensor, temperature: float) -> torch.Tensor:
        """V(s) = Q(s,ã) − τ log π(ã|s) `[B]` with one fresh ã ~ π(·|s) (paper, §3); gradient to the critic alone."""
        with torch.no_grad():
            action, log_prob = self.sample_with_log(obs)
        return critic(obs, action) - temperature * log_prob

    def q_and_value(self, critic: QNetwork, obs: torch.Tensor, action: torch.Tensor, temperature: float):
        """Q(s,a) of the first `len(action)` rows and V(s) of all as in `value`, in one pass of the critic."""
        n = len(action)
        with torch.no_grad():
            fresh, log_prob = self.sample_with_log(obs)
        q = critic(torch.cat([obs[:n], obs]), torch.cat([action, fresh]))
        return q[:n], q[n:] - temperature * log_prob

    def marginal(self, function: QNetwork, obs: torch.Tensor, temperature: float, samples: int = 64) -> torch.Tensor:
        """E_{a ~ π(·|s)}[function(s, a)] `[B]`, the mean over samples."""
        obs = obs.repeat_interleave(samples, 0)
        return function(obs, self.sample(obs, temperature)).view(-1, samples).mean(1)

    @torch.no_grad()
    def act(self, obs: torch.Tensor) -> torch.Tensor:
        """The deterministic action, tanh of the mean, in the environment's units `[B, A]`."""
        return self.to_env(torch.tanh(self(obs)[0]))

    def uniform(self, n: int) -> torch.Tensor:
        """Uniformly random actions `[n, A]`."""
        return 2 * torch.rand(n, len(self.center), device=self.center.device) - 1

    def to_env(self, action: torch.Tensor) -> torch.Tensor:
        """[−1, 1] to the environment's units."""
        return (self.center + self.scale * action).clamp(*self.bounds)

    def from_env(self, action: torch.Tensor) -> torch.Tensor:
        """The environment's units to [−1, 1]."""
        return ((action - self.center) / self.scale).clamp(-1, 1)


class InverseDynamics(nn.Module):
    """p(a|s,s'), which action led from s to s': a classifier, or a Gaussian of the action before its tanh."""

    def __init__(self, obs_shape: tuple[int, ...], num_actions: int, discrete: bool, hidden_size: int = 256):
        super().__init__()
        self.discrete = discrete
        self.standardize, self.standardize_change = Standardize(obs_shape, 10.0), Standardize(obs_shape, 10.0)
        outputs = num_actions if discrete else 2 * num_actions
        self.layers = mlp(2 * int(np.prod(obs_shape)), hidden_size, outputs, layer_norm=True)

    def forward(self, obs: torch.Tensor, next_obs: torch.Tensor) -> torch.Tensor:
        """Logits `[B, A]`, or mean and log-deviation side by side `[B, 2A]`. What an action does shows in s' − s, which
        is small beside s and has its own scale."""
        return self.layers(torch.cat([self.standardize(obs), self.standardize_change(next_obs - obs)], 1))

    def log_prob(self, obs: torch.Tensor, action: torch.Tensor, next_obs: torch.Tensor) -> torch.Tensor:
        """log p(a|s,s') `[B]`. Actions beyond ±0.999 count as that: at ±1 the density is infinite."""
        outputs = self(obs, next_obs)
        if self.discrete:
            return -F.cross_entropy(outputs, action, reduction="none")
        return log_density(*gaussian(outputs), torch.atanh(action.clamp(-0.999, 0.999)))

    def sample(self, obs: torch.Tensor, next_obs: torch.Tensor) -> torch.Tensor:
        """a ~ p(a|s,s')."""
        outputs = self(obs, next_obs)
        if self.discrete:
            return (outputs - torch.empty_like(outputs).exponential_().log()).argmax(1)
        mean, log_std = gaussian(outputs)
        return torch.tanh(mean + log_std.exp() * torch.randn_like(mean))


def gaussian(outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log-deviation `[B, A]` of the action before its tanh, from a network's outputs `[B, 2A]`."""
    mean, log_std = outputs.chunk(2, dim=1)
    least, greatest = TanhGaussian.LOG_STD
    return mean, least + (greatest - least) * (torch.tanh(log_std) + 1) / 2


def log_density(mean: torch.Tensor, log_std: torch.Tensor, before_tanh: torch.Tensor) -> torch.Tensor:
    """log π `[B]` of the actions tanh(before_tanh) in [−1, 1]: the Gaussian's less log |d tanh|, exact and stable."""
    gaussian = -((before_tanh - mean) / log_std.exp()) ** 2 / 2 - log_std - np.log(2 * np.pi) / 2
    log_slope = 2 * (np.log(2) - before_tanh - F.softplus(-2 * before_tanh))  # log(1 − tanh²)
    return (gaussian - log_slope).sum(1)


# --------------------------------------------------------------------------- Demonstrations and replay
class States(NamedTuple):
    """What is known of the expert: there is no field for its actions."""

    obs: torch.Tensor  # [B, *obs_shape] float32
    next_obs: torch.Tensor  # [B, *obs_shape] float32, at an episode's end the true last observation
    terminated: torch.Tensor  # [B] float32, 1 where the episode ended by itself, not by a time limit


class Batch(NamedTuple):
    """Transitions; the environment's reward is not among them."""

    obs: torch.Tensor  # [B, *obs_shape] float32
    action: torch.Tensor  # [B] int64, or [B, A] float32 in [−1, 1]
    next_obs: torch.Tensor  # [B, *obs_shape] float32, at an episode's end the true last observation
    terminated: torch.Tensor  # [B] float32, 1 where the episode ended by itself, not by a time limit


class Demonstrations(NamedTuple):
    """The expert's transitions on the device, and what is reported of them."""

    transitions: States
    initial_obs: torch.Tensor  # [episodes, *obs_shape], first states, kept before subsampling; then their images (--mirror)
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
    """A Minari dataset as the arrays of the .npz format, without its actions.

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
    names = ("observations", "terminations", "truncations", "rewards")
    check(episodes and all(isinstance(getattr(e, name), np.ndarray) for e in episodes for name in names),
          f"--demos {dataset_id}: it holds no episodes, or some of their {', '.join(names)} are not plain arrays")
    arrays = {name: np.concatenate([getattr(e, name) for e in episodes]) for name in names}
    return arrays | {"episode_lengths": np.array([len(e.terminations) for e in episodes]),
                     "env_id": np.array(dataset.env_spec.id if dataset.env_spec else "unknown")}


def demonstrations_path(args: Args) -> str:
    """`--demos`, or the bundled file beside this script. Raises BadInput if there is neither."""
    if args.demos is not None:
        return args.demos
    name = args.env_id.replace("/", "-")
    if args.env_id == "PointMaze-v0":
        name += "-left" * (args.barrier == "left") + "-random-start" * args.random_start
    path = Path(__file__).resolve().parent / "demos" / f"{name}.npz"
    check(os.path.isfile(path), f"--demos: none bundled for {name} ({path} is not there), so give an .npz file with "
          "observations, terminations, truncations, episode_lengths and env_id, or a Minari dataset id")
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


def check_demonstrations(where: str, data: dict[str, np.ndarray], args: Args) -> None:
    """Episode lengths, ends and environment as the format has them. Raises BadInput."""
    lengths, ends = data["episode_lengths"], data["terminations"]
    check(lengths.ndim == 1 and lengths.dtype.kind in "iu" and (lengths > 0).all(),
          f"{where}: episode_lengths of {lengths.dtype} and shape {lengths.shape}, with values {np.unique(lengths)[:5]}, "
          "expected positive integers")
    check(len(lengths) > 0, f"{where}: it holds no episodes")
    check(ends.ndim > 0 and (lengths <= len(ends)).all(),
          f"{where}: episode_lengths up to {lengths.max()}, and {'dones' if 'dones' in data else 'terminations'} of shape "
          f"{ends.shape}")
    lengths = data["episode_lengths"] = lengths.astype(np.int64)
    for name in ("dones", "terminations", "truncations", "rewards"):
        if name in data:
            check(data[name].shape[:1] == (lengths.sum(),), f"{where}: {name} of shape {data[name].shape}, expected "
                  f"{lengths.sum()}, the sum of episode_lengths")
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


def load_demonstrations(args: Args, obs_shape: tuple[int, ...], device) -> Demonstrations:
    """The drawn trajectories' transitions, checked and on the device. `actions` is not opened.

    Raises:
        BadInput: whatever is wrong with the file, in the fields that are read.
    """
    names = ["observations", "terminations", "truncations", "episode_lengths", "env_id"]
    where, data = read_demonstrations(args, names)
    check_demonstrations(where, data, args)
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
    first_step = (np.cumsum(lengths) - lengths)[chosen]
    first_obs = first_step + chosen  # an episode has one observation more than steps
    row, step = first_obs[place] + t, first_step[place] + t
    returns = np.nan
    if "rewards" in data:
        rewards = data["rewards"].astype(np.float64)  # whatever they are stored in
        returns = [rewards[i : i + length].sum() for i, length in zip(first_step, lengths[chosen])]

    def tensor(x, dtype=torch.float32):
        return torch.as_tensor(x, dtype=dtype, device=device)

    transitions = States(tensor(obs[row]), tensor(obs[row + 1]), tensor(data["terminations"][step].astype(np.float32)))
    print(f"loaded {len(chosen)} of {len(lengths)} episodes, {len(t)} of their {lengths[chosen].sum()} transitions, "
          f"expert return {np.mean(returns):.1f} ± {np.std(returns):.1f}, device {device}", flush=True)
    return Demonstrations(transitions, tensor(obs[first_obs]), float(np.mean(returns)))


def draw(demos: Demonstrations, n: int) -> States:
    """`n` transitions drawn with replacement, on their device."""
    terminated = demos.transitions.terminated
    index = torch.randint(len(terminated), (n,), device=terminated.device)
    return States(*(field.index_select(0, index) for field in demos.transitions))


def mirrored(x: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """The image of `x` `[N, n]` in the mirror: its entries in this order and with these signs (MIRROR)."""
    index = torch.tensor(order, device=x.device)
    return x[:, index.abs() - 1] * index.sign()


def add_images(demos: Demonstrations, name: str) -> Demonstrations:
    """The demonstrations of environment `name` and, behind them, their mirror images: an expert could have shown those.
    Without images, and with a warning, where the sizes are not those in MIRROR.

    DEVIATION: the paper has what was recorded alone.

    Raises:
        BadInput: MIRROR has no such environment.
    """
    check(name in MIRROR, f"--mirror: {name} is not known to look the same in a mirror, only {', '.join(MIRROR)}")
    obs_order = MIRROR[name]
    obs, next_obs, terminated = demos.transitions
    if obs.shape[1:] != (len(obs_order),):
        print(f"warning: no mirror images: an observation has shape {tuple(obs.shape[1:])}, {name}'s ({len(obs_order)},)",
              file=sys.stderr)
        return demos
    images = States(mirrored(obs, obs_order), mirrored(next_obs, obs_order), terminated)
    print(f"and their mirror images, {2 * len(obs)} transitions in all (--mirror)", flush=True)
    return demos._replace(transitions=States(*map(torch.cat, zip(demos.transitions, images))),
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
def implied_reward(critic, policy, obs, action, next_obs, terminated, gamma: float, temperature: float):
    """The reward that Q implies, r = Q(s,a) − γ(1−d)·V(s') (Eq. 11), `[B]`; actions in the environment's units. With
    continuous actions V(s') is a sample of one action."""
    q = critic(obs, policy.from_env(action))
    return q - gamma * (1 - terminated.float()) * policy.value(critic, next_obs, temperature)


def state_reward(reward: QNetwork, policy, obs: torch.Tensor, temperature: float) -> torch.Tensor:
    """A reward of the state alone, r(s) = E_{a ~ π(·|s)} E_{s' ~ P(·|s,a)}[Q(s,a) − γ(1−d)·V(s')] (§5.4), `[B]`.

    The implied reward belongs to a transition (s, a, s'). Two expectations leave the state alone: over s', by the network
    `reward`, the least-squares fit of r on (s, a), which is E[r|s,a] on the agent's rows, whichever policy played, and on
    the expert's where (s, s') tells the action; and over a, by the policy. So it needs neither an action, nor a next state,
    nor the environment.
    """
    with torch.no_grad():
        return policy.marginal(reward, obs, temperature)


def name_actions(missing_action: str, policy, idm, expert: States, played: Batch, temperature: float) -> torch.Tensor:
    """An action for each expert row, without gradient: what stands for the a of E_expert[φ(Q(s,a) − γV(s'))].

    idm: a ~ p(a|s,s'), which is Eq. 9 with estimated actions, right where (s, s') tells the action.
    policy: a ~ π(·|s), §5.4 literally but for s', which is the expert's and does not follow a: biased until π matches.
    replay: actions of the agent's own rows, drawn without regard to s: for comparison alone.
    """
    with torch.no_grad():
        if missing_action == "idm":
            return idm.sample(expert.obs, expert.next_obs)
        if missing_action == "policy":
            return policy.sample(expert.obs, temperature)
        return played.action[torch.randint(len(played.action), expert.terminated.shape, device=expert.obs.device)]


def iq_loss(critic, target, policy, batch: Batch, n_expert: int, initial_obs: torch.Tensor, args: Args):
    """The critic's IQ-Learn loss, to be minimised: −E_expert[r] + value term + E[r²]/(4α), Eq. 9 to 11 and §5.1 to 5.4.

    Args:
        batch: `[B]` rows, the first `n_expert` of them the expert's with the actions of `name_actions`, the others the
            policy's.
        initial_obs: `[M, *obs_shape]` states where episodes start, for `--value-loss v0`.

    Returns:
        The loss, and what is logged: tensors whose mean is taken where it is reported.
    """
    obs, action, next_obs, terminated = batch
    γ, τ, α = args.gamma, args.temperature, args.chi2_alpha
    assert obs.shape == next_obs.shape and len(action) == len(obs) and terminated.shape == (len(obs),)
    if target is None:  # one pass for s and s'; V(s') carries gradient, as the paper has it without a target network
        q, V = policy.q_and_value(critic, torch.cat([obs, next_obs]), action, τ)
        V, next_V = V.chunk(2)
    else:
        with torch.no_grad():
            next_V = policy.value(target, next_obs, τ)
            if args.bound_targets and args.chi2_rows == "both":  # DEVIATION: |r| ≤ about 4α, so |V| ≤ this, but for entropy
                next_V = next_V.clamp(-4 * α / (1 - γ), 4 * α / (1 - γ))
        q, V = policy.q_and_value(critic, obs, action, τ)
    next_V = (1 - terminated) * next_V
    # DEVIATION: φ acts on one sampled s', which adds γ²·Var V(s')/(4α) to the loss where dynamics are random.
    r = q - γ * next_V
    r_expert, r_policy = r[:n_expert], r[n_expert:]

    terms = {"expert_term": -r_expert.mean()}  # χ²: φ(r) = r − r²/(4α), its second part is the last term
    if args.value_loss == "value":  # telescoped over the mixture of both occupancies, §5.1
        terms["value_term"] = (V - γ * next_V).mean()
    elif args.value_loss == "value_expert":  # telescoped over the expert's occupancy
        terms["value_term"] = (V - γ * next_V)[:n_expert].mean()
    elif args.value_loss == "v0":  # not telescoped: (1 − γ)·E_ρ0[V(s0)]
        terms["value_term"] = (1 - γ) * policy.value(critic, initial_obs, τ).mean()
    else:  # v0_expert: with χ² on both halves it leaves r > 0 on expert rows, a bonus for surviving
        terms["value_term"] = (1 - γ) * V[:n_expert].mean()
    rows = r_expert if args.chi2_rows == "expert" else r
    terms["chi2_term"] = (rows**2).mean() / (4 * α)
    loss = sum(terms.values())
    return loss, {"loss": loss, **terms, "value": V, "reward_expert": r_expert, "reward_policy": r_policy}


def actor_loss(critic, policy: TanhGaussian, obs: torch.Tensor, temperature: float):
    """E[τ log π(ã|s) − Q(s,ã)], to be minimised over expert and policy states (§4.4 and Algorithm 1 print the opposite
    sign: there it is to be maximised), and its terms."""
    action, log_prob = policy.sample_with_log(obs)
    loss = (temperature * log_prob - critic(obs, action)).mean()
    return loss, {"actor_loss": loss, "entropy": -log_prob.mean()}


def idm_loss(idm: InverseDynamics, played: Batch):
    """−E_policy[log p(a|s,s')] on the agent's own rows, and the log-likelihood."""
    log_prob = idm.log_prob(played.obs, played.action, played.next_obs).mean()
    return -log_prob, {"idm_log_likelihood": log_prob}


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


class Model(NamedTuple):
    """What a model.pt holds, ready to act and to give rewards."""

    policy: Softmax | TanhGaussian
    critic: QNetwork
    reward: QNetwork  # for `state_reward`
    saved: dict  # γ, temperature, environment, ...


def load_model(path: str, device="cpu") -> Model:
    """The networks of a model.pt.

    Raises:
        BadInput: no such file, or not a model of this script.
    """
    check(os.path.isfile(path), f"{path}: no such file")
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        check(saved["script"] == SCRIPT, f"{path}: a model of {saved['script']}.py: play it with that script")
        critic, reward = (QNetwork(**saved["critic_sizes"]).to(device) for _ in range(2))
        critic.load_state_dict(saved["critic"])
        reward.load_state_dict(saved["reward"])
        policy = TanhGaussian(**saved["actor_sizes"]).to(device) if saved["actor_sizes"] else Softmax(deepcopy(critic))
        policy.load_state_dict(saved["policy"])
    except (*UNREADABLE, LookupError, TypeError, pickle.UnpicklingError) as error:
        raise BadInput(f"{path}: not a model of {SCRIPT}.py ({type(error).__name__})") from None
    return Model(policy, critic, reward, saved)


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
        parameters = [*self.parts["policy"].parameters(), *self.parts["critic"].parameters()]
        if not all(bool(torch.isfinite(x).all()) for x in (*self.terms.values(), *parameters, *more)):
            print(f"{SCRIPT}.py: training is not finite after {self.updates} updates; a smaller --critic-lr, "
                  f"--actor-lr or --idm-lr helps; the last checkpoint in {self.dir}, if any, is kept", file=sys.stderr)
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


def blurred(batch: Batch, noise: float) -> Batch:
    """With Gaussian noise on its observations, so that the implied reward varies slowly with the state (DEVIATION: the paper
    has none)."""
    if not noise:
        return batch
    return batch._replace(obs=batch.obs + noise * torch.randn_like(batch.obs),
                          next_obs=batch.next_obs + noise * torch.randn_like(batch.obs))


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


def make_update(critic, target, policy, average, average_critic, idm, optimizers, n_expert: int, args: Args):
    """One gradient step of each network as a function of tensors alone."""
    critic_optimizer, actor_optimizer, idm_optimizer = optimizers
    polyak = ((target, critic, args.target_rate), (average, policy, args.average_rate),
              (average_critic, critic, args.average_rate))
    moves = [(mean, parameter, rate) for follower, leader, rate in polyak if follower is not None
             for mean, parameter in zip(follower.parameters(), leader.parameters())]
    averages = [list(column) for column in zip(*moves)]  # means, parameters, rates: one call for all costs least

    def named(expert: States, played: Batch) -> Batch:  # expert rows first
        action = name_actions(args.missing_action, policy, idm, expert, played, args.temperature)
        expert = Batch(expert.obs, action, expert.next_obs, expert.terminated)
        return blurred(Batch(*(torch.cat(rows) for rows in zip(expert, played))), args.obs_noise)

    if args.compile:
        named = torch.compile(named)
    idm_gradient = idm and make_gradient(lambda played: idm_loss(idm, played), list(idm.parameters()), args.compile)
    critic_gradient = make_gradient(
        lambda batch, initial_obs: iq_loss(critic, target, policy, batch, n_expert, initial_obs, args),
        list(critic.parameters()), args.compile)
    actor_gradient = actor_optimizer and make_gradient(
        lambda obs: actor_loss(critic, policy, obs, args.temperature), list(policy.parameters()), args.compile)

    def descend(optimizer, gradient, *tensors) -> dict[str, torch.Tensor]:
        terms = gradient(*tensors)
        optimizer.step()
        return terms

    def update(expert: States, played: Batch, initial_obs: torch.Tensor) -> dict[str, torch.Tensor]:
        if args.obs_noise and args.value_loss == "v0":  # the only form that reads them
            initial_obs = initial_obs + args.obs_noise * torch.randn_like(initial_obs)
        terms = descend(idm_optimizer, idm_gradient, played) if idm else {}
        batch = named(expert, played)
        terms = descend(critic_optimizer, critic_gradient, batch, initial_obs) | terms
        if actor_optimizer:  # through the critic, not into it
            terms |= descend(actor_optimizer, actor_gradient, batch.obs)
        if averages:
            with torch.no_grad():
                torch._foreach_lerp_(*averages)
        return terms

    return update


def fit_reward(critic, policy, idm, demos: Demonstrations, replay: Replay, args: Args, stop: "Run") -> QNetwork:
    """The network behind `state_reward`: the least-squares fit of the implied reward on (s, a), over the agent's own
    transitions and, with inverse dynamics, the expert's; not to the end when a signal comes."""
    reward = deepcopy(critic)
    optimizer = torch.optim.Adam(reward.parameters(), lr=1e-3, fused=True)
    for update in range(args.reward_updates):
        if stop.signum:
            break
        for group in optimizer.param_groups:  # to zero, so that the last rows do not count for more
            group["lr"] = 1e-3 * (1 - update / args.reward_updates)
        expert, played = draw(demos, args.batch_size), Batch(*replay.sample(args.batch_size))
        if idm is not None:  # else the actions are not those that led to the expert's s'
            action = name_actions(args.missing_action, policy, idm, expert, played, args.temperature)
            named = Batch(expert.obs, action, expert.next_obs, expert.terminated)
            played = Batch(*(torch.cat(rows) for rows in zip(named, played)))
        obs, action, next_obs, terminated = blurred(played, args.obs_noise)
        with torch.no_grad():
            r = critic(obs, action) - args.gamma * (1 - terminated) * policy.value(critic, next_obs, args.temperature)
        optimizer.zero_grad(set_to_none=True)
        F.mse_loss(reward(obs, action), r).backward()
        optimizer.step()
    return reward


def train(args: Args) -> Path:
    """Train from observations and the agent's own play; returns the run directory. `Args()` are the plain defaults,
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
    if args.eval_every and envs.envs[0].spec.max_episode_steps is None and args.env_id != "PointMaze-v0":
        print(f"warning: {args.env_id} is registered without max_episode_steps: an evaluation lasts until each of its "
              "episodes ends", file=sys.stderr)
    if args.capture_video:
        make_envs(args, 1, "rgb_array").close()
    obs_shape, action_space = envs.single_observation_space.shape, envs.single_action_space
    discrete = isinstance(action_space, gym.spaces.Discrete)
    num_actions = int(action_space.n) if discrete else len(action_space.low)
    for name in MAZE_SWITCHES:
        check(args.env_id == "PointMaze-v0" or getattr(args, name) == getattr(Args(), name),
              f"--{name.replace('_', '-')}: it is for PointMaze-v0, not {args.env_id}")
    demos = load_demonstrations(args, obs_shape, device)
    if args.mirror:
        demos = add_images(demos, env_name(args.env_id))
    check(args.obs_dims <= np.prod(obs_shape),
          f"--obs-dims {args.obs_dims}: an observation has shape {obs_shape}; give --obs-dims 0 for all of it")
    if discrete and args.actor_lr != Args().actor_lr:
        print("warning: --actor-lr does nothing with discrete actions: their policy is the critic's", file=sys.stderr)
    limit = 10.0 if args.standardize_obs else np.inf  # in deviations; raw observations are not clipped
    size = (obs_shape, num_actions, discrete, args.hidden_size)
    critic = QNetwork(*size, args.layer_norm, limit).to(device)
    policy = Softmax(critic) if discrete else TanhGaussian(
        obs_shape, action_space.low.tolist(), action_space.high.tolist(), args.hidden_size, limit).to(device)
    # DEVIATION: the paper has no model of the missing actions.
    idm = InverseDynamics(*size).to(device) if args.missing_action == "idm" else None
    obs, next_obs, _ = demos.transitions
    statistics = [(idm.standardize_change, next_obs - obs), (idm.standardize, obs)] if idm else []
    if args.standardize_obs:  # DEVIATION: the paper has raw observations
        statistics += [(network.standardize, obs) for network in ((critic,) if discrete else (critic, policy))]
    std = deviation(obs, args.obs_dims or None) if idm or args.standardize_obs else None
    for standardize, x in statistics:
        standardize.mean.copy_(x.mean(0))
        standardize.std.copy_(std if x is obs else x.std(0, correction=0).clamp(min=1e-4))
    if args.obs_dims:  # DEVIATION: the others, divided by infinity, enter as 0
        print(f"the networks see the first {args.obs_dims} entries of an observation (--obs-dims)", flush=True)
        for module in nn.ModuleList(filter(None, (critic, policy, idm))).modules():
            if isinstance(module, Standardize):
                module.std.view(-1)[args.obs_dims :] = np.inf
    target = deepcopy(critic) if args.target_rate else None
    average = deepcopy(policy) if args.average_rate else None  # DEVIATION: the paper has the last iterate
    average_critic = deepcopy(critic) if args.average_rate else None
    acting, judging = average or policy, average_critic or critic  # what is evaluated and saved
    learned = {"critic": critic, "actor": None if discrete else policy, "idm": idm}
    learning_rates = {"critic": args.critic_lr, "actor": args.actor_lr, "idm": args.idm_lr}
    # The rates are tensors, which annealing writes into.
    optimizers = {name: network and torch.optim.Adam(network.parameters(), torch.tensor(learning_rates[name], device=device),
                                                     fused=True) for name, network in learned.items()}
    total, n = args.total_timesteps, args.batch_size
    args = args if args.resume else start_within(args)
    starts = args.learning_starts
    kind = ((), torch.int64) if discrete else (action_space.shape, torch.float32)
    fields = [(obs_shape, torch.float32), kind, (obs_shape, torch.float32), ((), torch.float32)]
    replay = Replay(args.buffer_size if total or args.resume else 1, fields, device)
    initial = Replay(10_000, [(obs_shape, torch.float32)], device)  # states that episodes start from
    initial.add(demos.initial_obs)
    update = make_update(critic, target, policy, average, average_critic, idm, optimizers.values(), n, args)

    parts = {"critic": critic, "target": target, "policy": policy, "average": average, "average_critic": average_critic,
             "idm": idm, "replay": replay, "initial": initial}
    parts |= {f"{name}_optimizer": optimizer for name, optimizer in optimizers.items()}
    run = Run(args, device, demos, parts, acting, 0, total, f"{args.missing_action} {args.env_id}")
    with run, run.bar:
        obs = torch.as_tensor(envs.reset(seed=args.seed + run.step)[0], dtype=torch.float32, device=device)
        if run.step or not args.resume:  # else it is among those of the checkpoint
            initial.add(obs)
        while run.running():
            with torch.no_grad():  # one step in each environment
                action = policy.uniform(args.num_envs) if run.step < starts else policy.sample(obs, args.temperature)
                env_action = policy.to_env(action).cpu().numpy()
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
            obs = torch.as_tensor(next_obs, dtype=torch.float32, device=device)
            run.step += args.num_envs
            if args.anneal_lr:  # DEVIATION: the paper's are constant
                left = max(0.0, 1 - run.step / total)
                for name in ("critic",) if discrete else ("critic", "actor"):
                    optimizers[name].param_groups[0]["lr"].fill_(learning_rates[name] * min(1.0, left / args.anneal_lr))

            due = max(0, run.step - starts) * args.updates_per_step
            while run.updates < int(due):
                run.terms = update(draw(demos, n), Batch(*replay.sample(n)), initial.sample(n)[0])
                run.updates += 1

            run.tick(run.step, args.num_envs)
        run.report(last=True)
        run.save()
        fit = args.save_model and run.updates
        reward = fit_reward(judging, acting, idm, demos, replay, args, run) if fit else judging
        envs.close()
        model = {"policy": acting.state_dict(), "actor_sizes": None if discrete else acting.sizes,
                 "critic": judging.state_dict(), "critic_sizes": judging.sizes, "reward": reward.state_dict()}
        return run.finish(model, envs.metadata.get("render_fps") or 30)


def play(args: Args) -> None:
    """Evaluate a saved model in the environment that it was trained in, and print the final line."""
    check(args.resume is None, "--evaluate: it plays a model, and --resume trains on: give one of them")
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    policy, _, _, saved = load_model(args.evaluate, device)
    check(args.env_id in ("", saved["env_id"]),
          f"--evaluate {args.evaluate}: a model of {saved['env_id']}, and --env-id is {args.env_id}: leave it out")
    for name in MAZE_SWITCHES:
        own, given = saved["args"][name], getattr(args, name)
        check(given == own, f"--{name.replace('_', '-')} {given}: the model in {args.evaluate} was trained with {own}")
    args = replace(args, env_id=saved["env_id"])
    validate(args)
    start, frames, run_dir = time.time(), [] if args.capture_video else None, Path(args.evaluate).resolve().parent
    check(frames is None or os.access(run_dir, os.W_OK), f"--capture-video: {run_dir} cannot be written to")
    returns = evaluate(policy, args, device, None, frames)
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
