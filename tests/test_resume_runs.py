"""The launcher of the zoo and the runner of the benchmarks, killed and started again with the same command."""

import csv
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch as th
import yaml

pytest.importorskip("rl_zoo3")

from benchmarks.cells import run_cell
from benchmarks.executors import ROOT
from benchmarks.suites import read_suite
from sb3_qsm import QSM
from sb3_qsm.resume import checkpoints

CLOCK = {"time/fps", "time/time_elapsed", "training_s"}


def kill_when(condition, command):
    """Start a command and kill it with SIGKILL once the condition holds."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while not condition():
        assert process.poll() is None, "ended too early"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()


def rows(file):
    """Rows of a CSV file without the clock."""
    with open(file, newline="") as lines:
        return [{key: value for key, value in row.items() if key not in CLOCK} for row in csv.DictReader(lines)]


def same_weights(first, second):
    return all(th.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))


@pytest.mark.expensive
def test_killed_cell_goes_on(tmp_path):
    """Evaluations and training log without loss or duplicates, weights bit for bit."""
    arguments = dict(policy="MlpPolicy", policy_kwargs="dict(net_arch=[8])", learning_starts=50, batch_size=8, n_envs=2)
    suite = dict(n_timesteps=300, eval_freq=60, n_eval_episodes=2, seeds=[0], tasks=["InvertedPendulum-v5"])
    (tmp_path / "tiny.yml").write_text(yaml.safe_dump(suite | {"algorithms": {"qsm": {"default": arguments}}}))
    (cell,) = read_suite(str(tmp_path / "tiny.yml"))
    command = [sys.executable, "-m", "benchmarks", "cell", str(tmp_path / "tiny.yml"), "--out"]
    files = (tmp_path / "killed" / cell.folder).with_name(".seed0.tmp")
    kill_when(lambda: list(files.glob("checkpoints-*/*_120_steps")), [*command, str(tmp_path / "killed")])
    with open(files / "evaluations.csv", "a") as file:
        file.write("half a li")
    for name in ["killed", "unbroken"]:
        subprocess.run([*command, str(tmp_path / name)], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    killed, unbroken = tmp_path / "killed" / cell.folder, tmp_path / "unbroken" / cell.folder
    assert {path.name for path in killed.iterdir()} == {path.name for path in unbroken.iterdir()}
    assert [row["step"] for row in rows(killed / "evaluations.csv")[::2]] == ["0", "60", "120", "180", "240", "300"]
    for name in ["evaluations.csv", "training.csv"]:
        assert rows(killed / name) == rows(unbroken / name)
    assert same_weights(QSM.load(killed / "model").policy, QSM.load(unbroken / "model").policy)
    resumed_at = json.loads((killed / "meta.json").read_text())["resumed_at"]
    assert len(resumed_at) == 1 and resumed_at[0] >= 120
    assert json.loads((unbroken / "meta.json").read_text())["resumed_at"] == []


def test_cell_of_other_code_begins_again(tmp_path):
    arguments = dict(policy="MlpPolicy", policy_kwargs="dict(net_arch=[8])", learning_starts=50, batch_size=8)
    suite = dict(n_timesteps=60, eval_freq=30, n_eval_episodes=1, seeds=[0], tasks=["InvertedPendulum-v5"])
    (tmp_path / "tiny.yml").write_text(yaml.safe_dump(suite | {"algorithms": {"qsm": {"default": arguments}}}))
    (cell,) = read_suite(str(tmp_path / "tiny.yml"))
    left = (tmp_path / cell.folder).with_name(".seed0.tmp") / "checkpoints-another" / "rl_model_30_steps"
    left.mkdir(parents=True)
    assert run_cell(cell, tmp_path, "this")
    assert not left.exists() and json.loads((tmp_path / cell.folder / "meta.json").read_text())["resumed_at"] == []


@pytest.mark.expensive
def test_killed_zoo_goes_on(tmp_path):
    def command(name):
        arguments = ["--env", "InvertedPendulum-v5", "-n", "300", "--eval-freq", "100", "--eval-episodes", "1", "--seed", "3"]
        arguments += ["-f", str(tmp_path / name), "--checkpoints", str(tmp_path / name / "saves"), "--checkpoint-freq", "50"]
        arguments += ["-params", "learning_starts:40", "batch_size:8", "buffer_size:1000", "policy_kwargs:dict(net_arch=[8])"]
        return [sys.executable, "-m", "sb3_qsm.zoo", "train", *arguments]

    kill_when(lambda: list((tmp_path / "killed" / "saves").glob("*_150_steps")), command("killed"))
    for name in ["killed", "unbroken"]:
        done = subprocess.run(command(name), cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert ("Going on from" in done.stdout) == (name == "killed")
    killed, unbroken = tmp_path / "killed/qsm/InvertedPendulum-v5_2", tmp_path / "unbroken/qsm/InvertedPendulum-v5_1"
    assert same_weights(*(QSM.load(run / "InvertedPendulum-v5.zip").policy for run in (killed, unbroken)))
    for key in ["timesteps", "results"]:
        np.testing.assert_array_equal(np.load(killed / "evaluations.npz")[key], np.load(unbroken / "evaluations.npz")[key])
    assert len(checkpoints(tmp_path / "killed" / "saves")) == 2
