"""Whole runs of the scripts with tiny settings: outputs, exits, resume, evaluation, and what training never reads."""
import csv
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

import iq_atari
import iq_discrete

ROOT = Path(__file__).parent.parent
FINAL = re.compile(r"final eval_return=(\S+) std=(\S+) episodes=(\d+) expert=(\S+) random=(\S+) normalized=(\S+) "
                   r"steps=(\d+) updates=(\d+) seconds=(\S+) run_dir=(\S+)")


@pytest.fixture(scope="session")
def frames(tmp_path_factory):
    """Demonstrations of Pong as frames, of noise: what they show does not matter here."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("frames") / "pong.npz"
    np.savez(path, observations=rng.integers(0, 255, (42, 84, 84), np.uint8), actions=rng.integers(0, 6, 40),
             terminations=np.arange(40) % 20 == 19, truncations=np.zeros(40, bool), episode_lengths=np.array([20, 20]),
             env_id=np.array("PongNoFrameskip-v4"))
    return path


@pytest.fixture
def command(frames, tmp_path):
    """The tiny command line of a script."""
    def make(script, *more):
        own = {"iq_discrete": "--total-timesteps 300 --eval-every 100 --eval-episodes 3 --num-demos 2 --subsample-freq 20",
               "iq_atari": f"--demos {frames} --num-demos 2 --pretrain-updates 6 --total-timesteps 64 --num-envs 2 "
                           "--batch-size 4 --buffer-size 200 --eval-every 0 --updates-per-step 0.1"}[script]
        return [*own.split(), "--out-dir", str(tmp_path), "--run-name", "run", *more]
    return make


def run(script, arguments, cwd=ROOT, path=None, **environment):
    return subprocess.run([sys.executable, path or ROOT / f"{script}.py", *arguments], cwd=cwd, text=True,
                          capture_output=True, env=os.environ | environment, timeout=300)


def rows(run_dir):
    with open(Path(run_dir) / "metrics.csv") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("script", ["iq_discrete", "iq_atari"])
def test_a_script_copied_alone_trains_and_leaves_its_outputs(script, command, tmp_path):
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(ROOT / f"{script}.py", alone)
    missing = run(script, command(script)[2:] if script == "iq_atari" else command(script), alone, alone / f"{script}.py")
    assert missing.returncode == 2 and "--demos" in missing.stderr and "Traceback" not in missing.stderr
    assert not (tmp_path / "run").exists()
    demos = ["--demos", str(ROOT / "demos" / "CartPole-v1.npz")] if script == "iq_discrete" else []
    done = run(script, command(script, *demos), alone, alone / f"{script}.py")
    assert done.returncode == 0, done.stderr
    final = FINAL.fullmatch(done.stdout.splitlines()[-1]).groups()
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"args.json", "metrics.csv", "model.pt", "checkpoint.pt", f"{script}.py"}
    last = rows(tmp_path / "run")[-1]
    assert int(final[6]) == int(last["step"]) == (300 if script == "iq_discrete" else 64)
    assert int(final[7]) == int(last["updates"]) == (300 if script == "iq_discrete" else 12)
    assert float(final[0]) == pytest.approx(float(last["eval_return_mean"]), nan_ok=True)
    assert float(final[1]) == pytest.approx(float(last["eval_return_std"]), nan_ok=True)
    assert {"steps_per_second", "seconds"} <= last.keys() and np.isfinite(float(last["loss"]))
    saved = torch.load(tmp_path / "run" / "model.pt", weights_only=True)
    assert {"network", "sizes", "temperature", "gamma"} <= saved.keys()
    torch.manual_seed(1)
    module = {"iq_discrete": iq_discrete, "iq_atari": iq_atari}[script]
    network, _ = module.load_model(str(tmp_path / "run" / "model.pt"))
    shape = (5, 4) if script == "iq_discrete" else (5, 4, 84, 84)
    obs, action = torch.ones(shape), torch.zeros(5, dtype=torch.int64)
    reward = module.implied_reward(network, obs, action, obs, torch.zeros(5), saved["gamma"], saved["temperature"])
    assert reward.shape == (5,) and torch.isfinite(reward).all()
    exists = run(script, command(script, *demos), alone, alone / f"{script}.py")
    assert exists.returncode == 2 and "exists" in exists.stderr


def test_training_moves_every_parameter(command, tmp_path):
    iq_discrete.main(command("iq_discrete", "--eval-every", "0"))
    trained, _ = iq_discrete.load_model(str(tmp_path / "run" / "model.pt"))
    torch.manual_seed(1)
    fresh = iq_discrete.QNetwork((4,), 2)
    for (name, before), after in zip(fresh.named_parameters(), trained.parameters()):
        assert (before != after).any(), name


@pytest.mark.parametrize("script", ["iq_discrete", "iq_atari"])
def test_same_seed_same_csv(script, command, tmp_path):
    module = {"iq_discrete": iq_discrete, "iq_atari": iq_atari}[script]
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


@pytest.mark.parametrize("script", ["iq_discrete", "iq_atari"])
def test_resume_writes_the_rows_after_the_checkpoint_anew(script, command, tmp_path, capsys):
    module = {"iq_discrete": iq_discrete, "iq_atari": iq_atari}[script]
    assert module.main(command(script)) == 0
    run_dir = tmp_path / "run"
    before = rows(run_dir)
    with open(run_dir / "metrics.csv", "a") as file:  # rows that a crash left behind the checkpoint
        file.write("99999,99999" + ",0" * (len(before[0]) - 2) + "\n")
    more = "500" if script == "iq_discrete" else "128"
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
    assert words[:2] == ["iq_discrete.py", "--resume"]
    step = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"]
    assert iq_discrete.main([*words[1:], "--total-timesteps", str(step + 50)]) == 0


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


@pytest.mark.parametrize("script", ["iq_discrete", "iq_atari"])
def test_evaluate_plays_a_saved_model_and_records_it(script, command, tmp_path, capsys):
    module = {"iq_discrete": iq_discrete, "iq_atari": iq_atari}[script]
    episodes = ["--eval-episodes", "3" if script == "iq_discrete" else "1"]
    assert module.main(command(script)) == 0
    trained = FINAL.search(capsys.readouterr().out.splitlines()[-1]).groups()
    model = str(tmp_path / "run" / "model.pt")
    assert module.main(["--evaluate", model, "--capture-video", *episodes]) == 0
    played = FINAL.search(capsys.readouterr().out.splitlines()[-1]).groups()
    if script == "iq_discrete":
        assert played[:2] == trained[:2]
    assert (tmp_path / "run" / "videos" / "evaluate.mp4").stat().st_size > 1000
    other = {"iq_discrete": iq_atari, "iq_atari": iq_discrete}[script]
    assert other.main(["--evaluate", model]) == 2


def test_track_logs_offline_with_the_video(command, tmp_path):
    done = run("iq_discrete", command("iq_discrete", "--track", "--capture-video"), tmp_path, WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr
    assert FINAL.fullmatch(done.stdout.splitlines()[-1])
    (log,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"eval_return_mean" in log.read_bytes()
    assert (tmp_path / "run" / "videos" / "step_300.mp4").stat().st_size > 1000


BOOLEANS = [f.name for f in dataclasses.fields(iq_discrete.Args) if f.type is bool
            and f.name not in ("track", "compile", "capture_video")]


@pytest.mark.parametrize("name", BOOLEANS)
def test_every_switch_both_ways(name, command, tmp_path):
    grid = name in ("random_walls", "random_start", "random_goal", "stay_action")
    flag = name.replace("_", "-")
    for value in (f"--{flag}", f"--no-{flag}"):
        arguments = command("iq_discrete", "--run-name", value.strip("-"), value)
        if grid:
            arguments += ["--env-id", "GridWorld-v0", "--demos", str(ROOT / "demos" / "GridWorld-v0.npz")]
        assert iq_discrete.main(arguments) == 0
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


def test_the_cnn_trains_on_the_grid(command, tmp_path):
    assert iq_discrete.main(command("iq_discrete", "--env-id", "GridWorld-v0", "--network", "cnn", "--hidden-size", "8",
                                    "--total-timesteps", "20", "--eval-every", "0")) == 0


@pytest.mark.parametrize("script", ["iq_discrete", "iq_atari"])
def test_compiled_and_eager_updates_agree(script):
    module = {"iq_discrete": iq_discrete, "iq_atari": iq_atari}[script]
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
        update = module.make_update(network, None, None, optimizer, 4, module.Args(compile=compile))
        terms = [update(batch, obs[:2])["loss"].item() for _ in range(3)]
        results.append((terms, [p.detach() for p in network.parameters()]))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4, abs=1e-6)
    for eager, compiled in zip(results[0][1], results[1][1]):
        torch.testing.assert_close(eager, compiled, rtol=1e-3, atol=1e-4)
