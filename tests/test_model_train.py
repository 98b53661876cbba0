"""Training as a person starts it: a run folder, an exact resume after any kind of end, and sentences where something is wrong."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from model.checkpoint import load_checkpoint, load_detector
from model.data.synthetic import write_voc
from model.run_folder import RunFolder
from model.train import main

ROOT = Path(__file__).resolve().parent.parent
TINY = [
    "detector.input.short_side=64",
    "detector.input.long_side=96",
    "detector.input.buckets=[[64,96],[96,64]]",
    "detector.rpn.post_nms_top_n_train=32",
    "detector.rpn.post_nms_top_n_test=16",
    "detector.roi.samples_per_image=16",
    "detector.roi.hidden=32",
    "training.batch_size=2",
    "training.warmup_iterations=2",
    "training.epochs=2",
]


def arguments(data: Path, out: Path, *settings: str, options: tuple[str, ...] = ()) -> list[str]:
    pairs = [part for setting in (*TINY, *settings) for part in ("--set", setting)]
    return ["--preset", "mobilenet_v2_fpn", "--data", str(data), "--out", str(out), "--threads", "1", "--device", "cpu", *pairs, *options]


def curve(out: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without wall-clock values."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "timing"} for line in lines]


def same_weights(a: Path, b: Path) -> bool:
    first, second = load_checkpoint(a).detector, load_checkpoint(b).detector
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_voc(tmp_path_factory.mktemp("voc"), {"train": 6, "val": 3})


@pytest.fixture(scope="module")
def whole_run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert main(arguments(data, out, "training.workers=0")) == 0
    return out


def test_a_run_leaves_one_folder_with_everything(whole_run: Path) -> None:
    assert {"config.json", "environment.json", "metrics.jsonl", "best.pt", "last.pt", "tensorboard", "epochs"} <= {
        path.name for path in whole_run.iterdir()
    }
    assert sorted(path.name for path in (whole_run / "epochs").iterdir()) == ["epoch_0001.pt", "epoch_0002.pt"]
    assert load_checkpoint(whole_run / "best.pt").resume is None
    assert load_detector(whole_run / "best.pt").config.class_names == ("disc", "square", "triangle")
    steps = [line for line in curve(whole_run) if line["kind"] == "train"]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert all(line["loss"] == pytest.approx(sum(line[k] for k in ("rpn_cls", "rpn_reg", "roi_cls", "roi_reg"))) for line in steps)
    assert [line["epoch"] for line in curve(whole_run) if line["kind"] == "val"] == [0, 1]


def test_workers_change_nothing(data: Path, whole_run: Path, tmp_path: Path) -> None:
    assert main(arguments(data, tmp_path / "run", "training.workers=2")) == 0
    assert curve(tmp_path / "run") == curve(whole_run)


def start(command: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "model.train", *command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(out: Path, step: int, process: subprocess.Popen[str], seconds: float = 200) -> None:
    """Returns once the run has logged a step and has a checkpoint."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if (out / "last.pt").exists() and len((out / "metrics.jsonl").read_text().splitlines()) >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"no step {step}: {process.communicate(timeout=10)}")


def test_killed_and_resumed_is_the_run_that_was_not_killed(data: Path, whole_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    process = start(arguments(data, out, "training.workers=1", "training.checkpoint_minutes=0"))
    wait_for_step(out, 2, process)
    process.kill()
    process.communicate(timeout=60)
    assert len(curve(out)) < len(curve(whole_run))
    assert main(["--out", str(out), "--resume", "--threads", "1", "--device", "cpu"]) == 0
    assert curve(out) == curve(whole_run)
    assert same_weights(out / "last.pt", whole_run / "last.pt")
    assert same_weights(out / "best.pt", whole_run / "best.pt")


def test_ctrl_c_saves_and_says_how_to_go_on(data: Path, whole_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "interrupted"
    process = start(arguments(data, out, "training.workers=1", "training.checkpoint_minutes=0"))
    wait_for_step(out, 1, process)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert f"--out {out} --resume" in output
    assert main(["--out", str(out), "--resume", "--threads", "1", "--device", "cpu"]) == 0
    assert curve(out) == curve(whole_run)


def test_one_command_starts_and_goes_on(data: Path, whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a restarted job has it: nothing there, then a checkpoint, then a finished run."""
    out = tmp_path / "job"
    same = arguments(data, out, "training.checkpoint_minutes=0", options=("--resume-if-present",))
    process = start(same)
    wait_for_step(out, 2, process)
    process.kill()
    process.communicate(timeout=60)
    assert main(same) == 0
    assert curve(out) == curve(whole_run)
    before = (out / "best.pt").stat().st_mtime_ns
    assert main(same) == 0
    assert (out / "best.pt").stat().st_mtime_ns == before
    assert curve(out) == curve(whole_run)


def test_summary_report_and_pictures(whole_run: Path) -> None:
    summary = (whole_run / "summary.md").read_text()
    assert "done: best validation AP" in summary
    assert summary.count("| 1 |") == summary.count("| 2 |") == 1
    assert (whole_run / "report" / "precision_recall.png").is_file()
    assert (whole_run / "training.png").is_file()
    assert len(list((whole_run / "samples").glob("*.png"))) == 3


def test_accumulation_halves_the_steps_and_adds_up(data: Path, tmp_path: Path) -> None:
    settings = ("training.workers=0", "training.accumulate=2", "training.epochs=1", "training.ema_decay=0")
    assert main(arguments(data, tmp_path / "run", *settings)) == 0
    resume = load_checkpoint(tmp_path / "run" / "last.pt").resume
    assert resume is not None
    assert resume["position"]["batches_done"] == 3
    assert resume["position"]["optimizer_steps"] == 2
    norms = [line["grad_norm"] for line in curve(tmp_path / "run") if line["kind"] == "train"]
    assert norms[0] == 0 < min(norms[1:])  # no step after the first batch; one after the second and at the epoch's end


def test_mixed_precision_adamw_and_mosaic_train(data: Path, tmp_path: Path) -> None:
    settings = ("training.amp=bf16", "training.optimizer=adamw", "training.augment.mosaic=1.0", "training.lr=0.001")
    assert main(arguments(data, tmp_path / "run", "training.workers=0", "training.epochs=1", *settings)) == 0
    assert all(line["loss"] < 10 for line in curve(tmp_path / "run") if line["kind"] == "train")


def test_a_start_from_random_weights_is_said(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ("training.workers=0", "training.epochs=1")
    assert main(arguments(data, tmp_path / "run", *short, options=("--val-split", "none"))) == 0
    warned = capsys.readouterr().err
    assert "random weights" in warned
    assert "--backbone-weights FILE" in warned
    assert main(["--out", str(tmp_path / "run"), "--resume", "--device", "cpu"]) == 0
    assert main(arguments(data, tmp_path / "other", *short, options=("--val-split", "none", "--quiet"))) == 0
    assert "random weights" not in capsys.readouterr().err


def test_early_stop_and_no_validation(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ("training.workers=0", "training.epochs=6", "training.early_stop_epochs=1", "training.lr=1e-9", "training.ema_decay=0")
    assert main(arguments(data, tmp_path / "run", *settings)) == 0
    assert "stopped early" in capsys.readouterr().out
    assert max(line["epoch"] for line in curve(tmp_path / "run")) < 5
    assert main(arguments(data, tmp_path / "other", "training.workers=0", "training.epochs=1", options=("--val-split", "none"))) == 0
    assert (tmp_path / "other" / "best.pt").is_file()


def test_init_takes_what_fits(data: Path, whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--init", str(whole_run / "best.pt"), "--classes", "disc,square,triangle,cube")
    assert main(arguments(data, tmp_path / "run", "training.workers=0", "training.epochs=1", options=options)) == 0
    printed, complained = capsys.readouterr()
    assert "random weights" not in complained
    assert "starting anew: head." in printed
    assert "backbone" not in printed.partition("starting anew")[2].splitlines()[0]


def test_out_of_memory_says_what_to_lower(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def allocate(*_: object) -> None:
        torch.empty(1 << 60)  # more than any machine has: the allocator's own error

    monkeypatch.setattr("model.faster_rcnn.FasterRCNN.forward", allocate)
    assert main(arguments(data, tmp_path / "run", "training.workers=0")) == 1
    message = capsys.readouterr().err
    assert "Lower training.batch_size (now 2)" in message
    assert "detector.input.short_side" in message


def test_exploding_loss_names_pictures_and_advice(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(data, tmp_path / "run", "training.loss_limit=0.01", "training.workers=0")) == 1
    message = capsys.readouterr().err
    assert "train_00" in message
    assert "training.lr=" in message
    assert not (tmp_path / "run" / "last.pt").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("--data", "/nowhere"), "there is no folder /nowhere"),
        (("--backbone-weights", "/nowhere.pth"), "/nowhere.pth"),
        (("--set", "training.learning_rate=1"), "known here: accumulate"),
        (("--set", "training.batch_size=0"), "at least 1"),
        (("--train-split", "absent"), "splits of this data set: train, val"),
        (("--device", "cuda"), "no CUDA device"),
    ],
)
def test_mistakes_get_a_sentence(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: tuple[str, str], words: str
) -> None:
    if change[0] == "--device" and torch.cuda.is_available():
        pytest.skip("this machine has the CUDA device whose absence is tested")
    assert main(arguments(data, tmp_path / "run", options=change)) == 1
    assert words in capsys.readouterr().err


def test_an_old_run_is_not_overwritten(data: Path, whole_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(data, whole_run)) == 1
    assert "--resume" in capsys.readouterr().err


def test_a_folder_that_may_not_be_written_is_named(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Raised by hand: the administrator, who runs tests in a container, may write everywhere."""

    def refuse(_folder: RunFolder) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/srv/runs")

    monkeypatch.setattr(RunFolder, "create", refuse)
    assert main(arguments(data, tmp_path / "run")) == 1
    assert "/srv/runs cannot be written" in capsys.readouterr().err
