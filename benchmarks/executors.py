"""Where runs run: processes on this machine, or a Ray cluster. Same runs, same results."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from .suites import ROOT, Run

Report = Callable[[Run, int, float, float], None]  # run, step, return, steps per second


def run_local(runs: list[Run], out: Path, jobs: int, report: Report, address: str | None = None) -> Iterator[Run]:
    """
    One process per run, ``jobs`` at a time.

    :param runs: unfinished runs
    :param out: folder of all runs
    :param jobs: processes at a time
    :param report: called as a run advances
    :param address: not used
    :return: the runs as they end, finished or failed
    """
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(_run_process, run, out, report): run for run in runs}
        try:
            for future in as_completed(futures):
                future.result()
                yield futures[future]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # interrupted: do not start the rest


def _run_process(run: Run, out: Path, report: Report) -> None:
    command = [*run.command(sys.executable), "--out", str(out)]
    error = out / run.folder / "error.txt"
    error.unlink(missing_ok=True)  # of an earlier attempt
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            for line in process.stdout or ():
                if line.startswith("progress "):
                    step, mean_return, speed = line.split()[1:]
                    report(run, int(step), float(mean_return), float(speed))
        if process.returncode and not error.exists() and not run.is_finished(out):  # killed: it could not write down its end
            errors.seek(0)
            end = signal.Signals(-process.returncode).name if process.returncode < 0 else f"status {process.returncode}"
            error.parent.mkdir(parents=True, exist_ok=True)
            error.write_text(f"{errors.read()}\nthe process ended with {end}\n")


def run_ray(runs: list[Run], out: Path, jobs: int, report: Report, address: str | None = None) -> Iterator[Run]:
    """
    One Ray task per run. A task whose worker or node dies is run again elsewhere; no shared disk is needed.

    :param runs: unfinished runs
    :param out: folder of all runs, on this machine
    :param jobs: runs at a time, if Ray is started here; a cluster runs as many as it has cores
    :param report: not called, only ends are shown
    :param address: address of a running cluster, or "auto"; None starts Ray here
    :return: the runs as they end, finished or failed
    """
    import ray

    from .runs import execute, git_revision, publish

    def run_remotely(run: Run, revision: str) -> dict[str, bytes]:
        with tempfile.TemporaryDirectory() as folder:
            execute(run, Path(folder), revision)
            return {file.name: file.read_bytes() for file in Path(folder, run.folder).iterdir()}

    code = {} if ROOT is None else {"working_dir": str(ROOT), "excludes": ["benchmarks/runs", ".git"]}
    variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    ray.init(address=address, num_cpus=None if address else jobs, runtime_env={**code, "env_vars": variables})
    # max_calls=1: a fresh process for every run, as with local processes.
    task = ray.remote(num_cpus=1, max_calls=1, max_retries=-1)(run_remotely)
    revision = git_revision()  # the nodes have the code, but not its history
    pending = {task.remote(run, revision): run for run in runs}
    try:
        while pending:
            (done,), _ = ray.wait(list(pending))
            run = pending.pop(done)
            folder = out / run.folder
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
            yield run
    finally:
        ray.shutdown()


EXECUTORS = {"local": run_local, "ray": run_ray}
