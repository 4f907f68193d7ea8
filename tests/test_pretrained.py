"""Policies that come with the package, and policies for others."""

import shutil

import numpy as np
import pytest
import torch as th
from safetensors.torch import load

from sb3_qsm import QSM
from sb3_qsm.export import load_policy, save_policy
from sb3_qsm.pretrained import FOLDER, load_pretrained, make_task, play, pretrained_tasks, upload_policy, write_policy

TASKS = pretrained_tasks()
SMALL = dict(batch_size=8, learning_starts=10, buffer_size=200, seed=3, device="cpu")


@pytest.fixture(scope="module")
def model():
    return QSM("MlpPolicy", "Pendulum-v1", policy_kwargs=dict(net_arch=[16], embedding_dim=8), **SMALL).learn(40)


@pytest.mark.parametrize("embedding_dim", [8, None])
def test_compact_file_acts_with_the_running_mean(tmp_path, embedding_dim):
    model = QSM("MlpPolicy", "Pendulum-v1", policy_kwargs=dict(net_arch=[16], embedding_dim=embedding_dim), **SMALL)
    model.learn(40)
    for compact in (False, True):
        save_policy(model, tmp_path / f"{compact}", card={"answer": 42}, compact=compact)
    whole, small = (load_policy(tmp_path / name) for name in ("False", "True"))
    assert whole.card == small.card == {"answer": 42}
    observations = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32)
    expected = whole.predict(observations, deterministic=True)
    assert expected.std() > 0.01
    np.testing.assert_allclose(small.predict(observations, deterministic=True), expected, atol=5e-3)
    # Drawn with the mean, too, from the same noise
    noise = th.as_tensor(np.random.default_rng(1).normal(size=(*whole.noise_shape[:1], 200, 1)).astype(np.float32))
    with th.no_grad():
        drawn = [policy(noise, th.as_tensor(observations), average=mean) for policy, mean in [(whole, True), (small, False)]]
        assert (drawn[0] - whole(noise, th.as_tensor(observations))).abs().max() > 0.01
    th.testing.assert_close(*drawn, atol=5e-3, rtol=0)
    sizes = [sum(value.nbytes for value in load((tmp_path / name).read_bytes()).values()) for name in ("False", "True")]
    assert sizes[1] < 0.4 * sizes[0]


def test_written_policy(model, tmp_path):
    """The card says what the file does."""
    yaml = pytest.importorskip("yaml")
    pytest.importorskip("huggingface_hub")
    path = write_policy(model, "Pendulum-v1", tmp_path / "new", "the command", n_episodes=3)
    assert path == tmp_path / "new" / "Pendulum-v1.safetensors"
    policy = load_policy(path)
    assert policy.card | {"versions": None} == {
        "task": "Pendulum-v1",
        "n_timesteps": 40,
        "seed": 3,
        "command": "the command",
        "versions": None,
        "returns": policy.card["returns"],
    }
    episodes = play(policy, make_task("Pendulum-v1"))
    assert [next(episodes) for _ in range(3)] == pytest.approx(policy.card["returns"], abs=0.01)
    _, header, text = path.with_suffix(".md").read_text().split("---\n", 2)
    mean, std = np.mean(policy.card["returns"]), np.std(policy.card["returns"])
    assert f"Mean return **{mean:.1f}**, standard deviation {std:.1f}, in 3 deterministic episodes, after 40 steps" in text
    assert "```bash\nthe command\n```" in text
    (result,) = yaml.safe_load(header)["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == f"{mean:.1f} +/- {std:.1f}"
    code = text.split("```python\n")[1].split("```")[0].replace('"Pendulum-v1.safetensors"', f'"{path}"')
    exec(code, namespace := {})
    assert namespace["action"].shape == (1,)


def test_upload(model, tmp_path, monkeypatch):
    """To a folder that stands for the Hub."""
    huggingface_hub = pytest.importorskip("huggingface_hub")

    class Folder:
        def create_repo(self, repo, exist_ok):
            (tmp_path / repo).mkdir(parents=True, exist_ok=exist_ok)
            return tmp_path / repo

        def upload_file(self, path_or_fileobj, path_in_repo, repo_id):
            shutil.copy(path_or_fileobj, tmp_path / repo_id / path_in_repo)

    monkeypatch.setattr(huggingface_hub, "HfApi", Folder)
    path = write_policy(model, "Pendulum-v1", tmp_path / "here", "the command", n_episodes=1)
    assert upload_policy(path, "me/policies") == str(tmp_path / "me" / "policies")
    assert {it.name for it in (tmp_path / "me" / "policies").iterdir()} == {"README.md", "Pendulum-v1.safetensors"}
    assert (tmp_path / "me" / "policies" / "README.md").read_text() == path.with_suffix(".md").read_text()


@pytest.mark.parametrize("task", TASKS)
def test_policy_that_comes_along(task):
    """It does what its card says, as far as other machines round alike."""
    if task.startswith("dm_control/"):
        pytest.importorskip("dm_control")
    policy = load_pretrained(task)
    assert policy.card["task"] == task and len(policy.card["returns"]) == 10
    returns = policy.card["returns"]
    assert next(play(policy, make_task(task))) > min(returns) - 0.5 * abs(np.mean(returns))
    card = (FOLDER / f"{task}.md").read_text()
    assert f"Mean return **{np.mean(policy.card['returns']):.1f}**" in card and policy.card["command"] in card


def test_all_policies_are_small():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*.*")) < 5e6


def test_unknown_task():
    with pytest.raises(ValueError, match=r"task must be one of \[.*'Ant-v5'.*\], got 'Nowhere-v0'"):
        load_pretrained("Nowhere-v0")
