"""The builder of TensorRT engines with everything real but TensorRT: a stand-in asks for ranges in its words and computes on the CPU."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conftest import ROOT
from rich.console import Console
from service_onnx import write_model

from export import engines
from export.engines import MISSING_RANGES, BuildError, at_batch, build, inner_ranges, missing_ranges
from service import tensorrt
from service.device_errors import first_line
from service.providers import RuntimeLoadError
from service.tensorrt import EnginePlan, load_plan, require_engines

MESSAGE = (
    "[ONNXRuntimeError] : 11 : EP_FAIL : User needs to provide all the dynamic shape inputs with associated profiles if they want to "
    "explicitly set profiles through provider options.\nPlease note that main graph could be partitioned into TRT/CUDA/CPU subgraphs, in "
    f"this case, user also needs to provide shape profiles for the TRT subgraph's input if it's dynamic shape input.\n{MISSING_RANGES} "
)


class StandIn:
    """Knows a graph cut in parts: it refuses to open until the inputs of each part have ranges, one part after another."""

    def __init__(self, *parts: list[str]) -> None:
        self.parts = parts
        self.plans: list[EnginePlan] = []
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, path: Path, plan: EnginePlan, device_id: int) -> object:
        self.plans.append(plan)
        for part in self.parts:
            missing = [name for name in part if name not in plan.ranges]
            if missing:
                cause = RuntimeError(MESSAGE + ",".join(missing) + "\nmore words")
                raise RuntimeLoadError(f"{path}: cannot open: {first_line(cause)}") from cause
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])

        def run(outputs: object, feed: dict) -> list:
            self.shapes.append(feed["images"].shape)
            return session.run(outputs, feed)

        return SimpleNamespace(run=run, get_providers=lambda: ["TensorrtExecutionProvider", "CUDAExecutionProvider"])


@pytest.fixture(autouse=True)
def _on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "gpu_and_driver", lambda device: ("NVIDIA H100", "580.65.06"))
    monkeypatch.setattr(tensorrt, "tensorrt_version", lambda: "10.13.3")


def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def test_names_come_from_the_providers_own_words() -> None:
    assert missing_ranges(MESSAGE + "/fpn/p2, /rpn/x_1\nnext line") == ["/fpn/p2", "/rpn/x_1"]
    assert missing_ranges("some other failure") == []
    assert missing_ranges(MISSING_RANGES) == []


def test_shapes_grow_evenly_with_the_batch() -> None:
    assert at_batch((1, 300, 4), (2, 300, 4), 8) == (8, 300, 4)
    assert at_batch((300, 7), (600, 7), 16) == (4800, 7)
    assert at_batch((5,), (5,), 9) == (5,)


def test_inner_tensors_are_measured_for_all_buckets_together(tmp_path: Path) -> None:
    model = onnx.load(write_model(tmp_path))
    ranges = inner_ranges(model, ["pixels", "colour"], [(96, 160), (160, 96)], 8)
    assert ranges == {
        "pixels": ((1, 96, 96, 3), (4, 96, 160, 3), (8, 160, 160, 3)),
        "colour": ((1, 3), (4, 3), (8, 3)),
    }
    with pytest.raises(BuildError, match="ranges of nowhere, which the file does not have"):
        inner_ranges(model, ["nowhere"], [(96, 160)], 2)


def test_an_input_with_a_default_has_the_shape_of_that_default(tmp_path: Path) -> None:
    path = write_model(tmp_path, nms="dense")
    model = onnx.load(path)
    model.graph.input.append(onnx.helper.make_tensor_value_info("nms_start", onnx.TensorProto.BOOL, ["start", 7]))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((1, 7), bool), "nms_start"))
    onnx.save(model, path)
    plan = build(path, device_id=0, max_batch_size=4, console=console(), opener=StandIn(["nms_start"]))
    assert plan.ranges["nms_start"] == ((1, 7),) * 3


def test_a_file_whose_shapes_depend_on_the_picture_is_refused(tmp_path: Path) -> None:
    stand_in = StandIn()
    with pytest.raises(BuildError, match=r"depends on the picture.*`--nms dense`"):
        build(write_model(tmp_path, nms="onnx"), device_id=0, max_batch_size=4, console=console(), opener=stand_in)
    assert stand_in.plans == []


def test_parts_are_asked_for_one_after_another_and_the_plan_comes_last(tmp_path: Path) -> None:
    path, stand_in = write_model(tmp_path, nms="dense"), StandIn(["images"], ["pixels"], ["colour", "sizes"])
    plan = build(path, device_id=0, max_batch_size=4, console=console(), opener=stand_in)
    assert [sorted(seen.ranges) for seen in stand_in.plans] == [
        ["image_sizes_hw", "images"],
        ["image_sizes_hw", "images", "pixels"],
        ["colour", "image_sizes_hw", "images", "pixels", "sizes"],
    ]
    assert {len(triple) for triple in plan.ranges.values()} == {3}  # one profile for all buckets
    assert stand_in.shapes == [(size, *bucket, 3) for bucket in plan.buckets for size in (1, 1, 4, 4)]
    assert require_engines(path, 0) == plan


def test_what_is_there_is_not_built_again_unless_asked(tmp_path: Path) -> None:
    path, stand_in = write_model(tmp_path, nms="dense"), StandIn()
    build(path, device_id=0, max_batch_size=4, console=console(), opener=stand_in)
    build(path, device_id=0, max_batch_size=2, console=console(), opener=stand_in)
    assert len(stand_in.plans) == 1
    build(path, device_id=0, max_batch_size=8, console=console(), opener=stand_in)
    build(path, device_id=0, max_batch_size=8, console=console(), opener=stand_in, again=True)
    assert [plan.max_batch_size for plan in stand_in.plans] == [4, 8, 8]


def test_a_failed_build_leaves_no_plan(tmp_path: Path) -> None:
    path = write_model(tmp_path, nms="dense")

    def refuse(path: Path, plan: EnginePlan, device_id: int) -> object:
        raise RuntimeLoadError("cannot open") from RuntimeError("TensorRT EP could not build engine for fused node")

    with pytest.raises(BuildError, match="refuses the graph: TensorRT EP could not build engine"):
        build(path, device_id=0, max_batch_size=4, console=console(), opener=refuse)
    (folder,) = (path.parent / "engines").iterdir()
    assert load_plan(folder) is None
    with pytest.raises(RuntimeLoadError, match="no TensorRT engines"):
        require_engines(path, 0)


@pytest.mark.parametrize("end", [RuntimeLoadError("TensorRT ran out of memory"), KeyboardInterrupt()])
def test_a_rebuild_that_ends_early_leaves_no_plan(end: BaseException, tmp_path: Path) -> None:
    path = write_model(tmp_path, nms="dense")
    plan = build(path, device_id=0, max_batch_size=4, console=console(), opener=StandIn())

    def stop(path: Path, plan: EnginePlan, device_id: int) -> object:
        (plan.folder / "part.engine").write_bytes(b"of the second build")
        raise end

    with pytest.raises((BuildError, KeyboardInterrupt)):
        build(path, device_id=0, max_batch_size=8, console=console(), opener=stop)
    assert load_plan(plan.folder) is None
    build(path, device_id=0, max_batch_size=2, console=console(), opener=StandIn())
    assert require_engines(path, 0).max_batch_size == 2


def test_engines_that_do_not_run_are_a_sentence(tmp_path: Path) -> None:
    def run(outputs: object, feed: dict) -> None:
        if len(feed["images"]) == 4:
            raise RuntimeError("TensorRT EP execution context enqueue failed.\nmore words")

    def opener(path: Path, plan: EnginePlan, device_id: int) -> object:
        return SimpleNamespace(run=run, get_providers=lambda: ["TensorrtExecutionProvider"])

    with pytest.raises(BuildError, match=r"do not run 4 images of 96x160: .* enqueue failed\.; where memory is short"):
        build(write_model(tmp_path, nms="dense"), device_id=0, max_batch_size=4, console=console(), opener=opener)


def test_asking_twice_for_the_same_ranges_ends(tmp_path: Path) -> None:
    def ask(path: Path, plan: EnginePlan, device_id: int) -> object:
        raise RuntimeLoadError("cannot open") from RuntimeError(MESSAGE + "pixels")

    with pytest.raises(BuildError, match="refuses the graph"):
        build(write_model(tmp_path, nms="dense"), device_id=0, max_batch_size=2, console=console(), opener=ask)


def test_a_provider_that_falls_back_is_no_success(tmp_path: Path) -> None:
    def fall_back(path: Path, plan: EnginePlan, device_id: int) -> object:
        return SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])

    with pytest.raises(BuildError, match="its libraries did not load"):
        build(write_model(tmp_path, nms="dense"), device_id=0, max_batch_size=2, console=console(), opener=fall_back)


def test_the_command_says_in_a_sentence_what_is_missing_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    folder = next((ROOT / "model_repository").glob("*/1"))
    assert engines.main([str(folder)]) == 1
    assert "'tensorrt' was asked for, but this build of ONNX Runtime does not hold it" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="64"):
        engines.main([str(folder), "--max-batch", "0"])
