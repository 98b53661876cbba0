"""Several processes train as one: the same loss curve for the same global batch, one run folder, an exact resume."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_model_train import ROOT, arguments, curve, main, same_weights, wait_for_step

from model.checkpoint import load_checkpoint
from model.data.synthetic import write_voc

# Every anchor and every proposal is a sample, so that nothing depends on which process draws the random subset.
ALL_SAMPLES = ("detector.rpn.samples_per_image=100000", "detector.rpn.positive_fraction=1.0", "detector.roi.samples_per_image=64")
LARGEST_DIFFERENCE, MEAN_DIFFERENCE = 0.12, 0.03
"""Each process divides by its own number of samples, which varies between pictures, and draws its own RoIs."""


def torchrun(command: list[str]) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "model.train"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*launcher, *command], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, errors = process.communicate(timeout=280)
    assert process.returncode == 0, errors
    return output


def compare(data: Path, tmp_path: Path, epochs: int) -> None:
    # plain SGD: Adam divides small gradients by themselves, which makes another order of summation a step in another direction
    sgd = ("training.optimizer=sgd", "training.weight_decay=1e-4", "training.lr=0.005")
    settings = (*ALL_SAMPLES, *sgd, "training.batch_size=4", "training.workers=0", f"training.epochs={epochs}")
    process = torchrun(arguments(data, tmp_path / "two", *settings))
    assert main(arguments(data, tmp_path / "one", *settings)) == 0
    output = finish(process)
    assert output.count("done: best validation AP") == 1
    one, two = ([line["loss"] for line in curve(tmp_path / name) if line["kind"] == "train"] for name in ("one", "two"))
    assert len(one) == len(two) == 2 * epochs
    assert two[0] == pytest.approx(one[0], rel=1e-3)  # the same weights and pictures
    np.testing.assert_allclose(two, one, rtol=LARGEST_DIFFERENCE)
    assert np.mean(np.abs(np.subtract(two, one)) / one) < MEAN_DIFFERENCE
    first, second = (load_checkpoint(tmp_path / name / "last.pt").detector for name in ("one", "two"))
    assert all(torch.isfinite(value).all() for value in second.values())
    assert first.keys() == second.keys()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_voc(tmp_path_factory.mktemp("voc"), {"train": 8, "val": 3})


def test_two_processes_follow_one(data: Path, tmp_path: Path) -> None:
    compare(data, tmp_path, epochs=2)


@pytest.mark.slow
def test_two_processes_follow_one_for_longer(data: Path, tmp_path: Path) -> None:
    compare(data, tmp_path, epochs=12)


@pytest.mark.slow
def test_two_killed_processes_resume_exactly(data: Path, tmp_path: Path) -> None:
    settings = ("training.batch_size=4", "training.workers=0", "training.epochs=3")
    finish(torchrun(arguments(data, tmp_path / "whole", *settings)))
    out = tmp_path / "killed"
    process = torchrun(arguments(data, out, *settings))
    wait_for_step(out, 3, process)
    os.killpg(process.pid, 9)
    process.communicate(timeout=60)
    finish(torchrun(["--out", str(out), "--resume", "--threads", "1", "--device", "cpu"]))
    assert curve(out) == curve(tmp_path / "whole")
    assert same_weights(out / "last.pt", tmp_path / "whole" / "last.pt")
