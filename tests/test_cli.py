"""The command line: real, short runs."""

import inspect
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch as th
import yaml
from stable_baselines3 import SAC
from stable_baselines3.common.env_util import make_vec_env
from torch import nn

from sb3_qsm import QSM, cli
from sb3_qsm.export import load_policy
from sb3_qsm.published import PUBLISHED
from sb3_qsm.resume import checkpoints

optuna = pytest.importorskip("optuna")
pytest.importorskip("rl_zoo3")
zoo = pytest.importorskip("sb3_qsm.zoo")

ROOT = Path(cli.__file__).parents[1]
SHIPPED = sorted(zoo.HYPERPARAMS.glob("*.yml"))
# rl_zoo3 takes these for itself
ZOO_KEYS = {"n_timesteps", "noise_type", "noise_std"}
SHRINK = ["-params", "learning_starts:20", "batch_size:16", "buffer_size:1000", "policy_kwargs:dict(net_arch=[8])"]
TASK = """
import gymnasium as gym
from gymnasium.envs.classic_control.pendulum import PendulumEnv

gym.register("Mine-v0", PendulumEnv, max_episode_steps=5)
"""


@pytest.mark.parametrize("task", ["HalfCheetah-v5", "Pusher-v5", "Pendulum-v1"])
def test_a_robot_is_filmed_by_the_camera_that_goes_with_it(task):
    """Where its model has one."""
    env = make_vec_env(task, env_kwargs=dict(render_mode="rgb_array"))
    cli._follow(env)
    base = env.envs[0].unwrapped
    if task == "HalfCheetah-v5":
        assert base.model.camera(base.mujoco_renderer.camera_id).name == "track"
    elif task == "Pusher-v5":
        assert base.model.ncam == 0 and base.mujoco_renderer.camera_id == -1


@pytest.fixture
def launch(tmp_path, monkeypatch, capsys):
    """
    Calls the command in an empty folder; what ``main`` changes in the process is put back afterwards.

    :return: a function of the command line, which gives the exit status, what was printed, and the errors
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", [*sys.argv])
    monkeypatch.setenv("MUJOCO_GL", os.environ.get("MUJOCO_GL", "egl"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)

    def launch(*arguments):
        try:
            status = cli.main([*map(str, arguments)])
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return launch


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help(launch, name):
    status, printed, _ = launch(name, "--help")
    assert status == 0
    assert f"usage: sb3-qsm {name}" in printed and cli.COMMANDS[name].__doc__[:20] in printed
    assert f"example:\n  sb3-qsm {name} " in printed
    zoo_options = {"train": ["-params", "--n-trials", "-P"], "optimize": ["--n-trials"], "enjoy": ["--no-render"]}
    own_options = {"train": ["--checkpoint-freq"], "compare": ["--ray"], "record": ["--load-best"], "resume": ["-n"]}
    for option in [*zoo_options.get(name, []), *own_options.get(name, [])]:
        assert option in printed
    if name not in ("resume", "compare"):
        assert "(default: logs)" in printed


def test_command_by_itself(launch):
    status, printed, _ = launch()
    assert status == 0 and all(f"\n  {name} " in printed for name in cli.COMMANDS)
    done = subprocess.run([sys.executable, "-m", "sb3_qsm", "fly"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "invalid choice: 'fly' (choose from" in done.stderr and "Traceback" not in done.stderr


def test_train_and_use(launch):
    train = ["train", "--env", "Pendulum-v1", "-n", "6e1", "--eval-freq", "30", "--eval-episodes", "1", "-P", *SHRINK]
    status, printed, _ = launch(*train)
    assert status == 0 and "\n50 %: 30 of 60 steps, " in printed and "\n100 %: 60 of 60 steps, " in printed
    run = Path("logs/qsm/Pendulum-v1_1")
    assert (run / "best_model.zip").is_file()
    assert np.load(run / "evaluations.npz")["timesteps"].tolist() == [30, 60]
    model = QSM.load(run / "Pendulum-v1.zip")
    assert model.batch_size == 16

    # An attempt that fails is not taken for the newest run
    assert launch("train", "--env", "Pendulum-v1", "-params", "foo:1")[::2] == (
        2,
        "sb3-qsm train: error: QSM.__init__() got an unexpected keyword argument 'foo'\n",
    )
    status, printed, _ = launch("enjoy", "--env", "Pendulum-v1", "-n", "200", "--no-render")
    assert status == 0 and "Episode Reward: " in printed

    status, printed, _ = launch("plot")
    assert (status, printed) == (0, f"Learning curve: {run / 'learning_curve.png'}\n")
    assert (run / "learning_curve.png").read_bytes().startswith(b"\x89PNG")

    assert launch("record", "--env", "Pendulum-v1", "-n", "3", "film.gif")[0] == 0
    assert Path("film.gif").read_bytes().startswith(b"GIF89a")
    assert launch("record", "--env", "Pendulum-v1", "-n", "3", "--stochastic")[0] == 0
    assert (run / "video.mp4").read_bytes()[4:8] == b"ftyp"

    status, printed, _ = launch("export", "--env", "Pendulum-v1", "policy.safetensors")
    assert status == 0 and printed.endswith("Policy: policy.safetensors\n")
    observation = np.array([0.6, 0.8, 1.0], np.float32)
    expected, _ = model.predict(observation, deterministic=True)
    assert load_policy("policy.safetensors").predict(observation, deterministic=True) == pytest.approx(expected)

    status, printed, _ = launch("share", "--env", "Pendulum-v1", "policies")
    assert status == 0 and printed.endswith("Policy: policies/Pendulum-v1.safetensors\n")
    card = Path("policies/Pendulum-v1.md").read_text()
    command = f"sb3-qsm train --algo qsm --env Pendulum-v1 --seed {model.seed} -n 60"
    assert f"{command} -params batch_size:16 buffer_size:1000 learning_starts:20 'policy_kwargs:" in card


def test_policy_that_comes_along(launch):
    status, printed, _ = launch("enjoy", "HalfCheetah-v5", "--no-render", "-n", "2")
    returns = [float(line.removeprefix("Episode return: ")) for line in printed.splitlines()]
    assert status == 0 and len(returns) == 2 and min(returns) > 1000
    status, _, errors = launch("enjoy", "HalfCheetah-v5")
    assert status == 2 and "no display: film it with `sb3-qsm record --env HalfCheetah-v5 --pretrained`" in errors
    assert launch("record", "--env", "HalfCheetah-v5", "--pretrained", "-n", "3", "film.gif")[0] == 0
    assert Path("film.gif").read_bytes().startswith(b"GIF89a")
    status, _, errors = launch("enjoy", "Pendulum-v1")
    assert status == 2 and errors.startswith("sb3-qsm enjoy: error: task must be one of [") and errors.count("\n") == 1


@pytest.mark.expensive
def test_export_onnx(launch):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    assert launch("train", "--env", "Pendulum-v1", "-n", "40", "--eval-freq", "-1", *SHRINK)[0] == 0
    for name, options in [("policy.onnx", []), ("sampled.onnx", ["--stochastic"])]:
        assert launch("export", "--env", "Pendulum-v1", name, *options)[0] == 0
        inputs = [value.name for value in onnx.load(name).graph.input]
        assert inputs == ["noise", "observation"][1 - len(options) :]


def test_resume(launch):
    """Of any off-policy algorithm: the run goes on in its folder and ends with the weights of one that was not stopped."""
    train = ["train", "--algo", "sac", "--env", "InvertedPendulum-v5", "--seed", "1", "--checkpoint-freq", "20", *SHRINK]
    assert launch(*train, "-n", "40")[0] == 0
    run = Path("logs/sac/InvertedPendulum-v5_1")
    episodes = (run / "0.monitor.csv").read_text()
    assert np.load(run / "evaluations.npz")["timesteps"].tolist() == [*range(2, 41, 2)]  # by default 20 in all
    status, printed, _ = launch("resume", run, "-n", "60")
    assert status == 0 and f"Going on from {run / 'checkpoints' / 'rl_model_40_steps'}" in printed
    assert [path.name for path in Path("logs/sac").iterdir()] == [run.name]
    assert (run / "0.monitor.csv").read_text().startswith(episodes)
    assert [path.name for path in checkpoints(run / "checkpoints")] == ["rl_model_60_steps", "rl_model_40_steps"]
    assert launch(*train, "-n", "60")[0] == 0
    resumed, unbroken = (SAC.load(f"logs/sac/InvertedPendulum-v5_{i}/InvertedPendulum-v5.zip") for i in (1, 2))
    assert resumed.num_timesteps == 60 and same_weights(resumed.policy, unbroken.policy)


def test_train_dm_control(launch):
    """A task without an entry of its own."""
    pytest.importorskip("dm_control")
    env_id = "dm_control/cartpole-balance-v0"
    assert launch("train", "--env", env_id, "-n", "60", "--eval-freq", "-1", *SHRINK)[0] == 0
    model = QSM.load("logs/qsm/dm_control-cartpole-balance-v0_1/dm_control-cartpole-balance-v0.zip")
    # position (3 numbers) and velocity (2), flattened
    assert model.observation_space.shape == (5,) and model._n_updates == 40
    assert launch("enjoy", "--env", env_id, "-n", "5", "--no-render")[0] == 0


def test_optimize(launch):
    arguments = ["--n-trials", "2", "--n-startup-trials", "2", "--n-evaluations", "1", "--no-optim-plots"]
    arguments += ["--storage", "journal.log", "--study-name", "qsm", "-params", "buffer_size:1000"]
    assert launch("optimize", "--env", "Pendulum-v1", "-n", "120", *arguments)[0] == 0
    study = optuna.load_study(
        study_name="qsm", storage=optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend("journal.log"))
    )
    assert [trial.state for trial in study.trials] == [optuna.trial.TrialState.COMPLETE] * 2
    QSM("MlpPolicy", "Pendulum-v1", **zoo.convert_qsm_params(study.trials[0].params))


def test_compare(launch):
    for package in ("jinja2", "filelock", "sb3_contrib"):
        pytest.importorskip(package)
    Path("mine.py").write_text(TASK)
    command = ["compare", "--env", "mine:Mine-v0", "--steps", "40", "--seeds", "0"]
    status, printed, _ = launch(*command, "--algos", "qsm")
    folder = Path("logs/compare").resolve()
    page = folder / "mine-Mine-v0_40_steps.html"
    assert status == 0 and printed.endswith(f"Comparison: {page}\n")
    runs = sorted((folder / page.stem).glob("*/*/seed0/meta.json"))
    assert [run.parts[-3] for run in runs] == ["qsm"]
    text = page.read_text()
    assert text.count("data:image/png;base64,") == 3 and 'src="http' not in text  # curves over steps, over time
    for title in ("Final return, deterministic actions", "Cost", "steps/s"):
        assert title in text
    finished = [run.stat().st_mtime_ns for run in runs]
    status, printed, _ = launch(*command, "--algos", "qsm", "sac")
    assert status == 0 and "2 runs" in page.read_text()
    assert [run.stat().st_mtime_ns for run in runs] == finished


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
        arguments = {key: value for key, value in hyperparams.items() if key not in ZOO_KEYS}
        if "policy_kwargs" in arguments:
            arguments["policy_kwargs"] = eval(arguments["policy_kwargs"], {"nn": nn, "th": th})
        zoo.ALGORITHMS[path.stem](env="Pendulum-v1", buffer_size=100, **arguments)


def test_published_temperatures():
    entries = yaml.safe_load((zoo.HYPERPARAMS / "published_qsm.yml").read_text())
    m_q = {env_id: 1 / entry.get("ent_coef", PUBLISHED["ent_coef"]) for env_id, entry in entries.items()}
    assert m_q["default"] == pytest.approx(50)
    assert m_q["dm_control/quadruped-walk-v0"] == m_q["dm_control/humanoid-walk-v0"] == pytest.approx(120)


@pytest.mark.parametrize(
    "algo, conf, expected",
    [
        ("qsm", [], str(zoo.HYPERPARAMS / "qsm.yml")),
        ("published_qsm", [], str(zoo.HYPERPARAMS / "published_qsm.yml")),
        ("published_qsm", ["-c", "qsm"], str(zoo.HYPERPARAMS / "qsm.yml")),
        ("qsm", ["-conf", __file__], __file__),
        ("sac", [], None),
    ],
)
def test_hyperparameters_of(algo, conf, expected):
    parser = cli.Parser(cli.train, "", cli._find_hyperparameters)
    for names in (["--env"], ["--algo"], ["-c", "-conf", "--conf-file"]):
        parser.add_argument(*names)
    assert parser.parse_args(["--env", "Pendulum-v1", "--algo", algo, *conf]).conf_file == expected


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train"], "the following arguments are required: --env"),
        (["train", "--env", "Pendulum-v9"], "Environment version `v9` for environment `Pendulum` doesn't exist"),
        (["train", "--env", "nowhere:Mine-v0"], "No module named 'nowhere'"),
        (["train", "--env", "Pendulum-v1", "--algo", "foo"], "argument --algo: invalid choice: 'foo' (choose from"),
        (["train", "--env", "Pendulum-v1", "-c", "no.yml"], "argument -c: no file 'no.yml'"),
        (["train", "--env", "Pendulum-v1", "-params", "policy:Mlp"], "quotes around texts, as in \"policy:'MlpPolicy'\""),
        (["train", "--env", "CartPole-v1", "-n", "10"], "The algorithm only supports"),
        (["enjoy", "--env", "Pendulum-v1"], "no display: film it with `sb3-qsm record`, or add --no-render"),
        (["enjoy", "--env", "Pendulum-v1", "--no-render"], "`sb3-qsm train --algo qsm --env Pendulum-v1 -f logs` makes one"),
        (["record", "--env", "Pendulum-v1", "-f", "nowhere"], "makes one"),
        (["export", "--env", "Pendulum-v1", "policy.pt"], "must end in .onnx or .safetensors, got 'policy.pt'"),
        (["plot", "-f", "nowhere"], "no evaluations.npz in nowhere; `sb3-qsm train` writes one"),
        (["resume", "nowhere"], "no checkpoint in nowhere: begin runs with `sb3-qsm train --checkpoint-freq N`"),
        (["compare", "--env", "Pendulum-v1", "--algos", "foo"], "unknown algorithm 'foo', valid: qsm, "),
    ],
)
def test_errors_of_the_user(launch, arguments, message):
    status, _, errors = launch(*arguments)
    lines = [line for line in errors.splitlines() if line.startswith("sb3-qsm ")]
    assert status == 2 and len(lines) == 1 and message in lines[0]
    assert "Traceback" not in errors and not list(Path().rglob("*.yml"))


def test_errors_of_others_keep_their_traceback(launch):
    Path("broken.py").write_text("import gymnasium\n\ngymnasium.register('Broken-v0', lambda: [][0])\n")
    with pytest.raises(IndexError):
        launch("train", "--env", "broken:Broken-v0", "-n", "10")


def test_missing_extra(launch, monkeypatch):
    monkeypatch.delitem(sys.modules, "sb3_qsm.zoo")
    monkeypatch.setitem(sys.modules, "rl_zoo3", None)
    status, _, errors = launch("train", "--env", "Pendulum-v1")
    assert status == 2 and errors.endswith('; pip install "sb3-qsm[zoo]"\n')


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere MuJoCo needs no choice")
@pytest.mark.parametrize("display, chosen, expected", [(None, None, "egl"), (None, "osmesa", "osmesa"), (":0", None, None)])
def test_rendering_without_a_display(launch, monkeypatch, display, chosen, expected):
    for name, value in [("DISPLAY", display), ("MUJOCO_GL", chosen)]:
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    launch("plot", "-f", "nowhere")
    assert os.environ.get("MUJOCO_GL") == expected


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
        arguments += ["-f", str(tmp_path / name), "--checkpoint-freq", "50"]
        arguments += ["-params", "learning_starts:40", "batch_size:8", "buffer_size:1000", "policy_kwargs:dict(net_arch=[8])"]
        return [sys.executable, "-m", "sb3_qsm", "train", *arguments]

    killed, unbroken = (tmp_path / name / "qsm/InvertedPendulum-v5_1" for name in ("killed", "unbroken"))
    kill_when(lambda: list(killed.glob("checkpoints/*_150_steps")), command("killed"))
    subprocess.run([sys.executable, "-m", "sb3_qsm", "resume", str(killed)], check=True)
    subprocess.run(command("unbroken"), check=True)
    assert same_weights(*(QSM.load(run / "InvertedPendulum-v5.zip").policy for run in (killed, unbroken)))
    for key in ["timesteps", "results"]:
        np.testing.assert_array_equal(np.load(killed / "evaluations.npz")[key], np.load(unbroken / "evaluations.npz")[key])
