"""Bad input is refused in one sentence before training, and good input is read as CONTRACT.md says.

Most cases call `main` in this process; a few run the script as users do.
"""
import io
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from ale_py import AtariVectorEnv
from gymnasium.vector import AutoresetMode

import iq_atari
import iq_continuous
import iq_discrete
import iq_offline

BREAKOUT = "BreakoutNoFrameskip-v4"
ROOT = Path(__file__).resolve().parent.parent
LENGTHS = np.array([7, 5, 3])
STEPS, ROWS = int(LENGTHS.sum()), int((LENGTHS + 1).sum())
TINY = {
    iq_discrete: "--num-demos 0 --total-timesteps 6 --eval-every 0 --batch-size 4 --hidden-size 4 --buffer-size 50 "
                 "--no-cuda --run-name tiny".split(),
    iq_atari: "--num-demos 0 --pretrain-updates 1 --num-envs 1 --eval-every 0 --batch-size 2 --no-cuda "
              "--run-name tiny".split(),
    iq_continuous: "--env-id Pendulum-v1 --num-demos 0 --total-timesteps 20 --eval-every 0 --batch-size 4 --hidden-size 4 "
                   "--buffer-size 50 --no-cuda --run-name tiny".split(),
}


# ---------------------------------------------------------------------------------------------- helpers
def demonstrations(lengths=LENGTHS, env_id="CartPole-v1") -> dict[str, np.ndarray]:
    """CartPole demonstrations whose observations begin with their episode and time; the first episode is cut by a
    time limit, the others end by themselves."""
    lengths = np.asarray(lengths)
    rng = np.random.default_rng(5)
    last = np.cumsum(lengths) - 1
    terminations, truncations = np.zeros((2, lengths.sum()), bool)
    terminations[last[1:]] = truncations[last[:1]] = True
    observations = rng.normal(size=((lengths + 1).sum(), 4)).astype(np.float32)
    observations[:, 0] = np.repeat(np.arange(len(lengths)), lengths + 1)
    observations[:, 1] = np.concatenate([np.arange(length + 1) for length in lengths])
    return {"observations": observations, "actions": rng.integers(2, size=lengths.sum()),
            "terminations": terminations, "truncations": truncations, "episode_lengths": lengths,
            "rewards": np.ones(lengths.sum(), np.float32), "env_id": np.array(env_id)}


def frame_demonstrations() -> dict[str, np.ndarray]:
    """Demonstrations as uint8 frames for Atari."""
    data = demonstrations(env_id="PongNoFrameskip-v4")
    data["observations"] = np.random.default_rng(6).integers(256, size=(ROWS, 84, 84), dtype=np.uint8)
    return data


def continuous_demonstrations() -> dict[str, np.ndarray]:
    """Demonstrations of Pendulum, actions from -2 to 2 in float32."""
    data = demonstrations(env_id="Pendulum-v1")
    actions = np.random.default_rng(7).uniform(-2, 2, (STEPS, 1)).astype(np.float32)
    actions[3], actions[4] = -2, 2  # the bounds themselves are within
    return data | {"observations": data["observations"][:, :3], "actions": actions}


ALL = {iq_discrete: demonstrations, iq_atari: frame_demonstrations, iq_continuous: continuous_demonstrations}


def edited(data: dict, **changes) -> dict:
    """A copy with keys set, or removed where the value is None."""
    return {name: value for name, value in (data | changes).items() if value is not None}


def at(array: np.ndarray, index, value) -> np.ndarray:
    """A copy with one value changed."""
    array = array.copy()
    array[index] = value
    return array


def write(path: Path, data: dict) -> Path:
    np.savez(path, **data)
    return path


class Payload:
    """Unpickling it creates a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything under a folder, to see that nothing was written."""
    return {str(p): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def train(module, tmp_path: Path, *flags, demos=None) -> int:
    """Exit status of a tiny training run in `tmp_path/runs`; flags that come later win."""
    own = ["--demos", str(demos)] if demos is not None else []
    return module.main([*TINY[module], "--out-dir", str(tmp_path / "runs"), *own, *map(str, flags)])


def refused(module, capsys, folder: Path, argv: list, named: str, *found_and_expected: str, path="") -> str:
    """Run `main(argv)` and check the refusal: status 2, one sentence on stderr that names the flag or file, the
    regular expressions in what remains of it without `path`, nothing under `folder` written."""
    before = contents(folder)
    capsys.readouterr()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        status = module.main([str(a) for a in argv])
    err = capsys.readouterr().err
    assert status == 2, f"status {status}, stderr: {err}"
    assert err.startswith(f"{module.SCRIPT}.py: "), err
    assert len(err.strip().splitlines()) == 1 and "Traceback" not in err, err
    assert str(named) in err, f"{named} is not named: {err}"
    rest = err.replace(str(path or named), "")
    for pattern in found_and_expected:
        assert re.search(pattern, rest), f"{pattern!r} is not in: {rest}"
    assert not [w for w in caught if issubclass(w.category, RuntimeWarning)], "numpy's own warning is on stderr too"
    assert contents(folder) == before, "something was written"
    return err


def refused_demos(module, capsys, tmp_path: Path, demos: Path, *found_and_expected: str, flags=()) -> str:
    """A training run is refused for what is in the file."""
    argv = [*TINY[module], "--out-dir", tmp_path / "runs", "--demos", demos, *flags]
    return refused(module, capsys, tmp_path, argv, demos, *found_and_expected)


def load(demos, **fields) -> iq_discrete.Demonstrations:
    """What the loader of iq_discrete.py makes of a file or Minari dataset."""
    args = iq_discrete.Args(demos=str(demos), **({"num_demos": 0} | fields))
    return iq_discrete.load_demonstrations(args, (4,), 2, "cpu")


def load_continuous(demos, low=(-2.0,), high=(2.0,), **fields) -> iq_continuous.Demonstrations:
    args = iq_continuous.Args(demos=str(demos), **({"num_demos": 0, "env_id": "Pendulum-v1"} | fields))
    return iq_continuous.load_demonstrations(args, (3,), iq_continuous.Actor((3,), list(low), list(high)), "cpu")


def load_atari(demos, **fields) -> iq_atari.Demonstrations:
    args = iq_atari.Args(demos=str(demos), **({"num_demos": 0} | fields))
    return iq_atari.load_demonstrations(args, 4 if "Breakout" in args.env_id else 6, "cpu")


def same(a, b) -> None:
    """Nested tuples of tensors and numbers are equal."""
    if isinstance(a, tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            same(x, y)
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    else:
        assert a == b or (np.isnan(a) and np.isnan(b))


@pytest.fixture
def good(tmp_path) -> Path:
    return write(tmp_path / "good.npz", demonstrations())


@pytest.fixture(scope="session")
def games() -> dict[str, np.ndarray]:
    """Two games by random actions, recorded as seeds and actions; `observations` are their frames. Breakout, since
    nothing ends sooner."""
    rng, seeds = np.random.default_rng(0), np.array([3, 4])
    envs = AtariVectorEnv("breakout", 2, reward_clipping=False, autoreset_mode=AutoresetMode.SAME_STEP)
    obs, _ = envs.reset(seed=seeds)
    frames, actions, returns, lengths = [[o[-1]] for o in obs], [[], []], np.zeros(2), np.zeros(2, int)
    while not lengths.all():
        action = rng.integers(4, size=2)
        obs, reward, terminated, truncated, info = envs.step(action)
        for i in np.flatnonzero(lengths == 0):
            done = terminated[i] | truncated[i]
            actions[i].append(action[i])
            frames[i].append((info["final_obs"] if done else obs)[i, -1])
            returns[i] += reward[i]
            if done:
                assert terminated[i]
                lengths[i] = len(actions[i])
    envs.close()
    terminations = np.zeros(lengths.sum(), bool)
    terminations[np.cumsum(lengths) - 1] = True
    return {"seeds": seeds, "actions": np.concatenate(actions), "episode_lengths": lengths, "returns": returns,
            "env_id": np.array(BREAKOUT), "observations": np.concatenate(frames),
            "terminations": terminations, "truncations": np.zeros(lengths.sum(), bool)}


@pytest.fixture(scope="session")
def recording(games) -> dict[str, np.ndarray]:
    return {name: games[name] for name in ("seeds", "actions", "episode_lengths", "returns", "env_id")}


# ------------------------------------------------------------------------------ files that are not good ones
def test_good_file_trains(tmp_path, good, capsys):
    """The control for every refusal below: what they change is what is refused."""
    assert train(iq_discrete, tmp_path, demos=good) == 0
    out, err = capsys.readouterr()
    assert "warning" not in err
    assert "expert=5.0000" in out.splitlines()[-1]  # 15 rewards of 1 in 3 episodes
    assert (tmp_path / "runs/tiny/model.pt").is_file()


@pytest.mark.parametrize("module, kind", [
    *((iq_discrete, kind) for kind in ("missing", "folder", "text", "empty", "npy")), (iq_atari, "missing"),
    (iq_atari, "text"), (iq_continuous, "missing"), (iq_continuous, "text")])
def test_not_an_npz(module, kind, tmp_path, capsys):
    path = tmp_path / "demos.npz"
    if kind == "folder":
        path.mkdir()
    elif kind == "npy":
        with open(path, "wb") as file:
            np.save(file, np.zeros(3))
    elif kind != "missing":
        path.write_text("observations" if kind == "text" else "")
    refused_demos(module, capsys, tmp_path, path, "no such file" if kind in ("missing", "folder") else "npz")


def cut(raw: bytes, kind: str) -> bytes:
    if kind.startswith("cut"):
        return raw[: int(len(raw) * float(kind.split()[1]))]
    middle = len(raw) // 2
    if kind == "hole":
        return raw[: middle // 2] + raw[middle:]
    return raw[:300] + bytes([raw[300] ^ 255]) + raw[301:]  # within the first array


@pytest.mark.parametrize("kind", ["cut 0.1", "cut 0.5", "cut 0.99", "hole", "flipped byte"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed], ids=["plain", "compressed"])
def test_damaged_file(kind, save, tmp_path, capsys):
    path = tmp_path / "demos.npz"
    save(path, **demonstrations())
    path.write_bytes(cut(path.read_bytes(), kind))
    refused_demos(iq_discrete, capsys, tmp_path, path)


def npy_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


STRANGE = {
    "not an array": b"this is no array",
    "empty": b"",
    "header cut off": npy_bytes(np.zeros((ROWS, 4), np.float32))[:40],
    "data cut off": npy_bytes(np.zeros((ROWS, 4), np.float32))[:200],
    "shape beyond memory": npy_bytes(np.zeros((1000, 4), np.float32)).replace(b"(1000,", b"(9" + b"0" * 13 + b","),
}


@pytest.mark.parametrize("name", ["observations", "episode_lengths", "env_id"])
@pytest.mark.parametrize("kind", STRANGE)
def test_strange_member(kind, name, tmp_path, capsys):
    """A whole zip archive, one of whose members is no whole array."""
    path = tmp_path / "demos.npz"
    with zipfile.ZipFile(path, "w") as file:
        for key, array in demonstrations().items():
            file.writestr(f"{key}.npy", STRANGE[kind] if key == name else npy_bytes(array))
    refused_demos(iq_discrete, capsys, tmp_path, path)


def test_encrypted_archive(tmp_path, good, capsys):
    """Marked as encrypted, in the headers of every member."""
    raw = good.read_bytes()
    for magic, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        for match in re.finditer(re.escape(magic), raw):
            place = match.start() + offset
            raw = raw[:place] + b"\x01" + raw[place + 1 :]
    good.write_bytes(raw)
    refused_demos(iq_discrete, capsys, tmp_path, good)


@pytest.mark.parametrize("name", [name for name in demonstrations() if name != "rewards"])
def test_missing_key(name, tmp_path, capsys):
    path = write(tmp_path / "demos.npz", edited(demonstrations(), **{name: None}))
    refused_demos(iq_discrete, capsys, tmp_path, path, rf"\b{name}\b.*missing", "it has")


def test_payload_does_something(tmp_path):
    """The control for the tests below."""
    path, marker = tmp_path / "demos.npz", tmp_path / "executed"
    write(path, {"x": np.array([Payload(marker)], dtype=object)})
    np.load(path, allow_pickle=True)["x"]
    assert marker.exists()


@pytest.mark.parametrize("module, name", [
    *((iq_discrete, name) for name in (*demonstrations(), "dones")), (iq_atari, "observations"), (iq_atari, "dones"),
    (iq_continuous, "actions"), (iq_continuous, "dones")])
def test_pickled_content_is_never_unpickled(module, name, tmp_path, capsys):
    marker = tmp_path / "executed"
    data = ALL[module]()
    if name == "dones":
        data = edited(data, terminations=None, truncations=None)
    path = write(tmp_path / "demos.npz", edited(data, **{name: np.array([Payload(marker)] * STEPS, dtype=object)}))
    refused_demos(module, capsys, tmp_path, path, "(?i)pickle|object", flags=["--dones-are", "terminations"])
    assert not marker.exists()


# ------------------------------------------------------------------------------------ what the arrays hold
D = demonstrations()
BAD_ARRAYS = {
    "lengths negative": ({"episode_lengths": np.array([22, -7])}, "episode_lengths", "-7", "positive integers"),
    "lengths zero": ({"episode_lengths": np.array([7, 5, 3, 0])}, "episode_lengths", r"\b0\b", "positive integers"),
    "lengths float": ({"episode_lengths": LENGTHS.astype(float)}, "episode_lengths", "float64", "positive integers"),
    "lengths NaN": ({"episode_lengths": np.array([7, np.nan])}, "episode_lengths", "float64|nan", "positive integers"),
    "lengths text": ({"episode_lengths": LENGTHS.astype(str)}, "episode_lengths", "str|<U", "positive integers"),
    "lengths in 2-D": ({"episode_lengths": LENGTHS[None]}, "episode_lengths", r"\(1, 3\)", "positive integers"),
    "lengths a scalar": ({"episode_lengths": np.array(STEPS)}, "episode_lengths", r"\(\)", "positive integers"),
    "lengths too long": ({"episode_lengths": np.array([7, 5, 4])}, r"\b15\b", r"\b16\b"),
    "lengths too few": ({"episode_lengths": LENGTHS[:2]}, r"\b15\b", r"\b12\b"),
    # Sums in 64 bits that agree with everything else.
    "lengths wrap around": ({"episode_lengths": np.array([2**62] * 4 + [STEPS]), "observations": np.zeros((20, 4))},),
    "lengths wrap around, unsigned": ({"episode_lengths": np.array([2**63, 2**63, STEPS], np.uint64)},),
    "no episodes": ({"episode_lengths": LENGTHS[:0]} | {name: D[name][:0] for name in D if D[name].ndim > 0
                                                       and name != "episode_lengths"}, "no episodes"),
    "actions too few": ({"actions": D["actions"][:-1]}, r"actions.*\(14,\)", r"\b15\b"),
    "terminations too many": ({"terminations": np.zeros(16, bool)}, r"terminations.*\(16,\)", r"\b15\b"),
    "truncations too few": ({"truncations": np.zeros(3, bool)}, r"truncations.*\(3,\)", r"\b15\b"),
    "rewards too few": ({"rewards": np.ones(14)}, r"rewards.*\(14,\)", r"\b15\b"),
    "observations T per episode": ({"observations": D["observations"][:STEPS]}, r"\b15 observations", r"\b18\b"),
    "observations NaN": ({"observations": at(D["observations"], (4, 2), np.nan)}, "observations.*NaN"),
    "observations infinite": ({"observations": at(D["observations"], (17, 3), -np.inf)}, "observations.*infinite"),
    "observations beyond float32": ({"observations": at(D["observations"].astype(float), (4, 2), 1e300)},
                                    "observations.*infinite in float32"),
    "observations too narrow": ({"observations": D["observations"][:, :3]}, r"\(3,\)", r"\(4,\)"),
    "observations with an axis more": ({"observations": D["observations"][..., None]}, r"\(4, 1\)", r"\(4,\)"),
    "observations flat": ({"observations": D["observations"].ravel()}, r"\(\)", r"\(4,\)"),
    "observations integers": ({"observations": D["observations"].astype(int)}, "observations.*int64", "float32"),
    "observations complex": ({"observations": D["observations"] + 1j}, "observations.*complex", "float32"),
    "observations text": ({"observations": D["observations"].astype(str)}, "observations.*<U", "float32"),
    "actions float": ({"actions": D["actions"].astype(np.float32)}, "actions.*float32", "int64"),
    "actions NaN": ({"actions": at(D["actions"].astype(float), 3, np.nan)}, "actions.*float64", "int64"),
    "actions one-hot": ({"actions": np.eye(2, dtype=int)[D["actions"]]}, r"actions.*\(15, 2\)", "int64"),
    "actions bool": ({"actions": D["actions"] > 0}, "actions.*bool", "int64"),
    "actions above the space": ({"actions": at(D["actions"], 4, 2)}, r"actions from \d to 2\b", "0 to 1"),
    "actions below the space": ({"actions": at(D["actions"], 4, -1)}, "actions from -1", "0 to 1"),
    "terminations of 2": ({"terminations": at(D["terminations"].astype(int), 9, 2)}, r"terminations.*\b2\b", "true"),
    "terminations NaN": ({"terminations": np.full(STEPS, np.nan)}, "terminations.*(nan|NaN|float)", "true"),
    "truncations text": ({"truncations": np.full(STEPS, "no")}, "truncations.*(no|<U)", "true"),
    "truncations in 2-D": ({"truncations": D["truncations"][:, None]}, r"truncations.*\(15, 1\)", "true"),
    "rewards text": ({"rewards": np.full(STEPS, "one")}, "rewards.*<U"),
    "rewards in 2-D": ({"rewards": np.ones((STEPS, 2))}, r"rewards.*\(15, 2\)", "a number for each action"),
    "another environment": ({"env_id": np.array("Acrobot-v1")}, "Acrobot-v1", "CartPole-v1"),
    "env_id a number": ({"env_id": np.array(3)}, r"\b3\b", "CartPole-v1"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_bad_arrays(case, tmp_path, capsys):
    changes, *patterns = BAD_ARRAYS[case]
    path = write(tmp_path / "demos.npz", edited(D, **changes))
    refused_demos(iq_discrete, capsys, tmp_path, path, *patterns)


def test_more_demonstrations_than_there_are(tmp_path, good, capsys):
    argv = [*TINY[iq_discrete], "--out-dir", tmp_path / "runs", "--demos", good, "--num-demos", 4]
    refused(iq_discrete, capsys, tmp_path, argv, "--num-demos 4", r"\b3\b", path=good)


HARMLESS = {
    "float64 observations": {"observations": D["observations"].astype(np.float64)},
    "float16 observations": {"observations": D["observations"].astype(np.float16)},
    "int32 actions": {"actions": D["actions"].astype(np.int32)},
    "uint8 actions": {"actions": D["actions"].astype(np.uint8)},
    "uint8 lengths": {"episode_lengths": LENGTHS.astype(np.uint8)},
    "uint64 lengths": {"episode_lengths": LENGTHS.astype(np.uint64)},
    "float ends": {name: D[name].astype(np.float32) for name in ("terminations", "truncations")},
    "env_id in an array": {"env_id": np.array(["CartPole-v1"])},
    "no rewards": {"rewards": None},
    "unused pickled key": {"notes": np.array([{"by": "me"}, None], dtype=object)},
    "unused key of another length": {"num_actions": np.zeros(3)},
    # `dones` is refused *instead of* terminations and truncations; beside them it is a key that no script uses.
    "dones beside what is used": {"dones": D["terminations"] | D["truncations"]},
    "pickled dones beside what is used": {"dones": np.array([{}, None], dtype=object)},
}


@pytest.mark.parametrize("case", HARMLESS)
def test_harmless_differences_are_accepted(case, tmp_path, good, capsys):
    """They train, and all but float16 give the same transitions."""
    path = write(tmp_path / "demos.npz", edited(D, **HARMLESS[case]))
    status = train(iq_discrete, tmp_path, demos=path)
    out, err = capsys.readouterr()
    assert status == 0, err
    if "float16" not in case:
        same(load(path)[:2], load(good)[:2])
    assert ("expert=nan" in out.splitlines()[-1]) == (case == "no rewards")


def test_strange_member_that_is_not_used(tmp_path, good, capsys):
    with zipfile.ZipFile(good, "a") as file:
        file.writestr("readme.txt", "made by me")
        file.writestr("notes.npy", b"this is no array")
    assert train(iq_discrete, tmp_path, demos=good) == 0, capsys.readouterr().err


def test_compressed_file(tmp_path, good):
    np.savez_compressed(tmp_path / "demos.npz", **D)
    same(load(tmp_path / "demos.npz"), load(good))


def test_a_termination_inside_an_episode_warns_and_trains(tmp_path, capsys):
    data = demonstrations()
    assert train(iq_discrete, tmp_path, demos=write(tmp_path / "inside.npz",
                                                    edited(data, terminations=at(data["terminations"], 8, True)))) == 0
    err = capsys.readouterr().err
    assert "1 terminations before the end of an episode, the first at action 8" in err and "episode_lengths" in err


def test_another_version_warns_and_trains(tmp_path, capsys):
    path = write(tmp_path / "demos.npz", demonstrations(env_id="CartPole-v0"))
    assert train(iq_discrete, tmp_path, demos=path) == 0
    err = capsys.readouterr().err
    assert err.count("warning") == 1 and "CartPole-v0" in err and "CartPole-v1" in err


# ------------------------------------------------------------------------------------- flags and directories
BAD_FLAGS = {
    "--env-id NoSuchThing-v1": ("NoSuchThing",),
    "--env-id PongNoFrameskip-v4": (r"Atari game, which iq_atari\.py",),
    "--env-id CartPole-v99": ("v99", "v1"),
    "--env-id nonsense!": ("nonsense!",),
    "--env-id no_such_module:Thing-v0": ("no_such_module",),
    "--env-id Pendulum-v1": ("continuous", r"iq_continuous\.py"),
    "--env-id FrozenLake-v1": (r"Discrete\(16\)", "Box"),
    "--num-demos -1": ("-1", "at least 0"),
    "--subsample-freq 0": (r"\b0\b", "at least 1"),
    "--subsample-freq 9007199254740992": ("less than 2",),  # 2**53
    "--gamma 1.0": ("at least 0 and below 1",),
    "--gamma nan": ("at least 0 and below 1",),
    "--temperature -0.1": ("at least 0",),
    "--chi2-alpha 0.0": ("above 0",),
    "--chi2-alpha inf": ("finite",),
    "--learning-rate nan": ("above 0",),
    "--batch-size 0": ("at least 1",),
    "--num-envs 0": ("at least 1",),
    "--eval-episodes 0": ("at least 1",),
    "--total-timesteps -5": ("at least 0",),
    "--seed -1": ("at least 0",),
    "--seed 18446744073709551616": ("expected",),  # 2**64
    "--updates-per-step inf": ("expected",),
    "--target-rate 1.5": ("from 0 to 1",),
    "--buffer-size 0": ("at least 1",),
    "--buffer-size 1000000000000": ("allocate|memory",),
    "--network cnn": ("GridWorld", "CartPole-v1"),
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flag(flags, tmp_path, good, capsys):
    flag, value = flags.split()
    argv = [*TINY[iq_discrete], "--out-dir", tmp_path / "runs", "--demos", good, flag, value]
    refused(iq_discrete, capsys, tmp_path, argv, flag, *BAD_FLAGS[flags], path=good)


@pytest.mark.parametrize("module, flags, expected", [
    (iq_discrete, "--divergence euclid", "hellinger"), (iq_discrete, "--dones-are lies", "time-limits"),
    (iq_discrete, "--value-loss v1", "v0_expert"), (iq_discrete, "--objective gail", "bc"),
    (iq_discrete, "--seed one", "int"), (iq_discrete, "--no-such-flag 1", ""), (iq_atari, "--divergence kl", "chi2"),
    (iq_continuous, "--divergence kl", "chi2"), (iq_continuous, "--preset theirs", "paper"),
    (iq_continuous, "--learning-rate 0.1", ""),
])
def test_unknown_choice(module, flags, expected, tmp_path, capsys):
    """These are refused by tyro."""
    with pytest.raises(SystemExit) as stop:
        train(module, tmp_path, *flags.split())
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in err
    assert flags.split()[0] in err and expected in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", TINY, ids=lambda m: m.SCRIPT)
def test_run_directory_exists(module, tmp_path, capsys):
    data = ALL[module]()
    path, run_dir = write(tmp_path / "demos.npz", data), tmp_path / "runs/tiny"
    run_dir.mkdir(parents=True)
    (run_dir / "args.json").write_text("precious")
    argv = [*TINY[module], "--out-dir", tmp_path / "runs", "--demos", path]
    refused(module, capsys, tmp_path, argv, run_dir, "--run-name", "exists")


def test_run_directory_under_a_file(tmp_path, good, capsys):
    (tmp_path / "runs").write_text("precious")
    argv = [*TINY[iq_discrete], "--out-dir", tmp_path / "runs", "--demos", good]
    refused(iq_discrete, capsys, tmp_path, argv, tmp_path / "runs")


def test_no_bundled_demonstrations(tmp_path, capsys):
    """An environment that the script knows nothing about: the format is told."""
    argv = [*TINY[iq_discrete], "--out-dir", tmp_path / "runs", "--env-id", "MountainCar-v0"]
    refused(iq_discrete, capsys, tmp_path, argv, "--demos", "MountainCar-v0", "npz", "observations", "actions",
            "terminations", "truncations", "episode_lengths", "env_id", "Minari")


# -------------------------------------------------------------------------------------- which transitions
def test_transitions_of_a_file(good):
    """Every transition once, the next state the true one, only an end by itself terminated."""
    demos = load(good)
    obs, action, next_obs, terminated = (x.numpy() for x in demos.transitions)
    assert obs.dtype == next_obs.dtype == terminated.dtype == np.float32 and action.dtype == np.int64
    assert len(obs) == STEPS and len(np.unique(obs[:, :2], axis=0)) == STEPS
    first_action, first_row = np.cumsum(LENGTHS) - LENGTHS, np.cumsum(LENGTHS + 1) - LENGTHS - 1
    for i in range(STEPS):
        episode, t = obs[i, :2].astype(int)
        np.testing.assert_array_equal(obs[i], D["observations"][first_row[episode] + t])
        np.testing.assert_array_equal(next_obs[i], D["observations"][first_row[episode] + t + 1])
        assert action[i] == D["actions"][first_action[episode] + t]
        assert terminated[i] == (t == LENGTHS[episode] - 1 and episode > 0)  # episode 0 is cut by a time limit
    assert sorted(demos.initial_obs[:, 0]) == [0, 1, 2] and (demos.initial_obs[:, 1] == 0).all()


@pytest.mark.parametrize("k", [1, 2, 4, 20])
def test_subsampling(k, tmp_path):
    """Every k-th transition from an offset in [0, min(k, T)), with the next state of the full trajectory."""
    lengths = np.array([50, 1, 3, 41])
    path, offsets = write(tmp_path / "demos.npz", demonstrations(lengths)), set()
    for seed in range(12):
        demos = load(path, subsample_freq=k, seed=seed)
        obs, _, next_obs, _ = (x.numpy() for x in demos.transitions)
        assert (next_obs[:, 0] == obs[:, 0]).all() and (next_obs[:, 1] == obs[:, 1] + 1).all()
        for episode, length in enumerate(lengths):
            times = obs[obs[:, 0] == episode, 1]
            assert len(times) > 0, "a short episode keeps at least one"
            np.testing.assert_array_equal(times, np.arange(times[0], length, k))
            assert times[0] < min(k, length)
            offsets.add((episode, times[0]))
        assert (demos.initial_obs[:, 1] == 0).all() and len(demos.initial_obs) == 4  # not subsampled
    if k > 1:
        assert len({t for episode, t in offsets if episode == 0}) > 1, "the offset is drawn"


def test_trajectories_are_drawn_by_the_seed(tmp_path):
    path = write(tmp_path / "demos.npz", demonstrations(np.arange(2, 14)))
    drawn = {}
    for seed in range(5):
        demos = load(path, num_demos=3, seed=seed)
        drawn[seed] = frozenset(demos.initial_obs[:, 0].int().tolist())
        assert len(drawn[seed]) == 3 and set(demos.transitions.obs[:, 0].tolist()) == drawn[seed]
        assert len(demos.transitions.obs) == sum(episode + 2 for episode in drawn[seed])
        assert demos.expert_return == pytest.approx(np.mean([episode + 2 for episode in drawn[seed]]))
        same(demos, load(path, num_demos=3, seed=seed))
    assert len(set(drawn.values())) > 3, "different seeds draw differently"


def test_zero_demonstrations_means_all(good):
    assert len(load(good, num_demos=0).initial_obs) == len(load(good, num_demos=3).initial_obs) == 3


# ---------------------------------------------------------------------------------------------- dones
DONES = edited(D, terminations=None, truncations=None, dones=D["terminations"] | D["truncations"])


def test_dones_are_refused_unexplained(tmp_path, capsys):
    path = write(tmp_path / "demos.npz", DONES)
    refused_demos(iq_discrete, capsys, tmp_path, path, "`?dones`?", "--dones-are terminations", "time-limits",
                  "(?i)time limit")


@pytest.mark.parametrize("meaning", ["terminations", "time-limits"])
def test_dones_are(meaning, tmp_path, good):
    path = write(tmp_path / "demos.npz", DONES)
    demos, known = load(path, dones_are=meaning), load(good)
    terminated = demos.transitions.terminated
    at_end = demos.transitions.next_obs[:, 1].numpy() == LENGTHS[demos.transitions.obs[:, 0].int().numpy()]
    assert at_end.sum() == 3
    np.testing.assert_array_equal(terminated.numpy() == 1, at_end if meaning == "terminations" else np.zeros(STEPS))
    assert demos.end_rate == (0.2 if meaning == "terminations" else 0)
    assert demos.end_rate == load(path, dones_are=meaning, subsample_freq=4).end_rate
    same(*(own._replace(transitions=own.transitions[:3], end_rate=0) for own in (demos, known)))
    assert train(iq_discrete, tmp_path, "--dones-are", meaning, demos=path) == 0


def test_dones_beside_terminations_need_no_meaning(tmp_path, good):
    path = write(tmp_path / "demos.npz", edited(D, truncations=None, dones=D["terminations"] | D["truncations"]))
    same(load(path), load(good))


BAD_DONES = {
    "too few": ({"dones": DONES["dones"][:-1]}, r"dones of.*\(14,\)", r"\b15\b"),
    "none": ({"dones": np.array(True)}, r"dones of shape \(\)", r"\b15\b"),
    "of 2": ({"dones": DONES["dones"] * 2}, "dones of", "true"),
    "text": ({"dones": np.full(STEPS, "no")}, "dones of", "true"),
    "no observations": ({"observations": None}, "observations.*missing"),
}


@pytest.mark.parametrize("case", BAD_DONES)
def test_bad_file_with_dones(case, tmp_path, capsys):
    changes, *patterns = BAD_DONES[case]
    path = write(tmp_path / "demos.npz", edited(DONES, **changes))
    refused_demos(iq_discrete, capsys, tmp_path, path, *patterns, flags=["--dones-are", "terminations"])


# ---------------------------------------------------------------------------------------------- Minari
def write_minari(dataset_id: str, data: dict, lengths=LENGTHS, **about) -> str:
    """The arrays of an .npz as a Minari dataset, made by the minari package."""
    minari = pytest.importorskip("minari")
    pytest.importorskip("h5py")
    from minari.data_collector import EpisodeBuffer

    buffers = []
    first = np.cumsum(lengths) - lengths
    for i, length in enumerate(lengths):
        rows, steps = slice(first[i] + i, first[i] + i + length + 1), slice(first[i], first[i] + length)
        buffers.append(EpisodeBuffer(id=i, observations=list(data["observations"][rows]),
                                     **{name: list(data[name][steps])
                                        for name in ("actions", "rewards", "terminations", "truncations")}))
    minari.create_dataset_from_buffers(
        dataset_id, buffers, algorithm_name="none", author="test", author_email="test@localhost",
        code_permalink="none", description="test", **about)
    return dataset_id


@pytest.fixture
def minari_root(tmp_path, monkeypatch) -> Path:
    pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "minari"


@pytest.mark.parametrize("settings", [{}, {"num_demos": 2, "seed": 4}, {"subsample_freq": 3, "seed": 2}],
                         ids=["all", "drawn", "subsampled"])
def test_minari_and_npz_give_the_same_transitions(settings, minari_root, good):
    dataset_id = write_minari("cartpole/test-v0", D, env="CartPole-v1")
    same(load(dataset_id, **settings), load(good, **settings))


def test_minari_trains(minari_root, tmp_path, capsys):
    dataset_id = write_minari("cartpole/test-v0", D, env="CartPole-v1")
    assert train(iq_discrete, tmp_path, demos=dataset_id) == 0
    out, err = capsys.readouterr()
    assert "expert=5.0000" in out.splitlines()[-1] and "warning" not in err


def test_minari_of_another_version_warns_and_trains(minari_root, tmp_path, capsys):
    dataset_id = write_minari("cartpole/old-v0", D, env="CartPole-v0")
    assert train(iq_discrete, tmp_path, demos=dataset_id) == 0
    err = capsys.readouterr().err
    assert "warning" in err and "CartPole-v0" in err


def test_minari_of_another_environment(minari_root, tmp_path, capsys):
    data = edited(D, observations=np.repeat(D["observations"][:, :3], 2, axis=1))
    dataset_id = write_minari("acrobot/test-v0", data, env="Acrobot-v1")
    refused_demos(iq_discrete, capsys, tmp_path, dataset_id, "Acrobot-v1", "CartPole-v1")


def test_minari_with_nan(minari_root, tmp_path, capsys):
    data = edited(D, observations=at(D["observations"], (4, 2), np.nan))
    dataset_id = write_minari("cartpole/nan-v0", data, env="CartPole-v1")
    refused_demos(iq_discrete, capsys, tmp_path, dataset_id, "NaN")


@pytest.mark.parametrize("actions", [None, {"left": np.zeros(2)}, ()], ids=["no episodes", "dict", "tuple"])
def test_minari_of_a_kind_that_cannot_be_read(actions, minari_root, tmp_path, capsys, monkeypatch):
    import minari

    ends = np.array([False, True])
    episode = SimpleNamespace(observations=np.zeros((3, 4)), actions=actions, terminations=ends, truncations=ends & False,
                              rewards=np.ones(2))
    episodes = [] if actions is None else [episode]
    dataset = SimpleNamespace(iterate_episodes=lambda: iter(episodes), total_episodes=len(episodes), env_spec=None)
    monkeypatch.setattr(minari, "load_dataset", lambda *_, **__: dataset)
    refused_demos(iq_discrete, capsys, tmp_path, "cartpole/odd-v0", "no episodes.*plain arrays")


def test_minari_is_not_installed(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "minari", None)
    refused_demos(iq_discrete, capsys, tmp_path, "cartpole/test-v0", "pip install .*minari")


def test_minari_has_no_such_dataset(minari_root, tmp_path, capsys, monkeypatch):
    minari_root.mkdir()
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # no search on the network from a test
    refused_demos(iq_discrete, capsys, tmp_path, "cartpole/nosuch-v0", "Minari")


@pytest.mark.parametrize("kind", ["cut-off", "text", "missing"])
def test_minari_with_damaged_data(kind, minari_root, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    dataset_id = write_minari("cartpole/test-v0", D, env="CartPole-v1")
    path = minari_root / "cartpole/test-v0/data/main_data.hdf5"
    raw = path.read_bytes()
    path.unlink()
    if kind != "missing":
        path.write_bytes(raw[: len(raw) // 2] if kind == "cut-off" else b"no data")
    refused_demos(iq_discrete, capsys, tmp_path, dataset_id)


def test_minari_with_observations_in_a_dictionary(minari_root, tmp_path, capsys):
    minari = pytest.importorskip("minari")
    from minari.data_collector import EpisodeBuffer

    buffer = EpisodeBuffer(id=0, observations={"x": list(np.zeros((3, 4), np.float32))}, actions=[0, 1],
                           rewards=[1.0, 1.0], terminations=[False, True], truncations=[False, False])
    minari.create_dataset_from_buffers(
        "cartpole/dict-v0", [buffer], env="CartPole-v1", algorithm_name="none", author="test",
        author_email="test@localhost", code_permalink="none", description="test",
        observation_space=gym.spaces.Dict(x=gym.spaces.Box(-9, 9, (4,), np.float32)))
    refused_demos(iq_discrete, capsys, tmp_path, "cartpole/dict-v0", "observations", "plain arrays")


@pytest.mark.parametrize("discrete", [False, True])
def test_minari_tells_the_action_space_that_no_environment_does(discrete, minari_root, capsys):
    space = gym.spaces.Discrete(5) if discrete else gym.spaces.Box(-2, 3, (1,), np.float32)
    data = edited(D, actions=D["actions"] if discrete else D["actions"][:, None].astype(np.float32))
    dataset_id = write_minari("own/test-v0", data, action_space=space,
                              observation_space=gym.spaces.Box(-99, 99, (4,), np.float32))
    spaces = iq_offline.load_demonstrations(iq_offline.Args(demos=dataset_id, num_demos=0), None, "cpu").spaces
    assert spaces[1:] == ((5, (), ()) if discrete else (0, (-2,), (3,))) and "warning" not in capsys.readouterr().err


def test_minari_frames_for_atari(minari_root, tmp_path, capsys):
    data = frame_demonstrations()
    path = write(tmp_path / "demos.npz", data)
    dataset_id = write_minari("pong/test-v0", data, jpeg_encoding=False, action_space=gym.spaces.Discrete(6),
                              observation_space=gym.spaces.Box(0, 255, (84, 84), np.uint8))
    same(load_atari(dataset_id, subsample_freq=2), load_atari(path, subsample_freq=2))


# ------------------------------------------------------------------------- Atari: frames, and seeds with actions
F = frame_demonstrations()
BAD_FRAMES = {
    "float": ({"observations": F["observations"].astype(np.float32)}, "observations.*float32", "uint8"),
    "too narrow": ({"observations": F["observations"][..., :83]}, r"84, 83\)", r"84, 84\)"),
    "with an axis more": ({"observations": F["observations"][..., None]}, r"84, 84, 1\)", r"84, 84\)"),
    "T per episode": ({"observations": F["observations"][:STEPS]}, r"\(15, 84", r"\(18, 84"),
    "no terminations": ({"terminations": None}, "terminations.*missing"),
    "no env_id": ({"env_id": None}, "env_id.*missing"),
    "no observations": ({"observations": None}, "missing"),
    "actions outside": ({"actions": at(F["actions"], 3, 6)}, r"to 6\b", "0 to 5"),
    "lengths zero": ({"episode_lengths": np.array([7, 5, 3, 0])}, "episode_lengths", "positive integers"),
    "lengths disagree": ({"episode_lengths": np.array([7, 5, 4])}, r"\b15\b", r"\b16\b"),
    "no episodes": ({name: F[name][:0] for name in F if F[name].ndim > 0}, "no episodes"),
    "rewards text": ({"rewards": np.full(STEPS, "one")}, "rewards"),
    "another game": ({"env_id": np.array("BreakoutNoFrameskip-v4")}, "Breakout", "Pong"),
    "dones": ({"terminations": None, "truncations": None, "dones": F["terminations"]}, "--dones-are"),
}


@pytest.mark.parametrize("case", BAD_FRAMES)
def test_bad_frames(case, tmp_path, capsys):
    changes, *patterns = BAD_FRAMES[case]
    path = write(tmp_path / "demos.npz", edited(F, **changes))
    refused_demos(iq_atari, capsys, tmp_path, path, *patterns)


@pytest.mark.parametrize("seed", [3_000_000, 3_000_000_000])
def test_a_seed_is_good_for_the_emulator_or_refused(seed, tmp_path, capsys):
    """The emulator takes 32 bits, and evaluation adds to a multiple of the seed: that must not fail after training."""
    path = write(tmp_path / "demos.npz", F)
    status = train(iq_atari, tmp_path, "--seed", seed, demos=path)
    if status == 0:
        args = iq_atari.Args(seed=seed, eval_episodes=1)

        class Stopped:
            signum = 15

        assert iq_atari.evaluate(iq_atari.QNetwork(6), args, "cpu", Stopped()) is None  # reset, and no step
    else:
        assert status == 2 and "--seed" in capsys.readouterr().err


@pytest.mark.parametrize("env_id, found", [("NoSuchGameNoFrameskip-v4", "NoSuchGame"), ("Pong", "Pong"),
                                           ("CartPole-v1", "CartPole-v1")])
def test_bad_game(env_id, found, tmp_path, capsys):
    argv = [*TINY[iq_atari], "--out-dir", tmp_path / "runs", "--env-id", env_id]
    refused(iq_atari, capsys, tmp_path, argv, "--env-id", found, "NoFrameskip-v4")


GOOD_FRAMES = {
    "unused pickled key": {"notes": np.array([{}], dtype=object)},
    "no rewards": {"rewards": None},
    "uint64 lengths": {"episode_lengths": LENGTHS.astype(np.uint64)},
    "fields that are not used": {"seeds": np.array([{}], dtype=object), "returns": np.array("?")},
}


@pytest.mark.parametrize("case", GOOD_FRAMES)
def test_frames_train(case, tmp_path, capsys):
    path = write(tmp_path / "demos.npz", edited(F, **GOOD_FRAMES[case]))
    status = train(iq_atari, tmp_path, demos=path)
    out, err = capsys.readouterr()
    assert status == 0, err
    assert ("expert=nan" if case == "no rewards" else "expert=5.0000") in out.splitlines()[-1]


@pytest.mark.parametrize("meaning", ["terminations", "time-limits"])
def test_frames_dones_are(meaning, tmp_path):
    dones = F["terminations"] | F["truncations"]
    path = write(tmp_path / "demos.npz", edited(F, terminations=None, truncations=None, dones=dones))
    assert load_atari(path, dones_are=meaning).terminated.sum() == (3 if meaning == "terminations" else 0)


def test_frames_subsampled_and_drawn(tmp_path):
    path = write(tmp_path / "demos.npz", F)
    demos = load_atari(path, subsample_freq=6, num_demos=2, seed=1)
    games = np.split(F["observations"], np.cumsum(LENGTHS + 1)[:-1])
    assert len(demos.initial_obs) == 2
    chosen = [next(i for i, game in enumerate(games) if (game[0] == first[-1].numpy()).all()) for first in demos.initial_obs]
    frames = torch.as_tensor(np.concatenate([games[i] for i in chosen]))
    assert torch.equal(demos.frames[0], frames), "games that were not drawn are on the device"
    for position, age in zip(demos.position, demos.age):
        stack = iq_atari.stack_frames(demos.frames, 0, position[None], age[None])[0]
        assert torch.equal(stack[3], frames[position]) and torch.equal(stack[4], frames[position + 1])
    starts = np.cumsum(LENGTHS[chosen] + 1) - LENGTHS[chosen] - 1
    assert set((demos.position - demos.age).tolist()) == set(starts.tolist())
    for start, length in zip(starts, LENGTHS[chosen]):
        times = demos.age[demos.position - demos.age == start].tolist()
        assert times == list(range(times[0], length, 6)) and times[0] < min(6, length)


BAD_RECORDINGS = {
    "no seeds": (lambda d: {"seeds": None}, "seeds.*missing"),
    "no actions": (lambda d: {"actions": None}, "actions.*missing"),
    "no returns": (lambda d: {"returns": None}, "returns.*missing"),
    "no lengths": (lambda d: {"episode_lengths": None}, "episode_lengths.*missing"),
    "seeds float": (lambda d: {"seeds": d["seeds"].astype(float)}, "seeds"),
    "seeds too few": (lambda d: {"seeds": d["seeds"][:1]}, "seeds", r"\b2\b"),
    "returns too many": (lambda d: {"returns": np.zeros(3)}, "returns", r"\b2\b"),
    "returns text": (lambda d: {"returns": d["returns"].astype(str)}, "returns"),
    "actions too few": (lambda d: {"actions": d["actions"][:-1]}, "actions"),
    "actions outside": (lambda d: {"actions": at(d["actions"], 9, 4)}, r"to 4\b", "0 to 3"),
    "actions float": (lambda d: {"actions": d["actions"].astype(np.float32)}, "actions.*float32", "int64"),
    "lengths negative": (lambda d: {"episode_lengths": d["episode_lengths"] * np.array([1, -1])}, "episode_lengths"),
    "no episodes": (lambda d: {k: d[k][:0] for k in d if d[k].ndim > 0}, "no episodes"),
    "another game": (lambda d: {"env_id": np.array("ALE/Pong-v5")}, "Pong", "Breakout"),
    # What follows shows only when the games are played again.
    "returns tampered": (lambda d: {"returns": d["returns"] + np.array([0, 1])}, "return"),
    "returns NaN": (lambda d: {"returns": at(d["returns"], 1, np.nan)}, "return"),
    "actions tampered": (lambda d: {"actions": np.roll(d["actions"], 1)}, "return|did not end"),
    "seeds tampered": (lambda d: {"seeds": d["seeds"] + 5}, "return|did not end"),
    # The emulator takes a negative seed for none, so that replaying would fail, or not, by chance.
    "seeds negative": (lambda d: {"seeds": -d["seeds"]}, "seeds"),
    "seeds beyond 32 bits": (lambda d: {"seeds": d["seeds"] + 2**40}, "seeds"),
    "lengths shifted": (lambda d: {"episode_lengths": d["episode_lengths"] + np.array([1, -1])}, "did not end"),
}


@pytest.mark.parametrize("case", BAD_RECORDINGS)
def test_bad_recording(case, recording, tmp_path, capsys):
    change, *patterns = BAD_RECORDINGS[case]
    path = write(tmp_path / "demos.npz", edited(recording, **change(recording)))
    refused_demos(iq_atari, capsys, tmp_path, path, *patterns, flags=["--env-id", BREAKOUT])


def test_more_games_than_there_are(recording, tmp_path, capsys):
    path = write(tmp_path / "demos.npz", recording)
    argv = [*TINY[iq_atari], "--out-dir", tmp_path / "runs", "--demos", path, "--num-demos", 3, "--env-id", BREAKOUT]
    refused(iq_atari, capsys, tmp_path, argv, "--num-demos 3", r"\b2\b", path=path)


def test_recording_gives_the_frames_that_were_seen(games, recording, tmp_path):
    seeds = write(tmp_path / "seeds.npz", edited(recording, actions=games["actions"].astype(np.uint8)))
    frames = write(tmp_path / "frames.npz", edited(games, seeds=None, returns=None))
    a, b = (load_atari(path, env_id=BREAKOUT, subsample_freq=5, seed=2) for path in (seeds, frames))
    assert a.expert_return == games["returns"].mean() and np.isnan(b.expert_return)
    chosen = torch.stack([a.frames[0, a.position], a.frames[0, a.position + 1]])
    assert torch.equal(chosen, torch.stack([b.frames[0, b.position], b.frames[0, b.position + 1]]))
    for name in ("age", "action", "terminated", "initial_obs"):
        same(getattr(a, name), getattr(b, name))
    assert load_atari(seeds, env_id=BREAKOUT).terminated.sum() == 2


GOOD_RECORDINGS = {
    "as recorded": lambda d: {},
    "uint64 lengths": lambda d: {"episode_lengths": d["episode_lengths"].astype(np.uint64)},
    "other spelling": lambda d: {"env_id": np.array("ALE/Breakout-v5")},
    "fields that are not used": lambda d: {"terminations": np.array([{}], dtype=object), "rewards": np.array("?")},
    "dones that are not used": lambda d: {"dones": np.zeros(3, bool)},
}


@pytest.mark.parametrize("case", GOOD_RECORDINGS)
def test_recording_trains(case, recording, tmp_path, capsys):
    path = write(tmp_path / "demos.npz", edited(recording, **GOOD_RECORDINGS[case](recording)))
    status = train(iq_atari, tmp_path, "--env-id", BREAKOUT, demos=path)
    out, err = capsys.readouterr()
    assert status == 0, err
    assert f"expert={recording['returns'].mean():.4f}" in out.splitlines()[-1]
    assert ("warning" in err) == (case == "other spelling")


# --------------------------------------------------------------------------------- actions of real numbers
C = continuous_demonstrations()
BAD_CONTINUOUS = {
    "actions integers": ({"actions": C["actions"].astype(int)}, "actions.*int64", "float32"),
    "actions flat": ({"actions": C["actions"][:, 0]}, r"actions.*\(15,\)", r"\(T, 1\)"),
    "actions too wide": ({"actions": np.repeat(C["actions"], 2, 1)}, r"actions.*\(15, 2\)", r"\(T, 1\)"),
    "actions too few": ({"actions": C["actions"][:-1]}, r"actions.*\(14, 1\)", r"\b15\b"),
    "actions NaN": ({"actions": at(C["actions"], 3, np.nan)}, "actions.*NaN"),
    "actions infinite": ({"actions": at(C["actions"], 3, -np.inf)}, "actions.*infinite"),
    "actions complex": ({"actions": C["actions"] + 1j}, "actions.*complex", "float32"),
    "actions text": ({"actions": C["actions"].astype(str)}, "actions.*<U", "float32"),
    "actions bool": ({"actions": C["actions"] > 0}, "actions.*bool", "float32"),
    "observations NaN": ({"observations": at(C["observations"], (4, 2), np.nan)}, "observations.*NaN"),
    "observations too wide": ({"observations": np.repeat(C["observations"], 2, 1)}, r"\(6,\)", r"\(3,\)"),
    "lengths zero": ({"episode_lengths": np.array([7, 5, 3, 0])}, "episode_lengths", "positive integers"),
    "another environment": ({"env_id": np.array("Hopper-v5")}, "Hopper-v5", "Pendulum-v1"),
    "no truncations": ({"truncations": None}, "truncations.*missing"),
    "dones": ({"terminations": None, "truncations": None, "dones": C["terminations"]}, "--dones-are"),
}


@pytest.mark.parametrize("case", BAD_CONTINUOUS)
def test_bad_arrays_continuous(case, tmp_path, capsys):
    changes, *patterns = BAD_CONTINUOUS[case]
    path = write(tmp_path / "demos.npz", edited(C, **changes))
    refused_demos(iq_continuous, capsys, tmp_path, path, *patterns)


@pytest.mark.parametrize("changes", [{}, {"actions": C["actions"].astype(np.float64)}, {"rewards": None},
                                     {"actions": C["actions"].astype(np.float16)},
                                     {"action_low": np.array(["?"]), "notes": np.array([{}], dtype=object)}], ids=str)
def test_good_file_trains_continuous(changes, tmp_path, capsys):
    path = write(tmp_path / "demos.npz", edited(C, **changes))
    assert train(iq_continuous, tmp_path, demos=path) == 0
    out, err = capsys.readouterr()
    assert "warning" not in err and " updates=18 " in out.splitlines()[-1]
    assert ("expert=nan" if "rewards" in changes else "expert=5.0000") in out.splitlines()[-1]


def test_actions_are_scaled_and_those_beyond_the_bounds_clipped_with_one_warning(tmp_path, capsys):
    actions = C["actions"].copy()
    actions[[0, 7, 9], 0] = -2.1, 10, 1e30
    path = write(tmp_path / "demos.npz", edited(C, actions=actions))
    loaded = load_continuous(path).transitions
    order = np.lexsort((loaded.obs[:, 1], loaded.obs[:, 0]))  # episode, then time
    expected = np.clip(actions[:, 0] / 2, -1, 1)
    np.testing.assert_allclose(loaded.action[order, 0], expected, rtol=0, atol=1e-6)
    capsys.readouterr()
    assert train(iq_continuous, tmp_path, demos=path) == 0
    err = capsys.readouterr().err
    assert err.count("warning") == 1 and "3 of 15 actions" in err and "Pendulum-v1" in err and "clipped" in err


@pytest.mark.parametrize("low, high", [(-0.4, 0.4), (0.0, 3.0), (-0.1, 0.3), (-1000.1, 1000.1), (-1e-3, 1e-3)])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_a_bound_itself_is_no_violation_in_any_precision(low, high, kind, tmp_path, capsys):
    actions = np.resize(np.array([low, high], kind), (STEPS, 1))
    path = write(tmp_path / "demos.npz", edited(C, actions=actions))
    bounds = ([float(np.float32(low))], [float(np.float32(high))])
    loaded = load_continuous(path, *bounds).transitions.action
    np.testing.assert_allclose(sorted(set(loaded[:, 0].tolist()))[::len(set(loaded[:, 0].tolist())) - 1], [-1, 1], atol=1e-5)
    assert "warning" not in capsys.readouterr().err
    beyond = write(tmp_path / "beyond.npz", edited(C, actions=actions + 0.01 * (high - low)))
    load_continuous(beyond, *bounds)
    assert "7 of 15 actions" in capsys.readouterr().err


BAD_CONTINUOUS_FLAGS = {
    "--env-id CartPole-v1": ("discrete", r"iq_discrete\.py"),
    "--env-id NoSuchThing-v1": ("NoSuchThing",),
    "--env-id PongNoFrameskip-v4": (r"Atari game, which iq_atari\.py",),
    "--env-id UnboundedActions-v0": (r"Box\(-inf, inf", "bounded"),
    "--env-id HalfBoundedActions-v0": (r"Box\(0.0, inf", "bounded"),
    "--env-id TwoAxesActions-v0": (r"\(2, 2\)", "one dimension"),
    "--env-id WholeActions-v0": ("int64", "real numbers"),
    "--env-id NoRangeActions-v0": (r"Box\(1.0, 1.0", "real numbers"),
    "--env-id ManyActions-v0": ("MultiDiscrete", "bounded Box"),
    "--env-id HugeActions-v0": (r"3\.4028235e\+38", "bounded"),
    "--env-id NumberObservations-v0": (r"Box\(-1.0, 1.0, \(\)", "one dimension or more"),
    "--env-id NeedsMore-v0": ("argument",),
    "--temperature inf": ("finite",),
    "--cloning-weight inf": ("finite",),
    "--gamma 1.0": ("at least 0 and below 1",),
    "--temperature -0.1": ("at least 0",),
    "--chi2-alpha 0.0": ("above 0",),
    "--chi2-alpha inf": ("finite",),
    "--actor-lr 0": ("above 0",),
    "--critic-lr nan": ("above 0",),
    "--updates-per-step inf": ("above 0",),
    "--batch-size 0": ("at least 1",),
    "--hidden-size 0": ("at least 1",),
    "--learning-starts 0": ("at least 1",),
    "--buffer-size 0": ("at least 1",),
    "--target-rate 0": ("above 0 and at most 1",),
    "--target-rate 1.5": ("above 0 and at most 1",),
    "--average-rate -0.1": ("from 0 to 1",),
    "--anneal-lr 1.5": ("from 0 to 1",),
    "--restart-rate -0.1": ("from 0 to 1",),
    "--cloning-weight -1": ("at least 0",),
    "--cloning-steps 0": ("at least 1",),
    "--num-demos 4": (r"\b3\b",),
    "--seed -1": ("at least 0",),
}
SPACES = {
    "UnboundedActions-v0": gym.spaces.Box(-np.inf, np.inf, (2,)), "HalfBoundedActions-v0": gym.spaces.Box(0, np.inf, (2,)),
    "TwoAxesActions-v0": gym.spaces.Box(-1, 1, (2, 2)), "WholeActions-v0": gym.spaces.Box(0, 9, (2,), np.int64),
    "NoRangeActions-v0": gym.spaces.Box(1, 1, (2,)), "ManyActions-v0": gym.spaces.MultiDiscrete([2, 3]),
    "HugeActions-v0": gym.spaces.Box(np.finfo(np.float32).min, np.finfo(np.float32).max, (2,)),
    "NumberObservations-v0": gym.spaces.Box(-1, 1, (2,)),
}


class Still(gym.Env):
    """An environment that is asked for its spaces alone."""

    def __init__(self, action_space, obs_shape=(3,), render_mode=None):
        self.action_space, self.observation_space = action_space, gym.spaces.Box(-1, 1, obs_shape)


for name, space in SPACES.items():
    shape = () if name == "NumberObservations-v0" else (3,)
    gym.register(name, entry_point=Still, kwargs={"action_space": space, "obs_shape": shape})
gym.register("NeedsMore-v0", entry_point=Still)


@pytest.mark.parametrize("flags", BAD_CONTINUOUS_FLAGS)
def test_bad_flag_continuous(flags, tmp_path, capsys):
    path = write(tmp_path / "demos.npz", C)
    flag, value = flags.split()
    argv = [*TINY[iq_continuous], "--out-dir", tmp_path / "runs", "--demos", path, flag, value]
    refused(iq_continuous, capsys, tmp_path, argv, flag, *BAD_CONTINUOUS_FLAGS[flags], path=path)


# --------------------------------------------------------------------------------- --resume and --evaluate
@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Finished tiny runs, not to be changed: of this script, of it elsewhere, and of another."""
    folder = tmp_path_factory.mktemp("finished")
    cartpole = write(folder / "cartpole.npz", demonstrations())
    acrobot = edited(D, observations=np.repeat(D["observations"][:, :3], 2, axis=1), env_id=np.array("Acrobot-v1"))
    acrobot = write(folder / "acrobot.npz", acrobot)
    frames = write(folder / "frames.npz", F)
    pendulum = write(folder / "pendulum.npz", continuous_demonstrations())
    for module, name, flags, demos in ((iq_discrete, "CartPole", (), cartpole), (iq_atari, "Pong", (), frames),
                                       (iq_discrete, "Acrobot", ("--env-id", "Acrobot-v1"), acrobot),
                                       (iq_continuous, "Pendulum", (), pendulum)):
        assert train(module, folder, *flags, "--run-name", name, demos=demos) == 0
    return {name: folder / "runs" / name for name in ("CartPole", "Acrobot", "Pong", "Pendulum")}


@pytest.fixture
def run_dir(runs, tmp_path) -> Path:
    """A copy of the CartPole run."""
    return shutil.copytree(runs["CartPole"], tmp_path / "runs/copy")


def refused_resume(capsys, folder: Path, run_dir: Path, *patterns: str, flags=()) -> None:
    refused(iq_discrete, capsys, folder, ["--resume", run_dir, *flags], run_dir, *patterns)


def test_resume_continues(run_dir, capsys):
    """The control for the refusals below."""
    assert iq_discrete.main(["--resume", str(run_dir), "--total-timesteps", "9"]) == 0
    assert " steps=9 " in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("flags, old", [
    ("--learning-rate 0.5", r"0\.001"), ("--seed 7", r"\b1\b"), ("--env-id Acrobot-v1", "CartPole-v1"),
    ("--num-demos 2", r"\b0\b"), ("--objective bc", r"\biq\b"), ("--demos other.npz", r"cartpole\.npz"),
    ("--divergence tv", "chi2"), ("--hidden-size 9", r"\b4\b"), ("--num-envs 2", r"\b1\b"),
])
def test_resume_keeps_the_settings(flags, old, run_dir, tmp_path, capsys):
    flag, value = flags.split()
    refused_resume(capsys, tmp_path, run_dir, flag, re.escape(value), old, flags=[flag, value])


def test_resume_takes_the_first_commands_flags(runs, run_dir, tmp_path, capsys):
    """`--out-dir` and `--run-name` may name the same place in other words; another place is refused."""
    where = ["--out-dir", str(run_dir.parent / "x" / ".."), "--run-name", run_dir.name]
    (run_dir.parent / "x").mkdir()
    assert iq_discrete.main(["--resume", str(run_dir), *where, "--total-timesteps", "9"]) == 0
    refused_resume(capsys, tmp_path, run_dir, "--run-name", "other", flags=["--run-name", "other"])


@pytest.mark.parametrize("damage", ["cut", "semicolons"])
def test_resume_with_a_damaged_csv(damage, run_dir, tmp_path, capsys):
    path = run_dir / "metrics.csv"
    path.write_text(path.read_text() + "4" if damage == "cut" else path.read_text().replace(",", ";"))
    refused_resume(capsys, tmp_path, run_dir, r"metrics\.csv cannot be read", flags=["--total-timesteps", "9"])


ANOTHER = [(iq_discrete, "Pong"), (iq_atari, "CartPole"), (iq_continuous, "CartPole"), (iq_discrete, "Pendulum")]
OWNER = {"CartPole": iq_discrete, "Pong": iq_atari, "Pendulum": iq_continuous}


@pytest.mark.parametrize("module, name", ANOTHER)
def test_resume_of_another_script(module, name, runs, tmp_path, capsys):
    run_dir = shutil.copytree(runs[name], tmp_path / "runs/copy")
    refused(module, capsys, tmp_path, ["--resume", run_dir], run_dir, "--resume", OWNER[name].SCRIPT, module.SCRIPT,
            path=run_dir)


@pytest.mark.parametrize("flags, old", [
    ("--actor-lr 0.5", "3e-05"), ("--preset paper", "ours"), ("--env-id Hopper-v5", "Pendulum-v1"),
    ("--learning-starts 1", r"\b2\b"), ("--cloning-weight 1.0", r"\b0\.0\b"),
])
def test_resume_keeps_the_settings_continuous(flags, old, runs, tmp_path, capsys):
    run_dir = shutil.copytree(runs["Pendulum"], tmp_path / "runs/copy")
    flag, value = flags.split()
    refused(iq_continuous, capsys, tmp_path, ["--resume", run_dir, flag, value], run_dir, flag, re.escape(value), old)


@pytest.mark.parametrize("name", ["checkpoint.pt", "args.json"])
def test_resume_without_a_file(name, run_dir, tmp_path, capsys):
    (run_dir / name).unlink()
    refused_resume(capsys, tmp_path, run_dir, "--resume", re.escape(name))


def test_resume_of_nothing(tmp_path, capsys):
    refused_resume(capsys, tmp_path, tmp_path / "runs/nothing", "--resume", r"checkpoint\.pt|no such")


@pytest.mark.parametrize("kind", ["cut-off", "text", "empty", "payload", "another environment", "another thing"])
def test_resume_with_a_bad_checkpoint(kind, runs, run_dir, tmp_path, capsys):
    path, marker = run_dir / "checkpoint.pt", tmp_path / "executed"
    raw = path.read_bytes()
    if kind == "payload":
        torch.save({"network": Payload(marker)}, path)
    elif kind == "another environment":
        shutil.copy(runs["Acrobot"] / "checkpoint.pt", path)
    elif kind == "another thing":
        torch.save({"weights": torch.zeros(3)}, path)
    else:
        path.write_bytes({"cut-off": raw[: len(raw) // 2], "text": b"a checkpoint", "empty": b""}[kind])
    refused_resume(capsys, tmp_path, run_dir, r"checkpoint")
    assert not marker.exists()


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}", '{"script": "iq_discrete", "no_such_setting": 1}'],
                         ids=["empty", "cut-off", "a list", "no script", "unknown setting"])
def test_resume_with_bad_settings(text, run_dir, tmp_path, capsys):
    (run_dir / "args.json").write_text(text)
    refused_resume(capsys, tmp_path, run_dir, r"args\.json")


def test_resume_when_the_demonstrations_are_gone(runs, tmp_path, capsys):
    run_dir = shutil.copytree(runs["CartPole"], tmp_path / "runs/copy")
    settings = json.loads((run_dir / "args.json").read_text())
    (run_dir / "args.json").write_text(json.dumps(settings | {"demos": str(tmp_path / "gone.npz")}))
    refused(iq_discrete, capsys, tmp_path, ["--resume", run_dir], tmp_path / "gone.npz", "--demos", "no such file")


def test_evaluate_plays(runs, capsys):
    """The control for the refusals below."""
    assert iq_discrete.main(["--evaluate", str(runs["CartPole"] / "model.pt"), "--eval-episodes", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("final eval_return=")


@pytest.mark.parametrize("kind", ["missing", "folder", "cut-off", "text", "empty", "payload", "tensor", "list",
                                  "checkpoint"])
def test_evaluate_what_is_no_model(kind, runs, tmp_path, capsys):
    path, marker = tmp_path / "model.pt", tmp_path / "executed"
    raw = (runs["CartPole"] / "model.pt").read_bytes()
    if kind == "folder":
        path.mkdir()
    elif kind == "checkpoint":
        shutil.copy(runs["CartPole"] / "checkpoint.pt", path)
    elif kind in ("payload", "tensor", "list"):
        torch.save({"payload": {"script": Payload(marker)}, "tensor": torch.zeros(3), "list": [1]}[kind], path)
    elif kind != "missing":
        path.write_bytes({"cut-off": raw[: len(raw) // 2], "text": b"a model", "empty": b""}[kind])
    refused(iq_discrete, capsys, tmp_path, ["--evaluate", path], path)
    assert not marker.exists()


@pytest.mark.parametrize("module, name", ANOTHER)
def test_evaluate_a_model_of_another_script(module, name, runs, tmp_path, capsys):
    path = Path(shutil.copy(runs[name] / "model.pt", tmp_path))
    refused(module, capsys, tmp_path, ["--evaluate", path], path, OWNER[name].SCRIPT)


@pytest.mark.parametrize("module, name, given", [
    (iq_discrete, "CartPole", "Acrobot-v1"), (iq_discrete, "Acrobot", "CartPole-v1"),  # the second is the default
    (iq_continuous, "Pendulum", "Hopper-v5"), (iq_continuous, "Pendulum", "HalfCheetah-v5")])
def test_evaluate_a_model_of_another_environment(module, name, given, runs, tmp_path, capsys):
    """`--env-id` says one thing and the model another."""
    path = Path(shutil.copy(runs[name] / "model.pt", tmp_path))
    refused(module, capsys, tmp_path, ["--evaluate", path, "--env-id", given, "--eval-episodes", "1"], path, name, given)


@pytest.mark.parametrize("kind", ["missing", "cut-off", "text", "payload", "list", "checkpoint"])
def test_evaluate_what_is_no_actor_and_critic(kind, runs, tmp_path, capsys):
    path, marker = tmp_path / "model.pt", tmp_path / "executed"
    raw = (runs["Pendulum"] / "model.pt").read_bytes()
    if kind == "checkpoint":
        shutil.copy(runs["Pendulum"] / "checkpoint.pt", path)
    elif kind in ("payload", "list"):
        torch.save({"script": Payload(marker)} if kind == "payload" else [1], path)
    elif kind != "missing":
        path.write_bytes(raw[: len(raw) // 2] if kind == "cut-off" else b"a model")
    refused(iq_continuous, capsys, tmp_path, ["--evaluate", path], path)
    assert not marker.exists()


# ------------------------------------------------------------------------------------- as users run them
def run_script(script: Path, *flags) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, str(script), *map(str, flags)], capture_output=True, text=True,
                          timeout=120, env=environment, cwd=script.parent)


@pytest.mark.parametrize("module, words", [
    (iq_discrete, ["observations", "actions", "terminations", "truncations"]),
    (iq_atari, ["seeds", "actions", "returns"]),
    (iq_continuous, ["observations", "actions", "terminations", "truncations"]),
], ids=["discrete", "atari", "continuous"])
def test_script_copied_alone_has_no_demonstrations(module, words, tmp_path):
    script = Path(shutil.copy(ROOT / f"{module.SCRIPT}.py", tmp_path))
    # MuJoCo has a warning of its own about HalfCheetah's model, which is iq_continuous.py's default.
    env = ["--env-id", "Pendulum-v1"] if module is iq_continuous else []
    result = run_script(script, "--total-timesteps", 1, *env)
    assert result.returncode == 2 and result.stderr.startswith(f"{module.SCRIPT}.py: --demos"), result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    for word in [*words, "episode_lengths", "env_id", "npz", "Minari"]:
        assert word in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == [script.name]


def test_pickled_content_from_the_shell(tmp_path):
    marker = tmp_path / "executed"
    data = edited(D, actions=np.array([Payload(marker)] * STEPS, dtype=object))
    path = write(tmp_path / "demos.npz", data)
    result = run_script(ROOT / "iq_discrete.py", "--demos", path, "--out-dir", tmp_path / "runs")
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1 and str(path) in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["demos.npz"]  # neither a run nor the payload's file
