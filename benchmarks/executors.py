"""Where cells run: processes on this machine, or a Ray cluster. Same cells, same results."""

import os
import shutil
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


def run_local(cells: list[Cell], out: Path, jobs: int, report: Report, address: str | None = None) -> Iterator[Cell]:
    """
    One process per cell, ``jobs`` at a time.

    :param cells: unfinished cells
    :param out: results folder
    :param jobs: processes at a time
    :param report: called as a cell advances
    :param address: not used
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
    error = out / cell.folder / "error.txt"
    error.unlink(missing_ok=True)  # of an earlier attempt
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            for line in process.stdout or ():
                if line.startswith("progress "):
                    step, mean_return, speed = line.split()[1:]
                    report(cell, int(step), float(mean_return), float(speed))
        if process.returncode and not error.exists() and not cell.is_finished(out):  # killed: it could not write down its end
            errors.seek(0)
            end = signal.Signals(-process.returncode).name if process.returncode < 0 else f"status {process.returncode}"
            error.parent.mkdir(parents=True, exist_ok=True)
            error.write_text(f"{errors.read()}\nthe process ended with {end}\n")


def run_ray(cells: list[Cell], out: Path, jobs: int, report: Report, address: str | None = None) -> Iterator[Cell]:
    """
    One Ray task per cell. A task whose worker or node dies is run again elsewhere; no shared disk is needed.

    :param cells: unfinished cells
    :param out: results folder on this machine
    :param jobs: cells at a time, if Ray is started here; a cluster runs as many as it has cores
    :param report: not called, only ends are shown
    :param address: address of a running cluster, or "auto"; None starts Ray here
    :return: the cells as they end, finished or failed
    """
    import ray

    from benchmarks.cells import git_revision, publish, run_cell

    def run_remotely(cell: Cell, revision: str) -> dict[str, bytes]:
        with tempfile.TemporaryDirectory() as folder:
            run_cell(cell, Path(folder), revision)
            return {file.name: file.read_bytes() for file in Path(folder, cell.folder).iterdir()}

    code = {"working_dir": str(ROOT), "excludes": ["benchmarks/results", ".git"], "env_vars": {"OMP_NUM_THREADS": "1"}}
    ray.init(address=address, num_cpus=None if address else jobs, runtime_env=code)
    # max_calls=1: a fresh process for every cell, as with local processes.
    task = ray.remote(num_cpus=1, max_calls=1, max_retries=-1)(run_remotely)
    revision = git_revision()  # the nodes have the code, but not its history
    pending = {task.remote(cell, revision): cell for cell in cells}
    try:
        while pending:
            (done,), _ = ray.wait(list(pending))
            cell = pending.pop(done)
            folder = out / cell.folder
            files = folder.with_name(f".{folder.name}.tmp")
            shutil.rmtree(files, ignore_errors=True)
            files.mkdir(parents=True)
            try:
                contents = ray.get(done)
            except ray.exceptions.RayError as error:
                contents = {"error.txt": str(error).encode()}
            for name, content in contents.items():
                (files / name).write_bytes(content)
            publish(files, folder)
            yield cell
    finally:
        ray.shutdown()


EXECUTORS = {"local": run_local, "ray": run_ray}
