"""The README's table of results, made from the csv files beside this script: `python reproduce/summary.py` prints it."""
from pathlib import Path

import numpy as np
from common import read_rows

FOLDER = Path(__file__).resolve().parent
ATARI, DISCRETE = "`python iq_atari.py", "`python iq_discrete.py"
OFFLINE, CONTINUOUS, ILO = "`python iq_offline.py", "`python iq_continuous.py", "`python iq_ilo.py"

# setting, csv file, what its IQ-Learn rows have, what its cloning rows have, the paper's number (its expert), command
ENTRIES = [
    ("Pong, 20 games", "pong", {"method": "iq"}, {"method": "bc"}, "12 to 15 (21)", f"{ATARI}`"),
    ("CartPole, 1 trajectory, 1 in 20", "discrete", {"task": "CartPole, 1 in 20", "demos": "1", "method": "iq"},
     {"method": "bc"}, "offline: 460 to 500 (500)", f"{DISCRETE} --num-demos 1 --subsample-freq 20`"),
    ("Acrobot, 10", "discrete", {"task": "Acrobot", "demos": "10", "method": "iq"}, {"method": "bc"}, "offline: −75 (−75)",
     f"{DISCRETE} --env-id Acrobot-v1`"),
    ("LunarLander, 1, mirrored", "discrete", {"task": "LunarLander", "demos": "1", "method": "iq"}, {"method": "bc"},
     "offline: 128 (278)", f"{DISCRETE} --env-id LunarLander-v3 --num-demos 1`"),
    ("LunarLander, 10, mirrored", "discrete", {"task": "LunarLander", "demos": "10", "method": "iq"}, {"method": "bc"},
     "offline: 283 (278)", f"{DISCRETE} --env-id LunarLander-v3`"),
    ("GridWorld, random walls, 1,000", "discrete", {"task": "GridWorld, random walls, CNN", "method": "iq"},
     {"method": "bc"}, "", f"{DISCRETE} --env-id GridWorld-v0 --random-walls`"),
    ("HalfCheetah, 1", "table3_mujoco", {"task": "HalfCheetah-v5", "method": "iq"}, {"method": "bc"}, "5077 (5098)",
     f"{CONTINUOUS}`"),
    ("Hopper, 1", "table3_mujoco", {"task": "Hopper-v5", "method": "iq"}, {"method": "bc"}, "3546 (3533)",
     f"{CONTINUOUS} --env-id Hopper-v5`"),
    ("Walker2d, 1", "table3_mujoco", {"task": "Walker2d-v5", "method": "iq"}, {"method": "bc"}, "5134 (5275)",
     f"{CONTINUOUS} --env-id Walker2d-v5`"),
    ("Ant, 1", "table3_mujoco", {"task": "Ant-v5", "method": "iq"}, {"method": "bc"}, "4363 (4700)",
     f"{CONTINUOUS} --env-id Ant-v5`"),
    ("Humanoid, 1", "table3_mujoco", {"task": "Humanoid-v5", "method": "iq"}, {"method": "bc"}, "5227 (5313)",
     f"{CONTINUOUS} --env-id Humanoid-v5`"),
    ("offline CartPole, 1, 1 in 20, mirrored", "figure2_offline", {"task": "CartPole", "demos": "1", "method": "chi2"},
     {"method": "bc"}, "460 to 500 (500)", f"{OFFLINE} --env-id CartPole-v1 --num-demos 1 --subsample-freq 20`"),
    ("offline Acrobot, 1, 1 in 5, mirrored", "figure2_offline", {"task": "Acrobot", "demos": "1", "method": "chi2"},
     {"method": "bc"}, "−82 (−75)", f"{OFFLINE} --env-id Acrobot-v1 --num-demos 1 --subsample-freq 5`"),
    ("offline LunarLander, 1, 1 in 5, mirrored", "figure2_offline", {"task": "LunarLander", "demos": "1", "method": "chi2"},
     {"method": "bc"}, "128 (278)", f"{OFFLINE} --env-id LunarLander-v3 --num-demos 1 --subsample-freq 5`"),
    ("offline HalfCheetah, 1", "offline_mujoco", {"task": "HalfCheetah-v5", "demos": "1", "method": "iq"},
     {"method": "bc"}, "", f"{OFFLINE} --env-id HalfCheetah-v5 --num-demos 1`"),
    ("offline Hopper, 1", "offline_mujoco", {"task": "Hopper-v5", "demos": "1", "method": "iq"},
     {"method": "bc"}, "", f"{OFFLINE} --env-id Hopper-v5 --num-demos 1`"),
    ("offline Walker2d, 1", "offline_mujoco", {"task": "Walker2d-v5", "demos": "1", "method": "iq"},
     {"method": "bc"}, "", f"{OFFLINE} --env-id Walker2d-v5 --num-demos 1`"),
    ("offline Ant, 1", "offline_mujoco", {"task": "Ant-v5", "demos": "1", "method": "iq"},
     {"method": "bc"}, "", f"{OFFLINE} --env-id Ant-v5 --num-demos 1`"),
    ("observations only, CartPole, 1", "table6_ilo", {"task": "CartPole-v1", "demos": "1", "method": "idm"}, None,
     "452 (500)", f"{ILO}`"),
    ("observations only, LunarLander, 1, mirrored", "table6_ilo",
     {"task": "LunarLander-v3", "demos": "1", "method": "idm"}, None, "20 (278)", f"{ILO} --env-id LunarLander-v3`"),
    ("observations only, LunarLander, 10, mirrored", "table6_ilo",
     {"task": "LunarLander-v3", "demos": "10", "method": "idm"}, None, "220 (278)",
     f"{ILO} --env-id LunarLander-v3 --num-demos 10`"),
    ("observations only, Hopper, 1", "table6_ilo", {"task": "Hopper-v5", "demos": "1", "method": "idm"}, None,
     "2507 (3533)", f"{ILO} --env-id Hopper-v5`"),
]


def mean_sd(rows: list[dict], name: str) -> str:
    """`mean ± sd` over seeds, with a digit below a thousand and two for shares; the mean alone of one row."""
    values = np.array([float(row[name]) for row in rows])
    digits = 2 if abs(values.mean()) <= 1 else 1 if abs(values.mean()) < 1000 else 0
    return f"{values.mean():.{digits}f}" + (f" ± {values.std():.{digits}f}" if len(values) > 1 else "")


def table() -> str:
    """Markdown: a line for each setting whose csv file has it."""
    lines = ["| setting, trajectories | IQ-Learn | seeds | expert | cloning | random | paper (its expert) | minutes | "
             "command |", "|---|---|---|---|---|---|---|---|---|"]
    for setting, name, own, cloning, paper, command in ENTRIES:
        rows = read_rows(FOLDER / f"{name}.csv")
        iq = [r for r in rows if own.items() <= r.items()]
        bc = [r for r in rows if cloning and (own | cloning).items() <= r.items()]
        if iq:
            minutes = np.mean([float(r["seconds"]) for r in iq]) / 60
            minutes = f"{minutes:.0f}" if minutes >= 10 else f"{minutes:.2g}"
            random = next((r["eval_return"] for r in rows if r["method"] == "random"), iq[0]["random"])
            lines.append(f"| {setting} | {mean_sd(iq, 'eval_return')} | {len(iq)} | {mean_sd(iq, 'expert').split()[0]} | "
                         f"{mean_sd(bc, 'eval_return') if bc else ''} | {float(random):.1f} | {paper} | "
                         f"{minutes} | {command} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table())
