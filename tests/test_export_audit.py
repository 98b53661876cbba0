"""The audit of placement: what fails, on paper and in a measured run, and that both judge alike."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conftest import ROOT
from onnx import TensorProto, helper
from service_onnx import write_model

from export import inspect
from export.audit import audit, judge, main, on_paper
from export.profiling import NodeRun, profile
from service.providers import PROVIDER_NAMES, ProviderMissing, RuntimeLoadError, open_session, provider_stack

CPU, CUDA, TENSORRT = (PROVIDER_NAMES[name] for name in ("cpu", "cuda", "tensorrt"))
DEMO = next((ROOT / "model_repository").glob("*/1/model.onnx"))
BUCKET = (384, 512)
FLOATS, SIZE = (("float", (4, 4)),), (("int64", (1,)),)


@pytest.fixture(scope="module")
def demo() -> onnx.ModelProto:
    return onnx.load(DEMO)


def shapes_and_a_product() -> onnx.ModelProto:
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"], name="shape"),
        helper.make_node("Add", ["shape", "shape"], ["twice"], name="twice"),
        helper.make_node("Expand", ["x", "shape"], ["y"], name="expand"),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, "n"]) for name in "xy"]
    return helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:]), opset_imports=[helper.make_opsetid("", 18)])


def ran(name: str, op: str, provider: str, outputs: tuple = FLOATS) -> NodeRun:
    return NodeRun(name, op, provider, 1e-3, FLOATS, outputs)


def test_a_measured_run_that_stays_on_the_device_passes() -> None:
    found = judge(shapes_and_a_product(), [ran("conv", "Conv", CUDA), ran("twice", "Add", CPU, (("float", (999,)),))], "cuda")
    assert found.passed, "arithmetic of shapes is known by the graph, whatever its type"


def test_the_command_takes_a_version_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([DEMO.parents[1].name, "--repository", str(DEMO.parents[2])]) == 0
    assert "passed" in capsys.readouterr().out


def test_the_command_says_what_it_cannot_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "model.onnx"
    broken.write_bytes(DEMO.read_bytes()[:1000])
    assert main([str(broken)]) == 1
    assert "is no ONNX file, or not a whole one" in capsys.readouterr().err
    assert main([DEMO.as_posix(), "--json", str(tmp_path / "none" / "audit.json")]) == 1
    assert "none/audit.json" in capsys.readouterr().err
    for mistake in (["--batch-size", "0"], ["--provider", "gpu"]):
        with pytest.raises(SystemExit, match="64"):
            main([str(broken), *mistake])


@pytest.mark.parametrize(
    ("node", "sentence"),
    [
        (ran("conv", "Conv", CPU), "conv (Conv) ran on CPUExecutionProvider"),
        (ran("conv", "Conv", CPU, ()), "conv (Conv) ran on CPUExecutionProvider"),  # its outputs were not recorded
    ],
)
def test_a_node_on_the_cpu_fails(node: NodeRun, sentence: str) -> None:
    found = judge(shapes_and_a_product(), [node], "cuda")
    assert found.misplaced == (sentence,)
    assert not found.passed


def test_every_copy_fails_however_small() -> None:
    found = judge(shapes_and_a_product(), [ran("Memcpy", "MemcpyToHost", CUDA, SIZE)], "cuda")
    assert found.copies == ("Memcpy (MemcpyToHost)",)
    assert not found.passed


def test_an_operator_that_waits_for_the_host_fails_though_it_is_on_the_device() -> None:
    found = judge(shapes_and_a_product(), [ran("nms", "NonMaxSuppression", CUDA)], "cuda")
    assert found.misplaced == found.copies == ()
    assert not found.passed
    assert "--nms dense" in found.waits[0]


def test_tensorrt_may_leave_nodes_to_cuda_but_cuda_none_to_tensorrts_engines() -> None:
    mixed = [ran("engine", "TRTKernel", TENSORRT), ran("align", "RoiAlign", CUDA)]
    assert judge(shapes_and_a_product(), mixed, "tensorrt").passed
    assert not judge(shapes_and_a_product(), [ran("conv", "Conv", CPU)], "tensorrt").passed


def test_on_paper_the_default_export_fails_on_cuda_for_what_a_run_would_find(demo: onnx.ModelProto) -> None:
    found = on_paper(demo, "cuda", "no GPU here")
    assert found.misplaced == ()
    assert [copy for copy in found.copies if copy.endswith("device to host")], "how many proposals reach the head is read on the host"
    assert ["NonMaxSuppression" in sentence for sentence in found.waits] == [True]
    assert not found.passed
    assert Counter(node.provider for node in found.nodes).keys() == {CPU, CUDA}


def test_on_paper_tensorrt_names_what_its_engines_do_not_take(demo: onnx.ModelProto) -> None:
    found = on_paper(demo, "tensorrt", "no GPU here")
    on_cuda = Counter(node.op for node in found.nodes if node.provider == CUDA)
    assert on_cuda == {"NonMaxSuppression": 2, "RoiAlign": 1}
    assert any("kept out of TensorRT's engines and left to CUDA: 2 x NonMaxSuppression, 1 x RoiAlign" in note for note in found.notes)


def test_what_is_in_the_build_but_does_not_load_is_audited_on_paper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime-gpu without a driver offers CUDA and opens the session on the CPU."""
    path = write_model(tmp_path)
    monkeypatch.setattr(ort, "get_available_providers", lambda: [TENSORRT, CUDA, CPU])
    monkeypatch.setattr("export.profiling.open_session", lambda path, *_, **__: open_session(path, "cpu", provider_stack("cpu")))
    found = audit(path, "cuda", (96, 160))
    assert found.unmeasured == "provider 'cuda' was asked for, but its libraries or its device did not load (available: " + (
        f"{TENSORRT}, {CUDA}, {CPU})"
    )
    assert {node.provider for node in found.nodes} <= {CUDA, CPU}
    monkeypatch.setattr("export.profiling.require_engines", _no_engines)
    with pytest.raises(RuntimeLoadError, match="no TensorRT engines"):
        profile(path, (96, 160), provider="tensorrt")


def fails_in_a_run(folder: Path) -> Path:
    """A whole file that opens, and whose Reshape then meets a picture that it was not made for."""
    path = write_model(folder)
    model = onnx.load(path)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([7, 11], np.int64), "only_77"))
    sizes = helper.make_node("Reshape", ["image_sizes_hw", "only_77"], ["reshaped"], name="reshape")
    result = model.graph.output[2].name
    producer = next(node for node in model.graph.node if result in node.output)
    producer.output[list(producer.output).index(result)] = "labels_before"
    wrong = helper.make_node("ReduceMax", ["reshaped"], ["largest"], keepdims=0)
    model.graph.node.extend([sizes, wrong, helper.make_node("Add", ["labels_before", "largest"], [result])])
    onnx.save(model, path)
    return path


def test_a_batch_that_does_not_run_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = fails_in_a_run(tmp_path)
    with pytest.raises(RuntimeLoadError, match=r"model\.onnx: a batch of 3 at 96x160 does not run: .*Reshape"):
        profile(path, (96, 160), batch_size=3)
    assert main([str(path)]) == 1
    assert "does not run" in capsys.readouterr().err
    assert inspect.main([str(path)]) == 0  # what needs no run is shown
    assert "were not measured" in capsys.readouterr().out

    def no_memory(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("export.profiling.pictures.smear", no_memory)
    with pytest.raises(RuntimeLoadError, match="does not run: MemoryError"):
        profile(path, (96, 160), batch_size=3)


def test_what_opens_on_the_device_but_does_not_run_there_is_audited_on_paper_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_session(fails_in_a_run(tmp_path), "cpu", provider_stack("cpu"))
    monkeypatch.setattr("export.profiling._open", lambda *_: opened)
    found = audit(tmp_path / "blobs" / "1" / "model.onnx", "cuda", (96, 160), batch_size=5)
    assert found.unmeasured is not None
    assert "a batch of 5 at 96x160 does not run" in found.unmeasured


def _no_engines(*_: object) -> None:
    raise RuntimeLoadError("no TensorRT engines for this file")


def test_a_provider_that_is_not_here_is_said_by_the_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CPU])
    with pytest.raises(ProviderMissing, match="does not hold it"):
        profile(write_model(tmp_path), (96, 160), provider="cuda")


def test_json_lists_every_node_of_a_measured_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = write_model(tmp_path), tmp_path / "audit.json"
    assert main([str(path), "--json", str(out)]) == 0
    written = json.loads(out.read_text())
    assert (written["passed"], written["measured"]) == (True, True)
    assert len(written["nodes"]) > 5
    assert {node["provider"] for node in written["nodes"]} == {CPU}
    assert len({node["name"] for node in written["nodes"]}) == len(written["nodes"])
    assert all(node["seconds"] >= 0 for node in written["nodes"])
    assert "passed" in capsys.readouterr().out


def test_the_command_ends_with_two_where_a_node_would_leave_the_device(
    demo: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CPU])
    model = onnx.ModelProto()
    model.CopyFrom(demo)
    boxes = model.graph.output[0].name
    producer = next(node for node in model.graph.node if boxes in node.output)
    producer.output[list(producer.output).index(boxes)] = "boxes_before"
    repeats = onnx.numpy_helper.from_array(np.ones(3, np.int64), "once")
    model.graph.initializer.append(repeats)
    model.graph.node.extend(
        [
            helper.make_node("Cast", ["boxes_before"], ["flags"], to=TensorProto.BOOL),
            helper.make_node("Tile", ["flags", "once"], ["tiled"]),
            helper.make_node("Cast", ["tiled"], [boxes], to=TensorProto.FLOAT),
        ]
    )
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    assert main([str(path), "--provider", "cuda"]) == 2
    said = capsys.readouterr().out.replace("\n", " ")
    assert "off the device: 1 x Tile on bool" in said
    assert "nothing was run: provider 'cuda' was asked for" in said
    assert "failed (on paper)" in said
