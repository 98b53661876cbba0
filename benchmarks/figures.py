"""What the measuring commands share: a parser that shows their page, where the figures go, and on how many CPUs they were taken."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any


def make_parser(name: str, page: str | None) -> argparse.ArgumentParser:
    """A parser for `python -m benchmarks.<name>` that shows the module's page as it stands and takes --json."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=page, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    return parser


def keep(found: dict[str, Any], path: Path | None) -> None:
    """Print the figures, and write them where the user asked for it."""
    text = json.dumps(found, indent=1)
    if path is not None:
        path.write_text(text + "\n")
    print(text)


def cpus() -> int:
    """How many this process and its children may run on, which taskset and containers make fewer than the machine has."""
    return len(os.sched_getaffinity(0))
