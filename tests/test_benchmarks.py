import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th
import yaml
from gymnasium.utils.env_checker import check_env

pytest.importorskip("rliable")
pytest.importorskip("sb3_contrib")

from benchmarks.__main__ import main
from benchmarks.algorithms import ALGORITHMS
from benchmarks.cells import make_model, run_cell
from benchmarks.executors import ROOT, run_ray
from benchmarks.suites import SUITES, read_suite, select
from benchmarks.worlds import GOALS

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


def rows(file: Path) -> list[dict[str, str]]:
    with open(file, newline="") as lines:
        return list(csv.DictReader(lines))


def wait_for(condition, process: subprocess.Popen) -> None:
    """Until ``condition()`` holds; the process must not end before."""
    while not condition():
        assert process.poll() is None, "ended too early"
        time.sleep(0.05)


# === Suites ===


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ["Pendulum-v9"]}, "unknown task 'Pendulum-v9', valid: .*Pendulum-v1"),
        ({"algorithms": {"sca": {}}}, "unknown algorithm 'sca', valid: .*sac"),
        ({"n_steps": 3}, "unknown key in tiny.yml 'n_steps', valid: n_timesteps"),
        (
            {"algorithms": {"sac": {"default": {"policy": "MlpPolicy", "lr": 1}}}},
            "hyperparameter of sac 'lr', valid: .*learning_rate",
        ),
        ({"algorithms": {"sac": {"default": {"policy": "Mlp"}}}}, "unknown policy of sac 'Mlp', valid: MlpPolicy"),
        ({"algorithms": {"sac": {"Hopper-v5": {}}}}, "unknown task under sac 'Hopper-v5', valid: default, Pendulum-v1"),
        (
            {"algorithms": {"td3": {"default": {"policy": "MlpPolicy", "noise_type": "pink"}}}},
            "noise_type of td3 'pink', valid: normal",
        ),
        ({"algorithms": {"td3": {"default": {"policy": "MlpPolicy", "policy_kwargs": "dict("}}}}, "'dict\\(' cannot be read"),
    ],
)
def test_bad_suite_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        main(["run", write_suite(tmp_path, **changes), "--out", str(tmp_path)])
    assert [file.name for file in tmp_path.iterdir()] == ["tiny.yml"], "nothing may start"


def test_missing_key_is_refused(tmp_path):
    file = tmp_path / "tiny.yml"
    file.write_text(yaml.safe_dump({key: value for key, value in SUITE.items() if key != "seeds"}))
    with pytest.raises(ValueError, match="tiny.yml lacks 'seeds'"):
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
    with pytest.raises(ValueError, match="unknown suite 'mujoco', valid: .*mujoco-100k"):
        read_suite("mujoco")


@pytest.mark.parametrize("name", sorted(file.stem for file in SUITES.glob("*.yml")))
def test_shipped_suites_are_valid(name):
    if name.startswith("dmc"):
        pytest.importorskip("shimmy")
        pytest.importorskip("dm_control")
    cells = read_suite(name)
    assert len({cell.folder for cell in cells}) == len(cells)


def test_smoke_has_every_rival():
    assert {cell.algorithm for cell in read_suite("smoke")} == set(ALGORITHMS)


def test_variant_is_its_own_cell(tmp_path):
    label = {"sac-small": {"default": {"policy": "MlpPolicy", "policy_kwargs": "dict(net_arch=[7])"}}}
    cell = read_suite(write_suite(tmp_path, algorithms=label))[0]
    assert cell.folder == Path("tiny/Pendulum-v1/sac-small/seed0")
    assert make_model(cell).policy.net_arch == [7]


# === Cells ===


def test_cell_leaves_a_whole_result(tmp_path):
    cell = read_suite(write_suite(tmp_path))[0]
    assert run_cell(cell, tmp_path)
    folder = tmp_path / cell.folder
    assert {file.name for file in folder.iterdir()} == {"evaluations.csv", "training.csv", "meta.json", "model.zip"}
    evaluations = rows(folder / "evaluations.csv")
    assert [(row["step"], row["mode"]) for row in evaluations] == [
        (step, mode) for step in ("0", "100", "200", "250") for mode in ("sampled", "deterministic")
    ]
    returns = [[float(row["return_0"]), float(row["return_1"])] for row in evaluations]
    assert returns[0] == returns[2] == returns[4], "the same weights and start states give the same returns"
    assert returns[4] != returns[6] and returns[0] != returns[1]
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["command"] == f"python -m benchmarks cell {cell.suite} --tasks Pendulum-v1 --algos sac --seeds 0 --steps 250"
    assert meta["versions"]["torch"] == th.__version__
    assert meta["machine"]["threads"] == 1
    assert 100 < meta["peak_memory_mb"] < 10_000


def test_evaluation_does_not_change_training(tmp_path):
    cell = read_suite(write_suite(tmp_path))[0]
    run_cell(cell, tmp_path)
    alone = make_model(cell).learn(cell.n_timesteps)
    evaluated = type(alone).load(tmp_path / cell.folder / "model")
    for a, b in zip(alone.policy.state_dict().values(), evaluated.policy.state_dict().values(), strict=True):
        assert th.equal(a, b)


def test_finished_cell_is_neither_redone_nor_overwritten(tmp_path):
    cell = read_suite(write_suite(tmp_path))[0]
    run_cell(cell, tmp_path)
    before = (tmp_path / cell.folder / "meta.json").stat().st_mtime_ns
    assert run_cell(cell, tmp_path)
    assert (tmp_path / cell.folder / "meta.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="was made with n_timesteps 250, not 300"):
        run_cell(replace(cell, n_timesteps=300), tmp_path)


def test_failed_cell_keeps_its_traceback_and_the_others_run(tmp_path):
    broken = {"default": {"policy": "MlpPolicy", "batch_size": -1, "learning_starts": 10}}
    suite = write_suite(tmp_path, algorithms={"sac": broken, "td3": SUITE["algorithms"]["td3"]}, seeds=[0], n_timesteps=50)
    assert main(["run", suite, "--out", str(tmp_path)]) == 1
    assert "Traceback" in (tmp_path / "tiny/Pendulum-v1/sac/seed0/error.txt").read_text()
    assert (tmp_path / "tiny/Pendulum-v1/td3/seed0/meta.json").exists()


def test_killed_runner_leaves_nothing_half_written(tmp_path):
    suite = write_suite(tmp_path, seeds=[0], n_timesteps=1_000_000)
    command = [sys.executable, "-m", "benchmarks", "run", suite, "--algos", "sac", "--out", str(tmp_path)]
    runner = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    folder = tmp_path / "tiny/Pendulum-v1/sac"
    part = folder / ".seed0.tmp/evaluations.csv"
    wait_for(lambda: part.exists() and part.stat().st_size > 0, runner)
    runner.send_signal(signal.SIGKILL)
    runner.wait()
    assert not (folder / "seed0").exists()
    # The orphan notices and lets go of its lock; the next run of the same command redoes the cell.
    assert main(["run", write_suite(tmp_path, seeds=[0]), "--algos", "sac", "--out", str(tmp_path)]) == 0
    assert [row["step"] for row in rows(folder / "seed0/evaluations.csv")][-1] == "250"
    assert not (folder / ".seed0.tmp").exists()


def test_killed_worker_is_noted_and_redone(tmp_path):
    suite = write_suite(tmp_path, seeds=[0], n_timesteps=1_000_000)
    command = [sys.executable, "-m", "benchmarks", "run", suite, "--algos", "td3", "--out", str(tmp_path)]
    runner = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    folder = tmp_path / "tiny/Pendulum-v1/td3"
    wait_for(lambda: (folder / ".seed0.tmp").exists(), runner)
    worker = subprocess.run(["pgrep", "-P", str(runner.pid)], capture_output=True, text=True, check=True).stdout
    os.kill(int(worker), signal.SIGKILL)
    assert runner.wait() == 1
    assert "SIGKILL" in (folder / "seed0/error.txt").read_text()
    assert not (folder / "seed0/meta.json").exists()
    assert main(["run", write_suite(tmp_path, seeds=[0]), "--algos", "td3", "--out", str(tmp_path)]) == 0
    assert not (folder / "seed0/error.txt").exists()


def test_printed_commands_are_the_cells(tmp_path, capsys):
    suite = write_suite(tmp_path)
    assert main(["run", suite, "--print-commands", "--out", str(tmp_path), "--seeds", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert main(lines[0].split()[3:]) == 0
    assert (tmp_path / "tiny/Pendulum-v1/sac/seed1/meta.json").exists()


@pytest.mark.expensive
def test_ray_runs_the_cells_of_a_killed_node_again(tmp_path):
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cells = select(read_suite(write_suite(tmp_path, seeds=[0, 1, 2], n_timesteps=1000)), algorithm=["td3"])
    run_cell(cells[-1], tmp_path / "local")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    doomed = cluster.add_node(num_cpus=1)
    try:
        running = run_ray(cells, tmp_path, 1, lambda *_: None, cluster.address)
        ended = [next(running)]
        cluster.add_node(num_cpus=1)
        cluster.remove_node(doomed, allow_graceful=False)
        ended += running
    finally:
        cluster.shutdown()
    assert {cell.seed for cell in ended} == {0, 1, 2}
    assert all(cell.is_finished(tmp_path) for cell in cells)
    # The same numbers as a process on this machine, apart from the seconds.
    there, here = (rows(root / cells[-1].folder / "evaluations.csv") for root in (tmp_path, tmp_path / "local"))
    assert [{**row, "training_s": ""} for row in there] == [{**row, "training_s": ""} for row in here]
