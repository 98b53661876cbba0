"""What export's commands share on a command line: the console that they write to, and how they refuse."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from rich.console import Console

from model.stopping import INTERRUPTED

LOG_WIDTH = 150
"""A report that goes to a file is not cut to a terminal's default width."""

USAGE_STATUS = 64
"""Exit status of a command that was typed wrong (`EX_USAGE` of sysexits): argparse's own 2 means a broken gate or bound here."""

ENDING_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class Parser(argparse.ArgumentParser):
    """A parser whose exit status for a mistake no pipeline takes for a verdict."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(USAGE_STATUS, f"{self.prog}: error: {message}\n")


def positive(text: str) -> int:
    """The type of an option that counts from 1."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected 1, 2, 3, ..., got {text!r}")
    return int(text)


def wide_console() -> Console:
    """As wide as the terminal, or wide enough for every table where there is none. Brackets and colons are text: class names have them."""
    console = Console(soft_wrap=True, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = LOG_WIDTH
    return console


def error_console() -> Console:
    """Where sentences about failures go; brackets and colons in them are text."""
    return Console(stderr=True, soft_wrap=True, markup=False, emoji=False)


@contextmanager
def interruptible() -> Iterator[None]:
    """Within the block SIGTERM and a closed terminal raise KeyboardInterrupt, as Ctrl-C does, so that scratch folders are removed.

    What the caller had ignored stays ignored: under nohup a closed terminal ends nothing. Only for the main thread, as all of `signal`.
    """
    heard = [number for number in ENDING_SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]

    def interrupt(number: int, frame: FrameType | None) -> None:
        for other in heard:  # a closed terminal tells twice, through the kernel and the shell: the second must not stop the tidying up
            signal.signal(other, signal.SIG_IGN)
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, interrupt) for number in heard}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def interrupted(outcome: str) -> int:
    """Say what the interrupt left or did not leave.

    Returns:
        The exit status.
    """
    with suppress(OSError):  # the terminal may be what is gone
        error_console().print(f"interrupted; {outcome}")
    return INTERRUPTED
