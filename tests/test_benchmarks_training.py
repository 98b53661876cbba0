import json
from pathlib import Path

import pytest
import torch

from benchmarks.torchvision_twin import TwinError, check_twin, share_weights, start_calmly, torchvision_twin
from benchmarks.training import main, merged, plot, table, training_row
from model.faster_rcnn import FasterRCNN, build_detector
from model.presets import PRESETS

CLASSES = ("cell", "disc", "star")


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_torchvisions_side_holds_the_same_network(preset: str) -> None:
    config = PRESETS[preset](CLASSES).detector
    with torch.device("meta"):  # counting needs no values
        check_twin(FasterRCNN(config), torchvision_twin(config))


def test_another_network_is_refused() -> None:
    small, large = (PRESETS[name](CLASSES).detector for name in ("mobilenet_v2_fpn", "mobilenet_v3_large_320_fpn"))
    with torch.device("meta"), pytest.raises(TwinError, match="not the same network"):
        check_twin(FasterRCNN(small), torchvision_twin(large))


@pytest.mark.parametrize("preset", ["mobilenet_v2_fpn", "mobilenet_v3_large_320_fpn", "resnet50_c4"])
def test_with_shared_weights_the_bodies_see_the_same(preset: str) -> None:
    config = PRESETS[preset](CLASSES).detector
    ours, theirs = build_detector(config).eval(), torchvision_twin(config).eval()
    start_calmly(theirs, config)
    share_weights(theirs, ours)
    picture = torch.rand(1, 3, 96, 128, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        own, twins = ours.backbone(picture), theirs.get_submodule("backbone")(picture)
    for mine, their in zip(own, twins.values(), strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-3, atol=1e-3 * float(their.abs().max()))
        assert 0.1 < float(mine.abs().max()) < 100


def test_weights_of_another_network_are_not_shared() -> None:
    small, large = (PRESETS[name](CLASSES).detector for name in ("mobilenet_v2_fpn", "mobilenet_v3_large_320_fpn"))
    with torch.device("meta"), pytest.raises(TwinError, match="stands where"):
        share_weights(FasterRCNN(small), torchvision_twin(large))


def test_a_row_by_hand() -> None:
    trained = {"ours": [(2.0, 0.1, 1.0), (4.0, 0.1, 0.9), (2.0, 0.0, 0.8)], "torchvision": [(4.0, 1.0, 1.0)] * 3}
    row = training_row(trained, {"ours": 2**20, "torchvision": 2**21}, images=8)
    assert row["images_per_s"] == {"ours": 4.0, "torchvision": 2.0}
    assert row["ratio"] == 2.0
    assert row["data_wait_share"] == {"ours": pytest.approx(0.2 / 8), "torchvision": 0.25}
    assert row["last_loss"] == {"ours": 0.8, "torchvision": 1.0}


def test_rows_are_drawn_with_and_without_a_part(tmp_path: Path) -> None:
    training = training_row({name: [(1.0, 0.0, 1.0)] for name in ("ours", "torchvision")}, {"ours": 1, "torchvision": 1}, images=4)
    inference = {"batch": 4, "seconds": {"ours": 1.0, "torchvision": 2.0}, "ratio": 2.0}
    rows = [
        {"preset": "a", "short_side": 320, "training": training, "inference": inference},
        {"preset": "b", "short_side": None, "inference": inference},
    ]
    plot(rows, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").stat().st_size > 1000
    assert table(rows, "title").row_count == 2


def test_both_sides_train_and_detect_in_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = "--short-side 96 --batch-size 2 --threads 1 --workers 0 --steps 1 --rounds 1 --infer-rounds 1 --infer-batch 2 --device cpu"
    assert main([*tiny.split(), "--out", str(tmp_path)]) == 0
    (row,) = json.loads((tmp_path / "training.json").read_text())["rows"]
    assert row["training"]["ratio"] > 0
    assert row["inference"]["ratio"] > 0
    assert all(0 < loss < 100 for loss in row["training"]["last_loss"].values())
    assert min(row["training"]["peak_memory_bytes"].values()) > 50e6
    assert "mobilenet_v2_fpn at 96 px: training" in capsys.readouterr().out
    started = (tmp_path / "training.json").stat().st_mtime_ns
    assert main([*tiny.split(), "--out", str(tmp_path), "--resume"]) == 0  # nothing is left to measure
    assert (tmp_path / "training.json").stat().st_mtime_ns == started


def test_a_row_takes_the_place_of_an_earlier_one_of_its_name() -> None:
    earlier = [{"preset": "a", "short_side": None, "n": 1}, {"preset": "b", "short_side": 320, "n": 2}]
    assert [row["n"] for row in merged(earlier, {"preset": "b", "short_side": 320, "n": 3})] == [1, 3]
    assert [row["n"] for row in merged(earlier, {"preset": "b", "short_side": None, "n": 4})] == [1, 2, 4]


def test_a_side_that_fails_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "error: the side" in capsys.readouterr().err
