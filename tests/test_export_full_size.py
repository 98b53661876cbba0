"""Every preset and every network of torchvision's, exported at its own size, verified, inspected and audited: `make test-full-size`.

On a quiet core a small network takes a few minutes, a large one up to an hour: the proof alone passes some fifty pictures through
both sides. `-k zf` picks one.
"""

from __future__ import annotations

import json
import os
import resource
import time
from pathlib import Path

import pytest
import torch
from calm_detector import calm_detector
from torchvision_networks import BUILDERS

from export import audit
from export.__main__ import main
from model.checkpoint import Checkpoint, save_checkpoint
from model.presets import PRESETS
from model.pretrained import rename
from model.weights import BOOKKEEPING
from service.runtime import OnnxRuntime

CLASS_NAMES = tuple(f"class {k}" for k in range(1, 21))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(4 * 3600),
    pytest.mark.skipif(os.environ.get("FULL_SIZE") != "1", reason="hours, not minutes: make test-full-size"),
]


def prove(arguments: list[str], folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exports, and runs what the README offers for the file; prints what it took."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    status = main([*arguments, "--name", "full", "--repository", str(folder / "models")])
    if status:
        told = capsys.readouterr()
        with capsys.disabled():
            print(told.out, told.err)  # the whole table: an assertion would cut it
    assert status == 0
    seconds = time.perf_counter() - started
    file = folder / "models" / "full" / "1" / "model.onnx"
    runtime = OnnxRuntime(file, provider="cpu")
    manifest = runtime.manifest
    runtime.close()
    assert manifest.architecture == name
    assert manifest.parity["passed"] is True
    assert manifest.parity["matched"] > 1000, "the proof must see detections"
    assert main(["inspect", str(file)]) == 0
    assert audit.main([str(file), "--provider", "cpu", "--json", str(folder / "audit.json")]) == 0
    assert json.loads((folder / "audit.json").read_text())["measured"] is True
    said = {key: manifest.parity[key] for key in ("matched", "missed", "extra", "undecided", "max_box_px", "max_score")}
    with capsys.disabled():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # of the process so far: alone with -k
        print(f"\n{name}: {seconds:.0f} s, file {file.stat().st_size / 1e6:.1f} MB, at most {peak:.1f} GiB of memory, {said}")


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    detector = calm_detector(PRESETS[name](CLASS_NAMES).detector)
    assert detector.config.input.buckets == PRESETS[name](CLASS_NAMES).detector.input.buckets
    save_checkpoint(tmp_path / "best.pt", Checkpoint(detector.state_dict(), detector.config, {"dataset": "none: random weights"}))
    del detector
    prove([str(tmp_path / "best.pt")], tmp_path, name, capsys)


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_torchvisions_networks(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = tmp_path / "given.pth"
    torch.save(in_torchvisions_names(name), weights)
    prove([f"torchvision:fasterrcnn_{name}", "--weights", str(weights)], tmp_path, name, capsys)


def in_torchvisions_names(name: str) -> dict[str, torch.Tensor]:
    """Calm random weights as a state dict that torchvision's own network takes."""
    names = BUILDERS[name](weights=None, weights_backbone=None).state_dict()
    rows = len(names["roi_heads.box_predictor.cls_score.bias"])
    detector = calm_detector(PRESETS[name](tuple(f"class {k}" for k in range(1, rows))).detector)
    ours = detector.state_dict()
    return {key: ours[rename(key, detector)] for key in names if not key.endswith(BOOKKEEPING)}
