"""Make a bundled demonstration file again from nothing: an expert, whole consecutive episodes, two checks, the file.

    python demos/record.py --env-id CartPole-v1

Every episode that is played is kept, in order. Before anything is written the mean return must reach the least that the
table below asks for, and a clone of the demonstrations must come near it: what cannot be copied teaches nothing.
"""
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import gymnasium as gym
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import iq_atari
import iq_continuous
import iq_discrete
import iq_ilo

FOLDER = Path(__file__).resolve().parent
ACROBOT_GAINS = np.array([0, 0, 0, 1.0, 0.2, -0.3])  # of cosine and sine of each joint's angle, angular velocities
CARTPOLE_GAINS = np.array([0.2, 0.5, 1.0, 1.2])  # of position, velocity, angle, angular velocity
GRID_SWITCHES = ("random_walls", "random_start", "random_goal")


@dataclass
class Args:
    env_id: str  # the environment to demonstrate
    episodes: int | None = None  # episodes to record (default: the bundled file's)
    seed: int = 0  # of the first episode; the others follow one by one
    random_walls: bool = False  # GridWorld-v0: new walls each episode
    random_start: bool = False  # GridWorld-v0: a new start each episode; PointMaze-v0: anywhere
    random_goal: bool = False  # GridWorld-v0: a new goal each episode
    out: Path | None = None  # the file to write (default: in this folder, named after the environment)
    clone_updates: int | None = None  # updates of the clone that is checked (default: the table's); 0 for no clone
    cache: Path = Path("runs/experts")  # where the training of an expert is kept


def cartpole_expert(env, obs):
    """A saturated linear controller that reacts strongly to the pole and lets the cart swing widely, on and on."""
    return int(CARTPOLE_GAINS @ obs > 0)


def acrobot_expert(env, obs):
    """Swings up by a rule that is linear in sin θ2 and both velocities, and that some 17 transitions show well."""
    return 0 if ACROBOT_GAINS @ obs > 0 else 2


class RandomActions(gym.ActionWrapper):
    """A tenth of the actions are replaced by uniformly random ones, drawn by the environment's generator."""

    def action(self, action):
        return self.np_random.integers(self.action_space.n) if self.np_random.random() < 0.1 else action


@cache
def lunar_lander_policy():
    """PPO of sbx-rl, 1.7 million steps, some minutes, a tenth of its actions disturbed. The size of its actor and
    the end of its training were chosen by how well clones of few episodes land; those of gymnasium's controller crash."""
    from sbx import PPO
    from stable_baselines3.common.env_util import make_vec_env

    envs = make_vec_env(lambda: RandomActions(gym.make("LunarLander-v3")), n_envs=16, seed=0)
    model = PPO("MlpPolicy", envs, n_steps=1_024, batch_size=256, n_epochs=6, learning_rate=5e-4, gamma=0.999,
                gae_lambda=0.98, ent_coef=0.01, seed=0, policy_kwargs={"net_arch": {"pi": [32, 32], "vf": [64, 64]}})
    return model.learn(102 * 16 * 1_024)


def lunar_lander_expert(env, obs):
    """A trained policy, greedy and undisturbed."""
    return int(lunar_lander_policy().predict(obs, deterministic=True)[0])


def grid_expert(env, obs):
    """A shortest path to the goal; of several equally short moves one at random."""
    grid = env.unwrapped
    distance = grid.distances(grid.walls, grid.goal)
    here = np.array(grid.agent)
    closer = [action for action, move in enumerate(grid.MOVES[:4])
              if ((here + move >= 0) & (here + move < grid.size)).all()
              and distance[tuple(here + move)] == distance[grid.agent] - 1]
    return int(env.np_random.choice(closer))


def maze_expert(env, obs):
    """Towards the goal, or first past the barrier's free end, by a damped spring; it stays at the goal."""
    maze: iq_ilo.PointMaze = env.unwrapped
    position, velocity = obs[:2], obs[2:]
    beyond = maze.span[0] - 0.06 if maze.barrier == "right" else maze.span[1] + 0.06
    aim = maze.GOAL
    if maze.blocks(position, maze.GOAL) or (position[1] < maze.HEIGHT and maze.blocks(position + 0.1 * velocity, maze.GOAL)):
        aim = np.array([beyond, maze.HEIGHT + 0.02])
    return np.clip(10 * (aim - position) - 3 * velocity, -1, 1).astype(np.float32)


def trained_expert(args: Args):
    """A policy of CrossQ, trained now or taken from `args.cache`."""
    import crossq

    def teaches(policy) -> bool:
        return args.clone_updates == 0 or clone_normalized(args, record(args, policy)) >= TABLE[args.env_id][4]

    return crossq.expert(args.env_id, args.cache, teaches)


@cache
def pendulum_policy():
    """SAC of sbx-rl after 15,000 steps, some minutes; its action is a function of the observation."""
    from sbx import SAC

    model = SAC("MlpPolicy", "Pendulum-v1", gamma=0.98, seed=0)
    for _ in range(3):  # as the bundled file's expert was trained: an episode begins anew with each call
        model.learn(5_000, reset_num_timesteps=False)
    return model


def pendulum_expert(env, obs):
    """A trained policy, without its noise."""
    return pendulum_policy().predict(obs, deterministic=True)[0]


# environment: expert, episodes in the bundled file, least mean return, updates of the clone, its least normalized return
TABLE = {
    "CartPole-v1": (cartpole_expert, 30, 500.0, 5_000, 0.9),
    "Acrobot-v1": (acrobot_expert, 30, -85.0, 5_000, 0.9),
    "LunarLander-v3": (lunar_lander_expert, 30, 250.0, 20_000, 0.8),
    "Pendulum-v1": (pendulum_expert, 30, -160.0, 10_000, 0.8),
    "GridWorld-v0": (grid_expert, 30, 1.0, 5_000, 0.9),
    "PointMaze-v0": (maze_expert, 30, -25.0, 5_000, 0.9),
    "PongNoFrameskip-v4": (None, 30, 19.0, 12_000, 0.5),
    "Hopper-v5": (trained_expert, 25, 3_400.0, 20_000, 0.5),
    "HalfCheetah-v5": (trained_expert, 25, 4_900.0, 20_000, 0.5),
    "Walker2d-v5": (trained_expert, 25, 5_000.0, 20_000, 0.5),
    "Ant-v5": (trained_expert, 25, 4_400.0, 20_000, 0.5),
    "Humanoid-v5": (trained_expert, 7, 4_900.0, 20_000, 0.5),
}
RANDOM_GRIDS = 1_000  # episodes where walls, start or goal are random: most of what a clone needs is more grids


def record(args: Args, policy=None) -> dict[str, np.ndarray]:
    """Play whole episodes one after another, of `policy` or else of the table's expert, and return the arrays of the
    demonstration format."""
    expert, episodes, *_ = TABLE[args.env_id]
    switches = {name: getattr(args, name) for name in GRID_SWITCHES if getattr(args, name)}
    episodes = args.episodes or (RANDOM_GRIDS if switches and expert is grid_expert else episodes)
    if expert is None:
        import pong

        return pong.record(episodes, args.seed, args.cache / "pong")
    if expert is trained_expert:
        expert = policy or trained_expert(args)
    env = gym.make(args.env_id, **switches)
    columns = {name: [] for name in ("observations", "actions", "terminations", "truncations", "rewards")}
    lengths = []
    for episode in range(episodes):
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
    space = env.action_space
    discrete = isinstance(space, gym.spaces.Discrete)
    dtypes = {"observations": np.float32, "actions": np.int64 if discrete else np.float32, "rewards": np.float32}
    arrays = {name: np.asarray(values, dtypes.get(name, bool)) for name, values in columns.items()}
    ends = {"num_actions": space.n} if discrete else {"action_low": space.low, "action_high": space.high}
    return arrays | {"episode_lengths": np.array(lengths), "env_id": np.array(args.env_id)} | {
        name: np.array(value) for name, value in ends.items()}


def episode_returns(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Undiscounted return of each episode."""
    if "returns" in arrays:
        return arrays["returns"]
    first = np.cumsum(arrays["episode_lengths"]) - arrays["episode_lengths"]
    return np.add.reduceat(arrays["rewards"].astype(np.float64), first)


def clone_normalized(args: Args, arrays: dict[str, np.ndarray]) -> float:
    """Normalized return of behavioural cloning on all the demonstrations."""
    updates = TABLE[args.env_id][3] if args.clone_updates is None else args.clone_updates
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "demonstrations.npz"
        np.savez_compressed(path, **arrays)
        common = dict(env_id=args.env_id, demos=str(path), num_demos=0, pretrain_updates=updates, total_timesteps=0,
                      eval_every=updates, out_dir=folder, run_name="clone")
        if args.env_id.startswith("PointMaze"):  # iq_continuous.py has no flag for it
            gym.spec(args.env_id).kwargs["random_start"] = args.random_start
        if TABLE[args.env_id][0] in (trained_expert, pendulum_expert, maze_expert):
            module, settings = iq_continuous, iq_continuous.Args(**common, batch_size=256, actor_lr=3e-4)
        elif args.env_id.startswith("Pong"):
            module, settings = iq_atari, iq_atari.Args(**common, objective="bc")
        else:
            switches = {name: getattr(args, name) for name in GRID_SWITCHES}
            module, settings = iq_discrete, iq_discrete.Args(**common, objective="bc", **switches)
            if any(switches.values()):
                settings = iq_discrete.replace(settings, network="cnn", hidden_size=32)
        module.train(settings)
        *_, saved = module.load_model(f"{folder}/clone/model.pt")
        row = (Path(folder) / "clone" / "metrics.csv").read_text().splitlines()[-1].split(",")
    clone = (float(row[2]) - saved["random_return"]) / (saved["expert_return"] - saved["random_return"])
    print(f"a clone of them reaches a normalized return of {clone:.2f}", flush=True)
    return clone


def main():
    args = tyro.cli(Args)
    folder, switches = (args.out or FOLDER).resolve().parent, [s for s in GRID_SWITCHES if getattr(args, s)]
    usable = {"GridWorld-v0": set(GRID_SWITCHES), "PointMaze-v0": {"random_start"}}.get(args.env_id, set())
    if args.env_id not in TABLE:
        sys.exit(f"--env-id {args.env_id}: expected one of {', '.join(TABLE)}")
    if not usable.issuperset(switches):
        sys.exit(f"--env-id {args.env_id}: it has no switches {', '.join(switches)}")
    if not folder.is_dir():
        sys.exit(f"--out {args.out}: no folder {folder}")
    start = time.time()
    arrays = record(args)
    _, _, least, _, clone_least = TABLE[args.env_id]
    returns = episode_returns(arrays)
    print(f"{args.env_id}: {len(returns)} episodes, {arrays['episode_lengths'].sum()} transitions, "
          f"return {returns.mean():.1f} ± {returns.std():.1f}, {(time.time() - start) / 60:.1f} minutes")
    assert returns.mean() >= least, f"mean return {returns.mean():.1f} below {least}: nothing written"
    if args.clone_updates != 0:
        assert clone_normalized(args, arrays) >= clone_least, f"the clone is below {clone_least}: nothing written"
    name = args.env_id + "".join("-" + s.replace("_", "-") for s in switches)
    with open(args.out or FOLDER / f"{name}.npz", "wb") as file:
        np.savez_compressed(file, **arrays)


if __name__ == "__main__":
    main()
