"""What each departure from the published settings is worth on Hopper and Walker2d: all of them but one, from one trajectory.

    python reproduce/ladder_mujoco.py

Writes ladder_mujoco.csv, a row for each run, ladder_mujoco_curves.csv and ladder_mujoco.md: the last score and the mean over
the second half of the run's evaluations, since single ones swing. Tuning seeds, so no result; a second call goes on where
the csv stops.
"""
from pathlib import Path

import numpy as np
import tyro
from common import keep_curve, read_rows, run_all

FOLDER = Path(__file__).resolve().parent
CURVES = FOLDER / "ladder_mujoco_curves.csv"
TASKS = ("Hopper-v5", "Walker2d-v5")
STEPS = 30_000
VARIANTS = {
    "as they are": "",
    "raw observations": " --no-standardize-obs",
    "no moving average": " --average-rate 0",
    "no LayerNorm": " --no-layer-norm",
    "targets not clipped": " --no-bound-targets",
}


def table(rows: list[dict]) -> str:
    """Markdown: one line for each variant; a cell has each seed's share of its demonstration's return."""
    lines = [f"| share of the demonstration's return, each seed | {' | '.join(f'{t}, last | second half' for t in TASKS)} |",
             "|---" * (1 + 2 * len(TASKS)) + "|"]
    curves = read_rows(CURVES)
    for variant in VARIANTS:
        cells = []
        for task in TASKS:
            last, half = [], []
            for row in (r for r in rows if (r["task"], r["variant"]) == (task, variant)):
                own = [float(r["eval_return_mean"]) for r in curves
                       if all(r[name] == row[name] for name in ("task", "variant", "seed")) and int(r["step"])]
                expert = float(row["expert"])
                last.append(f"{float(row['eval_return']) / expert:.2f}")
                half.append(f"{np.mean(own[len(own) // 2:]) / expert:.2f}")
            cells += [", ".join(last), ", ".join(half)]
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(cores: tuple[int, ...] = (0, 1), tasks: tuple[str, ...] = TASKS, seeds: tuple[int, ...] = (1, 2, 3)):
    """Run what is missing."""
    jobs = [({"task": task, "variant": variant, "seed": seed},
             f"iq_continuous.py --env-id {task} --total-timesteps {STEPS} --eval-every 5000 --seed {seed}{flags} "
             f"--run-name ladder_{task}_{variant.replace(' ', '-')}_{seed}")
            for seed in seeds for task in tasks for variant, flags in VARIANTS.items()]

    def curve(run_dir: Path) -> dict:
        task, variant, seed = run_dir.name.removeprefix("ladder_").split("_")
        keep_curve(CURVES, {"task": task, "variant": variant.replace("-", " "), "seed": seed}, run_dir)
        return {}

    rows = run_all(jobs, FOLDER / "ladder_mujoco.csv", curve, cores)
    (FOLDER / "ladder_mujoco.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    tyro.cli(main)
