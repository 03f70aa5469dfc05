"""Where there is a GPU: sampling and update never wait for it, and a model that was trained there plays without it."""
import importlib

import pytest
import torch

FLAGS = {
    "iq_discrete": "--env-id CartPole-v1 --total-timesteps 300",
    "iq_continuous": "--env-id Walker2d-v5 --total-timesteps 300 --learning-starts 10 --pretrain-updates 50",
    "iq_atari": "--num-demos 1 --pretrain-updates 50 --total-timesteps 200 --buffer-size 1000",
    "iq_offline": "--env-id LunarLander-v3 --total-updates 100",
    "iq_offline continuous": "--env-id Hopper-v5 --total-updates 100",
    "iq_ilo": "--env-id CartPole-v1 --total-timesteps 300 --learning-starts 10",
    "iq_ilo continuous": "--env-id Hopper-v5 --total-timesteps 300 --learning-starts 10",
}


def strict(function):
    """`function`, in which from the eleventh call on a wait for the GPU is an error; the first ones allocate."""

    def wrapped(*args, **kwargs):
        wrapped.calls += 1
        torch.cuda.set_sync_debug_mode("error" if wrapped.calls > 10 else "default")
        try:
            return function(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    wrapped.calls = 0
    return wrapped


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("name", FLAGS)
def test_training_never_waits_for_the_gpu(name, tmp_path, monkeypatch):
    module = importlib.import_module(name.split()[0])
    make_update, updates = module.make_update, []

    def strict_update(*args):
        made = make_update(*args)
        updates.extend(map(strict, made if isinstance(made, tuple) else (made,)))
        return tuple(updates) if isinstance(made, tuple) else updates[0]

    monkeypatch.setattr(module, "make_update", strict_update)
    monkeypatch.setattr(module, "draw", strict(module.draw))
    if hasattr(module, "Replay"):
        monkeypatch.setattr(module.Replay, "sample", strict(module.Replay.sample))
    out = f"--eval-every 0 --out-dir {tmp_path} --run-name gpu".split()
    assert module.main(FLAGS[name].split() + out) == 0
    assert all(update.calls > 20 for update in updates) and module.draw.calls > 20
    assert module.main(["--evaluate", str(tmp_path / "gpu" / "model.pt"), "--eval-episodes", "1", "--no-cuda"]) == 0
