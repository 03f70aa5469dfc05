"""Pong from 20 demonstrations with the defaults of `iq_atari.py`, beside cloning with the same network and updates.

    python reproduce/pong.py

Writes pong.csv, a row for each run, pong_curves.csv, the score of 10 full games against updates and minutes, and pong.md.
Seeds 106 to 108 were not tuned on. On tuning seeds 1 to 3 two shorter runs tell what play in the loss is worth: both
have 6,000 updates, the last 2,000 of one with the agent's own games in them. Two runs share the machine, a core each. The
emulator is deterministic and starts differ by no more than 30 idle frames, so ten games are few different ones: every model
plays 48 more, and so do the last weights of its training, which the model has a moving average of.
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
TRIALS = {"iq-6000": " --pretrain-updates 6000 --eval-every 2000",
          "iq-play": " --pretrain-updates 4000 --total-timesteps 16000 --num-envs 8 --updates-per-step 0.125"
                     " --value-loss value --chi2-rows both --eval-every 4000"}


def more_games(run_dir: Path) -> dict[str, float | int]:
    """Mean score of 48 further games of the model in `run_dir`, the same for every model, and how many of them it lost; as
    much of the last weights."""
    cpu = torch.device("cpu")
    network, saved = iq_atari.load_model(str(run_dir / "model.pt"), cpu)
    args = iq_atari.Args(**saved["args"])
    network.autocast = args.bfloat16 and iq_atari.has_bfloat16(cpu)
    columns = {}
    for prefix in ("", "last_weights_"):
        if prefix:
            network.load_state_dict(torch.load(run_dir / "checkpoint.pt", weights_only=True)["network"])
        scores = np.concatenate([iq_atari.evaluate(network, replace(args, seed=seed, eval_episodes=16), cpu)
                                 for seed in (500, 501, 502)])
        columns |= {f"{prefix}mean_of_48": round(scores.mean(), 4), f"{prefix}lost_of_48": int((scores < 0).sum())}
    return columns


def table(rows: list[dict]) -> str:
    """Markdown: one line for each method."""
    lines = ["| method | 10 games, each seed | mean ± sd over seeds | 48 other games, each seed | lost of them | "
             "by the last weights | lost | expert | updates | minutes, one core |", "|---" * 10 + "|"]
    for method in (*METHODS, *TRIALS):
        own = sorted((r for r in rows if r["method"] == method), key=lambda r: r["seed"])
        if own:
            scores, more = (", ".join(f"{float(r[name]):.1f}" for r in own) for name in ("eval_return", "mean_of_48"))
            lost = ", ".join(r["lost_of_48"] for r in own)
            known = [r for r in own if r.get("last_weights_mean_of_48")]  # the first rows have none
            last = ", ".join(f"{float(r['last_weights_mean_of_48']):.1f}" for r in known)
            last_lost = ", ".join(r["last_weights_lost_of_48"] for r in known)
            minutes = mean_sd([{"minutes": float(r["seconds"]) / 60} for r in own], "minutes")
            lines.append(f"| {method} | {scores} | {mean_sd(own, 'eval_return')} | {more} | {lost} | {last} | {last_lost} | "
                         f"{mean_sd(own, 'expert')} | {own[0]['updates']} | {minutes} |")
    lines += [f"| random actions, {r['episodes']} games | {float(r['eval_return']):.1f} | | | | | | | | |"
              for r in rows if r["method"] == "random"]
    return "\n".join(lines) + "\n"


def main(cores: tuple[int, ...] = (0, 1), seeds: tuple[int, ...] = (106, 107, 108),
         trial_seeds: tuple[int, ...] = (1, 2, 3), methods: tuple[str, ...] = (*METHODS, *TRIALS)):
    """Run what is missing."""
    torch.set_num_threads(1)  # the further games are played here, beside a training
    jobs = [({"method": method, "seed": seed},
             f"iq_atari.py --env-id PongNoFrameskip-v4 --seed {seed}{flags} --run-name pong_{method}_{seed}")
            for method, flags in (METHODS | TRIALS).items() if method in methods
            for seed in (seeds if method in METHODS else trial_seeds)]

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
