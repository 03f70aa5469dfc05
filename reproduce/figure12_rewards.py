"""Figure 12 of the paper: the recovered reward of Hopper against the true one, over policies from poor to expert.

    python reproduce/figure12_rewards.py

A run of `iq_continuous.py` from one trajectory for each seed; its policy and its critic are kept at every evaluation, and
each policy plays episodes with its own noise. Their implied reward is that of the final critic, and the mean over all kept
critics: where two players of a convex-concave game go round its saddle point, their averages come to it. Writes
figure12_rewards.csv, a row for each episode, figure12_rewards_critics.csv, the correlation by each critic alone,
figure12_rewards.md and figure12_rewards.png. A second call runs the seeds that the csv files lack.
"""
import shutil
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
CRITICS = FOLDER / "figure12_rewards_critics.csv"
SAMPLES = 8  # of V(s') for each transition by the final critic, averaged; the others take one


def train_and_keep(args: iq_continuous.Args) -> list[tuple]:
    """`[(actor, critic, deterministic return)]` at the run's evaluations, the last of them at its end."""
    kept, evaluate = [], iq_continuous.evaluate

    def evaluate_and_keep(actor, args, device, run, *more):
        returns = evaluate(actor, args, device, run, *more)
        kept.append((deepcopy(actor), deepcopy(run.parts["critic"]), returns.mean()))
        return returns

    iq_continuous.evaluate = evaluate_and_keep
    try:
        iq_continuous.train(args)
    finally:
        iq_continuous.evaluate = evaluate
    return kept


def play(actor, env, seed: int):
    """One episode of the sampled policy: transitions as tensors and the true rewards `[T]`."""
    obs, _ = env.reset(seed=seed)
    rows, rewards, ended = [], [], False
    while not ended:
        state = torch.as_tensor(obs, dtype=torch.float32)[None]
        with torch.no_grad():
            action = actor.to_env(iq_continuous.sample_action(*actor(state))[0])
        obs, reward, terminated, truncated, _ = env.step(action[0].numpy())
        rows.append((state, action, torch.as_tensor(obs, dtype=torch.float32)[None], torch.tensor([float(terminated)])))
        rewards.append(float(reward))
        ended = terminated or truncated
    return [torch.cat(parts) for parts in zip(*rows)], np.array(rewards)


def rewards_of(transitions, kept: list[tuple], args: iq_continuous.Args) -> np.ndarray:
    """The implied reward of each transition by every kept critic with the policy of its time `[critics, T]`."""
    with torch.no_grad():
        samples = [[iq_continuous.implied_reward(critic, actor, *transitions, args.gamma, args.temperature)
                    for _ in range(SAMPLES if i == len(kept) - 1 else 1)] for i, (actor, critic, _) in enumerate(kept)]
    return torch.stack([torch.stack(own).mean(0) for own in samples]).numpy()


def compared(rows: list[dict]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What of the episodes is compared, by its name: sums, means per step, which length does not enter, and residuals."""
    final, average, true, length = (np.array([float(r[name]) for r in rows])
                                    for name in ("implied", "implied_average", "true", "length"))
    full = length == 1000
    # What length leaves: the residuals after a straight line in the length is taken from both.
    final_left, average_left, true_left = (v - np.polyval(np.polyfit(length, v, 1), length) for v in (final, average, true))
    return {
        "episode sums, final critic": (final, true),
        "episode sums, mean over the critics": (average, true),
        "episode lengths alone against the true sums": (length, true),
        "episode means per step, final critic": (final / length, true / length),
        "episode means per step, mean over the critics": (average / length, true / length),
        "sums of the episodes of full length, final critic": (final[full], true[full]),
        "sums of the episodes of full length, mean over the critics": (average[full], true[full]),
        "sums, length regressed out of both, final critic": (final_left, true_left),
        "sums, length regressed out of both, mean over the critics": (average_left, true_left),
    }


def table(rows: list[dict]) -> str:
    """Markdown: each correlation, seed after seed, then those by each critic alone."""
    seeds = [compared([r for r in rows if r["seed"] == seed]) for seed in dict.fromkeys(r["seed"] for r in rows)]
    lines = ["| Hopper-v5, implied against true reward | Pearson, each seed | Spearman, each seed |", "|---|---|---|"]
    for kind in seeds[0]:
        pearson, spearman = (", ".join(f"{f(*seed[kind])[0]:.3f}" if len(seed[kind][0]) > 1 else "none" for seed in seeds)
                             for f in (pearsonr, spearmanr))  # none: no two episodes of full length in a short run
        lines.append(f"| {kind} | {pearson} | {spearman} |")
    lines += ["| published, episode sums | 0.99 | |", "", "| critic after | episode sums, Pearson, each seed | "
              "single steps, Pearson, each seed |", "|---|---|---|"]
    critics = read_rows(CRITICS)
    for step in dict.fromkeys(r["critic_at_step"] for r in critics):
        of_sums, of_steps = (", ".join(f"{float(r[name]):.3f}" for r in critics if r["critic_at_step"] == step)
                             for name in ("episode_pearson", "step_pearson"))
        lines.append(f"| {step} | {of_sums} | {of_steps} |")
    return "\n".join(lines) + "\n"


def draw(rows: list[dict], path: Path) -> None:
    """Episode sums by the final critic and by the mean over the critics, then each critic's correlation."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(14, 3.6))
    values = {name: [float(r[name]) for r in rows] for name in ("true", "implied", "implied_average", "policy_at_step")}
    for axis, name, title in zip(axes, ("implied", "implied_average"), ("final critic", "mean over the critics")):
        points = axis.scatter(values["true"], values[name], s=8, c=values["policy_at_step"])
        axis.set(xlabel="true reward of an episode", ylabel="implied reward", title=title)
        figure.colorbar(points, ax=axis, label="training step of the policy")
    critics = read_rows(CRITICS)
    for seed in dict.fromkeys(r["seed"] for r in critics):
        own = [r for r in critics if r["seed"] == seed]
        axes[2].plot([int(r["critic_at_step"]) for r in own], [float(r["episode_pearson"]) for r in own],
                     label=f"seed {seed}")
    axes[2].set(xlabel="training step of the critic", ylabel="Pearson of episode sums", title="Hopper-v5, each critic alone")
    axes[2].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(seeds: tuple[int, ...] = (101, 102, 103), episodes: int = 10, total_timesteps: int = 30_000, every: int = 1_500):
    """For each seed that is missing with this budget: train once, roll out every kept policy, compare. Its rows of another
    budget are replaced."""
    env, commit = gym.make("Hopper-v5"), code_commit()
    budget = "".join(f" {flag} {value}" for flag, value, usual in (
        ("--episodes", episodes, 10), ("--total-timesteps", total_timesteps, 30_000), ("--every", every, 1_500))
        if value != usual)
    rows, critics = read_rows(FOLDER / "figure12_rewards.csv"), read_rows(CRITICS)
    for seed in seeds:
        command = f"python reproduce/figure12_rewards.py --seeds {seed}{budget}"
        if any(r["command"] == command for r in critics):
            continue
        rows, critics = ([r for r in old if r["seed"] != str(seed)] for old in (rows, critics))
        run_dir = ROOT / "runs" / f"figure12_{seed}"
        shutil.rmtree(run_dir, ignore_errors=True)  # of a call that was stopped
        args = iq_continuous.parse_args(["--env-id", "Hopper-v5", "--seed", str(seed), "--total-timesteps",
                                         str(total_timesteps), "--eval-every", str(every), "--out-dir",
                                         str(run_dir.parent), "--run-name", run_dir.name])
        kept = train_and_keep(args)
        torch.manual_seed(seed)
        implied, true = [], []  # of each episode: by each critic `[critics, T]`, and `[T]`
        origin = {"commit": commit, "command": command}
        at = [min((i + 1) * every, total_timesteps) for i in range(len(kept))]  # the step that each was kept at
        for i, (policy, _, evaluated) in enumerate(kept):
            for episode in range(episodes):
                transitions, rewards = play(policy, env, 1_000_000 + 1_000 * i + episode)
                implied.append(rewards_of(transitions, kept, args))
                true.append(rewards)
                sums = implied[-1].sum(1)
                rows.append({"seed": seed, "policy_at_step": at[i], "evaluated": round(float(evaluated), 1),
                             "length": len(rewards), "true": round(float(rewards.sum()), 3),
                             "implied": round(float(sums[-1]), 4), "implied_average": round(float(sums.mean()), 4)} | origin)
        sums, true_sums = np.stack([r.sum(1) for r in implied]), [r.sum() for r in true]  # [episodes, critics]
        steps, true_steps = np.concatenate(implied, 1), np.concatenate(true)
        critics += [{"seed": seed, "critic_at_step": at[i],
                     "episode_pearson": round(float(pearsonr(sums[:, i], true_sums)[0]), 4),
                     "step_pearson": round(float(pearsonr(steps[i], true_steps)[0]), 4)} | origin for i in range(len(kept))]
        write_rows(FOLDER / "figure12_rewards.csv", rows)
        write_rows(CRITICS, critics)
    rows = read_rows(FOLDER / "figure12_rewards.csv")
    (FOLDER / "figure12_rewards.md").write_text(table(rows))
    draw(rows, FOLDER / "figure12_rewards.png")
    print(table(rows))


if __name__ == "__main__":
    tyro.cli(main)
