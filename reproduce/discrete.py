"""Table of `iq_discrete.py`: CartPole, Acrobot, LunarLander and GridWorld beside cloning; last score, 5 seeds.

    python reproduce/discrete.py

Writes discrete.csv, a row for each run, discrete_curves.csv, IQ-Learn's scores against environment steps, and discrete.md,
the table. No seed was a tuning seed, but LunarLander's setting was chosen with both of its rows at hand, and CartPole's
after these seeds had been read with the one before, as Acrobot's with earlier demonstrations; NOTES.md has that, and what
was read on 101 to 105.
"""
import sys
from pathlib import Path

import numpy as np
import torch
import tyro
from common import ROOT, keep_curve, mean_sd, read_rows, run_all

sys.path.insert(0, str(ROOT))
import iq_discrete

FOLDER = Path(__file__).resolve().parent
CURVES = FOLDER / "discrete_curves.csv"
NUM_SEEDS = 5
# Random walls: demonstrations first, then a little play.
WALLS = ("--pretrain-updates 4000 --total-timesteps 500 --eval-every 1000 --value-loss value_expert --chi2-alpha 5 "
         "--temperature 0.1")
TASKS = {  # name: (flags, numbers of demonstrations)
    "CartPole, 1 in 20": ("--env-id CartPole-v1 --subsample-freq 20", (1, 10)),
    "GridWorld, fixed, 200 updates": ("--env-id GridWorld-v0 --total-timesteps 200 --eval-every 50", (1, 10)),
    "Acrobot": ("--env-id Acrobot-v1", (1, 10)),
    "LunarLander": ("--env-id LunarLander-v3", (1, 10)),
    "LunarLander, as recorded": ("--env-id LunarLander-v3 --no-mirror", (1, 10)),  # no mirror images, as in the paper
    "LunarLander, as recorded, play in the loss": (
        "--env-id LunarLander-v3 --no-mirror --value-loss value --chi2-rows both", (1, 10)),
    **{f"GridWorld, {level}, {network.upper()}": (f"--env-id GridWorld-v0 {switches} {WALLS} --network {network} "
                                                  f"--hidden-size {hidden}", (0,))
       for level, switches in (("random walls", "--random-walls"),
                               ("all random", "--random-walls --random-start --random-goal"))
       for network, hidden in (("mlp", 64), ("cnn", 16))},
}
METHODS = {"iq": "", "bc": "--objective bc"}
# Clones have no play in their loss: the same stand beside both.
CLONES = {"LunarLander, as recorded, play in the loss": "LunarLander, as recorded"}


def grid_scores(run_dir: Path) -> dict:
    """Success and path length over shortest distance (of the successes), on 100 grids that no demonstration has."""
    network, saved = iq_discrete.load_model(str(run_dir / "model.pt"))
    if saved["env_id"] != "GridWorld-v0":
        return {}
    args = iq_discrete.Args(**saved["args"])
    with np.load(iq_discrete.demonstrations_path(args)) as file:
        shown = {planes[0].tobytes() + planes[2].tobytes() for planes in file["observations"]}
    env = iq_discrete.make_envs(args, 1).envs[0]
    successes, ratios, seed = 0, [], 10_000_000
    while len(ratios) < 100:
        obs, _ = env.reset(seed=seed)
        seed += 1
        if args.random_walls and obs[0].tobytes() + obs[2].tobytes() in shown:
            continue
        grid = env.unwrapped
        shortest, steps, ended = grid.distances(grid.walls, grid.goal)[grid.agent], 0, False
        while not ended:
            with torch.no_grad():
                action = int(network(torch.as_tensor(obs)[None]).argmax())
            obs, _, terminated, truncated, _ = env.step(action)
            steps, ended = steps + 1, terminated or truncated
        successes += terminated
        ratios.append(steps / shortest if terminated else np.nan)
    return {"success": successes / 100, "distance_ratio": float(np.nanmean(ratios)) if successes else np.nan}


def steps_to_expert(row: dict, curves: list[dict]) -> str:
    """Environment steps up to the run's first evaluation of at least 0.95, normalized; empty for one without a curve."""
    own = [c for c in curves if all(c[name] == row[name] for name in ("task", "demos", "seed"))]
    least = float(row["random"]) + 0.95 * (float(row["expert"]) - float(row["random"]))
    reached = [int(c["step"]) for c in own if float(c["eval_return_mean"]) >= least]
    return str(min(reached)) if reached else "never" * bool(own)


def table(rows: list[dict]) -> str:
    """Markdown: one line for each task and number of demonstrations; `steps to 0.95` of each seed, of IQ-Learn's."""
    lines = ["| task | demonstrations | IQ-Learn | cloning | expert | random | normalized | steps | updates | "
             "steps to 0.95 | success | ratio | success, cloning | ratio, cloning |", "|" + "---|" * 14]
    curves = read_rows(CURVES)
    for task, (_, numbers) in TASKS.items():
        for n in numbers:
            iq, bc = ([r for r in rows if (r["task"], r["demos"], r["method"]) == (own, str(n), method)]
                      for own, method in ((task, "iq"), (CLONES.get(task, task), "bc")))
            if len(iq) == len(bc) == NUM_SEEDS:
                digits = 3 if "GridWorld" in task else 1
                grid = [mean_sd([r for r in own if r[name] != "nan"], name, 2) if own[0].get(name) else ""  # nan: no success
                        for own in (iq, bc) for name in ("success", "distance_ratio")]
                first = ", ".join(filter(None, (steps_to_expert(r, curves) for r in sorted(iq, key=lambda r: r["seed"]))))
                lines.append(f"| {task} | {n or 'all'} | {mean_sd(iq, 'eval_return', digits)} | "
                             f"{mean_sd(bc, 'eval_return', digits)} | {mean_sd(iq, 'expert', digits)} | "
                             f"{mean_sd(iq, 'random', digits)} | {mean_sd(iq, 'normalized', 3)} | {iq[0]['steps']} | "
                             f"{iq[0]['updates']} | {first} | {' | '.join(grid)} |")
    return "\n".join(lines) + "\n"


def main(cores: tuple[int, ...] = (0, 1), only: str = "", methods: tuple[str, ...] = tuple(METHODS)):
    """Run what is missing; `only` keeps the tasks whose name contains it, `methods` some of the others."""
    jobs, of_run = [], {}
    for task, (flags, numbers) in TASKS.items():
        for n in numbers:
            for method, more in ((method, METHODS[method]) for method in methods):
                first = 111 if task.startswith(("CartPole", "LunarLander")) else 101
                for seed in range(first, first + NUM_SEEDS):
                    if only in task and (method == "iq" or task not in CLONES):
                        command = f"iq_discrete.py {flags} --num-demos {n} --seed {seed} --eval-episodes 20 {more}".strip()
                        name = command.removeprefix("iq_discrete.py ").replace("--", "").replace(" ", "_")
                        labels = {"task": task, "demos": n, "method": method, "seed": seed}
                        jobs.append((labels, f"{command} --run-name {name}"))
                        of_run[name] = labels

    def scores(run_dir: Path) -> dict:
        labels = {name: str(value) for name, value in of_run[run_dir.name].items()}
        if labels.pop("method") == "iq":
            keep_curve(CURVES, labels, run_dir)
        return grid_scores(run_dir)

    rows = run_all(jobs, FOLDER / "discrete.csv", scores, cores)
    (FOLDER / "discrete.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    tyro.cli(main)
