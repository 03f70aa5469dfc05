"""iq_offline.py: its objective, both kinds of actions, no environment at all, its own bad input, and that it learns."""
import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

import iq_discrete
import iq_offline

ROOT = Path(__file__).parent.parent
F64 = torch.float64
DISCRETE, CONTINUOUS = str(ROOT / "demos" / "CartPole-v1.npz"), str(ROOT / "demos" / "Pendulum-v1.npz")
TINY = ("--num-demos 2 --subsample-freq 5 --total-updates 40 --eval-every 20 --eval-episodes 2 --hidden-size 8 "
        "--batch-size 16")
BOTH = pytest.mark.parametrize("demos", [DISCRETE, CONTINUOUS], ids=["discrete", "continuous"])


@pytest.fixture
def command(tmp_path):
    """A tiny command line; flags that come later win."""
    return lambda *more: [*TINY.split(), "--out-dir", str(tmp_path), "--run-name", "run", *map(str, more)]


def rows(run_dir):
    with open(Path(run_dir) / "metrics.csv") as file:
        return list(csv.DictReader(file))


def weights(run_dir):
    saved = torch.load(run_dir / "model.pt", weights_only=True)
    return {**saved["network"], **{f"actor.{name}": value for name, value in (saved["actor"] or {}).items()}}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def setting(kind, seed=0, n=9):
    """Networks in float64 and a batch of `n` rows of random numbers, some of them terminated."""
    torch.manual_seed(seed)
    continuous = kind == "continuous"
    network = iq_offline.QNetwork((3,), 0 if continuous else 4, 2 if continuous else 0, 8).double()
    actor = iq_offline.Actor((3,), (-2.0, -1.0), (2.0, 3.0), 8).double() if continuous else None
    action = torch.rand(n, 2, dtype=F64) * 2 - 1 if continuous else torch.randint(4, (n,))
    batch = iq_offline.Batch(torch.randn(n, 3, dtype=F64), action, torch.randn(n, 3, dtype=F64),
                             (torch.arange(n) % 3 == 0).double())
    return network, actor, batch


# ----------------------------------------------------------------------------------------------- the objective
def log_prob_of(actor, obs, action):
    return iq_offline.log_policy(actor(obs), action)


KINDS = pytest.mark.parametrize("kind", ["discrete", "continuous"])


@KINDS
@pytest.mark.parametrize("with_target", [False, True])
@pytest.mark.parametrize("divergence", ["chi2", "tv"])
def test_the_collapsed_form_equals_the_general_one(kind, with_target, divergence):
    """Eq. 12 against −E[φ(r)] + E[V(s) − γV(s')] + E[r²]/(4α) in its own words, values and gradients."""
    network, actor, batch = setting(kind)
    target = setting(kind, seed=1)[0] if with_target else None
    args = iq_offline.Args(gamma=0.9, temperature=0.3, chi2_alpha=0.7, divergence=divergence)
    torch.manual_seed(5)
    loss, terms = iq_offline.iq_loss(network, target, actor, batch, batch.obs[:0], args)
    assert "cloning_term" in terms and loss.item() == pytest.approx((terms["cloning_term"] + terms["chi2_term"]).item())
    gradients = torch.autograd.grad(loss, list(network.parameters()))

    torch.manual_seed(5)  # the same actions are drawn, in the same order
    V = iq_offline.state_value(network, actor, batch.obs, 0.3)
    next_V = (1 - batch.terminated) * iq_offline.state_value(target or network, actor, batch.next_obs, 0.3)
    next_V = next_V.detach() if with_target else next_V
    r = iq_offline.q_value(network, actor, batch.obs, batch.action) - 0.9 * next_V
    general = -iq_offline.phi(divergence, r).mean() + (V - 0.9 * next_V).mean() + (r**2).mean() / (4 * 0.7)
    assert loss.item() == pytest.approx(general.item())
    for one, other in zip(gradients, torch.autograd.grad(general, list(network.parameters()))):
        torch.testing.assert_close(one, other)


def test_the_discrete_loss_is_cross_entropy_and_squared_bellman_residual():
    """Eq. 12 for discrete actions: V(s) − Q(s,a) = −τ·log π(a|s)."""
    network, _, batch = setting("discrete")
    args = iq_offline.Args(gamma=0.9, temperature=0.05)
    loss, terms = iq_offline.iq_loss(network, None, None, batch, batch.obs[:0], args)
    log_policy = torch.log_softmax(network(batch.obs) / 0.05, 1)[torch.arange(9), batch.action]
    assert terms["cloning_term"].item() == pytest.approx(-0.05 * log_policy.mean().item())
    r = iq_offline.implied_reward(network, None, *batch, 0.9, 0.05)
    assert terms["chi2_term"].item() == pytest.approx((r**2).mean().item() / 2)


@pytest.mark.parametrize("divergence", ["chi2", "tv", "kl", "forward_kl", "hellinger", "js"])
@pytest.mark.parametrize("value_loss", ["value_expert", "v0", "v0_expert"])
def test_the_loss_is_that_of_iq_discrete_on_expert_rows(divergence, value_loss):
    network, _, batch = setting("discrete")
    shared = dict(gamma=0.8, temperature=0.2, divergence=divergence, value_loss=value_loss)
    loss, _ = iq_offline.iq_loss(network, None, None, batch, batch.obs[:3], iq_offline.Args(**shared))
    other, _ = iq_discrete.iq_loss(network, None, batch, 9, batch.obs[:3], iq_discrete.Args(chi2_rows="expert", **shared))
    assert loss.item() == pytest.approx(other.item())


def test_the_gradient_penalty_is_that_of_iq_discrete():
    network, _, batch = setting("discrete")
    penalties = []
    for penalty in (lambda: iq_offline.gradient_penalty(network, None, batch),
                    lambda: iq_discrete.gradient_penalty(network, batch, 9)):
        torch.manual_seed(3)
        penalties.append(penalty().item())
    assert penalties[0] == pytest.approx(penalties[1])


class QuadraticQ(torch.nn.Module):
    """Q(s,a) = −‖a‖²/2 + Σs·a: its gradient in a at s is s − a."""

    def forward(self, obs, action):
        return (obs[:, :2] * action).sum(1) - (action**2).sum(1) / 2


def test_the_continuous_gradient_penalty_takes_observation_and_action():
    """At (s, a) between two equal rows the gradient is (a, 0) in s and s − a in a."""
    obs, action = torch.tensor([[1.0, 2.0, 3.0]]).repeat(2, 1), torch.tensor([[0.5, -0.5]]).repeat(2, 1)
    batch = iq_offline.Batch(obs, action, obs, torch.zeros(2))
    norm = np.sqrt(0.5**2 + 0.5**2 + 0.5**2 + 2.5**2)
    assert iq_offline.gradient_penalty(QuadraticQ(), object(), batch).item() == pytest.approx((norm - 1) ** 2)


def test_the_value_of_continuous_actions_and_the_actors_loss():
    """V(s) = Q(s,ã) − τ·log π(ã|s) gives the actor no gradient; its own loss gives the critic's value the other sign."""
    network, actor, batch = setting("continuous")
    torch.manual_seed(7)
    value = iq_offline.state_value(network, actor, batch.obs, 0.3)
    torch.manual_seed(7)
    fresh, log_prob = iq_offline.sample_action(*actor(batch.obs))
    torch.testing.assert_close(value, network(batch.obs, fresh) - 0.3 * log_prob)
    value.sum().backward()
    assert all(p.grad is None for p in actor.parameters()) and any(p.grad is not None for p in network.parameters())
    torch.manual_seed(7)
    loss, terms = iq_offline.actor_loss(network, actor, batch, iq_offline.Args(temperature=0.3, cloning_weight=0.0))
    assert loss.item() == pytest.approx(-value.mean().item()) and len(terms) == 2
    with_cloning, terms = iq_offline.actor_loss(network, actor, batch, iq_offline.Args(cloning_weight=0.5))
    cloning = -0.5 * log_prob_of(actor, batch.obs, batch.action).mean()
    assert terms["actor_cloning_term"].item() == pytest.approx(cloning.item())


@pytest.mark.parametrize("cloning_weight", [0.0, 0.5])
def test_the_actors_loss_takes_one_pass_of_each_network(cloning_weight):
    """Its cloning term reads the actor's output that its actions are drawn from."""
    network, actor, batch = setting("continuous")
    passes = []
    for name, module in {"actor": actor, "critic": network}.items():
        module.register_forward_pre_hook(lambda *_, name=name: passes.append(name))
    iq_offline.actor_loss(network, actor, batch, iq_offline.Args(cloning_weight=cloning_weight))
    assert sorted(passes) == ["actor", "critic"]


def test_the_density_is_exact_and_that_of_the_action_between_minus_one_and_one():
    """It integrates to 1 over [−1, 1]², and agrees with torch's own transformed distribution and with `sample`."""
    torch.manual_seed(0)
    actor = iq_offline.Actor((3,), (-2.0, -0.4), (2.0, 0.4), 8).double()
    obs = torch.randn(1, 3, dtype=F64)
    grid = torch.linspace(-0.9985, 0.9985, 600, dtype=F64)
    a = torch.cartesian_prod(grid, grid)
    total = log_prob_of(actor, obs.expand(len(a), 3), a).exp().sum().item() * (grid[1] - grid[0]).item() ** 2
    assert total == pytest.approx(1, abs=5e-3)
    mean, log_std = actor(obs)
    reference = torch.distributions.TransformedDistribution(
        torch.distributions.Normal(mean, log_std.exp()), torch.distributions.TanhTransform())
    fresh, log_prob = iq_offline.sample_action(*actor(obs))
    assert fresh.abs().max() < 1
    assert log_prob.item() == pytest.approx(reference.log_prob(fresh).sum().item())
    assert log_prob_of(actor, obs, fresh).item() == pytest.approx(log_prob.item())


def test_densities_stay_finite_at_the_bounds_and_far_out():
    actor = iq_offline.Actor((3,), (-2.0,), (2.0,), 8)
    obs = torch.zeros(2, 3)
    assert torch.isfinite(log_prob_of(actor, obs, torch.tensor([[1.0], [-1.0]]))).all()
    x = torch.tensor([[30.0], [-30.0]], requires_grad=True)
    density = iq_offline.log_density(torch.zeros(2, 1), torch.zeros(2, 1), x)
    density.sum().backward()
    assert torch.isfinite(density).all() and torch.isfinite(x.grad).all()


def test_environment_units_and_back():
    actor = iq_offline.Actor((3,), (-0.4, 1.0), (0.4, 5.0), 8)
    env = torch.tensor([[-0.4, 5.0], [0.2, 3.0]])
    torch.testing.assert_close(actor.from_env(env), torch.tensor([[-1.0, 1.0], [0.5, 0.0]]))
    torch.testing.assert_close(actor.to_env(actor.from_env(env)), env)
    low, high = iq_offline.act(None, actor, 10 * torch.randn(50, 3)).aminmax(dim=0)
    assert (low >= torch.tensor([-0.4, 1.0])).all() and (high <= torch.tensor([0.4, 5.0])).all()


# ------------------------------------------------------------------------------------------------- whole runs
@BOTH
def test_no_environment_at_all(demos, command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gym, "make_vec", None)  # whoever makes one fails
    assert iq_offline.main(command("--demos", demos, "--holdout", "0.4")) == 0
    out = capsys.readouterr().out
    assert "eval_return=nan" in out.splitlines()[-1] and "--evaluate" in out.splitlines()[-2]
    last = rows(tmp_path / "run")[-1]
    assert last["updates"] == "40" and np.isfinite(float(last["loss"]))
    measured = "holdout_accuracy" if demos == DISCRETE else "holdout_error"
    assert np.isfinite(float(last["holdout_log_likelihood"])) and 0 <= float(last[measured]) <= 2
    monkeypatch.undo()
    shown = out.splitlines()[-2].split("python iq_offline.py ")[1].split()
    assert iq_offline.main([*shown, "--eval-episodes", "2"]) == 0
    assert "episodes=2" in capsys.readouterr().out.splitlines()[-1]


@BOTH
@pytest.mark.parametrize("flags", [[], ["--objective", "bc"]], ids=["iq", "bc"])
def test_training_steps_no_environment_and_does_not_need_the_one_that_is_named(demos, flags, command, tmp_path,
                                                                               monkeypatch, capsys):
    """With --eval-every 0: env.step raises, or no such environment is installed; training is the same."""
    name = "CartPole" if demos == DISCRETE else "Pendulum"
    wrapped = gym.make(f"{name}-v1").unwrapped.__class__

    def step(*_):
        raise AssertionError("offline training stepped an environment")

    monkeypatch.setattr(wrapped, "step", step)
    flags = ["--demos", demos, "--eval-every", "0", *flags]
    for env_id in (f"{name}-v1", f"{name}-v77"):
        assert iq_offline.main(command(*flags, "--env-id", env_id, "--run-name", env_id)) == 0
    assert same(weights(tmp_path / f"{name}-v1"), weights(tmp_path / f"{name}-v77"))


@BOTH
def test_nan_rewards_change_nothing(demos, command, tmp_path, capsys):
    data = dict(np.load(demos))
    np.savez(tmp_path / "poisoned.npz", **data | {"rewards": data["rewards"] * np.nan})
    for name, path in (("clean", demos), ("poisoned", tmp_path / "poisoned.npz")):
        assert iq_offline.main(command("--demos", path, "--run-name", name)) == 0
    assert same(weights(tmp_path / "clean"), weights(tmp_path / "poisoned"))
    assert "expert=nan" in capsys.readouterr().out.splitlines()[-1]


@BOTH
def test_as_a_command_beside_nothing(demos, command, tmp_path):
    """A copy of the script alone: outputs, the model elsewhere, bad input in one sentence."""
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "iq_offline.py").write_bytes((ROOT / "iq_offline.py").read_bytes())
    name = "CartPole-v1" if demos == DISCRETE else "Pendulum-v1"

    def run(*arguments):
        return subprocess.run([sys.executable, "iq_offline.py", *arguments], cwd=alone, capture_output=True, text=True)

    missing = run(*command("--env-id", name))
    assert missing.returncode == 2 and "--demos" in missing.stderr and "Traceback" not in missing.stderr
    done = run(*command("--env-id", name, "--demos", demos))
    assert done.returncode == 0, done.stderr
    final = done.stdout.splitlines()[-1]
    assert final.startswith("final eval_return=") and "steps=0 updates=40 " in final
    last = rows(tmp_path / "run")[-1]
    assert {"step", "updates", "eval_return_mean", "eval_return_std", "steps_per_second", "seconds"} <= last.keys()
    assert float(final.split("eval_return=")[1].split()[0]) == pytest.approx(float(last["eval_return_mean"]))
    assert f" seconds={float(last['seconds']):.1f} " in final
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert files == {"args.json", "metrics.csv", "model.pt", "checkpoint.pt", "iq_offline.py"}
    network, actor, saved = iq_offline.load_model(str(tmp_path / "run" / "model.pt"))
    obs = torch.as_tensor(np.load(demos)["observations"][:5])
    action = iq_offline.act(network, actor, obs)
    reward = iq_offline.implied_reward(network, actor, obs, action, obs, torch.zeros(5), saved["gamma"],
                                       saved["temperature"])
    assert action.shape == ((5,) if demos == DISCRETE else (5, 1))
    assert reward.shape == (5,) and torch.isfinite(reward).all()
    again = run(*command("--env-id", name, "--demos", demos))
    assert again.returncode == 2 and "exists" in again.stderr


@BOTH
def test_training_moves_every_parameter(demos, command, tmp_path):
    assert iq_offline.main(command("--demos", demos)) == 0
    torch.manual_seed(1)
    trained, actor, _ = iq_offline.load_model(str(tmp_path / "run" / "model.pt"))
    torch.manual_seed(1)
    fresh = iq_offline.QNetwork(**trained.sizes)
    pairs = [(fresh, trained)] + ([(iq_offline.Actor(**actor.sizes), actor)] if actor else [])
    for before, after in pairs:
        for (name, one), other in zip(before.named_parameters(), after.parameters()):
            assert (one != other).any(), name


@BOTH
def test_same_seed_same_csv_and_resume_goes_on_as_if_never_stopped(demos, command, tmp_path, capsys):
    tables = []
    for name in ("one", "two"):
        assert iq_offline.main(command("--demos", demos, "--run-name", name)) == 0
        tables.append([{k: v for k, v in row.items() if "second" not in k} for row in rows(tmp_path / name)])
    assert str(tables[0]) == str(tables[1])
    assert iq_offline.main(command("--demos", demos, "--run-name", "half", "--total-updates", "20")) == 0
    assert iq_offline.main(["--resume", str(tmp_path / "half"), "--total-updates", "40"]) == 0
    assert same(weights(tmp_path / "one"), weights(tmp_path / "half"))
    assert [row["updates"] for row in rows(tmp_path / "half")] == ["20", "40"]
    assert iq_offline.main(["--resume", str(tmp_path / "half"), "--gamma", "0.5"]) == 2
    assert "--gamma" in capsys.readouterr().err


def test_a_stopped_run_leaves_a_checkpoint_and_says_how_to_go_on(command, tmp_path):
    arguments = command("--demos", CONTINUOUS, "--total-updates", "10000000", "--eval-every", "100")
    process = subprocess.Popen([sys.executable, ROOT / "iq_offline.py", *arguments], stdout=subprocess.PIPE, text=True,
                               stderr=subprocess.PIPE)
    deadline = time.time() + 120
    while not (tmp_path / "run" / "metrics.csv").exists() and time.time() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143 and "Traceback" not in err, err
    words = out.splitlines()[-1].split("python ")[1].split()
    updates = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["updates"]
    assert iq_offline.main([*words[1:], "--total-updates", str(updates + 5)]) == 0


def test_non_finite_training_exits_with_1(command, capsys):
    with pytest.raises(SystemExit) as exit:
        iq_offline.main(command("--demos", DISCRETE, "--learning-rate", "1e30"))
    assert exit.value.code == 1 and "--learning-rate" in capsys.readouterr().err


FORMS = ["--divergence tv", "--divergence kl", "--divergence forward_kl", "--divergence js", "--divergence hellinger",
         "--divergence w1", "--divergence w1 --chi2-alpha 1", "--value-loss v0", "--value-loss v0_expert",
         "--temperature 0", "--target-rate 0.01", "--target-rate 0 --average-rate 0", "--no-standardize-obs",
         "--hidden-layers 0", "--weight-decay 0.1", "--cloning-weight 0.1", "--q-bound 5", "--objective bc"]


@BOTH
@pytest.mark.parametrize("flags", FORMS)
def test_every_form_of_the_objective_trains(demos, flags, command, tmp_path):
    assert iq_offline.main(command("--demos", demos, *flags.split(), "--holdout", "0.5")) == 0
    last = rows(tmp_path / "run")[-1]
    assert all(np.isfinite(float(value)) for name, value in last.items() if not name.startswith("eval"))
    assert ("actor_cloning_term" in last) is (demos == CONTINUOUS and "bc" not in flags)


@BOTH
@pytest.mark.parametrize("divergence", ["chi2", "w1"])
def test_compiled_and_eager_updates_agree(demos, divergence, monkeypatch):
    results = []
    for compile in (False, True):
        network, actor, batch = setting("discrete" if demos == DISCRETE else "continuous")
        optimizers = [part and torch.optim.AdamW(part.parameters(), lr=1e-3) for part in (network, actor)]
        update = iq_offline.make_update(network, None, actor, None, *optimizers,
                                        iq_offline.Args(compile=compile, temperature=0.0 if actor else 0.1,
                                                        divergence=divergence))
        if actor:  # compiled noise is another: none
            monkeypatch.setattr(iq_offline, "sample_action", lambda mean, log_std: (torch.tanh(mean), 0 * mean[:, 0]))
        torch.manual_seed(9)
        with torch._inductor.config.patch(fallback_random=True):  # the same interpolates for both
            results.append([update(batch, batch.obs[:0])["loss"].item() for _ in range(3)])
    assert results[0] == pytest.approx(results[1], rel=1e-4)


@BOTH
def test_evaluate_plays_what_was_trained_and_records_it(demos, command, tmp_path, capsys):
    name = "CartPole-v1" if demos == DISCRETE else "Pendulum-v1"
    assert iq_offline.main(command("--env-id", name)) == 0
    trained = capsys.readouterr().out.splitlines()[-1].split()
    model = str(tmp_path / "run" / "model.pt")
    assert iq_offline.main(["--evaluate", model, "--eval-episodes", "2", "--capture-video"]) == 0
    played = capsys.readouterr().out.splitlines()[-1].split()
    assert played[1:7] == trained[1:7]
    assert (tmp_path / "run" / "videos" / "evaluate.mp4").stat().st_size > 1000
    assert iq_offline.main(["--evaluate", model, "--env-id", "Acrobot-v1"]) == 2
    assert iq_discrete.main(["--evaluate", model]) == 2


def test_a_policy_that_was_never_shown_the_last_actions_is_played(command, tmp_path, capsys):
    with np.load(DISCRETE) as file:
        data = {name: file[name] for name in file.files if name != "num_actions"} | {"actions": file["actions"] * 0}
    np.savez(tmp_path / "left.npz", **data | {"env_id": np.array("unknown")})  # of a task whose actions nobody knows
    assert iq_offline.main(command("--demos", tmp_path / "left.npz")) == 0
    model = ["--evaluate", str(tmp_path / "run" / "model.pt"), "--eval-episodes", "2"]
    assert iq_offline.main([*model, "--env-id", "CartPole-v1"]) == 0
    assert iq_offline.main([*model, "--env-id", "Acrobot-v1"]) == 2
    capsys.readouterr()
    assert iq_offline.main(model) == 2 and "name no environment; give --env-id" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------- demonstrations
def demonstrations(actions, lengths=(7, 5, 3), **more):
    """Episodes of 4 numbers; the second and third end by themselves."""
    lengths = np.array(lengths)
    rng = np.random.default_rng(5)
    ends = np.zeros(lengths.sum(), bool)
    ends[np.cumsum(lengths)[1:] - 1] = True
    return {"observations": rng.normal(size=((lengths + 1).sum(), 4)).astype(np.float32), "actions": actions,
            "terminations": ends, "truncations": np.zeros_like(ends), "episode_lengths": lengths,
            "env_id": np.array("MyRobot-v0"), **more}


RNG = np.random.default_rng(3)
WHOLE, REAL = RNG.integers(3, size=15), RNG.uniform(-1, 1, (15, 2)).astype(np.float32)


def load(tmp_path, data, **fields):
    np.savez(tmp_path / "demos.npz", **data)
    args = iq_offline.Args(**{"demos": str(tmp_path / "demos.npz"), "num_demos": 0, **fields})
    return iq_offline.load_demonstrations(args, None, "cpu")


def test_sizes_and_bounds_from_the_file_or_from_the_data(tmp_path, capsys):
    assert load(tmp_path, demonstrations(WHOLE)).spaces[:2] == ((4,), 3)
    assert load(tmp_path, demonstrations(WHOLE, num_actions=np.array(6))).spaces.num_actions == 6
    assert load(tmp_path, demonstrations(np.uint8(WHOLE * 127 + 1))).spaces.num_actions == 256
    bounds = {"action_low": np.array([-2.0, -1.0]), "action_high": np.array([2.0, 3.0])}
    demos = load(tmp_path, demonstrations(REAL, **bounds))
    assert demos.spaces[1:] == (0, (-2.0, -1.0), (2.0, 3.0))
    np.testing.assert_allclose(demos.transitions.action, np.stack([REAL[:, 0] / 2, (REAL[:, 1] - 1) / 2], 1), atol=1e-6)
    assert "warning" not in capsys.readouterr().err
    demos = load(tmp_path, demonstrations(REAL))
    assert demos.transitions.action.min(0).values.tolist() == [-1, -1]
    assert demos.transitions.action.max(0).values.tolist() == [1, 1]
    told = capsys.readouterr().err
    assert "extremes" in told and "in the file would tell" in told
    demos = load(tmp_path, demonstrations(REAL, action_low=np.zeros(2), action_high=np.array([np.inf, 3.0])))
    assert demos.spaces.action_low == (0.0, 0.0) and demos.spaces.action_high == (REAL[:, 0].max(), 3.0)  # a bound by itself
    told = capsys.readouterr().err
    assert "dimensions [0] lack a bound" in told and f"{(REAL < 0).any(1).sum()} of 15 actions lie beyond" in told


def test_no_bounds_in_the_file_are_asked_for_where_the_environment_has_them(tmp_path, capsys):
    np.savez(tmp_path / "demos.npz", **demonstrations(REAL))
    args = iq_offline.Args(demos=str(tmp_path / "demos.npz"), num_demos=0)
    spaces = iq_offline.Spaces((4,), 0, (-1.0, -1.0), (np.inf, 1.0))
    assert iq_offline.load_demonstrations(args, spaces, "cpu").spaces.action_high == (REAL[:, 0].max(), 1.0)
    told = capsys.readouterr().err
    assert "dimensions [0] lack a bound" in told and "in the file" not in told


def test_actions_beyond_the_bounds_are_clipped_with_one_warning_that_counts_them(tmp_path, capsys):
    actions = REAL.copy()
    actions[:4, 0] = 5.0
    actions[3, 1] = -7.0
    demos = load(tmp_path, demonstrations(actions, action_low=-np.ones(2), action_high=np.ones(2)))
    err = capsys.readouterr().err
    assert err.count("warning") == 1 and "4 of 15" in err and "6" in err
    assert demos.transitions.action.abs().max() == 1


def test_holdout_keeps_out_whole_episodes(tmp_path):
    data = demonstrations(WHOLE)
    data["observations"][:, 0] = np.repeat(np.arange(3), [8, 6, 4])
    whole, part = load(tmp_path, data), load(tmp_path, data, holdout=0.3)
    assert whole.holdout is None and len(whole.transitions.obs) == 15
    kept, held = (set(rows.obs[:, 0].tolist()) for rows in (part.transitions, part.holdout))
    assert len(kept) == 2 and len(held) == 1 and not kept & held
    assert len(part.transitions.obs) + len(part.holdout.obs) == 15 and len(part.initial_obs) == 2
    single = demonstrations(np.arange(25) % 2, lengths=[1] * 25)
    assert len(load(tmp_path, single, holdout=0.28, num_demos=0).holdout.obs) == 7  # 0.28·25 is a little above 7 in floats


def test_one_class_of_action_only_trains_and_warns(tmp_path, command, capsys):
    np.savez(tmp_path / "one.npz", **demonstrations(np.zeros(15, np.int64), num_actions=np.array(3)))
    assert iq_offline.main(command("--demos", tmp_path / "one.npz")) == 0
    assert "action 0 alone" in capsys.readouterr().err


@pytest.mark.parametrize("actions", [WHOLE[:1], REAL[:1]], ids=["discrete", "continuous"])
def test_one_transition_trains(actions, tmp_path, command, capsys):
    np.savez(tmp_path / "one.npz", **demonstrations(actions, (1,)))
    assert iq_offline.main(command("--demos", tmp_path / "one.npz", "--num-demos", "1", "--subsample-freq", "1")) == 0
    assert np.isfinite(float(rows(tmp_path / "run")[-1]["loss"]))


def test_episodes_shorter_than_the_subsampling_step_keep_a_transition_each(tmp_path, command, capsys):
    demos = load(tmp_path, demonstrations(WHOLE), subsample_freq=20)
    assert len(demos.transitions.obs) == 3
    assert "3 of their 15 transitions" in capsys.readouterr().out
    assert iq_offline.main(command("--demos", tmp_path / "demos.npz", "--subsample-freq", "20")) == 0


LOW = {"action_low": -np.ones(2), "action_high": np.ones(2)}
BAD = {
    "actions NaN": (demonstrations(np.where(REAL > 0.9, np.nan, REAL * 0 + np.nan)), [], "NaN"),
    "actions flat": (demonstrations(REAL[:, 0]), [], "(15,)"),
    "actions one-hot": (demonstrations(np.eye(3, dtype=int)[WHOLE]), [], "(15, 3)"),
    "actions above num_actions": (demonstrations(WHOLE, num_actions=np.array(2)), [], "expected 0 to 1"),
    "actions below 0": (demonstrations(WHOLE - 1), [], "from -1"),
    "actions without end": (demonstrations(WHOLE * 10**9), [], "65,536"),
    "num_actions a list": (demonstrations(WHOLE, num_actions=np.zeros(3)), [], "num_actions"),
    "bounds too few": (demonstrations(REAL, **LOW | {"action_low": -np.ones(1)}), [],
                       "action_low of float64 and shape (1,), with values [-1.], expected 2 numbers"),
    "bounds NaN": (demonstrations(REAL, **LOW | {"action_high": np.full(2, np.nan)}), [], "action_high of"),
    "no number of actions": (demonstrations(WHOLE, num_actions=np.array(0)), [], "num_actions of int64 and shape (), with "
                             "values [0], expected one whole number, 1 or more"),
    "bounds crossed": (demonstrations(REAL, action_low=np.ones(2), action_high=-np.ones(2)), [], "low below high"),
    "nothing left": (demonstrations(WHOLE), ["--num-demos", "1", "--holdout", "0.2"], "--holdout 0.2"),
    "another environment": (demonstrations(WHOLE), ["--env-id", "CartPole-v1"], "MyRobot-v0"),
    "continuous for discrete": (demonstrations(REAL, env_id=np.array("CartPole-v1")), ["--env-id", "CartPole-v1"],
                                "discrete"),
    "other observations": (demonstrations(WHOLE, env_id=np.array("Acrobot-v1")), ["--env-id", "Acrobot-v1"], "(6,)"),
    "holdout of all": (demonstrations(WHOLE), ["--holdout", "1.0"], "below 1"),
    "no such environment": (demonstrations(WHOLE), ["--env-id", "NoSuchThing-v1"], "NoSuchThing"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_writes_nothing(case, tmp_path, command, capsys):
    data, flags, word = BAD[case]
    np.savez(tmp_path / "bad.npz", **data)
    assert iq_offline.main(command("--demos", tmp_path / "bad.npz", *flags)) == 2
    err = capsys.readouterr().err
    assert err.startswith("iq_offline.py: ") and len(err.strip().splitlines()) == 1 and word in err, err
    assert not (tmp_path / "run").exists()


def test_neither_demonstrations_nor_environment(command, capsys):
    assert iq_offline.main(command()) == 2
    assert "--demos" in capsys.readouterr().err


def test_settings_of_an_environment_never_override_a_flag(command, tmp_path):
    argv = command("--env-id", "CartPole-v1", "--demos", DISCRETE, "--eval-every", "0")
    own = iq_offline.SETTINGS["CartPole"]
    assert iq_offline.parse_args(argv).hidden_layers == own["hidden_layers"] != 1
    assert iq_offline.parse_args([*argv, "--hidden-layers", "1"]).hidden_layers == 1
    assert iq_offline.main(argv) == 0
    assert json.loads((tmp_path / "run" / "args.json").read_text())["hidden_layers"] == own["hidden_layers"]


# ---------------------------------------------------------------------------------------------------- learning
def final_return(capsys, *flags):
    assert iq_offline.main([*map(str, flags)]) == 0
    return float(capsys.readouterr().out.split("eval_return=")[-1].split()[0])


def test_cartpole_from_seven_trajectories(tmp_path, capsys):
    """175 transitions; random actions give 23."""
    score = final_return(capsys, "--env-id", "CartPole-v1", "--num-demos", 7, "--subsample-freq", 20, "--seed", 3,
                         "--eval-every", 3000, "--eval-episodes", 10, "--out-dir", tmp_path)
    assert score >= 450


@pytest.mark.parametrize("images", ["--mirror", "--no-mirror"])
def test_cartpole_from_an_expert_that_never_moves_but_left(images, left_only, tmp_path, capsys):
    """The control: a reward that merely says «survive» would score 500 here too. With images, whose expert never moves but
    right, too."""
    score = final_return(capsys, "--env-id", "CartPole-v1", "--demos", left_only, "--seed", 3, images,
                         "--eval-every", 3000, "--eval-episodes", 10, "--out-dir", tmp_path)
    assert score < 50


def test_pendulum_from_twenty_trajectories(tmp_path, capsys):
    """Random actions give −1197, the expert about −130."""
    score = final_return(capsys, "--env-id", "Pendulum-v1", "--num-demos", 20, "--seed", 3, "--total-updates", 4000,
                         "--eval-every", 4000, "--eval-episodes", 10, "--out-dir", tmp_path)
    assert score >= -400
