"""`--mirror`: the images are what the environment would have shown, and training reads them with their own actions."""
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

import iq_discrete
import iq_ilo
import iq_offline

ROOT = Path(__file__).parent.parent


class Still:
    """Stands for a generator: engines that scatter nothing."""

    def uniform(self, low, high, size=None):
        return 0.0 if size is None else np.zeros(size)


def set_mirror_image(env, image) -> None:
    """Put `image` into the state that `env` has in the mirror, both unwrapped."""
    if not hasattr(env, "lander"):  # angles, positions and their rates
        image.state = -np.asarray(env.state)
        return
    from gymnasium.envs.box2d.lunar_lander import SCALE, VIEWPORT_W

    bodies = zip((env.lander, *env.legs), (image.lander, *image.legs[::-1]))
    for body, other in bodies:
        other.position = (VIEWPORT_W / SCALE - body.position.x, body.position.y)
        other.angle, other.angularVelocity = -body.angle, -body.angularVelocity
        other.linearVelocity = (-body.linearVelocity.x, body.linearVelocity.y)


def compare(env_id: str, seed: int, actions, error: float) -> np.ndarray:
    """Play `actions` and their images side by side, up to where a leg touches the ground; returns the last observation."""
    obs_order, action_order = iq_offline.MIRROR[iq_offline.env_name(env_id)]
    env, image = gym.make(env_id), gym.make(env_id)
    env.reset(seed=seed)
    image.reset(seed=seed)
    set_mirror_image(env.unwrapped, image.unwrapped)
    env.unwrapped.np_random = image.unwrapped.np_random = Still()
    for t, action in enumerate(actions):
        obs, shown = env.step(action)[0], image.step(-action if env_id.startswith("Pendulum") else action_order[action])[0]
        expected = iq_discrete.mirrored(torch.as_tensor(obs)[None], obs_order)[0].numpy()
        np.testing.assert_allclose(shown, expected, atol=error, err_msg=f"step {t}")
        if env_id.startswith("LunarLander") and obs[6:].any():
            break
    return obs


# LunarLander's legs hang on joints that its engine solves one after the other, so that the image is nearly the same.
@pytest.mark.parametrize("env_id, steps, error", [("CartPole-v1", 20, 1e-6), ("Acrobot-v1", 60, 1e-4),
                                                  ("LunarLander-v3", 60, 0.01), ("Pendulum-v1", 60, 1e-4)])
def test_the_image_of_an_episode_is_an_episode(env_id, steps, error):
    for seed in range(3):
        space = gym.make(env_id).action_space
        space.seed(seed)
        compare(env_id, seed, [space.sample() for _ in range(steps)], error)


def test_the_other_leg_touches_the_ground_in_the_image():
    for seed in (3, 4, 5, 7):  # these fall on the level part, one leg first
        assert compare("LunarLander-v3", seed, [0] * 100, 0.01)[6:].tolist() == [0, 1]


@pytest.mark.parametrize("script", [iq_discrete, iq_offline, iq_ilo])
def test_demonstrations_come_first_and_their_images_behind_them(script, capsys):
    """With actions of their own, next observations and ends beside them, and first states; the rest stays."""
    actions, more, size = [0, 3, 2, 1], {}, ()
    obs, next_obs, initial = (torch.arange(8.0 * n).view(n, 8) + i for i, n in enumerate((4, 4, 2)))
    rows = {"obs": obs, "next_obs": next_obs, "terminated": torch.tensor([0.0, 0, 0, 1])}
    if script is iq_ilo:
        transitions = iq_ilo.States(**rows)
    else:
        transitions = script.Batch(**rows, action=torch.arange(4))
    if script is iq_discrete:
        more, size = {"end_rate": 0.25}, (4,)
    if script is iq_offline:
        more = {"holdout": transitions, "env_id": "LunarLander-v3", "spaces": iq_offline.Spaces((8,), 4, (), ())}
    demos = script.Demonstrations(transitions=transitions, initial_obs=initial, expert_return=250.0, **more)
    both = script.add_images(demos, "LunarLander", *size)
    signs, places = torch.tensor([-1, 1, -1, 1, -1, -1, 1, 1]), [0, 1, 2, 3, 4, 5, 7, 6]
    for name, own in rows.items():
        image = own if own.dim() == 1 else own[:, places] * signs
        assert torch.equal(getattr(both.transitions, name), torch.cat([own, image])), name
    assert torch.equal(both.initial_obs, torch.cat([initial, initial[:, places] * signs]))
    if script is not iq_ilo:
        assert both.transitions.action.tolist() == [0, 1, 2, 3, *actions]
    assert both.expert_return == 250 and all(getattr(both, name) == value for name, value in more.items())
    assert "8 transitions in all" in capsys.readouterr().out


@pytest.mark.parametrize("add, sizes", [
    (lambda demos: iq_discrete.add_images(demos, "Acrobot", 2), "of shape (6,) and 2 actions, Acrobot has (6,) and 3"),
    (lambda demos: iq_discrete.add_images(demos, "LunarLander", 4), "shape (6,) and 4 actions, LunarLander has (8,) and 4"),
    (lambda demos: iq_ilo.add_images(demos, "LunarLander"), "an observation has shape (6,), LunarLander's (8,)")])
def test_no_image_of_another_task_of_that_name(add, sizes, capsys):
    obs, ends = torch.zeros(2, 6), torch.zeros(2)
    if "LunarLander's" in sizes:
        demos = iq_ilo.Demonstrations(iq_ilo.States(obs, obs, ends), obs, 0.0)
    else:
        demos = iq_discrete.Demonstrations(iq_discrete.Batch(obs, torch.tensor([0, 1]), obs, ends), obs, 0.0, 0.0)
    assert add(demos) is demos
    err = capsys.readouterr().err
    assert err.startswith("warning: no mirror images: ") and sizes in err


@pytest.mark.parametrize("script, flags, message", [
    (iq_discrete, "--env-id GridWorld-v0 --demos {root}/demos/GridWorld-v0.npz", "--mirror: GridWorld is not known"),
    (iq_ilo, "--env-id Hopper-v5", "--mirror: Hopper is not known"),
    (iq_offline, "--env-id Hopper-v5 --num-demos 1", "--mirror: Hopper is not known"),
    (iq_offline, "--demos {tmp}/nameless.npz --num-demos 1", "LunarLander, Pendulum; --env-id tells which task it is"),
])
def test_no_image_where_none_is_known(script, flags, message, tmp_path, capsys):
    ends = np.array([False, True])
    np.savez(tmp_path / "nameless.npz", observations=np.zeros((3, 8), np.float32), actions=np.array([0, 3]),
             terminations=ends, truncations=ends & ~ends, episode_lengths=np.array([2]), env_id=np.array("unknown"))
    arguments = flags.format(root=ROOT, tmp=tmp_path).split() + ["--mirror", "--out-dir", str(tmp_path / "runs")]
    assert script.main(arguments) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("env_id, size, actions, more, message", [
    ("LunarLander-v3", 3, [0, 1], {}, "of shape (3,) and 2 actions, LunarLander has (8,) and 4"),
    ("LunarLander-v3", 8, [[0.5, 0.5], [0, 1]], {}, "of shape (8,) and continuous actions, LunarLander has"),
    ("LunarLander-v3", 8, [0, 4], {}, "of shape (8,) and 5 actions, LunarLander has"),
    ("Acrobot-v1", 6, [0, 1], {"num_actions": np.array(2)}, "of shape (6,) and 2 actions, Acrobot has (6,) and 3"),
    ("CartPole-v1", 2, [0, 1], {}, "of shape (2,) and 2 actions, CartPole has (4,) and 2"),
    ("Pendulum-v1", 3, [0, 1], {}, "of shape (3,) and 2 actions, Pendulum has (3,) and continuous ones"),
    ("Pendulum-v1", 3, [[0.5, 0], [1, 1]], {}, "of shape (3,) and continuous actions, Pendulum has"),
    ("Pendulum-v1", 3, [[-1.5], [2.0]], {}, "of shape (3,) and continuous actions, Pendulum has"),  # bounds from the data
])
def test_a_file_of_other_sizes_under_a_known_name_has_no_images(env_id, size, actions, more, message, tmp_path, capsys):
    """Offline its name alone gave it the setting: LunarLander's continuous actions, or one's own observations or bounds."""
    ends = np.array([False, True])
    np.savez(tmp_path / "own.npz", observations=np.eye(3, size, dtype=np.float32), actions=np.array(actions),
             terminations=ends, truncations=ends & ~ends, episode_lengths=np.array([2]), env_id=np.array(env_id), **more)
    assert iq_offline.main(["--demos", str(tmp_path / "own.npz"), "--num-demos", "1", "--total-updates", "2",
                            "--eval-every", "0", "--out-dir", str(tmp_path), "--run-name", "run"]) == 0
    captured = capsys.readouterr()
    assert f"warning: no mirror images: observations {message}" in captured.err and "images, " not in captured.out
    if np.ndim(actions) == 1:
        network = iq_offline.load_model(tmp_path / "run" / "model.pt")[0]
        assert network.sizes["num_actions"] == max(max(actions) + 1, more.get("num_actions", 0))


@pytest.mark.parametrize("script, names", [(iq_discrete, {"LunarLander"}), (iq_ilo, {"LunarLander"}),
                                           (iq_offline, {"CartPole", "Acrobot", "LunarLander", "Pendulum"})])
def test_whose_settings_have_images_unless_told_otherwise(script, names):
    assert not script.Args().mirror
    for env_id in ("CartPole-v1", "Acrobot-v1", "LunarLander-v3", *["Pendulum-v1"] * (script is iq_offline)):
        assert script.parse_args(["--env-id", env_id]).mirror is (script.env_name(env_id) in names)
        assert not script.parse_args(["--env-id", env_id, "--no-mirror"]).mirror


@pytest.mark.parametrize("env_id, action, image", [("CartPole-v1", 0, 1), ("Acrobot-v1", 1, 1), ("Acrobot-v1", 0, 2)])
def test_the_image_of_an_action_that_alone_is_shown(env_id, action, image, tmp_path, capsys, monkeypatch):
    """Offline, from a file that does not say how many actions there are: the task's name does."""
    with np.load(ROOT / "demos" / f"{env_id}.npz") as file:
        data = {name: file[name] for name in file.files if name != "num_actions"}
    np.savez(tmp_path / "one.npz", **data | {"actions": np.full_like(data["actions"], action)})
    drawn, draw = [], iq_offline.draw
    monkeypatch.setattr(iq_offline, "draw", lambda demos, n: drawn.append(draw(demos, n)) or drawn[-1])
    assert iq_offline.main(["--demos", str(tmp_path / "one.npz"), "--total-updates", "3", "--eval-every", "0",
                            "--out-dir", str(tmp_path), "--run-name", "run"]) == 0
    assert f"action {action} alone" in capsys.readouterr().err
    assert set(torch.cat([batch.action for batch in drawn]).tolist()) == {action, image}
    assert iq_offline.load_model(tmp_path / "run" / "model.pt")[0].sizes["num_actions"] == 2 + (env_id == "Acrobot-v1")


def test_trained_on_images_the_policy_mirrors_with_the_state(tmp_path):
    """CartPole's offline setting, from one trajectory; of the same recorded alone that is not so."""
    obs = 0.1 * torch.randn(1000, 4)
    agreement = {}
    for switch in ("--mirror", "--no-mirror"):
        argv = f"--env-id CartPole-v1 --num-demos 1 --subsample-freq 20 --eval-every 0 --run-name {switch[2:]}".split()
        assert iq_offline.main([*argv, switch, "--out-dir", str(tmp_path)]) == 0
        network, _, _ = iq_offline.load_model(tmp_path / switch[2:] / "model.pt")
        agreement[switch] = (network(obs).argmax(1) + network(-obs).argmax(1) == 1).float().mean().item()
    assert agreement["--mirror"] > 0.98 > 0.9 > agreement["--no-mirror"]


def test_continuous_actions_are_mirrored(tmp_path, monkeypatch):
    """The images behind Pendulum's transitions: the sine of the angle, its rate and the torque with the other sign."""
    drawn, draw = [], iq_offline.draw
    monkeypatch.setattr(iq_offline, "draw", lambda demos, n: drawn.append(demos) or draw(demos, n))
    assert iq_offline.main(["--env-id", "Pendulum-v1", "--num-demos", "2", "--total-updates", "1", "--eval-every", "0",
                            "--out-dir", str(tmp_path)]) == 0
    demos, signs = drawn[0], torch.tensor([1.0, -1, -1])
    assert len(demos.transitions.obs) == 2 * 400 and len(demos.initial_obs) == 4
    obs, action, next_obs, terminated = (field.chunk(2) for field in demos.transitions)
    assert torch.equal(obs[1], obs[0] * signs) and torch.equal(next_obs[1], next_obs[0] * signs)
    assert torch.equal(action[1], -action[0]) and torch.equal(*terminated) and action[0].abs().max() > 0.5
    assert torch.equal(demos.initial_obs[2:], demos.initial_obs[:2] * signs)


def test_the_scripts_agree_on_the_mirror():
    assert iq_offline.MIRROR == iq_discrete.MIRROR | {"Pendulum": ((1, -2, -3), (-1,))}
    assert iq_ilo.MIRROR == {name: obs_order for name, (obs_order, _) in iq_discrete.MIRROR.items()}


@pytest.mark.parametrize("script, flags", [(iq_discrete, "--total-timesteps 20"), (iq_offline, "--total-updates 2"),
                                           (iq_ilo, "--total-timesteps 40 --learning-starts 10 --reward-updates 0")])
def test_training_draws_from_the_images_too(script, flags, tmp_path, monkeypatch):
    """CartPole's observations and their images have a mean of zero, by which they are standardised."""
    common = f"--env-id CartPole-v1 --num-demos 1 --standardize-obs --eval-every 0 --out-dir {tmp_path} {flags}".split()
    drawn, draw = [], script.draw
    monkeypatch.setattr(script, "draw", lambda demos, n: drawn.append(demos.transitions) or draw(demos, n))
    for name in ("mirror", "no-mirror"):
        assert script.main([*common, f"--{name}", "--run-name", name]) == 0
        saved = torch.load(tmp_path / name / "model.pt", weights_only=True)
        means = [value for part in saved.values() if isinstance(part, dict)
                 for key, value in part.items() if key.split(".")[-1] in ("obs_mean", "mean")]
        assert means and all(bool(mean.abs().max() < 1e-6) is (name == "mirror") for mean in means)
    both, alone = drawn[0], drawn[-1]
    assert len(both.obs) == 2 * len(alone.obs)
    assert torch.equal(both.next_obs, torch.cat([alone.next_obs, -alone.next_obs]))
