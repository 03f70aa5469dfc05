# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0", "gymnasium==1.4.0", "ale-py==0.12.1", "numpy==2.4.6", "tyro==1.0.17",
#   "tqdm==4.70.1", "wandb==0.31.0", "moviepy==2.2.1",
# ]
# ///
"""Inverse soft-Q Learning (IQ-Learn, arXiv:2106.12142): imitation from pixels, on Atari.

One network Q(s, a) over frames is the policy and the reward, r = Q(s,a) − γ V(s'). On the demonstrations first, then
(`--total-timesteps`) with the agent's own play as well, it minimises

    L = −E_expert[r] + E[V(s) − γ V(s')] + E[r²]/(4α)

The game's score is never read in training. The defaults never play: with play in the last third of 6,000 updates 48 games
scored 6.1 / 20.4 / 21.0 on average (tuning seeds 1 to 3), without it 18.3 / 20.8 / 18.5.

    python iq_atari.py --env-id PongNoFrameskip-v4

scores 18.1, 20.6 and 19.1 of 21 in full games (seeds 106 to 108; their 20 demonstrations 19.3) after 12,000 updates, 12 to
19 minutes on one core. Cloning with the same network and updates scores 19.4 ± 1.7.

Departures from the paper are marked DEVIATION where they act. Derived from iq_discrete.py, where the other distances are:
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

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from ale_py import AtariVectorEnv, roms
from gymnasium.vector import AutoresetMode
from tqdm import tqdm

SCRIPT = "iq_atari"
# Mean return of uniformly random actions, 100 games; measured when a game is missing.
RANDOM_RETURN = {"Pong": -20.3}
# Settings that differ per game, by its name without the version; a flag that is given always wins.
SETTINGS: dict[str, dict] = {}


# ----------------------------------------------------------------------------------------------- Args
@dataclass
class Args:
    # The task
    env_id: str = "PongNoFrameskip-v4"  # XNoFrameskip-v4 or ALE/X-v5 of any game that the emulator has
    seed: int = 1  # of everything: demonstrations drawn, network, games
    pretrain_updates: int = 12_000  # updates on demonstrations alone, before any play
    total_timesteps: int = 0  # decisions (4 frames each) of play after that, summed over the environments
    num_envs: int = 8  # games played side by side
    # Demonstrations
    demos: str | None = None  # an .npz file or a Minari dataset id (default: the bundled file)
    num_demos: int = 20  # trajectories, drawn by the seed; 0 for all
    subsample_freq: int = 1  # keep every k-th transition of a trajectory, from a random offset
    dones_are: Literal["terminations", "time-limits"] | None = None  # what `dones` in a file of frames means
    # The objective (the letters of the equations in brackets)
    objective: Literal["iq", "bc"] = "iq"  # IQ-Learn, or behavioural cloning with the same network
    gamma: float = 0.99  # discount [γ]
    temperature: float = 0.001  # entropy temperature of value and policy [τ]; 0 for the hard maximum
    divergence: Literal["chi2"] = "chi2"  # the distance; iq_discrete.py has the others [φ]
    chi2_alpha: float = 0.5  # of the χ² term, E[r²]/(4α) [α]
    chi2_rows: Literal["expert", "both"] = "both"  # rows that the χ² term averages over: expert's, or policy's too
    value_loss: Literal["value", "value_expert", "v0", "v0_expert"] = "value"  # V−γV': all | expert; (1−γ)V: s0 | expert
    target_rate: float = 0.0  # Polyak rate of a target network for V(s'); 0: none, V(s') has gradient
    average_rate: float = 0.001  # rate of a moving average of the weights, evaluated and saved in their place; 0: none
    # The network
    standardize_obs: bool = True  # subtract the demonstrations' mean frame and scale up what is left
    bfloat16: bool = True  # autocast all layers but the last, where the hardware has bfloat16
    # Optimisation
    learning_rate: float = 1e-4  # of Adam
    batch_size: int = 64  # expert rows, and as many policy rows
    buffer_size: int = 200_000  # transitions of the agent's own that are kept
    updates_per_step: float = 0.25  # gradient updates per environment step (bc: as many in all, without play)
    # The run
    eval_every: int = 4_000  # steps (in pretraining: updates) between evaluations; 0: none at all
    eval_episodes: int = 10  # episodes of an evaluation
    out_dir: str = "runs"  # where run directories go
    run_name: str | None = None  # the run's directory (default: environment, script, seed, time)
    track: bool = False  # log to Weights & Biases
    wandb_project_name: str = "iq-learn"  # its project
    wandb_entity: str | None = None  # its team
    capture_video: bool = False  # record the last evaluation's first episode
    save_model: bool = True  # write model.pt
    checkpoint_every: int = 4_000  # steps or updates between checkpoints; 0: only at the end or when stopped
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
    """The game without version, namespace and `NoFrameskip`: `PongNoFrameskip-v4` and `ALE/Pong-v5` give `Pong`."""
    return re.sub(r"(NoFrameskip|Deterministic)?-v\d+$", "", env_id).split("/")[-1]


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
        return tyro.cli(Args, args=argv, default=replace(Args(), **SETTINGS.get(env_name(args.env_id), {})))
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
        "at least 1": (lambda x: x >= 1, "num_envs subsample_freq batch_size buffer_size eval_episodes"),
        "at least 0 and finite": (lambda x: 0 <= x < np.inf, "seed pretrain_updates total_timesteps num_demos "
                       "temperature eval_every checkpoint_every"),
        "at most 2 million (evaluation seeds, 100,000 + 1,000 times it, have 31 bits)": (lambda x: x <= 2_000_000, "seed"),
        "above 0 and finite": (lambda x: 0 < x < np.inf, "learning_rate updates_per_step chi2_alpha"),
        "at least 0 and below 1": (lambda x: 0 <= x < 1, "gamma"),
        "from 0 to 1": (lambda x: 0 <= x <= 1, "target_rate average_rate"),
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
    check(args.buffer_size >= 8 * args.num_envs, f"--buffer-size {args.buffer_size}: expected at least 8 times --num-envs")


def check_compiler(device) -> None:
    """Compile something small: raises BadInput where `torch.compile` cannot work, without a C++ compiler say."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except Exception as error:
        raise BadInput(f"--compile: {str(error).splitlines()[0]}") from None


# ---------------------------------------------------------------------------------------- Environment
def make_envs(args: Args, num_envs: int) -> AtariVectorEnv:
    """Games played together: every 4th frame, the maximum of the last two, 84×84 grey, 4 stacked, up to 30 no-ops and
    FIRE where a game needs it at the start, the full game and its unclipped score, no sticky actions.

    SAME_STEP: the default autoreset would store a fake transition from an episode's end to the next one's start; here
    the true last observation is `info["final_obs"]`.

    Raises:
        BadInput: a game that the emulator does not have.
    """
    no_player_alone = {"combat", "joust", "maze_craze", "warlords"}  # the emulator would end the process
    games = {rom.replace("_", ""): rom for rom in roms.get_all_rom_ids() if rom not in no_player_alone}
    game = games.get(env_name(args.env_id).lower())
    check(game is not None and re.search(r"-v\d+$", args.env_id) is not None,
          f"--env-id {args.env_id}: no such game, expected XNoFrameskip-v4 or ALE/X-v5 with one of the emulator's; "
          "other environments are for iq_discrete.py, with continuous actions iq_continuous.py")
    return AtariVectorEnv(game, num_envs, reward_clipping=False, autoreset_mode=AutoresetMode.SAME_STEP)


# ------------------------------------------------------------------------------------------- Networks
class QNetwork(nn.Module):
    """Q(s, ·) of stacked frames: uint8 `[B, 4, 84, 84]` to `[B, num_actions]` (the network of DQN, Nature 2015).

    With `autocast` all layers but the last run in bfloat16, the convolutions channels last; the head is float32, since Q is
    divided by a small temperature.
    """

    def __init__(self, num_actions: int):
        super().__init__()
        self.sizes = {"num_actions": num_actions}
        self.autocast = False
        self.register_buffer("obs_mean", torch.zeros(84, 84))
        self.register_buffer("obs_std", torch.tensor(255.0))
        self.layers = nn.Sequential(
            orthogonal(nn.Conv2d(4, 32, 8, stride=4)), nn.ReLU(),
            orthogonal(nn.Conv2d(32, 64, 4, stride=2)), nn.ReLU(),
            orthogonal(nn.Conv2d(64, 64, 3, stride=1)), nn.ReLU(),
            nn.Flatten(),
            orthogonal(nn.Linear(64 * 7 * 7, 512)), nn.ReLU(),
        ).to(memory_format=torch.channels_last)
        self.head = orthogonal(nn.Linear(512, num_actions), gain=0.01)

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=self.autocast):
            dtype = torch.bfloat16 if self.autocast else torch.float32
            # In place, and before the layout changes: 3.2 instead of 18.9 ms for 128 stacks in bfloat16.
            obs = obs.to(dtype, copy=True).sub_(self.obs_mean.to(dtype)).div_(self.obs_std.to(dtype))
            features = self.layers(obs.contiguous(memory_format=torch.channels_last))
        return self.head(features.float())


def orthogonal(layer: nn.Module, gain: float = 2**0.5) -> nn.Module:
    """The layer with orthogonal weights and no bias.

    DEVIATION: torch's own initialisation lets the signal fade with depth; this one learns several times faster.
    """
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def has_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 matrices; emulated, they are slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu.get_capabilities().get("avx512_bf16", False) or torch.cpu.get_capabilities().get("amx_bf16", False)


# --------------------------------------------------------------------------- Demonstrations and replay
class Batch(NamedTuple):
    """Transitions; the environment's reward is not among them."""

    obs: torch.Tensor  # [B, 4, 84, 84] uint8
    action: torch.Tensor  # [B] int64
    next_obs: torch.Tensor  # [B, 4, 84, 84] uint8, at an episode's end the true last observation
    terminated: torch.Tensor  # [B] float32, 1 where the episode ended by itself, not by a time limit


class Demonstrations(NamedTuple):
    """The expert's frames and transitions on the device, and what is reported of them."""

    frames: torch.Tensor  # [1, F, 84, 84] uint8, T + 1 of each episode: 7,056 bytes a transition
    position: torch.Tensor  # [N] int64, the frame that a transition starts from
    age: torch.Tensor  # [N] int64, decisions since the episode's start
    action: torch.Tensor  # [N] int64
    terminated: torch.Tensor  # [N] float32
    initial_obs: torch.Tensor  # [episodes, 4, 84, 84], each trajectory's first state, kept before subsampling
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
    game = env_name(args.env_id)  # one file serves both spellings of a game
    path = Path(__file__).resolve().parent / "demos" / f"{game}NoFrameskip-v4.npz"
    check(os.path.isfile(path), f"--demos: none bundled for {name} ({path} is not there), so give an .npz file with "
          "seeds, actions, episode_lengths, returns and env_id (or uint8 observations [N, 84, 84], actions, terminations, "
          "truncations, episode_lengths and env_id), or a Minari dataset id")
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


OTHER_RECORDING = ("its seeds, actions, episode_lengths and returns are not of one recording with AtariVectorEnv(game, n, "
                   "reward_clipping=False) and its other defaults, or this emulator differs (bundled files: ale-py 0.12.1)")


def simulate(where: str, args: Args, data: dict[str, np.ndarray], chosen: np.ndarray):
    """Play recorded actions again, all the chosen episodes side by side, and verify that they end when and with the
    return that was recorded.

    Returns:
        frames uint8 `[Σ(T+1), 84, 84]`, episodes one after another, and terminations bool `[ΣT]`.

    Raises:
        BadInput: the emulator does something else than when it was recorded.
    """
    lengths = data["episode_lengths"][chosen]
    first = np.cumsum(data["episode_lengths"]) - data["episode_lengths"]
    actions = np.zeros((lengths.max(), len(chosen)), np.int64)
    for column, episode in enumerate(chosen):
        actions[: lengths[column], column] = data["actions"][first[episode] : first[episode] + lengths[column]]
    start = np.cumsum(lengths + 1) - (lengths + 1)
    frames = np.empty(((lengths + 1).sum(), 84, 84), np.uint8)
    terminations, returns = np.zeros(lengths.sum(), bool), np.zeros(len(chosen))
    envs = make_envs(args, len(chosen))
    obs, _ = envs.reset(seed=data["seeds"][chosen].astype(np.int64))
    frames[start] = obs[:, -1]
    for t in tqdm(range(lengths.max()), desc="replaying demonstrations", unit="decision", disable=None):
        obs, reward, terminated, truncated, info = envs.step(actions[t])
        running, ends = t < lengths, t + 1 == lengths
        check(not (running & ((terminated | truncated) != ends)).any(), f"{where}: an episode did not end when recorded: "
              + OTHER_RECORDING)
        returns += np.where(running, reward, 0)
        frames[start[running] + t + 1] = obs[running, -1]
        if ends.any():  # obs is the next episode's first there
            frames[start[ends] + t + 1] = info["final_obs"][ends, -1]
            terminations[np.cumsum(lengths)[ends] - 1] = terminated[ends]
    envs.close()
    recorded = data["returns"][chosen]
    check((returns == recorded).all(), f"{where}: replayed returns {returns.tolist()}, recorded {recorded.tolist()}: "
          + OTHER_RECORDING)
    return frames, terminations


def load_demonstrations(args: Args, num_actions: int, device) -> Demonstrations:
    """The drawn trajectories' frames and transitions, checked and on the device.

    Raises:
        BadInput: whatever is wrong with the file, in the fields that are read.
    """
    where, data = read_demonstrations(
        args, ["observations", "actions", "terminations", "truncations", "episode_lengths", "env_id"],
        ["seeds", "actions", "episode_lengths", "returns", "env_id"],
    )
    check_demonstrations(where, data, args, num_actions)
    lengths = data["episode_lengths"]
    chosen, place, t = choose_transitions(args, lengths)
    first_action = np.cumsum(lengths) - lengths
    if "observations" in data:
        frames = data["observations"]
        check(frames.dtype == np.uint8 and frames.shape == ((lengths + 1).sum(), 84, 84), f"{where}: observations are "
              f"{frames.dtype} of shape {frames.shape}, expected uint8 of shape ({(lengths + 1).sum()}, 84, 84)")
        first = first_action + np.arange(len(lengths))  # an episode has one frame more than actions
        frames = np.concatenate([frames[first[i] : first[i] + lengths[i] + 1] for i in chosen])
        terminations = data["terminations"][first_action[chosen][place] + t]
        rewards = data.get("rewards", np.full(lengths.sum(), np.nan)).astype(np.float64)
        returns = np.add.reduceat(rewards, first_action)[chosen]
    else:
        for name, kind in (("seeds", "iu"), ("returns", "iuf")):
            check(data[name].shape == lengths.shape and data[name].dtype.kind in kind,
                  f"{where}: {name} of {data[name].dtype} and shape {data[name].shape}, expected "
                  f"{'integers' if kind == 'iu' else 'numbers'}, one for each of the {len(lengths)} episodes")
        check((data["seeds"] >= 0).all() and (data["seeds"] < 2**31).all(),
              f"{where}: seeds from {data['seeds'].min()} to {data['seeds'].max()}, expected 0 to 2^31 - 1")
        frames, terminations = simulate(where, args, data, chosen)
        terminations = terminations[(np.cumsum(lengths[chosen]) - lengths[chosen])[place] + t]
        returns = data["returns"][chosen]

    def tensor(x, dtype=torch.int64):
        return torch.as_tensor(x, dtype=dtype, device=device)

    first_frame = np.cumsum(lengths[chosen] + 1) - (lengths[chosen] + 1)
    initial_obs = np.zeros((len(chosen), 4, 84, 84), np.uint8)
    initial_obs[:, -1] = frames[first_frame]
    actions = data["actions"][first_action[chosen][place] + t].astype(np.int64)
    print(f"loaded {len(chosen)} of {len(lengths)} episodes, {len(t)} of their {lengths[chosen].sum()} transitions, "
          f"expert return {np.mean(returns):.1f} ± {np.std(returns):.1f}, device {device}", flush=True)
    return Demonstrations(tensor(frames, torch.uint8)[None], tensor(first_frame[place] + t), tensor(t), tensor(actions),
                          tensor(terminations.astype(np.float32), torch.float32), tensor(initial_obs, torch.uint8),
                          float(np.mean(returns)))


def stack_frames(frames: torch.Tensor, ring, position: torch.Tensor, age: torch.Tensor) -> torch.Tensor:
    """Frames `position`−3 to `position`+1 of a ring, uint8 `[n, 5, 84, 84]`: the first four are s, the last four s'.

    What lies before the episode's start, `age` decisions ago, is zero, as in the emulator's first observation.
    """
    offset = torch.arange(-3, 2, device=frames.device)
    row = ring * frames.shape[1] + (position[:, None] + offset) % frames.shape[1]
    stacks = frames.flatten(0, 1).index_select(0, row.flatten()).view(*row.shape, 84, 84)
    return stacks.mul_((offset >= -age[:, None]).byte()[..., None, None])


def draw(demos: Demonstrations, n: int) -> Batch:
    """`n` transitions drawn with replacement, on their device."""
    index = torch.randint(len(demos.action), (n,), device=demos.action.device)
    stacks = stack_frames(demos.frames, 0, demos.position[index], demos.age[index])
    return Batch(stacks[:, :4], demos.action[index], stacks[:, 1:], demos.terminated[index])


class Replay:
    """The agent's own play on the device, a ring of single frames for each environment: 7,069 bytes a transition.

    The last frame of an episode is stored too, as the true next observation; it starts no transition (action −1).
    """

    def __init__(self, size: int, num_envs: int, device):
        shape = (num_envs, size // num_envs)
        try:
            self.frames = torch.zeros(*shape, 84, 84, dtype=torch.uint8, device=device)
        except RuntimeError as error:
            raise BadInput(f"--buffer-size {size}: {str(error).splitlines()[0]}") from None
        self.action = torch.full(shape, -1, dtype=torch.int64, device=device)
        self.terminated = torch.zeros(shape, device=device)
        self.age = torch.zeros(shape, dtype=torch.uint8, device=device)  # up to 3: what stacking needs
        self.written = torch.zeros(num_envs, dtype=torch.int64, device=device)  # frames, the overwritten included
        self.rings = torch.arange(num_envs, device=device)

    def start(self, rings: torch.Tensor, frame: torch.Tensor) -> None:
        """Write the first frames `[n, 84, 84]` of episodes in those rings, over those from which nothing was played."""
        last = (self.written[rings] - 1) % self.frames.shape[1]
        self.written[rings] -= ((self.written[rings] > 0) & (self.age[rings, last] == 0)).long()
        slot = self.written[rings] % self.frames.shape[1]
        self.frames[rings, slot], self.action[rings, slot], self.age[rings, slot] = frame, -1, 0
        self.written[rings] += 1

    def add(self, action: torch.Tensor, next_frame: torch.Tensor, terminated: torch.Tensor) -> None:
        """Write one transition of each environment, `[num_envs]`, from the frame that was written last."""
        slot = (self.written - 1) % self.frames.shape[1]
        next_slot = self.written % self.frames.shape[1]
        self.action[self.rings, slot], self.terminated[self.rings, slot] = action, terminated
        self.frames[self.rings, next_slot], self.action[self.rings, next_slot] = next_frame, -1
        self.age[self.rings, next_slot] = (self.age[self.rings, slot] + 1).clamp(max=3)
        self.written += 1

    def sample(self, n: int) -> Batch:
        """`n` transitions drawn with replacement from those whose five frames are still there.

        2n places are drawn and the first n that start a transition are taken, again where they are fewer: only an episode's
        last frame, and that where a run was stopped, starts none.
        """
        ring = torch.randint(len(self.rings), (2 * n,), device=self.frames.device)
        written, capacity = self.written[ring], self.frames.shape[1]
        places = torch.where(written <= capacity, written - 1, capacity - 4)  # once full, the oldest lack their past
        back = 2 + (torch.rand(2 * n, device=ring.device) * places).long().clamp(max=places - 1)
        position = (written - back) % capacity
        ends = self.action[ring, position] < 0
        first = torch.arange(n, device=ring.device) % (~ends).sum().clamp(min=1)
        order = ends.to(torch.uint8).argsort(stable=True)[first]
        ring, position = ring[order], position[order]
        stacks = stack_frames(self.frames, ring[:, None], position, self.age[ring, position].long())
        return Batch(stacks[:, :4], self.action[ring, position], stacks[:, 1:], self.terminated[ring, position])

    def state_dict(self) -> dict:
        filled = min(int(self.written.max()), self.frames.shape[1])
        return {"written": self.written} | {name: getattr(self, name)[:, :filled].clone()
                                            for name in ("frames", "action", "terminated", "age")}

    def load_state_dict(self, state: dict) -> None:
        self.written.copy_(state["written"])
        for name in ("frames", "action", "terminated", "age"):
            getattr(self, name)[:, : state[name].shape[1]] = state[name]


# --------------------------------------------------------------------------------------- IQ objective
def soft_value(q: torch.Tensor, temperature: float) -> torch.Tensor:
    """V(s) = τ·logsumexp_a(Q(s,a)/τ) `[B]` of Q(s,·) `[B, A]`; at τ = 0 the maximum (paper, §3 and Eq. 10)."""
    if temperature == 0:
        return q.max(dim=-1).values
    return temperature * torch.logsumexp(q / temperature, dim=-1)


def implied_reward(network: nn.Module, obs, action, next_obs, terminated, gamma: float, temperature: float):
    """The reward that Q implies, r = Q(s,a) − γ(1−d)·V(s') (Eq. 11), `[B]` for transitions as in `Batch`."""
    q = network(obs).gather(1, action[:, None]).squeeze(1)
    return q - gamma * (1 - terminated.float()) * soft_value(network(next_obs), temperature)


def iq_loss(network, target, batch: Batch, n_expert: int, initial_obs: torch.Tensor, args: Args):
    """The IQ-Learn loss, to be minimised: −E_expert[r] + value term + E[r²]/(4α), Eq. 9 to 11 and §5.1 to 5.3.

    Args:
        batch: `[B]` rows, the first `n_expert` of them the expert's, the others the policy's.
        initial_obs: `[M, 4, 84, 84]` states where episodes start, for `--value-loss v0`.

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
    next_V = (1 - terminated) * next_V
    # DEVIATION: φ acts on one sampled s', which adds γ²·Var V(s')/(4α) to the loss where dynamics are random.
    r = q.gather(1, action[:, None]).squeeze(1) - γ * next_V
    r_expert, r_policy = r[:n_expert], r[n_expert:]

    terms = {"expert_term": -r_expert.mean()}  # χ²: φ(r) = r − r²/(4α), its second part is the last term
    if args.value_loss == "value":  # telescoped over the mixture of both occupancies, §5.1
        terms["value_term"] = (V - γ * next_V).mean()
    elif args.value_loss == "value_expert":  # telescoped over the expert's occupancy
        terms["value_term"] = (V - γ * next_V)[:n_expert].mean()
    elif args.value_loss == "v0":  # not telescoped: (1 − γ)·E_ρ0[V(s0)]
        terms["value_term"] = (1 - γ) * soft_value(network(initial_obs), τ).mean()
    else:  # v0_expert
        terms["value_term"] = (1 - γ) * V[:n_expert].mean()
    rows = r_expert if args.chi2_rows == "expert" else r
    terms["chi2_term"] = (rows**2).mean() / (4 * args.chi2_alpha)
    loss = sum(terms.values())
    logged = {"loss": loss, **terms, "value": V, "reward_expert": r_expert}
    if len(r_policy):
        logged["reward_policy"] = r_policy
    return loss, logged


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
    uniformly random actions. Grey frames of the first episode, `[84, 84]`, are appended to `frames`.

    Returns:
        float64 `[episodes]` in the environment's own reward, or None when a signal stopped it.
    """
    n = args.eval_episodes
    envs = make_envs(args, n)
    seed = 100_000 + 1_000 * args.seed if network is not None else 0  # far from the training environments' seeds
    obs, _ = envs.reset(seed=seed)
    envs.action_space.seed(seed)
    returns, running = np.zeros(n), np.ones(n, bool)
    while running.any() and not (stop and stop.signum):
        if frames is not None and running[0]:
            frames.append(obs[0, -1].copy())
        if network is None:
            action = envs.action_space.sample()
        else:
            with torch.no_grad():
                action = network(torch.as_tensor(obs, device=device)).argmax(1).cpu().numpy()
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
    """Write grey frames `[84, 84]` uint8 as an mp4 file, four times as large; one after another, since a game can have
    many thousands."""
    from moviepy import VideoClip

    def enlarged(seconds: float) -> np.ndarray:
        frame = frames[min(round(seconds * fps), len(frames) - 1)]
        return frame[..., None].repeat(3, 2).repeat(4, 0).repeat(4, 1)

    path.parent.mkdir(parents=True, exist_ok=True)
    VideoClip(enlarged, duration=len(frames) / fps).write_videofile(str(path), fps=fps, logger=None)


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

    def loss_of(batch: Batch, initial_obs: torch.Tensor):
        if args.objective == "bc":
            return bc_loss(network, batch)
        return iq_loss(network, target, batch, n_expert, initial_obs, args)

    gradient = make_gradient(loss_of, list(network.parameters()), args.compile)

    def update(batch: Batch, initial_obs: torch.Tensor) -> dict[str, torch.Tensor]:
        terms = gradient(batch, initial_obs)
        optimizer.step()
        if averages:
            with torch.no_grad():
                torch._foreach_lerp_(*averages)
        return terms

    return update


def train(args: Args) -> Path:
    """Train from demonstrations and the agent's own play; returns the run directory.

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
    num_actions = int(envs.single_action_space.n)
    demos = load_demonstrations(args, num_actions, device)
    network = QNetwork(num_actions).to(device)
    if args.standardize_obs:  # DEVIATION: the constant background would drown a ball of two pixels
        sample = demos.frames[0, :: max(1, demos.frames.shape[1] // 2000)].float()
        network.obs_mean.copy_(sample.mean(0))
        network.obs_std.fill_(64.0)  # a quarter of the range: smaller steps of grey count for more
    network.autocast = args.bfloat16 and has_bfloat16(device)
    print(f"network in {'bfloat16' if network.autocast else 'float32'}", flush=True)
    target = deepcopy(network) if args.target_rate else None  # DEVIATION: with discrete actions the paper has none
    average = deepcopy(network) if args.average_rate else None  # DEVIATION: the paper has the last iterate
    policy = average or network  # what is evaluated and saved
    optimizer = torch.optim.Adam(network.parameters(), lr=args.learning_rate, fused=True)
    pretrain, total, n = args.pretrain_updates, args.total_timesteps, args.batch_size
    if args.objective == "bc":  # it reads the demonstrations alone: the same updates, and no play
        pretrain, total = pretrain + int(total * args.updates_per_step), 0
    both = args.value_loss == "value" or args.chi2_rows == "both"  # else play is not trained on
    replay = Replay(args.buffer_size if total or args.resume else 8 * args.num_envs, args.num_envs, device)
    update = make_update(network, target, average, optimizer, n, args)

    parts = {"network": network, "target": target, "average": average, "optimizer": optimizer, "replay": replay}
    run = Run(args, device, demos, parts, policy, pretrain, total, f"{args.objective} {args.env_id}")
    with run, run.bar:
        initial_obs = demos.initial_obs
        obs = torch.as_tensor(envs.reset(seed=args.seed + run.step)[0], device=device)
        if total:
            replay.start(replay.rings, obs[:, -1])
            initial_obs = torch.cat([initial_obs, obs])
        while run.running():
            playing = run.updates >= pretrain
            if playing:  # one step in each environment
                with torch.no_grad():
                    action = sample_action(network, obs, args.temperature)
                next_obs, _, terminated, truncated, info = envs.step(action.cpu().numpy())
                true_next, done = next_obs[:, -1], np.flatnonzero(terminated | truncated)
                if len(done):  # next_obs is the next episode's first observation there
                    true_next = true_next.copy()
                    true_next[done] = info["final_obs"][done, -1]
                replay.add(action, torch.as_tensor(true_next, device=device),
                           torch.as_tensor(terminated, dtype=torch.float32, device=device))
                obs = torch.as_tensor(next_obs, device=device)
                if len(done):
                    done = torch.as_tensor(done, device=device)
                    replay.start(done, obs[done, -1])
                    initial_obs = torch.cat([initial_obs, obs[done]])[-256:]  # a resumed run gathers them anew
                run.step += args.num_envs

            updates_due = pretrain + int(run.step * args.updates_per_step) if playing else run.updates + 1
            while run.updates < updates_due:
                batch = draw(demos, n)
                if playing and both:  # expert rows first
                    batch = Batch(*(torch.cat(rows) for rows in zip(batch, replay.sample(n))))
                starts = torch.randint(len(initial_obs), (n if args.value_loss == "v0" else 0,), device=device)
                run.terms = update(batch, initial_obs[starts])
                run.updates += 1

            run.tick(run.step, args.num_envs) if playing else run.tick(run.updates, 1)
        run.report(last=True)
        run.save()
        envs.close()
        cloned = {"temperature": 1.0} if args.objective == "bc" else {}  # its policy is softmax(Q)
        return run.finish({"network": policy.state_dict(), "sizes": policy.sizes} | cloned, fps=15)


def play(args: Args) -> None:
    """Evaluate a saved model in the environment that it was trained in, and print the final line."""
    check(args.resume is None, "--evaluate: it plays a model, and --resume trains on: give one of them")
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    network, saved = load_model(args.evaluate, device)
    network.autocast = saved["args"]["bfloat16"] and has_bfloat16(device)  # as in training
    check(args.env_id in ("", saved["env_id"]),
          f"--evaluate {args.evaluate}: a model of {saved['env_id']}, and --env-id is {args.env_id}: leave it out")
    args = replace(args, env_id=saved["env_id"])
    validate(args)
    start, frames, run_dir = time.time(), [] if args.capture_video else None, Path(args.evaluate).resolve().parent
    check(frames is None or os.access(run_dir, os.W_OK), f"--capture-video: {run_dir} cannot be written to")
    returns = evaluate(network, args, device, None, frames)
    random = saved["random_return"] if np.isfinite(saved["random_return"]) else random_return(args)
    if frames:
        write_video(frames, 15, run_dir / "videos" / "evaluate.mp4")
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
