"""Numbered version folders: written beside their place, flushed to disk, moved there in one step, never overwritten."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

READABLE_FILE, READABLE_FOLDER = 0o644, 0o755
"""Whatever the umask is: the service's user is another than the one who exports."""


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


def check_writable(folder: Path) -> None:
    """Whether the folder, or else the nearest one above it that exists, takes new entries.

    Raises:
        OSError: it does not, as a sentence.
    """
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(f"nothing can be published in {folder}: {nearest} is no folder")
    if not os.access(nearest, os.W_OK | os.X_OK, effective_ids=True):
        raise PermissionError(f"nothing can be published in {folder}: this user may not write to {nearest}")


@contextmanager
def staged(repository: Path) -> Iterator[Path]:
    """A scratch folder on the repository's own disk; whatever is left of it is gone afterwards, also after Ctrl-C."""
    _make_folder(repository)
    scratch = Path(tempfile.mkdtemp(prefix=".export-", dir=repository))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def publish(folder: Path, target: Path) -> None:
    """Move a finished folder to its place so that a reader sees all of it or nothing.

    Raises:
        VersionExistsError: another export took the number meanwhile.
        OSError: it cannot be moved there, as a sentence.
    """
    for path in folder.iterdir():
        path.chmod(READABLE_FILE)
        _flush(path)
    folder.chmod(READABLE_FOLDER)  # scratch folders are private
    _flush(folder)
    _make_folder(target.parent)
    try:
        folder.rename(target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise VersionExistsError(f"{target} appeared during the export ({error.strerror}); export again") from error
        raise OSError(f"the proven version cannot be moved to {target}: {error.strerror}") from error
    _flush(target.parent)


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _make_folder(folder: Path) -> None:
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in missing:
        made.chmod(READABLE_FOLDER)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
