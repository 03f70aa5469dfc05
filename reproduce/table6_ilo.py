"""Table 6 of the paper: imitation from observations only, `iq_ilo.py` beside the same with actions; last score.

    python reproduce/table6_ilo.py

Writes table6_ilo.csv, a row for each run, table6_ilo_curves.csv, table6_ilo.md and table6_ilo.png. No seed was tuned on
but HalfCheetah's and Ant's with actions (NOTES.md, also on why some begin later); a second call goes on where the csv stops.
With actions: `iq_discrete.py` and `iq_continuous.py`, same files.
"""
from pathlib import Path

import numpy as np
import tyro
from common import bundled, draw_curves, keep_curve, mean_sd, read_rows, run_all

FOLDER = Path(__file__).resolve().parent
CURVES = FOLDER / "table6_ilo_curves.csv"
TASKS = {  # task: script with actions, seeds, published mean ± sd with 1 and with 10 demonstrations
    "CartPole-v1": ("iq_discrete.py", 5, {1: "452 ± 50", 10: "485 ± 25"}),
    "LunarLander-v3": ("iq_discrete.py", 5, {1: "20 ± 102", 10: "220 ± 69"}),
    "Hopper-v5": ("iq_continuous.py", 3, {1: "2507 ± 345", 10: "3465 ± 51"}),
    "HalfCheetah-v5": ("iq_continuous.py", 1, {1: ""}),
    "Walker2d-v5": ("iq_continuous.py", 1, {1: ""}),
    "Ant-v5": ("iq_continuous.py", 2, {1: ""}),
}
FIRST_SEED = {("Hopper-v5", "idm"): 104, ("Ant-v5", "idm"): 102} | {  # else 101
    (task, method): seed for task, seed in (("CartPole-v1", 111), ("LunarLander-v3", 111), ("Walker2d-v5", 104))
    for method in ("idm", "idm, not mirrored", "with actions")}
LONGER = {task: "--total-timesteps 200000 --anneal-lr 0.5 " for task in ("HalfCheetah-v5", "Walker2d-v5")}
METHODS = {  # the flags after the script; None: the task's script with actions
    "idm": "iq_ilo.py",
    "idm, not mirrored": "iq_ilo.py --no-mirror",  # the same without mirror images, which LunarLander alone has
    "with actions": None,
    "policy": "iq_ilo.py --no-mirror --missing-action policy",
    "replay": "iq_ilo.py --no-mirror --missing-action replay",
}


def table(rows: list[dict]) -> str:
    """Markdown: one line for each task, number of demonstrations and method."""
    lines = ["| task | demonstrations | missing action | return, mean ± sd over seeds | expert | random | normalized | "
             "published | seeds | steps | minutes, one core |", "|---|---|---|---|---|---|---|---|---|---|---|"]
    for task, (_, _, published) in TASKS.items():
        for n in published:
            for method in METHODS:
                own = [r for r in rows if (r["task"], r["demos"], r["method"]) == (task, str(n), method)]
                if own:
                    digits = 1 if float(own[0]["expert"]) < 1000 else 0
                    paper = published[n] if method == "idm" else ""
                    minutes = mean_sd([{"minutes": float(r["seconds"]) / 60} for r in own], "minutes")
                    lines.append(f"| {task} | {n} | {method} | {mean_sd(own, 'eval_return', digits)} | "
                                 f"{mean_sd(own, 'expert', digits)} | {float(own[0]['random']):.1f} | "
                                 f"{mean_sd(own, 'normalized', 3)} | {paper} | {len(own)} | {own[0]['steps']} | "
                                 f"{minutes} |")
    lines += ["", "Rows of one task may have other seeds and lengths (csv): `policy` and `replay` begin with 101 and ran on "
              "LunarLander with 256 units on raw states, not mirrored; LunarLander's `with actions` are the runs of "
              "discrete.csv; Hopper's and Ant's `with actions` are other seeds than `idm`'s, Hopper's half as long; "
              "HalfCheetah's and Walker2d's `idm` have `--total-timesteps 200000 --anneal-lr 0.5`."]
    return "\n".join(lines) + "\n"


def draw(rows: list[dict], path: Path) -> None:
    """Learning curves of each task and number of demonstrations: mean over seeds, deviation shaded, expert dashed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [(task, str(n)) for task, (_, _, published) in TASKS.items() for n in published
              if any((r["task"], r["demos"]) == (task, str(n)) for r in rows)]
    columns, lines = min(5, len(panels)), -(-len(panels) // 5)
    figure, axes = plt.subplots(lines, columns, figsize=(3.6 * columns, 3.2 * lines), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    curves = read_rows(CURVES)
    for (task, n), axis in zip(panels, axes.flat):
        draw_curves(axis, curves, {"task": task, "demos": n}, METHODS)
        own = [r for r in rows if (r["task"], r["demos"]) == (task, n)]
        axis.axhline(np.mean([float(r["expert"]) for r in own]), linestyle="--", color="black", label="expert")
        axis.axhline(float(own[0]["random"]), linestyle=":", color="black", label="random")
        axis.set(title=f"{task}, {n} demonstration{'s' * (n != '1')}", xlabel="environment steps", ylabel="return")
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(cores: tuple[int, ...] = (0, 1), tasks: tuple[str, ...] = bundled(TASKS), methods: tuple[str, ...] = tuple(METHODS),
         demos: tuple[int, ...] = (1, 10), seeds: int | None = None):
    """Run what is missing; `seeds` limits their number."""
    jobs = []
    for i in range(max(most for _, most, _ in TASKS.values())):
        for task in tasks:
            with_actions, most, published = TASKS[task]
            for n in sorted(set(published) & set(demos)):
                for method in methods:
                    if i < min(seeds or most, most) and (method != "idm, not mirrored" or task == "LunarLander-v3"):
                        seed = FIRST_SEED.get((task, method), 101) + i
                        more = "" if method == "with actions" else LONGER.get(task, "")
                        name = f"table6_{task}_{n}_{method.replace(' ', '-')}_{seed}"
                        jobs.append(({"task": task, "demos": n, "method": method, "seed": seed},
                                     f"{METHODS[method] or with_actions} --env-id {task} --num-demos {n} --seed {seed} "
                                     f"--eval-episodes 20 {more}--run-name {name}"))

    def after(run_dir: Path) -> dict:
        _, task, n, method, seed = run_dir.name.split("_")
        labels = {"task": task, "demos": n, "method": method.replace("-", " "), "seed": seed}
        keep_curve(CURVES, labels, run_dir)
        return {}

    rows = run_all(jobs, FOLDER / "table6_ilo.csv", after, cores)
    (FOLDER / "table6_ilo.md").write_text(table(rows))
    draw(rows, FOLDER / "table6_ilo.png")
    print(table(rows))


if __name__ == "__main__":
    tyro.cli(main)
