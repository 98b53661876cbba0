"""What a run's folder says of where it came from."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from model import run_folder


def test_the_commit_is_the_checkouts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "_git", lambda *arguments: {"rev-parse": "0123456789ab", "status": " M file"}[arguments[0]])
    assert run_folder.git_commit() == "0123456789ab+changes"


@pytest.mark.parametrize("revision", ["", "abc123"])
def test_outside_a_checkout_the_environment_names_it(monkeypatch: pytest.MonkeyPatch, revision: str) -> None:
    def no_checkout(*_arguments: str) -> str:
        raise subprocess.CalledProcessError(128, "git")

    monkeypatch.setattr(run_folder, "_git", no_checkout)
    monkeypatch.setenv("SOURCE_REVISION", revision)
    assert run_folder.git_commit() == revision


def test_metrics_after_the_last_checkpoint_are_dropped(tmp_path: Path) -> None:
    folder = run_folder.RunFolder(tmp_path / "run")
    folder.create()
    folder.metrics.write_text('{"kind": "train", "step": 1}\n{"kind": "train", "step": 2}\n{"kind": "tra')
    folder.rewind(1)
    assert folder.metrics.read_text() == '{"kind": "train", "step": 1}\n'
