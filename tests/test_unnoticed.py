"""What would go wrong without a word: numbers that are reported, seeds, what losses and optimisers are given, statistics,
what play stores. Each test failed on a script that was broken in one place and passed all the others."""
import csv
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gymnasium.envs.classic_control import PendulumEnv
from test_run import ROOT, clock_demos, frame_demos, pendulum_demos, rows

import iq_atari
import iq_continuous
import iq_discrete
import iq_ilo
import iq_offline

ALL = [iq_discrete, iq_atari, iq_continuous, iq_offline, iq_ilo]
TINY = {
    iq_discrete: "--num-demos 2 --total-timesteps 60",
    iq_atari: "--num-demos 2 --pretrain-updates 2 --total-timesteps 16 --num-envs 2 --batch-size 4 --buffer-size 200 "
              "--updates-per-step 0.1",
    iq_continuous: "--env-id Pendulum-v1 --total-timesteps 60 --learning-starts 4 --hidden-size 8 --batch-size 8",
    iq_offline: "--num-demos 2 --total-updates 20",
    iq_ilo: "--total-timesteps 60 --learning-starts 10 --batch-size 4 --reward-updates 3",
}


@pytest.fixture
def go(tmp_path):
    """A tiny run of a script, without evaluation; returns what its checkpoint.pt and model.pt hold."""
    def go(module, flags="", name="run"):
        given = "" if module is not iq_offline or "--demos" in flags else " --env-id CartPole-v1"
        if "--demos" not in flags and module is iq_continuous:
            given = f" --demos {pendulum_demos(tmp_path / 'pendulum.npz')}"
        if "--demos" not in flags and module is iq_atari:
            given = f" --demos {frame_demos(tmp_path / 'frames.npz')}"
        where = f" --eval-every 0 --out-dir {tmp_path} --run-name {name} "
        assert module.main((TINY[module] + given + where + flags).split()) == 0
        return [torch.load(tmp_path / name / file, weights_only=True) for file in ("checkpoint.pt", "model.pt")]
    return go


class Three:
    """Three environments whose episodes last 1, 2 and 4 steps; reward 1 a step."""
    action_space = SimpleNamespace(seed=lambda seed: None, sample=lambda: np.zeros(3, int))

    def reset(self, seed):
        self.seed, self.t, self.actions = seed, 0, []
        return np.zeros((3, 4), np.float32), {}

    def step(self, action):
        self.t += 1
        self.actions += list(action)
        return np.zeros((3, 4), np.float32), np.ones(3), self.t % np.array([1, 2, 4]) == 0, np.zeros(3, bool), {}

    def close(self):
        pass


@pytest.mark.parametrize("module", ALL)
def test_evaluation_is_of_one_greedy_episode_each_from_seeds_of_its_own(module, monkeypatch):
    envs = Three()
    monkeypatch.setattr(module, "make_envs", lambda *_: envs)
    actor, network = SimpleNamespace(act=lambda obs: torch.ones(3)), lambda obs: torch.tensor([[0.0, 0.01]] * 3)
    policy = actor if module in (iq_continuous, iq_ilo) else network
    parts = [policy, None] if module is iq_offline else [policy]
    returns = module.evaluate(*parts, module.Args(seed=7, eval_episodes=3, temperature=1.0), "cpu")
    assert returns.tolist() == [1, 2, 4] and envs.seed == 107_000 and set(envs.actions) == {1}


@pytest.mark.parametrize("module", ALL)
def test_normalized_is_0_for_random_and_1_for_the_expert(module):
    assert " normalized=0.6667 " in module.final_line(np.array([1.0, 3.0]), 4.0, -2.0, 0, 0, 0.0, "")


@pytest.mark.parametrize("module", [iq_discrete, iq_continuous, iq_ilo])
def test_rows_and_checkpoints_where_steps_do_not_divide_the_interval(module, go, tmp_path, monkeypatch):
    saves, save = [], module.Run.save
    monkeypatch.setattr(module.Run, "save", lambda run: saves.append(run.step) or save(run))
    monkeypatch.setattr(module, "evaluate", lambda *_: np.zeros(3))
    go(module, "--num-envs 7 --total-timesteps 300 --eval-every 100 --checkpoint-every 100 --updates-per-step 0.1")
    assert [r["step"] for r in rows(tmp_path / "run")] == ["105", "203", "301"] and saves == [105, 203, 301, 301]


def test_what_a_model_says_of_itself(go):
    model = go(iq_discrete, "--gamma 0.9 --temperature 0.3 --eval-every 60 --eval-episodes 1")[1]
    demos = iq_discrete.load_demonstrations(iq_discrete.Args(num_demos=2), (4,), 2, "cpu")
    names = ("gamma", "temperature", "expert_return", "random_return")
    assert [model[name] for name in names] == [0.9, 0.3, demos.expert_return, 23]


@pytest.mark.parametrize("module", ALL)
def test_networks_are_drawn_by_the_seed(module, go):
    untrained = {iq_offline: "--total-updates 0", iq_atari: "--pretrain-updates 0 --total-timesteps 0"}.get(
        module, "--total-timesteps 0")
    one, two = (go(module, f"{untrained} --seed {seed}", f"run{seed}")[1] for seed in (1, 2))
    part = next(name for name in ("network", "actor", "policy") if one.get(name))
    assert any((one[part][name] != two[part][name]).any() for name in one[part] if name.endswith("weight"))


@pytest.mark.parametrize("module", [iq_discrete, iq_continuous, iq_ilo])
def test_resumed_play_begins_elsewhere(module, go, tmp_path, monkeypatch):
    seeds, reset = [], gym.vector.SyncVectorEnv.reset

    def kept(self, *, seed=None, options=None):
        seeds.append(seed)
        return reset(self, seed=seed, options=options)

    monkeypatch.setattr(gym.vector.SyncVectorEnv, "reset", kept)
    go(module)
    assert module.main(["--resume", str(tmp_path / "run"), "--total-timesteps", "70"]) == 0
    assert seeds[0] != seeds[-1]


def test_noise_reaches_the_loss(monkeypatch):
    seen = []
    for module, place, start in ((iq_discrete, 2, 4), (iq_ilo, 3, 5)):
        loss, of = module.iq_loss, (place, start)
        monkeypatch.setattr(module, "iq_loss", lambda *a, loss=loss, of=of: seen.append([a[i] for i in of]) or loss(*a))
    zeros, no, given = torch.zeros(2000, 4), torch.zeros(2000), {"obs_noise": 0.3, "value_loss": "v0"}
    q = iq_discrete.QNetwork((4,), 2)
    update = iq_discrete.make_update(q, None, None, torch.optim.Adam(q.parameters()), 1000, iq_discrete.Args(**given))
    update(iq_discrete.Batch(zeros, no.long(), zeros, no), zeros)
    q = iq_ilo.QNetwork((4,), 2, True)
    optimizers, args = [torch.optim.Adam(q.parameters()), None, None], iq_ilo.Args(missing_action="replay", **given)
    update = iq_ilo.make_update(q, None, iq_ilo.Softmax(q), None, None, None, optimizers, 2000, args)
    update(iq_ilo.States(zeros, zeros, no), iq_ilo.Batch(zeros, no.long(), zeros, no), zeros)
    for batch, initial_obs in seen:
        for x in (batch.obs, batch.next_obs, initial_obs):
            assert x.std().item() == pytest.approx(0.3, abs=0.02)
    assert len(seen) == 2


@pytest.mark.parametrize("module", [iq_discrete, iq_atari])
def test_play_is_sampled_at_the_temperature(module, go, monkeypatch):
    used, sample = [], module.sample_action
    monkeypatch.setattr(module, "sample_action", lambda q, obs, t: used.append(t) or sample(q, obs, t))
    go(module, "--temperature 0.7")
    assert set(used) == {0.7}


def test_play_of_softmax_is_sampled_at_the_temperature(go, monkeypatch):
    used, sample = [], iq_ilo.Softmax.sample
    monkeypatch.setattr(iq_ilo.Softmax, "sample", lambda self, obs, t: used.append(t) or sample(self, obs, t))
    go(iq_ilo, "--temperature 0.7")
    assert set(used) == {0.7} and len(used) == 50


def test_play_is_uniform_before_learning_starts(go):
    stored, _ = go(iq_ilo, "--env-id PointMaze-v0 --total-timesteps 1000 --learning-starts 500 --updates-per-step 0.001")
    first = stored["replay"]["storage"][1][:500]
    assert first.std().item() == pytest.approx(3**-0.5, abs=0.03)


class Count(gym.Env):
    """Observes its time; episodes of five steps."""
    observation_space, action_space = gym.spaces.Box(-np.inf, np.inf, (2,)), gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.t += 1
        return np.array([0, self.t], np.float32), 0.0, False, self.t == 5, {}


gym.register("Count-v0", entry_point=Count)


@pytest.mark.parametrize("module, place", [(iq_discrete, 4), (iq_continuous, 6), (iq_offline, 4), (iq_ilo, 5)])
def test_v0_reads_states_that_episodes_start_from(module, place, go, tmp_path, monkeypatch):
    seen, loss = [], module.iq_loss
    monkeypatch.setattr(module, "iq_loss", lambda *a: seen.append(a[place]) or loss(*a))
    discrete = module is iq_discrete
    more = {"actions": np.arange(10) % 2, "env_id": np.array("Count-v0")} if discrete else {}
    path = clock_demos(tmp_path / "clock.npz", **more)
    go(module, f"--value-loss v0 --demos {path} --env-id {'Count-v0' if discrete else 'Clock-v0'}")
    assert seen and all((x[:, 1] == 0).all() for x in seen)
    assert len({row[0] for x in seen for row in x.tolist()}) >= (2 if module is iq_offline else 1 if module is iq_ilo else 3)


def test_the_cnn_reads_the_whole_grid_at_the_agents_cell():
    torch.manual_seed(0)
    cnn = iq_discrete.QNetwork((3, 6, 6), 4, "cnn", 16).double()
    planes = torch.zeros(2, 3, 6, 6, dtype=torch.float64)
    planes[0, 2, 5, 5] = planes[1, 2, 5, 4] = 1
    torch.testing.assert_close(cnn(planes), cnn.layers.head.bias.expand(2, 4))  # no agent
    planes[:, 1, 0, 0] = 1
    q = cnn(planes)
    assert (q[0] != q[1]).any()


def test_statistics_of_each_network(go, tmp_path):
    obs = np.array([[5, t] for _ in range(2) for t in range(6)], np.float32)
    path = clock_demos(tmp_path / "c.npz", observations=obs, actions=np.arange(10) % 2, env_id=np.array("Count-v0"))
    net = go(iq_discrete, f"--demos {path} --env-id Count-v0 --standardize-obs")[1]["network"]
    torch.testing.assert_close(net["obs_std"], torch.tensor([0.01, 2**0.5]))
    stored, model = go(iq_ilo, "--env-id PointMaze-v0 --num-demos 1", "maze")
    obs, next_obs, _ = iq_ilo.load_demonstrations(iq_ilo.Args(env_id="PointMaze-v0", num_demos=1), (4,), "cpu").transitions
    for part, name, x in (("policy", "standardize", obs), ("critic", "standardize", obs), ("idm", "standardize", obs),
                          ("idm", "standardize_change", next_obs - obs)):
        for key, value in (("mean", x.mean(0)), ("std", x.std(0, correction=0))):
            torch.testing.assert_close(stored[part][f"{name}.{key}"], value)
    net = go(iq_atari, "--standardize-obs", "atari")[1]["network"]
    with np.load(tmp_path / "frames.npz") as file:
        torch.testing.assert_close(net["obs_mean"], torch.as_tensor(file["observations"]).float().mean(0))
    assert net["obs_std"] == 64


def test_cloning_is_of_softmax_q_and_saved_so(go):
    for module in (iq_discrete, iq_atari, iq_offline):
        assert go(module, "--objective bc --temperature 0.3", module.SCRIPT)[1]["temperature"] == 1
    q, action = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    for module in (iq_discrete, iq_atari, iq_offline):
        batch = module.Batch(q, action, q, torch.zeros(5))
        loss, terms = module.bc_loss(lambda obs: obs, *[None] * (module is iq_offline), batch)
        torch.testing.assert_close(loss, F.cross_entropy(q, action))
        assert terms["accuracy"] == (q.argmax(1) == action).float().mean()


def test_offline_optimisers_targets_and_bounds(go, tmp_path):
    path = pendulum_demos(tmp_path / "p.npz")
    stored, _ = go(iq_offline, f"--demos {path} --weight-decay 0.3 --actor-lr 0.02 --critic-lr 0.03")
    for name, lr in (("optimizer", 0.03), ("actor_optimizer", 0.02)):
        group = stored[name]["param_groups"][0]
        assert (group["weight_decay"], group["lr"]) == (0.3, lr)
    other, _ = go(iq_offline, "--env-id CartPole-v1 --learning-rate 0.04", "d")
    assert "target" in stored and "target" not in other and other["optimizer"]["param_groups"][0]["lr"] == 0.04
    for module in (iq_discrete, iq_offline):
        assert go(module, "--env-id CartPole-v1 --divergence tv", module.SCRIPT)[1]["sizes"]["q_bound"] == 10
    assert go(iq_atari, "--learning-rate 0.05", "a")[0]["optimizer"]["param_groups"][0]["lr"] == 0.05


def test_the_experts_return_is_of_the_episodes_trained_on(tmp_path):
    path = pendulum_demos(tmp_path / "p.npz", episodes=4)
    part = iq_offline.load_demonstrations(iq_offline.Args(demos=str(path), num_demos=0, holdout=0.5), None, "cpu")
    with np.load(path) as file:
        returns = file["rewards"].reshape(4, -1).sum(1)
        starts = file["observations"].reshape(4, -1, 3)[:, 0]
    used = [int(np.flatnonzero((starts == s).all(1))[0]) for s in part.initial_obs.numpy()]
    assert len(used) == 2 and part.expert_return == pytest.approx(returns[used].mean(), rel=1e-5)


def test_the_actor_learns_on_expert_and_policy_states(go, monkeypatch):
    sizes, loss = [], iq_ilo.actor_loss
    monkeypatch.setattr(iq_ilo, "actor_loss", lambda c, p, obs, t: sizes.append(len(obs)) or loss(c, p, obs, t))
    _, model = go(iq_ilo, "--env-id PointMaze-v0 --batch-size 4")
    assert set(sizes) == {8}  # and the reward network is one of its own
    assert any(not torch.equal(model["reward"][k], model["critic"][k]) for k in model["critic"])


def test_continuous_inverse_dynamics_samples():
    torch.manual_seed(0)
    idm, obs = iq_ilo.InverseDynamics((3,), 2, False, 16), torch.randn(1, 3).expand(4000, 3)
    before = torch.atanh(idm.sample(obs, obs).detach())
    torch.testing.assert_close(before.std(0), iq_ilo.gaussian(idm(obs[:1], obs[:1]))[1].exp()[0].detach(), rtol=0.1, atol=0)


def test_the_bundled_maze_demonstrations_follow_its_dynamics():
    maze, row, step = iq_ilo.PointMaze(), 0, 0
    with np.load(iq_ilo.demonstrations_path(iq_ilo.Args(env_id="PointMaze-v0"))) as file:
        for length in file["episode_lengths"][:3]:
            maze.reset(seed=0)
            maze.position, maze.velocity = np.split(file["observations"][row].astype(float), 2)
            seen = [maze.step(action)[0] for action in file["actions"][step : step + length]]
            np.testing.assert_allclose(seen, file["observations"][row + 1 : row + length + 1], atol=1e-4)
            row, step = row + length + 1, step + length


def test_evaluation_is_in_the_environment_of_the_model(go, tmp_path, monkeypatch):
    for module, env, flag, name in ((iq_discrete, "GridWorld-v0", "--random-walls", "random_walls"),
                                    (iq_ilo, "PointMaze-v0", "--random-start", "random_start")):
        demos, played = module.demonstrations_path(module.Args(env_id=env)), []
        few = " --pretrain-updates 2" * (module is iq_discrete)
        go(module, f"--env-id {env} {flag} --demos {demos}{few}", env)
        monkeypatch.setattr(module, "evaluate", lambda _, args, *more, played=played: played.append(args) or np.zeros(2))
        assert module.main(["--evaluate", str(tmp_path / env / "model.pt")]) == 0
        assert played and all(getattr(args, name) for args in played)  # by the model, and by random actions


def test_games_are_scored_in_full(monkeypatch):
    made = []
    monkeypatch.setattr(iq_atari, "AtariVectorEnv", lambda *a, **k: made.append(k))
    iq_atari.make_envs(iq_atari.Args(), 1)
    assert made[0]["reward_clipping"] is False


@pytest.mark.parametrize("module", [iq_discrete, iq_continuous, iq_offline, iq_ilo])
def test_every_transition_is_drawn(module):
    x = torch.arange(3.0)
    own = module.States(x, x, x) if module is iq_ilo else module.Batch(x, x, x, x)
    fields = dict.fromkeys(module.Demonstrations._fields) | {"transitions": own}
    assert set(module.draw(module.Demonstrations(**fields), 300).obs.tolist()) == {0, 1, 2}


@pytest.mark.parametrize("flags", ["--objective bc --updates-per-step 0.5", "--num-envs 3 --updates-per-step 0.5"])
def test_updates_for_steps(flags, go):
    assert go(iq_discrete, f"--total-timesteps 300 {flags}")[0]["updates"] == 150


def test_initial_states_are_restored(go, tmp_path):
    before = go(iq_discrete, "--total-timesteps 300")[0]["initial"]["written"]
    assert iq_discrete.main(["--resume", str(tmp_path / "run")]) == 0
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["initial"]["written"] == before + 1


def test_minari_ends(monkeypatch):
    episode = SimpleNamespace(observations=np.zeros((3, 4)), actions=np.zeros(2), rewards=np.zeros(2),
                              terminations=np.array([0, 1]), truncations=np.zeros(2))
    data = SimpleNamespace(iterate_episodes=lambda: [episode], total_episodes=1, env_spec=None)
    monkeypatch.setitem(sys.modules, "minari", SimpleNamespace(load_dataset=lambda *_, **__: data))
    assert iq_ilo.read_minari("x-v0")["terminations"].tolist() == [0, 1]


def test_noise_reaches_the_reward_network(go, monkeypatch):
    calls, blurred = [], iq_ilo.blurred
    monkeypatch.setattr(iq_ilo, "blurred", lambda batch, noise: calls.append(noise) or blurred(batch, noise))
    go(iq_ilo, "--obs-noise 0.1")
    assert calls == [0.1] * (50 + 3)  # updates, and those of the reward network


def test_play_is_of_the_network_that_learns(go, monkeypatch):
    used, runs, forward = [], [], iq_continuous.Actor.forward

    def signed(actor, obs):
        mean, log_std = forward(actor, obs)
        mean.actor = actor
        return mean, log_std

    monkeypatch.setattr(iq_continuous.Actor, "forward", signed)
    for module, name in ((iq_discrete, "network"), (iq_atari, "network"), (iq_continuous, "actor"), (iq_ilo, "policy")):
        owner, what = (iq_ilo.Softmax, "sample") if module is iq_ilo else (module, "sample_action")
        sample, save = getattr(owner, what), module.Run.save
        with monkeypatch.context() as patch:
            patch.setattr(owner, what, lambda part, *a, sample=sample: (
                used.append(getattr(part, "actor", part)) or sample(part, *a)))
            patch.setattr(module.Run, "save", lambda run, save=save: runs.append(run) or save(run))
            go(module, "--average-rate 0.5", module.SCRIPT)
        parts = runs[-1].parts
        assert any(part is parts[name] for part in used) and not any(part is parts["average"] for part in used)


@pytest.mark.parametrize("module, flags, rows_read", [
    (iq_discrete, "--value-loss v0_expert --chi2-rows both", 64), (iq_atari, "--value-loss v0_expert --chi2-rows both", 8),
    (iq_discrete, "--value-loss v0_expert --chi2-rows expert --divergence w1", 64),
    (iq_discrete, "--value-loss v0_expert --chi2-rows expert", 32)])
def test_play_is_read_where_a_term_needs_it(module, flags, rows_read, go, monkeypatch):
    seen, loss = [], module.iq_loss
    monkeypatch.setattr(module, "iq_loss", lambda *a: seen.append(len(a[2].obs)) or loss(*a))
    go(module, flags)
    assert seen[-1] == rows_read


@pytest.mark.parametrize("module", ALL)
def test_every_script_draws_the_same_transitions(module):
    lengths = np.array([9, 2, 30, 14, 7])
    for seed in range(4):
        chosen, place, t = module.choose_transitions(module.Args(seed=seed, num_demos=3, subsample_freq=5), lengths)
        rng = np.random.default_rng(seed)
        assert chosen.tolist() == rng.permutation(5)[:3].tolist()
        times = [np.arange(rng.integers(min(5, n)), n, 5) for n in lengths[chosen]]
        assert t.tolist() == np.concatenate(times).tolist() and place.tolist() == [i for i, x in enumerate(times) for _ in x]


@pytest.mark.parametrize("module", ALL)
def test_a_report_that_is_due_is_stored(module, go, monkeypatch):
    save = module.Run.save
    monkeypatch.setattr(module.Run, "save", lambda run: setattr(run, "due", True) or save(run))
    assert go(module)[0]["due"] is True


def test_actions_at_the_bounds_count_as_0_999():
    obs, ends = torch.zeros(2, 3), torch.tensor([[1.0], [0.999]])
    mean = log_std = torch.zeros(2, 1)
    right = iq_continuous.log_density(mean, log_std, torch.atanh(torch.tensor([[0.999], [0.999]])))
    torch.testing.assert_close(-iq_continuous.cloning_loss(mean, log_std, ends), right.mean())
    torch.testing.assert_close(iq_offline.log_policy((mean, log_std), ends), right)
    idm = iq_ilo.InverseDynamics((3,), 1, False, 8)
    right = iq_ilo.log_density(*iq_ilo.gaussian(idm(obs, obs)), torch.atanh(torch.full((2, 1), 0.999)))
    torch.testing.assert_close(idm.log_prob(obs, ends, obs), right)


def test_held_out_likelihood_is_at_the_policys_temperature(go, monkeypatch):
    q, action = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    batch = iq_offline.Batch(q, action, q, torch.zeros(5))
    for temperature, known in ((0.5, 0.5), (0.0, 1e-6)):  # a hard maximum's is taken there
        term = iq_offline.holdout_terms(lambda obs: obs, None, batch, temperature)["holdout_log_likelihood"]
        torch.testing.assert_close(term, -F.cross_entropy(q / known, action))
    used, terms = [], iq_offline.holdout_terms
    monkeypatch.setattr(iq_offline, "holdout_terms", lambda *a: used.append(a[3]) or terms(*a))
    go(iq_offline, "--objective bc --temperature 0.3 --holdout 0.5")
    assert set(used) == {1.0}


def test_actions_named_by_the_policy_are_at_the_temperature():
    x, policy = torch.zeros(2, 3), SimpleNamespace(sample=lambda obs, temperature: temperature)
    assert iq_ilo.name_actions("policy", policy, None, iq_ilo.States(x, x, x[:, 0]), None, 0.3) == 0.3


def test_cloning_games_takes_as_many_updates_as_play(go):
    assert go(iq_atari, "--objective bc --total-timesteps 40 --updates-per-step 0.5")[0]["updates"] == 22


def test_alpha_of_the_absorbing_state_and_margin_of_kl():
    assert iq_discrete.absorbing_value(0.1, 0.1, iq_discrete.Args(gamma=0.9)) == pytest.approx(10)
    r = torch.tensor([-4.9, 1.0])
    for module in (iq_discrete, iq_offline):
        torch.testing.assert_close(module.phi("kl", r), 1 - torch.exp(-r))


@pytest.mark.parametrize("module", [iq_continuous, iq_offline, iq_ilo])
def test_transitions_of_drawn_episodes_of_unequal_lengths(module, tmp_path):
    lengths = np.array([3, 6, 2, 5])
    obs = np.concatenate([np.full((n + 1, 3), 10 * i) + np.arange(n + 1)[:, None] for i, n in enumerate(lengths)])
    n, path = lengths.sum(), tmp_path / "file.npz"
    np.savez(path, observations=obs.astype(np.float32), actions=np.zeros((n, 1), np.float32), terminations=np.zeros(n, bool),
             truncations=np.zeros(n, bool), episode_lengths=lengths, env_id=np.array("Pendulum-v1"))
    args = module.Args(env_id="Pendulum-v1", demos=str(path), num_demos=2, seed=3)
    actor = iq_continuous.Actor((3,), [-2.0], [2.0], 8)
    given = {iq_continuous: ((3,), actor), iq_offline: (None,), iq_ilo: ((3,),)}[module]
    demos = module.load_demonstrations(args, *given, "cpu")
    expected = [10 * i + t for i in np.random.default_rng(3).permutation(4)[:2] for t in range(lengths[i])]
    assert demos.transitions.obs[:, 0].tolist() == expected
    assert demos.transitions.next_obs[:, 0].tolist() == [x + 1 for x in expected]


def test_the_reward_network_is_of_the_critic_that_is_saved(go, monkeypatch):
    given, fit = [], iq_ilo.fit_reward
    monkeypatch.setattr(iq_ilo, "fit_reward", lambda critic, *a: given.append(critic.state_dict()) or fit(critic, *a))
    model = go(iq_ilo, "--average-rate 0.01")[1]
    assert all(torch.equal(model["critic"][name], value) for name, value in given[0].items())


@pytest.mark.parametrize("module", [iq_discrete, iq_continuous, iq_offline, iq_ilo])
@pytest.mark.parametrize("meaning", ["terminations", "time-limits"])
def test_what_dones_are(module, meaning, tmp_path):
    demos = {iq_discrete: "CartPole-v1", iq_offline: "CartPole-v1"}.get(module, "Pendulum-v1")
    with np.load(ROOT / "demos" / f"{demos}.npz") as file:
        data = {name: file[name] for name in file.files if name not in ("terminations", "truncations")}
    ends = np.zeros(len(data["actions"]), bool)
    ends[np.cumsum(data["episode_lengths"]) - 1] = True
    np.savez(tmp_path / "file.npz", dones=ends, **data)
    args = module.Args(env_id=demos, demos=str(tmp_path / "file.npz"), num_demos=0, dones_are=meaning)
    actor = iq_continuous.Actor((3,), [-2.0], [2.0], 8)
    given = {iq_discrete: ((4,), 2), iq_continuous: ((3,), actor), iq_offline: (None,), iq_ilo: ((3,),)}[module]
    terminated = module.load_demonstrations(args, *given, "cpu").transitions.terminated
    assert terminated.sum() == (len(data["episode_lengths"]) if meaning == "terminations" else 0)


def test_the_reward_is_fitted_with_a_rate_that_falls_to_zero(monkeypatch):
    critic, rates, step = iq_ilo.QNetwork((4,), 2, True), [], torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda adam: rates.append(adam.param_groups[0]["lr"]) or step(adam))
    replay = iq_ilo.Replay(4, [((4,), torch.float32), ((), torch.int64), ((4,), torch.float32), ((), torch.float32)], "cpu")
    replay.add(torch.ones(4, 4), torch.ones(4).long(), torch.ones(4, 4), torch.zeros(4))
    zeros = torch.zeros(3, 4)
    demos = iq_ilo.Demonstrations(iq_ilo.States(zeros, zeros, zeros[:, 0]), zeros, 0.0)
    args = iq_ilo.Args(reward_updates=4, temperature=0.1, batch_size=2)
    iq_ilo.fit_reward(critic, iq_ilo.Softmax(critic), None, demos, replay, args, SimpleNamespace(signum=0))
    assert rates == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])


def test_actions_of_the_replay_are_drawn_without_regard_to_the_state():
    zeros, action = torch.zeros(50, 4), torch.arange(50)
    played = iq_ilo.Batch(zeros, action, zeros, zeros[:, 0])
    drawn = [iq_ilo.name_actions("replay", None, None, iq_ilo.States(*[zeros[:40]] * 2, zeros[:40, 0]), played, 0.1)
             for _ in range(20)]
    assert all(len(x) == 40 for x in drawn) and torch.cat(drawn).unique().tolist() == action.tolist()
    assert not (torch.stack(drawn) == action[:40]).all(0).any()  # no row keeps its own


def test_frames_and_ends_of_games_that_are_replayed_together(monkeypatch):
    """Game 0 ends by itself after 2 decisions, game 1 is cut off after 3; the first goes on as another game."""
    def frames(*values):
        return np.array(values, np.uint8)[:, None, None, None] * np.ones((1, 4, 84, 84), np.uint8)

    class Games:
        t = 0

        def reset(self, seed):
            assert seed.tolist() == [8, 9]
            return frames(10, 20), {}

        def step(self, action):
            self.t, ended, cut = self.t + 1, np.array([self.t == 1, False]), np.array([False, self.t == 2])
            now = [10 + self.t, 20 + self.t]
            assert self.t == 3 or action.tolist() == [self.t, 3 + self.t]
            obs = [99 if end else value for end, value in zip(ended | cut, now)]
            return frames(*obs), np.array([1.0, 5.0]), ended, cut, {"final_obs": frames(*now)}

        def close(self):
            pass

    monkeypatch.setattr(iq_atari, "make_envs", lambda args, n: Games())
    data = {"seeds": np.array([7, 8, 9]), "actions": np.array([0, 1, 2, 4, 5, 6]), "episode_lengths": np.array([1, 2, 3]),
            "returns": np.array([0.0, 2.0, 15.0])}
    shown, terminations = iq_atari.simulate("", iq_atari.Args(), data, np.array([1, 2]))
    assert shown[:, 5, 5].tolist() == [10, 11, 12, 20, 21, 22, 23]
    assert terminations.tolist() == [False, True, False, False, False]


@pytest.mark.parametrize("module", [iq_discrete, iq_continuous, iq_ilo])
def test_steps_per_second_of_a_resumed_run_are_its_own(module, go, tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(module.time, "time", lambda: now[0])
    init = module.Run.__init__

    def begin(run, *a):
        init(run, *a)
        now[0] += 10  # seconds

    monkeypatch.setattr(module.Run, "__init__", begin)
    go(module)
    last = [rows(tmp_path / "run")[-1]]
    now[0] += 500  # between the two
    assert module.main(["--resume", str(tmp_path / "run"), "--total-timesteps", "100"]) == 0
    last.append(rows(tmp_path / "run")[-1])
    assert [(r["steps_per_second"], r["seconds"]) for r in last] == [("6.0", "10.0"), ("4.0", "20.0")]


@pytest.mark.parametrize("module", [iq_discrete, iq_atari, iq_continuous])
def test_steps_per_second_are_those_of_play(module, go, tmp_path, monkeypatch):
    now, make_update = [1000.0], module.make_update
    monkeypatch.setattr(module.time, "time", lambda: now.append(now.pop() + 1e-6) or now[0])

    def slow(*parts):
        """Every update takes a second; of two functions, the first is the clones'."""
        made = make_update(*parts)
        first, update = (made[:-1], made[-1]) if isinstance(made, tuple) else ((), made)

        def one(*batch):
            now[0] += 1
            return update(*batch)

        return (*first, one) if first else one

    monkeypatch.setattr(module, "make_update", slow)
    go(module, "--pretrain-updates 30 --total-timesteps 80 --updates-per-step 0.1")
    last = rows(tmp_path / "run")[-1]
    played = int(last["updates"]) - 30
    assert played > 0 and float(last["steps_per_second"]) == pytest.approx(int(last["step"]) / played, abs=0.1)


def resumed_after_a_signal(go, module, number: int, folder, flags: str = "") -> None:
    """A run that is sent signal `number` exits so and leaves a checkpoint, from which it goes on to the end."""
    with pytest.raises(SystemExit) as exit:
        go(module, flags)
    assert exit.value.code == 128 + number and (folder / "checkpoint.pt").exists()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # as before
    assert module.main(["--resume", str(folder)]) == 0


@pytest.mark.parametrize("module", ALL)
@pytest.mark.parametrize("moment", ["begins", "ends"])
def test_a_signal_when_a_run_begins_or_ends_says_how_to_go_on(module, moment, go, tmp_path, monkeypatch, capsys):
    """Between the making of its directory and its first step; and after the last checkpoint, while its model is saved."""
    copy, save, sent = shutil.copy, module.save_atomically, []

    def send(now: bool):
        if now and not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))

    monkeypatch.setattr(module.shutil, "copy", lambda *given: (copy(*given), send(moment == "begins")))
    monkeypatch.setattr(module, "save_atomically", lambda content, path: (
        send(moment == "ends" and path.name == "model.pt"), save(content, path)))
    resumed_after_a_signal(go, module, signal.SIGTERM, tmp_path / "run")
    assert sent and f"to continue: python {module.SCRIPT}.py --resume {tmp_path / 'run'}" in capsys.readouterr().out


@pytest.mark.parametrize("module", ALL)
def test_a_signal_just_before_an_evaluation_puts_it_off(module, go, tmp_path, monkeypatch):
    flags = f"--eval-every {8 if module is iq_atari else 10}" + " --pretrain-updates 0" * (module is iq_atari)
    monkeypatch.setattr(module, "evaluate", lambda *_: np.zeros(3))
    go(module, flags, "whole")
    tick, sent = module.Run.tick, []

    def interrupted(run, clock, steps):
        if clock % run.every < steps and not sent:
            sent.append(os.kill(os.getpid(), signal.SIGINT))
        tick(run, clock, steps)

    monkeypatch.setattr(module.Run, "tick", interrupted)
    resumed_after_a_signal(go, module, signal.SIGINT, tmp_path / "run", flags)
    whole, cut = ([(r["step"], r["updates"]) for r in rows(tmp_path / name)] for name in ("whole", "run"))
    assert sent and cut == whole


@pytest.mark.parametrize("module", [iq_discrete, iq_offline])
def test_a_signal_in_the_last_step_takes_no_row_from_a_run_that_goes_on(module, go, tmp_path, monkeypatch):
    length = "--total-updates" if module is iq_offline else "--total-timesteps"
    tick = module.Run.tick

    def interrupted(run, clock, steps):
        if clock == 20:
            os.kill(os.getpid(), signal.SIGINT)
        tick(run, clock, steps)

    monkeypatch.setattr(module.Run, "tick", interrupted)
    monkeypatch.setattr(module, "evaluate", lambda *_: np.zeros(3))
    with pytest.raises(SystemExit):
        go(module, f"{length} 20 --eval-every 10")
    assert module.main(["--resume", str(tmp_path / "run"), length, "40"]) == 0
    assert [r["updates"] for r in rows(tmp_path / "run")] == ["10", "20", "30", "40"]


@pytest.mark.parametrize("module", [iq_discrete, iq_continuous])
def test_a_run_stopped_in_pretraining_starts_play_from_the_same_states(module, go, tmp_path, monkeypatch):
    flags, tick, sent = "--pretrain-updates 6 --value-loss v0", module.Run.tick, []
    whole = go(module, flags, "whole")[0]

    def interrupted(run, clock, steps):
        if run.updates in (2, 4) and not run.step and run.updates not in sent:
            sent.append(run.updates)
            os.kill(os.getpid(), signal.SIGTERM)
        tick(run, clock, steps)

    monkeypatch.setattr(module.Run, "tick", interrupted)
    with pytest.raises(SystemExit):
        go(module, flags)
    with pytest.raises(SystemExit):
        module.main(["--resume", str(tmp_path / "run")])
    assert module.main(["--resume", str(tmp_path / "run")]) == 0 and sent == [2, 4]
    cut = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert cut["initial"]["written"] == whole["initial"]["written"]
    name = "network" if module is iq_discrete else "critic"
    assert all(torch.equal(cut[name][key], whole[name][key]) for key in whole[name])


@pytest.mark.parametrize("module, starts", [(iq_continuous, 6), (iq_ilo, 30)])
def test_a_run_that_has_not_played_waits_for_no_more_than_a_share_of_what_it_plays_at_last(module, starts, go, tmp_path):
    go(module, "--total-timesteps 0 --learning-starts 5000")
    assert module.main(["--resume", str(tmp_path / "run")]) == 0
    again = ["--resume", str(tmp_path / "run"), "--total-timesteps", "60", "--learning-starts", "5000"]
    assert module.main(again) == 0 and module.main(again) == 0
    assert int(rows(tmp_path / "run")[-1]["updates"]) == 60 - starts
    assert module.main(again[:-1] + ["2"]) == 2


@pytest.mark.parametrize("module, env_id", [(iq_discrete, "GridWorld"), (iq_ilo, "PointMaze")])
def test_an_environment_of_the_script_without_its_version_would_have_no_switches(module, env_id, tmp_path, capsys):
    path = tmp_path.joinpath("none.npz")
    assert module.main(["--env-id", env_id, "--demos", str(path), "--out-dir", str(tmp_path)]) == 2
    assert f"--env-id {env_id}: expected {env_id}-v0" in capsys.readouterr().err


@pytest.mark.parametrize("module", ALL)
def test_tracked_rows_have_steps_that_grow(module, go, monkeypatch):
    """Weights & Biases drops what is logged at an earlier step and writes over what is logged at the same one."""
    steps = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: None, finish=lambda: None,
                                                              log=lambda row, step: steps.append(step)))
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(module, "evaluate", lambda *_: np.zeros(3))
    few = " --updates-per-step 0.01 --pretrain-updates 5" * (module in (iq_discrete, iq_continuous))
    go(module, f"--track --eval-every 4{few}")
    assert len(steps) > 2 and all(a < b for a, b in zip(steps, steps[1:]))


def test_frames_from_which_nothing_was_played_are_written_over(go, tmp_path, monkeypatch):
    """A run that is stopped in pretraining has them, once more each time; where all are drawn, one has action −1."""
    replay, frame = iq_atari.Replay(40, 2, "cpu"), torch.ones(2, 84, 84).byte()
    for i in range(4):
        replay.start(replay.rings, i * frame)
    replay.add(torch.tensor([3, 4]), 9 * frame, torch.zeros(2))
    batch = replay.sample(64)
    assert set(batch.action.tolist()) == {3, 4} and (batch.obs[:, -1] == 3).all() and (batch.next_obs[:, -1] == 9).all()
    replay.start(torch.tensor([1]), 5 * frame[:1])  # after play the last frame stays, as the next observation
    replay.add(torch.tensor([5, 6]), 7 * frame, torch.zeros(2))
    assert replay.written.tolist() == [3, 4] and set(replay.sample(200).action.tolist()) == {3, 4, 5, 6}
    for _ in range(6):  # stopped after each step
        replay.start(replay.rings, frame)
        replay.add(torch.tensor([7, 8]), frame, torch.zeros(2))
    assert min(int(replay.sample(8).action.min()) for _ in range(200)) >= 3


def test_the_random_grids_have_the_settings_that_were_measured():
    walls = ["--env-id", "GridWorld-v0", "--random-walls"]
    args = iq_discrete.parse_args([*walls, "--temperature", "0.3"])
    assert (args.network, args.pretrain_updates, args.temperature) == ("cnn", 4_000, 0.3)
    assert iq_discrete.parse_args(walls[:2]).network == "mlp" and iq_discrete.parse_args([]).pretrain_updates == 0
    with open(ROOT / "reproduce" / "discrete.csv") as file:
        (command,) = {row["command"].split(" --seed ")[0] for row in csv.DictReader(file)
                      if (row["task"], row["method"]) == ("GridWorld, random walls, CNN", "iq")}
    assert vars(iq_discrete.parse_args(command.split()[2:])) == vars(iq_discrete.parse_args(walls))


@pytest.mark.parametrize("module, flags", [(iq_discrete, "--random-walls --demos demos/CartPole-v1.npz"),
                                           (iq_discrete, "--grid-size 5"), (iq_ilo, "--barrier left")])
def test_a_switch_of_another_environment_is_bad_input(module, flags, tmp_path, capsys):
    assert module.main(f"{flags} --num-demos 1 --out-dir {tmp_path}".split()) == 2 and not list(tmp_path.iterdir())
    home = "GridWorld" if module is iq_discrete else "PointMaze"
    assert f"{flags.split()[0]}: it is for {home}-v0" in capsys.readouterr().err


@pytest.mark.parametrize("module", [iq_continuous, iq_ilo])
def test_what_training_does_not_bound_is_told_and_of_playing_nothing(module, capsys):
    args = module.parse_args(["--env-id", "Hopper-v5", "--temperature", "1"])
    module.validate(args)
    assert "take --no-bound-targets" in capsys.readouterr().err
    args.evaluate = "model.pt"
    module.validate(args)
    assert not capsys.readouterr().err


def test_a_learning_rate_of_the_other_kind_of_actions_is_told(go, tmp_path, capsys):
    go(iq_offline, "--actor-lr 0.1")
    assert "warning: --actor-lr does nothing with discrete actions" in capsys.readouterr().err
    go(iq_offline, "", "plain")
    assert "does nothing" not in capsys.readouterr().err
    with np.load(ROOT / "demos" / "CartPole-v1.npz") as file:  # the setting of that name has a rate
        np.savez(tmp_path / "real.npz", **dict(file) | {"actions": np.float32(file["actions"])[:, None]})
    go(iq_offline, f"--demos {tmp_path / 'real.npz'} --no-mirror", "real")
    assert "does nothing" not in capsys.readouterr().err
    go(iq_ilo, "--actor-lr 0.1", "ilo")
    assert "warning: --actor-lr does nothing with discrete actions" in capsys.readouterr().err
    go(iq_ilo, "", "ilo-plain")
    assert "does nothing" not in capsys.readouterr().err


@pytest.mark.parametrize("flags, told", [("--env-id Acrobot-v1 --absorbing", True), ("--env-id Acrobot-v1", False),
                                         ("", False), ("--env-id Acrobot-v1 --absorbing --value-loss v0_expert", False)])
def test_an_absorbing_state_that_is_of_no_use_is_told(go, capsys, flags, told):
    """CartPole's setting has one, for experts that fall: its own demonstrations do not, and nothing is said of it."""
    go(iq_discrete, flags)
    assert ("warning: --absorbing does nothing" in capsys.readouterr().err) is told


@pytest.mark.parametrize("module", ALL)
def test_evaluation_and_resuming_are_two_things(module, go, tmp_path, capsys):
    go(module)
    run = tmp_path / "run"
    assert module.main(["--resume", str(run), "--evaluate", str(run / "model.pt")]) == 2
    assert "--evaluate: it plays a model, and --resume trains on" in capsys.readouterr().err


@pytest.mark.parametrize("kept", [True, False], ids=["others", "no others"])
@pytest.mark.parametrize("module", ALL)
def test_rows_after_the_checkpoint_are_gone_before_the_next_row(module, kept, go, tmp_path, monkeypatch):
    """Else a run that is stopped again before its first row would take them for its own."""
    go(module)
    run = tmp_path / "run"
    own = rows(run)
    late = own[-1] | {name: int(own[-1][name]) + 50 for name in ("step", "updates")}  # the run was killed after this row
    expected = own if kept else []
    with open(run / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, own[0])
        writer.writeheader()
        writer.writerows([*expected, late])
    monkeypatch.delattr(module.Run, "report")
    for _ in range(2):  # what is written can be read again, also where no row is left
        with pytest.raises(AttributeError, match="report"):
            module.main(["--resume", str(run)])
        assert rows(run) == expected


@pytest.mark.parametrize("module", ALL)
def test_a_batch_too_large_for_the_memory_is_one_sentence(module, go, capsys):
    flag = f"--batch-size {10**15}"  # beyond what a process can address
    with pytest.raises(AssertionError):  # it asserts the status 0
        go(module, flag + " --num-demos 1" * (module is iq_atari))
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith(f"{module.SCRIPT}.py: ") and "allocate" in err and "a smaller --batch-size" in err


def test_offline_names_the_script_that_an_environment_is_in(tmp_path, capsys):
    demos = ROOT / "demos" / "GridWorld-v0.npz"
    given = f"--demos {demos} --total-updates 2 --num-demos 1 --out-dir {tmp_path} --run-name run"
    assert iq_offline.main(given.split()) == 0
    shown = capsys.readouterr().out
    hint = shown.split(" iq_offline.py ")[1].split("\n")[0]
    assert "the level without its switches" in shown and "iq_discrete:GridWorld-v0" in hint
    assert iq_offline.main([*hint.split(), "--eval-episodes", "1"]) == 0


@pytest.mark.parametrize("module", [iq_discrete, iq_continuous, iq_offline, iq_ilo])
def test_entries_in_small_units_are_told(module, capsys):
    obs = torch.tensor([[-1e-3, 5.0, -1.0, 1e-3], [1e-3, 5.0, 1.0, -1e-3]])
    assert module.deviation(obs, 3).tolist() == pytest.approx([0.01, 0.01, 1.0, 0.01])
    assert capsys.readouterr().out.startswith("1 entries of an observation have a standard deviation below 0.01")
    module.deviation(obs[:, 1:3])
    assert not capsys.readouterr().out


@pytest.mark.parametrize("script", ["iq_discrete", "iq_offline"])
def test_output_that_nobody_reads_to_its_end_is_no_error(script, tmp_path):
    command = f"{sys.executable} {ROOT / script}.py --env-id CartPole-v1 --out-dir {tmp_path} | true"
    done = subprocess.run(["bash", "-c", command + "; echo ${PIPESTATUS[0]}"], capture_output=True, text=True, timeout=120)
    assert done.stdout == "141\n" and "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


@pytest.mark.parametrize("game", ["Combat", "Joust", "MazeCraze", "Warlords"])
def test_games_that_the_emulator_cannot_play_alone_are_bad_input(game, capsys):
    assert iq_atari.main(["--env-id", f"ALE/{game}-v5"]) == 2
    assert "no such game" in capsys.readouterr().err


def test_a_given_switch_must_be_the_models_own(go, tmp_path, capsys):
    go(iq_ilo, "--env-id PointMaze-v0 --num-demos 2 --barrier left --demos " + str(ROOT / "demos" / "PointMaze-v0.npz"))
    model = str(tmp_path / "run" / "model.pt")
    assert iq_ilo.main(["--evaluate", model, "--barrier", "right"]) == 2 and "--barrier" in capsys.readouterr().err
    assert iq_ilo.main(["--evaluate", model, "--barrier", "left", "--eval-episodes", "1"]) == 0
    go(iq_discrete, "--env-id GridWorld-v0 --num-demos 2 --random-walls --pretrain-updates 2", "grid")
    model = str(tmp_path / "grid" / "model.pt")
    assert iq_discrete.main(["--evaluate", model, "--no-random-walls"]) == 2 and "--random-walls" in capsys.readouterr().err
    assert iq_discrete.main(["--evaluate", model, "--eval-episodes", "1"]) == 0


def test_offline_settings_are_those_of_the_files_environment(tmp_path, capsys, monkeypatch):
    parse, file = iq_offline.parse_args, ROOT / "demos" / "Hopper-v5.npz"
    named, told = parse(["--demos", str(file)]), parse(["--demos", str(file), "--env-id", "Hopper-v5"])
    assert named.gamma == 0.97 and vars(named) | {"env_id": "Hopper-v5"} == vars(told)
    assert "settings of Hopper-v5" in capsys.readouterr().out
    assert parse(["--demos", str(file), "--gamma", "0.9"]).gamma == 0.9
    dataset = SimpleNamespace(env_spec=SimpleNamespace(id="Hopper-v5"))
    monkeypatch.setitem(sys.modules, "minari", SimpleNamespace(load_dataset=lambda *_, **__: dataset))
    assert vars(parse(["--demos", "mine/hopper-v0"])) | {"demos": str(file)} == vars(named)
    capsys.readouterr()
    dataset.env_spec = None
    for other in ("nowhere.npz", str(ROOT / "README.md"), "mujoco/hopper/expert-v0"):
        assert vars(parse(["--demos", other])) == vars(iq_offline.Args(demos=other))
    assert "settings" not in capsys.readouterr().out


@pytest.mark.parametrize("env_id, odd", [("Pendulum-v1", {"action_low": np.array([-5.0])}),
                                         ("Pendulum-v1", {"action_high": np.array([np.nan])}),
                                         ("Pendulum-v1", {"num_actions": np.array([{}], dtype=object)}),
                                         ("CartPole-v1", {"num_actions": np.array([2.0])})], ids=str)
def test_where_an_environment_tells_sizes_the_files_are_not_read(env_id, odd, tmp_path):
    with np.load(ROOT / "demos" / f"{env_id}.npz") as file:
        np.savez(tmp_path / "odd.npz", **{name: file[name] for name in file.files} | odd)
    args = iq_offline.Args(env_id=env_id, demos=str(tmp_path / "odd.npz"), eval_every=0)
    spaces = iq_offline.env_spaces(args)
    assert iq_offline.load_demonstrations(args, spaces, "cpu").spaces == spaces


@pytest.mark.parametrize("dtype", [">f4", ">f8", np.longdouble, np.float16])
def test_actions_of_any_floating_point_type(dtype, tmp_path):
    with np.load(ROOT / "demos" / "Pendulum-v1.npz") as file:
        data = {name: file[name] for name in file.files}
    np.savez(tmp_path / "odd.npz", **data | {"actions": data["actions"].astype(dtype)})
    for module, parts in ((iq_continuous, ((3,), iq_continuous.Actor((3,), [-2.0], [2.0], 8))), (iq_offline, (None,))):
        one, other = (module.load_demonstrations(module.Args(env_id="Pendulum-v1", demos=str(path)), *parts, "cpu")
                      for path in (tmp_path / "odd.npz", ROOT / "demos" / "Pendulum-v1.npz"))
        torch.testing.assert_close(one.transitions.action, other.transitions.action, atol=1e-2, rtol=0)


@pytest.mark.parametrize("module", ALL)
def test_compile_that_cannot_work_is_bad_input(module, tmp_path, monkeypatch, capsys):
    def compile(*_):
        raise RuntimeError("no compiler\nfar more")

    monkeypatch.setattr(torch, "compile", compile)
    given = {iq_atari: f"--demos {frame_demos(tmp_path / 'frames.npz')}", iq_offline: "--env-id CartPole-v1",
             iq_continuous: f"--demos {pendulum_demos(tmp_path / 'pendulum.npz')}"}.get(module, "")
    assert module.main(f"{TINY[module]} {given} --compile --eval-every 0 --out-dir {tmp_path / 'runs'}".split()) == 2
    assert capsys.readouterr().err.strip().endswith("--compile: no compiler") and not (tmp_path / "runs").exists()


def test_no_compiler_is_bad_input(tmp_path):
    there = os.environ | {"CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, str(ROOT / "iq_discrete.py"), "--no-cuda", "--compile", "--out-dir", str(tmp_path / "runs")]
    ended = subprocess.run(command, env=there, capture_output=True, text=True)
    assert ended.returncode == 2 and "--compile: " in ended.stderr and "compiler" in ended.stderr
    assert "Traceback" not in ended.stderr and not (tmp_path / "runs").exists()


def test_frames_given_as_floats_stay_as_they_are():
    network, frames = iq_atari.QNetwork(6), torch.full((2, 4, 84, 84), 100.0)
    network.obs_mean.fill_(40)
    q = network(frames)
    assert (frames == 100).all() and torch.equal(q, network(frames.byte()))


def test_states_where_games_start_are_drawn_for_v0(go, monkeypatch):
    given, loss = [], iq_atari.iq_loss
    monkeypatch.setattr(iq_atari, "iq_loss", lambda *a: given.append(a[4]) or loss(*a))
    go(iq_atari, "--value-loss v0")
    go(iq_atari, "--value-loss value", "other")
    drawn, none = given[: len(given) // 2], given[len(given) // 2 :]
    assert {len(x) for x in drawn} == {4} and {len(x) for x in none} == {0}
    assert len({float(x.float().mean()) for x in drawn}) > 1 and not any(x[:, :3].any() for x in drawn)


class Sloppy(gym.Env):
    """Writes each observation over the last, has infos of any kind, and takes only actions of its space's own dtype."""
    observation_space = gym.spaces.Box(-9, 9, (2,), np.float32)
    made = 0

    def __init__(self, continuous=False):
        self.action_space = gym.spaces.Box(-1, 1, (1,), np.float16) if continuous else gym.spaces.Discrete(2, dtype=np.int32)
        self.obs, Sloppy.made = np.zeros(2, np.float32), Sloppy.made + 1
        self.odd = [None, 1, "one", np.zeros(3), {"a": 1}][Sloppy.made % 5]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.obs[:] = 0
        return self.obs, {"odd": self.odd, "final_info": 3}

    def step(self, action):
        assert action in self.action_space and action.dtype == self.action_space.dtype
        self.obs += 1
        return self.obs, np.ones(1), False, self.obs[0] == 3, {"odd": self.odd, "final_info": 3}


@pytest.mark.parametrize("module, continuous", [(iq_discrete, False), (iq_continuous, True), (iq_ilo, False), (iq_ilo, True),
                                                (iq_offline, False), (iq_offline, True)])
def test_an_environment_that_is_sloppy(module, continuous, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(gym.registry, "Sloppy-v0", gym.envs.registration.EnvSpec("Sloppy-v0", Sloppy))
    n, ends = 6, np.array([0, 0, 1] * 2, bool)
    actions = np.full((n, 1), 0.5, np.float32) if continuous else np.array([0, 1] * 3)
    obs = np.repeat([[0, 1, 2, 3] * 2], 2, axis=0).T.astype(np.float32)
    np.savez(tmp_path / "demos.npz", observations=obs, actions=actions, terminations=~ends & ends, truncations=ends,
             episode_lengths=np.array([3, 3]), env_id=np.array("Sloppy-v0"))
    given = {iq_offline: "--total-updates 3", iq_continuous: "--total-timesteps 40 --num-envs 3 --learning-starts 6",
             iq_ilo: "--total-timesteps 40 --num-envs 3 --learning-starts 6 --reward-updates 2"}.get(
                 module, "--total-timesteps 40 --num-envs 3")
    where = f"--env-id Sloppy-v0 --demos {tmp_path / 'demos.npz'} --num-demos 2 --batch-size 4 --eval-episodes 6"
    kwargs, make_vec = {"continuous": True} if continuous else {}, gym.make_vec
    monkeypatch.setattr(gym, "make_vec", lambda env, **k: make_vec(env, **k | kwargs))
    assert module.main(f"{where} {given} --out-dir {tmp_path} --run-name run".split()) == 0
    assert float(rows(tmp_path / "run")[-1]["eval_return_mean"]) == 3
    assert capsys.readouterr().err.count("warning: Sloppy-v0 is registered without max_episode_steps") == 1
    if module is not iq_offline:
        stored = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["replay"]["storage"]
        assert (stored[2] == stored[0] + 1).all() and set(stored[2][:, 0].tolist()) == {1, 2, 3}


@pytest.mark.parametrize("module, env_id", [(iq_discrete, "GridWorld-v0"), (iq_ilo, "PointMaze-v0")])
def test_environments_of_the_scripts_need_no_time_limit(module, env_id, tmp_path, capsys):
    given = f"--env-id {env_id} --num-demos 2 --total-timesteps 3 --batch-size 4 --eval-episodes 1 --out-dir {tmp_path}"
    assert module.main((given + " --reward-updates 2" * (module is iq_ilo)).split()) == 0
    assert "max_episode_steps" not in capsys.readouterr().err


def test_offline_models_act_within_the_environments_bounds(tmp_path, monkeypatch):
    """Trained without bounds on actions that go beyond them, the model's own are theirs: what is played is clipped."""
    played, step = [], PendulumEnv.step
    monkeypatch.setattr(PendulumEnv, "step", lambda env, action: played.append(float(action[0])) or step(env, action))
    with np.load(pendulum_demos(tmp_path / "pendulum.npz")) as file:
        data = {name: file[name] for name in file.files if name not in ("env_id", "action_low", "action_high")}
    actions = np.where(np.arange(len(data["actions"])) % 50, 7, -7)[:, None].astype(np.float32)
    np.savez(tmp_path / "beyond.npz", **data | {"actions": actions}, env_id=np.array("unknown"))
    given = f"--demos {tmp_path / 'beyond.npz'} --total-updates 60 --average-rate 0 --actor-lr 0.01 --hidden-size 8"
    assert iq_offline.main(f"{given} --num-demos 0 --out-dir {tmp_path} --run-name run".split()) == 0
    _, actor, saved = iq_offline.load_model(tmp_path / "run" / "model.pt")
    assert actor.act(torch.zeros(1, 3)) > 2
    model = tmp_path / "run" / "model.pt"
    assert iq_offline.main(f"--evaluate {model} --env-id Pendulum-v1 --eval-episodes 1".split()) == 0
    assert max(played) == 2 and min(played) >= -2


@pytest.mark.parametrize("module", [iq_discrete, iq_continuous, iq_offline, iq_ilo])
def test_rewards_of_little_precision_and_a_name_in_bytes(module, tmp_path):
    path, n = tmp_path / "file.npz", 3000
    np.savez(path, observations=np.zeros((n + 1, 3), np.float32), actions=np.zeros((n, 1), np.float32),
             terminations=np.zeros(n, bool), truncations=np.zeros(n, bool), episode_lengths=np.array([n]),
             rewards=np.full(n, 30, np.float16), env_id=np.bytes_("Pendulum-v1"))
    if module is iq_discrete:
        with np.load(path) as file:
            np.savez(path, **{name: file[name] for name in file.files} | {"actions": np.zeros(n, int)})
    args = module.Args(env_id="Pendulum-v1", demos=str(path), num_demos=1)
    actor = iq_continuous.Actor((3,), [-2.0], [2.0], 8)
    given = {iq_discrete: ((3,), 2), iq_continuous: ((3,), actor), iq_offline: (None,), iq_ilo: ((3,),)}[module]
    assert module.load_demonstrations(args, *given, "cpu").expert_return == 30 * n  # float16 ends at 65,504


def test_a_namesake_of_ones_own_has_its_own_random_return(monkeypatch):
    monkeypatch.setattr(iq_continuous, "evaluate", lambda *_: np.array([5.0]))
    assert iq_continuous.random_return(iq_continuous.Args(env_id="mine:Hopper-v0")) == 5
    assert iq_continuous.random_return(iq_continuous.Args(env_id="Hopper-v5")) == 15.4
