"""The mathematics of the objective: hand numbers, identities, every φ, and recovery of a tabular expert."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import iq_atari
import iq_discrete
import iq_ilo
import iq_offline

F64 = torch.float64
DIVERGENCES = ["chi2", "tv", "kl", "forward_kl", "hellinger", "js", "w1"]
VALUE_LOSSES = ["value", "value_expert", "v0", "v0_expert"]


# ------------------------------------------------------------------------------------------- tabular networks
class OneHotTable(nn.Module):
    """Q(s, ·) = q[s], with observations one-hot: `[B, S]` float."""

    def __init__(self, q):
        super().__init__()
        self.q = nn.Parameter(torch.as_tensor(q, dtype=F64).clone())

    def forward(self, obs):
        return obs @ self.q


class StackTable(OneHotTable):
    """Q(s, ·) = q[s], with the state's number in every pixel of a uint8 stack `[B, 4, 84, 84]`."""

    def forward(self, obs):
        assert obs.dtype == torch.uint8
        return self.q[obs[:, 0, 0, 0].long()]


def one_hot(states, num_states):
    return torch.eye(num_states, dtype=F64)[torch.as_tensor(states)]


def stack(states, num_states):
    return torch.as_tensor(states, dtype=torch.uint8)[:, None, None, None].expand(-1, 4, 84, 84)


SCRIPTS = {
    "iq_discrete": SimpleNamespace(module=iq_discrete, table=OneHotTable, encode=one_hot),
    "iq_atari": SimpleNamespace(module=iq_atari, table=StackTable, encode=stack),
}


@pytest.fixture(params=SCRIPTS)
def script(request):
    return SCRIPTS[request.param]


def make_batch(script, rows, num_states):
    """A batch of `(state, action, next state, terminated)` rows."""
    s, a, s2, d = zip(*rows)
    return script.module.Batch(script.encode(s, num_states), torch.tensor(a), script.encode(s2, num_states),
                               torch.tensor(d, dtype=F64))


def numbers(terms):
    """What the loss logs, as it is reported."""
    return {name: term.mean().item() for name, term in terms.items()}


def random_rows(n, num_states, num_actions, seed):
    rng = np.random.default_rng(seed)
    return list(zip(rng.integers(num_states, size=n).tolist(), rng.integers(num_actions, size=n).tolist(),
                    rng.integers(num_states, size=n).tolist(), (rng.random(n) < 0.4).astype(float).tolist()))


# ------------------------------------------------------------------------------------------------- soft value
def test_soft_value_hand_numbers(script):
    q = torch.tensor([[math.log(1), math.log(3)], [0.0, 0.0], [5.0, -math.inf]], dtype=F64)
    expected = torch.tensor([math.log(4), math.log(2), 5.0], dtype=F64)
    torch.testing.assert_close(script.module.soft_value(q, 1.0), expected)
    torch.testing.assert_close(script.module.soft_value(0.25 * q, 0.25), 0.25 * expected)  # τ·lse(τq/τ)


def test_soft_value_at_zero_is_the_maximum(script):
    q = torch.tensor([[1.0, 3.0, 2.0], [-5.0, -4.0, -9.0]], requires_grad=True)
    v = script.module.soft_value(q, 0.0)
    assert v.tolist() == [3.0, -4.0]
    (gradient,) = torch.autograd.grad(v.sum(), q)
    assert gradient.tolist() == [[0, 1, 0], [0, 1, 0]]


@pytest.mark.parametrize("level", [-700.0, 0.0, 700.0])
def test_soft_value_does_not_overflow_at_small_temperature(script, level):
    q = (level + torch.tensor([[0.0, 0.0, -300.0]])).requires_grad_()  # float32
    v = script.module.soft_value(q, 1e-3)
    torch.testing.assert_close(v.detach(), torch.tensor([level + 1e-3 * math.log(2)]), rtol=0, atol=2e-4)
    (gradient,) = torch.autograd.grad(v.sum(), q)
    # at |Q|/τ = 7e5 float32 resolves 0.06 in the exponent, so exp(Q/τ − logsumexp) is right to 3 %
    torch.testing.assert_close(gradient, torch.tensor([[0.5, 0.5, 0.0]]), rtol=0.04, atol=1e-6)


@pytest.mark.parametrize("temperature", [2.0, 0.3, 0.01])
def test_soft_value_gradient_is_the_policy(script, temperature):
    q = (temperature * torch.randn(6, 4, dtype=F64, generator=torch.Generator().manual_seed(0))).requires_grad_()
    (gradient,) = torch.autograd.grad(script.module.soft_value(q, temperature).sum(), q)
    weights = torch.exp(q.detach() / temperature)
    torch.testing.assert_close(gradient, weights / weights.sum(1, keepdim=True))


# --------------------------------------------------------------------------------- implied reward, hand numbers
# Three states, two actions, τ = 0 and γ = 0.5, so that V = [3, 2, -1] and, of the target network, V = [4, 6, 2].
HAND_Q = [[1.0, 3.0], [2.0, 1.0], [-1.0, -2.0]]
HAND_TARGET_Q = [[0.0, 4.0], [6.0, 0.0], [2.0, 1.0]]
# Two expert rows, then three policy rows: unequal halves tell one mean over all rows from two means.
HAND_ROWS = [(0, 1, 1, 0.0), (1, 1, 0, 1.0), (2, 0, 0, 0.0), (0, 0, 2, 1.0), (2, 1, 1, 0.0)]
HAND_INITIAL = [0, 0, 2]
HAND_R = [2.0, 1.0, -2.5, 1.0, -3.0]  # 3 - 0.5·2, 1, -1 - 0.5·3, 1, -2 - 0.5·2
# With the target network r is [0, 1, -3, 1, -5]. The terms at α = 2, that is 4α = 8:
HAND_TERMS = {  # with a target: (expert term, {value_loss: second term}, {chi2_rows: χ² term})
    False: (-1.5,  # -(2 + 1)/2
            {"value": 0.5,  # (2 + 2 - 2.5 + 3 - 2)/5
             "value_expert": 2.0,  # (2 + 2)/2
             "v0": 2.5 / 3,  # 0.5·(3 + 3 - 1)/3
             "v0_expert": 1.25},  # 0.5·(3 + 2)/2
            {"expert": 0.3125,  # (4 + 1)/2/8
             "both": 0.53125}),  # (4 + 1 + 6.25 + 1 + 9)/5/8
    True: (-0.5,  # -(0 + 1)/2
           {"value": -0.4,  # (0 + 2 - 3 + 3 - 4)/5
            "value_expert": 1.0,  # (0 + 2)/2
            "v0": 2.5 / 3,
            "v0_expert": 1.25},
           {"expert": 0.0625,  # (0 + 1)/2/8
            "both": 0.9}),  # (0 + 1 + 9 + 1 + 25)/5/8
}


def hand_batch(script):
    return make_batch(script, HAND_ROWS, 3)


def hand_args(script, **changes):
    return script.module.Args(**{"gamma": 0.5, "temperature": 0.0, "chi2_alpha": 2.0, **changes})


def test_implied_reward_hand_numbers(script):
    network, batch = script.table(HAND_Q), hand_batch(script)
    r = script.module.implied_reward(network, *batch, 0.5, 0.0)
    assert r.shape == (5,)
    torch.testing.assert_close(r.detach(), torch.tensor(HAND_R, dtype=F64))


def test_implied_reward_is_soft_at_positive_temperature(script):
    network = script.table([[math.log(1), math.log(3)], [math.log(2), math.log(5)]])
    batch = make_batch(script, [(0, 1, 1, 0.0), (1, 0, 0, 0.0)], 2)
    r = script.module.implied_reward(network, *batch, 0.5, 1.0).detach()
    torch.testing.assert_close(r, torch.tensor([math.log(3) - 0.5 * math.log(7), math.log(2) - 0.5 * math.log(4)],
                                               dtype=F64))


def test_implied_reward_masks_terminated(script):
    """Behind a terminated transition nothing of the next state counts; behind another one it does."""
    batch = make_batch(script, [(0, 1, 1, 1.0), (0, 1, 1, 0.0)], 3)
    rewards = []
    for next_value in (2.0, 50.0):
        q = torch.tensor(HAND_Q, dtype=F64)
        q[1] = next_value
        rewards.append(script.module.implied_reward(script.table(q), *batch, 0.5, 0.0).tolist())
    assert rewards == [[3.0, 3.0 - 0.5 * 2.0], [3.0, 3.0 - 0.5 * 50.0]]


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_implied_reward_is_the_r_that_the_loss_logs(script, temperature):
    network, batch = script.table(HAND_Q), hand_batch(script)
    args = hand_args(script, temperature=temperature)
    logged = numbers(script.module.iq_loss(network, None, batch, 2, script.encode(HAND_INITIAL, 3), args)[1])
    r = script.module.implied_reward(network, *batch, 0.5, temperature)
    assert logged["reward_expert"] == pytest.approx(r[:2].mean().item())
    assert logged["reward_policy"] == pytest.approx(r[2:].mean().item())


def test_implied_reward_with_an_absorbing_state_is_the_r_that_the_loss_logs():
    script = SCRIPTS["iq_discrete"]
    network, batch = script.table(HAND_Q), hand_batch(script)._replace(terminated=torch.tensor([1, 0, 1, 0, 0], dtype=F64))
    logged = iq_discrete.iq_loss(network, None, batch, 2, script.encode(HAND_INITIAL, 3), hand_args(script), 7.0)[1]
    r = iq_discrete.implied_reward(network, *batch, 0.5, 0.0, 7.0)
    torch.testing.assert_close(r, torch.cat([logged["reward_expert"], logged["reward_policy"]]))
    without = iq_discrete.implied_reward(network, *batch, 0.5, 0.0)
    torch.testing.assert_close(without - r, 0.5 * 7 * batch.terminated)


# ------------------------------------------------------------------------------------------------------- loss
@pytest.mark.parametrize("with_target", [False, True])
@pytest.mark.parametrize("chi2_rows", ["expert", "both"])
@pytest.mark.parametrize("value_loss", VALUE_LOSSES)
def test_loss_hand_numbers(script, value_loss, chi2_rows, with_target):
    network, target = script.table(HAND_Q), script.table(HAND_TARGET_Q) if with_target else None
    args = hand_args(script, value_loss=value_loss, chi2_rows=chi2_rows)
    loss, terms = script.module.iq_loss(network, target, hand_batch(script), 2, script.encode(HAND_INITIAL, 3), args)
    expert_term, value_terms, chi2_terms = HAND_TERMS[with_target]
    terms = numbers(terms)
    assert terms["expert_term"] == pytest.approx(expert_term)
    assert terms["value_term"] == pytest.approx(value_terms[value_loss])
    assert terms["chi2_term"] == pytest.approx(chi2_terms[chi2_rows])
    total = expert_term + value_terms[value_loss] + chi2_terms[chi2_rows]
    assert loss.item() == terms["loss"] == pytest.approx(total)


def reference_loss(q, next_q, rows, n_expert, initial, gamma, temperature, alpha, value_loss, chi2_rows):
    """The χ² loss row by row in numpy; `next_q` is the table that V(s') reads."""
    def value(table, state):
        return temperature * np.log(np.exp(table[state] / temperature).sum())

    bootstrap = [gamma * (1 - d) * value(next_q, s2) for _, _, s2, d in rows]
    r = [q[s, a] - b for (s, a, _, _), b in zip(rows, bootstrap)]
    differences = [value(q, s) - b for (s, _, _, _), b in zip(rows, bootstrap)]
    second = {
        "value": np.mean(differences),
        "value_expert": np.mean(differences[:n_expert]),
        "v0": (1 - gamma) * np.mean([value(q, s) for s in initial]),
        "v0_expert": (1 - gamma) * np.mean([value(q, s) for s, _, _, _ in rows[:n_expert]]),
    }[value_loss]
    penalised = r if chi2_rows == "both" else r[:n_expert]
    return -np.mean(r[:n_expert]) + second + np.mean(np.square(penalised)) / (4 * alpha)


@pytest.mark.parametrize("with_target", [False, True])
@pytest.mark.parametrize("chi2_rows", ["expert", "both"])
@pytest.mark.parametrize("value_loss", VALUE_LOSSES)
def test_loss_gradient_by_finite_differences(script, value_loss, chi2_rows, with_target):
    """Without a target network V(s') carries gradient; with one it carries none, to either network."""
    rng = np.random.default_rng(3)
    q, target_q = rng.normal(size=(4, 3)), rng.normal(size=(4, 3))
    rows, initial = random_rows(10, 4, 3, seed=4), [1, 3, 3]
    assert 0 < sum(d for *_, d in rows) < 10
    setting = dict(gamma=0.8, temperature=0.7, value_loss=value_loss, chi2_rows=chi2_rows)

    def reference(table):
        return reference_loss(table, target_q if with_target else table, rows, 4, initial, alpha=0.3, **setting)

    network, target = script.table(q), script.table(target_q) if with_target else None
    args = script.module.Args(chi2_alpha=0.3, **setting)
    loss, _ = script.module.iq_loss(network, target, make_batch(script, rows, 4), 4, script.encode(initial, 4), args)
    assert loss.item() == pytest.approx(reference(q))
    loss.backward()
    differences = np.zeros_like(q)
    for index in np.ndindex(*q.shape):
        step = np.zeros_like(q)
        step[index] = 1e-5
        differences[index] = (reference(q + step) - reference(q - step)) / 2e-5
    np.testing.assert_allclose(network.q.grad.numpy(), differences, atol=1e-7)
    if with_target:
        assert target.q.grad is None or not target.q.grad.any()


@pytest.mark.parametrize("chi2_rows", ["expert", "both"])
@pytest.mark.parametrize("value_loss", VALUE_LOSSES)
def test_loss_scales_with_q_temperature_and_alpha(script, value_loss, chi2_rows):
    """Q, τ and α times c is the loss times c, and the same policy: so τ 1 and α 50 are 0.01 and 0.5."""
    args = hand_args(script, value_loss=value_loss, chi2_rows=chi2_rows, temperature=0.01, chi2_alpha=0.5)
    losses = []
    for c in (1, 100):
        scaled = replace(args, temperature=0.01 * c, chi2_alpha=0.5 * c)
        network = script.table(c * torch.tensor(HAND_Q, dtype=F64))
        losses.append(script.module.iq_loss(network, None, hand_batch(script), 2, script.encode(HAND_INITIAL, 3), scaled)[0])
    torch.testing.assert_close(losses[1], 100 * losses[0])


@pytest.mark.parametrize("value_loss", ["value_expert", "v0_expert"])
def test_expert_forms_ignore_policy_rows(script, value_loss):
    """Expert forms with χ² on expert rows do not change with the policy rows, nor with the initial states."""
    args = hand_args(script, value_loss=value_loss, chi2_rows="expert")
    network = script.table(HAND_Q)
    other = HAND_ROWS[:2] + [(1, 0, 1, 0.0), (2, 1, 2, 0.0), (0, 0, 0, 0.0)]
    losses = [script.module.iq_loss(network, None, make_batch(script, rows, 3), 2, script.encode(initial, 3),
                                    args)[0].item() for rows, initial in ((HAND_ROWS, [0]), (other, [1, 2]))]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("value_loss", VALUE_LOSSES)
@pytest.mark.parametrize("chi2_alpha", [None, 0.3])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_loss_is_the_sum_of_its_logged_terms(divergence, chi2_alpha, value_loss):
    """−E_expert[φ(r)] + second term, + E[r²]/(4α) where asked for (always with chi2), + λ·penalty with w1 alone."""
    script, torch_seed = SCRIPTS["iq_discrete"], 5
    network, batch = script.table(HAND_Q), hand_batch(script)
    args = hand_args(script, divergence=divergence, chi2_alpha=chi2_alpha, value_loss=value_loss,
                     chi2_rows="both", gradient_penalty=3.0)
    torch.manual_seed(torch_seed)
    loss, terms = iq_discrete.iq_loss(network, None, batch, 2, script.encode(HAND_INITIAL, 3), args)
    terms = numbers(terms)
    r = torch.tensor(HAND_R, dtype=F64)
    expected = {"expert_term": -iq_discrete.phi(divergence, r[:2]).mean().item(),
                "value_term": HAND_TERMS[False][1][value_loss]}
    alpha = 0.5 if chi2_alpha is None and divergence == "chi2" else chi2_alpha
    if alpha is not None:
        expected["chi2_term"] = 21.25 / 5 / (4 * alpha)
    if divergence == "w1":
        torch.manual_seed(torch_seed)
        expected["gradient_penalty"] = 3.0 * iq_discrete.gradient_penalty(network, batch, 2).item()
        assert expected["gradient_penalty"] > 0
    for name in ("expert_term", "value_term", "chi2_term", "gradient_penalty"):
        assert terms.get(name) == (pytest.approx(expected[name]) if name in expected else None), name
    assert loss.item() == pytest.approx(sum(expected.values()))


@pytest.mark.parametrize("value_loss", VALUE_LOSSES)
def test_the_end_value_stands_where_an_episode_ended_by_itself(value_loss):
    """As if those rows went on to a state of that value: r of each row that ended is γ times it lower."""
    script, gamma, end_value = SCRIPTS["iq_discrete"], 0.5, 3.0
    args = hand_args(script, value_loss=value_loss, gamma=gamma)
    rows = [(0, 1, 2, 1.0), (1, 0, 2, 0.0), (0, 1, 2, 1.0), (2, 0, 1, 0.0), (2, 1, 1, 1.0)]
    inputs = script.table(HAND_Q), None, make_batch(script, rows, 3), 2, script.encode([0], 3), args
    plain, ending = (numbers(iq_discrete.iq_loss(*inputs, *own)[1]) for own in ((), (torch.tensor(end_value, dtype=F64),)))
    assert ending["reward_expert"] == pytest.approx(plain["reward_expert"] - gamma * end_value / 2)
    assert ending["reward_policy"] == pytest.approx(plain["reward_policy"] - gamma * end_value * 2 / 3)
    rows_that_ended = {"value": 3 / 5, "value_expert": 1 / 2}.get(value_loss, 0)
    assert ending["value_term"] == pytest.approx(plain["value_term"] - gamma * end_value * rows_that_ended)


@pytest.mark.parametrize("expert_rate, policy_rate", [(0.1, 0.1), (0.1, 0.0), (0.02, 0.1)])
def test_the_absorbing_state_has_the_best_reward_of_chi2_for_ever(expert_rate, policy_rate):
    """The r that minimises −ρ_expert·r + (ρ_expert + ρ_policy)/2·r²/(4α), summed with discount."""
    gamma, alpha = 0.9, 0.3
    r = torch.linspace(-3, 3, 600_001, dtype=F64)
    best = r[(-expert_rate * r + (expert_rate + policy_rate) / 2 * r**2 / (4 * alpha)).argmin()].item()
    value = iq_discrete.absorbing_value(expert_rate, policy_rate, iq_discrete.Args(gamma=gamma, chi2_alpha=alpha))
    assert value == pytest.approx(sum(best * gamma**t for t in range(500)), rel=1e-4)


# ------------------------------------------------------------------------------------- Eq. 12, offline identity
@pytest.mark.parametrize("with_target", [False, True])
@pytest.mark.parametrize("chi2_rows", ["expert", "both"])
@pytest.mark.parametrize("temperature", [1.0, 0.05])
def test_offline_loss_is_cross_entropy_and_squared_bellman_residual(script, temperature, chi2_rows, with_target):
    """Eq. 12: E[V(s) − Q(s,a)] + E[r²]/(4α), where V(s) − Q(s,a) = −τ·log π(a|s)."""
    rng = np.random.default_rng(11)
    q, target_q, rows = rng.normal(size=(4, 3)), rng.normal(size=(4, 3)), random_rows(9, 4, 3, seed=12)
    args = script.module.Args(gamma=0.9, temperature=temperature, chi2_alpha=0.7, chi2_rows=chi2_rows,
                              value_loss="value_expert")
    target = script.table(target_q) if with_target else None
    batch = make_batch(script, rows, 4)
    loss, _ = script.module.iq_loss(script.table(q), target, batch, 9, script.encode([0], 4), args)

    s, a, s2, d = (np.array(column) for column in zip(*rows))
    policy = np.exp(q / temperature) / np.exp(q / temperature).sum(1, keepdims=True)
    next_v = temperature * np.log(np.exp((target_q if with_target else q) / temperature).sum(1))
    cross_entropy = -np.log(policy[s, a]).mean()
    residual = q[s, a] - 0.9 * (1 - d) * next_v[s2]
    assert loss.item() == pytest.approx(temperature * cross_entropy + (residual**2).mean() / (4 * 0.7))


# ------------------------------------------------------------------------------------------------ telescoping
# A cycle of four states at γ = 1/2: the discounted occupancy of 0→1→2→3→0 from state 0 is 8, 4, 2 and 1 of 15, so
# that 15 rows hold it exactly. Leaving after state 3 instead, state 4 with V = 0 takes the last sixteenth.
CYCLE = [(0, 0, 1, 0.0)] * 8 + [(1, 1, 2, 0.0)] * 4 + [(2, 0, 3, 0.0)] * 2 + [(3, 1, 0, 0.0)]
EPISODE = CYCLE[:-1] + [(3, 1, 2, 1.0), (4, 0, 4, 1.0)]  # the row (3 → 2) would leak V(2) if it were not masked
STAY = [(0, 1, 0, 0.0)] * 15  # the occupancy of another policy, which never leaves state 0


@pytest.mark.parametrize("temperature", [0.0, 0.4])
@pytest.mark.parametrize("expert, policy, form", [
    (CYCLE, [], "value_expert"), (EPISODE, [], "value_expert"), (CYCLE, STAY, "value"), (STAY, CYCLE, "value"),
    (CYCLE, CYCLE, "value"), (CYCLE, STAY, "value_expert"),
])
def test_telescoped_term_is_the_value_of_initial_states(script, expert, policy, form, temperature):
    """§5.1, for every Q: on exact occupancies the telescoped forms equal (1−γ)·V(s0), whichever policy's they are."""
    for seed in range(3):
        q = np.random.default_rng(seed).normal(size=(5, 2))
        q[4] = -temperature * math.log(2)  # V = 0 in the absorbing state
        terms = {}
        for value_loss in (form, "v0"):
            args = script.module.Args(gamma=0.5, temperature=temperature, value_loss=value_loss)
            terms[value_loss] = script.module.iq_loss(script.table(q), None, make_batch(script, expert + policy, 5),
                                                      len(expert), script.encode([0], 5), args)[1]["value_term"].item()
        v0 = temperature * math.log(np.exp(q[0] / temperature).sum()) if temperature else q[0].max()
        assert terms[form] == pytest.approx(0.5 * v0) == terms["v0"]


def random_mdp(seed, num_states, num_actions, gamma):
    """P[s,a,s'], ρ0[s], an expert π[a|s] of full support and its normalised discounted occupancy [s,a]."""
    generator = torch.Generator().manual_seed(seed)
    transition = torch.rand(num_states, num_actions, num_states, generator=generator, dtype=F64) ** 3
    transition /= transition.sum(-1, keepdim=True)
    initial = torch.rand(num_states, generator=generator, dtype=F64)
    initial /= initial.sum()
    expert = torch.softmax(torch.randn(num_states, num_actions, generator=generator, dtype=F64), -1)
    return transition, initial, expert, occupancy(transition, initial, expert, gamma)


def occupancy(transition, initial, policy, gamma):
    moves = (policy[..., None] * transition).sum(1)
    states = torch.linalg.solve(torch.eye(len(initial), dtype=F64) - gamma * moves.T, (1 - gamma) * initial)
    torch.testing.assert_close(states.sum(), torch.tensor(1.0, dtype=F64))
    return states[:, None] * policy


@pytest.mark.parametrize("temperature", [0.0, 0.4])
@pytest.mark.parametrize("seed", range(3))
def test_telescoping_in_a_random_mdp(script, seed, temperature):
    """The same for random dynamics and policies: E_μ[V(s) − γV(s')] = E_μ[V(s) − Q(s,a) + r] = (1−γ)·E_ρ0[V(s0)]."""
    gamma = 0.9
    transition, initial, _, mu = random_mdp(seed, 4, 2, gamma)
    q = torch.randn(4, 2, dtype=F64, generator=torch.Generator().manual_seed(seed + 100))
    rows = [(s, a, s2, 0.0) for s in range(4) for a in range(2) for s2 in range(4)]
    r = script.module.implied_reward(script.table(q), *make_batch(script, rows, 4), gamma, temperature).detach()
    v = script.module.soft_value(q, temperature)
    weight = (mu[..., None] * transition).flatten()
    s, a, *_ = (torch.tensor(column) for column in zip(*rows))
    torch.testing.assert_close((weight * (v[s] - q[s, a] + r)).sum(), (1 - gamma) * (initial * v).sum())


# ---------------------------------------------------------------------------------------------------------- φ
def distributions(seed):
    """The expert's and the policy's distribution over seven outcomes, their ratios within [1/10, 10]."""
    generator = torch.Generator().manual_seed(seed)
    expert, policy = torch.softmax(0.7 * torch.randn(2, 7, generator=generator, dtype=F64), -1)
    assert 0.1 < (expert / policy).min() and (expert / policy).max() < 10
    return expert, policy


MEASURES = {  # divergence: (the measure, the r at which the supremum is attained), of expert p and policy q
    "chi2": (lambda p, q: 0.3 * ((q - p) ** 2 / p).sum(), lambda p, q: 2 * 0.3 * (1 - q / p)),  # α = 0.3
    "kl": (lambda p, q: (q * torch.log(q / p)).sum(), lambda p, q: torch.log(p / q)),
    "forward_kl": (lambda p, q: (p * torch.log(p / q)).sum(), lambda p, q: p / q),
    "hellinger": (lambda p, q: ((p.sqrt() - q.sqrt()) ** 2).sum(), lambda p, q: (p / q).sqrt() - 1),
    "js": (lambda p, q: (p * torch.log(2 * p / (p + q)) + q * torch.log(2 * q / (p + q))).sum(),
           lambda p, q: torch.log((p + q) / (2 * q))),
}


def regularised_phi(divergence, r):
    """φ; for chi2 with its quadratic part, which the loss holds as a term of its own, at α = 0.3."""
    return iq_discrete.phi(divergence, r) - (r**2 / (4 * 0.3) if divergence == "chi2" else 0)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("divergence", MEASURES)
def test_phi_supremum_is_the_measure(divergence, seed):
    """sup over r of E_E φ(r) − E_π r, attained in the closed form and exceeded nowhere, outside the domain included."""
    p, q = distributions(seed)
    measure, maximiser = MEASURES[divergence]
    r = maximiser(p, q).requires_grad_()
    value = (p * regularised_phi(divergence, r)).sum() - (q * r).sum()
    torch.testing.assert_close(value, measure(p, q), rtol=1e-9, atol=1e-12)
    assert value > 1e-3
    (gradient,) = torch.autograd.grad(value, r)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-10)

    generator = torch.Generator().manual_seed(seed + 50)
    for scale in (0.01, 0.3, 3.0, 100.0):
        other = r.detach() + scale * torch.randn(2000, 7, generator=generator, dtype=F64)
        values = (p * regularised_phi(divergence, other)).sum(1) - (q * other).sum(1)
        assert values.max() <= value.item() + 1e-12


@pytest.mark.parametrize("seed", range(5))
def test_phi_tv_supremum_over_bounded_r(seed):
    """Over |r| ≤ Rmax it is 2·Rmax·TV, at r = ±Rmax."""
    p, q = distributions(seed)
    bound, tv = 3.0, 0.5 * (p - q).abs().sum()

    def objective(r):
        return (p * iq_discrete.phi("tv", r)).sum(-1) - (q * r).sum(-1)

    torch.testing.assert_close(objective(bound * torch.sign(p - q)), 2 * bound * tv)
    others = bound * (2 * torch.rand(5000, 7, dtype=F64, generator=torch.Generator().manual_seed(seed)) - 1)
    assert objective(others).max() < 2 * bound * tv


@pytest.mark.parametrize("divergence", ["chi2", "tv", "w1"])
def test_phi_is_linear(divergence):
    r = torch.tensor([-1000.0, -1.5, 0.0, 2.0, 1000.0], requires_grad=True)
    value = iq_discrete.phi(divergence, r)
    assert value.tolist() == r.tolist()
    assert torch.autograd.grad(value.sum(), r)[0].tolist() == [1.0] * 5


def phi_slope(divergence, r):
    r = r.detach().requires_grad_()
    value = iq_discrete.phi(divergence, r)
    (slope,) = torch.autograd.grad(value.sum(), r)
    return value.detach(), slope


HAND_PHI = {  # divergence: [(r, φ, φ')] by hand, well inside the domain
    "kl": [(0.0, 0.0, 1.0), (math.log(2), 0.5, 0.5), (-math.log(2), -1.0, 2.0)],
    "forward_kl": [(1.0, 1.0, 1.0), (2.0, 1 + math.log(2), 0.5), (0.5, 1 - math.log(2), 2.0)],
    "hellinger": [(0.0, 0.0, 1.0), (1.0, 0.5, 0.25), (-0.5, -1.0, 4.0)],
    "js": [(0.0, 0.0, 1.0), (math.log(2), math.log(1.5), 1 / 3), (math.log(2 / 3), math.log(0.5), 3.0)],
}


@pytest.mark.parametrize("divergence", HAND_PHI)
def test_phi_hand_numbers(divergence):
    r, value, slope = torch.tensor(HAND_PHI[divergence], dtype=F64).T
    torch.testing.assert_close(phi_slope(divergence, r), (value, slope))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_phi_is_finite_with_finite_gradient_everywhere(divergence, dtype):
    """Far outside the domain too, where the slope is still that of a tangent: it draws r back and does not vanish."""
    edges = torch.tensor([-1e4, -1000, -100, -1.0001, -1, -math.log(2), -0.6931, -1e-6, 0, 1e-6, 1, 100, 1000, 1e4])
    value, slope = phi_slope(divergence, torch.cat([edges, torch.linspace(-3, 3, 6001)]).to(dtype))
    assert value.dtype == slope.dtype == dtype
    assert value.isfinite().all() and slope.isfinite().all()
    assert (slope >= 0).all()
    at_minus_1000, at_minus_500 = phi_slope(divergence, torch.tensor([-1000.0, -500.0], dtype=dtype))[1]
    at_one = phi_slope(divergence, torch.tensor([1.0], dtype=dtype))[1].item()
    assert at_minus_1000 == at_minus_500 >= at_one > 0


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_phi_is_concave_and_continuously_differentiable(divergence):
    """The slope falls monotonically, is the slope of the values (so φ has no jump), and has no jump itself."""
    grid = torch.cat([torch.linspace(-1000, -50, 200), torch.linspace(-50, 4, 20001)[1:],
                      torch.linspace(4, 1000, 200)[1:]]).to(F64)
    value, slope = phi_slope(divergence, grid)
    steps, rises = grid.diff(), value.diff()
    tolerance = 1e-12 * (1 + value.abs().max())
    assert (slope.diff() <= 1e-12 * slope.max()).all()
    assert (rises <= slope[:-1] * steps + tolerance).all()
    assert (rises >= slope[1:] * steps - tolerance).all()

    # Bisect every interval towards the half in which the slope changes more: only a jump survives.
    low, high = grid[:-1].clone(), grid[1:].clone()
    for _ in range(30):
        middle = (low + high) / 2
        at_low, at_middle, at_high = (phi_slope(divergence, x)[1] for x in (low, middle, high))
        left = (at_low - at_middle).abs() >= (at_middle - at_high).abs()
        low, high = torch.where(left, low, middle), torch.where(left, middle, high)
    jump = (phi_slope(divergence, low)[1] - phi_slope(divergence, high)[1]).abs()
    assert jump.max() <= 1e-7 * slope.max()


# ------------------------------------------------------------------------------------------- tabular recovery
RECOVERY_GAMMA = 0.9
TEMPERATURES = [1.0, 0.1, 0.01]


def maximise(divergence, alpha, temperature, mdp, q):
    """argmax over Q of Eq. 9 with exact occupancies and the inner expectation over s', and the maximum."""
    transition, initial, _, expert_occupancy = mdp
    q = q.clone().requires_grad_()

    def objective():
        v = iq_discrete.soft_value(q, temperature)
        r = q - RECOVERY_GAMMA * transition @ v
        phi = iq_discrete.phi(divergence, r) - (r**2 / (4 * alpha) if alpha else 0)
        return (expert_occupancy * phi).sum() - (1 - RECOVERY_GAMMA) * (initial * v).sum()

    optimizer = torch.optim.LBFGS([q], max_iter=1500, tolerance_grad=1e-10, tolerance_change=1e-16, history_size=50,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = -objective()
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    maximum = -closure().item()
    assert q.grad.abs().max() < 1e-6, "not at the maximum"
    return q.detach(), maximum


def recover(divergence, alpha, mdp):
    """Worst-state total variation between the maximiser's policy and the expert's, at each of TEMPERATURES.

    On the way it asserts duality: the maximum is min over π of d(π, expert) − τ·H(π), with its π = softmax(Q/τ).
    """
    transition, initial, expert, expert_occupancy = mdp
    q, distances = torch.zeros_like(expert), []
    for temperature in TEMPERATURES:
        q, maximum = maximise(divergence, alpha, temperature, mdp, q)
        policy = torch.softmax(q / temperature, -1)
        distances.append(0.5 * (policy - expert).abs().sum(-1).max().item())
        mu = occupancy(transition, initial, policy, RECOVERY_GAMMA)
        if divergence == "chi2":
            measure = alpha * ((mu - expert_occupancy) ** 2 / expert_occupancy).sum()
        elif divergence == "tv":
            measure = 0.0
        else:
            measure = MEASURES[divergence][0](expert_occupancy, mu)
        entropy = -(mu * torch.log(policy)).sum()
        assert maximum == pytest.approx(float(measure - temperature * entropy), abs=1e-7)
    return distances


@pytest.mark.parametrize("seed", range(3))
def test_chi2_recovers_a_tabular_expert(seed):
    """SPEC 1: worst-state total variation 0.16, 0.03, 0.003 at τ = 1, 0.1, 0.01; within a factor 2 here."""
    distances = recover("chi2", 0.5, random_mdp(seed, 5, 3, RECOVERY_GAMMA))
    assert distances[0] > distances[1] > distances[2]
    for distance, expected in zip(distances, [0.16, 0.03, 0.003]):
        assert expected / 2 < distance < expected * 2


@pytest.mark.parametrize("divergence", ["kl", "forward_kl", "hellinger", "js"])
def test_other_divergences_recover_a_tabular_expert(divergence):
    distances = recover(divergence, None, random_mdp(0, 5, 3, RECOVERY_GAMMA))
    assert distances[0] > distances[1] > distances[2]
    assert distances[0] > 0.05 and 0.001 < distances[2] < 0.01


def test_linear_phi_leaves_cloning():
    """SPEC 1, offline: with tv and no constraint in the way what is left is τ·cloning, the expert at every τ."""
    assert max(recover("tv", None, random_mdp(0, 5, 3, RECOVERY_GAMMA))) < 1e-4


# ------------------------------------------------------------------------------------ gradient penalty, q_bound
class Linear(nn.Module):
    """Q(s, a) = w_a·s + b_a."""

    def __init__(self, weights, biases):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(weights, dtype=F64))
        self.b = nn.Parameter(torch.tensor(biases, dtype=F64))

    def forward(self, obs):
        return obs @ self.w.T + self.b


class Quadratic(nn.Module):
    """Q(s, a) = s²/2 for either action, whose slope at s is s."""

    def forward(self, obs):
        return (0.5 * obs**2).expand(-1, 2)


def penalty_batch(obs, actions):
    obs = torch.as_tensor(obs, dtype=F64)
    return iq_discrete.Batch(obs, torch.as_tensor(actions), torch.zeros_like(obs), torch.zeros(len(obs), dtype=F64))


@pytest.mark.parametrize("n_expert", [4, 8])
def test_gradient_penalty_hand_numbers(n_expert):
    """Zero where ‖∇Q‖ = 1, (5 − 1)² = 16 where it is 5, with expert and policy rows and with expert rows alone."""
    batch = penalty_batch(torch.randn(8, 2, dtype=F64), [0, 1] * 4)
    unit = Linear([[0.6, 0.8], [0.6, 0.8]], [2.0, -7.0])
    steep = Linear([[3.0, -4.0], [3.0, -4.0]], [2.0, -7.0])
    assert iq_discrete.gradient_penalty(unit, batch, n_expert).item() == pytest.approx(0, abs=1e-12)
    penalty = iq_discrete.gradient_penalty(steep, batch, n_expert)
    assert penalty.item() == pytest.approx(16)
    penalty.backward()  # (‖w_0 + w_1‖/2 − 1)² in effect: the penalty trains the network, down the weights
    assert (steep.w.grad.sum(0) @ torch.tensor([3.0, -4.0], dtype=F64)).item() == pytest.approx(2 * (5 - 1) * 5)


def test_gradient_penalty_acts_between_expert_and_policy_rows():
    """Expert rows at 0, policy rows at 2, slope s uniform on [0, 2]: E[(s − 1)²] = 1/3; at the rows it would be 1."""
    torch.manual_seed(0)
    obs = torch.cat([torch.zeros(8000, 1), torch.full((8000, 1), 2.0)])
    penalty = iq_discrete.gradient_penalty(Quadratic(), penalty_batch(obs, [0] * 16000), 8000)
    assert penalty.item() == pytest.approx(1 / 3, abs=0.02)


def test_gradient_penalty_offline_acts_between_pairs_of_expert_rows():
    """Expert rows at 0 or 2 by chance: a pair of unlike rows gives 1/3, a pair of like ones 1, together 2/3."""
    torch.manual_seed(0)
    obs = 2.0 * torch.randint(2, (16000, 1))
    penalty = iq_discrete.gradient_penalty(Quadratic(), penalty_batch(obs, [0] * 16000), 16000)
    assert penalty.item() == pytest.approx(2 / 3, abs=0.03)


def test_gradient_penalty_mixes_the_actions():
    """An interpolate's action is the mixture u, 1 − u of the two: slopes ±1 give E[(|2u − 1| − 1)²] = 1/3."""
    torch.manual_seed(0)
    batch = penalty_batch(torch.randn(16000, 1, dtype=F64), [0] * 8000 + [1] * 8000)
    penalty = iq_discrete.gradient_penalty(Linear([[1.0], [-1.0]], [0.0, 0.0]), batch, 8000)
    assert penalty.item() == pytest.approx(1 / 3, abs=0.02)


@pytest.mark.parametrize("n_expert", [4, 8])
def test_gradient_penalty_of_a_dead_network(n_expert):
    """Where ∇Q = 0 the penalty is 1 and its gradient finite, although a norm has none at 0."""
    network = iq_discrete.QNetwork((2,), 2, "mlp", 8)
    with torch.no_grad():
        network.layers[1].bias.fill_(-100.0)  # every unit of the first layer is dead
    batch = penalty_batch(torch.randn(8, 2), [0, 1] * 4)
    penalty = iq_discrete.gradient_penalty(network, batch._replace(obs=batch.obs.float()), n_expert)
    assert penalty.item() == pytest.approx(1)
    gradients = torch.autograd.grad(penalty, list(network.parameters()), allow_unused=True)
    assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)


def test_gradient_penalty_trains_the_loss_by_its_weight():
    """In the loss with w1 the penalty is λ times itself, λ = 0 switches it off, and other divergences have none."""
    network = Linear([[3.0, -4.0], [3.0, -4.0]], [0.0, 0.0])
    batch = penalty_batch(torch.randn(6, 2, dtype=F64), [0, 1] * 3)

    def loss(divergence, weight):
        args = iq_discrete.Args(divergence=divergence, gradient_penalty=weight, value_loss="v0_expert")
        return iq_discrete.iq_loss(network, None, batch, 3, batch.obs[:1], args)[0].item()

    assert loss("w1", 10.0) - loss("w1", 0.0) == pytest.approx(160)
    assert loss("w1", 0.0) == pytest.approx(loss("tv", 10.0))


@pytest.mark.parametrize("network, obs_shape", [("mlp", (4,)), ("cnn", (3, 5, 5))])
def test_q_bound_bounds_q(network, obs_shape):
    torch.manual_seed(0)
    obs = torch.randn(64, *obs_shape)
    free, bounded = (iq_discrete.QNetwork(obs_shape, 3, network, 16, q_bound) for q_bound in (0.0, 7.0))
    bounded.load_state_dict(free.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(bounded(obs), 7 * torch.tanh(free(obs) / 7))
        for net in (free, bounded):
            for parameter in net.parameters():
                parameter.mul_(10)
        assert free(obs).abs().max() > 70
        assert 6.9 < bounded(obs).abs().max() <= 7


@pytest.mark.parametrize("standardized", [False, True])
def test_only_standardised_observations_are_clipped(standardized, tmp_path):
    """Raw ones may be large by nature: Acrobot's second joint turns at up to 28."""
    args = iq_discrete.Args(env_id="Acrobot-v1", standardize_obs=standardized, total_timesteps=0, pretrain_updates=1,
                            eval_every=0, out_dir=str(tmp_path), run_name="run")
    network, _ = iq_discrete.load_model(str(iq_discrete.train(args) / "model.pt"))
    near, far = (torch.tensor([[1.0, 0, 1, 0, 0, speed]]) for speed in (200.0, 280.0))
    with torch.no_grad():
        assert torch.equal(network(near), network(far)) == standardized


def test_q_bound_bounds_the_implied_reward():
    """|r| ≤ Rmax = q_bound·(1 + γ) + γτ·log A: what makes tv a bounded objective."""
    torch.manual_seed(0)
    network = iq_discrete.QNetwork((4,), 3, "mlp", 16, 7.0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(30)
        r = iq_discrete.implied_reward(network, torch.randn(500, 4), torch.randint(3, (500,)), torch.randn(500, 4),
                                       torch.zeros(500), 0.9, 0.5)
    bound = 7 * 1.9 + 0.9 * 0.5 * math.log(3)
    assert 0.7 * bound < r.abs().max() <= bound


# --------------------------------------------------------------------------------------------- sampled actions
@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_sampled_actions_follow_the_softmax(script, temperature):
    """Frequencies within five standard deviations of softmax(Q/τ), for each state of a mixed batch."""
    torch.manual_seed(0)
    n, logits = 60_000, torch.tensor([[0.0, 0.5, -1.0], [4.0, 0.0, -0.5]], dtype=F64)
    network = script.table(temperature * logits)
    actions = script.module.sample_action(network, script.encode([0, 1] * n, 2), temperature)
    assert actions.shape == (2 * n,) and actions.dtype == torch.int64
    policy = torch.softmax(logits, 1)
    for state, p in enumerate(policy):
        frequency = torch.bincount(actions[state::2], minlength=3) / n
        assert ((frequency - p).abs() < 5 * (p * (1 - p) / n).sqrt()).all()
    # rows are sampled independently of one another
    both = ((actions[0::2] == 2) & (actions[1::2] == 1)).double().mean()
    p = policy[0, 2] * policy[1, 1]
    assert (both - p).abs() < 5 * (p * (1 - p) / n).sqrt()


def test_sampled_actions_use_the_temperature_of_the_value(script):
    """At τ = 1e-3 and |Q| of hundreds, in float32, π = exp((Q − V)/τ) still."""
    torch.manual_seed(0)
    network = script.table([[300.0, 300.0 + 2**-10, 200.0]]).float()
    encoded = script.encode([0] * 4000, 1)
    actions = script.module.sample_action(network, encoded.float() if encoded.is_floating_point() else encoded, 1e-3)
    p = 1 / (1 + math.exp(-(2**-10) / 1e-3))
    assert (actions == 1).double().mean().item() == pytest.approx(p, abs=0.05)
    assert not (actions == 2).any()


def test_sampled_actions_are_greedy_at_zero_temperature(script):
    torch.manual_seed(0)
    network = script.table([[0.0, 1e-6, -1.0], [5.0, 4.999999, 5.0 - 1e-9]])
    actions = script.module.sample_action(network, script.encode([0, 1] * 500, 2), 0.0)
    assert actions.tolist() == [1, 0] * 500


def test_default_chi2_strength_is_one_half():
    """`--chi2-alpha` left out is 0.5 with chi2, so that the objective is never without a regulariser by accident."""
    script = SCRIPTS["iq_discrete"]
    losses = [iq_discrete.iq_loss(script.table(HAND_Q), None, hand_batch(script), 2, script.encode([0], 3),
                                  replace(hand_args(script), chi2_alpha=alpha))[0].item() for alpha in (None, 0.5, 0.6)]
    assert losses[0] == losses[1] != losses[2]


# --------------------------------------------------------------------------------------------------- updates
@pytest.mark.parametrize("module", [iq_atari, iq_discrete, iq_ilo, iq_offline])
def test_a_gradient_takes_the_place_of_the_one_before(module):
    w = torch.ones(1, requires_grad=True)
    gradient = module.make_gradient(lambda x: ((w * x).sum(), {"loss": w * x}), [w], False)
    for x in (2.0, 5.0):
        terms = gradient(torch.tensor([x]))
        assert w.grad.item() == x == terms["loss"].item() and not terms["loss"].requires_grad


def followers(module):
    """An update that leaves its networks as they are, its inputs, and (follower, network, rate) of what follows them."""
    args = module.Args(target_rate=0.1, average_rate=0.3)
    obs, action, terminated = torch.rand(4, 4), torch.tensor([0, 1, 1, 0]), torch.zeros(4)
    if module is iq_ilo:
        args.missing_action = "replay"
        network, target, average, average_critic = (iq_ilo.QNetwork((4,), 2, True, 8) for _ in range(4))
        policy, average = iq_ilo.Softmax(network), iq_ilo.Softmax(average)
        optimizers = (torch.optim.SGD(network.parameters(), lr=0.0), None, None)
        update = iq_ilo.make_update(network, target, policy, average, average_critic, None, optimizers, 4, args)
        inputs = iq_ilo.States(obs, obs, terminated), iq_ilo.Batch(obs, action, obs, terminated), obs
        return update, inputs, [(target, network, 0.1), (average, policy, 0.3), (average_critic, network, 0.3)]
    if module is iq_atari:
        obs = torch.zeros(4, 4, 84, 84, dtype=torch.uint8)
    network, target, average = (module.QNetwork(2) if module is iq_atari else module.QNetwork((4,), 2) for _ in range(3))
    optimizer, n_expert = torch.optim.SGD(network.parameters(), lr=0.0), 2
    rest = (None, average, optimizer, None) if module is iq_offline else (average, optimizer, n_expert)
    update = module.make_update(network, target, *rest, args)
    return update, (module.Batch(obs, action, obs, terminated), obs), [(target, network, 0.1), (average, network, 0.3)]


@pytest.mark.parametrize("module", [iq_atari, iq_discrete, iq_ilo, iq_offline])
def test_target_and_average_follow_their_networks_at_their_own_rates(module):
    torch.manual_seed(0)
    update, inputs, moves = followers(module)
    before = [[p.detach().clone() for p in follower.parameters()] for follower, _, _ in moves]
    update(*inputs)
    for (follower, network, rate), old in zip(moves, before):
        assert len(old) > 0
        for p, q, o in zip(follower.parameters(), network.parameters(), old, strict=True):
            torch.testing.assert_close(p, o + rate * (q - o))
