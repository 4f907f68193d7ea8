"""A run leaves a whole result or none, whatever is killed, and goes on where it was."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch as th

pytest.importorskip("rl_zoo3")

from test_benchmarks_suites import SUITE, write_suite

from benchmarks.__main__ import main
from benchmarks.algorithms import algorithm_class
from benchmarks.executors import ROOT, run_ray
from benchmarks.runs import execute, make_model
from benchmarks.suites import read_suite, select

CLOCK = {"time/fps", "time/time_elapsed", "training_s"}


def rows(file):
    """Rows of a CSV file without the clock."""
    with open(file, newline="") as lines:
        return [{key: value for key, value in row.items() if key not in CLOCK} for row in csv.DictReader(lines)]


def same_weights(first, second):
    states = (it.policy.state_dict().values() for it in (first, second))
    return all(th.equal(a, b) for a, b in zip(*states, strict=True))


def start(*arguments, **options):
    command = [sys.executable, "-m", "benchmarks", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, **options)


def wait_for(condition, process):
    """Until ``condition()`` holds; the process must not end before."""
    while not condition():
        assert process.poll() is None, "ended too early"
        time.sleep(0.02)


def test_run_leaves_a_whole_result(tmp_path):
    run = read_suite(write_suite(tmp_path))[0]
    assert execute(run, tmp_path)
    folder = tmp_path / run.folder
    assert {file.name for file in folder.iterdir()} == {"evaluations.csv", "training.csv", "meta.json", "model.zip"}
    evaluations = rows(folder / "evaluations.csv")
    assert [(row["step"], row["mode"]) for row in evaluations] == [
        (step, mode) for step in ("0", "100", "200", "250") for mode in ("sampled", "deterministic")
    ]
    returns = [[float(row["return_0"]), float(row["return_1"])] for row in evaluations]
    assert returns[0] == returns[2] == returns[4], "the same weights and start states give the same returns"
    assert returns[4] != returns[6] and returns[0] != returns[1]
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["command"] == f"python -m benchmarks train {run.suite} --tasks Pendulum-v1 --algos sac --seeds 0 --steps 250"
    assert (meta["versions"]["torch"], meta["threads"], meta["resumed_at"]) == (th.__version__, 1, [])


def test_no_evaluation_beyond_the_last_step(tmp_path):
    """SB3 finishes its rollout of 64 steps: 250 are asked for and 256 are taken."""
    rollouts = {"sac": {"default": {**SUITE["algorithms"]["sac"]["default"], "train_freq": 64, "gradient_steps": 1}}}
    run = read_suite(write_suite(tmp_path, algorithms=rollouts))[0]
    assert execute(run, tmp_path)
    steps = [row["step"] for row in rows(tmp_path / run.folder / "evaluations.csv")]
    assert steps == [step for step in ("0", "100", "200", "250") for _ in range(2)]


def test_evaluation_does_not_change_training(tmp_path):
    run = read_suite(write_suite(tmp_path))[0]
    execute(run, tmp_path)
    alone = make_model(run).learn(run.n_timesteps)
    assert same_weights(alone, type(alone).load(tmp_path / run.folder / "model"))


def test_finished_run_is_neither_redone_nor_overwritten(tmp_path):
    run = read_suite(write_suite(tmp_path))[0]
    execute(run, tmp_path)
    meta = tmp_path / run.folder / "meta.json"
    before = meta.stat().st_mtime_ns
    assert execute(run, tmp_path)
    assert meta.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="was made with n_timesteps 250, not 300"):
        execute(replace(run, n_timesteps=300), tmp_path)
    meta.write_text(meta.read_text().replace('"tau": "0.005"', '"tau": "0.01"'))
    with pytest.raises(ValueError, match=r"was made with defaults .*'tau': '0.01'.*: move it away or choose another folder"):
        execute(run, tmp_path)


def test_failed_run_keeps_its_traceback_and_the_others_run(tmp_path):
    broken = {"default": {"policy": "MlpPolicy", "batch_size": -1, "learning_starts": 10}}
    suite = write_suite(tmp_path, algorithms={"sac": broken, "td3": SUITE["algorithms"]["td3"]}, seeds=[0], n_timesteps=50)
    assert main(["run", suite, "--jobs", "2", "--out", str(tmp_path)]) == 1
    assert "Traceback" in (tmp_path / "tiny/Pendulum-v1/sac/seed0/error.txt").read_text()
    assert (tmp_path / "tiny/Pendulum-v1/td3/seed0/meta.json").exists()


def test_killed_worker_is_noted_and_redone(tmp_path):
    suite = write_suite(tmp_path, seeds=[0], n_timesteps=1_000_000)
    folder = tmp_path / "tiny/Pendulum-v1/td3"
    (folder / "seed0").mkdir(parents=True)
    (folder / "seed0/error.txt").write_text("last week")
    runner = start("run", suite, "--algos", "td3", "--out", tmp_path)
    wait_for(lambda: (folder / ".seed0.tmp").exists(), runner)
    assert not (folder / "seed0/error.txt").exists(), "the error of an earlier attempt says nothing about this one"
    worker = subprocess.run(["pgrep", "-P", str(runner.pid)], capture_output=True, text=True, check=True).stdout
    os.kill(int(worker), signal.SIGKILL)
    assert runner.wait() == 1
    assert "SIGKILL" in (folder / "seed0/error.txt").read_text()
    assert not (folder / "seed0/meta.json").exists()
    assert main(["train", write_suite(tmp_path, seeds=[0]), "--algos", "td3", "--out", str(tmp_path)]) == 0
    assert not (folder / "seed0/error.txt").exists()


@pytest.mark.parametrize("algorithm", ["qsm", pytest.param("sac", marks=pytest.mark.expensive)])
def test_killed_run_goes_on(tmp_path, algorithm):
    """Evaluations and training log without loss or duplicates, weights bit for bit."""
    arguments = dict(policy="MlpPolicy", policy_kwargs="dict(net_arch=[8])", learning_starts=50, batch_size=8, n_envs=2)
    suite = write_suite(
        tmp_path,
        n_timesteps=300,
        eval_freq=60,
        seeds=[0],
        algorithms={algorithm: {"default": arguments | {"buffer_size": 500}}},
    )
    (run,) = read_suite(suite)
    killed, unbroken = (tmp_path / name / run.folder for name in ("killed", "unbroken"))
    files = killed.with_name(".seed0.tmp")
    process = start("train", suite, "--out", tmp_path / "killed")
    wait_for(lambda: list(files.glob("checkpoints-*/*_120_steps")), process)
    process.kill()
    process.wait()
    assert not killed.exists(), "no half-written result"
    with open(files / "evaluations.csv", "a") as file:
        file.write("half a li")
    both = [start("train", suite, "--out", tmp_path / name) for name in ("killed", "unbroken")]
    assert [process.wait() for process in both] == [0, 0]
    assert {path.name for path in killed.iterdir()} == {path.name for path in unbroken.iterdir()}
    assert [row["step"] for row in rows(killed / "evaluations.csv")[::2]] == ["0", "60", "120", "180", "240", "300"]
    for name in ("evaluations.csv", "training.csv"):
        assert rows(killed / name) == rows(unbroken / name)
    assert same_weights(*(algorithm_class(algorithm).load(it / "model") for it in (killed, unbroken)))
    (resumed_at,) = json.loads((killed / "meta.json").read_text())["resumed_at"]
    assert resumed_at >= 120


def test_run_of_other_code_begins_again(tmp_path):
    run = read_suite(write_suite(tmp_path, n_timesteps=60))[0]
    left = (tmp_path / run.folder).with_name(".seed0.tmp") / "checkpoints-another" / "rl_model_30_steps"
    left.mkdir(parents=True)
    assert execute(run, tmp_path)
    assert not left.exists() and json.loads((tmp_path / run.folder / "meta.json").read_text())["resumed_at"] == []


def test_printed_commands_are_the_runs(tmp_path, capsys):
    suite = write_suite(tmp_path)
    assert main(["run", suite, "--print-commands", "--out", str(tmp_path), "--seeds", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert main(lines[0].split()[3:]) == 0
    assert (tmp_path / "tiny/Pendulum-v1/sac/seed1/meta.json").exists()


@pytest.mark.expensive
def test_ray_runs_again_what_a_killed_node_had(tmp_path):
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    runs = select(read_suite(write_suite(tmp_path, seeds=[0, 1, 2], n_timesteps=1000)), algorithm=["td3"])
    execute(runs[-1], tmp_path / "local")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    doomed = cluster.add_node(num_cpus=1)
    try:
        running = run_ray(runs, tmp_path, 1, lambda *_: None, cluster.address)
        ended = [next(running)]
        cluster.add_node(num_cpus=1)
        cluster.remove_node(doomed, allow_graceful=False)
        ended += running
    finally:
        cluster.shutdown()
    assert {run.seed for run in ended} == {0, 1, 2}
    assert all(run.is_finished(tmp_path) for run in runs)
    # The same numbers as a process on this machine, apart from the seconds.
    there, here = (rows(root / runs[-1].folder / "evaluations.csv") for root in (tmp_path, tmp_path / "local"))
    assert there == here
