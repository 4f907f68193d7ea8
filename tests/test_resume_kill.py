"""Trainings killed with SIGKILL and started again, in processes of their own, beside trainings that were not."""

import json
import multiprocessing
import os
import random
import signal
import time

import pytest
import torch as th
from stable_baselines3 import SAC, TD3
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import KVWriter, Logger
from test_resume import WALL_CLOCK, digest, make_env, make_model

from sb3_qsm import QSM
from sb3_qsm.resume import ResumeCallback

TQC = pytest.importorskip("sb3_contrib").TQC
ALGORITHMS = {algorithm.__name__: algorithm for algorithm in (QSM, SAC, TD3, TQC)}


class JSONLinesWriter(KVWriter):
    """Each dump of the logger as one line, appended, so that a killed process loses none."""

    def __init__(self, path):
        self.file = open(path, "a")

    def write(self, key_values, key_excluded, step=0):
        row = {key: repr(value) for key, value in sorted(key_values.items()) if key not in WALL_CLOCK}
        self.file.write(json.dumps([step, row]) + "\n")
        self.file.flush()

    def close(self):
        self.file.close()


class Process(BaseCallback):
    """Note at which step this process begins, and kill it at another."""

    def __init__(self, folder, kill_at):
        super().__init__()
        self.folder = folder
        self.kill_at = kill_at

    def _on_training_start(self):
        (self.folder / f"started_{self.num_timesteps}").touch()

    def _on_step(self):
        if self.num_timesteps == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return True


def work(folder, algorithm, task, steps, n_envs, normalize, save_freq, kill_at=None):
    """Train until ``steps``, from the newest checkpoint in ``folder`` if there is one; leaves ``digest.json`` at the end."""
    th.set_num_threads(1)
    env = make_env(task, n_envs, normalize, max_episode_steps=40)  # so that there is something to log
    model = make_model(ALGORITHMS[algorithm], env, learning_starts=50, buffer_size=1000)
    model.set_logger(Logger(None, [JSONLinesWriter(folder / "log.jsonl")]))
    model.learn(steps, [ResumeCallback(save_freq, folder), Process(folder, kill_at)], log_interval=1)
    (folder / "digest.json").write_text(json.dumps(digest(model)))


def run(folder, *arguments):
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=work, args=(folder, *arguments))
    process.start()
    return process


def read_log(folder):
    """What was logged by number of episodes; a second value means that two processes differed."""
    rows = {}
    for line in (folder / "log.jsonl").read_text().splitlines():
        rows.setdefault(json.loads(line)[1]["time/episodes"], set()).add(line)
    return rows


def assert_same_run(folder, other):
    assert json.loads((folder / "digest.json").read_text()) == json.loads((other / "digest.json").read_text())
    assert read_log(folder) == read_log(other) != {}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_killed_run_is_the_unbroken_run(algorithm, tmp_path):
    """Weights, targets, optimizers, temperature, replay buffer, next random numbers and each logged row."""
    arguments = (algorithm, "Pendulum-v1", 130, 1, False, 25)
    processes = [run(tmp_path / "unbroken", *arguments), run(tmp_path / "killed", *arguments, 90)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, -signal.SIGKILL]
    run(tmp_path / "killed", *arguments).join()
    assert sorted(path.name for path in (tmp_path / "killed").glob("started_*")) == ["started_0", "started_75"]
    assert_same_run(tmp_path / "killed", tmp_path / "unbroken")


def check_kills_at_random(folder, kills, seed, longest, *arguments):
    """Kill at random moments, many of them while a checkpoint is written."""
    moments = random.Random(seed)
    unbroken = run(folder / "unbroken", *arguments)
    unbroken.join()
    killed = folder / "killed"
    went_on = []
    while len(went_on) < kills:
        process = run(killed, *arguments)
        while process.is_alive() and not (started := list(killed.glob("started_*"))):
            time.sleep(0.005)
        process.join(moments.uniform(0, longest))
        assert process.is_alive(), f"the run ended (status {process.exitcode}) after {len(went_on)} kills: give it more steps"
        process.kill()
        process.join()
        went_on.append(started[0].name)
        started[0].unlink()
    run(killed, *arguments).join()
    assert len(set(went_on)) > 1
    assert_same_run(killed, folder / "unbroken")


def test_kills_at_random(tmp_path):
    # Long enough that a fast machine has not ended it before the last kill
    check_kills_at_random(tmp_path, 3, 0, 0.25, "QSM", "InvertedPendulum-v5", 700, 2, True, 10)


@pytest.mark.expensive
@pytest.mark.parametrize(
    "case",
    [
        ("QSM", "InvertedPendulum-v5", 2000, 1, False, 20),
        ("QSM", "HalfCheetah-v5", 2000, 1, True, 20),
        ("QSM", "Ant-v5", 4000, 4, True, 20),
        ("SAC", "Humanoid-v5", 4000, 2, False, 20),
        ("TQC", "Hopper-v5", 4000, 2, True, 20),
    ],
    ids=lambda case: f"{case[0]} {case[1]}",
)
def test_many_kills_at_random(case, tmp_path):
    check_kills_at_random(tmp_path, 10, 0, 2.0, *case)
