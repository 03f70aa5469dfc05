"""Figure 12 of the paper: the recovered reward of Hopper against the true one, over policies from poor to expert.

    python reproduce/figure12_rewards.py

One run of `iq_continuous.py` from one trajectory; its policy is kept at every evaluation, and each of those plays
episodes with its own noise. The implied reward is that of the final critic. Writes figure12_rewards.csv, a row for each
episode, figure12_rewards.md with the correlations, and figure12_rewards.png.
"""
import sys
from copy import deepcopy
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from common import ROOT, code_commit, read_rows, write_rows
from scipy.stats import pearsonr, spearmanr

sys.path.insert(0, str(ROOT))
import iq_continuous

FOLDER = Path(__file__).resolve().parent
SAMPLES = 8  # of V(s') for each transition, averaged


def train_and_keep_policies(args: iq_continuous.Args):
    """The policies at the evaluations `[(actor, deterministic return)]`, and the run's final actor and critic."""
    policies, evaluate = [], iq_continuous.evaluate

    def evaluate_and_keep(actor, *more):
        returns = evaluate(actor, *more)
        policies.append((deepcopy(actor), returns.mean()))
        return returns

    iq_continuous.evaluate = evaluate_and_keep
    run_dir = iq_continuous.train(args)
    iq_continuous.evaluate = evaluate
    return policies, *iq_continuous.load_model(str(run_dir / "model.pt"))


def play(actor, env, seed: int):
    """One episode of the sampled policy: transitions as tensors and the true rewards `[T]`."""
    obs, _ = env.reset(seed=seed)
    rows, rewards, ended = [], [], False
    while not ended:
        state = torch.as_tensor(obs, dtype=torch.float32)[None]
        with torch.no_grad():
            action = actor.to_env(iq_continuous.sample_action(actor, state)[0])
        obs, reward, terminated, truncated, _ = env.step(action[0].numpy())
        rows.append((state, action, torch.as_tensor(obs, dtype=torch.float32)[None], torch.tensor([float(terminated)])))
        rewards.append(float(reward))
        ended = terminated or truncated
    return [torch.cat(parts) for parts in zip(*rows)], np.array(rewards)


def correlations(rows: list[dict], steps: np.ndarray) -> str:
    """Markdown of the correlations: of episode sums, per step, and of the means per step, which length does not enter."""
    numbers = {name: np.array([float(r[name]) for r in rows]) for name in ("implied", "true", "length")}
    per_step = {name: numbers[name] / numbers["length"] for name in ("implied", "true")}
    full = numbers["length"] == 1000
    kinds = {
        f"episode sums ({len(rows)} episodes)": (numbers["implied"], numbers["true"]),
        "episode means per step: length does not enter": (per_step["implied"], per_step["true"]),
        f"sums of the {full.sum()} episodes of full length": (numbers["implied"][full], numbers["true"][full]),
        f"single steps ({len(steps):,})": (steps[:, 0], steps[:, 1]),
    }
    lines = ["| Hopper-v5, implied against true reward | Pearson | Spearman |", "|---|---|---|"]
    lines += [f"| {kind} | {pearsonr(x, y)[0]:.3f} | {spearmanr(x, y)[0]:.3f} |" for kind, (x, y) in kinds.items()]
    # What length leaves: the correlation of the residuals after a straight line in the length is taken from both.
    left = [v - np.polyval(np.polyfit(numbers["length"], v, 1), numbers["length"])
            for v in (numbers["implied"], numbers["true"])]
    lines.append(f"| episode sums, length regressed out of both | {pearsonr(*left)[0]:.3f} | {spearmanr(*left)[0]:.3f} |")
    return "\n".join(lines + ["| published, episode sums | 0.99 | |"]) + "\n"


def main(seed: int = 101, episodes: int = 10, total_timesteps: int = 30_000, every: int = 1_500):
    """Train once, roll out every kept policy, compare."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    args = iq_continuous.parse_args(["--env-id", "Hopper-v5", "--seed", str(seed), "--total-timesteps", str(total_timesteps),
                                     "--eval-every", str(every), "--run-name", f"figure12_{seed}"])
    policies, actor, critic, saved = train_and_keep_policies(args)
    env, rows, steps = gym.make("Hopper-v5"), [], []
    torch.manual_seed(seed)
    commit = code_commit()
    for i, (policy, evaluated) in enumerate(policies):
        for episode in range(episodes):
            transitions, true = play(policy, env, 1_000_000 + 1_000 * i + episode)
            with torch.no_grad():
                implied = torch.stack([iq_continuous.implied_reward(critic, actor, *transitions, saved["gamma"],
                                                                    saved["temperature"]) for _ in range(SAMPLES)]).mean(0)
            steps.append(np.stack([implied.numpy(), true], 1))
            rows.append({"policy_at_step": (i + 1) * every, "evaluated": round(float(evaluated), 1), "length": len(true),
                         "true": round(float(true.sum()), 3), "implied": round(float(implied.sum()), 4),
                         "commit": commit, "command": f"python reproduce/figure12_rewards.py --seed {seed}"})
    write_rows(FOLDER / "figure12_rewards.csv", rows)
    text = correlations(read_rows(FOLDER / "figure12_rewards.csv"), np.concatenate(steps))
    (FOLDER / "figure12_rewards.md").write_text(text)
    print(text)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    for axis, scale, title in zip(axes, (np.ones(len(rows)), np.array([r["length"] for r in rows])),
                                  ("episode sums", "episode means per step")):
        points = axis.scatter([r["true"] for r in rows] / scale, [r["implied"] for r in rows] / scale, s=8,
                              c=[r["policy_at_step"] for r in rows])
        axis.set(xlabel="true reward", ylabel="implied reward", title=f"Hopper-v5, {title}")
    figure.colorbar(points, ax=axes, label="training step of the policy")
    figure.savefig(FOLDER / "figure12_rewards.png", dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    tyro.cli(main)
