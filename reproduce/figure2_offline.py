"""Figure 2 of the paper: offline, returns against the number of trajectories; last score, 5 seeds.

    python reproduce/figure2_offline.py

Writes figure2_offline.csv, a row for each run, figure2_offline.md, the table, and figure2_offline.png. A second call
goes on where the first was stopped. Seeds 111 to 115 were not tuned on; NOTES.md says what had been read of them before.

Where few trajectories are drawn, which ones decides more than the method: figure2_draws.csv has 20 more seeds there, which
take 15 of the 30 trajectories, and the second table of figure2_offline.md their spread. LunarLander has all 30 there, too:
what its expert scores on other starts than the recorded ones.

All three settings learn from the mirror images of the transitions, too (`--mirror`); the paper has none, and the rows "as
recorded" have none, their settings otherwise the same.
"""
from pathlib import Path

import numpy as np
import tyro
from common import mean_sd, read_rows, run_all

FOLDER = Path(__file__).resolve().parent
SEEDS = range(111, 116)
NUMBERS = (1, 3, 7, 10, 15)
PANELS = {"CartPole": ("CartPole-v1", 20), "Acrobot": ("Acrobot-v1", 5), "LunarLander": ("LunarLander-v3", 5)}
# environment, every k-th transition, further flags
TASKS = {f"{name}{label}": (*panel, flags) for name, panel in PANELS.items()
         for label, flags in (("", ""), (", as recorded", "--no-mirror"))}
# W1 bounds the slope of Q, so its τ is small; no χ² joins it.
METHODS = {"chi2": "", "w1": "--divergence w1 --temperature 0.01 --chi2-alpha None", "bc": "--objective bc"}
DRAWS = range(241, 261)  # of the second table; read before with earlier settings and experts, too
MORE = FOLDER / "figure2_draws.csv"
FEW = {task: (1,) for task in TASKS} | {"LunarLander": (1, 3, 7, 30), "LunarLander, as recorded": (1, 3)}  # 30: all
NAMES = {"chi2": "IQ-Learn, χ²", "w1": "IQ-Learn, W1", "bc": "cloning"}


def table(rows: list[dict]) -> str:
    """Markdown: one line for each task and number of trajectories; a method with runs missing has an empty cell. Then the
    spread over more draws."""
    lines = ["| task | trajectories | IQ-Learn, χ² | IQ-Learn, W1 | cloning | expert | random | updates |",
             "|---|---|---|---|---|---|---|---|"]
    for task in TASKS:
        for n in NUMBERS:
            own = {method: [r for r in rows if (r["task"], r["demos"], r["method"]) == (task, str(n), method)]
                   for method in METHODS}
            if len(own["chi2"]) == len(SEEDS):
                scores = " | ".join(mean_sd(runs, "eval_return") if len(runs) == len(SEEDS) else "" for runs in own.values())
                lines.append(f"| {task} | {n} | {scores} | {mean_sd(own['chi2'], 'expert')} | {own['chi2'][0]['random']} | "
                             f"{own['chi2'][0]['updates']} |")
    return "\n".join([*lines, "", *spread(read_rows(MORE))]) + "\n"


def spread(rows: list[dict]) -> list[str]:
    """Lines of markdown: mean ± deviation, median and least over the 20 more draws, IQ-Learn beside cloning."""
    lines = [f"| {len(DRAWS)} other draws | trajectories | IQ-Learn, χ² | median, least | cloning | median, least |",
             "|---|---|---|---|---|---|"]
    for task, numbers in FEW.items():
        for n in numbers:
            cells = []
            for method in ("chi2", "bc"):
                runs = [r for r in rows if (r["task"], r["demos"], r["method"]) == (task, str(n), method)]
                returns = [float(r["eval_return"]) for r in runs]
                cells += ([mean_sd(runs, "eval_return"), f"{np.median(returns):.1f}, {min(returns):.1f}"]
                          if len(runs) == len(DRAWS) else ["", ""])
            lines.append(f"| {task} | {n} | {' | '.join(cells)} |")
    return lines


def figure(rows: list[dict], path: Path) -> None:
    """Three panels: mean over seeds, one standard deviation shaded, expert and random lines; dashed without images."""
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, len(PANELS), figsize=(4 * len(PANELS), 3.2))
    for task, (env_id, k, _) in TASKS.items():
        axis, recorded = axes[list(PANELS).index(task.split(",")[0])], task not in PANELS
        for i, method in enumerate(METHODS):
            points = []
            for n in NUMBERS:
                returns = [float(r["eval_return"]) for r in rows
                           if (r["task"], r["demos"], r["method"]) == (task, str(n), method)]
                points += [(n, np.mean(returns), np.std(returns))] if returns else []
            n, mean, sd = map(np.array, zip(*points)) if points else ([], [], [])
            if recorded:
                axis.plot(n, mean, linestyle="--", color=f"C{i}", label="as recorded" if i == 0 else None)
            else:
                axis.plot(n, mean, marker="o", color=f"C{i}", label=NAMES[method])
                axis.fill_between(n, np.subtract(mean, sd), np.add(mean, sd), alpha=0.2)
        axis.set(title=f"{env_id}, 1 in {k}", xlabel="trajectories", xticks=NUMBERS)
        own = [r for r in rows if r["task"] == task]
        if own and not recorded:
            axis.axhline(np.mean([float(r["expert"]) for r in own]), color="black", linestyle="--", label="expert")
            axis.axhline(float(own[0]["random"]), color="grey", linestyle=":", label="random")
    axes[0].set_ylabel("return, last score, 5 seeds")
    axes[-1].legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(path, dpi=120)


def command(task: str, n: int, method: str, seed: int, name: str) -> str:
    """The run of one point of a panel."""
    env_id, k, switch = TASKS[task]
    flags = (f"iq_offline.py --env-id {env_id} --subsample-freq {k} --num-demos {n} --seed {seed} "
             f"--eval-every 1000000 --eval-episodes 20 {METHODS[method]} {switch}").split()
    return f"{' '.join(flags)} --run-name {name}_{task.replace(', ', '_').replace(' ', '-')}_{n}_{method}_{seed}"


def main(cores: tuple[int, ...] = (0, 1), only: str = "", numbers: tuple[int, ...] = (*NUMBERS, 30),
         methods: tuple[str, ...] = tuple(METHODS)):
    """Run what is missing; `cores` names the cores to run on; `only` keeps the tasks whose name contains it, `numbers`
    and `methods` some of the others."""
    def jobs(name, seeds, counts, methods):
        return [({"task": task, "demos": n, "method": method, "seed": seed}, command(task, n, method, seed, name))
                for n in numbers for task in TASKS if only in task and n in counts[task] for method in methods
                for seed in seeds]

    points = jobs("figure2", SEEDS, dict.fromkeys(TASKS, NUMBERS), methods)
    rows = run_all(points, FOLDER / "figure2_offline.csv", cores=cores)
    run_all(jobs("draws", DRAWS, FEW, [method for method in ("chi2", "bc") if method in methods]), MORE, cores=cores)
    (FOLDER / "figure2_offline.md").write_text(table(rows))
    figure(rows, FOLDER / "figure2_offline.png")
    print(table(rows))


if __name__ == "__main__":
    tyro.cli(main)
