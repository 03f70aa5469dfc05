"""Whole runs of the scripts with tiny settings: outputs, exits, resume, evaluation, and what training never reads."""
import csv
import dataclasses
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from moviepy import VideoFileClip

import iq_atari
import iq_continuous
import iq_discrete
import iq_ilo

MODULES = {"iq_discrete": iq_discrete, "iq_atari": iq_atari, "iq_continuous": iq_continuous}
SCRIPTS = ["iq_discrete", "iq_atari", "iq_continuous", "iq_offline", "iq_ilo"]
STEPS, UPDATES = ({"iq_discrete": 300, "iq_atari": 64, "iq_continuous": 300},
                  {"iq_discrete": 300, "iq_atari": 12, "iq_continuous": 280})  # of `command`
ROOT = Path(__file__).parent.parent
FINAL = re.compile(r"final eval_return=(\S+) std=(\S+) episodes=(\d+) expert=(\S+) random=(\S+) normalized=(\S+) "
                   r"steps=(\d+) updates=(\d+) seconds=(\S+) run_dir=(\S+)")


def frame_demos(path: Path) -> Path:
    """Demonstrations of Pong as frames, of noise: what they show does not matter here."""
    rng = np.random.default_rng(0)
    np.savez(path, observations=rng.integers(0, 255, (42, 84, 84), np.uint8), actions=rng.integers(0, 6, 40),
             terminations=np.arange(40) % 20 == 19, truncations=np.zeros(40, bool), episode_lengths=np.array([20, 20]),
             env_id=np.array("PongNoFrameskip-v4"))
    return path


@pytest.fixture(scope="session")
def frames(tmp_path_factory):
    return frame_demos(tmp_path_factory.mktemp("frames") / "pong.npz")


def pendulum_demos(path: Path, episodes: int = 2, length: int = 50) -> Path:
    """Demonstrations of Pendulum cut short, by a weak controller: what they show does not matter here."""
    env, parts = gym.make("Pendulum-v1"), {"observations": [], "actions": [], "rewards": []}
    for seed in range(episodes):
        parts["observations"].append(env.reset(seed=seed)[0])
        for _ in range(length):
            obs = parts["observations"][-1]
            action = np.clip([-obs[1] - 0.3 * obs[2]], -2, 2).astype(np.float32)
            obs, reward, *_ = env.step(action)
            for name, value in (("observations", obs), ("actions", action), ("rewards", reward)):
                parts[name].append(value)
    ends = np.arange(1, episodes * length + 1) % length == 0
    np.savez(path, **{name: np.array(values, np.float32) for name, values in parts.items()}, terminations=ends & False,
             truncations=ends, episode_lengths=np.full(episodes, length), env_id=np.array("Pendulum-v1"))
    return path


@pytest.fixture(scope="session")
def pendulum(tmp_path_factory):
    return pendulum_demos(tmp_path_factory.mktemp("pendulum") / "pendulum.npz")


@pytest.fixture
def command(frames, pendulum, tmp_path):
    """The tiny command line of a script."""
    def make(script, *more):
        own = {"iq_discrete": "--total-timesteps 300 --eval-every 100 --eval-episodes 3 --num-demos 2 --subsample-freq 20",
               "iq_atari": f"--demos {frames} --num-demos 2 --pretrain-updates 6 --total-timesteps 64 --num-envs 2 "
                           "--batch-size 4 --buffer-size 200 --eval-every 0 --updates-per-step 0.1",
               "iq_continuous": f"--demos {pendulum} --env-id Pendulum-v1 --total-timesteps 300 --learning-starts 20 "
                                "--num-demos 2 --batch-size 8 --hidden-size 8 --buffer-size 1000 --eval-every 100 "
                                "--eval-episodes 3"}[script]
        return [*own.split(), "--out-dir", str(tmp_path), "--run-name", "run", *more]
    return make


def run(script, arguments, cwd=ROOT, path=None, **environment):
    return subprocess.run([sys.executable, path or ROOT / f"{script}.py", *arguments], cwd=cwd, text=True,
                          capture_output=True, env=os.environ | environment, timeout=300)


def rows(run_dir):
    with open(Path(run_dir) / "metrics.csv") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("script", MODULES)
def test_a_script_copied_alone_trains_and_leaves_its_outputs(script, command, tmp_path):
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(ROOT / f"{script}.py", alone)
    given = script != "iq_discrete"  # --demos, the first of its flags
    missing = run(script, command(script)[2:] if given else command(script), alone, alone / f"{script}.py")
    assert missing.returncode == 2 and "--demos" in missing.stderr and "Traceback" not in missing.stderr
    assert not (tmp_path / "run").exists()
    demos = [] if given else ["--demos", str(ROOT / "demos" / "CartPole-v1.npz")]
    done = run(script, command(script, *demos), alone, alone / f"{script}.py")
    assert done.returncode == 0, done.stderr
    final = FINAL.fullmatch(done.stdout.splitlines()[-1]).groups()
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"args.json", "metrics.csv", "model.pt", "checkpoint.pt", f"{script}.py"}
    last = rows(tmp_path / "run")[-1]
    assert int(final[6]) == int(last["step"]) == STEPS[script]
    assert int(final[7]) == int(last["updates"]) == UPDATES[script]
    assert float(final[0]) == pytest.approx(float(last["eval_return_mean"]), nan_ok=True)
    assert float(final[1]) == pytest.approx(float(last["eval_return_std"]), nan_ok=True)
    assert float(final[8]) == float(last["seconds"])
    assert "steps_per_second" in last and np.isfinite(float(last["loss"]))
    saved = torch.load(tmp_path / "run" / "model.pt", weights_only=True)
    module, path = MODULES[script], str(tmp_path / "run" / "model.pt")
    if script == "iq_continuous":
        actor, critic, _ = module.load_model(path)
        obs, networks = torch.ones(5, 3), (critic, actor)
        action = actor.act(obs)
    else:
        networks = module.load_model(path)[:1]
        obs = torch.ones((5, 4) if script == "iq_discrete" else (5, 4, 84, 84))
        action = torch.zeros(5, dtype=torch.int64)
    assert {"temperature", "gamma"} <= saved.keys() and any("sizes" in name for name in saved)
    reward = module.implied_reward(*networks, obs, action, obs, torch.zeros(5), saved["gamma"], saved["temperature"])
    assert reward.shape == (5,) and torch.isfinite(reward).all()
    exists = run(script, command(script, *demos), alone, alone / f"{script}.py")
    assert exists.returncode == 2 and "exists" in exists.stderr


def test_training_moves_every_parameter_of_actor_and_critic(command, tmp_path):
    iq_continuous.main(command("iq_continuous", "--eval-every", "0"))
    actor, critic, _ = iq_continuous.load_model(str(tmp_path / "run" / "model.pt"))
    stored = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    torch.manual_seed(1)
    fresh_actor = iq_continuous.Actor((3,), [-2.0], [2.0], 8)
    fresh_critic = iq_continuous.QNetwork((3,), 1, 8, iq_continuous.Args().layer_norm)
    for fresh, name, saved in ((fresh_actor, "actor", None), (fresh_critic, "critic", critic),
                               (fresh_critic, "target", None), (fresh_actor, "average", actor)):
        for key, before in fresh.named_parameters():
            assert (before != stored[name][key]).any(), (name, key)
            assert saved is None or torch.equal(saved.state_dict()[key], stored[name][key])


def test_training_moves_every_parameter(command, tmp_path):
    iq_discrete.main(command("iq_discrete", "--eval-every", "0"))
    trained, _ = iq_discrete.load_model(str(tmp_path / "run" / "model.pt"))
    torch.manual_seed(1)
    fresh = iq_discrete.QNetwork((4,), 2)
    for (name, before), after in zip(fresh.named_parameters(), trained.parameters()):
        assert (before != after).any(), name


@pytest.mark.parametrize("script", MODULES)
def test_same_seed_same_csv(script, command, tmp_path):
    module = MODULES[script]
    tables = []
    for name in ("one", "two"):
        assert module.main(command(script, "--run-name", name)) == 0
        tables.append([{k: v for k, v in row.items() if "second" not in k} for row in rows(tmp_path / name)])
    assert str(tables[0]) == str(tables[1])


class NaNReward(gym.RewardWrapper):
    def reward(self, reward):
        return np.nan


def make_poisoned(render_mode=None):
    return NaNReward(gym.make("CartPole-v1", render_mode=render_mode))


@pytest.mark.parametrize("flags", [[], ["--value-loss", "v0"], ["--objective", "bc"]])
def test_a_nan_reward_changes_nothing_discrete(command, tmp_path, flags):
    gym.register("CartPole-v70", entry_point=lambda render_mode=None: gym.make("CartPole-v1", render_mode=render_mode))
    gym.register("CartPole-v71", entry_point=make_poisoned)
    demos = ["--demos", str(ROOT / "demos" / "CartPole-v1.npz"), "--eval-every", "0", *flags]
    for env in ("CartPole-v70", "CartPole-v71"):
        assert iq_discrete.main(command("iq_discrete", "--env-id", env, "--run-name", env, *demos)) == 0
    one, other = (torch.load(tmp_path / env / "model.pt")["network"] for env in ("CartPole-v70", "CartPole-v71"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("flags", [[], ["--value-loss", "v0", "--pretrain-updates", "20", "--cloning-weight", "0.1"]])
def test_a_nan_reward_changes_nothing_continuous(command, tmp_path, flags):
    def pendulum(poisoned):
        return lambda render_mode=None: (NaNReward if poisoned else gym.Wrapper)(gym.make("Pendulum-v1"))

    gym.register("Pendulum-v70", entry_point=pendulum(False), max_episode_steps=30)
    gym.register("Pendulum-v71", entry_point=pendulum(True), max_episode_steps=30)
    for env in ("Pendulum-v70", "Pendulum-v71"):
        assert iq_continuous.main(command("iq_continuous", "--env-id", env, "--run-name", env, "--eval-every", "0",
                                          *flags)) == 0
    one, other = (torch.load(tmp_path / env / "checkpoint.pt") for env in ("Pendulum-v70", "Pendulum-v71"))
    for name in ("actor", "critic", "target", "average"):
        assert all(torch.equal(one[name][key], other[name][key]) for key in one[name])
    for field, same in zip(one["replay"]["storage"], other["replay"]["storage"]):
        assert torch.equal(field, same)


def test_a_nan_reward_changes_nothing_atari(command, tmp_path, monkeypatch):
    assert iq_atari.main(command("iq_atari", "--run-name", "clean")) == 0
    step = iq_atari.AtariVectorEnv.step

    def poisoned(self, actions):
        obs, reward, *rest = step(self, actions)
        return obs, reward * np.nan, *rest

    monkeypatch.setattr(iq_atari.AtariVectorEnv, "step", poisoned)
    assert iq_atari.main(command("iq_atari", "--run-name", "poisoned")) == 0
    one, other = (torch.load(tmp_path / name / "model.pt")["network"] for name in ("clean", "poisoned"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("script", MODULES)
def test_resume_writes_the_rows_after_the_checkpoint_anew(script, command, tmp_path, capsys):
    module = MODULES[script]
    assert module.main(command(script)) == 0
    run_dir = tmp_path / "run"
    before = rows(run_dir)
    with open(run_dir / "metrics.csv", "a") as file:  # rows that a crash left behind the checkpoint
        file.write("99999,99999" + ",0" * (len(before[0]) - 2) + "\n")
    more = str(STEPS[script] + 200)
    assert module.main(["--resume", str(run_dir), "--total-timesteps", more]) == 0
    after = rows(run_dir)
    assert [r["step"] for r in after[: len(before)]] == [r["step"] for r in before]
    assert int(after[-1]["step"]) == int(more) and len(after) > len(before)
    assert int(FINAL.search(capsys.readouterr().out.splitlines()[-1]).group(7)) == int(more)
    order = [(int(r["step"]), int(r["updates"])) for r in after]
    assert order == sorted(set(order)) and (99999, 99999) not in order


def test_resume_of_a_finished_run_changes_nothing(command, tmp_path):
    assert iq_discrete.main(command("iq_discrete")) == 0
    before = rows(tmp_path / "run")
    assert iq_discrete.main(["--resume", str(tmp_path / "run")]) == 0
    assert [r["eval_return_mean"] for r in rows(tmp_path / "run")] == [r["eval_return_mean"] for r in before]


def test_resume_of_a_run_that_cannot_be_written_to_is_bad_input(command, tmp_path, monkeypatch, capsys):
    assert iq_discrete.main(command("iq_discrete")) == 0
    access = os.access  # root may write anywhere
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path / "run" and access(path, mode))
    assert iq_discrete.main(["--resume", str(tmp_path / "run")]) == 2
    assert f"--resume {tmp_path / 'run'}: it cannot be written to" in capsys.readouterr().err


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_leaves_a_checkpoint_and_says_how_to_go_on(command, tmp_path, number, status):
    arguments = command("iq_discrete", "--total-timesteps", "10000000", "--eval-every", "500")
    process = subprocess.Popen([sys.executable, ROOT / "iq_discrete.py", *arguments], stdout=subprocess.PIPE, text=True,
                               stderr=subprocess.PIPE)
    deadline = time.time() + 120
    while not (tmp_path / "run" / "metrics.csv").exists() and time.time() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert "Traceback" not in err
    words = out.splitlines()[-1].split("python ")[1].split()
    assert words[:2] == [str(ROOT / "iq_discrete.py"), "--resume"]  # the script as it was called
    step = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"]
    assert iq_discrete.main([*words[1:], "--total-timesteps", str(step + 50)]) == 0


def test_a_run_that_is_terminated_while_it_loads_exits_with_143(command):
    process = subprocess.Popen([sys.executable, ROOT / "iq_discrete.py", *command("iq_discrete")], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    assert "loading" in process.stdout.readline()
    process.terminate()
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 143 and "Traceback" not in err


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_evaluation_that_a_signal_cuts_off_is_made_on_resuming(script, command, tmp_path, monkeypatch):
    """No row is lost, and its losses are those of the update before; so is the last row's when that one is cut off."""
    module = importlib.import_module(script)
    lengths = {"iq_offline": "--env-id CartPole-v1 --total-updates 300 --eval-every 100",
               "iq_ilo": "--total-timesteps 300 --learning-starts 20 --batch-size 4 --reward-updates 1 --eval-every 100",
               "iq_atari": "--pretrain-updates 300 --total-timesteps 0 --eval-every 100 --batch-size 1"}
    if script in MODULES:
        flags = command(script, *lengths.get(script, "").split())
    else:
        flags = [*lengths[script].split(), "--num-demos", "2", "--out-dir", str(tmp_path)]
    calls = []

    def evaluate(*_):
        calls.append(len(calls))
        if len(calls) == 2 + 3 or len(calls) == 4 + 3:  # of the second run the second, and the last
            os.kill(os.getpid(), signal.SIGINT)
        return np.zeros(3)

    monkeypatch.setattr(module, "evaluate", evaluate)
    assert module.main([*flags, "--run-name", "whole"]) == 0
    arguments = [*flags, "--run-name", "cut"]
    for _ in range(2):
        with pytest.raises(SystemExit) as exit:
            module.main(arguments)
        assert exit.value.code == 130
        arguments = ["--resume", str(tmp_path / "cut")]
    assert module.main(arguments) == 0 and len(calls) == 3 + 2 + 2 + 1
    whole, cut = rows(tmp_path / "whole"), rows(tmp_path / "cut")
    assert [(r["step"], r["updates"]) for r in cut] == [(r["step"], r["updates"]) for r in whole]
    assert [name for r in cut for name, value in r.items() if (value == "nan") != (whole[0][name] == "nan")
            and name != "steps_per_second"] == []  # of which a row that is made up for has none
    if script == "iq_offline":  # the others begin a new episode
        times = ("seconds", "updates_per_second", "steps_per_second")
        assert [{k: v for k, v in r.items() if k not in times} for r in cut] == [
            {k: v for k, v in r.items() if k not in times} for r in whole]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_signal_while_the_random_return_is_measured_leaves_no_directory(script, command, tmp_path, monkeypatch):
    """One without a checkpoint could be neither resumed nor begun anew under its name."""
    module = importlib.import_module(script)

    def random_return(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "random_return", random_return)
    own = {"iq_atari": ("--eval-every", "1"), "iq_offline": ("--env-id", "CartPole-v1")}.get(script, ())
    tiny = command(script) if script in MODULES else ["--out-dir", str(tmp_path), "--run-name", "run"]
    assert module.main([*tiny, *own]) == 130 and not (tmp_path / "run").exists()


def test_non_finite_training_exits_with_1_and_keeps_the_checkpoint(command, tmp_path, capsys):
    assert iq_discrete.main(command("iq_discrete")) == 0
    checkpoint = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    arguments = command("iq_discrete", "--run-name", "bad", "--learning-rate", "1e30")
    with pytest.raises(SystemExit) as exit:
        iq_discrete.main(arguments)
    assert exit.value.code == 1 and "--learning-rate" in capsys.readouterr().err
    assert not (tmp_path / "bad" / "checkpoint.pt").exists()
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == checkpoint


def test_a_checkpoint_that_fails_halfway_leaves_the_last_good_one(tmp_path, monkeypatch):
    iq_discrete.save_atomically({"step": 1}, tmp_path / "checkpoint.pt")

    def torn(content, path):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(KeyboardInterrupt):
        iq_discrete.save_atomically({"step": 2}, tmp_path / "checkpoint.pt")
    assert torch.load(tmp_path / "checkpoint.pt") == {"step": 1}


@pytest.mark.parametrize("script", MODULES)
def test_evaluate_plays_a_saved_model_and_records_it(script, command, tmp_path, capsys):
    module = MODULES[script]
    episodes = ["--eval-episodes", "1" if script == "iq_atari" else "3"]
    assert module.main(command(script)) == 0
    trained = FINAL.search(capsys.readouterr().out.splitlines()[-1]).groups()
    model = str(tmp_path / "run" / "model.pt")
    assert module.main(["--evaluate", model, "--capture-video", *episodes]) == 0
    played = FINAL.search(capsys.readouterr().out.splitlines()[-1]).groups()
    if script != "iq_atari":
        assert played[:2] == trained[:2]
    assert (tmp_path / "run" / "videos" / "evaluate.mp4").stat().st_size > 1000
    fps = {"iq_discrete": 50, "iq_atari": 15, "iq_continuous": 30}[script]  # the environment's own
    assert VideoFileClip(str(tmp_path / "run" / "videos" / "evaluate.mp4")).fps == fps
    for other in MODULES.values():
        assert other is module or other.main(["--evaluate", model]) == 2


def test_track_logs_offline_with_the_video(command, tmp_path):
    done = run("iq_discrete", command("iq_discrete", "--track", "--capture-video"), tmp_path, WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr
    assert FINAL.fullmatch(done.stdout.splitlines()[-1])
    (log,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"eval_return_mean" in log.read_bytes()
    video = tmp_path / "run" / "videos" / "step_300.mp4"
    assert video.stat().st_size > 1000 and VideoFileClip(str(video)).fps == 50  # the environment's own
    more = ["--resume", str(tmp_path / "run"), "--total-timesteps", "400"]
    assert run("iq_discrete", more, tmp_path, WANDB_MODE="offline").returncode == 0
    logs = {path.parent.name: path.stem for path in (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")}
    assert len(logs) == 2 and set(logs.values()) == {log.stem}  # both of one run


BOOLEANS = [(script, f.name) for script in ("iq_discrete", "iq_continuous", "iq_atari")
            for f in dataclasses.fields(MODULES[script].Args)
            if f.type is bool and f.name not in ("track", "compile", "capture_video")]


@pytest.mark.parametrize("script, name", BOOLEANS)
def test_every_switch_both_ways(script, name, command, tmp_path):
    grid = name in ("random_walls", "random_start", "random_goal", "stay_action")
    flag = name.replace("_", "-")
    for value in (f"--{flag}", f"--no-{flag}"):
        arguments = command(script, "--run-name", value.strip("-"), value)
        if grid:
            arguments += ["--env-id", "GridWorld-v0", "--demos", str(ROOT / "demos" / "GridWorld-v0.npz"),
                          "--network", "mlp", "--pretrain-updates", "0"]
        assert MODULES[script].main(arguments) == 0
        assert json.loads((tmp_path / value.strip("-") / "args.json").read_text())[name] is not value.startswith("--no")
        assert (tmp_path / value.strip("-") / "model.pt").exists() is (name != "save_model" or not value.startswith("--no"))


@pytest.mark.parametrize("flags", ["--divergence tv", "--divergence kl", "--divergence forward_kl", "--divergence js",
                                   "--divergence hellinger", "--divergence w1", "--divergence kl --chi2-alpha 1",
                                   "--value-loss v0", "--value-loss v0_expert", "--value-loss value_expert",
                                   "--value-loss value_expert --chi2-rows expert", "--temperature 0",
                                   "--target-rate 0.01 --average-rate 0.1", "--num-envs 3 --updates-per-step 0.5",
                                   "--obs-noise 0.01 --standardize-obs", "--pretrain-updates 50", "--objective bc"])
def test_every_form_of_the_objective_trains(flags, command, tmp_path):
    assert iq_discrete.main(command("iq_discrete", *flags.split(), "--eval-every", "0")) == 0
    last = rows(tmp_path / "run")[-1]
    assert all(np.isfinite(float(v)) for k, v in last.items() if not k.startswith("eval"))
    assert ("chi2_term" in last) is (("divergence" not in flags or "chi2-alpha" in flags) and "bc" not in flags)


@pytest.mark.parametrize("flags, updates", [
    *((f"--value-loss {form} --chi2-rows {rows}", 280) for form in ("value", "value_expert", "v0", "v0_expert")
      for rows in ("expert", "both")),
    ("--preset paper", 280), ("--temperature 0", 280), ("--average-rate 0", 280), ("--target-rate 1", 280),
    ("--num-envs 3 --updates-per-step 0.5", 140), ("--updates-per-step 2", 560), ("--buffer-size 50", 280),
    ("--pretrain-updates 50 --cloning-weight 0.1 --cloning-steps 100", 330), ("--subsample-freq 20", 280),
    ("--total-timesteps 0 --pretrain-updates 30", 30), ("--learning-starts 1280", 270),  # a tenth of the run's steps
])
def test_every_form_of_the_actor_critic_trains(flags, updates, command, tmp_path):
    assert iq_continuous.main(command("iq_continuous", *flags.split(), "--eval-every", "0")) == 0
    last = rows(tmp_path / "run")[-1]
    assert all(np.isfinite(float(v)) for k, v in last.items() if not k.startswith("eval"))
    assert int(last["updates"]) == updates and ("cloning_loss" in last) is ("pretrain" in flags)
    assert ("loss" in last) is ("--total-timesteps 0" not in flags)


class Clock(gym.Env):
    """Observations `[episode, time]`, actions in the units of two different ranges, which it notes as they come."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gym.spaces.Box(np.array([-0.4, 0], np.float32), np.array([0.4, 3], np.float32))
    received: list = []

    def __init__(self, ends_at: int | None = None, render_mode: str | None = None):
        self.episode, self.ends_at = 0, ends_at

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.time = self.episode + 1, 0
        return np.array([self.episode, 0], np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.received.append(action.copy())
        self.time += 1
        return np.array([self.episode, self.time], np.float32), 0.0, self.time == self.ends_at, False, {}


gym.register("Clock-v0", entry_point=Clock, max_episode_steps=5)
gym.register("Clock-v1", entry_point=Clock, max_episode_steps=5, kwargs={"ends_at": 3})


def clock_demos(path: Path, **more) -> Path:
    actions = np.tile(np.array([[0.1, 2.0], [-0.4, 0.0], [0.4, 3.0], [0.3, 1.5], [0.0, 0.5]], np.float32), (2, 1))
    observations = np.array([[e, t] for e in (70, 80) for t in range(6)], np.float32)
    ends = np.arange(10) % 5 == 4
    np.savez(path, **({"observations": observations, "actions": actions, "terminations": ends & False, "truncations": ends,
                       "episode_lengths": np.array([5, 5]), "env_id": np.array("Clock-v0")} | more))
    return path


CLOCK = "--num-demos 2 --total-timesteps 24 --learning-starts 1 --batch-size 4 --hidden-size 4 --eval-every 0"


@pytest.mark.parametrize("module", [iq_continuous, iq_ilo])
@pytest.mark.parametrize("env, num_envs", [("Clock-v0", 1), ("Clock-v0", 3), ("Clock-v1", 1), ("Clock-v1", 2)])
def test_the_stored_next_observation_at_an_end_is_the_true_last_one(env, num_envs, module, tmp_path):
    """At a time limit it is not the next episode's first, and that row is not terminated."""
    demos, length = clock_demos(tmp_path / "clock.npz"), 5 if env == "Clock-v0" else 3
    Clock.received = []
    assert module.main([*CLOCK.split(), "--env-id", env, "--num-envs", str(num_envs), "--demos", str(demos),
                        "--out-dir", str(tmp_path), "--run-name", "run"]) == 0
    stored = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    obs, action, next_obs, terminated = stored["replay"]["storage"]
    assert len(obs) == stored["replay"]["written"] == 24
    assert torch.equal(next_obs[:, 0], obs[:, 0]) and torch.equal(next_obs[:, 1], obs[:, 1] + 1)
    assert set(obs[:, 1].tolist()) == set(range(length))
    assert torch.equal(terminated, (next_obs[:, 1] == 3).float() if env == "Clock-v1" else torch.zeros(24))
    initial = stored["initial"]["storage"][0]
    assert (initial[:, 1] == 0).all() and set(initial[:2, 0].tolist()) == {70, 80}
    assert len(initial) == 2 + num_envs + 24 // num_envs // length * num_envs
    # What is stored is [-1, 1], what the environment received is its own units.
    received = torch.as_tensor(np.array(Clock.received))
    torch.testing.assert_close(received, torch.tensor([0.0, 1.5]) + torch.tensor([0.4, 1.5]) * action)
    assert action.abs().max() <= 1 and action.std(0).max() > 0.1


@pytest.mark.parametrize("env", ["Clock-v0", "Clock-v1"])
def test_play_that_breaks_off_is_a_time_limit_to_the_replay(env, tmp_path):
    """The row before keeps its true next observation and is terminated only where the episode ended by itself."""
    demos = clock_demos(tmp_path / "clock.npz")
    assert iq_continuous.main([*CLOCK.split(), "--env-id", env, "--num-envs", "2", "--demos", str(demos), "--restart-rate",
                               "0.5", "--out-dir", str(tmp_path), "--run-name", "run"]) == 0
    stored = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    obs, _, next_obs, terminated = stored["replay"]["storage"]
    assert torch.equal(next_obs[:, 0], obs[:, 0]) and torch.equal(next_obs[:, 1], obs[:, 1] + 1)
    assert torch.equal(terminated, (next_obs[:, 1] == 3).float() if env == "Clock-v1" else torch.zeros(24))
    initial, starts = stored["initial"]["storage"][0][4:], obs[2:][obs[2:, 1] == 0]  # after the two that play began from
    assert 5 <= len(starts) < 22 and (initial[:, 1] == 0).all() and len(starts) <= len(initial) <= len(starts) + 2
    assert not Counter(starts[:, 0].tolist()) - Counter(initial[:, 0].tolist())
    for row in obs.view(-1, 2, 2).unbind(1):  # of one environment: on in time, or a new episode's start
        assert all(b[1] == 0 and b[0] == a[0] + 1 or b[1] == a[1] + 1 and b[0] == a[0] for a, b in zip(row, row[1:]))


@pytest.mark.parametrize("switch", ["--standardize-obs", "--no-standardize-obs"])
def test_statistics_are_the_demonstrations(switch, tmp_path):
    """Mean and deviation of the transitions used; a constant dimension has a floor; off, observations stay raw."""
    observations = np.array([[5, t] for _ in range(2) for t in range(6)], np.float32)
    demos = clock_demos(tmp_path / "clock.npz", observations=observations)
    assert iq_continuous.main([*CLOCK.split(), "--env-id", "Clock-v0", "--demos", str(demos), switch, "--out-dir",
                               str(tmp_path), "--run-name", "run"]) == 0
    actor, critic, _ = iq_continuous.load_model(str(tmp_path / "run" / "model.pt"))
    for network in (actor, critic):
        on = switch == "--standardize-obs"
        torch.testing.assert_close(network.standardize.mean, torch.tensor([5.0, 2.0] if on else [0.0, 0.0]))
        torch.testing.assert_close(network.standardize.std, torch.tensor([0.01, 2**0.5] if on else [1.0, 1.0]))
        seen = network.standardize(torch.tensor([[5.0, 100.0]]))
        torch.testing.assert_close(seen, torch.tensor([[0.0, 10.0] if on else [5.0, 100.0]]))


def test_a_saved_actor_acts_the_same_from_raw_observations(command, tmp_path, monkeypatch):
    """What evaluation used at the end of training is what model.pt holds."""
    used = []
    evaluate = iq_continuous.evaluate
    monkeypatch.setattr(iq_continuous, "evaluate", lambda actor, *more: used.append(actor) or evaluate(actor, *more))
    assert iq_continuous.main(command("iq_continuous")) == 0
    actor, *_ = iq_continuous.load_model(str(tmp_path / "run" / "model.pt"))
    obs = 5 * torch.randn(100, 3)
    assert torch.equal(actor.act(obs), used[-1].act(obs))
    assert not torch.allclose(actor.standardize.std, torch.ones(3))


@pytest.mark.parametrize("rate", ["0", "0.0005"])
def test_evaluations_while_cloning_are_of_the_clone(rate, command, tmp_path, monkeypatch):
    used = []
    monkeypatch.setattr(iq_continuous, "evaluate",
                        lambda actor, *_: used.append(actor and actor.act(torch.ones(1, 3)).item()) or np.zeros(3))
    assert iq_continuous.main(command("iq_continuous", "--total-timesteps", "0", "--pretrain-updates", "90", "--eval-every",
                                      "30", "--average-rate", rate)) == 0
    assert len({action for action in used if action is not None}) == 3


def test_the_cloning_weight_fades_to_zero(command, monkeypatch):
    weights, make_update = [], iq_continuous.make_update

    def noted(*parts):
        clone, update = make_update(*parts)
        return clone, lambda *tensors: weights.append(tensors[2].item()) or update(*tensors)

    monkeypatch.setattr(iq_continuous, "make_update", noted)
    assert iq_continuous.main(command("iq_continuous", "--cloning-weight", "0.5", "--cloning-steps", "100", "--eval-every",
                                      "0")) == 0
    assert weights == pytest.approx([0.5 * max(0, 1 - step / 100) for step in range(21, 301)])


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_learning_rates_fall_to_zero_over_the_last_share_of_the_run(share, command, tmp_path, monkeypatch):
    rates, tick = [], iq_continuous.Run.tick

    def noted(self, *clock):
        rates.append([self.parts[f"{name}_optimizer"].param_groups[0]["lr"].item() for name in ("actor", "critic")])
        tick(self, *clock)

    monkeypatch.setattr(iq_continuous.Run, "tick", noted)
    flags = f"--anneal-lr {share} --actor-lr 0.002 --critic-lr 0.004 --eval-every 0 --num-envs 7"
    assert iq_continuous.main(command("iq_continuous", *flags.split())) == 0
    assert iq_continuous.main(["--resume", str(tmp_path / "run"), "--total-timesteps", "700"]) == 0
    expected = [min(1, max(0, 1 - step / total) / share) for first, total in ((7, 300), (308, 700))
                for step in range(first, total + 7, 7)]  # a longer run raises them again
    np.testing.assert_allclose(rates, np.outer(expected, [0.002, 0.004]), rtol=1e-4, atol=1e-9)


def test_cloning_steps_no_environment(command, tmp_path, monkeypatch):
    monkeypatch.setattr(gym.vector.SyncVectorEnv, "step", lambda *_: pytest.fail("stepped"))
    assert iq_continuous.main(command("iq_continuous", "--total-timesteps", "0", "--pretrain-updates", "200", "--eval-every",
                                      "0", "--actor-lr", "0.01", "--batch-size", "200")) == 0
    losses = [float(row["cloning_loss"]) for row in rows(tmp_path / "run")]
    assert losses[-1] < losses[0] - 1


def test_resume_restores_the_replay_and_the_optimisers_steps(command, tmp_path):
    """On an environment that forgets: whole episodes lie on either side of the checkpoint."""
    demos = clock_demos(tmp_path / "clock.npz")
    flags = [*CLOCK.split(), "--env-id", "Clock-v0", "--demos", str(demos), "--out-dir", str(tmp_path)]
    assert iq_continuous.main([*flags, "--run-name", "run", "--total-timesteps", "20"]) == 0
    before = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert iq_continuous.main(["--resume", str(tmp_path / "run"), "--total-timesteps", "30"]) == 0
    after = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert before["replay"]["written"] == 20 and after["replay"]["written"] == 30
    for old, new in zip(before["replay"]["storage"], after["replay"]["storage"]):
        assert torch.equal(old, new[:20])
    assert after["critic_optimizer"]["state"][0]["step"] == after["updates"]
    assert after["actor_optimizer"]["state"][0]["step"] == after["updates"]


@pytest.mark.parametrize("flags", [["--critic-lr", "1e30"], ["--actor-lr", "1e30"]])
def test_non_finite_actor_critic_exits_with_1(flags, command, tmp_path, capsys, monkeypatch):
    """Before the environment is given a NaN, which some fail on, and with no checkpoint of NaNs."""
    step = gym.vector.SyncVectorEnv.step

    def strict(self, actions):
        assert np.isfinite(actions).all()
        return step(self, actions)

    monkeypatch.setattr(gym.vector.SyncVectorEnv, "step", strict)
    with pytest.raises(SystemExit) as exit:
        iq_continuous.main(command("iq_continuous", *flags, "--checkpoint-every", "1", "--eval-every", "0"))
    err = capsys.readouterr().err
    assert exit.value.code == 1 and flags[0] in err and len(err.strip().splitlines()) == 1
    stored = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert all(torch.isfinite(x).all() for name in ("actor", "critic") for x in stored[name].values())


def test_a_video_that_cannot_be_made_is_told_before_training(command, tmp_path, capsys, monkeypatch):
    def render(self):
        raise RuntimeError("no\ndisplay")

    monkeypatch.setattr(gym.Wrapper, "render", render)
    for script in ("iq_discrete", "iq_continuous"):
        assert MODULES[script].main(command(script, "--capture-video")) == 2
        err = capsys.readouterr().err
        assert "--capture-video" in err and "no display" in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_the_cnn_trains_on_the_grid(command, tmp_path):
    assert iq_discrete.main(command("iq_discrete", "--env-id", "GridWorld-v0", "--network", "cnn", "--hidden-size", "8",
                                    "--total-timesteps", "20", "--eval-every", "0")) == 0


@pytest.mark.parametrize("script, divergence", [("iq_discrete", "chi2"), ("iq_discrete", "w1"), ("iq_atari", "chi2")])
def test_compiled_and_eager_updates_agree(script, divergence):
    """With w1 the gradient penalty is differentiated twice; its interpolates are the same for both."""
    module = MODULES[script]
    torch.manual_seed(0)
    shape = (4,) if script == "iq_discrete" else (4, 84, 84)
    obs, next_obs = (torch.randint(0, 255, (8, *shape), dtype=torch.uint8) for _ in range(2))
    if script == "iq_discrete":
        obs, next_obs = obs / 255, next_obs / 255
    batch = module.Batch(obs, torch.randint(0, 2, (8,)), next_obs, torch.tensor([0.0, 1.0] * 4))
    results = []
    for compile in (False, True):
        torch.manual_seed(0)
        network = module.QNetwork(shape, 2) if script == "iq_discrete" else module.QNetwork(2)
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)
        update = module.make_update(network, None, None, optimizer, 4, module.Args(compile=compile, divergence=divergence))
        end_value = [torch.tensor(2.0)] if script == "iq_discrete" else []
        with torch._inductor.config.patch(fallback_random=True):
            terms = [update(batch, obs[:2], *end_value)["loss"].item() for _ in range(3)]
        assert not torch._dynamo.config.trace_autograd_ops  # left on, iq_continuous.py compiled after it goes wrong
        results.append((terms, [p.detach() for p in network.parameters()]))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4, abs=1e-6)
    for eager, compiled in zip(results[0][1], results[1][1]):
        torch.testing.assert_close(eager, compiled, rtol=1e-3, atol=1e-4)


class NoImage(gym.Wrapper):
    def render(self):
        return "words"


class NoDisplay(gym.Wrapper):
    def render(self):
        raise RuntimeError("no display")


@pytest.mark.parametrize("script, name", [("iq_discrete", "CartPole"), ("iq_offline", "CartPole"), ("iq_ilo", "CartPole"),
                                          ("iq_continuous", "Pendulum")])
def test_a_video_that_cannot_be_recorded_is_told_before_training(script, name, tmp_path, capsys, monkeypatch):
    module, made = importlib.import_module(script), f"{name}-v1"
    for version, wrapper in ((72, NoDisplay), (73, NoImage)):
        gym.register(f"{name}-v{version}", entry_point=lambda render_mode=None, wrapper=wrapper: wrapper(
            gym.make(made, render_mode=render_mode)))

    def refused(*more):
        arguments = ["--demos", str(ROOT / "demos" / f"{made}.npz"), "--out-dir", str(tmp_path), "--capture-video"]
        assert module.main([*arguments, *more]) == 2 and not list(tmp_path.iterdir())
        return capsys.readouterr().err

    assert "no display" in refused("--env-id", f"{name}-v72") and "no array" in refused("--env-id", f"{name}-v73")
    assert "--eval-every 0" in refused("--env-id", made, "--eval-every", "0")
    if script == "iq_offline":
        assert "--env-id" in refused()
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "moviepy" else find_spec(name))
    assert "pip install moviepy" in refused("--env-id", made)


@pytest.mark.parametrize("script", ["iq_continuous", "iq_offline", "iq_ilo"])
def test_more_obs_dims_than_entries_are_refused(script, tmp_path, capsys):
    flags = ["--env-id", "Pendulum-v1", "--obs-dims", "4", "--out-dir", str(tmp_path)]
    assert importlib.import_module(script).main(flags) == 2
    told = capsys.readouterr().err
    assert "--obs-dims 4" in told and "give --obs-dims 0" in told and not list(tmp_path.iterdir())


@pytest.mark.parametrize("script, flags", [("iq_continuous", "--total-timesteps 40 --learning-starts 10"),
                                           ("iq_offline", "--total-updates 20"),
                                           ("iq_ilo", "--total-timesteps 40 --learning-starts 10 --reward-updates 2")])
@pytest.mark.parametrize("standardize", ["--standardize-obs", "--no-standardize-obs"])
def test_entries_beyond_obs_dims_are_not_seen(script, flags, standardize, tmp_path):
    """Demonstrations whose third entry is another leave training as it is, and the trained policy is blind to it too. An
    observation is a row of a matrix here, whose entries count one after another."""
    module, space = importlib.import_module(script), gym.spaces.Box(-8.0, 8.0, (1, 3))
    gym.register("Pendulum-v74", entry_point=lambda: gym.wrappers.TransformObservation(
        gym.make("Pendulum-v1"), lambda obs: obs[None], space))
    with np.load(ROOT / "demos" / "Pendulum-v1.npz") as file:
        data = dict(file)
    data["observations"], policies = data["observations"][:, None], []
    for name, factor in (("one", 1.0), ("other", -0.5)):
        data["observations"][..., 2] *= factor
        np.savez(tmp_path / f"{name}.npz", **data)
        assert module.main(["--env-id", "Pendulum-v74", "--demos", str(tmp_path / f"{name}.npz"), "--out-dir", str(tmp_path),
                            "--run-name", name, "--obs-dims", "2", "--eval-every", "0", "--hidden-size", "16", standardize,
                            *flags.split()]) == 0
        model = module.load_model(str(tmp_path / name / "model.pt"))
        policies.append(model[0] if script != "iq_offline" else model[1])
    obs = torch.tensor([[[0.6, 0.8, 5.0]], [[0.6, 0.8, -3.0]]])
    with torch.no_grad():
        actions = torch.cat([policy.act(obs) for policy in policies])
    assert actions.isfinite().all() and (actions == actions[0]).all()


@pytest.mark.parametrize("script", ["iq_discrete", "iq_offline"])
def test_chi2_of_an_environment_s_settings_is_not_added_to_another_distance(script):
    parse, lander = importlib.import_module(script).parse_args, ["--env-id", "LunarLander-v3"]
    assert parse(lander).chi2_alpha == 50
    assert parse([*lander, "--divergence", "kl"]).chi2_alpha is None
    assert parse([*lander, "--divergence", "kl", "--chi2-alpha", "2"]).chi2_alpha == 2


def test_the_form_of_an_environment_s_settings_goes_with_chi2():
    own, other = iq_discrete.parse_args([]), iq_discrete.parse_args(["--divergence", "js"])
    assert (own.value_loss, own.absorbing) == ("v0_expert", True)
    assert (other.value_loss, other.absorbing) == ("value", False) and other.temperature == own.temperature
    assert iq_discrete.parse_args(["--divergence", "js", "--value-loss", "v0"]).value_loss == "v0"


def test_the_absorbing_state_counts_the_ends_of_both_sides(command, left_only, tmp_path, monkeypatch):
    rates, absorbing_value = [], iq_discrete.absorbing_value
    monkeypatch.setattr(iq_discrete, "absorbing_value", lambda *given: rates.append(given[:2]) or absorbing_value(*given))
    assert iq_discrete.main(command("iq_discrete", "--demos", left_only, "--num-demos", "0")) == 0
    with np.load(left_only) as file:
        assert {expert for expert, _ in rates} == {10 / file["episode_lengths"].sum()}
    assert float(rates[0][1]) == pytest.approx(rates[0][0])  # before play
    terminated = torch.load(tmp_path / "run" / "checkpoint.pt")["replay"]["storage"][3]
    assert 0 < terminated.mean() < 1 and rates[-1][1] == terminated.mean() and len(rates) == 1 + 300 + 1  # and for model.pt
    network, saved = iq_discrete.load_model(str(tmp_path / "run" / "model.pt"))
    assert saved["end_value"] == pytest.approx(float(absorbing_value(*rates[-1], iq_discrete.Args(**saved["args"]))))
    assert saved["end_value"] > 0
    assert iq_discrete.main(["--resume", str(tmp_path / "run")]) == 0  # of a finished run
    assert torch.load(tmp_path / "run" / "model.pt")["end_value"] == saved["end_value"]


@pytest.mark.parametrize("ends, flags", [(False, ""), (True, "--value-loss value"), (True, "--chi2-rows expert"),
                                         (True, "--divergence js --value-loss v0_expert"),
                                         (True, "--divergence js --value-loss v0_expert --chi2-alpha 0.5"),
                                         (True, "--objective bc")])
def test_no_absorbing_state_where_it_is_not_defined(ends, flags, command, left_only, tmp_path):
    """Nor where the expert's episodes never end by themselves, as the bundled ones of CartPole."""
    demos = ["--demos", left_only] if ends else []
    for name in ("absorbing", "no-absorbing"):
        assert iq_discrete.main(command("iq_discrete", *demos, *flags.split(), f"--{name}", "--run-name", name)) == 0
    saved, without = (torch.load(tmp_path / name / "model.pt") for name in ("absorbing", "no-absorbing"))
    one, other = saved["network"], without["network"]
    assert all(torch.equal(one[name], other[name]) for name in one) and saved["end_value"] == without["end_value"] == 0


@pytest.mark.parametrize("script, env_id, words", [("iq_discrete", "LunarLander-v3", "(default: 50.0)"),
                                                   ("iq_continuous", "Hopper-v5", "(default: 0.97)"),
                                                   ("iq_offline", "LunarLander-v3", "(default: 256)"),
                                                   ("iq_ilo", "LunarLander-v3", "(default: 5000)")])
def test_help_shows_the_settings_of_the_environment(script, env_id, words, capsys):
    for arguments, there in ((["--env-id", env_id, "--help"], True), (["--env-id", "Acrobot-v1", "--help"], False)):
        with pytest.raises(SystemExit) as exit:
            importlib.import_module(script).main(arguments)
        assert exit.value.code == 0
        assert (words in " ".join(capsys.readouterr().out.replace("│", " ").split())) is there


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_path_that_is_too_long_is_bad_input(script, tmp_path, capsys):
    long = "x" * 300
    for arguments in (["--demos", long], ["--demos", f"{long}.npz"], ["--evaluate", long], ["--resume", long]):
        assert importlib.import_module(script).main([*arguments, "--out-dir", str(tmp_path)]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_weights_and_biases_without_a_login_is_bad_input(command, tmp_path, capsys, monkeypatch):
    import wandb

    def init(*_, **__):
        raise wandb.errors.UsageError("no API key")

    monkeypatch.setattr(wandb, "init", init)
    assert iq_discrete.main(command("iq_discrete", "--track")) == 2
    assert "--track: no API key" in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert iq_discrete.main(command("iq_discrete")) == 0
    settings = (tmp_path / "run" / "args.json").read_bytes()
    assert iq_discrete.main(["--resume", str(tmp_path / "run"), "--track", "--total-timesteps", "400"]) == 2
    assert (tmp_path / "run" / "checkpoint.pt").exists() and (tmp_path / "run" / "args.json").read_bytes() == settings
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    assert iq_discrete.main(command("iq_discrete", "--track", "--run-name", "no")) == 2
    assert "pip install wandb" in capsys.readouterr().err and not (tmp_path / "no").exists()


@pytest.mark.parametrize("script, random", [("iq_discrete", 23.0), ("iq_continuous", -1199.9)])
def test_evaluation_gives_the_random_return_of_a_model_that_was_trained_without(script, random, command, tmp_path, capsys):
    assert MODULES[script].main(command(script, "--eval-every", "0")) == 0
    assert MODULES[script].main(["--evaluate", str(tmp_path / "run" / "model.pt"), "--eval-episodes", "1"]) == 0
    assert float(FINAL.search(capsys.readouterr().out.splitlines()[-1]).group(5)) == random


@pytest.fixture
def tiny(command, tmp_path):
    """`command`, for all five."""
    others = {"iq_offline": ["--demos", str(ROOT / "demos" / "CartPole-v1.npz"), "--total-updates", "5"],
              "iq_ilo": ["--total-timesteps", "20", "--learning-starts", "10", "--reward-updates", "1"]}
    run = ["--out-dir", str(tmp_path), "--run-name", "run"]
    return lambda script, *more: [*run, *others[script], *more] if script in others else command(script, *more)


@pytest.mark.parametrize("script, random", [("iq_discrete", 23.0), ("iq_atari", -20.3), ("iq_continuous", -1199.9),
                                            ("iq_offline", 23.0), ("iq_ilo", 23.0)])
def test_a_known_random_return_is_told_without_an_evaluation(script, random, tiny, capsys):
    assert importlib.import_module(script).main(tiny(script, "--eval-every", "0")) == 0
    told = FINAL.search(capsys.readouterr().out).groups()
    assert float(told[4]) == random and told[0] == told[5] == "nan"


def test_an_unknown_random_return_is_not_measured_without_an_evaluation(command, capsys):
    grid = ["--env-id", "GridWorld-v0", "--demos", str(ROOT / "demos" / "GridWorld-v0.npz"), "--eval-every", "0"]
    assert iq_discrete.main(command("iq_discrete", *grid)) == 0
    out = capsys.readouterr().out
    assert FINAL.search(out).group(5) == "nan" and "measuring" not in out


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_name_that_no_file_system_takes_is_bad_input(script, command, tmp_path, capsys):
    own = command(script) if script in MODULES else ["--out-dir", str(tmp_path), "--env-id", "CartPole-v1"]
    assert importlib.import_module(script).main([*own, "--run-name", "x" * 300]) == 2
    assert "File name too long" in capsys.readouterr().err and not list(tmp_path.glob("x*"))


@pytest.mark.parametrize("closed", ["2>&-", ">&- 2>&-"])
def test_a_run_whose_output_is_closed_finishes(closed, command, tmp_path):
    tiny = [sys.executable, str(ROOT / "iq_discrete.py"), *command("iq_discrete")]
    assert subprocess.run(["bash", "-c", f'"$@" {closed}', "run", *tiny], timeout=120).returncode == 0
    assert (tmp_path / "run" / "model.pt").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_training_in_a_thread_sets_no_signal_handlers(script, tiny, tmp_path):
    """Python lets the main thread alone set them."""
    before = signal.getsignal(signal.SIGINT)
    with ThreadPoolExecutor(1) as pool:
        flags = tiny(script, "--eval-every", "0")
        assert pool.submit(importlib.import_module(script).main, flags).result() == 0
    assert (tmp_path / "run" / "model.pt").exists() and signal.getsignal(signal.SIGINT) is before


def test_evaluation_refuses_switches_that_are_not_the_model_s(command, tmp_path, capsys):
    grid = ["--env-id", "GridWorld-v0", "--demos", str(ROOT / "demos" / "GridWorld-v0.npz")]
    assert iq_discrete.main(command("iq_discrete", *grid, "--eval-every", "0")) == 0
    model = ["--evaluate", str(tmp_path / "run" / "model.pt"), "--eval-episodes", "1"]
    assert iq_discrete.main([*model, "--random-walls"]) == 2
    assert "--random-walls True" in capsys.readouterr().err
    assert iq_discrete.main([*model, "--env-id", "GridWorld-v0"]) == 0


def test_cloning_saves_the_temperature_of_its_own_policy(command, tmp_path):
    assert iq_discrete.main(command("iq_discrete", "--objective", "bc", "--eval-every", "0")) == 0
    assert iq_discrete.load_model(str(tmp_path / "run" / "model.pt"))[1]["temperature"] == 1.0
    own = ["--resume", str(tmp_path / "run"), "--objective", "bc", "--temperature", "0.1"]  # CartPole's setting, as stored
    assert iq_discrete.main([*own, "--total-timesteps", "400"]) == 0


def test_a_longer_run_that_is_resumed_does_not_warm_up_again(command, tmp_path):
    """It had begun to learn after a tenth of its first 300 steps."""
    assert iq_continuous.main(command("iq_continuous", "--learning-starts", "1000", "--eval-every", "0")) == 0
    assert int(rows(tmp_path / "run")[-1]["updates"]) == 270
    assert iq_continuous.main(["--resume", str(tmp_path / "run"), "--total-timesteps", "400"]) == 0
    assert int(rows(tmp_path / "run")[-1]["updates"]) == 370


def test_a_resumed_run_that_is_made_shorter_keeps_its_warm_up(command, tmp_path):
    assert iq_continuous.main(command("iq_continuous", "--learning-starts", "30", "--eval-every", "0")) == 0
    assert iq_continuous.main(["--resume", str(tmp_path / "run"), "--total-timesteps", "310"]) == 0
    assert int(rows(tmp_path / "run")[-1]["updates"]) == 280


def test_a_cloned_run_is_resumed_and_made_longer(command, tmp_path):
    cloned = ["--total-timesteps", "0", "--pretrain-updates", "20", "--eval-every", "0"]
    assert iq_continuous.main(command("iq_continuous", *cloned)) == 0
    assert iq_continuous.main(["--resume", str(tmp_path / "run")]) == 0
    assert iq_continuous.main(["--resume", str(tmp_path / "run"), "--total-timesteps", "60"]) == 0
    assert int(rows(tmp_path / "run")[-1]["updates"]) == 74, "20 cloning, and from step 6 one a step"
    assert iq_continuous.main(["--resume", str(tmp_path / "run"), "--total-timesteps", "0"]) == 0


def test_games_learned_from_demonstrations_are_played_on(command, tmp_path):
    assert iq_atari.main(command("iq_atari", "--total-timesteps", "0")) == 0
    assert iq_atari.main(["--resume", str(tmp_path / "run"), "--total-timesteps", "64"]) == 0
    assert int(rows(tmp_path / "run")[-1]["step"]) == 64


@pytest.mark.parametrize("script", ["iq_discrete", "iq_continuous"])
def test_rows_after_the_checkpoint_are_dropped_where_they_had_no_update(script, command, tmp_path):
    module, save = MODULES[script], MODULES[script].Run.save
    few = ["--updates-per-step", "0.001", "--eval-every", "50", "--checkpoint-every", "100", "--total-timesteps", "190"]

    def killed(self):
        if self.step > 100:
            raise KeyboardInterrupt
        save(self)

    module.Run.save = killed
    try:
        assert module.main(command(script, *few)) == 130
    finally:
        module.Run.save = save
    assert [row["step"] for row in rows(tmp_path / "run")] == ["50", "100", "150", "190"]
    assert module.main(["--resume", str(tmp_path / "run"), "--eval-every", "170"]) == 0
    assert [row["step"] for row in rows(tmp_path / "run")] == ["50", "100", "170", "190"]


class Plain(gym.Env):
    """GridWorld by another author, who draws nothing: its constructor takes no argument at all."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (4,)), gym.spaces.Discrete(2)

    def __init__(self):
        pass

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(4, np.float32), {}

    def step(self, action):
        return np.zeros(4, np.float32), 0.0, False, False, {}


gym.register("other/GridWorld-v0", entry_point=Plain, max_episode_steps=5)


@pytest.mark.parametrize("script", ["iq_discrete", "iq_ilo", "iq_offline"])
def test_an_environment_whose_constructor_takes_nothing(script, tmp_path):
    with np.load(ROOT / "demos" / "CartPole-v1.npz") as file:
        np.savez(tmp_path / "demos.npz", **{name: file[name] for name in file.files if name != "env_id"}, env_id="unknown")
    length = ["--total-updates", "9"] if script == "iq_offline" else ["--total-timesteps", "30"]
    assert importlib.import_module(script).main([
        "--env-id", "other/GridWorld-v0", "--demos", str(tmp_path / "demos.npz"), *length, "--eval-episodes", "2",
        "--out-dir", str(tmp_path), "--run-name", "run"]) == 0


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_the_state_reward_is_fitted_says_how_to_go_on(number, status, tmp_path):
    arguments = ("--num-demos 1 --total-timesteps 40 --learning-starts 10 --eval-every 0 --reward-updates 1000000 "
                 "--run-name run --out-dir").split() + [str(tmp_path)]
    process = subprocess.Popen([sys.executable, ROOT / "iq_ilo.py", *arguments], stdout=subprocess.PIPE, text=True,
                               stderr=subprocess.PIPE)
    deadline = time.time() + 120
    while not (tmp_path / "run" / "checkpoint.pt").exists() and time.time() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert "Traceback" not in err and "iq_ilo.py --resume" in out.splitlines()[-1]


@pytest.mark.parametrize("script", ["iq_discrete", "iq_continuous", "iq_ilo", "iq_offline"])
def test_a_constructor_that_fails_is_bad_input(script, tmp_path, capsys):
    def fails():
        raise AssertionError("no licence")

    gym.register("Fails-v0", entry_point=fails)
    assert importlib.import_module(script).main(["--env-id", "Fails-v0", "--out-dir", str(tmp_path)]) == 2
    assert "--env-id Fails-v0: no licence" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("low, high", [((-1.4, -1.1), (0.8, 0.2)), ((-0.7, 0.1), (0.3, 0.9))])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_no_action_lies_beyond_the_bounds_in_any_precision(low, high, dtype):
    space = gym.spaces.Box(np.array(low, dtype), np.array(high, dtype), dtype=dtype)
    ends = torch.tensor([[-1.0, -1.0], [1.0, 1.0]])
    for kind in (iq_continuous.Actor, importlib.import_module("iq_offline").Actor, iq_ilo.TanhGaussian):
        actor = kind((3,), space.low.tolist(), space.high.tolist())
        assert all(space.contains(action) for action in actor.to_env(ends).numpy())
        torch.testing.assert_close(actor.to_env(ends), torch.tensor([low, high]))


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("flag", ["--evaluate", "--resume"])
def test_an_empty_path_trains_nothing(script, flag, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert importlib.import_module(script).main([flag, ""]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1 and not list(tmp_path.iterdir())


def test_a_run_is_resumed_from_another_directory(command, tmp_path, monkeypatch):
    shutil.copy(ROOT / "demos" / "CartPole-v1.npz", tmp_path / "mine.npz")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    assert iq_discrete.main(command("iq_discrete", "--demos", "mine.npz")) == 0
    monkeypatch.chdir("elsewhere")
    for steps, flags in ((310, ()), (320, ("--demos", "../mine.npz"))):
        assert iq_discrete.main(["--resume", "../run", "--total-timesteps", str(steps), *flags]) == 0
    assert iq_discrete.main(["--resume", "../run", "--demos", str(ROOT / "demos" / "CartPole-v1.npz")]) == 2


def test_two_runs_without_a_name_are_begun_side_by_side(command, tmp_path):
    names = [iq_discrete.train(iq_discrete.parse_args(
        [*command("iq_discrete")[:-2], "--total-timesteps", "5", "--eval-every", "0"])).name for _ in range(2)]
    assert names[0] != names[1] and all(re.fullmatch(r"CartPole-v1__iq_discrete__1__\d+", name) for name in names)


def test_an_environment_of_a_module_is_the_one_in_the_file():
    for module in (iq_discrete, iq_continuous, iq_ilo):
        assert module.env_name("mine:MyCart-v0") == module.env_name("MyCart-v0") == "MyCart"


@pytest.mark.parametrize("script", SCRIPTS)
def test_implied_reward_takes_terminations_as_a_file_has_them(script):
    module, obs = importlib.import_module(script), torch.rand(2, 4)
    if script == "iq_continuous":
        networks, action = (module.QNetwork((4,), 1), module.Actor((4,), [-1.0], [1.0])), torch.zeros(2, 1)
    else:
        sizes = {"iq_atari": (2,), "iq_ilo": ((4,), 2, True)}.get(script, ((4,), 2))
        network, action = module.QNetwork(*sizes), torch.tensor([0, 1])
        networks = {"iq_offline": (network, None), "iq_ilo": (network, iq_ilo.Softmax(network))}.get(script, (network,))
    if script == "iq_atari":
        obs = torch.zeros(2, 4, 84, 84, dtype=torch.uint8)
    rewards = []
    for terminated in (torch.tensor([True, False]), torch.tensor([1.0, 0.0])):
        torch.manual_seed(0)
        rewards.append(module.implied_reward(*networks, obs, action, obs, terminated, 0.9, 0.1))
    assert torch.equal(*rewards)


def test_a_saved_atari_model_is_played_in_the_precision_it_was_trained_in(command, tmp_path, monkeypatch):
    seen, model = [], str(tmp_path / "run" / "model.pt")
    assert iq_atari.main(command("iq_atari")) == 0
    monkeypatch.setattr(iq_atari, "has_bfloat16", lambda device: True)
    monkeypatch.setattr(iq_atari, "evaluate", lambda network, *_: seen.append(network.autocast) or np.zeros(1))
    assert iq_atari.main(["--evaluate", model]) == 0 and seen == [True]
