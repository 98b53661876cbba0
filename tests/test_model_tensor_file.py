"""Broken files of weights: one sentence each, whoever reads them, and never torch's advice to run what they hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model.checkpoint import CheckpointError, load_checkpoint
from model.pretrained import main as convert
from model.weights import WeightsError, load_state

READERS = pytest.mark.parametrize(("read", "error"), [(load_state, WeightsError), (load_checkpoint, CheckpointError)])
BROKEN = {
    "empty": b"",
    "page": b"<!doctype html><html><body>not found</body></html>",
    "stack": b".",  # the unpickler pops from an empty list
    "memo": b"h\x07.",  # and looks up what nobody put there
    "text": b"X\x02\x00\x00\x00\xff\xfe.",  # and reads text that is none
    "protocol": b"\x80\x96\x00",
}


@READERS
@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_any_broken_file_is_a_sentence_of_ours(content: bytes, read: Callable[[Path], object], error: type, tmp_path: Path) -> None:
    (tmp_path / "best.pt").write_bytes(content)
    with pytest.raises(error, match=r"best\.pt is (no state dict|not a whole checkpoint): it is empty or cut short") as caught:
        read(tmp_path / "best.pt")
    assert "weights_only" not in str(caught.value)


@READERS
def test_a_programme_in_the_file_is_refused_without_advice_to_run_it(read: Callable[[Path], object], error: type, tmp_path: Path) -> None:
    """The layout of a saved programme: torch refuses with a RuntimeError, as it does a file that is cut short."""
    path = tmp_path / "best.pt"
    writer = torch._C.PyTorchFileWriter(str(path))
    for name in ("data.pkl", "constants.pkl"):
        writer.write_record(name, b"", 0)
    writer.write_end_of_file()
    with pytest.raises(error, match="which could run code, is not read") as caught:
        read(path)
    assert "weights_only" not in str(caught.value)


@READERS
def test_what_the_archive_says_is_repeated(read: Callable[[Path], object], error: type, tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1000)}, tmp_path / "whole.pt")
    (tmp_path / "best.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:2000])
    with pytest.raises(error, match="central directory"):
        read(tmp_path / "best.pt")


def test_the_converter_says_it_on_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "page.pth").write_bytes(BROKEN["page"])
    assert convert(["mobilenet_v3_large_320_fpn", "--weights", str(tmp_path / "page.pth"), "--out", str(tmp_path / "coco.pt")]) == 1
    told = capsys.readouterr().err
    assert "page.pth is no state dict: it is empty or cut short" in told
    assert "weights_only" not in told
