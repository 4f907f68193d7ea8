"""The rl-zoo launcher: real, short runs."""

import inspect
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch as th
import yaml
from stable_baselines3 import SAC
from torch import nn

from sb3_qsm import QSM, zoo
from sb3_qsm.published import PUBLISHED
from sb3_qsm.resume import checkpoints

optuna = pytest.importorskip("optuna")
pytest.importorskip("rl_zoo3")

SHIPPED = sorted(zoo.HYPERPARAMS.glob("*.yml"))
# rl_zoo3 takes these for itself
ZOO_KEYS = {"n_timesteps", "env_wrapper", "noise_type", "noise_std"}


def launch(*arguments: str) -> str:
    """
    :param arguments: command line of the launcher
    :return: what it printed
    """
    command = [sys.executable, "-m", "sb3_qsm.zoo", *arguments]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
    assert result.returncode == 0, result.stdout
    return result.stdout


def test_train_enjoy_plot(tmp_path):
    shrink = ["-params", "learning_starts:20", "batch_size:16", "buffer_size:1000"]
    launch("train", "--env", "Pendulum-v1", "-n", "60", "--eval-freq", "30", "-f", str(tmp_path), "--progress", *shrink)
    run = tmp_path / "qsm" / "Pendulum-v1_1"
    assert (run / "Pendulum-v1.zip").is_file() and (run / "best_model.zip").is_file()
    assert np.load(run / "evaluations.npz")["timesteps"].tolist() == [30, 60]
    assert QSM.load(run / "Pendulum-v1.zip").batch_size == 16

    printed = launch("enjoy", "--env", "Pendulum-v1", "-n", "200", "-f", str(tmp_path), "--no-render", "--device", "cpu")
    assert "Episode Reward: " in printed

    picture = run / "learning_curve.png"
    assert zoo.plot([str(tmp_path)]) == picture and picture.read_bytes().startswith(b"\x89PNG")


def test_checkpoints(tmp_path):
    """Of any off-policy algorithm; the same command again, and one that goes on from a file: -n counts the steps to come."""
    checkpointing = ["--checkpoints", str(tmp_path / "saves"), "--checkpoint-freq", "20", "-f", str(tmp_path / "logs")]
    shrink = ["--eval-freq", "-1", "-params", "learning_starts:20", "batch_size:16", "buffer_size:1000"]
    command = ["train", "--algo", "sac", "--env", "Pendulum-v1", "--seed", "1", *checkpointing, *shrink]
    assert "Going on" not in launch(*command, "-n", "50")
    assert f"Going on from {tmp_path / 'saves' / 'rl_model_50_steps'}" in launch(*command, "-n", "70")
    weights = [SAC.load(path).policy.state_dict() for path in sorted((tmp_path / "logs").rglob("Pendulum-v1.zip"))]
    assert not th.equal(weights[0]["actor.mu.weight"], weights[1]["actor.mu.weight"])
    another = ["-i", str(tmp_path / "logs/sac/Pendulum-v1_2/Pendulum-v1.zip"), "--checkpoints", str(tmp_path / "another")]
    launch(*command, "-n", "40", *another)
    assert SAC.load(tmp_path / "logs/sac/Pendulum-v1_3/Pendulum-v1.zip").num_timesteps == 40
    assert [path.name for path in checkpoints(tmp_path / "another")] == ["rl_model_40_steps", "rl_model_20_steps"]


def test_train_dm_control(tmp_path):
    pytest.importorskip("dm_control")
    shrink = ["-params", "learning_starts:20", "batch_size:16", "buffer_size:1000"]
    env_id = "dm_control/cartpole-swingup-v0"
    launch("train", "--env", env_id, "-n", "60", "--eval-freq", "-1", "-f", str(tmp_path), *shrink)
    model = QSM.load(next(tmp_path.rglob("*.zip")))
    # position (3 numbers) and velocity (2), flattened
    assert model.observation_space.shape == (5,) and model._n_updates == 40


def test_optimize(tmp_path):
    storage = tmp_path / "journal.log"
    arguments = ["-optimize", "--n-trials", "2", "--n-startup-trials", "2", "--n-evaluations", "1", "--no-optim-plots"]
    arguments += ["--storage", str(storage), "--study-name", "qsm", "-params", "buffer_size:1000"]
    launch("train", "--env", "Pendulum-v1", "-n", "120", "-f", str(tmp_path), *arguments)
    study = optuna.load_study(
        study_name="qsm", storage=optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(storage)))
    )
    assert [trial.state for trial in study.trials] == [optuna.trial.TrialState.COMPLETE] * 2
    QSM("MlpPolicy", "Pendulum-v1", **zoo.convert_qsm_params(study.trials[0].params))


def test_converter_repeats_the_sampler():
    trial = optuna.create_study().ask()
    sampled = zoo.sample_qsm_params(trial, 1, 1, {"using_her_replay_buffer": False})
    assert zoo.convert_qsm_params(trial.params) == sampled
    assert {"noise_schedule", "n_diffusion_steps"} < set(sampled["policy_kwargs"])


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_hyperparameters(path):
    known = set(inspect.signature(QSM).parameters) | ZOO_KEYS
    entries = yaml.safe_load(path.read_text())
    assert "default" in entries
    for env_id, hyperparams in entries.items():
        assert set(hyperparams) <= known, env_id
        assert ("env_wrapper" in hyperparams) == env_id.startswith("dm_control/"), env_id
        arguments = {key: value for key, value in hyperparams.items() if key not in ZOO_KEYS}
        if "policy_kwargs" in arguments:
            arguments["policy_kwargs"] = eval(arguments["policy_kwargs"], {"nn": nn, "th": th})
        zoo.ALGORITHMS[path.stem](env="Pendulum-v1", buffer_size=100, **arguments)


def test_published_temperatures():
    entries = yaml.safe_load((zoo.HYPERPARAMS / "published_qsm.yml").read_text())
    m_q = {env_id: 1 / entry.get("ent_coef", PUBLISHED["ent_coef"]) for env_id, entry in entries.items()}
    assert m_q["default"] == m_q["dm_control/walker-walk-v0"] == pytest.approx(50)
    assert m_q["dm_control/quadruped-walk-v0"] == m_q["dm_control/humanoid-walk-v0"] == pytest.approx(120)


CALLBACK = {"sb3_qsm.resume.ResumeCallback": {"save_freq": 10_000, "save_path": "a:b", "verbose": 1}}


@pytest.mark.parametrize(
    "script, arguments, expected",
    [
        ("train", ["--env", "X"], ["--algo", "qsm", "--env", "X", "--conf-file", str(zoo.HYPERPARAMS / "qsm.yml")]),
        (
            "train",
            ["--algo", "published_qsm"],
            ["--algo", "published_qsm", "--conf-file", str(zoo.HYPERPARAMS / "published_qsm.yml")],
        ),
        (
            "train",
            ["--algo", "td3", "-params", "tau:0.1", "--checkpoints", "a:b", "-n", "5"],
            ["--algo", "td3", "-n", "5", "--hyperparams", "tau:0.1", f"callback:{CALLBACK}"],
        ),
        ("train", ["--algo", "qsm", "-conf", "mine.yml"], ["--algo", "qsm", "--conf-file", "mine.yml"]),
        ("train", ["--algo", "sac", "-n", "5"], ["--algo", "sac", "-n", "5"]),
        ("enjoy", ["--env", "X"], ["--algo", "qsm", "--env", "X"]),
    ],
)
def test_zoo_arguments(script, arguments, expected):
    assert zoo.zoo_arguments(script, arguments) == expected


@pytest.mark.parametrize("arguments", [["enjoy"], ["train", "-optimize"], ["train", "--optimize-hyperparameters"]])
def test_checkpoints_of_something_else(arguments):
    with pytest.raises(ValueError, match="--checkpoints='saves' goes with training, got"):
        zoo.main([*arguments, "--checkpoints", "saves"])


def test_errors(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"script='fly' is unknown, choose one of train, enjoy, .*plot"):
        zoo.main(["fly"])
    with pytest.raises(ValueError, match="script='' is unknown"):
        zoo.main([])
    with pytest.raises(ValueError, match=r"folder='.*' holds no evaluations.npz"):
        zoo.main(["plot", str(tmp_path)])
    monkeypatch.setitem(sys.modules, "rl_zoo3", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "sb3-qsm\[zoo\]"'):
        zoo.main(["train"])


def kill_when(condition, command):
    """Start a command and kill it with SIGKILL once the condition holds."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not condition():
        assert process.poll() is None, "ended too early"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()


def same_weights(first, second):
    return all(th.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))


@pytest.mark.expensive
def test_killed_zoo_goes_on(tmp_path):
    def command(name):
        arguments = ["--env", "InvertedPendulum-v5", "-n", "300", "--eval-freq", "100", "--eval-episodes", "1", "--seed", "3"]
        arguments += ["-f", str(tmp_path / name), "--checkpoints", str(tmp_path / name / "saves"), "--checkpoint-freq", "50"]
        arguments += ["-params", "learning_starts:40", "batch_size:8", "buffer_size:1000", "policy_kwargs:dict(net_arch=[8])"]
        return [sys.executable, "-m", "sb3_qsm.zoo", "train", *arguments]

    kill_when(lambda: list((tmp_path / "killed" / "saves").glob("*_150_steps")), command("killed"))
    for name in ["killed", "unbroken"]:
        done = subprocess.run(command(name), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert ("Going on from" in done.stdout) == (name == "killed")
    killed, unbroken = tmp_path / "killed/qsm/InvertedPendulum-v5_2", tmp_path / "unbroken/qsm/InvertedPendulum-v5_1"
    assert same_weights(*(QSM.load(run / "InvertedPendulum-v5.zip").policy for run in (killed, unbroken)))
    for key in ["timesteps", "results"]:
        np.testing.assert_array_equal(np.load(killed / "evaluations.npz")[key], np.load(unbroken / "evaluations.npz")[key])
    assert len(checkpoints(tmp_path / "killed" / "saves")) == 2
