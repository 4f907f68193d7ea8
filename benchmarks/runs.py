"""One run: train one algorithm on one task from one seed, and leave a whole result or none."""

import csv
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import shutil
import subprocess
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from filelock import FileLock
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.vec_env import VecEnv

import sb3_qsm
from sb3_qsm.resume import ResumeCallback

from .algorithms import algorithm_class
from .suites import NOISE, ROOT, Run, read_function, read_policy_kwargs

EVALUATION_SEED = 1_000_000  # far from the training seeds; the same start states for every algorithm and every evaluation
PACKAGES = ("stable_baselines3", "sb3_contrib", "torch", "gymnasium", "mujoco", "dm_control", "numpy")


def make_env(run: Run) -> gym.Env:
    """
    :param run: what to train
    :return: its environment, in rl-zoo's wrapper if one is given, with dictionaries of numbers (dm_control) flattened
    """
    env = gym.make(run.task)
    if "env_wrapper" in run.hyperparams:
        env = read_function("env_wrapper", run.hyperparams)(env)
    return gym.wrappers.FlattenObservation(env) if isinstance(env.observation_space, gym.spaces.Dict) else env


def make_model(run: Run) -> OffPolicyAlgorithm:
    """
    :param run: what to train
    :return: the untrained model with its training environment, built as rl-zoo builds it
    """
    kwargs = {key: value for key, value in run.hyperparams.items() if key not in ("n_timesteps", "env_wrapper")}
    env = make_vec_env(lambda: make_env(run), n_envs=kwargs.pop("n_envs", 1))
    if "policy_kwargs" in kwargs:
        kwargs["policy_kwargs"] = read_policy_kwargs(kwargs)
    if "score_target" in kwargs:
        kwargs["score_target"] = read_function("score_target", kwargs)
    noise = kwargs.pop("noise_type", None)
    sigma = kwargs.pop("noise_std", 0.0) * np.ones(get_action_dim(env.action_space))
    if noise is not None:
        kwargs["action_noise"] = NOISE[noise](np.zeros_like(sigma), sigma)
    return algorithm_class(run.algorithm)(env=env, seed=run.seed, **kwargs)


def evaluate(model: BaseAlgorithm, envs: VecEnv, deterministic: bool) -> list[dict[str, Any]]:
    """
    One episode in each environment, from the same start states at every call. Leaves the random numbers of the
    training as they were, so that evaluating more often does not change what is learnt.

    :param model: trained model
    :param envs: as many environments as episodes are wanted
    :param deterministic: passed to ``model.predict``
    :return: the last ``info`` of each episode; ``info["episode"]["r"]`` is its return
    """
    ends: dict[int, dict[str, Any]] = {}

    def note_end(local: dict[str, Any], _: dict[str, Any]) -> None:
        if local["done"]:
            ends[local["i"]] = local["info"]

    with th.random.fork_rng():
        th.manual_seed(EVALUATION_SEED)
        envs.seed(EVALUATION_SEED)
        evaluate_policy(model, envs, n_eval_episodes=envs.num_envs, deterministic=deterministic, callback=note_end)
    return [ends[i] for i in range(envs.num_envs)]


class Recorder(BaseCallback):
    """
    Evaluate every ``eval_freq`` steps and write it down; say once a second how far the training is.

    :param run: the run in training
    :param folder: folder of the result
    """

    def __init__(self, run: Run, folder: Path) -> None:
        super().__init__()
        self.run = run
        self.folder = folder
        self.envs = make_vec_env(lambda: make_env(run), n_envs=run.n_eval_episodes)
        self.file = open(folder / "evaluations.csv", "w", newline="")
        self.start = self.evaluation_s = self.last_report = self.trained_s = 0.0
        self.started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.next_evaluation = 0.0
        # Checkpoints hold the data of callbacks: what was written so far goes into the files of the next process
        self.logs: dict[str, str] = {}
        self.resumed_at: list[int] = []
        self.mean_return = float("nan")

    @property
    def training_s(self) -> float:
        """Seconds since the start without those spent in evaluation."""
        return time.perf_counter() - self.start - self.evaluation_s

    def _on_training_start(self) -> None:
        self.start = time.perf_counter() - self.trained_s - self.evaluation_s
        self.last_report = 0.0
        if not self.logs:
            self._evaluate()
            return
        self.resumed_at.append(self.num_timesteps)
        self.file.write(self.logs["evaluations.csv"])
        (output,) = self.logger.output_formats
        output.file.write(self.logs["progress.csv"])  # type: ignore[attr-defined]
        output.keys = self.logs["progress.csv"].splitlines()[0].split(",")  # type: ignore[attr-defined]

    def _on_step(self) -> bool:
        if self.num_timesteps >= self.next_evaluation:
            self._evaluate()
        if time.perf_counter() - self.last_report > 1.0:
            self._report()
        return True

    def _on_training_end(self) -> None:
        self._report()
        self.file.close()

    def _report(self) -> None:
        self.last_report = time.perf_counter()
        try:
            print("progress", self.num_timesteps, self.mean_return, self.num_timesteps / self.training_s, flush=True)
        except BrokenPipeError:  # the runner was killed: leave the run to its successor
            os._exit(1)

    def _evaluate(self) -> None:
        start, training_s = time.perf_counter(), self.training_s
        for mode in ("sampled", "deterministic"):
            ends = evaluate(self.model, self.envs, deterministic=mode == "deterministic")
            returns = {f"return_{i}": end["episode"]["r"] for i, end in enumerate(ends)}
            outcomes = {f"outcome_{i}": end["outcome"] for i, end in enumerate(ends) if "outcome" in end}
            row = {"step": self.num_timesteps, "training_s": round(training_s, 2), "mode": mode, **returns, **outcomes}
            writer = csv.DictWriter(self.file, row)
            if self.file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)
            self.mean_return = float(np.mean(list(returns.values())))
        self.file.flush()
        self.model.dump_logs()
        # SB3 finishes its rollout, which may go beyond the last evaluation
        last = self.num_timesteps >= self.run.n_timesteps
        self.next_evaluation = math.inf if last else min(self.next_evaluation + self.run.eval_freq, self.run.n_timesteps)
        self.evaluation_s += time.perf_counter() - start
        self.trained_s = self.training_s
        self.logs = {name: (self.folder / name).read_text() for name in ("evaluations.csv", "progress.csv")}


@functools.cache
def git_revision() -> str:
    """The commit of this checkout, with ``-dirty`` if a tracked file differs from it; the version where it is installed."""
    if ROOT is None:
        return sb3_qsm.__version__
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def machine() -> dict[str, Any]:
    """What a reader needs to judge a wall-clock time."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
    gpu = th.cuda.get_device_name() if th.cuda.is_available() else None
    return {"cpu": cpu, "cores": os.cpu_count(), "gpu": gpu, "os": platform.platform(), "threads": th.get_num_threads()}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers."""
    installed = {name: importlib.metadata.version(name) for name in PACKAGES if importlib.util.find_spec(name)}
    return {"python": platform.python_version(), "sb3_qsm": sb3_qsm.__version__, **installed}


@functools.cache
def checkpoints_name() -> str:
    """Name of the folder of checkpoints: a run goes on only with the code that began it."""
    files = sorted(path for folder in (Path(sb3_qsm.__file__).parent, Path(__file__).parent) for path in folder.rglob("*.py"))
    return f"checkpoints-{hashlib.sha256(b''.join(path.read_bytes() for path in files)).hexdigest()[:16]}"


def train(run: Run, folder: Path, revision: str) -> None:
    """
    Train from the beginning, or from the newest checkpoint that is there.

    :param run: what to train
    :param folder: existing folder for the files of the result
    :param revision: git revision to note
    """
    recorder = Recorder(run, folder)  # before the model, which sets the seeds: making environments draws random numbers
    model = make_model(run)
    model.set_logger(configure(str(folder), ["csv"]))
    resume = ResumeCallback(max(run.eval_freq // model.n_envs, 1), folder / checkpoints_name())
    model.learn(run.n_timesteps, [resume, recorder], log_interval=None)  # type: ignore[arg-type]
    model.logger.close()
    model.save(folder / "model")
    (folder / "progress.csv").rename(folder / "training.csv")
    meta = {
        **asdict(run),
        "defaults": run.defaults,
        "command": " ".join(run.command()),
        "git_revision": revision,
        "started": recorder.started,
        "resumed_at": recorder.resumed_at,
        "training_s": round(recorder.training_s, 1),
        "evaluation_s": round(recorder.evaluation_s, 1),
        "steps_per_s": round(run.n_timesteps / recorder.training_s, 2),
        "device": str(model.device),
        **machine(),
        "versions": versions(),
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")


def publish(files: Path, folder: Path) -> None:
    """
    Move a complete folder to its final name in one step. ``meta.json`` in it says that the run is finished.

    :param files: complete folder on the same disk
    :param folder: final name; what an earlier failure left there is replaced
    """
    for path in [*files.iterdir(), files]:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(files, folder)


def execute(run: Run, out: Path, revision: str | None = None) -> bool:
    """
    Train unless the result is there. A killed process leaves only a temporary folder, which the next one goes on from.

    :param run: what to train
    :param out: folder of all runs
    :param revision: git revision to note; None asks git
    :return: whether the result is there now; if not, ``error.txt`` in the run's folder says why
    """
    folder = out / run.folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # The lock dies with its process. Whoever comes second waits, then finds the result.
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if run.is_finished(out):
            return True
        files = folder.with_name(f".{folder.name}.tmp")
        if not (files / checkpoints_name()).exists():
            shutil.rmtree(files, ignore_errors=True)
        files.mkdir(exist_ok=True)
        try:
            th.set_num_threads(1)
            train(run, files, revision or git_revision())
        except Exception:
            (files / "error.txt").write_text(traceback.format_exc())
        shutil.rmtree(files / checkpoints_name(), ignore_errors=True)
        publish(files, folder)
    return run.is_finished(out)
