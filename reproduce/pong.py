"""Pong from 20 demonstrations with the defaults of `iq_atari.py`, beside cloning with the same network and updates.

    python reproduce/pong.py

Writes pong.csv, a row for each run, pong_curves.csv, the score of 10 full games against updates and minutes, and pong.md.
Seeds 106 to 108 were not tuned on. Two runs share the machine, a core each. The emulator is deterministic and starts differ
by no more than 30 idle frames, so ten games are few different ones: every model plays 48 more.
"""
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import tyro
from common import ROOT, code_commit, keep_curve, mean_sd, run_all, write_rows

sys.path.insert(0, str(ROOT))
import iq_atari

FOLDER = Path(__file__).resolve().parent
METHODS = {"iq": "", "bc": " --objective bc"}


def more_games(run_dir: Path) -> dict[str, float | int]:
    """Mean score of 48 further games of the model in `run_dir`, the same for every model, and how many of them it lost."""
    cpu = torch.device("cpu")
    network, saved = iq_atari.load_model(str(run_dir / "model.pt"), cpu)
    args = iq_atari.Args(**saved["args"])
    network.autocast = args.bfloat16 and iq_atari.has_bfloat16(cpu)
    scores = np.concatenate([iq_atari.evaluate(network, replace(args, seed=seed, eval_episodes=16), cpu)
                             for seed in (500, 501, 502)])
    return {"mean_of_48": round(scores.mean(), 4), "lost_of_48": int((scores < 0).sum())}


def table(rows: list[dict]) -> str:
    """Markdown: one line for each method."""
    lines = ["| method | 10 games, each seed | mean ± sd over seeds | 48 other games, each seed | lost of them | expert | "
             "updates | minutes, one core |", "|---|---|---|---|---|---|---|---|"]
    for method in METHODS:
        own = sorted((r for r in rows if r["method"] == method), key=lambda r: r["seed"])
        if own:
            scores, more = (", ".join(f"{float(r[name]):.1f}" for r in own) for name in ("eval_return", "mean_of_48"))
            lost = ", ".join(r["lost_of_48"] for r in own)
            minutes = mean_sd([{"minutes": float(r["seconds"]) / 60} for r in own], "minutes")
            lines.append(f"| {method} | {scores} | {mean_sd(own, 'eval_return')} | {more} | {lost} | "
                         f"{mean_sd(own, 'expert')} | {own[0]['updates']} | {minutes} |")
    lines += [f"| random actions, {r['episodes']} games | {float(r['eval_return']):.1f} | | | | | | |"
              for r in rows if r["method"] == "random"]
    return "\n".join(lines) + "\n"


def main(cores: tuple[int, ...] = (0, 1), seeds: tuple[int, ...] = (106, 107, 108), methods: tuple[str, ...] = ("iq", "bc")):
    """Run what is missing."""
    torch.set_num_threads(1)  # the further games are played here, beside a training
    jobs = [({"method": method, "seed": seed},
             f"iq_atari.py --env-id PongNoFrameskip-v4 --seed {seed}{METHODS[method]} --run-name pong_{method}_{seed}")
            for method in methods for seed in seeds]

    def curve(run_dir: Path) -> dict:
        method, seed = run_dir.name.split("_")[1:]
        keep_curve(FOLDER / "pong_curves.csv", {"method": method, "seed": seed}, run_dir)
        return more_games(run_dir)

    rows = run_all(jobs, FOLDER / "pong.csv", curve, cores)
    if not any(row["method"] == "random" for row in rows):
        returns = iq_atari.evaluate(None, iq_atari.Args(eval_episodes=100), "cpu")
        rows.append({"method": "random", "seed": "0 to 99", "eval_return": round(returns.mean(), 4),
                     "std": round(returns.std(), 4), "episodes": len(returns), "commit": code_commit(),
                     "command": "python reproduce/pong.py"})
        write_rows(FOLDER / "pong.csv", rows)
    (FOLDER / "pong.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    tyro.cli(main)
