"""Where cells run: processes on this machine, or a Ray cluster. Same cells, same results."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from benchmarks.suites import Cell

ROOT = Path(__file__).parent.parent
Report = Callable[[Cell, int, float, float], None]  # cell, step, return, steps per second


def run_local(cells: list[Cell], out: Path, jobs: int, report: Report) -> Iterator[Cell]:
    """
    One process per cell, ``jobs`` at a time.

    :param cells: unfinished cells
    :param out: results folder
    :param jobs: processes at a time
    :param report: called as a cell advances
    :return: the cells as they end, finished or failed
    """
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(_run_process, cell, out, report): cell for cell in cells}
        try:
            for future in as_completed(futures):
                future.result()
                yield futures[future]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # interrupted: do not start the rest


def _run_process(cell: Cell, out: Path, report: Report) -> None:
    command = [*cell.command(sys.executable), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            for line in process.stdout or ():
                if line.startswith("progress "):
                    step, mean_return, speed = line.split()[1:]
                    report(cell, int(step), float(mean_return), float(speed))
        error = out / cell.folder / "error.txt"
        if process.returncode and not error.exists():  # killed: it could not write down its own end
            errors.seek(0)
            end = signal.Signals(-process.returncode).name if process.returncode < 0 else f"status {process.returncode}"
            error.parent.mkdir(parents=True, exist_ok=True)
            error.write_text(f"{errors.read()}\nthe process ended with {end}\n")


EXECUTORS = {"local": run_local}
