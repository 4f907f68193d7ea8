"""
Time and bytes of a checkpoint beside SB3's ``save`` and ``save_replay_buffer``: ``python -m benchmarks.checkpoint_cost``.

HalfCheetah-v5 with the default networks and a replay buffer for a million transitions, filled with random numbers. The first
checkpoint holds all but the last 10 000 of them, the next adds these. SB3 writes the whole array each time, filled or not,
and does not wait for the disk.
"""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.kill_test import make_env
from sb3_qsm import QSM
from sb3_qsm.checkpoint import CheckpointCallback, buffer_arrays

TASK, NEW = "HalfCheetah-v5", 10_000


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def fill(model: QSM, rows: int) -> None:
    """Put that many transitions into the replay buffer, as if the model had collected them."""
    buffer, rng = model.replay_buffer, np.random.default_rng(0)
    assert buffer is not None
    for _, array in buffer_arrays(buffer):
        array[buffer.pos : rows] = rng.random(array[buffer.pos : rows].shape)
    buffer.pos, buffer.full = rows % buffer.buffer_size, rows == buffer.buffer_size
    model.num_timesteps = rows


def row(filled: int, repeats: int = 3) -> str:
    """
    :param filled: transitions in the replay buffer
    :param repeats: of which the median is taken
    :return: line of the table
    """
    times: dict[str, list[float]] = {}
    sizes: dict[str, int] = {}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as name:
            ours, theirs = Path(name) / "ours", Path(name) / "theirs"
            model = QSM("MlpPolicy", make_env(TASK, 1, False), learning_starts=10**7, device="cpu")
            callback = CheckpointCallback(10**9, ours)
            model.learn(1, callback)
            fill(model, filled - NEW)
            times.setdefault("first", []).append(timed(callback.save))
            sizes["first"] = bytes_in(ours)
            fill(model, filled)
            times.setdefault("next", []).append(timed(callback.save))
            sizes["next"] = bytes_in(ours) - sizes["first"]
            env = make_env(TASK, 1, False)
            times.setdefault("resume", []).append(timed(partial(QSM.resume, ours, env)))
            theirs.mkdir()
            saved = timed(partial(model.save, theirs / "a")) + timed(partial(model.save_replay_buffer, theirs / "b"))
            times.setdefault("SB3", []).append(saved)
            sizes["SB3"] = bytes_in(theirs)
    cells = [f"{median(times[key]):.2f} s, {sizes[key] / 1e6:.1f} MB" for key in ("first", "next", "SB3")]
    return f"| {filled:,} | {' | '.join(cells)} | {median(times['resume']):.2f} s |"


if __name__ == "__main__":
    print("| Transitions | First checkpoint | Next checkpoint | SB3, each time | Resume |\n|---|---|---|---|---|")
    for filled in (10_000, 100_000, 1_000_000):
        print(row(filled), flush=True)
