"""iq_continuous.py's mathematics: the density, hand numbers of the loss, where gradients go, what one update does."""
import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

import iq_continuous as iq

F64 = torch.float64
VALUE_LOSSES = ["value", "value_expert", "v0", "v0_expert"]


# ------------------------------------------------------------------------------------------- the density
@pytest.mark.parametrize("dimensions", [1, 3])
def test_log_density_is_that_of_the_transformed_distribution(dimensions):
    g = torch.Generator().manual_seed(0)
    mean, log_std, before = (torch.randn(50, dimensions, generator=g, dtype=F64) for _ in range(3))
    reference = TransformedDistribution(Independent(Normal(mean, log_std.exp()), 1), TanhTransform())
    torch.testing.assert_close(iq.log_density(mean, log_std, before), reference.log_prob(torch.tanh(before)))


@pytest.mark.parametrize("mean, std", [(0.0, 0.3), (0.8, 0.5), (-0.4, 1.0), (0.0, 0.05)])
def test_the_density_integrates_to_one_over_the_actions(mean, std):
    action = torch.linspace(-1, 1, 2_000_001, dtype=F64)[1:-1, None]
    density = iq.log_density(torch.full_like(action, mean), torch.full_like(action, math.log(std)), torch.atanh(action))
    assert torch.trapezoid(density.exp(), action[:, 0]).item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("log_std", iq.Actor.LOG_STD)
@pytest.mark.parametrize("before", [-1e4, -60.0, -10.0, 10.0, 60.0, 1e4])
def test_log_density_at_extremes_is_finite_and_right(before, log_std):
    """In float32, where tanh is ±1 and 1 − tanh² is 0: log(1 − tanh²) = log 4 − 2|u| there."""
    mean = torch.tensor([[before - 0.01]], requires_grad=True)
    log_std = torch.tensor([[log_std]], requires_grad=True)
    got = iq.log_density(mean, log_std, torch.tensor([[before]]))
    std = math.exp(log_std.item())
    gap = float(torch.tensor(before)) - mean.item()
    expected = -(gap / std) ** 2 / 2 - math.log(std) - math.log(2 * math.pi) / 2 - (math.log(4) - 2 * abs(before))
    assert got.item() == pytest.approx(expected, rel=1e-4, abs=1e-3)
    assert all(torch.isfinite(x).all() for x in torch.autograd.grad(got.sum(), (mean, log_std)))


def make_actor(obs_size=3, low=(-1.0, -1.0), high=(1.0, 1.0), hidden=16, seed=0, **more) -> iq.Actor:
    torch.manual_seed(seed)
    return iq.Actor((obs_size,), list(low), list(high), hidden, **more)


def make_critic(obs_size=3, num_actions=2, hidden=16, seed=1, **more) -> iq.QNetwork:
    torch.manual_seed(seed)
    return iq.QNetwork((obs_size,), num_actions, hidden, **more)


def test_a_sample_comes_with_its_own_density_and_is_reparameterised():
    actor = make_actor().double()
    obs = torch.randn(200, 3, dtype=F64)
    action, log_prob = iq.sample_action(*actor(obs))
    mean, log_std = actor(obs)
    assert action.shape == (200, 2) and log_prob.shape == (200,) and (action.abs() < 1).all()
    torch.testing.assert_close(log_prob, iq.log_density(mean, log_std, torch.atanh(action)), rtol=1e-6, atol=1e-6)
    for value in (action, log_prob):
        gradients = torch.autograd.grad(value.sum(), list(actor.parameters()), retain_graph=True)
        assert all(g.any() for g in gradients)
    with torch.no_grad():
        again = iq.sample_action(*actor(obs))[0]
    assert (again != action).any(), "the noise is fresh"


def test_samples_have_the_entropy_of_the_density():
    """−E[log π] of samples, against the integral −∫ p log p over the actions."""
    torch.manual_seed(0)
    fixed = torch.zeros(400_000, 1, dtype=F64)
    _, log_prob = iq.sample_action(fixed + 0.4, fixed + math.log(0.6))
    action = torch.linspace(-1, 1, 400_001, dtype=F64)[1:-1, None]
    density = iq.log_density(torch.full_like(action, 0.4), torch.full_like(action, math.log(0.6)), torch.atanh(action))
    integral = torch.trapezoid(-density.exp() * density, action[:, 0]).item()
    assert -log_prob.mean().item() == pytest.approx(integral, abs=0.01)


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e6])
def test_log_deviation_stays_in_its_range(scale):
    actor = make_actor()
    _, log_std = actor(scale * torch.randn(500, 3))
    assert log_std.min() >= iq.Actor.LOG_STD[0] - 1e-6 and log_std.max() <= iq.Actor.LOG_STD[1] + 1e-6


# --------------------------------------------------------------------------------------- units of action
BOUNDS = [([-0.4], [0.4]), ([0.0], [3.0]), ([-0.4, 0.0, -2.0], [0.4, 3.0, 5.0])]


@pytest.mark.parametrize("low, high", BOUNDS)
def test_units_of_action(low, high):
    """The ends go to the ends, what lies between keeps its place, and what lies beyond is clipped."""
    actor = make_actor(low=low, high=high)
    low, high = torch.tensor(low), torch.tensor(high)
    for share in (0.0, 0.25, 0.5, 1.0):
        ours, theirs = torch.full_like(low, 2 * share - 1), low + share * (high - low)
        torch.testing.assert_close(actor.to_env(ours), theirs)
        torch.testing.assert_close(actor.from_env(theirs), ours)
    assert (actor.from_env(high + 5) == 1).all() and (actor.from_env(low - 5) == -1).all()


@pytest.mark.parametrize("low, high", BOUNDS)
def test_act_is_the_tanh_of_the_mean_in_the_environments_units(low, high):
    actor, obs = make_actor(low=low, high=high), torch.randn(40, 3)
    action = actor.act(obs)
    torch.testing.assert_close(actor.from_env(action), torch.tanh(actor(obs)[0]), rtol=1e-5, atol=1e-5)
    assert torch.equal(action, actor.act(obs)), "deterministic"


# ------------------------------------------------------------------------------------------- hand numbers
# Three states and one action. Q(s,a) = q[s] + 2a, and the policy draws ã = [0.5, -0.5, 0] with log π = [1, -2, 2].
# At γ = τ = 0.5: V = [1.5, 2, -2], and by the target critic V' = [0.5, 4, 0].
HAND_Q, HAND_TARGET_Q = [1.0, 2.0, -1.0], [0.0, 4.0, 1.0]
DRAWN, LOG_PROB = [0.5, -0.5, 0.0], [1.0, -2.0, 2.0]
# (state, action, next state, terminated): two expert rows, then three of the policy. Unequal halves tell one mean over
# all rows from two means.
HAND_ROWS = [(0, 0.5, 1, 0.0), (1, 0.5, 0, 1.0), (2, 0.0, 0, 0.0), (0, 0.0, 2, 1.0), (2, 1.0, 1, 0.0)]
HAND_INITIAL = [0, 0, 2]
HAND_R = [0.0, 3.0, -1.25, 1.0, -1.0]  # 2 - 0.5·4, 3, -1 - 0.5·0.5, 1, 1 - 0.5·4
HAND_VALUE = {
    "value": -0.65,  # (1.5 - 2 + 2 - 2 - 0.25 + 1.5 - 2 - 2)/5
    "value_expert": 0.75,  # (1.5 - 2 + 2)/2
    "v0": 0.5 / 3,  # 0.5·(1.5 + 1.5 - 2)/3
    "v0_expert": 0.875,  # 0.5·(1.5 + 2)/2
}
HAND_CHI2 = {"expert": 0.5625, "both": 0.3140625}  # at α = 2: (0 + 9)/2/8, (0 + 9 + 1.5625 + 1 + 1)/5/8


class Table(nn.Module):
    """Q(s, a) = q[s] + 2a, with observations one-hot."""

    def __init__(self, q):
        super().__init__()
        self.q = nn.Parameter(torch.tensor(q, dtype=F64))

    def forward(self, obs, action):
        return obs @ self.q + 2 * action[:, 0]


def one_hot(states):
    return torch.eye(3, dtype=F64)[torch.as_tensor(states)]


def table_policy(obs):
    """The action that is drawn in each state and its log-density, in place of mean and log-deviation."""
    return obs @ torch.tensor(DRAWN, dtype=F64)[:, None], obs @ torch.tensor(LOG_PROB, dtype=F64)


@pytest.fixture
def drawn(monkeypatch):
    monkeypatch.setattr(iq, "sample_action", lambda *draws: draws)


def hand_batch(rows=HAND_ROWS):
    s, a, s2, d = zip(*rows)
    return iq.Batch(one_hot(s), torch.tensor(a, dtype=F64)[:, None], one_hot(s2), torch.tensor(d, dtype=F64))


def hand_loss(rows=HAND_ROWS, n_expert=2, q=HAND_Q, target=HAND_TARGET_Q, **settings):
    args = iq.Args(**({"gamma": 0.5, "temperature": 0.5, "chi2_alpha": 2.0, "bound_targets": False} | settings))
    batch, critic = hand_batch(rows), Table(q)
    loss, terms = iq.iq_loss(critic, critic if target is None else Table(target), table_policy,
                             batch, table_policy(batch.obs), n_expert, one_hot(HAND_INITIAL), args)
    return loss, {name: term.mean().item() for name, term in terms.items()}, critic


@pytest.mark.parametrize("chi2_rows", ["expert", "both"])
@pytest.mark.parametrize("value_loss", VALUE_LOSSES)
def test_loss_hand_numbers(value_loss, chi2_rows, drawn):
    loss, terms, _ = hand_loss(value_loss=value_loss, chi2_rows=chi2_rows)
    assert terms["expert_term"] == pytest.approx(-1.5)  # -(0 + 3)/2
    assert terms["value_term"] == pytest.approx(HAND_VALUE[value_loss])
    assert terms["chi2_term"] == pytest.approx(HAND_CHI2[chi2_rows])
    assert terms["reward_expert"] == pytest.approx(1.5) and terms["reward_policy"] == pytest.approx(-1.25 / 3)
    assert loss.item() == terms["loss"] == pytest.approx(-1.5 + HAND_VALUE[value_loss] + HAND_CHI2[chi2_rows])


@pytest.mark.parametrize("chi2_rows", ["expert", "both"])
@pytest.mark.parametrize("value_loss", VALUE_LOSSES)
def test_loss_gradient_by_hand(value_loss, chi2_rows, drawn):
    """∂L/∂q[s], with V(s') a constant: of the expert term, of V(s) in the second term, of r² (2r/8 over the rows)."""
    loss, _, critic = hand_loss(value_loss=value_loss, chi2_rows=chi2_rows)
    loss.backward()
    counts = {"value": [2 / 5, 1 / 5, 2 / 5], "value_expert": [1 / 2, 1 / 2, 0], "v0": [1 / 3, 0, 1 / 6],
              "v0_expert": [1 / 4, 1 / 4, 0]}[value_loss]  # the states' share of V, (1−γ) included
    rows = 2 if chi2_rows == "expert" else 5
    expected = torch.tensor([-1 / 2, -1 / 2, 0], dtype=F64) + torch.tensor(counts, dtype=F64)
    for (state, *_), r in list(zip(HAND_ROWS, HAND_R))[:rows]:
        expected[state] += 2 * r / 8 / rows
    torch.testing.assert_close(critic.q.grad, expected)


@pytest.mark.parametrize("target, clipped", [
    ([0.0, 4.0, 1.0], [0.4, 0.4, 0.0]),  # V' = [0.5, 4, 0]
    ([-1.0, -5.0, 1.0], [-0.4, -0.4, 0.0]),  # V' = [-0.5, -5, 0]
])
@pytest.mark.parametrize("bound_targets", [True, False])
def test_targets_are_clipped_at_4_alpha_over_1_minus_gamma(bound_targets, target, clipped, drawn):
    """α = 0.05 and γ = 0.5: the bound is 0.4; terminated rows have V(s') = 0 either way."""
    _, terms, _ = hand_loss(target=target, chi2_alpha=0.05, bound_targets=bound_targets)
    value = clipped if bound_targets else [target[0] + 1 - 0.5, target[1] - 1 + 1, target[2] + 0 - 1]
    q = [2.0, 3.0, -1.0, 1.0, 1.0]
    r = [q - 0.5 * (1 - d) * value[s2] for q, (_, _, s2, d) in zip(q, HAND_ROWS)]
    assert terms["reward_expert"] == pytest.approx(np.mean(r[:2]))
    assert terms["reward_policy"] == pytest.approx(np.mean(r[2:]))
    assert terms["chi2_term"] == pytest.approx(np.mean(np.square(r)) / 0.2)


def test_the_bound_is_200_at_the_published_strength(drawn):
    for level, expected in ((150.0, 150.0), (500.0, 200.0), (-500.0, -200.0)):
        _, terms, _ = hand_loss(rows=[(2, 0.0, 2, 0.0)], n_expert=1, target=[0.0, 0.0, level], temperature=0.0, gamma=0.99,
                                chi2_alpha=0.5, bound_targets=True)
        assert terms["reward_expert"] == pytest.approx(-1 - 0.99 * expected)


@pytest.mark.parametrize("chi2_rows", ["expert", "both"])
def test_offline_identity(chi2_rows, drawn):
    """Eq. 12 where actions are continuous: on expert rows alone V(s') cancels, L = E[V(s) − Q(s,a)] + E[r²]/(4α)."""
    rows = HAND_ROWS
    loss, terms, _ = hand_loss(n_expert=5, target=None, value_loss="value_expert", chi2_rows=chi2_rows)
    value = np.array(HAND_Q) + 2 * np.array(DRAWN) - 0.5 * np.array(LOG_PROB)
    s, a, s2, d = (np.array(column) for column in zip(*rows))
    q = np.array(HAND_Q)[s] + 2 * a
    r = q - 0.5 * (1 - d) * value[s2]
    assert loss.item() == pytest.approx((value[s] - q).mean() + (r**2).mean() / 8)
    assert "reward_policy" not in terms and all(map(math.isfinite, terms.values()))


@pytest.mark.parametrize("value_loss", ["value_expert", "v0_expert"])
def test_expert_forms_ignore_policy_rows(value_loss, drawn):
    other = HAND_ROWS[:2] + [(1, 0.1, 1, 0.0), (2, -1.0, 2, 0.0), (0, 0.3, 0, 0.0)]
    one, two = (hand_loss(rows=rows, value_loss=value_loss, chi2_rows="expert")[0].item() for rows in (HAND_ROWS, other))
    assert one == two


def test_temperature_zero_is_q_of_the_drawn_action(drawn):
    torch.testing.assert_close(iq.soft_value(Table(HAND_Q), table_policy, one_hot([0, 1, 2]), 0.0).detach(),
                               torch.tensor([2.0, 1.0, -1.0], dtype=F64))


def test_actor_loss_hand_number():
    """E[τ log π − Q]: 0.5·(1 - 2 + 2)/3 - (2 + 1 - 1)/3; the opposite sign of §4.4 is the one to maximise."""
    obs = one_hot([0, 1, 2])
    assert iq.actor_loss(Table(HAND_Q), obs, table_policy(obs), 0.5).item() == pytest.approx(0.5 / 3 - 2 / 3)


# ------------------------------------------------------------------------------------------ implied reward
@pytest.mark.parametrize("low, high", [([-0.4], [0.4]), ([0.0], [3.0]), ([-1.0], [1.0])])
def test_implied_reward_takes_the_environments_units_and_is_the_r_of_the_loss(low, high, drawn):
    actor, critic, batch = make_actor(low=low, high=high).double(), Table(HAND_Q), hand_batch()
    actor.forward = table_policy
    units = torch.tensor(low, dtype=F64) + (batch.action + 1) / 2 * (torch.tensor(high) - torch.tensor(low))
    r = iq.implied_reward(critic, actor, batch.obs, units, batch.next_obs, batch.terminated, 0.5, 0.5)
    assert r.shape == (5,)
    _, terms, _ = hand_loss(target=None)
    assert terms["reward_expert"] == pytest.approx(r[:2].mean().item(), abs=1e-6)
    assert terms["reward_policy"] == pytest.approx(r[2:].mean().item(), abs=1e-6)
    torch.testing.assert_close(r.detach(), torch.tensor([1.0, 3.0, -1.75, 1.0, 0.0], dtype=F64), rtol=0, atol=1e-6)


# --------------------------------------------------------------------------------- where the gradients go
def random_batch(n=12, obs_size=3, num_actions=2, seed=2) -> iq.Batch:
    g = torch.Generator().manual_seed(seed)
    return iq.Batch(torch.randn(n, obs_size, generator=g), torch.rand(n, num_actions, generator=g) * 2 - 1,
                    torch.randn(n, obs_size, generator=g), (torch.rand(n, generator=g) < 0.3).float())


def gradients(module) -> list:
    return [p.grad for p in module.parameters()]


@pytest.mark.parametrize("value_loss", VALUE_LOSSES)
def test_the_critics_loss_leaves_actor_and_target_alone(value_loss):
    """V(s') has no gradient at all; V(s) has it to the critic, and never to the actor, initial states included."""
    actor, critic, batch = make_actor(), make_critic(), random_batch()
    target = copy.deepcopy(critic)
    fresh = [x.detach() for x in iq.sample_action(*actor(batch.obs))]
    args = iq.Args(value_loss=value_loss)
    loss, terms = iq.iq_loss(critic, target, actor, batch, fresh, 6, batch.obs[:4], args)
    value_gradient = torch.autograd.grad(terms["value_term"], list(critic.parameters()), retain_graph=True)
    assert any(g.any() for g in value_gradient)
    loss.backward()
    assert all(g is None for g in gradients(actor) + gradients(target))
    assert all(g is not None and torch.isfinite(g).all() for g in gradients(critic))


def parts(**settings):
    args = iq.Args(**({"hidden_size": 16, "target_rate": 0.1, "average_rate": 0.2, "actor_lr": 1e-2, "critic_lr": 1e-2}
                      | settings))
    actor, critic = make_actor(), make_critic(layer_norm=args.layer_norm)
    target, average = make_critic(seed=3, layer_norm=args.layer_norm), make_actor(seed=4) if args.average_rate else None
    optimizers = [torch.optim.Adam(network.parameters(), lr=lr, fused=True)
                  for network, lr in ((actor, args.actor_lr), (critic, args.critic_lr))]
    return args, actor, critic, target, average, optimizers


@pytest.mark.parametrize("settings", [{}, {"value_loss": "value"}, {"value_loss": "v0", "average_rate": 0.0},
                                      {"cloning_weight": 0.5, "layer_norm": False}], ids=str)
def test_an_update_is_a_step_of_the_critic_then_of_the_actor_then_the_averages(settings):
    """Against the same steps written out, one at a time. The actor's loss adds nothing to the critic's gradients."""
    batch, fade = random_batch(), torch.tensor(0.3)
    args, actor, critic, target, average, optimizers = parts(**settings)
    _, update = iq.make_update(actor, critic, target, average, optimizers, 6, args)
    torch.manual_seed(9)
    terms = update(batch, batch.obs[:4], fade)

    _, actor2, critic2, target2, average2, (actor_adam, critic_adam) = parts(**settings)
    torch.manual_seed(9)
    fresh = iq.sample_action(*actor2(batch.obs))
    loss, _ = iq.iq_loss(critic2, target2, actor2, batch, [x.detach() for x in fresh], 6, batch.obs[:4], args)
    assert terms["loss"].item() == pytest.approx(loss.item())
    loss.backward()
    critic_adam.step()
    critic_gradients = [g.clone() for g in gradients(critic2)]
    loss = (args.temperature * fresh[1] - critic2(batch.obs, fresh[0])).mean()
    assert terms["actor_loss"].item() == pytest.approx(loss.item())
    if args.cloning_weight:
        loss = loss + fade * iq.cloning_loss(*actor2(batch.obs[:6]), batch.action[:6])
    actor_adam.zero_grad()
    loss.backward()
    actor_adam.step()
    for network, other in ((actor, actor2), (critic, critic2)):
        for p, q in zip(network.parameters(), other.parameters()):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
    for g, expected in zip(gradients(critic), critic_gradients):
        torch.testing.assert_close(g, expected, rtol=1e-5, atol=1e-7)
    for of, before, source, rate in ((target, target2, critic, 0.1), (average, average2, actor, 0.2)):
        for p, old, new in zip(of.parameters(), before.parameters(), source.parameters()) if of else ():
            torch.testing.assert_close(p, (1 - rate) * old + rate * new, rtol=1e-5, atol=1e-7)
    assert all(not term.requires_grad for term in terms.values())


@pytest.mark.parametrize("value_loss, of_value", [
    ("v0_expert", [("critic", 18)]), ("value", [("critic", 24)]), ("v0", [("critic", 12), ("actor", 4), ("critic", 4)])])
def test_the_passes_of_an_update(value_loss, of_value):
    """Those that make_update states, with the cloning term too: s, s', V(s'), (s, a) with the value rows, (s, ã)."""
    args, actor, critic, target, average, optimizers = parts(cloning_weight=0.5, value_loss=value_loss)
    passes, batch = [], random_batch()
    for name, network in {"actor": actor, "critic": critic, "target": target, "average": average}.items():
        network.register_forward_pre_hook(lambda _, inputs, name=name: passes.append((name, len(inputs[0]))))
    _, update = iq.make_update(actor, critic, target, average, optimizers, 6, args)
    update(batch, batch.obs[:4], torch.tensor(0.3))
    assert passes == [("actor", 12), ("actor", 12), ("target", 12), *of_value, ("critic", 12)]


def test_the_actor_climbs_its_critic():
    """With the critic Q = −‖a − 0.5‖² held, the actor's own steps bring its action to 0.5."""
    class Hill(nn.Module):
        def forward(self, obs, action):
            return -((action - 0.5) ** 2).sum(1)

    actor, obs = make_actor(), torch.randn(64, 3)
    optimizer = torch.optim.Adam(actor.parameters(), lr=1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        iq.actor_loss(Hill(), obs, iq.sample_action(*actor(obs)), 0.001).backward()
        optimizer.step()
    assert (actor.act(obs) - 0.5).abs().max() < 0.1


def test_compiled_and_eager_updates_agree():
    """With the bound of targets, the cloning term and both averages; the same noise for both."""
    batch, results = random_batch(), []
    for compiled in (False, True):
        args, actor, critic, target, average, optimizers = parts(value_loss="value", cloning_weight=0.5)
        _, update = iq.make_update(actor, critic, target, average, optimizers, 6, replace(args, compile=compiled))
        torch.manual_seed(9)
        with torch._inductor.config.patch(fallback_random=True):
            terms = [update(batch, batch.obs[:4], torch.tensor(0.3))["loss"].item() for _ in range(3)]
        results.append((terms, [p.detach() for net in (actor, critic, target, average) for p in net.parameters()]))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4, abs=1e-6)
    for eager, compiled in zip(results[0][1], results[1][1]):
        torch.testing.assert_close(eager, compiled, rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------------------------------------- cloning
def test_cloning_loss_is_the_experts_likelihood():
    actor, batch = make_actor(), random_batch()
    mean, log_std = actor(batch.obs)
    policy = TransformedDistribution(Independent(Normal(mean, log_std.exp()), 1), TanhTransform())
    expected = -policy.log_prob(batch.action.clamp(-0.999, 0.999)).mean()
    torch.testing.assert_close(iq.cloning_loss(mean, log_std, batch.action), expected, rtol=1e-4, atol=1e-4)


def test_the_cloning_term_reads_expert_rows_alone():
    losses, batch = [], random_batch()
    for rest in (batch, random_batch(seed=7)):
        args, actor, critic, target, average, optimizers = parts(cloning_weight=0.5)
        mixed = iq.Batch(*(torch.cat([x[:6], y[6:]]) for x, y in zip(batch, rest)))
        _, update = iq.make_update(actor, critic, target, average, optimizers, 6, args)
        losses.append(update(mixed, mixed.obs[:4], torch.tensor(0.3))["cloning_loss"])
    assert torch.equal(*losses)


def test_cloning_loss_is_finite_at_the_bounds():
    actor, batch = make_actor(), random_batch()
    loss = iq.cloning_loss(*actor(batch.obs), batch.action.sign())
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(g).all() for g in gradients(actor))


def test_cloning_raises_the_likelihood_and_leaves_the_critic():
    args, actor, critic, target, average, optimizers = parts()
    batch, before = random_batch(), copy.deepcopy(critic.state_dict())
    clone, _ = iq.make_update(actor, critic, target, average, optimizers, 12, args)
    losses = [clone(batch)["cloning_loss"].item() for _ in range(200)]
    assert losses[-1] < losses[0] - 1
    assert all(torch.equal(before[name], x) for name, x in critic.state_dict().items())


# ------------------------------------------------------------------------------------ observations, presets
def test_networks_standardise_within_and_clip_what_is_standardised():
    for network in (make_actor(), make_critic()):
        network.standardize.mean.copy_(torch.tensor([1.0, -2.0, 0.0]))
        network.standardize.std.copy_(torch.tensor([2.0, 0.5, 0.01]))
        seen = network.standardize(torch.tensor([[3.0, -2.5, 5.0], [1.0, -2.0, -5.0]]))
        torch.testing.assert_close(seen, torch.tensor([[1.0, -1.0, 10.0], [0.0, 0.0, -10.0]]))


PAPER = {"value_loss": "v0_expert", "temperature": 0.01, "actor_lr": 3e-5, "critic_lr": 3e-4, "batch_size": 256,
         "hidden_size": 256, "learning_starts": 1_280, "updates_per_step": 1.0, "chi2_rows": "both", "chi2_alpha": 0.5,
         "gamma": 0.99, "target_rate": 0.005, "divergence": "chi2", "num_demos": 1, "standardize_obs": False,
         "layer_norm": False, "bound_targets": False, "average_rate": 0.0, "cloning_weight": 0.0, "pretrain_updates": 0,
         "obs_dims": 0, "anneal_lr": 0.0, "restart_rate": 0.0}


@pytest.mark.parametrize("env_id, own", [
    ("Hopper-v5", {}), ("Walker2d-v5", {}), ("HalfCheetah-v5", {"value_loss": "value"}),
    ("Ant-v5", {"value_loss": "value", "temperature": 0.001, "obs_dims": 27}), ("Humanoid-v5", {"temperature": 1.0}),
    ("Pendulum-v1", {}),
])
def test_preset_paper_is_what_was_published(env_id, own):
    args = iq.parse_args(["--preset", "paper", "--env-id", env_id])
    assert {name: getattr(args, name) for name in PAPER} == PAPER | own
    assert iq.Actor.LOG_STD == (-5, 2)


@pytest.mark.parametrize("preset", ["ours", "paper"])
def test_flags_win_over_the_preset(preset):
    given = {"value_loss": "v0", "temperature": 0.3, "actor_lr": 0.5, "batch_size": 7, "standardize_obs": True,
             "average_rate": 0.25, "total_timesteps": 77, "eval_every": 11, "learning_starts": 3}
    flags = [text for name, value in given.items() if name != "standardize_obs"
             for text in (f"--{name.replace('_', '-')}", str(value))]
    for env_id in {*iq.SETTINGS, *iq.PAPER_SETTINGS}:
        args = iq.parse_args(["--env-id", f"{env_id}-v1", "--preset", preset, "--standardize-obs", *flags])
        assert {name: getattr(args, name) for name in given} == given


@pytest.mark.parametrize("name", iq.SETTINGS)
def test_the_environments_own_settings_apply(name):
    args = iq.parse_args(["--env-id", f"{name}-v3"])
    assert {key: getattr(args, key) for key in iq.SETTINGS[name]} == iq.SETTINGS[name]
