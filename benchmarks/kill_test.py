"""
Kill a training with SIGKILL at random moments, resume it each time, and compare it with one that was never stopped.

``python -m benchmarks.kill_test --kills 50`` prints what it did and ends with status 1 if a single bit differs.
"""

import argparse
import hashlib
import json
import multiprocessing
import random
import sys
import tempfile
import time
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_qsm import QSM
from sb3_qsm.checkpoint import CheckpointCallback
from sb3_qsm.storage import checkpoints

WALL_CLOCK = ("time/fps", "time/time_elapsed")
SMALL: dict[str, Any] = dict(
    policy_kwargs=dict(net_arch=[16]), batch_size=16, learning_starts=50, buffer_size=1000, seed=0, device="cpu"
)


class JSONLinesWriter(KVWriter):
    """
    Each dump of the logger as one line, appended, so that a killed process loses none.

    :param path: file
    """

    def __init__(self, path: Path) -> None:
        self.file = open(path, "a")

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, Any], step: int = 0) -> None:
        row = {key: repr(value) for key, value in sorted(key_values.items()) if key not in WALL_CLOCK}
        self.file.write(json.dumps([step, row]) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def make_env(task: str, n_envs: int, normalize: bool) -> VecEnv:
    env = make_vec_env(task, n_envs=n_envs)
    return VecNormalize(env) if normalize else env


def digest(model: QSM) -> dict[str, str]:
    """
    :param model: trained model
    :return: SHA-256 of its parameters (targets, optimizers and temperature included), of its replay buffer, and of the next
        random numbers
    """

    def add(sha256: Any, value: Any) -> None:
        if isinstance(value, dict | list | tuple):
            for item in value.items() if isinstance(value, dict) else value:
                add(sha256, item)
        elif isinstance(value, th.Tensor | np.ndarray):
            sha256.update(np.ascontiguousarray(value).tobytes())
        else:
            sha256.update(repr(value).encode())

    def of(value: Any) -> str:
        sha256 = hashlib.sha256()
        add(sha256, value)
        return sha256.hexdigest()

    buffer = {name: value for name, value in vars(model.replay_buffer).items() if isinstance(value, np.ndarray | dict)}
    draws = [random.random(), np.random.random(), th.rand(1), model.action_space.sample()]
    return {"parameters": of(model.get_parameters()), "replay_buffer": of(buffer), "random": of(draws)}


def work(folder: Path, task: str, steps: int, n_envs: int, normalize: bool, save_freq: int) -> None:
    """
    Train to ``steps``, from the newest checkpoint in ``folder`` if there is one; leaves ``digest.json`` at the end.

    :param folder: folder of the run
    :param task: id of the environment
    :param steps: where the run ends
    :param n_envs: number of environments
    :param normalize: whether to use VecNormalize
    :param save_freq: calls of the callback between checkpoints
    """
    th.set_num_threads(1)
    env = make_env(task, n_envs, normalize)
    model = QSM.resume(folder, env) if checkpoints(folder) else QSM("MlpPolicy", env, **SMALL)
    model.set_logger(Logger(None, [JSONLinesWriter(folder / "log.jsonl")]))
    (folder / f"started_{model.num_timesteps}").touch()
    callback = CheckpointCallback(save_freq, folder)
    model.learn(steps - model.num_timesteps, callback, log_interval=1, reset_num_timesteps=False)
    (folder / "digest.json").write_text(json.dumps(digest(model)))


def read_log(folder: Path) -> dict[str, set[str]]:
    """
    :param folder: folder of a run
    :return: what was logged by number of episodes; a second value means that two processes differed
    """
    rows: dict[str, set[str]] = {}
    for line in (folder / "log.jsonl").read_text().splitlines():
        rows.setdefault(json.loads(line)[1]["time/episodes"], set()).add(line)
    return rows


def run(context: BaseContext, folder: Path, *arguments: Any) -> BaseProcess:
    folder.mkdir(parents=True, exist_ok=True)
    process = context.Process(target=work, args=(folder, *arguments))  # type: ignore[attr-defined]
    process.start()
    return process


def compare(
    context: BaseContext, folder: Path, kills: int, seed: int, arguments: tuple[Any, ...], longest: float
) -> tuple[list[int], list[str]]:
    """
    :param context: how processes are started
    :param folder: empty folder for both runs
    :param kills: how often to kill
    :param seed: seed of the moments
    :param arguments: of :func:`work`, without the folder
    :param longest: longest time between start of the training and the kill in seconds
    :return: steps from which the killed run went on, and what differs in the end
    """
    moments = random.Random(seed)
    unbroken = run(context, folder / "unbroken", *arguments)
    unbroken.join()
    killed = folder / "killed"
    went_on: list[int] = []
    while len(went_on) < kills:
        process = run(context, killed, *arguments)
        while process.is_alive() and not (started := list(killed.glob("started_*"))):
            time.sleep(0.005)
        process.join(moments.uniform(0, longest))
        if not process.is_alive():
            raise RuntimeError(f"the run ended (status {process.exitcode}) after {len(went_on)} kills: give it more steps")
        process.kill()
        process.join()
        went_on.append(int(started[0].name.split("_")[1]))
        started[0].unlink()
    run(context, killed, *arguments).join()
    expected, found = (json.loads((path / "digest.json").read_text()) for path in (folder / "unbroken", killed))
    different = [name for name in expected if expected[name] != found[name]]
    different += ["log"] * (read_log(folder / "unbroken") != read_log(killed))
    return went_on, different


def main(argv: list[str] | None = None) -> int:
    """
    :param argv: command line without the program
    :return: exit status, 1 if anything differs
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kill_test", description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="kills in total, shared by the cases")
    parser.add_argument("--longest", type=float, default=2.0, help="longest time from start to kill, in seconds")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    cases = [  # task, steps, environments, VecNormalize, save_freq
        ("InvertedPendulum-v5", 2000, 1, False, 20),
        ("HalfCheetah-v5", 2000, 1, True, 20),
        ("Ant-v5", 4000, 4, True, 20),
        ("Humanoid-v5", 2000, 2, False, 20),
        ("Hopper-v5", 2000, 2, True, 20),
    ]
    failed = False
    for i, case in enumerate(cases):
        kills = args.kills // len(cases) + (i < args.kills % len(cases))
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            context = multiprocessing.get_context("spawn")
            went_on, different = compare(context, Path(folder), kills, args.seed + i, case, args.longest)
            task, steps, n_envs, normalize, save_freq = case
            print(
                f"{task}, {steps} steps, {n_envs} env(s), VecNormalize {normalize}, a checkpoint every {save_freq} calls: "
                f"{kills} kills in {time.perf_counter() - start:.0f} s; processes started at steps {went_on}; "
                f"{'DIFFERENT: ' + ', '.join(different) if different else 'identical'}",
                flush=True,
            )
            failed |= bool(different)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
