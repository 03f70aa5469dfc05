"""Figure 5 of the paper: a reward of the state alone, learned in a point maze from observations, over the plane.

    python reproduce/figure5_maze.py

Trains `iq_ilo.py` on PointMaze-v0 with random starts, draws `state_reward` beside the demonstrations, and measures it:
its rank correlation with the negative length of the shortest way to the goal, on a grid of states, and the true return
of an ordinary soft actor-critic (stable_baselines3) that is trained on this reward alone, in the same maze and with the
barrier moved to the other side. Writes figure5_maze.csv, .md and .png; a second call goes on where the csv stops.
"""
import shlex
import shutil
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from common import ROOT, code_commit, mean_sd, read_rows, write_rows

sys.path.insert(0, str(ROOT))
import iq_ilo

FOLDER = Path(__file__).resolve().parent
TRAIN = "--env-id PointMaze-v0 --random-start"


def plane(size: int = 50) -> np.ndarray:
    """States at rest on a grid over the unit square, `[size², 4]`."""
    x, y = np.meshgrid(*2 * [(np.arange(size) + 0.5) / size])
    return np.stack([x.ravel(), y.ravel(), np.zeros(size**2), np.zeros(size**2)], 1).astype(np.float32)


class LearnedReward(gym.Wrapper):
    """Gives the recovered reward of the state that is reached, standardised by constants, and never the true one."""

    def __init__(self, env: gym.Env, model: iq_ilo.Model, mean: float, sd: float):
        super().__init__(env)
        self.model, self.mean, self.sd = model, mean, sd

    def step(self, action):
        obs, _, terminated, truncated, info = self.env.step(action)
        r = iq_ilo.state_reward(self.model.reward, self.model.policy, torch.as_tensor(obs)[None],
                                self.model.saved["temperature"])
        return obs, float((r.item() - self.mean) / self.sd), terminated, truncated, info


def true_return(act, barrier: str, episodes: int = 50) -> float:
    """Mean return in the maze's own reward, episodes starting anywhere."""
    env, returns = gym.make("PointMaze-v0", barrier=barrier, random_start=True), []
    for episode in range(episodes):
        obs, _ = env.reset(seed=1_000_000 + episode)
        env.action_space.seed(episode)
        total, ended = 0.0, False
        while not ended:
            obs, reward, terminated, truncated, _ = env.step(act(env, obs))
            total, ended = total + reward, terminated or truncated
        returns.append(total)
    return float(np.mean(returns))


def sac_return(model: iq_ilo.Model, reward: np.ndarray, barrier: str, seed: int, steps: int, learned: bool) -> float:
    """True return of soft actor-critic after `steps` on the learned reward, or on the true one."""
    from stable_baselines3 import SAC

    env = gym.make("PointMaze-v0", barrier=barrier, random_start=True)
    if learned:
        env = LearnedReward(env, model, reward.mean(), reward.std())
    sac = SAC("MlpPolicy", env, seed=seed, policy_kwargs={"net_arch": [64, 64]}, learning_starts=min(500, steps // 4),
              learning_rate=1e-3, gamma=0.98)
    sac.learn(steps)
    return true_return(lambda _, obs: sac.predict(obs, deterministic=True)[0], barrier)


def draw(model: iq_ilo.Model, reward: np.ndarray, path: Path) -> None:
    """The demonstrations, and the reward of states at rest: agent white, goal a red star, barrier grey."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size, maze = int(len(reward) ** 0.5), iq_ilo.PointMaze()
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 4.2))
    with np.load(iq_ilo.demonstrations_path(iq_ilo.Args(env_id="PointMaze-v0", random_start=True))) as file:
        episodes = np.split(file["observations"], np.cumsum(file["episode_lengths"] + 1)[:-1])
    for observations in episodes:
        axes[0].plot(observations[:, 0], observations[:, 1], color="tab:blue", linewidth=0.8)
        axes[0].plot(*observations[0, :2], marker="o", markersize=5, color="white", markeredgecolor="black")
    image = axes[1].imshow(reward.reshape(size, size), origin="lower", extent=(0, 1, 0, 1), cmap="viridis")
    axes[1].plot(*maze.START, marker="o", markersize=9, color="white", markeredgecolor="black")
    figure.colorbar(image, ax=axes[1])
    for axis, title in zip(axes, ("demonstrations: observations only", "recovered reward of the state")):
        axis.plot(maze.span, (maze.HEIGHT, maze.HEIGHT), color="dimgrey", linewidth=5, solid_capstyle="butt")
        axis.plot(*maze.GOAL, marker="*", markersize=16, color="red")
        axis.set(title=title, xlim=(0, 1), ylim=(0, 1), aspect="equal")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def table(rows: list[dict]) -> str:
    """Markdown: mean ± standard deviation over seeds of each measurement."""
    names = {
        "rank_correlation": "rank correlation with −shortest way to the goal, 2,500 states at rest",
        "rank_correlation_straight": "the same with −straight distance",
        "expert": "return of the demonstrations, from their own starts", "random": "return of random actions",
        "imitation": "return of the imitation policy", "imitation_moved": "its return, barrier moved",
        "sac_same": "return of SAC on the recovered reward alone", "sac_moved": "the same, barrier moved",
        "sac_true_same": "return of SAC on the true reward", "sac_true_moved": "the same, barrier moved",
    }
    steps = ", ".join(sorted({r["sac_steps"] for r in rows}))
    lines = [f"| PointMaze-v0, random starts, {len(rows)} seed{'s' * (len(rows) != 1)}, SAC {steps} steps | mean ± sd |",
             "|---|---|"]
    measured = [name for name in names if rows and all(r.get(name) for r in rows)]
    lines += [f"| {names[name]} | {mean_sd(rows, name, 2)} |" for name in measured]
    return "\n".join(lines) + "\n"


def main(seeds: tuple[int, ...] = (101, 102, 103), sac_steps: int = 5_000, flags: str = ""):
    """Run the seeds that the csv does not hold with these flags; `flags` go to iq_ilo.py, `sac_steps` 0 leaves soft
    actor-critic out. A seed's row with other flags or steps is replaced."""
    from scipy.stats import spearmanr

    path, states, maze = FOLDER / "figure5_maze.csv", plane(), iq_ilo.PointMaze()
    rows = read_rows(path)
    for seed in seeds:
        run_dir, given = ROOT / "runs" / f"figure5_{seed}", f" --flags={shlex.quote(flags)}" * bool(flags)
        if any(r["seed"] == str(seed) and (r["sac_steps"] == str(sac_steps) or not sac_steps)
               and r["command"].partition(" --flags=")[2] == given.partition("=")[2] for r in rows):
            continue
        shutil.rmtree(run_dir, ignore_errors=True)  # of a call that was stopped
        where = ["--out-dir", str(run_dir.parent), "--run-name", run_dir.name]
        iq_ilo.train(iq_ilo.parse_args([*TRAIN.split(), "--seed", str(seed), *shlex.split(flags), *where]))
        model = iq_ilo.load_model(str(run_dir / "model.pt"))
        torch.manual_seed(seed)
        reward = iq_ilo.state_reward(model.reward, model.policy, torch.as_tensor(states), model.saved["temperature"]).numpy()

        def imitation(_, obs, model=model):
            with torch.no_grad():
                return model.policy.act(torch.as_tensor(obs)[None])[0].numpy()

        row = {"seed": seed, "expert": model.saved["expert_return"],
               "random": true_return(lambda env, _: env.action_space.sample(), "right"),
               "rank_correlation": spearmanr(reward, -maze.distances(states[:, :2]))[0],
               "rank_correlation_straight": spearmanr(reward, -np.linalg.norm(states[:, :2] - maze.GOAL, axis=1))[0],
               "imitation": true_return(imitation, "right"), "imitation_moved": true_return(imitation, "left")}
        print(row, flush=True)
        if sac_steps:
            for barrier, name in (("right", "same"), ("left", "moved")):
                for learned, kind in ((True, "sac"), (False, "sac_true")):
                    row[f"{kind}_{name}"] = sac_return(model, reward, barrier, seed, sac_steps, learned)
                    print(f"{kind}_{name}: {row[f'{kind}_{name}']:.2f}", flush=True)
        rows = [r for r in rows if r["seed"] != str(seed)]
        rows.append(row | {"sac_steps": sac_steps, "commit": code_commit(),
                           "command": f"python reproduce/figure5_maze.py --seeds {seed} --sac-steps {sac_steps}{given}"})
        write_rows(path, rows)
        rows = read_rows(path)
        draw(model, reward, FOLDER / "figure5_maze.png")
        (FOLDER / "figure5_maze.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    tyro.cli(main)
