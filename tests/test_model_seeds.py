"""Mean and spread over seeds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.checkpoint import Checkpoint, save_checkpoint
from model.config import InputConfig
from model.data.synthetic import CLASS_NAMES, write_voc
from model.faster_rcnn import build_detector
from model.presets import mobilenet_v2_fpn
from model.seeds import main, mean_and_spread, to_markdown

FRAME = InputConfig(short_side=64, long_side=96, buckets=((64, 96), (96, 64)))


def run_folder(root: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    config = replace(mobilenet_v2_fpn(CLASS_NAMES).detector, input=FRAME)
    path = root / f"seed{seed}" / "best.pt"
    path.parent.mkdir(parents=True)
    (path.parent / "config.json").write_text(json.dumps({"training": {"seed": seed}}))
    save_checkpoint(path, Checkpoint(build_detector(config).state_dict(), config, {}, None))
    return path


def test_mean_and_spread_by_hand() -> None:
    found = mean_and_spread([{"run": "a", "AP": 0.60}, {"run": "b", "AP": 0.62}, {"run": "c", "AP": 0.64}])
    assert found["mean"]["AP"] == pytest.approx(0.62)
    assert found["spread"]["AP"] == pytest.approx(0.02)
    assert mean_and_spread([{"run": "a", "AP": 0.6}])["spread"] == {"AP": 0.0}


def test_two_runs_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_voc(tmp_path / "voc", {"val": 3, "test": 4})
    paths = [str(run_folder(tmp_path, seed)) for seed in (3, 4)]
    written = tmp_path / "seeds.json"
    assert main([*paths, "--data", str(data), "--choose-on", "val", "--json", str(written), "--threads", "1"]) == 0
    values = json.loads(written.read_text())
    assert [row["seed"] for row in values["runs"]] == [3, 4]
    assert values["split"] == "test"
    assert values["mean"]["AP"] == pytest.approx((values["runs"][0]["AP"] + values["runs"][1]["AP"]) / 2)
    best = max(values["runs"], key=lambda row: float(row["AP on val"]))
    assert values["chosen"] == best["run"]
    printed = capsys.readouterr().out
    assert to_markdown(values) in printed
    assert "± " in printed


def test_a_missing_checkpoint_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none.pt"), "--data", str(tmp_path)]) == 1
    assert "error: " in capsys.readouterr().err
