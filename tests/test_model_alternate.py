"""Four-step alternating training: what each step moves, both variants, and that finished steps are not repeated."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_model_fast_rcnn import TINY, tiny_config

from model.alternate import Alternation, detector_config, main, plan_of
from model.checkpoint import CheckpointError, load_checkpoint
from model.data.formats import open_dataset
from model.data.records import DetectionSet
from model.data.synthetic import CLASS_NAMES, write_voc
from model.inference import predict
from model.metrics.report import evaluate_detections
from model.paper_proposals import ProposalOptions, rpn_proposals
from model.paper_resume import StageInterrupted
from model.paper_training import Recipe

STEPS = (3, 2, 3, 2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_voc(tmp_path_factory.mktemp("voc"), {"train": 4, "test": 2})


@pytest.fixture(scope="module")
def dataset(data: Path) -> DetectionSet:
    return open_dataset(data, "train")


def alternation(dataset: DetectionSet, folder: Path, variant: str = "python", seed: int = 0) -> Alternation:
    plan = plan_of(variant, STEPS, Recipe(1, lr=0.003), seed)  # type: ignore[arg-type]
    return Alternation(tiny_config(), None, dataset, plan, folder)


@pytest.fixture(scope="module")
def finished(dataset: DetectionSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "python"
    alternation(dataset, folder).run()
    return folder


def parts(folder: Path, step: int) -> dict[str, dict[str, torch.Tensor]]:
    state = load_checkpoint(folder / f"step{step}.pt").detector
    names = ("backbone.", "rpn.", "head.body.", "head.cls_score.", "head.bbox_pred.")
    return {name: {key: value for key, value in state.items() if key.startswith(name)} for name in names}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_each_step_moves_its_own_layers(finished: Path) -> None:
    one, two, three, four = (parts(finished, step) for step in (1, 2, 3, 4))
    assert not same(one["backbone."], two["backbone."])  # both from the same start, each on its own
    assert same(two["backbone."], three["backbone."])
    assert same(two["head.body."], three["head.body."])
    assert not same(two["rpn."], three["rpn."])
    assert same(three["backbone."], four["backbone."])
    assert same(three["rpn."], four["rpn."])
    assert not same(three["head.cls_score."], four["head.cls_score."])


def test_the_variants_part_at_the_head_of_step_four(dataset: DetectionSet, finished: Path, tmp_path: Path) -> None:
    """One step at a rate of nearly nothing shows where step four started: anew, or from step two."""
    for variant, kept in (("python", False), ("matlab", True)):
        plan = plan_of(variant, (1, 1, 1, 1), Recipe(1, lr=1e-12))  # type: ignore[arg-type]
        Alternation(tiny_config(), None, dataset, plan, tmp_path / variant).run()
        two, four = (load_checkpoint(tmp_path / variant / f"step{step}.pt").detector["head.cls_score.weight"] for step in (2, 4))
        assert torch.allclose(two, four, atol=1e-6) is kept


def test_a_finished_step_is_not_repeated_after_an_interruption(
    dataset: DetectionSet, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    run = alternation(dataset, tmp_path)
    run.say = said.append

    def interrupted(detector: object) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "_step3", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.run()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["proposals1.npz", "step1.pt", "step2.pt"]
    written = (tmp_path / "step2.pt").stat().st_mtime_ns
    again = alternation(dataset, tmp_path)
    again.say = said.append
    again.run()
    assert (tmp_path / "step2.pt").stat().st_mtime_ns == written
    assert sum("done before" in line for line in said) == 2
    assert all(same(parts(tmp_path, 4)[name], part) for name, part in parts(finished, 4).items())  # as if nobody had interrupted


def pressed_in(step: int, done: int) -> Callable[[str], None]:
    """A listener that presses Ctrl-C when a step has gone so far."""

    def say(text: str) -> None:
        if text.startswith(f"step {step}: {done}/"):
            os.kill(os.getpid(), signal.SIGINT)

    return say


@pytest.mark.parametrize(("variant", "step"), [("python", 2), ("matlab", 3)])
def test_ctrl_c_keeps_the_running_step_to_the_bit(
    variant: str, step: int, dataset: DetectionSet, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted after its first batch, a step goes on with its second: the end is that of a run nobody disturbed."""
    monkeypatch.setattr("model.paper_progress.LINE_SECONDS", 0.0)  # every step says its line
    run = alternation(dataset, tmp_path / "cut", variant)
    run.say = pressed_in(step, 1)
    with pytest.raises(StageInterrupted, match=rf"after 1 of {STEPS[step - 1]} steps; saved .*step{step}.running.pt"):
        run.run()
    assert run.running_path(step).is_file()
    assert not run.path(step).exists()
    again, said = alternation(dataset, tmp_path / "cut", variant), list[str]()
    again.say = said.append
    again.run()
    assert any("goes on with" in line for line in said)
    assert not any(line.startswith(f"step {step}: 1/") for line in said)
    assert not list((tmp_path / "cut").glob("*.running.pt"))
    whole = finished
    if variant == "matlab":
        whole = tmp_path / "whole"
        alternation(dataset, whole, variant).run()
    assert all(same(parts(tmp_path / "cut", 4)[name], part) for name, part in parts(whole, 4).items())


def test_the_command_says_how_to_go_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("model.paper_progress.LINE_SECONDS", 0.0)
    monkeypatch.setattr("model.alternate._print", pressed_in(1, 2))
    settings = [part for setting in TINY for part in ("--set", setting)]
    common = [str(data), "--preset", "zf", "--train-split", "train", "--device", "cpu", "--out", str(tmp_path / "run"), *settings]
    assert main([*common, "--steps", "4,1,1,1", "--test-split", "none"]) == 130
    assert "after 2 of 4 steps" in (shown := capsys.readouterr().err)
    assert "same command" in shown


@pytest.mark.parametrize("variant", ["python", pytest.param("matlab", marks=pytest.mark.slow)])
def test_the_four_steps_learn_from_scratch(variant: str, tmp_path: Path) -> None:
    """ZF from random weights, on scenes it has never seen: half a minute of the four steps finds some shapes, no training finds none."""
    root = write_voc(tmp_path / "voc", {"train": 60, "test": 20})
    train, test = open_dataset(root, "train"), open_dataset(root, "test")
    config = detector_config("zf", CLASS_NAMES, (*TINY, "detector.roi.hidden=128"))
    plan = plan_of(variant, (60, 100, 40, 100), Recipe(1, lr=0.02, batch_size=2))  # type: ignore[arg-type]
    run = Alternation(config, None, train, plan, tmp_path / "run")
    assert evaluate_detections(test, predict(run.new_detector(), test)).voc_ap50 < 0.01
    assert evaluate_detections(test, predict(run.run(), test)).voc_ap50 > 0.1


def test_steps_of_another_plan_are_refused(dataset: DetectionSet, finished: Path) -> None:
    with pytest.raises(CheckpointError, match="other options"):
        alternation(dataset, finished, seed=5).run()


def test_four_steps_are_needed() -> None:
    with pytest.raises(ValueError, match="four positive"):
        plan_of("python", (1, 2, 3), Recipe(1))


def test_proposals_with_a_part_taken_away(dataset: DetectionSet, finished: Path) -> None:
    detector = alternation(dataset, finished).step_detector(1)
    whole = rpn_proposals(detector, dataset, ProposalOptions(20))
    for boxes, record in zip(whole, dataset.records, strict=True):
        height, width = record.size_hw
        assert 0 < len(boxes) <= 20
        assert boxes.min() >= 0
        assert boxes[:, 2].max() <= width + 1e-3
        assert boxes[:, 3].max() <= height + 1e-3
    unsuppressed = rpn_proposals(detector, dataset, ProposalOptions(1000, nms=False))
    assert len(unsuppressed[0]) > len(rpn_proposals(detector, dataset, ProposalOptions(1000))[0])
    random = [rpn_proposals(detector, dataset, ProposalOptions(10, cls=False), seed=seed)[0] for seed in (0, 0, 1)]
    assert random[0].tolist() == random[1].tolist() != random[2].tolist()
    anchors = rpn_proposals(detector, dataset, ProposalOptions(50, reg=False))[0]
    sides = anchors[:, 2:] - anchors[:, :2]
    inside = (anchors[:, 0] > 0) & (anchors[:, 1] > 0) & (anchors[:, 2] < 127) & (anchors[:, 3] < 95)
    shapes = alternation(dataset, finished).new_detector().anchors.get_buffer("base_0")
    expected = {tuple(row) for row in (shapes[:, 2:] - shapes[:, :2]).round().int().tolist()}
    assert inside.any()
    assert {tuple(row) for row in sides[inside].round().astype(int).tolist()} <= expected


def test_the_command_trains_and_evaluates(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [part for setting in TINY for part in ("--set", setting)]
    common = [str(data), "--preset", "zf", "--train-split", "train", "--device", "cpu", "--out", str(tmp_path / "run"), *settings]
    assert main([*common, "--steps", "1,1,1,1"]) == 0
    assert "AP50" in capsys.readouterr().out
    assert main([*common, "--steps", "1,1,1,1", "--rpn-only"]) == 0  # step 1 is there already
    shown = capsys.readouterr().out.splitlines()
    assert "step 1: done before" in shown[0]
    recalls = [[float(number) for number in line.split()] for line in shown[-4:]]
    assert [row[0] for row in recalls] == [100, 300, 1000, 2000]
    assert all(0 <= row[2] <= row[1] <= 1 for row in recalls)
    assert main([*common, "--steps", "1,1,1"]) == 1
    assert "four positive" in capsys.readouterr().err
