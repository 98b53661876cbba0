"""Progress of a training run: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_SECONDS = 30.0


class TrainingProgress:
    """Shows loss, pictures a second, the share of time spent waiting for data, and the time left."""

    def __init__(self, total_batches: int, *, quiet: bool = False) -> None:
        self.total = total_batches
        self.quiet = quiet
        self.console = Console(soft_wrap=True)
        self._started = time.monotonic()
        self._line_due = self._started + LINE_SECONDS
        self._done_at_start: int | None = None
        self._bar = self._make_bar() if sys.stdout.isatty() and not quiet else None
        self._task = self._bar.add_task("training", total=total_batches, note="") if self._bar is not None else None

    def _make_bar(self) -> Progress:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
        return Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=self.console)

    def __enter__(self) -> TrainingProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, epoch: int, loss: float, images_per_s: float, wait_share: float) -> None:
        """After a batch; `done` counts batches of the whole run."""
        if self._done_at_start is None:
            self._done_at_start = done - 1
        note = f"loss {loss:.3f}  {images_per_s:.1f} img/s  data wait {wait_share:.0%}"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, description=f"epoch {epoch + 1}", note=note)
        elif time.monotonic() >= self._line_due and not self.quiet:
            self._line_due = time.monotonic() + LINE_SECONDS
            self.console.print(f"epoch {epoch + 1}  {done}/{self.total}  {note}  left {self._left(done)}")

    def _left(self, done: int) -> str:
        elapsed = time.monotonic() - self._started
        seconds = int(elapsed / max(1, done - (self._done_at_start or 0)) * (self.total - done))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"

    def say(self, text: str) -> None:
        """A line above the bar."""
        if not self.quiet:
            self.console.print(text, highlight=False, markup=False)
