"""Run many trainings two at a time, one core each, and keep a csv of their final lines; a second call goes on."""
import csv
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
FINAL = re.compile(r"final eval_return=(?P<eval_return>\S+) std=(?P<std>\S+) episodes=(?P<episodes>\d+) "
                   r"expert=(?P<expert>\S+) random=(?P<random>\S+) normalized=(?P<normalized>\S+) steps=(?P<steps>\d+) "
                   r"updates=(?P<updates>\d+) seconds=(?P<seconds>\S+) run_dir=(?P<run_dir>\S+)")


def bundled(tasks) -> tuple[str, ...]:
    """Those environments whose demonstrations are in `demos/`: the others have no finished expert yet."""
    return tuple(task for task in tasks if (ROOT / "demos" / f"{task}.npz").is_file())


def code_commit() -> str:
    """The commit of the code that runs, `-dirty` where a script or a demonstration differs from it (results may)."""
    commit = subprocess.run(["git", "describe", "--always"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "*.py", "*.npz"], cwd=ROOT).returncode
    return commit + "-dirty" * bool(changed)


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a csv file, none if it is not there."""
    if not path.exists():
        return []
    with open(path) as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write rows as a csv file, atomically."""
    with open(path.with_suffix(".tmp"), "w", newline="") as file:
        writer = csv.DictWriter(file, dict.fromkeys(name for row in rows for name in row), restval="")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(path.with_suffix(".tmp"), path)


def run_all(jobs: list[tuple[dict, str]], path: Path, after=None, cores: tuple[int, ...] = (0, 1)) -> list[dict]:
    """Run `(labels, command line after python)` jobs that `path` does not hold yet, and append a row for each. The directory
    that `--run-name` names is made anew.

    Args:
        after: called with the run's directory for further columns.
        cores: that take a run each, at a time.
    """
    commit = code_commit()
    rows, lock = read_rows(path), threading.Lock()
    done = {tuple(row[name] for name in labels) for labels, _ in jobs for row in rows if labels.keys() <= row.keys()}
    todo = [(labels, command) for labels, command in jobs if tuple(map(str, labels.values())) not in done]
    bar = tqdm(total=len(todo), desc=path.stem, unit="run")
    idle = list(cores)

    def work(job):
        labels, command = job
        with lock:
            core = idle.pop()
        name = re.search(r"--run-name (\S+)", command)[1]
        shutil.rmtree(ROOT / "runs" / name, ignore_errors=True)  # of a run that was stopped
        try:
            run = subprocess.run(["taskset", "-c", str(core), sys.executable, *shlex.split(command)], cwd=ROOT, text=True,
                                 capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
            if run.returncode:
                raise RuntimeError(f"{command}: exit status {run.returncode}: {run.stderr[-500:]}")
            row = FINAL.search(run.stdout).groupdict()
        finally:
            with lock:
                idle.append(core)
        with lock:
            run_dir = ROOT / row.pop("run_dir")
            row |= after(run_dir) if after else {}
            rows.append(labels | row | {"commit": commit, "command": f"python {command}"})
            write_rows(path, rows)
            bar.update()

    pool = ThreadPoolExecutor(len(cores))
    try:
        for result in [pool.submit(work, job) for job in todo]:
            result.result()
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C none is begun
    return read_rows(path)


def keep_curve(path: Path, labels: dict[str, str], run_dir: Path) -> None:
    """Copy the evaluations of a run's metrics.csv to the csv file of all curves, in place of older ones."""
    kept = [r for r in read_rows(path) if {name: r[name] for name in labels} != labels]
    names = ("step", "updates", "eval_return_mean", "eval_return_std", "seconds")
    write_rows(path, kept + [labels | {name: r[name] for name in names} for r in read_rows(run_dir / "metrics.csv")])


def draw_curves(axis, curves: list[dict], labels: dict[str, str], methods) -> None:
    """Learning curves of the rows that have `labels`, a line for each method: mean over seeds, the deviation shaded."""
    for method in methods:
        own = [r for r in curves if (labels | {"method": method}).items() <= r.items() and int(r["step"])]
        steps = sorted({int(r["step"]) for r in own})
        if steps:
            values = [[float(r["eval_return_mean"]) for r in own if int(r["step"]) == step] for step in steps]
            mean, sd = (np.array([f(v) for v in values]) for f in (np.mean, np.std))
            axis.plot(steps, mean, label=method)
            axis.fill_between(steps, mean - sd, mean + sd, alpha=0.25)
    axis.locator_params("x", nbins=4)  # six-digit steps would run into each other


def mean_sd(rows: list[dict], name: str, digits: int = 1) -> str:
    """`mean ± standard deviation` over rows; the mean alone of one."""
    values = np.array([float(row[name]) for row in rows])
    return f"{values.mean():.{digits}f}" + (f" ± {values.std():.{digits}f}" if len(values) > 1 else "")
