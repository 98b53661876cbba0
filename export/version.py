"""Numbered version folders: written beside their place, flushed to disk, moved there in one step, never overwritten."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class VersionExistsError(ValueError):
    """The version folder is already there."""


def next_version(repository: Path, name: str) -> int:
    """One above the highest number under `repository/name`; 1 for a new model."""
    folder = repository / name
    taken = [int(entry.name) for entry in folder.iterdir() if entry.name.isdigit()] if folder.is_dir() else []
    return max(taken, default=0) + 1


def check_free(repository: Path, name: str, version: int) -> Path:
    """The folder of a version that does not exist yet.

    Raises:
        VersionExistsError: it does; versions are never overwritten.
    """
    target = repository / name / str(version)
    if target.exists():
        free = next_version(repository, name)
        raise VersionExistsError(f"{target} exists and versions are never overwritten; leave --version out to get {free}")
    return target


@contextmanager
def staged(repository: Path) -> Iterator[Path]:
    """A scratch folder on the repository's own disk; whatever is left of it is gone afterwards, also after Ctrl-C."""
    repository.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".export-", dir=repository))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def publish(folder: Path, target: Path) -> None:
    """Move a finished folder to its place so that a reader sees all of it or nothing.

    Raises:
        VersionExistsError: another export took the number meanwhile.
    """
    for path in folder.iterdir():
        _flush(path)
    _flush(folder)
    folder.chmod(0o755)  # scratch folders are private, versions are read by the service's user
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.rename(target)
    except OSError as error:
        raise VersionExistsError(f"{target} appeared during the export ({error.strerror}); export again") from error
    _flush(target.parent)


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
