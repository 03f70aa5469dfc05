"""What the scripts share by copy stays the same: a fix goes into every file, or the difference is listed here."""
import ast
import itertools
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(path.name for path in ROOT.glob("iq_*.py"))
PAIRS = list(itertools.combinations(SCRIPTS, 2))
SECTIONS = ["Args", "Environment", "Networks", "Demonstrations and replay", "IQ objective", "Evaluate", "Train"]

# What differs between iq_continuous.py and either of the others: an actor and a critic, actions of real numbers.
CONTINUOUS = {
    "parse_args": "--preset",
    "validate": "other flags",
    "make_envs": "a bounded Box of actions; no grid, no emulator",
    "QNetwork": "Q(s, a) of one action",
    "demonstrations_path": "no grid, no second spelling of a name",
    "check_demonstrations": "actions beyond the bounds are clipped",
    "load_demonstrations": "actions are scaled to [-1, 1]",
    "soft_value": "a sample of the actor, no sum over actions",
    "implied_reward": "the actor's V(s')",
    "iq_loss": "the actor, clipped targets; χ² alone",
    "sample_action": "the actor's tanh-Gaussian",
    "evaluate": "the actor acts",
    "load_model": "actor and critic",
    "make_update": "a step of the critic and one of the actor",
    "train": "actor, critic and two optimizers",
    "play": "actor; no grid switches",
}
CONTINUOUS_FIELDS = {
    "env_id": "the task", "pretrain_updates": "clones the actor", "total_timesteps": "", "num_demos": "the paper's one",
    "temperature": "never 0", "value_loss": "measured", "target_rate": "always a target critic", "average_rate": "measured",
    "standardize_obs": "measured", "batch_size": "", "buffer_size": "", "updates_per_step": "no cloning to count for",
    "eval_every": "", "checkpoint_every": "",
}

# What differs between iq_ilo.py and any of the others: no actions of the expert's, and both kinds of actions.
ILO = {
    "validate": "other flags",
    "make_envs": "both kinds of actions, and the maze",
    "QNetwork": "both kinds of actions",
    "Demonstrations": "States, which have no action",
    "read_minari": "actions are not read",
    "demonstrations_path": "the maze's files; actions are not asked for",
    "check_demonstrations": "actions are not read",
    "load_demonstrations": "actions are not read",
    "draw": "States, which have no action",
    "implied_reward": "a policy of either kind",
    "iq_loss": "a policy of either kind",
    "load_model": "policy, critic and the reward of the state",
    "make_update": "the inverse-dynamics model",
    "train": "the inverse-dynamics model, both kinds of actions, the reward of the state",
    "play": "the maze's switches",
}
ILO_FIELDS = {"env_id": "the task", "target_rate": "none with discrete actions", "checkpoint_every": "", "eval_every": ""}

# Top-level functions and classes that two scripts both have and that differ on purpose, with the reason.
INTENDED = {
    ("iq_atari.py", "iq_continuous.py"): CONTINUOUS | {
        "env_name": "Atari ids carry NoFrameskip",
        "Demonstrations": "frames are kept once, transitions are indices into them",
        "draw": "stacks are rebuilt from frames",
        "Replay": "single frames",
    },
    ("iq_continuous.py", "iq_discrete.py"): CONTINUOUS,
    ("iq_atari.py", "iq_discrete.py"): {
        "validate": "other flags",
        "env_name": "Atari ids carry NoFrameskip",
        "make_envs": "the emulator's own vector environment",
        "QNetwork": "convolutions over frames",
        "Demonstrations": "frames are kept once, transitions are indices into them",
        "demonstrations_path": "one file serves both spellings of a game; no grid",
        "load_demonstrations": "recorded actions are simulated again",
        "draw": "stacks are rebuilt from frames",
        "Replay": "single frames",
        "iq_loss": "chi2 alone",
        "evaluate": "uint8 observations, grey video frames",
        "make_update": "no observation noise",
        "train": "frames, bfloat16",
        "play": "no grid switches",
    },
    ("iq_continuous.py", "iq_ilo.py"): ILO | {"parse_args": "--preset", "actor_loss": "its own sample and terms"},
    ("iq_discrete.py", "iq_ilo.py"): ILO | {"evaluate": "a policy of either kind acts"},
    ("iq_atari.py", "iq_ilo.py"): ILO | {
        "env_name": "Atari ids carry NoFrameskip", "Replay": "single frames", "evaluate": "a policy of either kind acts",
    },
    ("iq_ilo.py", "iq_offline.py"): ILO | {
        "actor_loss": "its own sample and terms", "evaluate": "a policy of either kind acts", "log_density": "",
        "mlp": "", "parse_args": "no table of settings", "random_return": "no environment", "read_demonstrations":
        "actions and spaces from the file",
    },
}
# The same for fields of Args that both have: default, type or comment.
INTENDED_FIELDS = {
    ("iq_atari.py", "iq_continuous.py"): CONTINUOUS_FIELDS | {
        "seed": "the comment", "num_envs": "", "dones_are": "a file of frames",
    },
    ("iq_continuous.py", "iq_discrete.py"): CONTINUOUS_FIELDS | {
        "divergence": "chi2 alone", "chi2_alpha": "chi2 alone", "hidden_size": "no grid", "eval_episodes": "",
    },
    ("iq_atari.py", "iq_discrete.py"): {
        "env_id": "the task", "pretrain_updates": "", "total_timesteps": "", "num_envs": "", "num_demos": "",
        "dones_are": "a file of frames", "temperature": "the published settings", "divergence": "chi2 alone",
        "chi2_alpha": "chi2 alone", "learning_rate": "", "batch_size": "", "updates_per_step": "", "buffer_size": "",
        "eval_every": "", "eval_episodes": "", "seed": "the comment",
        "average_rate": "measured", "standardize_obs": "frames have one scale",
    },
    ("iq_continuous.py", "iq_ilo.py"): ILO_FIELDS | {"learning_starts": "random actions, for the model's sake"},
    ("iq_discrete.py", "iq_ilo.py"): ILO_FIELDS | {
        "average_rate": "measured", "batch_size": "", "buffer_size": "", "chi2_alpha": "chi2 alone",
        "divergence": "chi2 alone", "eval_episodes": "", "hidden_size": "no grid", "num_demos": "the paper's one",
        "random_start": "another environment", "standardize_obs": "measured", "temperature": "measured",
        "total_timesteps": "", "updates_per_step": "no cloning to count for", "value_loss": "measured",
    },
    ("iq_atari.py", "iq_ilo.py"): ILO_FIELDS | {
        "average_rate": "measured", "batch_size": "", "buffer_size": "", "dones_are": "a file of frames", "num_demos": "",
        "num_envs": "", "seed": "the comment", "standardize_obs": "frames have one scale", "temperature": "measured",
        "total_timesteps": "", "updates_per_step": "", "value_loss": "measured",
    },
}


def definitions(script: str) -> dict[str, str]:
    """Source of each top-level function and class, without docstring, layout and comments."""
    found = {}
    for node in ast.parse((ROOT / script).read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name != "Args":
            for part in ast.walk(node):
                if isinstance(part, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(part) is not None:
                    part.body = part.body[1:] or [ast.Pass()]
            found[node.name] = ast.unparse(node)
    return found


def fields(script: str) -> dict[str, str]:
    """The line of each field of Args, its comment included."""
    source = (ROOT / script).read_text()
    args = next(n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == "Args")
    lines = source.splitlines()
    return {n.target.id: lines[n.lineno - 1].strip() for n in args.body if isinstance(n, ast.AnnAssign)}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("read, table", [(definitions, INTENDED), (fields, INTENDED_FIELDS)])
def test_same_or_listed(pair, read, table):
    one, other = map(read, pair)
    different = {name for name in one.keys() & other.keys() if one[name] != other[name]}
    listed = set(table.get(pair, {}))
    assert different - listed == set(), "changed in one file alone"
    assert listed - different == set(), "listed as different, and the same"


@pytest.mark.parametrize("script", SCRIPTS)
def test_sections_in_order(script):
    banners = [line.strip("# -") for line in (ROOT / script).read_text().splitlines() if line.startswith("# ----")]
    assert banners == SECTIONS


@pytest.mark.parametrize("pair", PAIRS)
def test_fields_in_the_same_order(pair):
    one, other = (list(fields(script)) for script in pair)
    shared = [name for name in one if name in other]
    assert shared == [name for name in other if name in one]


@pytest.mark.parametrize("script", SCRIPTS)
def test_imports_nothing_of_this_repository(script):
    own = {path.stem for path in ROOT.glob("*.py")} | {"tests", "demos", "reproduce"}
    for node in ast.walk(ast.parse((ROOT / script).read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        assert not {name.split(".")[0] for name in names} & own
