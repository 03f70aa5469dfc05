"""iq_ilo.py: the loss by hand, the model that names actions, what is never read, the maze, whole runs, and learning."""
import csv
import inspect
import json
import math
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from torch import nn

import iq_ilo
from iq_ilo import Batch, InverseDynamics, PointMaze, QNetwork, Softmax, States, TanhGaussian

ROOT = Path(__file__).parent.parent
F64 = torch.float64
FINAL = re.compile(r"final eval_return=(\S+) std=(\S+) episodes=(\d+) expert=(\S+) random=(\S+) normalized=(\S+) "
                   r"steps=(\d+) updates=(\d+) seconds=(\S+) run_dir=(\S+)")
VALUE_LOSSES = ["value", "value_expert", "v0", "v0_expert"]
TINY = ("--total-timesteps 240 --learning-starts 24 --eval-every 120 --eval-episodes 3 --num-demos 2 --batch-size 8 "
        "--hidden-size 16 --reward-updates 5 --value-loss v0_expert").split()


# ---------------------------------------------------------------------------------------------- the objective
class Table(nn.Module):
    """Q(s, ·) = q[s] of discrete actions, with observations one-hot."""

    def __init__(self, q):
        super().__init__()
        self.q = nn.Parameter(torch.as_tensor(q, dtype=F64).clone())

    def each(self, obs):
        return obs @ self.q

    def forward(self, obs, action):
        return self.each(obs).gather(1, action[:, None]).squeeze(1)


def one_hot(states, num_states=3):
    return torch.eye(num_states, dtype=F64)[torch.as_tensor(states)]


# Three states, two actions, τ = 0 and γ = 0.5, so that V = [3, 2, -1] and, of the target, V = [4, 6, 2].
Q = [[1.0, 3.0], [2.0, 1.0], [-1.0, -2.0]]
TARGET_Q = [[0.0, 4.0], [6.0, 0.0], [2.0, 1.0]]
# Two expert rows (their actions as `name_actions` gave them), then three policy rows.
ROWS = [(0, 1, 1, 0.0), (1, 1, 0, 1.0), (2, 0, 0, 0.0), (0, 0, 2, 1.0), (2, 1, 1, 0.0)]
INITIAL = [0, 0, 2]
# r = [2, 1, -2.5, 1, -3]; with the target [0, 1, -3, 1, -5]. The terms at α = 2, that is 4α = 8:
TERMS = {  # with a target: (expert term, {value_loss: second term}, {chi2_rows: χ² term})
    False: (-1.5, {"value": 0.5, "value_expert": 2.0, "v0": 2.5 / 3, "v0_expert": 1.25},
            {"expert": 5 / 2 / 8, "both": 21.25 / 5 / 8}),
    True: (-0.5, {"value": -0.4, "value_expert": 1.0, "v0": 2.5 / 3, "v0_expert": 1.25},
           {"expert": 1 / 2 / 8, "both": 36 / 5 / 8}),
}


def batch_of(rows):
    s, a, s2, d = zip(*rows)
    return Batch(one_hot(s), torch.tensor(a), one_hot(s2), torch.tensor(d, dtype=F64))


@pytest.mark.parametrize("with_target", [False, True])
@pytest.mark.parametrize("chi2_rows", ["expert", "both"])
@pytest.mark.parametrize("value_loss", VALUE_LOSSES)
def test_loss_hand_numbers(value_loss, chi2_rows, with_target):
    critic, target = Table(Q), Table(TARGET_Q) if with_target else None
    args = iq_ilo.Args(gamma=0.5, temperature=0.0, chi2_alpha=2.0, value_loss=value_loss, chi2_rows=chi2_rows)
    loss, terms = iq_ilo.iq_loss(critic, target, Softmax(critic), batch_of(ROWS), 2, one_hot(INITIAL), args)
    expert_term, value_terms, chi2_terms = TERMS[with_target]
    assert terms["expert_term"].item() == pytest.approx(expert_term)
    assert terms["value_term"].item() == pytest.approx(value_terms[value_loss])
    assert terms["chi2_term"].item() == pytest.approx(chi2_terms[chi2_rows])
    assert loss.item() == pytest.approx(expert_term + value_terms[value_loss] + chi2_terms[chi2_rows])
    loss.backward()
    assert target is None or target.q.grad is None


def test_targets_are_clipped_to_the_bound_of_chi2():
    """|V(s')| ≤ 4α/(1 − γ), of the target network alone."""
    critic, target = Table(Q), Table(np.full((3, 2), 1e6))
    args = iq_ilo.Args(gamma=0.5, temperature=0.0, chi2_alpha=2.0)
    for bound, expected in ((True, 3 - 0.5 * 16), (False, 3 - 0.5 * 1e6)):
        args.bound_targets = bound
        terms = iq_ilo.iq_loss(critic, target, Softmax(critic), batch_of(ROWS[:1]), 1, one_hot([0]), args)[1]
        assert terms["reward_expert"].item() == pytest.approx(expected)


@pytest.mark.parametrize("temperature", [1.0, 0.05, 0.0])
def test_softmax_value_marginal_and_samples(temperature):
    logits = np.array([[0.0, 0.5, -1.0], [4.0, 0.0, -0.5]])
    critic, function = Table((temperature or 1) * logits), Table([[1.0, 2.0, 3.0], [-1.0, 0.0, 5.0]])
    policy, obs = Softmax(critic), one_hot([0, 1], 2)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True) if temperature else np.eye(3)[[1, 0]]
    v = temperature * np.log(np.exp(logits).sum(1)) if temperature else logits.max(1)
    np.testing.assert_allclose(policy.value(critic, obs, temperature).detach(), v)
    marginal = policy.marginal(function, obs, temperature).detach()
    np.testing.assert_allclose(marginal, (p * function.q.detach().numpy()).sum(1))
    torch.manual_seed(0)
    samples = policy.sample(obs.repeat(20_000, 1), temperature)
    for state in range(2):
        frequency = np.bincount(samples[state::2], minlength=3) / 20_000
        np.testing.assert_allclose(frequency, p[state], atol=0.02)
    assert policy.act(obs).tolist() == [1, 0]


def tanh_gaussian(seed=0, low=(-2.0,), high=(6.0,)):
    torch.manual_seed(seed)
    return TanhGaussian((3,), list(low), list(high), 8)


def test_the_density_of_the_tanh_gaussian_integrates_to_one():
    policy = tanh_gaussian()
    mean, log_std = (x.detach() for x in policy(torch.randn(1, 3)))
    a = torch.linspace(-1, 1, 200_001)[1:-1, None]
    density = iq_ilo.log_density(mean, log_std, torch.atanh(a)).exp()
    assert (density.sum() * 1e-5).item() == pytest.approx(1, abs=1e-3)


def test_units_of_action():
    policy = tanh_gaussian()
    torch.testing.assert_close(policy.to_env(torch.tensor([[-1.0], [0.0], [1.0]])), torch.tensor([[-2.0], [2.0], [6.0]]))
    torch.testing.assert_close(policy.from_env(torch.tensor([[-9.0], [2.0], [5.0]])), torch.tensor([[-1.0], [0.0], [0.75]]))
    random = policy.uniform(5_000)
    assert random.min() < -0.99 and random.max() > 0.99 and abs(random.mean()) < 0.05


def test_continuous_value_is_of_one_fresh_action_and_moves_the_critic_alone():
    policy, critic = tanh_gaussian(), QNetwork((3,), 1, False, 8)
    obs = torch.randn(6, 3)
    torch.manual_seed(5)
    value = policy.value(critic, obs, 0.3)
    torch.manual_seed(5)
    action, log_prob = policy.sample_with_log(obs)
    torch.testing.assert_close(value, critic(obs, action) - 0.3 * log_prob)
    value.sum().backward()
    assert all(p.grad is None for p in policy.parameters())
    assert any(p.grad.any() for p in critic.parameters())


@pytest.mark.parametrize("discrete", [True, False])
@pytest.mark.parametrize("n", [6, 4])  # as many actions as states, and fewer
def test_q_and_value_of_one_pass_are_those_of_two(discrete, n):
    critic = QNetwork((3,), 2 if discrete else 1, discrete, 8, True)
    policy, obs = Softmax(critic) if discrete else tanh_gaussian(), torch.randn(6, 3)
    action = torch.randint(2, (n,)) if discrete else torch.rand(n, 1)
    torch.manual_seed(5)
    q, value = policy.q_and_value(critic, obs, action, 0.3)
    torch.testing.assert_close(q, critic(obs[:n], action))
    torch.manual_seed(5)
    torch.testing.assert_close(value, policy.value(critic, obs, 0.3))
    value.sum().backward()
    assert any(p.grad.any() for p in critic.parameters())
    assert discrete or all(p.grad is None for p in policy.parameters())  # an actor has none of this gradient


def test_the_actor_ascends_q_and_entropy():
    """For Q = 0 a step raises the entropy, for τ = 0 it raises Q: the sign that Algorithm 1 does not print."""
    obs = torch.randn(256, 3)
    for temperature, scale in ((1.0, 0.0), (0.0, 1.0)):
        policy = tanh_gaussian()
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.05)
        readings = []
        for _ in range(30):
            loss, terms = iq_ilo.actor_loss(lambda s, a, scale=scale: scale * a[:, 0], policy, obs, temperature)
            readings.append(terms["entropy"].item() if temperature else -loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert readings[-1] > readings[0] + 0.05


# --------------------------------------------------------------------------------------- the missing action
def fit_idm(discrete, move, draw_obs, actions, steps=600):
    torch.manual_seed(0)
    idm = InverseDynamics((3,), 3 if discrete else 2, discrete, 64)
    optimizer = torch.optim.Adam(idm.parameters(), lr=3e-3)
    for _ in range(steps):
        obs, action = draw_obs(), actions()
        loss, terms = iq_ilo.idm_loss(idm, Batch(obs, action, move(obs, action), torch.zeros(128)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return idm, terms["idm_log_likelihood"].item()


def test_idm_recovers_discrete_actions():
    """Where s' − s tells the action, on states that it was fitted on and on new ones."""
    effect = torch.tensor([[0.5, 0.0, 0.0], [0.0, 0.5, 0.0], [0.0, 0.0, 0.5]])
    idm, likelihood = fit_idm(True, lambda s, a: s + effect[a], lambda: torch.randn(128, 3),
                              lambda: torch.randint(3, (128,)))
    assert likelihood > math.log(0.95)
    obs, action = torch.randn(500, 3) + 1, torch.randint(3, (500,))
    assert (idm.sample(obs, obs + effect[action]) == action).float().mean() > 0.97


def test_idm_recovers_continuous_actions():
    matrix = torch.tensor([[0.3, 0.1, 0.0], [-0.1, 0.2, 0.2]])
    idm, likelihood = fit_idm(False, lambda s, a: s + a @ matrix, lambda: torch.randn(128, 3),
                              lambda: torch.rand(128, 2) * 1.8 - 0.9, 800)
    obs, action = torch.randn(500, 3), torch.rand(500, 2) * 1.6 - 0.8
    assert (idm.sample(obs, obs + action @ matrix) - action).abs().mean() < 0.1
    assert likelihood > 2  # uniform actions on [−1, 1]²: −1.4


def test_idm_falls_back_on_what_was_played_where_actions_leave_no_trace():
    idm, likelihood = fit_idm(True, lambda s, a: s, lambda: torch.randn(128, 3),
                              lambda: (torch.rand(128) < 0.75).long(), 300)
    assert likelihood == pytest.approx(0.25 * math.log(0.25) + 0.75 * math.log(0.75), abs=0.1)
    obs = torch.randn(2000, 3)
    frequency = torch.bincount(idm.sample(obs, obs), minlength=3) / 2000
    torch.testing.assert_close(frequency, torch.tensor([0.25, 0.75, 0.0]), atol=0.08, rtol=0)


def test_each_way_to_name_the_action():
    critic = Table([[0.0, 50.0, 0.0]] * 3)  # the policy takes action 1
    expert = States(one_hot([0, 1, 2] * 100), one_hot([1, 2, 0] * 100), torch.zeros(300))
    played = batch_of([(0, 0, 0, 0.0), (1, 2, 1, 0.0), (1, 2, 1, 0.0), (1, 2, 1, 0.0)])

    class Named:
        def sample(self, obs, next_obs):
            return next_obs.argmax(1)

    def name(way):
        return iq_ilo.name_actions(way, Softmax(critic), Named(), expert, played, 1.0)

    assert name("idm").tolist() == [1, 2, 0] * 100
    assert name("policy").tolist() == [1] * 300
    torch.manual_seed(0)
    replayed = name("replay")
    assert set(replayed.tolist()) == {0, 2} and (replayed == 2).float().mean().item() == pytest.approx(0.75, abs=0.1)


@pytest.mark.parametrize("form", ["value_expert", "v0_expert", "v0"])
def test_policy_actions_on_expert_rows_alone_hold_no_signal_of_the_expert(form, tmp_path, capsys):
    flags = f"--missing-action policy --value-loss {form} --chi2-rows expert --out-dir {tmp_path / 'runs'}"
    assert iq_ilo.main([*TINY, *flags.split()]) == 2
    err = capsys.readouterr().err
    assert "--missing-action policy" in err and form in err and len(err.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_noise_is_on_observations_alone():
    batch = batch_of(ROWS)
    assert iq_ilo.blurred(batch, 0.0) is batch
    torch.manual_seed(0)
    many = Batch(torch.zeros(4000, 3), torch.ones(4000), torch.zeros(4000, 3), torch.ones(4000))
    noisy = iq_ilo.blurred(many, 0.3)
    assert noisy.action is many.action and noisy.terminated is many.terminated
    for x in (noisy.obs, noisy.next_obs):
        assert x.std().item() == pytest.approx(0.3, rel=0.05) and abs(x.mean().item()) < 0.02


# ------------------------------------------------------------------------------------- a reward of the state
def test_state_reward_is_the_mean_over_the_policys_actions():
    policy, reward = Softmax(Table([[0.0, math.log(3)], [0.0, 0.0]])), Table([[4.0, 8.0], [1.0, -1.0]])
    r = iq_ilo.state_reward(reward, policy, one_hot([0, 1], 2), 1.0)
    torch.testing.assert_close(r, torch.tensor([7.0, 0.0], dtype=F64))
    policy = tanh_gaussian()
    torch.manual_seed(0)
    r = iq_ilo.state_reward(lambda s, a: s[:, 0] + 0 * a[:, 0], policy, torch.ones(4, 3), 1.0)
    torch.testing.assert_close(r, torch.ones(4))


def test_the_reward_network_is_the_mean_of_the_implied_reward_over_next_states():
    """In state 0 action 0 leads to state 1 or 2 with equal chance: E[r|s,a] is half way, and the fit finds it."""
    torch.manual_seed(0)
    critic = QNetwork((3,), 2, True, 32)
    policy = Softmax(critic)
    rows = [(0, 0, 1, 0.0), (0, 0, 2, 0.0), (1, 1, 2, 1.0), (2, 0, 0, 0.0)] * 8
    s, a, s2, d = zip(*rows)
    replay = iq_ilo.Replay(64, [((3,), torch.float32), ((), torch.int64), ((3,), torch.float32), ((), torch.float32)], "cpu")
    batch = Batch(one_hot(s).float(), torch.tensor(a), one_hot(s2).float(), torch.tensor(d))
    replay.add(*batch)
    demos = iq_ilo.Demonstrations(States(batch.obs, batch.next_obs, batch.terminated), batch.obs[:1], np.nan)

    class Named:
        def sample(self, obs, next_obs):
            return (obs[:, 1] > 0).long()

    args = iq_ilo.Args(gamma=0.9, temperature=0.5, batch_size=64, reward_updates=400)
    reward = iq_ilo.fit_reward(critic, policy, Named(), demos, replay, args, SimpleNamespace(signum=0))
    r = iq_ilo.implied_reward(critic, policy, *batch, 0.9, 0.5).detach()
    fitted = reward(batch.obs, batch.action).detach()
    torch.testing.assert_close(fitted[0], (r[0] + r[1]) / 2, atol=0.02, rtol=0)
    torch.testing.assert_close(fitted[2:4], r[2:4], atol=0.02, rtol=0)


def test_the_reward_network_leans_to_the_likely_next_state_where_the_action_cannot_be_told():
    """Action 0 leads from 0 to 1 in 0.8 and to 2 in 0.2 of all cases, action 1 the other way, and r depends on s' alone. The
    expert takes 0, play both: the agent's rows of action 0 are half as many as the expert's, which get the right name in
    0.8 of those that lead to 1 and 0.2 of those that lead to 2, so state 1 has (0.2 + 0.32)/(0.25 + 0.34) of the fit."""
    torch.manual_seed(0)
    critic = QNetwork((3,), 2, True, 32)
    with torch.no_grad():
        critic.layers[-1].bias += 2
    policy = Softmax(critic)
    rows = [(0, 0, 1, 0.0)] * 4 + [(0, 0, 2, 1.0)] + [(0, 1, 1, 0.0)] + [(0, 1, 2, 1.0)] * 4
    s, a, s2, d = zip(*rows)
    batch = Batch(one_hot(s).float(), torch.tensor(a), one_hot(s2).float(), torch.tensor(d))
    replay = iq_ilo.Replay(64, [((3,), torch.float32), ((), torch.int64), ((3,), torch.float32), ((), torch.float32)], "cpu")
    replay.add(*batch)
    demos = iq_ilo.Demonstrations(States(batch.obs[:5], batch.next_obs[:5], batch.terminated[:5]), batch.obs[:1], np.nan)

    class Named:  # p(a|s,s') of those who take both
        def sample(self, obs, next_obs):
            return torch.bernoulli(torch.where(next_obs[:, 1] > 0, 0.2, 0.8)).long()

    args = iq_ilo.Args(gamma=0.9, temperature=0.5, batch_size=1024, reward_updates=600)
    reward = iq_ilo.fit_reward(critic, policy, Named(), demos, replay, args, SimpleNamespace(signum=0))
    to_1, to_2 = iq_ilo.implied_reward(critic, policy, *batch, 0.9, 0.5).detach()[[0, 4]]
    share = (reward(batch.obs[:1], batch.action[:1]).item() - to_2) / (to_1 - to_2)
    assert abs(to_1 - to_2) > 1 and share.item() == pytest.approx(0.52 / 0.59, abs=0.015)  # the mean over s' is 0.8


@pytest.mark.parametrize("way", ["policy", "replay"])
def test_without_inverse_dynamics_the_reward_network_is_fitted_on_play_alone(way):
    """The expert's next states follow from actions that nobody knows: state 1 where play has state 0."""
    torch.manual_seed(0)
    critic = QNetwork((3,), 2, True, 32)
    policy = Softmax(critic)
    batch = Batch(one_hot([0, 1] * 8).float(), torch.tensor([0, 1] * 8), one_hot([0, 2] * 8).float(), torch.zeros(16))
    replay = iq_ilo.Replay(64, [((3,), torch.float32), ((), torch.int64), ((3,), torch.float32), ((), torch.float32)], "cpu")
    replay.add(*batch)
    demos = iq_ilo.Demonstrations(States(batch.obs, one_hot([1, 0] * 8).float(), batch.terminated), batch.obs[:1], np.nan)
    args = iq_ilo.Args(missing_action=way, gamma=0.9, temperature=0.5, batch_size=64, reward_updates=400)
    reward = iq_ilo.fit_reward(critic, policy, None, demos, replay, args, SimpleNamespace(signum=0))
    r = iq_ilo.implied_reward(critic, policy, *batch, 0.9, 0.5).detach()
    torch.testing.assert_close(reward(batch.obs, batch.action).detach(), r, atol=0.02, rtol=0)


def test_state_reward_takes_nothing_but_the_state():
    assert list(inspect.signature(iq_ilo.state_reward).parameters) == ["reward", "policy", "obs", "temperature"]


# -------------------------------------------------------------------------------------------------- the maze
@pytest.mark.parametrize("barrier", ["right", "left"])
@pytest.mark.parametrize("random_start", [False, True])
def test_the_maze_is_a_valid_environment(barrier, random_start):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        check_env(gym.make("PointMaze-v0", barrier=barrier, random_start=random_start, render_mode="rgb_array").unwrapped)


def test_maze_geometry():
    maze = PointMaze()
    ways = [((0.5, 0.2), (0.5, 0.8), True), ((0.3, 0.2), (0.3, 0.8), False), ((0.5, 0.2), (0.9, 0.4), False),
            ((0.1, 0.4), (0.9, 0.6), True), ((0.1, 0.4), (0.5, 0.6), False), ((0.9, 0.6), (0.1, 0.7), False)]
    for start, end, blocked in ways:
        assert maze.blocks(np.array(start), np.array(end)) == blocked
        assert maze.blocks(np.array(end), np.array(start)) == blocked
    assert PointMaze("left").blocks(np.array([0.3, 0.2]), np.array([0.3, 0.8]))
    below, at, above = (np.array([0.7, y]) for y in (0.499, 0.5, 0.507))  # no way through in two steps
    assert maze.blocks(below, at) and not maze.blocks(at, above) and maze.blocks(at, below) and not maze.blocks(above, at)
    distances = maze.distances(np.array([[0.5, 0.7], [0.5, 0.2], [0.3, 0.2], [0.5, 0.8]]))
    np.testing.assert_allclose(distances, [0.1, math.hypot(0.1, 0.3) * 2, math.hypot(0.2, 0.6), 0], atol=1e-12)


@pytest.mark.parametrize("barrier", ["right", "left"])
@pytest.mark.parametrize("side", ["below", "above"])
def test_nothing_goes_through_the_barrier_or_leaves_the_square(barrier, side):
    maze, rng = PointMaze(barrier, random_start=True), np.random.default_rng(0)
    maze.reset(seed=0)
    push = 1.0 if side == "below" else -1.0
    for _ in range(100):
        maze.reset()
        maze.position[1] = 0.5 - push * rng.uniform(0.0001, 0.5)
        maze.position[0] = rng.uniform(*maze.span)
        for _ in range(40):
            before = maze.position.copy()
            obs, *_ = maze.step(np.array([rng.uniform(-1, 1), push]))
            assert maze.observation_space.contains(obs)
            assert not maze.blocks(before, maze.position)
            if not maze.span[0] < maze.position[0] < maze.span[1]:
                break  # past its end
            assert (maze.position[1] - 0.5) * push < 0


def test_maze_starts_rewards_and_ends():
    starts = np.array([PointMaze().reset(seed=i)[0][:2] for i in range(20)])
    assert (abs(starts - PointMaze.START) <= 0.05 + 1e-6).all() and starts.std() > 0
    anywhere = np.array([PointMaze(random_start=True).reset(seed=i)[0][:2] for i in range(50)])
    assert anywhere.min() < 0.2 and anywhere.max() > 0.8
    env = gym.make("PointMaze-v0")
    obs, _ = env.reset(seed=0)
    ends = []
    for _ in range(100):
        obs, reward, terminated, truncated, _ = env.step(np.array([1.0, -1.0]))
        assert reward == pytest.approx(-np.hypot(obs[0] - 0.5, obs[1] - 0.8), abs=1e-6)
        ends.append((terminated, truncated))
    assert ends == [(False, False)] * 99 + [(False, True)]
    np.testing.assert_allclose(obs, [1, 0, 0, 0], atol=1e-7)


def test_maze_picture():
    env = gym.make("PointMaze-v0", render_mode="rgb_array")
    env.reset(seed=0)
    image, (x, y) = env.render(), env.unwrapped.position
    assert image.shape == (256, 256, 3) and image.dtype == np.uint8
    assert image[int(256 * (1 - y)), int(256 * x)].tolist() == [255, 255, 255]  # the agent
    assert image[int(256 * 0.2), 128].tolist() == [220, 30, 30]  # the goal
    assert image[128, 200].tolist() == [150, 150, 150] and image[128, 50].tolist() == [25, 30, 60]  # the barrier


# ------------------------------------------------------------------------------------------------ whole runs
ENVIRONMENTS = ["CartPole-v1", "PointMaze-v0"]


def rows_of(run_dir):
    with open(Path(run_dir) / "metrics.csv") as file:
        return [{k: v for k, v in row.items() if "second" not in k} for row in csv.DictReader(file)]


def networks_of(run_dir):
    saved = torch.load(Path(run_dir) / "model.pt", weights_only=True)
    return [saved[name][key] for name in ("policy", "critic", "reward") for key in sorted(saved[name])]


def train(tmp_path, name, *flags) -> Path:
    assert iq_ilo.main([*TINY, "--out-dir", str(tmp_path), "--run-name", name, *flags]) == 0
    return tmp_path / name


def same_training(*run_dirs) -> None:
    one, *others = run_dirs
    assert int(rows_of(one)[-1]["updates"]) == 216
    for other in others:
        assert str(rows_of(one)) == str(rows_of(other))
        assert all(torch.equal(a, b) for a, b in zip(networks_of(one), networks_of(other), strict=True))


@pytest.mark.parametrize("env_id", ENVIRONMENTS)
@pytest.mark.parametrize("way", ["idm", "policy", "replay"])
def test_the_experts_actions_are_never_read(env_id, way, tmp_path):
    """A file with NaN actions, one without actions, and one whose actions cannot be read as an array."""
    data = dict(np.load(ROOT / "demos" / f"{env_id}.npz"))
    actions = data.pop("actions")
    assert np.isfinite(actions).all()
    files = {"good": actions, "nan": np.full(len(actions), np.nan), "short": np.zeros(3), "none": None,
             "pickled": np.array([{}, 1], dtype=object)}
    for name, poisoned in files.items():
        np.savez(tmp_path / f"{name}.npz", **data, **({} if poisoned is None else {"actions": poisoned}))
    flags = ["--env-id", env_id, "--missing-action", way]
    same_training(*(train(tmp_path, name, *flags, "--demos", str(tmp_path / f"{name}.npz")) for name in files))


@pytest.mark.parametrize("env_id, way, value_loss, chi2_rows", [
    ("CartPole-v1", "idm", "value_expert", "expert"), ("CartPole-v1", "policy", "value", "both"),
    ("LunarLander-v3", "replay", "value", "both"), ("Hopper-v5", "policy", "v0_expert", "both")])
def test_the_form_of_the_loss_goes_with_the_missing_action(env_id, way, value_loss, chi2_rows):
    """An action that is not the expert's cannot be learned from on expert rows alone; a flag that is given wins."""
    flags = ["--env-id", env_id, "--missing-action", way]
    args = iq_ilo.parse_args(flags)
    assert (args.value_loss, args.chi2_rows) == (value_loss, chi2_rows)
    iq_ilo.validate(args)
    assert iq_ilo.parse_args([*flags, "--value-loss", "v0"]).value_loss == "v0"


class NaNReward(gym.RewardWrapper):
    def reward(self, reward):
        return np.nan


@pytest.mark.parametrize("env_id", ENVIRONMENTS)
def test_a_nan_reward_changes_nothing(env_id, tmp_path, capsys):
    name = env_id.removesuffix("-v1").removesuffix("-v0")
    gym.register(f"{name}-v70", entry_point=lambda render_mode=None, **kw: gym.make(env_id, render_mode=render_mode, **kw))
    gym.register(f"{name}-v71", entry_point=lambda render_mode=None, **kw: NaNReward(gym.make(env_id, **kw)))
    demos = ["--demos", str(ROOT / "demos" / f"{env_id}.npz"), "--eval-every", "0"]
    same_training(*(train(tmp_path, f"v{v}", "--env-id", f"{name}-v{v}", *demos) for v in (70, 71)))


@pytest.mark.parametrize("env_id", ENVIRONMENTS)
def test_same_seed_same_csv_another_seed_another(env_id, tmp_path):
    one, two, other = (train(tmp_path, name, "--env-id", env_id, "--seed", seed)
                       for name, seed in (("one", "3"), ("two", "3"), ("other", "4")))
    same_training(one, two)
    assert rows_of(one) != rows_of(other)


@pytest.mark.parametrize("env_id", ENVIRONMENTS)
def test_outputs_evaluation_and_resume(env_id, tmp_path, capsys):
    run_dir = train(tmp_path, "run", "--env-id", env_id)
    trained = FINAL.fullmatch(capsys.readouterr().out.splitlines()[-1]).groups()
    names = {path.name for path in run_dir.iterdir()}
    assert names == {"args.json", "metrics.csv", "model.pt", "checkpoint.pt", "iq_ilo.py"}
    before = rows_of(run_dir)
    assert (int(trained[6]), int(trained[7])) == (int(before[-1]["step"]), int(before[-1]["updates"])) == (240, 216)
    assert float(trained[0]) == float(before[-1]["eval_return_mean"])
    assert all(np.isfinite(float(before[-1][name])) for name in ("loss", "idm_log_likelihood", "reward_expert"))
    model = iq_ilo.load_model(str(run_dir / "model.pt"))
    obs = torch.rand(5, 4)
    with torch.no_grad():
        action = model.policy.act(obs)
        settings = model.saved["gamma"], model.saved["temperature"]
        r = iq_ilo.implied_reward(model.critic, model.policy, obs, action, obs, torch.zeros(5), *settings)
    of_state = iq_ilo.state_reward(model.reward, model.policy, obs, model.saved["temperature"])
    assert r.shape == of_state.shape == (5,) and torch.isfinite(r).all() and torch.isfinite(of_state).all()

    assert iq_ilo.main(["--evaluate", str(run_dir / "model.pt"), "--eval-episodes", "3", "--capture-video"]) == 0
    played = FINAL.fullmatch(capsys.readouterr().out.splitlines()[-1]).groups()
    assert played[:6] == trained[:6]
    assert (run_dir / "videos" / "evaluate.mp4").stat().st_size > 1000

    with open(run_dir / "metrics.csv", "a") as file:  # rows that a crash left behind the checkpoint
        file.write("99999,99999" + ",0" * len(before[0]) + "\n")
    assert iq_ilo.main(["--resume", str(run_dir), "--total-timesteps", "400"]) == 0
    after = rows_of(run_dir)
    assert after[: len(before)] == before and [int(r["step"]) for r in after[len(before):]] == [360, 400]
    assert iq_ilo.main(["--resume", str(run_dir), "--gamma", "0.5"]) == 2


def test_two_resumed_runs_are_the_same(tmp_path):
    one, two = (train(tmp_path, name, "--env-id", "PointMaze-v0", "--total-timesteps", "200") for name in ("one", "two"))
    for run_dir in (one, two):
        assert iq_ilo.main(["--resume", str(run_dir), "--total-timesteps", "300"]) == 0
    assert str(rows_of(one)) == str(rows_of(two))


@pytest.mark.parametrize("env_id, annealed", [("CartPole-v1", ["critic"]), ("Pendulum-v1", ["critic", "actor"])])
def test_learning_rates_fall_to_zero_but_for_the_inverse_dynamics(env_id, annealed, tmp_path, monkeypatch):
    rates, tick = [], iq_ilo.Run.tick

    def noted(self, *clock):
        rates.append([self.parts[f"{name}_optimizer"].param_groups[0]["lr"].item() for name in (*annealed, "idm")])
        tick(self, *clock)

    monkeypatch.setattr(iq_ilo.Run, "tick", noted)
    train(tmp_path, "run", "--env-id", env_id, "--total-timesteps", "100", "--anneal-lr", "0.5", "--actor-lr", "0.01",
          "--critic-lr", "0.01", "--idm-lr", "0.01")
    for step, (*own, idm) in zip(range(1, 101), rates, strict=True):
        assert own == pytest.approx([0.01 * min(1, 2 - step / 50)] * len(annealed), abs=1e-8) and idm == pytest.approx(0.01)


@pytest.mark.parametrize("env_id", ENVIRONMENTS)
def test_training_moves_every_parameter(env_id, tmp_path):
    run_dir = train(tmp_path, "run", "--env-id", env_id, "--eval-every", "0")
    torch.manual_seed(1)
    model = iq_ilo.load_model(str(run_dir / "model.pt"))
    critic = QNetwork(**model.critic.sizes)
    policy = Softmax(critic) if env_id == "CartPole-v1" else TanhGaussian(**model.policy.sizes)
    for fresh, trained in ((critic, model.critic), (policy, model.policy)):
        for (name, before), after in zip(fresh.named_parameters(), trained.parameters(), strict=True):
            assert (before != after).any(), name


def run_alone(folder, arguments):
    return subprocess.run([sys.executable, folder / "iq_ilo.py", *arguments], cwd=folder, text=True, capture_output=True,
                          env=os.environ, timeout=300)


def test_copied_alone_it_trains(tmp_path):
    shutil.copy(ROOT / "iq_ilo.py", tmp_path)
    arguments = [*TINY, "--out-dir", str(tmp_path / "runs"), "--run-name", "run"]
    missing = run_alone(tmp_path, arguments)
    assert missing.returncode == 2 and "--demos" in missing.stderr and "Traceback" not in missing.stderr
    assert not (tmp_path / "runs").exists()
    arguments += ["--demos", str(ROOT / "demos" / "CartPole-v1.npz")]
    done = run_alone(tmp_path, arguments)
    assert done.returncode == 0, done.stderr
    final = FINAL.fullmatch(done.stdout.splitlines()[-1]).groups()
    with open(tmp_path / "runs" / "run" / "metrics.csv") as file:
        assert float(final[8]) == float(list(csv.DictReader(file))[-1]["seconds"])  # though it fits the reward after it
    exists = run_alone(tmp_path, arguments)
    assert exists.returncode == 2 and "exists" in exists.stderr


@pytest.mark.parametrize("flags", ["--missing-action policy", "--missing-action replay", "--value-loss value",
                                   "--value-loss value_expert --chi2-rows expert", "--value-loss v0", "--target-rate 0",
                                   "--average-rate 0", "--no-layer-norm", "--no-standardize-obs", "--no-bound-targets",
                                   "--num-envs 3 --updates-per-step 0.5", "--obs-noise 0.1", "--no-save-model",
                                   "--reward-updates 0"])
@pytest.mark.parametrize("env_id", ENVIRONMENTS)
def test_every_form_trains(env_id, flags, tmp_path):
    run_dir = train(tmp_path, "run", "--env-id", env_id, "--eval-every", "0", *flags.split())
    last = rows_of(run_dir)[-1]
    assert all(np.isfinite(float(value)) for name, value in last.items() if not name.startswith("eval"))
    assert ("idm_log_likelihood" in last) is ("missing-action" not in flags)
    assert int(last["updates"]) == (108 if "0.5" in flags else 216)
    assert (run_dir / "model.pt").exists() is ("no-save-model" not in flags)


@pytest.mark.parametrize("flags, named", [("--temperature -1", "--temperature"), ("--gamma 1", "--gamma"),
                                          ("--idm-lr 0", "--idm-lr"), ("--env-id Nothing-v0", "--env-id"),
                                          ("--env-id Blackjack-v1", "--env-id"), ("--num-demos 1000", "--num-demos"),
                                          ("--env-id PointMaze-v0 --barrier left", "--demos")])
def test_bad_input_is_refused_in_one_sentence(flags, named, tmp_path, capsys):
    assert iq_ilo.main([*TINY, "--out-dir", str(tmp_path / "runs"), *flags.split()]) == 2
    err = capsys.readouterr().err
    assert named in err and len(err.strip().splitlines()) == 1 and err.startswith("iq_ilo.py: ")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("change", [{"observations": None}, {"terminations": None}, {"episode_lengths": np.array([9, 9])},
                                    {"observations": np.zeros((5, 4), np.float32)},
                                    {"observations": np.full((12, 4), np.nan, np.float32)},
                                    {"terminations": np.full(10, 7)}, {"env_id": np.array("Acrobot-v1")}])
def test_a_bad_file_is_refused_in_one_sentence(change, tmp_path, capsys):
    data = {"observations": np.zeros((12, 4), np.float32), "terminations": np.zeros(10, bool),
            "truncations": np.zeros(10, bool), "episode_lengths": np.array([5, 5]), "env_id": np.array("CartPole-v1")}
    path = tmp_path / "demos.npz"
    flags = ["--demos", str(path), "--out-dir", str(tmp_path / "runs")]
    np.savez(path, **data)
    assert iq_ilo.main([*TINY, *flags, "--run-name", "good"]) == 0
    np.savez(path, **{name: value for name, value in (data | change).items() if value is not None})
    capsys.readouterr()
    assert iq_ilo.main([*TINY, *flags, "--run-name", "bad"]) == 2
    err = capsys.readouterr().err
    assert str(path) in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "runs" / "bad").exists()


def test_dones_and_their_meaning(tmp_path, capsys):
    data = {"observations": np.zeros((12, 4), np.float32), "episode_lengths": np.array([5, 5]),
            "env_id": np.array("CartPole-v1")}
    flags = ["--demos", str(tmp_path / "demos.npz"), "--out-dir", str(tmp_path / "runs"), "--run-name", "run"]
    for dones in (np.array(True), np.ones(9), np.full(10, 2)):
        np.savez(tmp_path / "demos.npz", dones=dones, **data)
        assert iq_ilo.main([*TINY, *flags, "--dones-are", "terminations"]) == 2
        err = capsys.readouterr().err
        assert "dones of" in err and "terminations" not in err
    np.savez(tmp_path / "demos.npz", dones=np.arange(10) % 5 == 4, **data)
    assert iq_ilo.main([*TINY, *flags]) == 2
    assert "--dones-are" in capsys.readouterr().err
    assert iq_ilo.main([*TINY, *flags, "--dones-are", "terminations"]) == 0
    assert json.loads((tmp_path / "runs" / "run" / "args.json").read_text())["dones_are"] == "terminations"


def test_non_finite_training_exits_with_1(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        train(tmp_path, "bad", "--critic-lr", "1e30", "--no-layer-norm")
    assert exit.value.code == 1 and not (tmp_path / "bad" / "checkpoint.pt").exists()


@pytest.mark.parametrize("env_id", ENVIRONMENTS)
def test_compiled_and_eager_updates_agree(env_id):
    discrete = env_id == "CartPole-v1"
    results = []
    for compile in (False, True):
        torch.manual_seed(0)
        critic = QNetwork((4,), 2, discrete, 16)
        policy = Softmax(critic) if discrete else TanhGaussian((4,), [-1.0] * 2, [1.0] * 2, 16)
        idm = InverseDynamics((4,), 2, discrete, 16)
        optimizers = [torch.optim.Adam(network.parameters(), lr=1e-3, fused=True) for network in (critic, policy, idm)]
        optimizers[1] = None if discrete else optimizers[1]
        args = iq_ilo.Args(compile=compile, missing_action="replay", value_loss="value")
        update = iq_ilo.make_update(critic, None, policy, None, None, idm, optimizers, 8, args)
        obs, next_obs = torch.rand(2, 8, 4)
        action = torch.randint(2, (8,)) if discrete else torch.rand(8, 2)
        played = Batch(obs, action, next_obs, torch.zeros(8))
        expert = States(next_obs, obs, torch.zeros(8))
        torch.manual_seed(9)
        with torch._inductor.config.patch(fallback_random=True):  # the same noise for both
            terms = [float(update(expert, played, obs)[name]) for _ in range(3) for name in ("loss", "idm_log_likelihood")]
        results.append((terms, [p.detach() for net in (critic, policy, idm) for p in net.parameters()]))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-3)
    for eager, compiled in zip(results[0][1], results[1][1]):
        torch.testing.assert_close(eager, compiled, rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------------------------------- it learns
def final_return(capsys, tmp_path, *flags) -> float:
    assert iq_ilo.main([*flags, "--out-dir", str(tmp_path), "--reward-updates", "0", "--seed", "3"]) == 0
    return float(FINAL.fullmatch(capsys.readouterr().out.splitlines()[-1]).group(1))


FAST = "--total-timesteps 3000 --eval-every 3000 --critic-lr 1e-3 --average-rate 0.002".split()


def test_cartpole_from_observations_only(tmp_path, capsys):
    """Random actions give 23."""
    assert final_return(capsys, tmp_path, *FAST) >= 400


def test_cartpole_from_observations_of_an_expert_that_never_moves_but_left(left_only, tmp_path, capsys):
    """The control: a reward that merely says «survive» would score 500 here too."""
    assert final_return(capsys, tmp_path, "--demos", left_only, "--num-demos", "0", *FAST) < 50
