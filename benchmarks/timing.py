"""
What training and acting cost, QSM beside SAC and TD3, interleaved in one process: ``python -m benchmarks.speed``.

A machine's speed drifts, so the algorithms take turns in every round, ratios are taken within a round, and medians are
shown. Beside each time stands its arithmetic floor: the floating-point operations of its matrix products, counted by
PyTorch, over the rate of one 256 x 256 product measured in the same rounds.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from rich.console import Console
from rich.table import Table
from stable_baselines3 import SAC, TD3
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from benchmarks.cells import machine, peak_memory_mb, versions
from benchmarks.suites import check_known
from sb3_qsm import QSM

Row = dict[str, Any]
Maker = Callable[[], OffPolicyAlgorithm]
OUT = Path(__file__).parent / "results" / "speed"
N_OBS = 17  # observations of the stand-in environment: HalfCheetah's number


class Still(gym.Env):
    """Nothing happens: an environment of any action dimension that costs no time."""

    def __init__(self, action_dim: int = 6) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (N_OBS,), np.float32)
        self.action_space = spaces.Box(-1, 1, (action_dim,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """
        :param seed: not used
        :param options: not used
        :return: zeros and empty info
        """
        return np.zeros(N_OBS, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """
        :param action: not used
        :return: zeros, no reward, no end
        """
        return np.zeros(N_OBS, np.float32), 0.0, False, False, {}


def make(
    algorithm: type[OffPolicyAlgorithm], device: str, n_envs: int = 1, action_dim: int = 6, **kwargs: Any
) -> OffPolicyAlgorithm:
    """
    :param algorithm: class
    :param device: "cpu" or "cuda"
    :param n_envs: number of environments
    :param action_dim: number of action dimensions
    :param kwargs: arguments of the algorithm
    :return: a model that has begun to train
    """
    env = make_vec_env(lambda: Still(action_dim), n_envs)
    model = algorithm("MlpPolicy", env, buffer_size=20_000, learning_starts=0, device=device, seed=0, **kwargs)
    return model.learn(2 * n_envs)


def finish() -> None:
    """Wait for what a GPU has still to do."""
    if th.cuda.is_available():
        th.cuda.synchronize()


def milliseconds(work: Callable[[], Any], seconds: float) -> float:
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


def flops(work: Callable[[], Any]) -> int:
    """
    :param work: what to count
    :return: floating-point operations of its matrix products
    """
    with th.profiler.profile(with_flops=True) as profiler:
        work()
    products = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
    return sum(event.flops for event in profiler.key_averages() if event.key in products)


def matmul_rate(device: str, size: int = 256, seconds: float = 0.3) -> float:
    """
    :param device: "cpu" or "cuda"
    :param size: rows and columns of both matrices
    :param seconds: how long to measure
    :return: floating-point operations per millisecond of a matrix product
    """
    a, b = th.randn(2, size, size, device=device)
    return 2 * size**3 / milliseconds(lambda: a @ b, seconds)


def compare(what: dict[str, tuple[Callable[[], Any], int]], device: str, rounds: int, seconds: float) -> dict[str, Row]:
    """
    :param what: by name: what to time, and its floating-point operations
    :param device: "cpu" or "cuda"
    :param rounds: number of rounds
    :param seconds: how long to repeat each in a round
    :return: by name: medians of the time in ms, its ratio to the first, and of its arithmetic floor in ms
    """
    times: dict[str, list[float]] = {name: [] for name in what}
    rates = []
    for _ in range(rounds):
        rates.append(matmul_rate(device))
        for name, (work, _) in what.items():
            times[name].append(milliseconds(work, seconds))
    first = np.array(next(iter(times.values())))
    return {
        name: {
            "ms": float(np.median(values)),
            "ratio": float(np.median(values / first)),
            "floor ms": what[name][1] / float(np.median(rates)),
        }
        for name, values in times.items()
    }


def loop(device: str, algorithms: list[str] | None, rounds: int, seconds: float) -> Iterator[Row]:
    """
    :param device: "cpu" or "cuda"
    :param algorithms: which, all by default; ratios are to the first
    :param rounds: number of rounds
    :param seconds: how long to repeat each measurement in a round
    :return: rows of the main table: HalfCheetah-v5, defaults of each
    """
    common: dict[str, Any] = dict(policy="MlpPolicy", env="HalfCheetah-v5", seed=0, buffer_size=50_000)
    on: dict[str, Any] = dict(device=device, **common)
    makers: dict[str, Maker] = {
        "sac": lambda: SAC(**on),
        "td3": lambda: TD3(**on),
        "qsm": lambda: QSM(**on),
        "qsm, T = 10": lambda: QSM(policy_kwargs=dict(n_diffusion_steps=10), **on),
        "qsm, compiled": lambda: QSM(policy_kwargs=dict(compile_sampling=True), **on),
        "qsm, policy_delay = 1": lambda: QSM(policy_delay=1, **on),
        "qsm, mlp denoiser": lambda: QSM(policy_kwargs=dict(denoiser_class="mlp"), **on),
    }
    try:
        from sbx import SAC as SbxSAC

        makers["sbx sac"] = lambda: SbxSAC(**common)
    except ImportError:
        pass  # an optional column
    check_known("algorithm", algorithms or [], makers)
    models = {name: maker().learn(300) for name, maker in makers.items() if name in (algorithms or makers)}
    of_torch = [name for name in models if name != "sbx sac"]
    for threads in (1, 2) if device == "cpu" else (1,):
        th.set_num_threads(threads)
        work: dict[str, dict[str, tuple[Callable[[], Any], int]]] = {
            "100 steps of learn()": {
                name: (partial(model.learn, 100, reset_num_timesteps=False), 0) for name, model in models.items()
            },
            "2 updates, batch 256": {
                name: (partial(models[name].train, 2, 256), flops(partial(models[name].train, 2, 256))) for name in of_torch
            },
        }
        for batch in (1, 32):
            for deterministic in (True, False):
                kind = "deterministic" if deterministic else "sampled"
                obs = np.random.default_rng(0).normal(size=(batch, N_OBS)).astype(np.float32)
                work[f"{kind} predict, batch {batch}"] = {
                    name: (partial(model.predict, obs, deterministic=deterministic), 0) for name, model in models.items()
                }
        for what, calls in work.items():
            for name, row in compare(calls, device, rounds, seconds).items():
                yield {"what": what, "threads": threads, "algorithm": name, **row}
    th.set_num_threads(1)


def scaling(device: str, rounds: int, seconds: float) -> Iterator[Row]:
    """
    :param device: "cpu" or "cuda"
    :param rounds: number of rounds
    :param seconds: how long to repeat each measurement in a round
    :return: rows of the scaling tables, with the slope: time added by one more unit
    """

    def update(batch: int = 256, **kwargs: Any) -> tuple[Callable[[], Any], int]:
        model = make(QSM, device, **kwargs)
        work = partial(model.train, 2, batch)  # two, since the actor is updated once per two
        return work, flops(work)

    def act(n_envs: int) -> tuple[Callable[[], Any], int]:
        model = make(QSM, device)
        obs = np.zeros((n_envs, N_OBS), np.float32)
        work = partial(model.predict, obs)
        return work, flops(work)

    tables: dict[str, dict[int, tuple[Callable[[], Any], int]]] = {
        "diffusion steps (2 updates)": {n: update(policy_kwargs=dict(n_diffusion_steps=n)) for n in (1, 2, 5, 10, 20, 50)},
        "batch (2 updates)": {n: update(batch=n) for n in (64, 256, 1024, 4096)},
        "width (2 updates)": {n: update(policy_kwargs=dict(net_arch=[n, n])) for n in (256, 512, 1024)},
        "action dimension (2 updates)": {n: update(action_dim=n) for n in (1, 4, 16, 64)},
        "n_envs (one action for each)": {n: act(n) for n in (1, 4, 16)},
    }
    for what, entries in tables.items():
        calls = {str(n): entry for n, entry in entries.items()}
        before: tuple[int, float] | None = None
        for n, row in compare(calls, device, rounds, seconds).items():
            slope = "" if before is None else (row["ms"] - before[1]) / (int(n) - before[0])
            before = (int(n), row["ms"])
            yield {"what": what, "n": int(n), **row, "ms per unit": row["ms"] / int(n), "slope ms": slope}


def peak_memory(algorithm: str, n_transitions: int) -> float:
    """
    :param algorithm: "sac", "td3" or "qsm"
    :param n_transitions: size of the replay buffer, all of it touched
    :return: peak memory of a process that trains with it, in MB
    """
    code = (
        "import sys; from benchmarks.speed import train_with_full_buffer; "
        f"train_with_full_buffer({algorithm!r}, {n_transitions})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def train_with_full_buffer(algorithm: str, n_transitions: int) -> None:
    """
    Print the peak memory in MB of this process.

    :param algorithm: "sac", "td3" or "qsm"
    :param n_transitions: size of the replay buffer
    """
    cls = {"sac": SAC, "td3": TD3, "qsm": QSM}[algorithm]
    model = cls("MlpPolicy", Still(), buffer_size=n_transitions, learning_starts=0, device="cpu", seed=0)
    buffer = model.replay_buffer
    for array in (buffer.observations, buffer.next_observations, buffer.actions, buffer.rewards, buffer.dones):
        array[:] = 0  # memory that was asked for counts once it is written
    buffer.full = True
    model.learn(20)
    print(peak_memory_mb())


def write(name: str, rows: list[Row], console: Console) -> None:
    """
    Show a table, and write it with the command, machine and versions behind it.

    :param name: name of the table
    :param rows: its rows
    :param console: where to show it
    """
    table = Table(*rows[0], title=name)
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(table)
    OUT.mkdir(parents=True, exist_ok=True)
    with open(OUT / f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    about = {"command": " ".join(["python -m benchmarks.speed", *sys.argv[1:]]), "machine": machine(), "versions": versions()}
    (OUT / f"{name}.json").write_text(json.dumps(about, indent=2) + "\n")


def main() -> None:
    """
    Measure, print the tables, and write them as CSV.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each measurement in a round")
    parser.add_argument("--only", nargs="+", choices=["loop", "scaling", "memory"], default=["loop", "scaling", "memory"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of loop and scaling")
    parser.add_argument("--algorithms", nargs="+", help="of loop, all by default; ratios are to the first")
    args = parser.parse_args()
    console = Console(width=140)
    th.set_num_threads(1)
    suffix = "" if args.device == "cpu" else f"-{args.device}"
    if "loop" in args.only:
        write("loop" + suffix, list(loop(args.device, args.algorithms, args.rounds, args.seconds)), console)
    if "scaling" in args.only:
        write("scaling" + suffix, list(scaling(args.device, args.rounds, args.seconds)), console)
    if "memory" in args.only:
        sizes = {name: peak_memory(name, 1_000_000) for name in ("sac", "td3", "qsm")}
        rows = [{"algorithm": name, "peak MB": size, "ratio": size / sizes["sac"]} for name, size in sizes.items()]
        write("memory", rows, console)


if __name__ == "__main__":
    main()
