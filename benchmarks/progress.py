"""The live picture of a running suite."""

from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .suites import Run


class Board(Progress):
    """
    A bar for the suite, one for each run in progress, and a line that stays for each that ended.

    :param n_runs: number of runs asked for
    :param n_finished: how many of them were finished before
    :param out: folder of all runs
    """

    def __init__(self, n_runs: int, n_finished: int, out: Path) -> None:
        text, note = TextColumn("{task.description}"), TextColumn("{task.fields[note]}")
        super().__init__(text, BarColumn(20), MofNCompleteColumn(), note, TimeElapsedColumn(), TimeRemainingColumn())
        self.out = out
        self.n_failed = 0
        self.suite = self.add_task("runs", total=n_runs, completed=n_finished, note="")
        self.bars: dict[Path, TaskID] = {}

    def step(self, run: Run, step: int, mean_return: float, steps_per_s: float) -> None:
        """
        :param run: a run in progress
        :param step: environment steps done
        :param mean_return: mean return of its latest deterministic evaluation
        :param steps_per_s: speed of its training
        """
        if run.folder not in self.bars:
            self.bars[run.folder] = self.add_task(str(run.folder), total=run.n_timesteps, note="")
        note = f"return {mean_return:.1f}  {steps_per_s:.0f} steps/s"
        bar = self._tasks[self.bars[run.folder]]
        if not self.console.is_terminal and 10 * step // run.n_timesteps > 10 * bar.completed // run.n_timesteps:
            self.console.print(f"{run.folder}  {step}/{run.n_timesteps}  {note}", soft_wrap=True)
        self.update(bar.id, completed=step, note=note)

    def end(self, run: Run) -> None:
        """
        :param run: a run that finished or failed
        """
        finished = run.is_finished(self.out)
        self.n_failed += not finished
        note = ""
        if run.folder in self.bars:
            bar = self.bars.pop(run.folder)
            note = next(task.fields["note"] for task in self.tasks if task.id == bar)
            self.remove_task(bar)
        error = self.out / run.folder / "error.txt"
        self.console.print(f"finished {run.folder}  {note}" if finished else f"[red]failed[/red] {error}", soft_wrap=True)
        self.advance(self.suite)
