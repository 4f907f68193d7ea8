"""From a suite file to runs: nothing starts that cannot finish."""

from pathlib import Path

import pytest

pytest.importorskip("rl_zoo3")

import rl_zoo3
import yaml

from benchmarks.__main__ import main
from benchmarks.algorithms import ALGORITHMS
from benchmarks.runs import make_model
from benchmarks.suites import SUITES, read_suite

SUITE = {
    "n_timesteps": 250,
    "eval_freq": 100,
    "n_eval_episodes": 2,
    "seeds": [0, 1],
    "tasks": ["Pendulum-v1"],
    "algorithms": {
        "sac": {"default": {"policy": "MlpPolicy", "learning_starts": 200, "batch_size": 8}},
        "td3": {"default": {"policy": "MlpPolicy", "learning_starts": 200, "batch_size": 8}},
    },
}


def write_suite(folder: Path, **changes) -> str:
    """A suite file in ``folder``; returns its path."""
    file = folder / "tiny.yml"
    file.write_text(yaml.safe_dump({**SUITE, **changes}))
    return str(file)


def only(algorithm, **hyperparams):
    return {"algorithms": {algorithm: {"default": {"policy": "MlpPolicy", **hyperparams}}}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ["Pendulum-v9"]}, "unknown task 'Pendulum-v9', valid: .*Pendulum-v1"),
        ({"algorithms": {"sca": {}}}, "unknown algorithm 'sca', valid: .*sac"),
        ({"n_steps": 3}, "unknown key in tiny.yml 'n_steps', valid: n_timesteps"),
        (only("sac", lr=1), "hyperparameter of sac 'lr', valid: .*learning_rate"),
        (only("sac", policy="Mlp"), "unknown policy of sac 'Mlp', valid: MlpPolicy"),
        ({"algorithms": {"sac": {"Hopper-v5": {}}}}, "unknown task under sac 'Hopper-v5', valid: default, Pendulum-v1"),
        ({"algorithms": {"sac": {}}}, "tiny.yml has no hyperparameters of sac for 'Pendulum-v1' and no 'default'"),
        (only("td3", noise_type="pink"), "noise_type of td3 'pink', valid: normal"),
        (only("td3", policy_kwargs="dict("), "'dict\\(' cannot be read"),
        (
            only("qsm", score_target="benchmarks.targets.nowhere"),
            "score_target 'benchmarks.targets.nowhere' names no function",
        ),
        (only("sac", env_wrapper="benchmarks.environments.no"), "env_wrapper 'benchmarks.environments.no' names no function"),
        (only("dipo", tau="5e-3"), "tau of dipo must be a number, got the text '5e-3'; in YAML write !!float"),
        ({"n_timesteps": "1e5"}, r"n_timesteps in tiny\.yml must be a whole number of at least 1, got '1e5'"),
        ({"eval_freq": 0.5}, r"eval_freq in tiny\.yml must be a whole number of at least 1, got 0.5"),
    ],
)
def test_bad_suite_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        main(["run", write_suite(tmp_path, **changes), "--out", str(tmp_path)])
    assert [file.name for file in tmp_path.iterdir()] == ["tiny.yml"], "nothing may start"


def test_missing_key_is_refused(tmp_path):
    file = tmp_path / "tiny.yml"
    file.write_text(yaml.safe_dump({key: value for key, value in SUITE.items() if key != "seeds"}))
    with pytest.raises(ValueError, match=r"tiny\.yml lacks 'seeds'"):
        read_suite(str(file))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--algos", "sca"], "unknown algorithm in this suite 'sca', valid: sac, td3"),
        (["--tasks", "Hopper-v5"], "unknown task in this suite 'Hopper-v5', valid: Pendulum-v1"),
        (["--seeds", "7"], "unknown seed in this suite 7, valid: 0, 1"),
        (["--executor", "slurm"], "unknown executor 'slurm', valid: local, ray"),
    ],
)
def test_bad_command_line_is_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        main(["run", write_suite(tmp_path), "--out", str(tmp_path), *arguments])


def test_unknown_suite_is_refused():
    with pytest.raises(ValueError, match=r"unknown suite 'mujoco', valid: .*mujoco-100k"):
        read_suite("mujoco")


def test_number_of_steps_as_in_rl_zoo(tmp_path):
    """``!!float 1e6`` is a float in YAML and a number of steps."""
    assert {repr(run.n_timesteps) for run in read_suite(write_suite(tmp_path, n_timesteps=1e6))} == {"1000000"}


@pytest.mark.parametrize("algorithm", ["sac", "td3", "tqc"])
@pytest.mark.parametrize("robot", ["HalfCheetah", "Hopper", "Walker2d", "Ant", "Humanoid"])
def test_settings_of_the_baselines_are_those_of_rl_zoo(algorithm, robot):
    theirs = yaml.safe_load((Path(rl_zoo3.__file__).parent / "hyperparams" / f"{algorithm}.yml").read_text())
    ours = yaml.safe_load((SUITES.parent / "hyperparams" / f"{algorithm}.yml").read_text())
    expected = {key: value for key, value in theirs[f"{robot}-v4"].items() if key != "n_timesteps"}
    assert ours.get(f"{robot}-v5", ours["default"]) == expected


@pytest.mark.parametrize("name", sorted(file.stem for file in SUITES.glob("*.yml")))
def test_shipped_suites_are_valid(name):
    if name.startswith("dmc"):
        pytest.importorskip("shimmy")
        pytest.importorskip("dm_control")
    runs = read_suite(name)
    assert len({run.folder for run in runs}) == len(runs)


@pytest.mark.parametrize("suite", ["smoke", "baselines"])
def test_suite_has_every_algorithm(suite):
    assert {run.algorithm for run in read_suite(suite)} == set(ALGORITHMS)


def test_variant_is_its_own_run(tmp_path):
    label = {"sac-small": {"default": {"policy": "MlpPolicy", "policy_kwargs": "dict(net_arch=[7])"}}}
    run = read_suite(write_suite(tmp_path, algorithms=label))[0]
    assert run.folder == Path("tiny/Pendulum-v1/sac-small/seed0")
    assert make_model(run).policy.net_arch == [7]
