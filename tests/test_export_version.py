"""Numbered, whole, never overwritten."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from export.version import VersionExistsError, check_free, check_writable, next_version, publish, sha256, staged

NOBODY = 65534


@contextmanager
def folder_of_a_user() -> Iterator[Path]:
    """A folder, and within the block a user who owns it and to whom permissions apply, as they do not to root."""
    root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as name:
        if root:
            os.chown(name, NOBODY, -1)
            os.seteuid(NOBODY)
        try:
            yield Path(name)
        finally:
            if root:
                os.seteuid(0)


def modes(*paths: Path) -> list[int]:
    return [path.stat().st_mode & 0o777 for path in paths]


def test_next_version_counts_from_the_highest_number(tmp_path: Path) -> None:
    assert next_version(tmp_path, "cells") == 1
    for name in ("1", "9", "10", "notes", ".export-x"):
        (tmp_path / "cells" / name).mkdir(parents=True)
    assert next_version(tmp_path, "cells") == 11


def test_taken_version_is_refused_with_the_next_number(tmp_path: Path) -> None:
    (tmp_path / "cells" / "3").mkdir(parents=True)
    assert check_free(tmp_path, "cells", 4) == tmp_path / "cells" / "4"
    with pytest.raises(VersionExistsError, match=r"leave --version out to get 4"):
        check_free(tmp_path, "cells", 3)


def test_publish_moves_the_whole_folder(tmp_path: Path) -> None:
    with staged(tmp_path) as folder:
        assert folder.parent == tmp_path  # the same file system, so that a rename is enough
        (folder / "model.onnx").write_bytes(b"graph")
        publish(folder, tmp_path / "cells" / "1")
    assert (tmp_path / "cells" / "1" / "model.onnx").read_bytes() == b"graph"
    assert [path.name for path in tmp_path.iterdir()] == ["cells"]


def test_a_race_for_the_number_loses_cleanly(tmp_path: Path) -> None:
    target = tmp_path / "cells" / "1"
    with staged(tmp_path) as folder:
        (folder / "model.onnx").write_bytes(b"late")
        target.mkdir(parents=True)
        (target / "model.onnx").write_bytes(b"first")
        with pytest.raises(VersionExistsError, match="appeared during the export"):
            publish(folder, target)
    assert (target / "model.onnx").read_bytes() == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["cells"]


def test_a_folder_that_nobody_may_write_to_is_no_race() -> None:
    with folder_of_a_user() as repository, staged(repository) as folder:
        (folder / "model.onnx").write_bytes(b"graph")
        (repository / "cells").mkdir(mode=0o555)
        target = repository / "cells" / "1"
        with pytest.raises(OSError, match=f"cannot be moved to {target}: Permission denied"):
            publish(folder, target)


def test_where_nothing_can_be_written_is_known_before_any_work() -> None:
    with folder_of_a_user() as repository:
        closed, file = repository / "closed", repository / "file"
        closed.mkdir(mode=0o555)
        file.write_text("")
        check_writable(repository)
        check_writable(repository / "models" / "cells")
        for folder in (closed, closed / "models" / "cells"):
            with pytest.raises(PermissionError, match=f"in {folder}: this user may not write to {closed}"):
                check_writable(folder)
        with pytest.raises(NotADirectoryError, match=f"{file} is no folder"):
            check_writable(file / "cells")


def test_a_strict_umask_hides_nothing_from_the_services_user(tmp_path: Path) -> None:
    tmp_path.chmod(0o750)
    repository, target = tmp_path / "made" / "models", tmp_path / "made" / "models" / "cells" / "1"
    before = os.umask(0o077)
    try:
        with staged(repository) as folder:
            (folder / "model.onnx").write_bytes(b"graph")
            publish(folder, target)
    finally:
        os.umask(before)
    assert modes(tmp_path) == [0o750]  # what was there keeps its permissions
    assert modes(tmp_path / "made", repository, target.parent, target) == [0o755] * 4
    assert modes(target / "model.onnx") == [0o644]


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_failure_leaves_no_scratch(tmp_path: Path, kind: type[BaseException]) -> None:
    def fail() -> None:
        with staged(tmp_path) as folder:
            (folder / "model.onnx").write_bytes(b"half")
            raise kind

    with pytest.raises(kind):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_sha256_of_known_bytes(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
