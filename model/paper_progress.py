"""Progress of long loops over steps or pictures: a bar on a terminal, elsewhere a line now and then; both with the time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_SECONDS = 10.0

Say = Callable[[str], None]
Advance = Callable[[int, float | None], None]
"""Called with (done, loss); the loss is None where there is none."""


@contextmanager
def shown_progress(say: Say, name: str, total: int, unit: str = "") -> Iterator[Advance]:
    """What to call after each step.

    Args:
        say: takes the lines where standard error is no terminal.
        unit: of what is counted, such as "pictures".
    """
    if not sys.stderr.isatty():
        yield _Lines(say, name, total, unit)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(name, total=total, note=unit)
        yield lambda done, loss: bar.update(task, completed=done, note=unit if loss is None else f"loss {loss:.3f}")


class _Lines:
    """A line every few seconds, and one at the end of a training."""

    def __init__(self, say: Say, name: str, total: int, unit: str) -> None:
        self.say, self.name, self.total, self.unit = say, name, total, unit
        self.started = self.said = time.monotonic()
        self.before: int | None = None

    def __call__(self, done: int, loss: float | None = None) -> None:
        if self.before is None:
            self.before = done - 1  # a stage that goes on was not that fast
        now = time.monotonic()
        if now - self.said < LINE_SECONDS and (done < self.total or loss is None):
            return
        self.said = now
        left = (now - self.started) / (done - self.before) * (self.total - done)
        note = "" if loss is None else f"  loss {loss:.3f}"
        self.say(f"{self.name}: {done}/{self.total}{' ' * bool(self.unit)}{self.unit}{note}  left {_clock(left)}")


def _clock(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
