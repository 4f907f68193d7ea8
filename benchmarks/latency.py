"""
Time of one action, PyTorch's ``predict`` beside onnxruntime, on one thread: ``python -m benchmarks.latency``.

HalfCheetah-v5 with VecNormalize and the default networks; a batch of one and of 64 observations. ``predict`` gets observations
that are normalised already, the ONNX graph normalises them itself.
"""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_qsm import QSM
from sb3_qsm.export import export_onnx


def microseconds(function: Callable[[], object], repeats: int = 300) -> tuple[float, float]:
    """
    :param function: what to time
    :param repeats: calls, after 20 that do not count
    :return: median and 95th percentile
    """
    times = []
    for _ in range(20 + repeats):
        start = time.perf_counter()
        function()
        times.append(1e6 * (time.perf_counter() - start))
    return float(np.median(times[20:])), float(np.percentile(times[20:], 95))


def main() -> None:
    th.set_num_threads(1)
    model = QSM("MlpPolicy", VecNormalize(make_vec_env("HalfCheetah-v5")), device="cpu")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    rng = np.random.default_rng(0)
    print(
        "| Observations | Chain | PyTorch `predict`, median (95 %) | onnxruntime, median (95 %) | Ratio |",
        "|---|---|---|---|---|",
        sep="\n",
    )
    with tempfile.TemporaryDirectory() as folder:
        for deterministic in (True, False):
            path = Path(folder) / "policy.onnx"
            export_onnx(model, path, deterministic)
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            for n in (1, 64):
                obs = rng.normal(size=(n, 17))
                noise = rng.normal(size=(1 + model.actor.noise_schedule.n_steps, n, 6)).astype(np.float32)
                inputs = {"observation": obs} if deterministic else {"observation": obs, "noise": noise}
                eager = microseconds(partial(model.predict, obs.astype(np.float32), deterministic=deterministic))
                onnx = microseconds(partial(session.run, None, inputs))
                cells = [f"{median:.0f} us ({high:.0f})" for median, high in (eager, onnx)]
                name = "deterministic" if deterministic else "sampled"
                print(f"| {n} | {name} | {' | '.join(cells)} | {eager[0] / onnx[0]:.1f} |", flush=True)


if __name__ == "__main__":
    main()
