"""What the scripts share by copy stays the same: a fix goes into every file, or the difference is listed here."""
import ast
import importlib
import itertools
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(path.name for path in ROOT.glob("iq_*.py"))
PAIRS = list(itertools.combinations(SCRIPTS, 2))
SECTIONS = ["Args", "Environment", "Networks", "Demonstrations and replay", "IQ objective", "Evaluate", "Train"]

# Functions, methods and classes of which the scripts have several versions on purpose: who shares which, and why.
VERSIONS = {
    "env_name": ("atari | continuous discrete ilo offline", "Atari ids carry NoFrameskip"),
    "parse_args": ("atari | continuous | discrete | ilo | offline", "one distance; --preset; --missing-action; no --env-id"),
    "validate": ("atari | continuous | discrete | ilo | offline", "other flags"),
    "make_envs": ("atari | continuous | discrete | ilo | offline", "the action spaces and switches of each setting"),
    "start_within": ("continuous | ilo", "a tenth of the run, or half"),
    "QNetwork.__init__": ("atari | continuous | discrete | ilo | offline", "convolutions; any number of layers"),
    "QNetwork.forward": ("atari | continuous | discrete | ilo | offline", "Q(s, ·) or Q(s, a)"),
    "Demonstrations": ("atari | continuous | discrete | ilo | offline", "frames kept once; how often one ends; no actions; "
                       "held-out rows"),
    "read_minari": ("atari continuous discrete | ilo | offline", "actions are not read; their space is"),
    "demonstrations_path": ("atari | continuous | discrete | ilo | offline", "grid, maze, two spellings of a game"),
    "read_demonstrations": ("atari continuous discrete ilo | offline", "sizes and bounds from the file"),
    "check_demonstrations": ("atari discrete | continuous | ilo | offline", "actions of real numbers, none, or either"),
    "load_demonstrations": ("atari | continuous | discrete | ilo | offline", "frames, scaled actions, none, held-out rows"),
    "draw": ("atari | continuous discrete offline | ilo", "stacks are rebuilt from frames; rows without actions"),
    "add_images": ("discrete | ilo | offline", "no actions; as many as the image needs"),
    "Replay.__init__": ("atari | continuous discrete ilo", "single frames, a ring for each environment"),
    "Replay.add": ("atari | continuous discrete ilo", "one frame, whose observation came before"),
    "Replay.sample": ("atari | continuous discrete ilo", "stacks are rebuilt from frames"),
    "Replay.state_dict": ("atari | continuous discrete ilo", "rings"),
    "Replay.load_state_dict": ("atari | continuous discrete ilo", "rings"),
    "soft_value": ("atari discrete offline | continuous", "a sample of the actor, no sum over actions"),
    "implied_reward": ("atari | continuous | discrete | ilo | offline", "the actor's V(s'); the absorbing state's"),
    "iq_loss": ("atari | continuous | discrete | ilo | offline", "each setting's own"),
    "bc_loss": ("atari discrete | offline", "the actor's likelihood too"),
    "sample_action": ("atari discrete | continuous offline", "softmax or tanh-Gaussian"),
    "evaluate": ("atari | continuous ilo | discrete | offline", "who acts; grey video frames"),
    "random_return": ("atari continuous discrete ilo | offline", "--env-id may be left out"),
    "write_video": ("atari | continuous discrete ilo offline", "grey frames, enlarged while writing"),
    "load_model": ("atari discrete | continuous | ilo | offline", "the networks it holds"),
    "Run.__init__": ("atari continuous discrete ilo | offline", "no steps; --env-id may be left out"),
    "Run.report": ("atari continuous discrete ilo | offline", "no steps; held-out rows"),
    "Run.check_finite": ("atari discrete | continuous | ilo | offline", "networks; actions too; the flags that help"),
    "Run.finish": ("atari continuous discrete ilo | offline", "updates, not steps; the environment may be missing"),
    "make_update": ("atari | continuous | discrete | ilo | offline", "the networks that step"),
    "train": ("atari | continuous | discrete | ilo | offline", "each setting's own"),
    "play": ("atari | continuous | discrete | ilo | offline", "switches of the environment; networks"),
    "mlp": ("continuous ilo | offline", "LayerNorm; any number of layers"),
    "Actor.__init__": ("continuous | offline", "any number of layers"),
    "Actor.forward": ("continuous | offline", "statistics of its own"),
    "actor_loss": ("continuous | ilo | offline", "a policy of either kind; cloning on expert rows"),
    "gradient_penalty": ("discrete | offline", "pairs of expert rows; the actor"),
}
# The same for fields of Args: default, type or comment.
FIELD_VERSIONS = {
    "env_id": ("atari | continuous | discrete | ilo | offline", "the task"),
    "seed": ("atari | continuous discrete ilo | offline", "the comment"),
    "pretrain_updates": ("atari | continuous | discrete", "measured; clones the actor"),
    "total_timesteps": ("atari | continuous | discrete | ilo", "measured"),
    "num_envs": ("atari | continuous discrete ilo", "measured"),
    "num_demos": ("atari | continuous ilo | discrete offline", "the paper's protocols"),
    "dones_are": ("atari | continuous discrete ilo offline", "a file of frames"),
    "temperature": ("atari | continuous ilo | discrete offline", "measured; 0 only without an actor"),
    "divergence": ("atari continuous ilo | discrete offline", "chi2 alone"),
    "chi2_alpha": ("atari continuous ilo | discrete offline", "chi2 alone"),
    "value_loss": ("atari discrete | continuous ilo | offline", "measured; no policy rows offline"),
    "target_rate": ("atari discrete | continuous | ilo | offline", "always a target critic with an actor"),
    "average_rate": ("atari | continuous | discrete | ilo | offline", "measured; of the actor"),
    "standardize_obs": ("atari | continuous ilo offline | discrete", "measured; frames have one scale"),
    "learning_rate": ("atari | discrete | offline", "measured"),
    "batch_size": ("atari | continuous ilo | discrete | offline", "measured"),
    "buffer_size": ("atari | continuous ilo | discrete", "size of a transition"),
    "updates_per_step": ("atari | continuous ilo | discrete", "measured"),
    "eval_every": ("atari | continuous | discrete | ilo | offline", "length of a run"),
    "eval_episodes": ("atari continuous ilo | discrete offline", "length of an episode"),
    "checkpoint_every": ("atari | continuous | discrete | ilo | offline", "length of a run"),
    "learning_starts": ("continuous | ilo", "uniformly random actions, for the inverse dynamics"),
    "cloning_weight": ("continuous | offline", "offline it does not fade"),
    "hidden_size": ("continuous ilo | discrete | offline", "measured"),
    "mirror": ("discrete ilo | offline", "continuous actions, too"),
    "actor_lr": ("continuous ilo | offline", "measured"),
    "critic_lr": ("continuous ilo | offline", "measured"),
    "random_start": ("discrete | ilo", "grid or maze"),
}


def definitions(script: str) -> dict[str, str]:
    """Source of each top-level function, method, and class without its methods; no docstring, layout and comments."""
    found = {}
    for node in ast.parse((ROOT / script).read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name != "Args":
            for part in ast.walk(node):
                if isinstance(part, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(part) is not None:
                    part.body = part.body[1:] or [ast.Pass()]
            if isinstance(node, ast.ClassDef):
                methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
                found |= {f"{node.name}.{method.name}": ast.unparse(method) for method in methods}
                node.body = [part for part in node.body if part not in methods] or [ast.Pass()]
            found[node.name] = ast.unparse(node)
    return found


def fields(script: str) -> dict[str, str]:
    """The line of each field of Args, its comment included."""
    source = (ROOT / script).read_text()
    args = next(n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == "Args")
    lines = source.splitlines()
    return {n.target.id: lines[n.lineno - 1].strip() for n in args.body if isinstance(n, ast.AnnAssign)}


def versions(read) -> dict[str, str]:
    """For each name that two scripts have and that is not the same in all of them: which scripts agree on it."""
    sources, found = {script: read(script) for script in SCRIPTS}, {}
    for name in {name for source in sources.values() for name in source}:
        groups = {}
        for script, source in sources.items():
            if name in source:
                groups.setdefault(source[name], []).append(script.removeprefix("iq_").removesuffix(".py"))
        if len(groups) > 1:
            found[name] = " | ".join(sorted(" ".join(group) for group in groups.values()))
    return found


@pytest.mark.parametrize("read, table", [(definitions, VERSIONS), (fields, FIELD_VERSIONS)])
def test_same_or_listed(read, table):
    assert versions(read) == {name: groups for name, (groups, _) in table.items()}


def per_environment(table: str, setting: str | None = None) -> set[tuple]:
    """(environment, value) pairs of a table, or of one setting in it, over all scripts."""
    tables = [getattr(importlib.import_module(Path(script).stem), table) for script in SCRIPTS]
    return {(name, value if setting is None else value[setting]) for table in tables for name, value in table.items()
            if setting is None or setting in value}


@pytest.mark.parametrize("table, setting", [("RANDOM_RETURN", None), ("SETTINGS", "obs_dims")])
def test_what_is_true_of_an_environment_is_the_same_in_all_scripts(table, setting):
    pairs = per_environment(table, setting)
    assert len(pairs) > 1 and len(pairs) == len({name for name, _ in pairs}), sorted(pairs)


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
