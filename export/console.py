"""What export's commands share on a command line: the console that they write to, and how they refuse."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

from rich.console import Console

LOG_WIDTH = 150
"""A report that goes to a file is not cut to a terminal's default width."""

USAGE_STATUS = 64
"""Exit status of a command that was typed wrong (`EX_USAGE` of sysexits): argparse's own 2 means a broken gate or bound here."""


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
    """As wide as the terminal, or wide enough for every table where there is none."""
    console = Console(soft_wrap=True)
    return console if console.is_terminal else Console(soft_wrap=True, width=LOG_WIDTH)


def error_console() -> Console:
    """Where sentences about failures go."""
    return Console(stderr=True, soft_wrap=True)
