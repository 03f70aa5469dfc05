"""How much of the training loop is the bare work, sampling at two replay sizes, bytes per transition, peak memory.

    OMP_NUM_THREADS=1 taskset -c 0 python reproduce/speed.py --machine "a name for it"

The bare work is forward, backward and optimiser step of the same network on a batch that is in place, its loss the mean
square of what comes out. The update is the script's own on a batch that is in place: the same passes with the objective and
the moving averages. The loop is `train()` with the environment stubbed and evaluation off. They take turns; medians go to
speed.csv and speed.md, a column for each machine, in place of older ones. Where a case says `--compile` update and loop have
it, and the bare work has not.
"""
import os
import resource
import subprocess
import sys
import tempfile
import time
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import tyro
from common import ROOT, code_commit, read_rows, write_rows
from gymnasium.spaces import Box, Discrete

sys.path.insert(0, str(ROOT))
import iq_atari
import iq_continuous
import iq_discrete
import iq_ilo
import iq_offline

FOLDER = Path(__file__).resolve().parent
ROUNDS = 5


class StubEnvs:
    """A vector environment that costs nothing: the same observation, episodes that never end."""

    def __init__(self, num_envs: int, obs_shape: tuple[int, ...], dtype, action_space):
        self.single_observation_space, self.single_action_space = Box(0, 255, obs_shape, dtype), action_space
        self.obs = np.ones((num_envs, *obs_shape), dtype)
        self.never, self.reward, self.metadata = np.zeros(num_envs, bool), np.zeros(num_envs), {}

    def reset(self, seed=None):
        return self.obs, {}

    def step(self, action):
        return self.obs, self.reward, self.never, self.never, {}

    def close(self):
        pass


class FullReplay(iq_continuous.Replay):
    """One that begins full."""

    def __init__(self, size, fields, device):
        super().__init__(size, fields, device)
        if size >= 100_000:  # not the few initial states
            self.written = size
            for field in self.storage:
                field.uniform_(-1, 1)  # touch the memory


def loop_seconds(module, args, envs) -> tuple[float, float]:
    """Seconds for one turn of the loop of `train(args)` with stubbed environments, the last checkpoint not counted, and for
    the update in it alone, on the last batch again and again."""
    module.make_envs = lambda *_: envs
    start, first, end, last = None, None, None, None
    make_update, count = module.make_update, [0]

    def counted(*parts):
        made = make_update(*parts)
        update = made[-1] if isinstance(made, tuple) else made

        def one(*batch):
            nonlocal start, first, end, last
            count[0] += 1
            if count[0] == 1 + (getattr(args, "pretrain_updates", 0) or 200) // 10:  # the first ones allocate
                start, first = time.perf_counter(), count[0]
            terms = update(*batch)
            end, last = time.perf_counter(), (update, batch)
            return terms

        return (*made[:-1], one) if isinstance(made, tuple) else one

    module.make_update = counted
    torch._dynamo.reset()  # what was compiled for an earlier round
    try:
        with tempfile.TemporaryDirectory() as folder:
            module.train(module.replace(args, out_dir=folder))
        updates = count[0] - first + 1
        update, batch = last
        again = time.perf_counter()
        for _ in range(updates):
            update(*batch)
        return (end - start) / updates, (time.perf_counter() - again) / updates
    finally:
        module.make_update = make_update


def bare_seconds(network, obs: torch.Tensor, rate: float, updates: int, target=None) -> float:
    """Seconds for forward, backward and Adam on `obs` and as many next observations, in place; with a target network those
    pass through it alone, without gradient."""
    optimizer = torch.optim.Adam(network.parameters(), lr=rate, fused=True)
    both = torch.cat([obs, obs]) if target is None else obs
    for i in range(updates + updates // 10):
        if i == updates // 10:
            start = time.perf_counter()
        if target is not None:
            with torch.no_grad():
                target(obs)
        loss = network(both).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return (time.perf_counter() - start) / updates


def bare_actor_critic_seconds(args: iq_continuous.Args, obs_size: int, num_actions: int, updates: int) -> float:
    """Seconds for the passes of one actor-critic update on rows in place: critic on (s, a) and on the expert's (s, ã),
    target critic on s', actor on s and s', critic on (s, ã) for the actor, two optimiser steps."""
    n, ends = args.batch_size, [1.0] * num_actions
    actor = iq_continuous.Actor((obs_size,), [-1.0] * num_actions, ends, args.hidden_size)
    critic, target = (iq_continuous.QNetwork((obs_size,), num_actions, args.hidden_size, args.layer_norm) for _ in "12")
    optimizers = [torch.optim.Adam(network.parameters(), lr=1e-4, fused=True) for network in (critic, actor)]
    parameters = list(actor.parameters())
    obs, action = torch.rand(2 * n, obs_size), torch.rand(2 * n, num_actions)
    three_obs, three_action = torch.rand(3 * n, obs_size), torch.rand(3 * n, num_actions)
    for i in range(updates + updates // 10):
        if i == updates // 10:
            start = time.perf_counter()
        mean, log_std = actor(obs)
        with torch.no_grad():
            actor(obs), target(obs, action)
        optimizers[0].zero_grad(set_to_none=True)
        critic(three_obs, three_action).square().mean().backward()
        optimizers[0].step()
        optimizers[1].zero_grad(set_to_none=True)
        (critic(obs, mean).mean() + log_std.mean()).backward(inputs=parameters)
        optimizers[1].step()
    return (time.perf_counter() - start) / updates


def bare_observations_seconds(args: iq_ilo.Args, obs_size: int, num_actions: int, updates: int) -> float:
    """Seconds for the passes of one update from observations on rows in place, discrete actions: inverse dynamics on
    the agent's rows with its step and on the expert's, critic on s and s' of both with its step."""
    n, size = args.batch_size, ((obs_size,), num_actions, True, args.hidden_size)
    idm, critic = iq_ilo.InverseDynamics(*size), iq_ilo.QNetwork(*size, args.layer_norm)
    optimizers = [torch.optim.Adam(network.parameters(), lr=1e-4, fused=True) for network in (idm, critic)]
    obs, both = torch.rand(n, obs_size), torch.rand(4 * n, obs_size)
    for i in range(updates + updates // 10):
        if i == updates // 10:
            start = time.perf_counter()
        for optimizer, loss in zip(optimizers, (lambda: idm(obs, obs), lambda: critic.each(both))):
            optimizer.zero_grad(set_to_none=True)
            loss().square().mean().backward()
            optimizer.step()
        with torch.no_grad():
            idm(obs, obs)
    return (time.perf_counter() - start) / updates


def cases():
    """name, script, settings, observation shape, batch rows of one update, updates in a round."""
    cartpole = iq_discrete.Args(checkpoint_every=0, save_model=False,
                                **iq_discrete.SETTINGS["CartPole"] | {"eval_every": 0, "total_timesteps": 3000})
    for name, compiled in (("CartPole, online", False), ("CartPole, online, --compile", True)):
        yield name, iq_discrete, replace(cartpole, compile=compiled), (4,), 2 * cartpole.batch_size, 3000
    for name, change in (("HalfCheetah, 128 + 128 rows", {}),
                         ("HalfCheetah, 256 + 256 rows, 500,000 stored", {"batch_size": 256, "buffer_size": 500_000})):
        cheetah = iq_continuous.Args(eval_every=0, checkpoint_every=0, save_model=False, total_timesteps=500, **change)
        yield name, iq_continuous, cheetah, (17,), None, 300
    offline = iq_offline.Args(env_id="CartPole-v1", eval_every=0, checkpoint_every=0, save_model=False, total_updates=3000)
    for name, compiled in (("CartPole, offline, two layers of 64", False), ("CartPole, offline, --compile", True)):
        yield name, iq_offline, replace(offline, compile=compiled), (4,), offline.batch_size, 3000
    states = iq_ilo.Args(checkpoint_every=0, save_model=False,
                         **iq_ilo.SETTINGS["CartPole"] | {"eval_every": 0, "total_timesteps": 3500})
    for name, compiled in (("CartPole, observations only", False), ("CartPole, observations only, --compile", True)):
        yield name, iq_ilo, replace(states, compile=compiled), (4,), None, 3000
    for name, change in (("Pong, demonstrations alone", {"pretrain_updates": 60, "total_timesteps": 0}),
                         ("Pong, online", {"pretrain_updates": 0, "total_timesteps": 480, "num_envs": 8,
                                           "updates_per_step": 0.125, "buffer_size": 2000, "chi2_rows": "both",
                                           "value_loss": "value"})):
        atari = iq_atari.Args(eval_every=0, checkpoint_every=0, save_model=False, num_demos=2, **change)
        yield name, iq_atari, atari, (4, 84, 84), atari.batch_size * (2 if "online" in name else 1), 60


def sampling_seconds(size: int) -> float:
    """Seconds to sample a batch of CartPole's from a full replay."""
    shapes = [((4,), torch.float32), ((), torch.int64), ((4,), torch.float32), ((), torch.float32)]
    replay = iq_discrete.Replay(size, shapes, "cpu")
    for field in replay.storage:
        field.random_(0, 2)  # touch the memory
    replay.written = size
    times = []
    for _ in range(2000):
        start = time.perf_counter()
        replay.sample(32)
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def peak_memory(command: str) -> int:
    """Megabytes that a script's process takes at most."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = [sys.executable, *command.split(), "--out-dir", folder]
        process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, command
    return usage.ru_maxrss // 1024


def table(rows: list[dict]) -> str:
    """Markdown: a line for each measure, a column for each machine."""
    machines, measures = (list(dict.fromkeys(r[name] for r in rows)) for name in ("machine", "what"))
    values = {(r["machine"], r["what"]): r["value"] for r in rows}
    lines = ["| median | " + " | ".join(machines) + " |", "|---" * (1 + len(machines)) + "|"]
    lines += [f"| {what} | {' | '.join(values.get((machine, what), '') for machine in machines)} |" for what in measures]
    lines += ["", "With `--compile` the loop is compiled and the bare work beside it is not, so the ratio can pass 1."]
    return "\n".join(lines) + "\n"


def main(machine: str = "this machine", only: str = ""):
    """Measure the cases that have `only` in their name; `machine` heads their column."""
    rows = []
    for name, module, args, shape, batch, updates in (case for case in cases() if only in case[0]):
        make_envs, replay = module.make_envs, getattr(module, "Replay", None)
        actions = Box(-1, 1, (6,)) if module is iq_continuous else Discrete(6 if module is iq_atari else 2)
        dtype = np.uint8 if module is iq_atari else np.float32
        if module is iq_atari:  # loading plays games again: once, and then the same frames
            loaded = iq_atari.load_demonstrations(args, 6, torch.device("cpu"))
            iq_atari.load_demonstrations = lambda *_, loaded=loaded: loaded
        if "stored" in name:
            module.Replay = FullReplay
        bare, loops = [], []
        for _ in range(ROUNDS):
            if module is iq_continuous:
                bare.append(bare_actor_critic_seconds(args, *shape, 6, updates))
            elif module is iq_ilo:
                bare.append(bare_observations_seconds(args, *shape, 2, updates))
            else:
                network = iq_atari.QNetwork(6) if module is iq_atari else module.QNetwork(shape, 2)
                if module is iq_atari:
                    network.autocast = args.bfloat16 and iq_atari.has_bfloat16(torch.device("cpu"))
                obs = torch.randint(0, 255, (batch, *shape)).byte() if module is iq_atari else torch.rand(batch, *shape)
                target = deepcopy(network) if getattr(args, "target_rate", 0) else None
                bare.append(bare_seconds(network, obs, args.learning_rate, updates, target))
            loops.append(loop_seconds(module, args, StubEnvs(getattr(args, "num_envs", 1), shape, dtype, actions)))
        module.make_envs, module.Replay = make_envs, replay
        bare, (loop, update) = np.median(bare), np.median(loops, axis=0)
        rows += [{"what": f"{name}: bare work, ms", "value": round(1e3 * bare, 3)},
                 {"what": f"{name}: update, ms", "value": round(1e3 * update, 3)},
                 {"what": f"{name}: training loop, ms", "value": round(1e3 * loop, 3)},
                 {"what": f"{name}: bare / loop", "value": round(bare / loop, 2)},
                 {"what": f"{name}: update / loop", "value": round(update / loop, 2)},
                 {"what": f"{name}: updates per second", "value": round(1 / loop, 1)}]
    for turn, size in ((turn, size) for turn in ("first", "second") for size in (10**4, 10**6)):
        if only in (what := f"CartPole: sample 32 of {size:,}, {turn} turn, µs"):
            rows.append({"what": what, "value": round(1e6 * sampling_seconds(size), 1)})
    replay = iq_atari.Replay(8000, 8, "cpu")
    size = sum(v.numel() * v.element_size() for v in vars(replay).values() if isinstance(v, torch.Tensor))
    few = "iq_atari.py --pretrain-updates 4 --eval-every 0 --checkpoint-every 0"
    for what, measure in (
            ("Atari replay, bytes per transition", lambda: size / 8000),
            ("this process's peak memory, MB", lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024),
            ("Pong, 20 games: peak memory, MB, beside what is played", lambda: peak_memory(few))):
        if only in what:
            rows.append({"what": what, "value": measure()})
    origin = {"commit": code_commit(), "threads": torch.get_num_threads(),
              "command": f"python reproduce/speed.py --machine '{machine}'" + f" --only '{only}'" * bool(only)}
    measured = {(machine, row["what"]) for row in rows}
    others = [r for r in read_rows(FOLDER / "speed.csv") if (r["machine"], r["what"]) not in measured]
    write_rows(FOLDER / "speed.csv", [{"machine": machine} | row | origin for row in rows] + others)
    (FOLDER / "speed.md").write_text(table(read_rows(FOLDER / "speed.csv")))
    print(table(read_rows(FOLDER / "speed.csv")))


if __name__ == "__main__":
    tyro.cli(main)
