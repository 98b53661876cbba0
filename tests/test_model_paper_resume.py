"""A stage that is killed without a warning goes on from its last save, and only with the options it was started with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_model_fast_rcnn import tiny_config

from model.checkpoint import CheckpointError
from model.data.formats import open_dataset
from model.data.records import DetectionSet
from model.data.synthetic import write_voc
from model.faster_rcnn import FasterRCNN, build_detector
from model.paper_resume import StageFile
from model.paper_training import Recipe, rpn_objective, train_stage

RECIPE = Recipe(4, lr=0.01)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> DetectionSet:
    return open_dataset(write_voc(tmp_path_factory.mktemp("voc"), {"train": 3}), "train")


class Killed(BaseException):
    """What no stage can foresee."""


def learned(dataset: DetectionSet, kept: StageFile | None, *, dies_after: int | None = None) -> tuple[FasterRCNN, list[int]]:
    """An RPN after the recipe, and the steps that were taken."""
    torch.manual_seed(0)
    detector, steps = build_detector(tiny_config()), list[int]()

    def progress(done: int, loss: float) -> None:
        steps.append(done)
        if done == dies_after:
            raise Killed

    train_stage(detector, [detector.rpn], rpn_objective(detector), dataset, RECIPE, seed=3, progress=progress, kept=kept)
    return detector, steps


def test_a_killed_stage_goes_on_from_its_last_save(dataset: DetectionSet, tmp_path: Path) -> None:
    whole, _ = learned(dataset, None)
    path = tmp_path / "stage.pt"
    with pytest.raises(Killed):  # at its third step, before that is saved
        learned(dataset, StageFile(path, {"step": 1}, every_seconds=0), dies_after=3)
    again, steps = learned(dataset, StageFile(path, {"step": 1}))
    assert steps == [3, 4]
    expected = whole.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())


def test_a_stage_of_other_options_is_refused(dataset: DetectionSet, tmp_path: Path) -> None:
    path = tmp_path / "stage.pt"
    learned(dataset, StageFile(path, {"step": 1}, every_seconds=0))
    with pytest.raises(CheckpointError, match="other options"):
        learned(dataset, StageFile(path, {"step": 2}))


def test_nothing_is_written_before_it_is_time(dataset: DetectionSet, tmp_path: Path) -> None:
    learned(dataset, StageFile(tmp_path / "stage.pt", {"step": 1}))
    assert not (tmp_path / "stage.pt").exists()
