"""Compile the dependency groups of pyproject.toml to hashed requirements, one file a job. Needs `uv` on the path."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
JOBS = {
    "cpu": ["service", "cpu"],
    "gpu": ["service", "gpu"],
    "train": ["service", "cpu", "train", "export"],
    "dev": ["service", "cpu", "train", "export", "test", "lint"],
    "dev-gpu": ["service", "gpu", "train", "export", "test", "lint"],
    "load": ["load"],
    "bench": ["service", "cpu", "load", "peers"],
    "ray": ["service", "cpu", "ray"],
    "test-ray": ["service", "cpu", "load", "ray", "test-ray"],
    "sbom": ["sbom"],
}
"""File name -> dependency groups."""


def compile_job(name: str, groups: list[str]) -> None:
    """Write requirements/<name>.txt for all platforms, with hashes and without any index address."""
    options = [
        "--universal",
        "--python-version",
        "3.11",
        "--generate-hashes",
        "--no-emit-index-url",
        "--no-header",
        "--no-annotate",
        "--quiet",
    ]
    wanted = [option for group in groups for option in ("--group", group)]
    command = ["uv", "pip", "compile", *options, "pyproject.toml", *wanted, "-o", f"requirements/{name}.txt"]
    subprocess.run(command, cwd=ROOT, check=True)  # noqa: S603  # a fixed command of ours


if __name__ == "__main__":
    for job in sys.argv[1:] or JOBS:
        compile_job(job, JOBS[job])
