"""Numbered, whole, never overwritten."""

from __future__ import annotations

from pathlib import Path

import pytest

from export.version import VersionExistsError, check_free, next_version, publish, sha256, staged


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
