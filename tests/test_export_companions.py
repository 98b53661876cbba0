"""What lies beside the graph: model card, verification report, Triton's configuration."""

from __future__ import annotations

from dataclasses import replace

import onnx
import onnxruntime as ort
import pytest
from google.protobuf import text_format
from rich.console import Console
from tiny_detector import METRICS, Exported
from tritonclient.grpc import model_config_pb2

from export.agreement import Tally
from export.card import CardFacts, model_card
from export.certificate import state_width
from export.report import markdown, table
from export.triton import continue_config, triton_config
from export.verify import FREE, CaseResult, Gates, Report
from service.manifest import Manifest
from service.providers import provider_stack
from service.runtime import OnnxRuntime


@pytest.fixture(scope="module")
def manifest(exported: Exported) -> Manifest:
    return OnnxRuntime(exported.file, provider="cpu").manifest


def test_triton_config_parses_and_means_the_contract(manifest: Manifest, exported: Exported) -> None:
    text = triton_config(manifest, max_batch_size=4)
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    assert (config.name, config.backend, config.max_batch_size) == ("tiny", "onnxruntime", 4)
    types = model_config_pb2.DataType
    assert {i.name: (i.data_type, list(i.dims)) for i in config.input} == {
        "images": (types.TYPE_UINT8, [-1, -1, 3]),
        "image_sizes_hw": (types.TYPE_INT64, [2]),
    }
    assert {o.name: (o.data_type, list(o.dims)) for o in config.output} == {
        "boxes": (types.TYPE_FP32, [100, 4]),
        "scores": (types.TYPE_FP32, [100]),
        "labels": (types.TYPE_INT64, [100]),
        "num_detections": (types.TYPE_INT64, [1]),
    }
    assert [list(w.inputs["images"].dims) for w in config.model_warmup] == [[h, w, 3] for h, w in manifest.input.buckets]
    written = (exported.folder / "config.pbtxt").read_text()
    assert text_format.Parse(written, model_config_pb2.ModelConfig()).name == "tiny"


def io_of(session: ort.InferenceSession) -> dict[str, tuple[str, list[object]]]:
    """Every input, required or not, and output as ONNX Runtime reads it: its type and its axes, of which named ones are free."""
    tensors = [*session.get_inputs(), *session.get_overridable_initializers(), *session.get_outputs()]
    return {t.name: (t.type, [side if isinstance(side, int) else -1 for side in t.shape]) for t in tensors}


def test_triton_searches_convolutions_as_the_service_does(manifest: Manifest) -> None:
    """Triton's backend takes numbers for the names of the CUDA provider's options, and reads them from `parameters` in every version."""
    (_, options), _ = provider_stack("cuda")
    for text in (triton_config(manifest), continue_config(manifest, 8)):
        told = text_format.Parse(text, model_config_pb2.ModelConfig()).parameters
        searches, strategies = ("EXHAUSTIVE", "HEURISTIC", "DEFAULT"), ("kNextPowerOfTwo", "kSameAsRequested")
        assert searches[int(told["cudnn_conv_algo_search"].string_value)] == options["cudnn_conv_algo_search"]
        assert strategies[int(told["arena_extend_strategy"].string_value)] == options["arena_extend_strategy"]


def test_triton_config_of_dense_nms_lists_the_certificate(manifest: Manifest, exported: Exported, dense_graph: onnx.ModelProto) -> None:
    width = state_width(dense_graph)
    assert width == len(exported.detector.config.anchors.sizes) * 100 + 200
    assert state_width(onnx.load(exported.file)) is None
    known = io_of(ort.InferenceSession(dense_graph.SerializeToString(), providers=["CPUExecutionProvider"]))
    types = model_config_pb2.DataType
    onnx_types = {
        types.TYPE_FP32: "tensor(float)",
        types.TYPE_INT64: "tensor(int64)",
        types.TYPE_UINT8: "tensor(uint8)",
        types.TYPE_BOOL: "tensor(bool)",
    }
    batching = text_format.Parse(triton_config(manifest, state_width=width), model_config_pb2.ModelConfig())
    for tensor in [*batching.input, *batching.output]:
        dims = list(tensor.reshape.shape) if tensor.HasField("reshape") else list(tensor.dims)
        assert (onnx_types[tensor.data_type], [-1, *dims]) == known[tensor.name], "the graph's axes behind the batch"
    assert {tensor.name for tensor in batching.output} == known.keys() - {"images", "image_sizes_hw", "nms_start"}
    assert not any(tensor.optional for tensor in batching.input), "Triton's backend refuses those of a batching model"

    whole = text_format.Parse(continue_config(manifest, width), model_config_pb2.ModelConfig())
    assert (whole.name, whole.max_batch_size) == ("tiny-continue", 0)
    listed = {tensor.name: (onnx_types[tensor.data_type], list(tensor.dims)) for tensor in [*whole.input, *whole.output]}
    assert listed == known
    assert [tensor.name for tensor in whole.input if tensor.optional] == ["nms_start"]


def test_card_says_what_people_ask(exported: Exported) -> None:
    card = (exported.folder / "README.md").read_text()
    for expected in (
        "# tiny, version 1",
        "red, white, platelet",
        "drawn pictures",
        "AP50 0.800",
        "| white | 0.400 |",
        "| platelet | - | - | - | 0 |",
    ):
        assert expected in card
    assert "white: AP50 is only 0.70" in card
    assert "not stated" in card


def test_card_takes_what_only_people_know(manifest: Manifest) -> None:
    facts = CardFacts(
        description="Finds cells.", licence="Apache-2.0", data_licence="MIT", training_time="2 h", known_failures=("Blurred cells.",)
    )
    card = model_card(manifest, facts, METRICS, "python -m export best.pt", 2_000_000)
    for expected in ("Finds cells.", "Apache-2.0", "MIT", "2 h", "- Blurred cells.", "2.0 MB", "`python -m export best.pt`"):
        assert expected in card
    assert "not stated" not in card


def test_card_without_metrics_says_how_to_measure(manifest: Manifest) -> None:
    assert "python -m export.evaluate" in model_card(manifest, CardFacts(), {}, "x", 1)


def report(tally: Tally, problems: tuple[str, ...] = ()) -> Report:
    full = CaseResult("full", (128, 160), 1, 100, Tally(matched=100), gates=Gates())
    return Report(Gates(), (CaseResult("black", (128, 160), 1, 5, tally, problems), full), reference="eager")


@pytest.mark.parametrize(
    ("tally", "problems", "sentence"),
    [
        (Tally(matched=5, worst_box_px=2e-3), (), "a box moved by 0.002 px"),
        (Tally(matched=5, worst_score=2e-4), (), "a score moved by 0.0002"),
        (Tally(matched=4, missed=1, top_unmatched=0.07), (), "score 0.070 has no partner"),
        (Tally(matched=5), ("scores do not descend",), "scores do not descend"),
        (Tally(matched=4, undecided=1), (), "rounding decides 1 of 5"),
    ],
)
def test_broken_gates_are_sentences(tally: Tally, problems: tuple[str, ...], sentence: str) -> None:
    broken = report(tally, problems)
    assert any(sentence in failure for failure in broken.failures)
    assert broken.summary()["passed"] is False
    assert sentence in markdown(broken)


def test_small_differences_pass() -> None:
    good = report(Tally(matched=4, worst_box_px=9e-4, worst_score=9e-5, missed=1, top_unmatched=0.055))
    assert good.failures == []
    assert "All hold." in markdown(good)
    assert replace(good, gates=Gates(box_px=1e-4)).failures


def test_what_shows_nothing_proves_nothing() -> None:
    for gates in (Gates(), FREE):
        unseen = Report(gates, (CaseResult("black", (128, 160), 1, 0, Tally()),), reference="eager")
        (sentence,) = unseen.failures
        assert "at most 0 detections in one picture" in sentence
        assert "--pictures FOLDER" in sentence
        assert unseen.summary()["passed"] is False
        assert sentence in markdown(unseen)
    batches = Report(Gates(), (CaseResult("batch", (128, 160), 7, 100, Tally(matched=100)),))
    assert batches.failures  # seven pictures with 14 each are no full answer
    small = Report(Gates(), (CaseResult("few", (128, 160), 1, 20, Tally(matched=20)),), full_answer=20)
    assert small.failures == []  # of a network that never gives more


def test_the_card_says_how_much_was_seen(manifest: Manifest) -> None:
    assert f"up to {manifest.parity['fullest_picture']} in one picture; on cpu" in model_card(manifest, CardFacts(), {}, "x", 1)


def test_table_has_a_row_a_case() -> None:
    console = Console(width=150)
    with console.capture() as captured:
        console.print(table(report(Tally(matched=5, worst_box_px=1.2e-4))))
    assert "128x160" in captured.get()
    assert "1.2e-04" in captured.get()
