"""What a run keeps, over all five scripts: targets and averages that move, the average that is evaluated and saved, and a
checkpoint that holds every part."""
import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from test_run import frame_demos, pendulum_demos

ROOT = Path(__file__).parent.parent
FRAMES = "--num-demos 2 --batch-size 4 --buffer-size 200 --num-envs 2 --updates-per-step 0.1"
SCRIPTS = {  # name: script, flags, flags of a single update
    "discrete": ("iq_discrete", "--num-demos 2 --total-timesteps 60", "--total-timesteps 1"),
    "atari": ("iq_atari", f"{FRAMES} --pretrain-updates 2 --total-timesteps 40", "--pretrain-updates 1 --total-timesteps 0"),
    "continuous": ("iq_continuous", "--num-demos 2 --total-timesteps 60 --learning-starts 4 --hidden-size 8 --batch-size 8",
                   "--total-timesteps 2 --learning-starts 1"),
    "offline": ("iq_offline", "--env-id CartPole-v1 --total-updates 30", "--total-updates 1"),
    "offline, continuous": ("iq_offline", "--num-demos 2 --total-updates 30 --hidden-size 8 --batch-size 8",
                            "--total-updates 1"),
    "ilo": ("iq_ilo", "--env-id CartPole-v1 --total-timesteps 60 --learning-starts 4 --reward-updates 9",
            "--total-timesteps 2 --learning-starts 1"),
    "ilo, continuous": ("iq_ilo", "--num-demos 2 --total-timesteps 60 --learning-starts 4 --reward-updates 9 "
                        "--hidden-size 8 --batch-size 8", "--total-timesteps 2 --learning-starts 1"),
}
AVERAGED = {  # name in model.pt: the average's and the network's in checkpoint.pt
    "discrete": {"network": ("average", "network")}, "atari": {"network": ("average", "network")},
    "continuous": {"actor": ("average", "actor")}, "offline": {"network": ("average", "network")},
    "offline, continuous": {"actor": ("average", "actor")},
    "ilo": {"policy": ("average", "policy"), "critic": ("average_critic", "critic")},
    "ilo, continuous": {"policy": ("average", "policy"), "critic": ("average_critic", "critic")},
}
OPTIMIZERS = {"discrete": ["optimizer"], "atari": ["optimizer"], "continuous": ["actor_optimizer", "critic_optimizer"],
              "offline": ["optimizer"], "offline, continuous": ["optimizer", "actor_optimizer"],
              "ilo": ["critic_optimizer", "idm_optimizer"],
              "ilo, continuous": ["critic_optimizer", "actor_optimizer", "idm_optimizer"]}


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    """Files for Atari and for Pendulum; what they show does not matter here."""
    folder = tmp_path_factory.mktemp("demos")
    pendulum = ["--env-id", "Pendulum-v1", "--demos", str(pendulum_demos(folder / "pendulum.npz"))]
    own = dict.fromkeys(("continuous", "offline, continuous", "ilo, continuous"), pendulum)
    return own | {"atari": ["--demos", str(frame_demos(folder / "pong.npz"))]}


@pytest.fixture
def train(demos, tmp_path, monkeypatch):
    """Run a script, evaluated by a stub; returns its module, the run's directory and what was evaluated."""
    def one(name, run_name, *more, single=False):
        script, flags, update = SCRIPTS[name]
        module, seen = importlib.import_module(script), []

        def evaluate(*parts, **_):  # the policy first, for offline the network and the actor
            seen.extend(p for p in parts if isinstance(p, torch.nn.Module))
            return np.zeros(3)

        monkeypatch.setattr(module, "evaluate", evaluate)
        argv = [*flags.split(), *(update.split() if single else []), *demos.get(name, []), "--checkpoint-every", "0",
                "--out-dir", str(tmp_path), "--run-name", run_name, "--eval-every", "1000", *more]
        assert module.main(argv) == 0
        return module, tmp_path / run_name, [p.state_dict() for p in seen]
    return one


def load(run_dir, name):
    return torch.load(run_dir / name, weights_only=True)


def equal(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_moving_average_is_evaluated_and_saved(name, train):
    _, run_dir, evaluated = train(name, "run", "--average-rate", "0.01")
    model, stored = load(run_dir, "model.pt"), load(run_dir, "checkpoint.pt")
    for own, (average, last) in AVERAGED[name].items():
        assert equal(model[own], stored[average]) and not equal(stored[average], stored[last])
    assert any(equal(state, model[list(AVERAGED[name])[0]]) for state in evaluated)


@pytest.mark.parametrize("flag, kept", [("--target-rate", "target"), ("--average-rate", "average")])
@pytest.mark.parametrize("name", SCRIPTS)
def test_target_and_average_take_a_step_of_their_rate(name, flag, kept, train):
    """Of the way from the first network to that after one update: 1/4, 1/2 and all of it."""
    quarter, half, whole = (load(train(name, rate, flag, rate, single=True)[1], "checkpoint.pt")[kept]
                            for rate in ("0.25", "0.5", "1.0"))
    moved = False
    for key in whole:
        torch.testing.assert_close(whole[key] - half[key], 2 * (half[key] - quarter[key]), rtol=0, atol=1e-6)
        moved |= not torch.equal(whole[key], half[key])
    assert moved


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_resumed_run_with_nothing_left_to_do_is_the_same_run(name, train):
    """Every network and optimiser is in the checkpoint and comes back from it; only new starts are added to the replay."""
    module, run_dir, _ = train(name, "run", "--average-rate", "0.01", "--target-rate", "0.1")
    model, stored = load(run_dir, "model.pt"), load(run_dir, "checkpoint.pt")
    networks = {name for own in AVERAGED[name].values() for name in own}
    assert networks | {"target", *OPTIMIZERS[name]} <= stored.keys()
    assert module.main(["--resume", str(run_dir)]) == 0
    after, again = load(run_dir, "checkpoint.pt"), load(run_dir, "model.pt")
    assert all(equal(model[part], again[part]) for part in model if hasattr(model[part], "items") and part != "args"
               and torch.is_tensor(next(iter(model[part].values()), None)))
    for part in networks | {"target"}:
        assert equal(stored[part], after[part]), part
    for part in OPTIMIZERS[name]:
        for one, two in zip(stored[part]["state"].values(), after[part]["state"].values(), strict=True):
            assert equal(one, two), part
        assert stored[part]["state"], part
    assert torch.equal(stored["rng"], after["rng"]) and stored["updates"] == after["updates"]
