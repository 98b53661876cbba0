"""The console that all of export's commands write to."""

from __future__ import annotations

from rich.console import Console

LOG_WIDTH = 150
"""A report that goes to a file is not cut to a terminal's default width."""


def wide_console() -> Console:
    """As wide as the terminal, or wide enough for every table where there is none."""
    console = Console(soft_wrap=True)
    return console if console.is_terminal else Console(soft_wrap=True, width=LOG_WIDTH)
