"""
What training and acting cost, QSM beside SAC and TD3: ``python -m benchmarks.timing``.

A machine's speed drifts, so the algorithms take turns in every round, ratios are taken within a round, and medians are shown.
"""

import argparse
import csv
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import numpy as np
import torch as th
from stable_baselines3 import SAC, TD3
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_qsm import QSM
from sb3_qsm.export import export_onnx

from .runs import machine, versions
from .suites import check_known

Row = dict[str, Any]
Work = Callable[[], Any]
TASK = "HalfCheetah-v5"
RESULTS = Path(__file__).parent / "results" / "timing.csv"


def finish() -> None:
    """Wait for what a GPU has still to do."""
    if th.cuda.is_available():
        th.cuda.synchronize()


def milliseconds(work: Work, seconds: float) -> float:
    """
    :param work: what to time
    :param seconds: how long to repeat it
    :return: time of one call
    """
    work()
    finish()
    start, n = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        work()
        n += 1
    finish()
    return 1e3 * (time.perf_counter() - start) / n


def compare(works: dict[str, Work], rounds: int, seconds: float) -> dict[str, tuple[float, float]]:
    """
    :param works: what to time, by name
    :param rounds: number of rounds
    :param seconds: how long to repeat each in a round
    :return: by name: medians of the time in ms and of its ratio to the first
    """
    times = np.array([[milliseconds(work, seconds) for work in works.values()] for _ in range(rounds)])
    medians = np.median(times, axis=0), np.median(times / times[:, :1], axis=0)
    return {name: (float(ms), float(ratio)) for name, ms, ratio in zip(works, *medians, strict=True)}


def make_models(device: str, algorithms: list[str] | None) -> dict[str, OffPolicyAlgorithm]:
    """
    :param device: "cpu" or "cuda"
    :param algorithms: which, all by default
    :return: models that have begun to train, defaults of each
    :raises ValueError: for an unknown algorithm
    """
    common: dict[str, Any] = dict(policy="MlpPolicy", env=TASK, seed=0, buffer_size=50_000, device=device)

    def compiled() -> QSM:
        model = QSM(**common)
        model.actor.compile()
        return model

    makers: dict[str, Callable[[], OffPolicyAlgorithm]] = {
        "sac": lambda: SAC(**common),
        "td3": lambda: TD3(**common),
        "qsm": lambda: QSM(**common),
        "qsm, T = 10": lambda: QSM(policy_kwargs=dict(n_diffusion_steps=10), **common),
        "qsm, compiled": compiled,
        "qsm, policy_delay = 1": lambda: QSM(policy_delay=1, **common),
        "qsm, mlp denoiser": lambda: QSM(policy_kwargs=dict(denoiser_class="mlp"), **common),
    }
    check_known("algorithm", algorithms or [], makers)
    return {name: maker().learn(300) for name, maker in makers.items() if name in (algorithms or makers)}


def onnx_session(model: QSM, deterministic: bool, obs: np.ndarray) -> Work:
    """
    :param model: trained model
    :param deterministic: whether to leave out all noise
    :param obs: observations, shape (B, F)
    :return: the exported chain on one thread, acting on the observations
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "policy.onnx"
        export_onnx(model, path, deterministic)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    inputs = {"observation": obs}
    for it in session.get_inputs():
        if it.name == "noise":
            inputs["noise"] = np.zeros((it.shape[0], len(obs), it.shape[2]), np.float32)
    return partial(session.run, None, inputs)


def measure(device: str, algorithms: list[str] | None, rounds: int, seconds: float) -> Iterator[Row]:
    """
    :param device: "cpu" or "cuda"
    :param algorithms: which, all by default; ratios are to the first
    :param rounds: number of rounds
    :param seconds: how long to repeat each measurement in a round
    :return: rows of the table
    """
    models = make_models(device, algorithms)
    works: dict[str, dict[str, Work]] = {
        "100 steps of learn()": {name: partial(model.learn, 100, reset_num_timesteps=False) for name, model in models.items()},
        # Two, since QSM's actor is updated once per two of the critics
        "2 updates, batch 256": {name: partial(model.train, 2, 256) for name, model in models.items()},
    }
    for batch in (1, 64):
        for deterministic in (True, False):
            obs = np.random.default_rng(0).normal(size=(batch, 17))
            acting: dict[str, Work] = {
                name: partial(model.predict, obs.astype(np.float32), deterministic=deterministic)
                for name, model in models.items()
            }
            if isinstance(model := models.get("qsm"), QSM) and device == "cpu" and find_spec("onnxruntime"):
                acting["qsm, onnxruntime"] = onnx_session(model, deterministic, obs)
            works[f"{'deterministic' if deterministic else 'sampled'} action, batch {batch}"] = acting
    about = machine()
    where = {
        "threads": th.get_num_threads(),
        "machine": about["gpu"] if device == "cuda" else about["cpu"],
        "torch": versions()["torch"],
    }
    for what, by_algorithm in works.items():
        for name, (ms, ratio) in compare(by_algorithm, rounds, seconds).items():
            yield {"what": what, "algorithm": name, "ms": round(ms, 4), "ratio": round(ratio, 3), **where}


def main(argv: list[str] | None = None) -> None:
    """
    Measure, print the table, and write it as CSV.

    :param argv: command line without the program
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.timing", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each measurement in a round")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--algorithms", nargs="+", help="all by default; ratios are to the first")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    th.set_num_threads(1)
    rows = []
    for row in measure(args.device, args.algorithms, args.rounds, args.seconds):
        print(f"{row['what']:32}{row['algorithm']:24}{row['ms']:10.3f} ms{row['ratio']:8.2f}", flush=True)
        rows.append(row)
    with open(args.out, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
