"""One export from checkpoint to version folder, and every way in which nothing may be left behind."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper
from PIL import Image
from rich.console import Console
from tiny_detector import BUCKETS, CLASS_NAMES, Exported, save_tiny

from export.__main__ import build_parser, main, stray_option
from export.calibration import CalibrationError
from export.graph import ExportError, GraphOptions
from export.job import GateFailed, Job, check_request, export, flat
from export.precision import Kind
from export.version import VersionExistsError
from model.checkpoint import Checkpoint, load_checkpoint
from model.data.records import DetectionSet, Record
from model.faster_rcnn import FasterRCNN
from service.manifest import parse_manifest
from service.runtime import OnnxRuntime, RuntimeLoadError

ROOT = Path(__file__).resolve().parent.parent


def quiet() -> Console:
    return Console(quiet=True)


def left_behind(repository: Path) -> list[str]:
    return sorted(str(path.relative_to(repository)) for path in repository.rglob("*")) if repository.exists() else []


def test_version_folder_is_whole(exported: Exported) -> None:
    assert sorted(path.name for path in exported.folder.iterdir()) == ["README.md", "config.pbtxt", "model.onnx", "parity.md"]
    assert [path.name for path in exported.folder.parent.parent.iterdir()] == ["tiny"]  # no scratch folder
    assert exported.folder.name == "1"
    assert exported.folder.stat().st_mode & 0o777 == 0o755


def test_manifest_says_what_the_checkpoint_says(exported: Exported) -> None:
    manifest = OnnxRuntime(exported.file, provider="cpu").manifest
    assert manifest.class_names == list(CLASS_NAMES)
    assert manifest.input.buckets == list(BUCKETS)
    assert (manifest.name, manifest.version, manifest.nms, manifest.opset) == ("tiny", "1", "onnx", 18)
    assert (manifest.score_floor, manifest.detections_per_image) == (0.05, 100)
    assert manifest.training.dataset == "drawn pictures"
    assert manifest.training.metrics["coco/AP50"] == 0.8
    assert manifest.training.metrics["per_class/platelet/AP"] is None
    assert manifest.parity["passed"] is True
    assert manifest.parity["max_box_px"] <= 1e-3
    assert manifest.parity["detections"] > 1000
    assert (manifest.parity["fullest_picture"], manifest.parity["without_floor"]) == (100, False)
    assert manifest.parity["provider"] == "cpu"
    assert len(manifest.golden) == 2


def test_metadata_is_strict_json(exported: Exported) -> None:
    properties = {entry.key: entry.value for entry in onnx.load(exported.file).metadata_props}
    assert parse_manifest(properties, "file").name == "tiny"
    json.loads(properties["manifest"], parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_log_tells_differences_and_digest(exported: Exported) -> None:
    assert "batch against singles" in exported.log
    assert "sha256" in exported.log
    assert "published" in exported.log


def test_a_wrong_weight_is_found_and_leaves_nothing(exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = onnx.load(exported.file)
    biases = [tensor for tensor in model.graph.initializer if tensor.name == "head.cls_score.bias"]
    assert len(biases) == 1
    values = numpy_helper.to_array(biases[0]).copy()
    values[1] += 0.01
    biases[0].CopyFrom(numpy_helper.from_array(values, biases[0].name))
    monkeypatch.setattr("export.job.build_graph", lambda _detector, _options: model)
    with pytest.raises(GateFailed, match="a score moved by"):
        export(Job(checkpoint=exported.checkpoint, name="tiny", repository=tmp_path / "models"), quiet())
    assert left_behind(tmp_path / "models") == []


def test_gate_failure_exits_with_two(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = onnx.load(exported.file)
    for tensor in model.graph.initializer:
        if tensor.name == "head.bbox_pred.bias":
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + np.float32(0.1), tensor.name))
    monkeypatch.setattr("export.job.build_graph", lambda _detector, _options: model)
    assert main([str(exported.checkpoint), "--name", "tiny", "--repository", str(tmp_path / "models")]) == 2
    assert "nothing was published" in capsys.readouterr().err
    assert left_behind(tmp_path / "models") == []


def test_interrupt_leaves_nothing(exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        assert len(left_behind(tmp_path / "models")) == 1  # the scratch folder is there at this moment
        raise KeyboardInterrupt

    monkeypatch.setattr("export.job.build_graph", interrupted)
    assert main([str(exported.checkpoint), "--name", "tiny", "--repository", str(tmp_path / "models")]) == 130
    assert left_behind(tmp_path / "models") == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signal_to_the_real_process_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    checkpoint, repository = save_tiny(tmp_path / "best.pt"), tmp_path / "models"
    command = [sys.executable, "-m", "export", str(checkpoint), "--name", "tiny", "--repository", str(repository)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    try:
        while not left_behind(repository) and process.poll() is None:
            time.sleep(0.05)  # until the scratch folder shows that the job is under way
        process.send_signal(number)
        assert process.wait(timeout=120) == 130
    finally:
        process.kill()
    assert left_behind(repository) == []


def test_existing_version_is_never_overwritten(exported: Exported, capsys: pytest.CaptureFixture[str]) -> None:
    repository = exported.folder.parent.parent
    before = exported.file.stat()
    with pytest.raises(VersionExistsError, match="get 2"):
        export(Job(checkpoint=exported.checkpoint, name="tiny", repository=repository, version=1), quiet())
    assert main([str(exported.checkpoint), "--name", "tiny", "--repository", str(repository), "--version", "1"]) == 1
    assert "never overwritten" in capsys.readouterr().err
    assert exported.file.stat().st_mtime_ns == before.st_mtime_ns


def test_missing_checkpoint_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none.pt"), "--name", "tiny", "--repository", str(tmp_path / "models")]) == 1
    assert "there is no checkpoint" in capsys.readouterr().err
    assert left_behind(tmp_path / "models") == []


def test_weights_of_another_network_are_a_sentence(exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = [str(exported.checkpoint), "--name", "tiny", "--repository", str(tmp_path / "models")]
    assert main([*common, "--set", "detector.roi.hidden=8"]) == 1
    assert "does not fit this version's network" in capsys.readouterr().err
    assert main([*common, "--set", "detector.roi.nms=0.6"]) == 1
    assert "nms_thresh" in capsys.readouterr().err
    assert left_behind(tmp_path / "models") == []


def test_a_threshold_may_be_chosen_at_export(exported: Exported, tmp_path: Path) -> None:
    folder = export(
        Job(checkpoint=exported.checkpoint, name="tiny", repository=tmp_path, settings=["detector.roi.score_thresh=0.1"]), quiet()
    )
    runtime = OnnxRuntime(folder / "model.onnx", provider="cpu")
    assert runtime.manifest.score_floor == 0.1
    runtime.close()


@pytest.mark.parametrize("name", ["../evil", "X_Y", "", "a" * 64])
def test_bad_name_is_refused_before_any_work(name: str, exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(exported.checkpoint), "--name", name, "--repository", str(tmp_path / "models")]) == 1
    told = capsys.readouterr().err
    assert f"error: {name!r} can be no model's name: lower case letters" in told
    assert "pydantic" not in told
    assert left_behind(tmp_path) == []


def test_a_provider_that_is_not_here_is_refused_before_any_work(exported: Exported, tmp_path: Path) -> None:
    job = Job(checkpoint=exported.checkpoint, name="tiny", repository=tmp_path / "models", verify_on="cuda")
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("this machine has it")
    with pytest.raises(RuntimeLoadError, match="provider 'cuda' was asked for"):
        export(job, quiet())
    assert left_behind(tmp_path) == []


def test_a_repository_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny").write_text("in the way")
    with pytest.raises(OSError, match="tiny is no folder"):
        export(Job(checkpoint=tmp_path / "never read", name="tiny", repository=tmp_path / "models"), quiet())
    assert left_behind(tmp_path / "models") == ["tiny"]


def test_where_a_file_is_verified(tmp_path: Path) -> None:
    def provider(precision: Kind, verify_on: str | None = None) -> str:
        return Job(tmp_path, "tiny", tmp_path, graph=GraphOptions(opset=22, precision=precision), verify_on=verify_on).provider

    assert (provider("fp32"), provider("fp16"), provider("bf16")) == ("cpu", "cpu", "cuda")
    assert provider("fp16", "cuda") == "cuda"
    with pytest.raises(ExportError, match="no kernels for bf16"):
        check_request(Job(tmp_path, "tiny", tmp_path, graph=GraphOptions(opset=22, precision="bf16"), verify_on="cpu"))


def test_a_data_set_without_boxes_is_refused_before_any_work(tmp_path: Path) -> None:
    none = np.zeros(0, bool)
    record = Record("a", tmp_path / "a.jpg", (30, 40), np.zeros((0, 4)), np.zeros(0, np.int64), np.zeros(0), none, none)
    with pytest.raises(ExportError, match="empty has no box that counts"):
        check_request(Job(tmp_path, "tiny", tmp_path, dataset=DetectionSet("empty", CLASS_NAMES, (record,))))


def test_a_mistake_on_the_command_line_is_no_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    """2 is a broken gate; a pipeline must not take a misspelt option for one."""
    for command in (["best.pt"], ["inspect"], ["compare", "a"]):
        with pytest.raises(SystemExit) as left:
            main(command)
        assert left.value.code == 64
    assert "the following arguments are required" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--split", "test"], "--split says how --data PATH is read, which was not given"),
        (["--split", "test", "--calibrate", "folder", "--precision", "int8"], "--split says how --data PATH"),
        (["--format", "voc"], "--format says how --data PATH or --calibrate PATH is read"),
        (["--skip-bad"], "--skip-bad says how --data PATH or --calibrate PATH is read"),
        (["--calibrate-split", "train", "--data", "folder"], "--calibrate-split says how --calibrate PATH is read"),
        (["--calibrate-pictures", "64"], "--calibrate-pictures says how --calibrate PATH is read"),
        (["--calibrate", "folder"], "--calibrate belongs to --precision int8, not fp32"),
        (["--allow-unmeasured"], "belongs to fp16, bf16 and int8"),
        (["--allow-unmeasured", "--precision", "fp16", "--data", "folder"], "--allow-unmeasured stands for --data PATH"),
    ],
)
def test_an_option_without_effect_is_refused(options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Who forgets --data must not publish a version whose AP nobody measured."""
    with pytest.raises(SystemExit, match="64"):
        main(["never-read.pt", "--name", "tiny", *options])
    assert sentence in capsys.readouterr().err


def test_options_with_effect_pass_and_keep_their_defaults() -> None:
    parser, start = build_parser(), ["best.pt", "--name", "tiny"]
    int8 = [*start, "--precision", "int8", "--calibrate", "folder", "--calibrate-split", "val", "--skip-bad", "--allow-unmeasured"]
    for given in (start, [*start, "--data", "folder", "--split", "val", "--format", "voc", "--skip-bad"], int8):
        assert stray_option(parser.parse_args(given)) is None
    text = " ".join(parser.format_help().split())
    assert all(f"(default: {default})" in text for default in ("test", "train", "64"))


def picture_of_a_bomb(path: Path) -> None:
    """A PNG whose header promises more pixels than Pillow decodes."""
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            png_chunk(name, data)
            for name, data in ((b"IHDR", struct.pack(">IIBBBBB", 40000, 40000, 8, 2, 0, 0, 0)), (b"IDAT", b""), (b"IEND", b""))
        )
    )


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def test_pictures_that_cannot_calibrate_are_found_before_any_work(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("good.png", "bomb.png", "cut.png")]
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)).save(files[0])
    picture_of_a_bomb(files[1])
    files[2].write_bytes(files[0].read_bytes()[:900])
    int8 = GraphOptions(precision="int8")
    check_request(Job(tmp_path, "tiny", tmp_path, graph=int8, calibration=files[:1], allow_unmeasured=True))
    with pytest.raises(CalibrationError, match=r"1 of 2 .* the first: .*cut\.png: truncated image"):
        check_request(Job(tmp_path, "tiny", tmp_path, graph=int8, calibration=files[::2], allow_unmeasured=True))
    with pytest.raises(CalibrationError, match=r"2 of 3 .* the first: .*bomb\.png: unreadable image.*decompression bomb"):
        check_request(Job(tmp_path, "tiny", tmp_path, graph=int8, calibration=files, allow_unmeasured=True))


def test_a_further_picture_that_cannot_be_read_is_a_sentence(
    exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture_of_a_bomb(tmp_path / "bomb.png")
    command = [str(exported.checkpoint), "--name", "tiny", "--repository", str(tmp_path / "models"), "--pictures", str(tmp_path)]
    assert main(command) == 1
    assert "bomb.png cannot be opened" in capsys.readouterr().err


def test_what_is_no_checkpoint_is_a_sentence_without_unsafe_advice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "best.pt").write_text("weights?")
    assert main([str(tmp_path / "best.pt"), "--name", "tiny", "--repository", str(tmp_path / "models")]) == 1
    told = capsys.readouterr().err
    assert "is not a whole checkpoint" in told
    assert "weights_only" not in told


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = capsys.readouterr().out
    assert "examples:" in text
    assert "--nms" in text
    assert all(f"python -m export {command}" in text.split("options:")[0] for command in ("inspect", "compare", "build-engines"))


def test_flat_joins_keys_and_drops_nan() -> None:
    assert flat({"a": {"b": 1, "c": float("nan")}, "d": None, "e": "x"}) == {"a/b": 1.0, "a/c": None, "d": None, "e": "x"}


def test_the_checkpoint_is_read_once(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Calibration needs its class names before the job starts; the job then takes what was read, settings included."""
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(tmp_path / "picture.png")
    read: list[Path] = []

    def reading(path: Path, settings: Sequence[str] = ()) -> Checkpoint:
        read.append(path)
        return load_checkpoint(path, settings)

    def stop(detector: FasterRCNN, _options: object) -> None:
        raise ExportError(f"far enough, at {detector.config.roi.nms_thresh}")

    monkeypatch.setattr("export.__main__.load_checkpoint", reading)
    monkeypatch.setattr("export.job.load_checkpoint", reading)
    monkeypatch.setattr("export.job.build_graph", stop)
    command = [
        str(exported.checkpoint),
        "--name",
        "tiny",
        "--repository",
        str(tmp_path / "models"),
        "--set",
        "detector.roi.nms_thresh=0.61",
    ]
    quantised = [*command, "--precision", "int8", "--calibrate", str(tmp_path), "--allow-unmeasured"]
    for arguments in (command, quantised):
        read.clear()
        assert main(arguments) == 1
        assert "far enough, at 0.61" in capsys.readouterr().err
        assert read == [exported.checkpoint]
