"""The README, the requirements and the results agree with the code and with each other."""
import ast
import csv
import dataclasses
import importlib
import re
import shlex
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(path.stem for path in ROOT.glob("iq_*.py"))
README = (ROOT / "README.md").read_text()
sys.path.insert(0, str(ROOT / "reproduce"))


def pinned(text: str) -> dict[str, str]:
    return dict(re.findall(r"([a-z-]+)(?:\[[a-z0-9,-]+\])?==([\d.]+)", text))


@pytest.mark.parametrize("script", SCRIPTS)
def test_inline_metadata_agrees_with_requirements(script):
    head = re.match(r"# /// script\n((?:#.*\n)+?)# ///\n", (ROOT / f"{script}.py").read_text()).group(1)
    metadata = tomllib.loads("".join(line[2:] or "\n" for line in head.splitlines(keepends=True)))
    own, tested = pinned(" ".join(metadata["dependencies"])), pinned((ROOT / "requirements.txt").read_text())
    assert len(own) == len(metadata["dependencies"]) and own.items() <= tested.items()
    nodes = list(ast.walk(ast.parse((ROOT / f"{script}.py").read_text())))
    imported = {alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module.split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}
    third_party = {name for name in imported if name not in sys.stdlib_module_names} - {"minari"}
    assert third_party == {name.replace("-", "_") for name in own}


def flags_of(script: str) -> set[str]:
    return {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(importlib.import_module(script).Args)}


def flags_in(text: str) -> set[str]:
    """The flags that a text names, `--no-` taken off."""
    return {re.sub("^--no-", "--", flag) for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text)} - {"--help"}


def test_every_flag_in_the_readme_exists():
    used = flags_in(README)
    assert used <= set().union(*map(flags_of, SCRIPTS)), used


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_that_a_script_or_its_command_names_is_its_own(script):
    """Messages, comments and docstrings of the script, and the README's commands that run it."""
    commands = re.findall(rf"python {script}\.py([^`\n|]*)", README)
    used = flags_in((ROOT / f"{script}.py").read_text() + " ".join(commands))
    assert used <= flags_of(script), used - flags_of(script)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_field_has_a_comment_that_help_prints(script):
    source = (ROOT / f"{script}.py").read_text()
    for field in dataclasses.fields(importlib.import_module(script).Args):
        assert re.search(rf"^    {field.name}: .+  # [\w|]", source, re.M), field.name


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_setting_draws_more_trajectories_than_are_bundled(script):
    module, checked = importlib.import_module(script), 0
    for path in (ROOT / "demos").glob("*.npz"):
        if path.stem.split("-")[0] in (module.SETTINGS or {"PongNoFrameskip"}):
            with np.load(path) as file:
                assert module.parse_args(["--env-id", path.stem]).num_demos <= len(file["episode_lengths"]), path.stem
            checked += 1
    assert checked


def test_the_readme_is_short_and_has_one_line_for_each_set_up_command():
    assert len(README.splitlines()) <= 150
    commands = re.findall(r"^pip install .*$", README, re.M)
    assert len(commands) == 2 and "iq_atari.py" in commands[0] and commands[1].endswith("pytest")


@pytest.mark.parametrize("name", ["discrete", "pong", "figure2_offline", "table3_mujoco", "offline_mujoco", "table6_ilo",
                                  "figure5_maze", "figure12_rewards", "speed", "ladder_mujoco"])
def test_the_tables_are_made_from_the_csv_files(name):
    """reproduce/<name>.md is what <name>.csv gives."""
    module = importlib.import_module(name)
    with open(ROOT / "reproduce" / f"{name}.csv") as file:
        rows = list(csv.DictReader(file))
    assert rows and all(row["commit"] and row["command"] for row in rows)
    assert module.table(rows) == (ROOT / "reproduce" / f"{name}.md").read_text()


@pytest.mark.parametrize("path", sorted((ROOT / "reproduce").glob("*.csv")), ids=lambda path: path.stem)
def test_the_commits_of_the_rows_are_in_the_history(path):
    def git(*command):
        return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True)

    if git("rev-parse", "--is-shallow-repository").stdout.strip() != "false":
        pytest.skip("no history here")
    with open(path) as file:
        named = {row["commit"] for row in csv.DictReader(file) if "commit" in row}
    assert [name for name in named if git("merge-base", "--is-ancestor", name, "HEAD").returncode] == []


def test_table_3_ran_with_the_settings_that_the_script_has_now():
    """The command of a row, read as the script reads it, is the plain `--env-id X` but for seed, place, device, readings."""
    import iq_continuous

    with open(ROOT / "reproduce" / "table3_mujoco.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["method"] == "iq"]
    assert {row["task"] for row in rows} == set(importlib.import_module("table3_mujoco").TASKS)
    for row in rows:
        ran = dataclasses.asdict(iq_continuous.parse_args(shlex.split(row["command"])[2:]))
        now = dataclasses.asdict(iq_continuous.parse_args(["--env-id", row["task"]]))
        may_differ = {"seed", "run_name", "out_dir", "cuda", "eval_every"}
        assert {name for name in ran if ran[name] != now[name]} <= may_differ, row["task"]


@pytest.mark.parametrize("name", ["discrete", "table3_mujoco", "table6_ilo"])
def test_online_rows_ran_for_as_long_as_their_commands_take_now(name):
    with open(ROOT / "reproduce" / f"{name}.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["steps"] != "0"]
    for row in rows:
        _, script, *flags = shlex.split(row["command"])
        now = importlib.import_module(script.removesuffix(".py")).parse_args(flags)
        assert int(row["steps"]) == now.total_timesteps, row["command"]


def test_runs_of_a_table_go_on_where_they_were_stopped(tmp_path, monkeypatch):
    """What is in the csv stays; a directory that a stopped run left is made anew."""
    import common

    monkeypatch.setattr(common, "ROOT", tmp_path)
    (tmp_path / "runs" / "b").mkdir(parents=True)
    script, length = ROOT / "iq_offline.py", "--total-updates 2 --eval-episodes 1"
    jobs = [({"task": name}, f"{script} --env-id CartPole-v1 {length} --run-name {name}") for name in "ab"]
    (first,) = common.run_all(jobs[:1], tmp_path / "table.csv", cores=(0,))
    rows = common.run_all(jobs, tmp_path / "table.csv", cores=(0,))
    assert rows[0] == first and [row["task"] for row in rows] == ["a", "b"] and rows[1]["updates"] == "2"


def test_the_table_of_the_readme_is_made_from_the_csv_files():
    import summary

    assert summary.table() in README


def mean(name: str, column: str = "eval_return", **labels: str) -> float:
    """The mean of a column over those rows of reproduce/<name>.csv that have `labels`."""
    with open(ROOT / "reproduce" / f"{name}.csv") as file:
        values = [float(row[column]) for row in csv.DictReader(file) if labels.items() <= row.items()]
    assert values, (name, labels)
    return float(np.mean(values))


def test_the_numbers_between_the_tables_are_those_of_the_csv_files():
    one, offline, recorded = {"demos": "1"}, {"demos": "10"}, "LunarLander, as recorded"
    curve = {"name": "pong_curves", "column": "eval_return_mean", "updates": "4000"}
    sentences = [
        f"from one trajectory online {mean('discrete', task=recorded, method='iq', **one):.0f} "
        f"(cloning {mean('discrete', task=recorded, method='bc', **one):.0f}; "
        f"{mean('discrete', task=f'{recorded}, play in the loss', **one):.0f} with play in the loss".replace("-", "−"),
        f"from observations {mean('table6_ilo', task='LunarLander-v3', method='idm, not mirrored', **one):.0f}, "
        + ", ".join(f"{words} {mean('figure2_offline', task=f'{task}, as recorded', method='chi2', **one):.0f} "
                    f"({mean('figure2_offline', task=f'{task}, as recorded', method='bc', **one):.0f})".replace("-", "−")
                    for words, task in (("offline", "LunarLander"), ("where CartPole has", "CartPole"),
                                        ("Acrobot", "Acrobot"))),
        "Offline, mirrored, from 1 / 3 / 7 / 10 / 15, LunarLander has " + ", Acrobot ".join(" / ".join(
            f"{mean('figure2_offline', task=task, method='chi2', demos=str(n)):.0f}".replace("-", "−")
            for n in (1, 3, 7, 10, 15)) for task in ("LunarLander", "Acrobot")),
        "Pong models score " + ", clones ".join(", ".join(f"{mean('pong', 'mean_of_48', method=method, seed=seed):.1f}"
                                                for seed in ("106", "107", "108")) for method in ("iq", "bc")),
        f"after 4,000 updates: {mean(method='iq', **curve):.1f}, clones {mean(method='bc', **curve):.1f}",
        "After 6,000, tuning seeds 1 to 3: " + " over the 48, with play in the loss ".join(
            ", ".join(f"{mean('pong', 'mean_of_48', method=method, seed=seed):.1f}" for seed in "123")
            for method in ("iq-6000", "iq-play")),
        f"(Pong, 6,000 updates: {mean('pong', 'mean_of_48', method='iq-6000'):.1f}, the last ones "
        f"{mean('pong', 'last_weights_mean_of_48', method='iq-6000'):.1f})",
        f"Walker2d has {mean('offline_mujoco', task='Walker2d-v5', method='iq', **offline):.0f} "
        f"(cloning {mean('offline_mujoco', task='Walker2d-v5', method='bc', **offline):.0f})",
        "over 20 more draws of one, " + ", ".join(
            f"{words} {mean('figure2_draws', task=task, demos=n, method='chi2'):.0f} "
            f"({cloned}{mean('figure2_draws', task=task, demos=n, method='bc'):.0f})".replace("-", "−")
            for words, cloned, task, n in (("CartPole has", "cloning ", "CartPole", "1"), ("Acrobot", "", "Acrobot", "1"),
                                           ("LunarLander", "", "LunarLander", "1"), ("from three", "", "LunarLander", "3"),
                                           ("from seven", "", "LunarLander", "7"),
                                           ("from all 30", "", "LunarLander", "30"))),
        f"Ant {mean('offline_mujoco', task='Ant-v5', method='iq', **offline):.0f} "
        f"({mean('offline_mujoco', task='Ant-v5', method='bc', **offline):.0f})",
        f"from five, mirrored, Pendulum {mean('offline_mujoco', task='Pendulum-v1', method='iq', demos='5'):.0f} "
        f"({mean('offline_mujoco', task='Pendulum-v1', method='bc', demos='5'):.0f})".replace("-", "−"),
    ]
    shares = {variant: [mean("ladder_mujoco", task=task, variant=variant) / mean("ladder_mujoco", "expert", task=task)
                        for task in ("Hopper-v5", "Walker2d-v5")]
              for variant in ("as they are", "raw observations", "no LayerNorm", "no moving average", "targets not clipped")}
    words = ("three tuning seeds: ", "raw ", "LayerNorm in the critic (without it ", "a moving average (without it ",
             "V(s') clipped at ±4α/(1−γ) (without it ")
    sentences += [f"{before}{hopper:.2f} and {walker:.2f}" for before, (hopper, walker) in zip(words, shares.values())]
    assert mean("pong", "lost_of_48", method="iq") == 0 and mean("pong", "lost_of_48", method="bc") == 17 / 3
    text = " ".join(README.split())
    assert [sentence for sentence in sentences if sentence not in text] == []
    pong = [f"{mean('pong', method='iq', seed=seed):.1f}" for seed in ("106", "107", "108")]
    assert f"{pong[0]}, {pong[1]} and {pong[2]}" in (ROOT / "iq_atari.py").read_text()
    played, without = (" / ".join(f"{mean('pong', 'mean_of_48', method=method, seed=seed):.1f}" for seed in "123")
                       for method in ("iq-play", "iq-6000"))
    assert f"scored {played} on average (tuning seeds 1 to 3), without it {without}." in " ".join(
        importlib.import_module("iq_atari").__doc__.split())
    docstring = " ".join(importlib.import_module("iq_continuous").__doc__.split())
    for task in importlib.import_module("table3_mujoco").TASKS:
        named = {"task": task, "method": "iq"}
        own, expert, steps = (mean("table3_mujoco", name, **named) for name in ("eval_return", "expert", "steps"))
        cloned = mean("table3_mujoco", task=task, method="bc")
        assert re.search(rf"{task} (scores )?{own:.0f} [^;]*of (an expert's )?{expert:.0f} [^;]*{steps:,.0f}[ ,][^;]*"
                         rf"cloning (alone: )?{cloned:.0f}\b", docstring.replace("; cloning", ", cloning")), task


def test_the_steps_that_cartpole_needs_are_those_of_its_curves():
    rows, curves = ([row for row in csv.DictReader((ROOT / "reproduce" / f"{name}.csv").read_text().splitlines())
                     if row["task"] == "CartPole, 1 in 20" and row["demos"] == "1" and row.get("method", "iq") == "iq"]
                    for name in ("discrete", "discrete_curves"))
    steps = [int(importlib.import_module("discrete").steps_to_expert(row, curves)) for row in rows]
    docstring = " ".join(importlib.import_module("iq_discrete").__doc__.split())
    assert len(steps) == 5 and f"for the first time after {min(steps):,} to {max(steps):,};" in docstring


def test_what_play_in_the_loss_costs_on_lunar_lander_is_said_beside_its_settings():
    comments = " ".join((ROOT / "iq_discrete.py").read_text().replace("# ", "").split())
    for demos, words in (("1", "from one trajectory"), ("10", "from ten")):
        played = mean("discrete", task="LunarLander, as recorded, play in the loss", demos=demos)
        own = mean("discrete", task="LunarLander, as recorded", method="iq", demos=demos)
        assert f"{played:.0f} instead of {own:.0f} {words}" in comments
    cnn, mlp = (mean("discrete", "success", task=f"GridWorld, random walls, {net}", method="iq") for net in ("CNN", "MLP"))
    assert f"{100 * cnn:.0f} of 100 goals are reached, by the MLP {100 * mlp:.0f}." in comments


def test_what_the_mirror_is_worth_is_said_beside_the_settings():
    """And the scores in a docstring are those of the setting, not those that the tables have without images."""
    discrete, offline, ilo = ((ROOT / f"iq_{name}.py").read_text() for name in ("discrete", "offline", "ilo"))
    one = {"demos": "1"}
    assert f"Mirrored, {mean('discrete', task='LunarLander', method='iq', **one):.0f} from one trajectory" in discrete
    own, without = (" / ".join(f"{mean('figure2_offline', task=task + label, method='chi2', **one):.0f}".replace("-", "−")
                               for task in ("CartPole", "Acrobot", "LunarLander")) for label in ("", ", as recorded"))
    assert f"mirrored. From one trajectory {own}, {without} without." in offline
    own, expert, without = (f"−{-mean('offline_mujoco', column, task=f'Pendulum-v1{rest}', method='iq', demos='5'):.0f}"
                            for column, rest in (("eval_return", ""), ("expert", ""), ("eval_return", ", as recorded")))
    assert f"DEVIATION: from five trajectories {own} of {expert}, {without} without" in offline
    own, without = (mean("table6_ilo", task="LunarLander-v3", method=f"idm{rest}", **one) for rest in ("", ", not mirrored"))
    assert f"DEVIATION: {own:.0f} from one trajectory, {without:.0f} without" in ilo
    from_ten = mean("table6_ilo", task="LunarLander-v3", method="idm", demos="10")
    assert re.search(rf"LunarLander-v3 {own:.1f} ± [\d.]+ of [\d.]+ from one, {from_ten:.1f} ± ", ilo)


@pytest.mark.parametrize("name", ["discrete", "figure2_offline", "figure2_draws", "table6_ilo"])
def test_rows_of_lunar_lander_are_labelled_by_whether_they_are_mirrored(name):
    """Those without images are from before there was such a flag, or have `--no-mirror`; none of the others."""
    with open(ROOT / "reproduce" / f"{name}.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["task"].startswith("LunarLander")]
    mirrored = [row for row in rows if row["task"] == "LunarLander" or row["method"] in ("idm", "with actions")]
    before = {row["commit"] for row in rows if row not in mirrored and "--no-mirror" not in row["command"]}
    assert mirrored and before and len(mirrored) < len(rows)
    assert not any("--no-mirror" in row["command"] or row["commit"] in before for row in mirrored)


@pytest.mark.parametrize("name", ["figure2_offline", "figure2_draws"])
@pytest.mark.parametrize("task", ["CartPole", "Acrobot"])
def test_offline_rows_are_labelled_by_whether_they_are_mirrored(name, task):
    """Those of the other two tasks were all run at one commit, which had the flag."""
    with open(ROOT / "reproduce" / f"{name}.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["task"].startswith(task)]
    runs = {"figure2_offline": 5 * 3 * 5, "figure2_draws": 2 * 20}[name]  # seeds, methods, numbers of trajectories
    assert Counter(row["task"] for row in rows) == {task: runs, f"{task}, as recorded": runs}
    assert all(("--no-mirror" in row["command"]) is (row["task"] != task) for row in rows)
    assert len({row["commit"] for row in rows}) == 1


def test_offline_rows_of_pendulum_are_labelled_by_whether_they_are_mirrored():
    with open(ROOT / "reproduce" / "offline_mujoco.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["task"].startswith("Pendulum")]
    assert Counter(row["task"] for row in rows) == {"Pendulum-v1": 12, "Pendulum-v1, as recorded": 12}
    assert all(("--no-mirror" in row["command"]) is (row["task"] != "Pendulum-v1") for row in rows)
    assert len({(row["method"], row["commit"]) for row in rows}) == 2  # both labels of a method at one commit


# Least number of episodes in a file, where they are too large for the 30 of all the others.
EPISODES = {"HalfCheetah-v5": 25, "Hopper-v5": 25, "Walker2d-v5": 25, "Ant-v5": 25, "Humanoid-v5": 7}


def test_demonstrations_are_small_and_as_their_readme_says():
    files = sorted((ROOT / "demos").glob("*.npz"))
    sizes = {path.stem: path.stat().st_size for path in files}
    assert sum(sizes.values()) < 25e6
    assert sum(size for name, size in sizes.items() if name not in EPISODES) < 10e6
    assert all(size < (8e6 if name == "Humanoid-v5" else 4e6) for name, size in sizes.items())
    text = (ROOT / "demos" / "README.md").read_text()
    for path in files:
        data = np.load(path)
        first = np.cumsum(data["episode_lengths"]) - data["episode_lengths"]
        returns = data["returns"] if "returns" in data else np.add.reduceat(data["rewards"].astype(float), first)
        line = next((line for line in text.splitlines() if line.startswith(f"| `{path.name}`")), "")
        assert line, f"{path.name} is not in demos/README.md"
        assert f"| {len(returns)} | {returns.mean():.1f} ± {returns.std():.1f} |" in line
        assert len(returns) >= EPISODES.get(path.stem, 30)


@pytest.mark.parametrize("path", sorted(ROOT.glob("iq_*.py")), ids=lambda path: path.stem)
def test_scores_in_a_docstring_are_those_of_a_table(path):
    """Each `mean ± deviation` there stands in a table of `reproduce/`, which another test holds to its csv."""
    score = re.compile(r"[\d.]+ ± \d+(?:\.\d+)?")
    tables = " ".join(table.read_text() for table in (ROOT / "reproduce").glob("*.md") if table.name != "NOTES.md")
    scores = set(score.findall(ast.get_docstring(ast.parse(path.read_text()))))
    assert scores <= set(score.findall(tables)), scores - set(score.findall(tables))


def test_ruff_finds_nothing():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", ROOT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
