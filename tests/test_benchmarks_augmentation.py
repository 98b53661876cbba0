"""The augmentation ablation: its variants are what training knows, and it scores, writes and goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.augmentation import VARIANTS, _write, build_parser, main, settings_of
from model.config import config_from_dict
from model.data.synthetic import write_voc
from model.overrides import with_settings
from model.presets import PRESETS
from model.train import preset_values
from model.training import AugmentConfig, train_config_from_dict


def test_every_variant_changes_the_preset_and_nothing_else() -> None:
    options = build_parser().parse_args(["somewhere", "--short-side", "192", "--epochs", "3"])
    preset = PRESETS[options.preset](("cell",))
    seen: list[AugmentConfig] = []
    for variant in VARIANTS:
        values = with_settings(preset_values(preset), settings_of(variant, 1, options))
        training = train_config_from_dict(values["training"])
        assert (training.epochs, training.seed, training.lr) == (3, 1, preset.training.lr)
        assert training.augment not in seen
        seen.append(training.augment)
        frame = config_from_dict(values["detector"]).input
        assert (frame.short_side, frame.long_side) == (192, 320)
    assert seen[0] == preset.training.augment


def test_an_unknown_variant_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["somewhere", "--variants", "and magic"]) == 1
    assert "no and magic" in capsys.readouterr().err


@pytest.mark.slow
def test_variants_are_trained_scored_and_not_trained_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = write_voc(tmp_path / "voc", {"train": 6, "val": 3})
    command = [str(data), "--variants", "mirroring alone,and copy-paste", "--epochs", "1", "--short-side", "64", "--threads", "1"]
    command += ["--set", "training.workers=0", "--work", str(tmp_path / "work"), "--seeds", "2"]
    assert main([*command, "--json", str(tmp_path / "a.json"), "--markdown", str(tmp_path / "a.md")]) == 0
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert [len(row["seeds"]) for row in rows] == [2, 2]
    assert "| and copy-paste |" in (tmp_path / "a.md").read_text()
    written = [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("work/*/best.pt"))]
    assert main([*command, "--json", str(tmp_path / "b.json")]) == 0
    assert [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("work/*/best.pt"))] == written
    assert json.loads((tmp_path / "b.json").read_text())["rows"] == rows


def test_a_page_of_an_interrupted_run_names_what_is_missing(tmp_path: Path) -> None:
    page = tmp_path / "a.md"
    options = build_parser().parse_args(["somewhere", "--variants", "and copy-paste,and mosaic", "--markdown", str(page)])
    row = {"variant": "and copy-paste", "AP": 0.5, "AP50": 0.8, "AP75": 0.6, "AP_sd": None}
    _write([row], options)
    assert page.read_text().endswith("| and copy-paste | 0.500 | 0.800 | 0.600 | - |\n\nNot trained to the end: and mosaic.\n")
    _write([row, {**row, "variant": "and mosaic"}], options)
    assert "Not trained" not in page.read_text()
