"""Checkpoints: what is read is what was written, a failed write harms nothing, and no code comes out of a file."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.checkpoint import Checkpoint, CheckpointError, load_checkpoint, load_detector, save_checkpoint
from model.faster_rcnn import build_detector
from model.presets import mobilenet_v2_fpn

ROOT = Path(__file__).resolve().parent.parent
CONFIG = mobilenet_v2_fpn(("a", "b")).detector


def small(value: float) -> Checkpoint:
    """Not a detector's weights, but a file of the same form."""
    return Checkpoint({"w": torch.full((300, 1000), value)}, CONFIG, {"epoch": 3, "metrics": {"AP": 0.5}}, {"rng": [1, (2, 3)]})


def test_round_trip(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.pt", small(2.0))
    back = load_checkpoint(tmp_path / "a.pt")
    assert torch.equal(back.detector["w"], torch.full((300, 1000), 2.0))
    assert back.config == CONFIG
    assert back.training["metrics"]["AP"] == 0.5
    assert back.resume == {"rng": [1, (2, 3)]}
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_a_detector_comes_back_in_evaluation_mode(tmp_path: Path) -> None:
    torch.manual_seed(0)
    detector = build_detector(CONFIG)
    save_checkpoint(tmp_path / "a.pt", Checkpoint(detector.state_dict(), CONFIG, {}))
    back = load_detector(tmp_path / "a.pt")
    assert not back.training
    assert all(torch.equal(value, back.state_dict()[name]) for name, value in detector.state_dict().items())


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.pt", small(1.0))
    with pytest.raises(CheckpointError, match="does not fit this version's network"):
        load_detector(tmp_path / "a.pt")


WRITE = """
import resource, signal, sys
from pathlib import Path
from test_model_checkpoint import small
from model.checkpoint import CheckpointError, save_checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails with EFBIG, as it would with ENOSPC on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    save_checkpoint(Path(sys.argv[1]), small(9.0))
except CheckpointError as error:
    print(error)
    sys.exit(7)
"""


def test_a_full_disk_leaves_the_previous_checkpoint_whole(tmp_path: Path) -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    path = tmp_path / "last.pt"
    save_checkpoint(path, small(1.0))
    command = [sys.executable, "-c", WRITE, str(path)]
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 7, done.stderr
    assert "the previous file is untouched" in done.stdout
    assert "--resume" in done.stdout
    assert load_checkpoint(path).detector["w"][0, 0] == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.pt"]


class Malicious:
    """What a pickle could do if it were let."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("owned",))


def test_files_that_are_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.pt"
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load_checkpoint(path)
    path.write_bytes(b"not a zip")
    with pytest.raises(CheckpointError, match="is not a whole checkpoint"):
        load_checkpoint(path)
    save_checkpoint(path, small(1.0))
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(CheckpointError, match="is not a whole checkpoint"):
        load_checkpoint(path)
    torch.save({"state": 1}, path)
    with pytest.raises(CheckpointError, match="holds no detector"):
        load_checkpoint(path)
    torch.save({"format": 2, "detector": {}, "config": {}, "training": {}}, path)
    with pytest.raises(CheckpointError, match="has format 2"):
        load_checkpoint(path)
    torch.save(Malicious(), path)
    with pytest.raises(CheckpointError):
        load_checkpoint(path)
    assert "owned" not in capsys.readouterr().out
