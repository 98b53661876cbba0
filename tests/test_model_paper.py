"""The paper's tables: every row runs for real on a handful of scenes, and what is printed is what was published and what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_model_fast_rcnn import TINY, tiny_config
from torchvision.ops import roi_pool

from model.alternate import detector_config
from model.config import RoIConfig
from model.data.formats import open_dataset
from model.data.records import DetectionSet
from model.data.synthetic import write_voc
from model.faster_rcnn import FasterRCNN, build_detector
from model.metrics.predictions import empty_prediction
from model.paper import QUICK, main, read_options
from model.paper_lab import mean_ap
from model.paper_rcnn import PYRAMID, crop_features, fit_regions, pool_pyramid, pyramid_detector, pyramid_features, warp
from model.paper_speed import SpeedRow, ratios
from model.paper_tables import LAMBDA_TO_WEIGHT, TABLES, learned_sizes
from model.presets import zf

SETTINGS = [part for setting in TINY for part in ("--set", setting)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_voc(tmp_path_factory.mktemp("voc"), {"train": 3, "val": 3, "test": 2})


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def train(data: Path) -> DetectionSet:
    return open_dataset(data, "train")


@pytest.fixture
def detector() -> FasterRCNN:
    torch.manual_seed(0)
    return build_detector(tiny_config()).eval()


def run(table: str, data: Path, cache: Path, out: Path, *more: str) -> dict[str, Any]:
    common = [
        "--train-split",
        "train",
        "--steps",
        "1,1,1,1",
        "--proposals",
        "60",
        "--cache",
        str(cache),
        "--device",
        "cpu",
        "--preset",
        "zf",
    ]
    assert main([table, str(data), *common, *SETTINGS, "--json", str(out / "table.json"), *more]) == 0
    content: dict[str, Any] = json.loads((out / "table.json").read_text())
    return content


@pytest.mark.parametrize(
    "table",
    ["table1", "table3", pytest.param("table8", marks=pytest.mark.slow), pytest.param("table9", marks=pytest.mark.slow), "proposals"],
)
def test_every_row_is_measured(table: str, data: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(table, data, cache, tmp_path, "--limit", "2", "--second-split", "val")
    rows = TABLES[table].rows(tiny_config())
    assert [row["label"] for row in result["rows"]] == [row.label for row in rows]
    assert [row["published"] for row in result["rows"]] == [row.published for row in rows]
    assert all(len(row["ours"]) == 1 and np.isfinite(row["ours"][0]) for row in result["rows"])
    assert result["data"]["pictures"] == [2, 2]
    printed = capsys.readouterr().out
    assert "published" in printed
    assert ("± 0.8" in printed) is (table in ("table3", "table8", "table9"))


def test_table_two_repeats_over_seeds(data: Path, cache: Path, tmp_path: Path) -> None:
    """The proposals of the other network come from zf too here: VGG-16 is slow to build."""
    result = run("table2", data, cache, tmp_path, "--other-preset", "zf", "--seeds", "2")
    rows = {row["label"]: row for row in result["rows"]}
    assert len(rows) == 13
    assert all(len(row["ours"]) == 2 for row in rows.values())
    assert all(row["sd"] == pytest.approx(np.std(row["ours"], ddof=1)) for row in rows.values())
    assert rows["SS at training, RPN 300"]["ours"] == rows["SS at training, RPN of the other network, 300"]["ours"]


def test_a_union_is_left_out_where_none_is_given(data: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run("table4", data, cache, tmp_path, "--limit", "1")
    assert [bool(row["ours"]) for row in result["rows"]] == [True, False, True, False]
    assert "needs --second-split" in capsys.readouterr().out


def test_a_table_is_written_as_a_page_and_recall_as_a_plot(data: Path, cache: Path, tmp_path: Path) -> None:
    pages = ("--markdown", str(tmp_path / "page.md"), "--plot", str(tmp_path / "recall.png"))
    result = run("proposals", data, cache, tmp_path, "--limit", "2", *pages)
    page = (tmp_path / "page.md").read_text().splitlines()
    assert page[0] == "# Recall of proposals (%)"
    rows = [line for line in page if line.startswith("| ")]
    assert len(rows) == 2 + len(result["rows"])
    assert rows[2].startswith(f"| SS 100: recall at IoU 0.5 | - | {result['rows'][0]['mean']:.1f} |")
    with Image.open(tmp_path / "recall.png") as image:
        assert image.width > image.height > 200


def test_quick_changes_defaults_and_nothing_that_was_said() -> None:
    common = ["table9", "somewhere", "--quick", "--limit", "7", "--set", "detector.rpn.hidden=48"]
    options = read_options(common)
    assert (options.preset, options.steps, options.limit) == ("mobilenet_v2_c4", QUICK["steps"], 7)
    assert options.settings[-1] == "detector.rpn.hidden=48"
    config = detector_config(options.preset, ("cell",), options.settings)
    assert (config.input.short_side, config.rpn.hidden) == (192, 48)
    assert read_options(["table5", "somewhere", "--quick"]).preset is None  # the paper's own two networks are timed
    assert read_options(["table9", "somewhere"]).steps != QUICK["steps"]


def test_finished_trainings_are_kept_and_gone_on_with(data: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = ("--work", str(tmp_path / "work"), "--limit", "2")
    first = run("table3", data, cache, tmp_path, *work)
    assert "done before" not in capsys.readouterr().err
    again = run("table3", data, cache, tmp_path, *work)
    assert capsys.readouterr().err.count("done before") == 5  # the four steps, and the Fast R-CNN on Selective Search
    assert again["rows"] == first["rows"]


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--steps", "1,2"), "four positive"),
        (("--weights", "zf"), "NETWORK=FILE"),
        (("--weights", "zf=/nowhere.pth"), "no file"),
        (("--seeds", "0"), "at least 1"),
        (("--second", "elsewhere"), "--second-split"),
        (("--set", "detector.rpn.colour=1"), "known"),
        (("--test-split", "nowhere"), "splits of this data set"),
        (("--plot", "recall.png"), "recall of proposals"),
    ],
)
def test_what_is_wrong_is_said(more: tuple[str, ...], sentence: str, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table9", str(data), "--train-split", "train", "--device", "cpu", *more]) == 1
    assert sentence in capsys.readouterr().err


# -- the three generations -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_comparison_times_all_systems_in_one_run(data: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run("table5", data, cache, tmp_path, "--limit", "2", "--crops", "8", "--fit-pictures", "2")
    totals = {row["label"]: row["ours_ms"]["total"] for row in result["rows"]}
    assert [label.split(",")[0] for label in totals] == ["R-CNN", "SPP-net", "Fast R-CNN", "Faster R-CNN", "Faster R-CNN"]
    for row in result["rows"]:
        stages = row["ours_ms"]
        assert stages["total"] >= max(stages["conv"], stages["proposal"], stages["region"]) > 0
    assert totals["R-CNN, zf, SS"] > totals["Fast R-CNN, zf, SS"] > totals["Faster R-CNN, zf, RPN"]
    assert result["times_faster_than_rcnn"]["R-CNN, zf, SS"] == {"median": 1, "low": 1, "high": 1}
    searched = {row["ours_ms"]["proposal"] for row in result["rows"] if row["label"].endswith("SS")}
    assert len(searched) == 1  # one search a picture, whose time counts for all three
    assert "scaled to all" in capsys.readouterr().out


def test_ratios_are_against_rcnn_on_the_same_picture() -> None:
    nothing = (None, None, None, None)
    totals = {"R-CNN, a": [500.0, 800.0, 600.0], "Fast R-CNN, a": [20.0, 20.0, 30.0], "Faster R-CNN, a": [2.0, 4.0, 2.0]}
    rows = [SpeedRow(name, nothing, {"total": sorted(each)[1]}, each) for name, each in totals.items()]
    assert list(ratios(rows).values()) == [(1, 1, 1), (25, 20, 40), (250, 200, 300)]


def test_a_comparison_needs_two_networks(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table5", str(data), "--train-split", "train", "--device", "cpu", "--preset", "zf", "--other-preset", "zf"]) == 1
    assert "both are zf" in capsys.readouterr().err


def test_a_warped_region_fills_its_square_but_for_the_context() -> None:
    rgb = np.zeros((90, 140, 3), dtype=np.uint8)
    rgb[30:50, 40:120] = 255  # a region four times as wide as high
    crop = warp(rgb, np.array([40, 30, 120, 50], dtype=np.float32))
    assert crop.shape == (224, 224, 3)
    assert crop[21:203, 21:203].min() > 240
    for side in (crop[:11], crop[-11:], crop[:, :14], crop[:, -14:]):
        assert side.max() == 0


def test_the_pyramid_is_the_maxima_of_its_bins() -> None:
    feature = torch.rand(2, 3, 6, 8)
    rois = torch.tensor([[[0.0, 0, 127, 95], [16, 16, 79, 79]], [[32.0, 0, 64, 64], [0, 0, 16, 95]]])
    pooled = pool_pyramid([feature], rois, (96, 128), RoIConfig())
    assert pooled.shape == (4, 3 * 50, 1, 1)
    whole = pooled[0, -3:, 0, 0]
    assert torch.equal(whole, feature[0].amax(dim=(1, 2)))  # the 1 x 1 level of a region that is the whole picture
    finest = roi_pool(feature, [rois[0], rois[1]], PYRAMID[0], spatial_scale=1 / 16)
    assert torch.equal(pooled[:, : 3 * 36, 0, 0], finest.flatten(1))


@pytest.mark.parametrize("kind", ["crops", "pyramid"])
def test_svms_and_regressors_find_the_objects_they_learned_from(kind: str, detector: FasterRCNN, train: DetectionSet) -> None:
    for module in detector.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):  # random features, but of healthy size
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    features = crop_features(detector) if kind == "crops" else pyramid_features(pyramid_detector(detector))
    rng = np.random.default_rng(0)
    around = [np.concatenate([r.boxes + rng.normal(0, 4, r.boxes.shape) for _ in range(3)]) for r in train.records]
    far = [np.concatenate([boxes, np.array([[0, 0, 12, 9], [3, 50, 20, 70], [60, 5, 95, 30]])]) for boxes in around]
    proposals = [boxes[(boxes[:, 2:] - boxes[:, :2] > 4).all(axis=1)].astype(np.float32).clip(0) for boxes in far]
    classifier = fit_regions(train, proposals, features)
    found = [
        classifier.detect(record, boxes, features(record, boxes), least_score=-10)
        for record, boxes in zip(train.records, proposals, strict=True)
    ]
    assert mean_ap(train, found) > 40
    assert mean_ap(train, [empty_prediction() for _ in train.records]) == 0


def test_a_class_that_training_lacks_is_never_detected(detector: FasterRCNN, train: DetectionSet) -> None:
    one = DetectionSet(train.name, (*train.class_names, "unicorn"), train.records[:1])
    present = set(one.records[0].labels.tolist())
    proposals = [np.array([[5, 5, 40, 30], [50, 20, 90, 60]], dtype=np.float32)]
    classifier = fit_regions(one, proposals, crop_features(detector))
    found = classifier.detect(one.records[0], proposals[0], crop_features(detector)(one.records[0], proposals[0]), least_score=-1e9)
    assert set(found["labels"].tolist()) <= present
    assert classifier.svms[3] is None
    assert classifier.ridges[3] is None
    assert len(found["labels"]) > 0


# -- small facts ---------------------------------------------------------------------------------------------------------------


def test_an_rpn_that_moves_nothing_has_learned_its_anchors(detector: FasterRCNN, train: DetectionSet) -> None:
    torch.nn.init.zeros_(detector.rpn.bbox_pred.weight)
    sizes = learned_sizes(detector, train)
    base = detector.anchors.get_buffer("base_0").numpy()
    sides = base[:, 2:] - base[:, :2]
    assert sizes.shape == (9, 2)
    assert (sizes <= sides + 1e-4).all()  # cut at the borders
    assert (sizes > 0.4 * sides).all()
    assert sizes[0, 0] > sizes[0, 1]  # the first ratio lies


def test_the_mean_leaves_out_classes_that_do_not_occur(train: DetectionSet) -> None:
    perfect = [{"boxes": r.boxes, "scores": np.ones(len(r.boxes)), "labels": r.labels} for r in train.records]
    assert mean_ap(train, perfect) == pytest.approx(100)  # type: ignore[arg-type]
    named = DetectionSet(train.name, (*train.class_names, "unicorn"), train.records)
    assert mean_ap(named, perfect) == pytest.approx(100)  # type: ignore[arg-type]


def test_lambda_ten_is_about_one_here() -> None:
    assert pytest.approx(256 / 240) == 10 * LAMBDA_TO_WEIGHT


def test_published_sizes_stand_only_beside_the_paper_s_anchors() -> None:
    papers, others = TABLES["table1"].rows(zf(("any",)).detector), TABLES["table1"].rows(tiny_config())
    assert [row.published for row in papers[:4]] == [188, 111, 416, 229]
    assert {row.published for row in others} == {None}
