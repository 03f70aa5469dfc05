"""Make a bundled demonstration file again from nothing: an expert, whole consecutive episodes, a check, the file.

    python demos/record.py --env-id CartPole-v1

Every episode that is played is kept, in order. Returns are checked before anything is written.
"""
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import iq_discrete  # noqa: E402  registers GridWorld-v0

FOLDER = Path(__file__).resolve().parent


@dataclass
class Args:
    env_id: str  # the environment to demonstrate
    episodes: int | None = None  # episodes to record (default: the bundled file's)
    seed: int = 0  # of the first episode; the others follow one by one
    random_walls: bool = False  # GridWorld-v0: new walls each episode
    random_start: bool = False  # GridWorld-v0: a new start each episode
    random_goal: bool = False  # GridWorld-v0: a new goal each episode
    out: Path | None = None  # the file to write (default: in this folder, named after the environment)


def cartpole_expert(env, obs):
    """A saturated linear controller with weak damping: it keeps the pole up while the cart sways on and on."""
    return int(CARTPOLE_GAINS @ obs > 0)


CARTPOLE_GAINS = np.array([0.24, 0.20, 1.0, 0.57])


def acrobot_expert(env, obs):
    """Torque against the first joint's velocity pumps energy into the swing."""
    return 0 if obs[4] > 0 else 2


def lunar_lander_expert(env, obs):
    """The controller that gymnasium ships with the environment."""
    from gymnasium.envs.box2d.lunar_lander import heuristic

    return int(heuristic(env.unwrapped, obs))


def grid_expert(env, obs):
    """A shortest path to the goal; of several equally short moves one at random."""
    grid = env.unwrapped
    distance = grid.distances(grid.walls, grid.goal)
    row, column = grid.agent
    closer = [a for a, (dr, dc) in enumerate(grid.MOVES[:4])
              if 0 <= row + dr < grid.size and 0 <= column + dc < grid.size
              and distance[row + dr, column + dc] == distance[row, column] - 1
              and not grid.walls[row + dr, column + dc]]
    return int(env.np_random.choice(closer))


# environment: expert, episodes in the bundled file, the least mean return that is written
EXPERTS = {
    "CartPole-v1": (cartpole_expert, 30, 500.0),
    "Acrobot-v1": (acrobot_expert, 30, -85.0),
    "LunarLander-v3": (lunar_lander_expert, 30, 250.0),
    "GridWorld-v0": (grid_expert, 30, 1.0),
}


def record(args: Args) -> dict[str, np.ndarray]:
    """Play whole episodes one after another and return the arrays of the demonstration format."""
    expert, episodes, _ = EXPERTS[args.env_id]
    switches = {name: getattr(args, name) for name in ("random_walls", "random_start", "random_goal")}
    env = gym.make(args.env_id, **(switches if args.env_id == "GridWorld-v0" else {}))
    columns = {name: [] for name in ("observations", "actions", "terminations", "truncations", "rewards")}
    lengths = []
    for episode in range(args.episodes or episodes):
        # CartPole starts disturbed, four times as far out as usual, so that recoveries are shown too.
        options = {"low": -0.2, "high": 0.2} if args.env_id == "CartPole-v1" else None
        obs, _ = env.reset(seed=args.seed + episode, options=options)
        columns["observations"].append(obs)
        length, ended = 0, False
        while not ended:
            action = expert(env, obs)
            obs, reward, terminated, truncated, _ = env.step(action)
            for name, value in zip(columns, (obs, action, terminated, truncated, reward)):
                columns[name].append(value)
            length, ended = length + 1, terminated or truncated
        lengths.append(length)
    dtypes = {"observations": np.float32, "actions": np.int64, "rewards": np.float32}
    arrays = {name: np.asarray(values, dtypes.get(name, bool)) for name, values in columns.items()}
    return arrays | {"episode_lengths": np.array(lengths), "env_id": np.array(args.env_id),
                     "num_actions": np.array(env.action_space.n)}


def episode_returns(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Undiscounted return of each episode."""
    first = np.cumsum(arrays["episode_lengths"]) - arrays["episode_lengths"]
    return np.add.reduceat(arrays["rewards"].astype(np.float64), first)


def main():
    args = tyro.cli(Args)
    start = time.time()
    arrays = record(args)
    returns, least = episode_returns(arrays), EXPERTS[args.env_id][2]
    print(f"{args.env_id}: {len(returns)} episodes, {arrays['episode_lengths'].sum()} transitions, "
          f"return {returns.mean():.1f} ± {returns.std():.1f}, {time.time() - start:.0f} s")
    assert returns.mean() >= least, f"mean return {returns.mean():.1f} below {least}: nothing written"
    switches = [s for s in ("random_walls", "random_start", "random_goal") if getattr(args, s)]
    name = args.env_id + "".join("-" + s.replace("_", "-") for s in switches)
    np.savez_compressed(args.out or FOLDER / f"{name}.npz", **arrays)


if __name__ == "__main__":
    main()
