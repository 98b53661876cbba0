"""The runtime benchmark: parts by data flow, shares, depth of NMS, tables; and a whole run on tiny pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image
from tiny_detector import Exported, tiny_detector

from benchmarks import runtime_sweeps
from benchmarks.runtime import main
from benchmarks.runtime_contenders import (
    EAGER,
    GRAPHS,
    INT8,
    OURS,
    SERVED,
    TENSORRT,
    CannotTakePart,
    Device,
    gather,
    open_session,
    our_options,
    served,
    write_version,
)
from benchmarks.runtime_int8 import trained_in_int8
from benchmarks.runtime_networks import Pair, build_pair, filled_slots, full_bucket, read_pictures, samples_of, with_proposals
from benchmarks.runtime_parts import PARTS, Peak, cpu_peak, gpu_peak, label, parts_of, post_processing_share
from benchmarks.runtime_report import markdown, speed_rows
from export.pictures import smear, street
from export.profiling import NodeRun
from model.checkpoint import Checkpoint, save_checkpoint
from model.presets import PRESETS
from service.manifest import parse_manifest
from service.runtime import OUTPUTS

CPU = "CPUExecutionProvider"
SMALLEST = "mobilenet_v3_large_320_fpn"


def toy() -> onnx.ModelProto:
    """A detector's skeleton: body, pyramid, RPN, proposals, pooling, head, NMS; the proposals also go around the head."""
    weights = ("backbone.body.conv", "backbone.fpn.lateral", "rpn.conv", "rpn.logits", "head.fc", "head.scores")
    edges = [
        ("MatMul", ["image", weights[0]], "body"),
        ("Relu", ["body"], "map"),
        ("MatMul", ["map", weights[1]], "level"),
        ("MatMul", ["level", weights[2]], "hidden"),
        ("Relu", ["hidden"], "active"),
        ("MatMul", ["active", weights[3]], "logits"),
        ("Sigmoid", ["logits"], "boxes"),
        ("Floor", ["boxes"], "assigned"),
        ("Mul", ["level", "assigned"], "pooled"),
        ("MatMul", ["pooled", weights[4]], "fc"),
        ("Relu", ["fc"], "features"),
        ("MatMul", ["features", weights[5]], "scores"),
        ("Add", ["scores", "boxes"], "answer"),
    ]
    nodes = [helper.make_node(op, inputs, [output], name=f"node_{output}") for op, inputs, output in edges]
    square = [4, 4]
    stored = [helper.make_tensor(name, TensorProto.FLOAT, square, np.eye(4, dtype=np.float32).flatten()) for name in weights]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, square) for name in ("image", "answer")]
    return helper.make_model(helper.make_graph(nodes, "toy", ends[:1], ends[1:], stored))


def test_parts_follow_the_data() -> None:
    names = label(toy())
    assert {name: names[f"node_{name}"] for name in ("body", "map", "level", "hidden", "active", "logits")} == {
        "body": "backbone",
        "map": "backbone",
        "level": "FPN",
        "hidden": "RPN",
        "active": "RPN",
        "logits": "RPN",
    }
    assert {name: names[name] for name in ("boxes", "assigned", "pooled", "fc", "features", "scores", "answer")} == {
        "boxes": "proposals",
        "assigned": "RoIAlign",
        "pooled": "RoIAlign",
        "fc": "head",
        "features": "head",
        "scores": "head",
        "answer": "final NMS",
    }


def ran(name: str, op: str, seconds: float) -> NodeRun:
    square = (("float", (4, 4)),)
    return NodeRun(name, op, CPU, seconds, square * 2, square)


def test_times_arithmetic_and_traffic_by_hand() -> None:
    profile = [
        ran("body_nchwc", "MatMul", 4e-6),  # the optimiser renamed it
        ran("ReorderOutput_token_3", "ReorderOutput", 1e-6),  # and put this behind it
        ran("node_boxes", "Sigmoid", 2e-6),
        ran("fused node_fc", "FusedMatMul", 2e-6),
        ran("node_answer", "Add", 1e-6),
    ]
    costs = {cost.part: cost for cost in parts_of(toy(), profile, Peak(64e6, 1e15, "by hand"))}
    assert list(costs) == list(PARTS)
    assert costs["backbone"].seconds == pytest.approx(5e-6)
    assert costs["backbone"].share == pytest.approx(0.5)
    assert costs["backbone"].gmac * 1e9 == pytest.approx(4 * 4 * 4)
    assert costs["backbone"].roofline == pytest.approx(1e-6 / 5e-6)  # 64 products at 64 million a second
    assert costs["backbone"].megabytes * 1e6 == pytest.approx(2 * 3 * 16 * 4)
    assert costs["head"].nodes == 1
    assert costs["RPN"].seconds == 0
    assert costs["RPN"].roofline == 0
    assert post_processing_share(costs.values()) == pytest.approx(0.3)


def test_peaks() -> None:
    measured = cpu_peak(1)
    assert 1e8 < measured.macs_per_s < 1e13
    assert 1e7 < measured.bytes_per_s < 1e13
    known = gpu_peak("NVIDIA H100 80GB HBM3")
    assert known is not None
    assert known.macs_per_s == pytest.approx(494.5e12)
    assert gpu_peak("an unknown device") is None


def test_turns_warm_up_first_and_time_every_contender_in_every_round() -> None:
    order: list[str] = []
    samples = [full_bucket((32, 64)), full_bucket((64, 32))]
    seconds = runtime_sweeps.in_turns({"a": lambda _: order.append("a"), "b": lambda _: order.append("b")}, samples, 2)
    assert order == list("aabb" * 3)
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2}


def test_both_sides_get_the_same_pixels() -> None:
    config = PRESETS[SMALLEST](("a",)).detector
    for sample in samples_of(config, read_pictures(None, 3)):
        height, width = sample.image_sizes_hw[0]
        assert sample.float_picture.shape == (3, height, width)
        inside = torch.from_numpy(sample.images[0, :height, :width]).permute(2, 0, 1)
        assert torch.equal((sample.float_picture * 255).round().to(torch.uint8), inside)
        assert not sample.images[0, height:].any()


def test_a_folder_without_pictures_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no picture"):
        read_pictures(tmp_path, 3)


def test_random_networks_fill_their_slots_and_find_things() -> None:
    pair = build_pair(SMALLEST)
    sample = full_bucket((320, 448))
    with torch.no_grad():
        answer = pair.ours(torch.from_numpy(sample.images), torch.from_numpy(sample.image_sizes_hw))
    assert answer.num_detections[0] > 20
    assert filled_slots(pair, [sample]) == [pytest.approx(150, abs=10)]
    limited = with_proposals(pair, 20)
    assert filled_slots(limited, [sample]) == [20]
    assert limited.theirs.rpn.post_nms_top_n() == 20  # type: ignore[operator,union-attr]


def test_who_cannot_take_part_is_listed_with_the_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: [CPU])
    with pytest.raises(CannotTakePart, match="no CUDAExecutionProvider"):
        open_session(b"", Device("cuda"))
    monkeypatch.setattr("benchmarks.runtime_contenders.our_graph", lambda *_: toy())
    missing = {"ours, int8": tmp_path / "no.onnx"}
    pair = Pair("toy", torch.nn.Identity(), torch.nn.Identity(), "random")  # type: ignore[arg-type]
    runs, reasons, _ = gather(pair, Device(), full_bucket((32, 32)), folder=tmp_path, files=missing)
    assert runs == {}
    assert not {GRAPHS, TENSORRT} & reasons.keys(), "on a CPU nobody expects them"
    assert "no.onnx" in reasons["ours, int8"]
    assert {EAGER, OURS} <= reasons.keys()


def test_on_a_gpu_the_services_own_ways_take_part_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without one, each of them says why it cannot."""
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: [CPU])
    monkeypatch.setattr("benchmarks.runtime_contenders.our_graph", lambda *_: toy())
    detector = tiny_detector()
    pair = Pair("tiny", torch.nn.Identity(), detector, "random")  # type: ignore[arg-type]
    without = frozenset({EAGER, "torchvision, torch.compile", "torchvision's own ONNX export", "ours, eager"})
    runs, reasons, _ = gather(pair, Device("cuda"), full_bucket((64, 96)), folder=tmp_path, files={}, without=without)
    assert runs == {}
    assert reasons.keys() == {OURS, SERVED, GRAPHS, TENSORRT}
    assert all("this build of ONNX Runtime" in reason for reason in reasons.values()), reasons


def test_half_precision_is_for_our_file_too() -> None:
    assert (our_options(Device()).nms, our_options(Device()).precision) == ("onnx", "fp32")
    assert (our_options(Device("cuda")).nms, our_options(Device("cuda")).precision) == ("dense", "fp32")
    assert our_options(Device("cuda", fp16=True)).precision == "fp16"


def test_the_services_runtime_answers_as_the_file_does(exported: Exported, tmp_path: Path) -> None:
    sample = full_bucket((64, 96))
    pair = Pair("tiny", torch.nn.Identity(), exported.detector, "random")  # type: ignore[arg-type]
    path = write_version(onnx.load(exported.file), pair, Device(), sample, tmp_path)
    written = parse_manifest({entry.key: entry.value for entry in onnx.load(path).metadata_props}, str(path))
    assert (64, 96) in written.input.buckets
    assert set(exported.detector.config.input.buckets) < set(written.input.buckets)
    expected = open_session(path, Device()).run(OUTPUTS, {"images": sample.images, "image_sizes_hw": sample.image_sizes_hw})
    for found, wanted in zip(served(path, Device())(sample), expected, strict=True):  # type: ignore[call-overload]
        np.testing.assert_array_equal(found, wanted)


def test_arguments_that_contradict_each_other_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (["--weights", "a.pth"], "belongs to one network"),
        (["--checkpoint", "a.pt"], "belong together"),
        (["--file", "int8"], "expected NAME=FILE"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert words in capsys.readouterr().err


def result() -> dict[str, object]:
    parts = [vars(cost) for cost in parts_of(toy(), [ran("node_body", "MatMul", 1e-3)], Peak(1e9, 1e9, "by hand"))]
    row = {
        "network": "toy",
        "proposals": [7, 9],
        "seconds": {EAGER: 0.2, OURS: 0.1, INT8: 0.04},
        "fastest": {EAGER: 0.19, OURS: 0.09, INT8: 0.039},
        "ratio": {EAGER: 1.0, OURS: 2.0, INT8: 5.0},
        "int8_times_fp32": 2.5,
        "int8_aim": 2.0,
        "judged": OURS,
        "aim": 3.0,
        "cannot": {"torch.compile": "no compiler | here"},
        "parts": parts,
        "post_processing": 0.1,
    }
    facts = dict.fromkeys(("machine", "device", "threads", "rounds", "torch", "torchvision", "onnxruntime", "weights", "note", "peak"), "x")
    depth = {"pictures": 2, "unequal": 0, "proposals": {"6": 8}, "detections": {"2": 1, "3": 1}}
    points = [{"x": 1, "ours": 5.0, "torchvision": 9.0}, {"x": 2, "ours": 4.0}]
    trained = {
        "pictures": 4,
        "calibrated_on": 3,
        "seconds": {"fp32": 0.06, "int8": 0.03},
        "times_fp32": 2.0,
        "ap": {"fp32": 0.63, "int8": 0.629},
    }
    more = {"trained": trained, "left_out": ["a part"]}
    return {**facts, **more, "rows": [row], "sweeps": {"batch": points}, "sweep_network": "toy", "nms_depth": depth}


def test_report_says_who_won_and_who_could_not() -> None:
    lines = speed_rows(result()["rows"])  # type: ignore[arg-type]
    assert ("toy", OURS, "100.0", "90.0", "2.00", "3.0") in lines
    assert ("toy", INT8, "40.0", "39.0", "5.00", "2.50 times fp32, aim 2.0") in lines
    text = markdown(result())
    for expected in (
        "cannot: no compiler / here",
        "| 6 | 8 | 0 |",
        "| 2 | 4.0 | - |",
        "post-processing",
        "toy: 7, 9 proposals",
        "30.0 ms a picture",
        "time: a part",
    ):
        assert expected in text


def with_canned_rows(monkeypatch: pytest.MonkeyPatch, *, fail_at: int) -> None:
    """Measuring a network gives the same row at once; the one at `fail_at` is interrupted."""
    count = 0

    def measured(*_: object) -> object:
        nonlocal count
        count += 1
        if count == fail_at:
            raise KeyboardInterrupt
        return result()["rows"][0]  # type: ignore[index]

    monkeypatch.setattr("benchmarks.runtime.measure", measured)
    monkeypatch.setattr("benchmarks.runtime.build_pair", lambda *_: None)


def test_an_interruption_keeps_what_was_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with_canned_rows(monkeypatch, fail_at=2)
    assert main(["--threads", "1", "--without", "sweeps", "--out", str(tmp_path)]) == 130
    assert len(json.loads((tmp_path / "runtime.json").read_text())["rows"]) == 1
    assert "Interrupted" in (tmp_path / "runtime.md").read_text()
    assert (tmp_path / "runtime.png").stat().st_size > 10_000


def test_no_part_begins_after_the_minutes_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_canned_rows(monkeypatch, fail_at=-1)
    networks = ["mobilenet_v3_large_320_fpn", "mobilenet_v3_large_fpn"]
    assert main(["--threads", "1", "--minutes", "1e-9", "--networks", *networks, "--without", "sweeps", "--out", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "runtime.json").read_text())
    assert (len(written["rows"]), written["left_out"]) == (1, [networks[1]])
    assert "not measured" in capsys.readouterr().out


def test_a_trained_network_in_both_precisions(tmp_path: Path) -> None:
    for name, draw in (("a.png", street), ("b.png", smear)):
        Image.fromarray(draw((90, 120), seed=1)).save(tmp_path / name)
    for split in ("train", "test"):
        (tmp_path / f"{split}.csv").write_text("image,xmin,ymin,xmax,ymax,class\na.png,5,5,60,50,red\nb.png,9,8,70,60,white\n")
    checkpoint, said = save_tiny(tmp_path / "tiny.pt"), []
    found = trained_in_int8(checkpoint, tmp_path, "test", Device(), 1, 2, said.append)
    assert (found["pictures"], found["calibrated_on"]) == (2, 2)
    assert found["seconds"].keys() == found["ap"].keys() == {"fp32", "int8"}
    assert found["times_fp32"] == pytest.approx(found["seconds"]["fp32"] / found["seconds"]["int8"])
    assert any("int8 on 2 pictures" in sentence for sentence in said)


@pytest.mark.timeout(900)  # half a minute of computing, which a busy machine stretches
def test_whole_run_on_tiny_pictures(tmp_path: Path) -> None:
    arguments = ["--quick", "--networks", SMALLEST, "--rounds", "1", "--threads", "1", "--without", "compile", "sweeps"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "runtime.json").read_text())
    row = written["rows"][0]
    assert row["cannot"] == {}
    assert row["seconds"].keys() == {EAGER, OURS, SERVED, INT8, "ours, eager", "torchvision's own ONNX export"}
    assert row["ratio"][EAGER] == 1.0
    assert sum(part["share"] for part in row["parts"]) == pytest.approx(1.0)
    assert all(part["nodes"] > 0 for part in row["parts"])
    assert (tmp_path / "runtime.png").stat().st_size > 10_000
    assert SMALLEST in (tmp_path / "runtime.md").read_text()


def test_depth_of_nms_on_a_networks_own_proposals(tmp_path: Path) -> None:
    for name, draw in (("a.png", street), ("b.png", smear)):
        Image.fromarray(draw((90, 120), seed=1)).save(tmp_path / name)
    (tmp_path / "test.csv").write_text("image,xmin,ymin,xmax,ymax,class\na.png,5,5,60,50,red\nb.png,9,8,70,60,white\n")
    checkpoint = save_tiny(tmp_path / "tiny.pt")
    depth = runtime_sweeps.nms_depth(checkpoint, tmp_path, "test", 5)
    assert depth["pictures"] == 2
    assert depth["unequal"] == 0
    assert sum(depth["proposals"].values()) == 2 * 4, "a scene a level"
    assert sum(depth["detections"].values()) == 2
    assert max(map(int, depth["proposals"])) >= 2, "somebody suppresses somebody"


def save_tiny(path: Path) -> Path:
    detector = tiny_detector()
    save_checkpoint(path, Checkpoint(detector=detector.state_dict(), config=detector.config, training={}))
    return path


@pytest.mark.slow
def test_sweeps_and_compiler(tmp_path: Path) -> None:
    arguments = ["--quick", "--networks", SMALLEST, "--sweep-network", SMALLEST, "--rounds", "1", "--threads", "1"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "runtime.json").read_text())
    assert {name: [point["x"] for point in points] for name, points in written["sweeps"].items()} == {
        "batch": [1, 2],
        "short side": [64, 96],
        "proposals": [20],
    }
    assert all(point["ours"] > 0 for points in written["sweeps"].values() for point in points)
