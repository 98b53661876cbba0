"""The certificate of dense NMS, through a real export and the service's real runtime, on pictures that spell out chains of boxes.

`Spelled` is a detector with the two suppressions of the real one and no network: its boxes are written in the pixels. A chain, in which
each box overlaps the next alone, needs a round a box, so one that is longer than the graph's rounds is not settled by one run.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from service_fakes import make_manifest
from service_onnx import write_model
from torch import Tensor, nn

from export.certificate import CertifiedDetector, ResumableNMS
from export.graph import GraphOptions, build_graph, save
from model.nms import DENSE_ITERATIONS, INVALID_SCORE, NMS, certified_dense_nms, greedy_nms
from model.ranking import take_rows, top_rows
from model.roi_heads import Detections, _select
from service.manifest import InputSpec
from service.providers import PROVIDER_NAMES, open_session, provider_stack
from service.runtime import OnnxRuntime
from service.tensorrt import EnginePlan
from service.unsettled import NMS_CONVERGED, NMS_START

LEVELS, COUNT = 2, 40
BOXES = LEVELS * COUNT
BUCKET = (32, 96)
LEVEL_THRESH, FINAL_THRESH = 0.4, 0.3


class Spelled(nn.Module):
    """Row 0 of a picture holds x1, y1, width of a box in each column, row 1 its height, score (255ths; 0: no box) and class."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            architecture="spelled",
            num_classes=3,
            anchors=SimpleNamespace(sizes=((1.0,),) * LEVELS),
            rpn=SimpleNamespace(pre_nms_top_n_test=COUNT),
            roi=SimpleNamespace(candidates_per_image=BOXES, detections_per_image=BOXES, pool="align"),
        )
        self.nms: NMS = greedy_nms

    def forward(self, images: Tensor, image_sizes_hw: Tensor) -> Detections:
        values = images[:, :2, :BOXES].to(torch.float32)  # [B, 2, BOXES, 3]
        x1, y1, width = (values[:, 0, :, i] for i in range(3))
        height, level, group = (values[:, 1, :, i] for i in range(3))
        boxes = torch.stack([x1, y1, x1 + width, y1 + height], dim=-1)
        scores = torch.where((level > 0) & (image_sizes_hw[:, :1] > 0), level / 255, INVALID_SCORE)
        index = torch.cat([top_rows(scores[:, i : i + COUNT], COUNT)[1] + i for i in range(0, BOXES, COUNT)], dim=1)
        boxes, scores, labels = take_rows(boxes, index), scores.gather(1, index), group.to(torch.int64).gather(1, index) + 1
        keep = self.nms(boxes.reshape(-1, COUNT, 4), scores.reshape(-1, COUNT), None, LEVEL_THRESH).reshape(scores.shape)
        best, index = top_rows(torch.where(keep, scores, INVALID_SCORE), BOXES)
        boxes, labels = take_rows(boxes, index), labels.gather(1, index)
        keep = self.nms(boxes, best, labels, FINAL_THRESH)
        return _select(boxes, torch.where(keep, best, INVALID_SCORE), labels, BOXES)


@pytest.fixture(scope="module")
def graph() -> onnx.ModelProto:
    return build_graph(Spelled(), GraphOptions(nms="dense"))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def file(graph: onnx.ModelProto, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("spelled") / "model.onnx"
    manifest = make_manifest(nms="dense", detections_per_image=BOXES, input=InputSpec(short_side=32, long_side=96, buckets=[BUCKET]))
    save(graph, manifest, path)
    return path


class Opened(OnnxRuntime):
    """The runtime with what it told of unsettled images."""

    def __init__(self, path: Path) -> None:
        self.unsettled: list[int] = []
        super().__init__(path, provider="cpu", intra_op_threads=1, on_unsettled=self.unsettled.append)


@pytest.fixture
def runtime(file: Path) -> Opened:
    return Opened(file)


def spell(boxes: np.ndarray, scores: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """A picture [H, W, 3] that says these boxes (x1, y1, width, height), levels one after another."""
    picture = np.zeros((*BUCKET, 3), np.uint8)
    picture[0, :BOXES] = boxes[:, :3]
    picture[1, :BOXES] = np.stack([boxes[:, 3], scores, classes], axis=1)
    return picture


def chain(*, tied: bool, shuffled: bool = False, length: int = COUNT, step: int = 4) -> np.ndarray:
    """Both levels hold one chain: neighbours overlap with IoU .43, the next but one with .11. A tie is broken by position."""
    order = np.random.default_rng(3).permutation(COUNT) if shuffled else np.arange(COUNT)
    boxes = np.stack([order * step, np.full(COUNT, 7), np.full(COUNT, 10), np.full(COUNT, 10)], axis=1)
    scores = np.full(COUNT, 200) if tied else 255 - order
    scores = np.where(np.arange(COUNT) < length, scores, 0)
    return spell(np.tile(boxes, (LEVELS, 1)), np.tile(scores, LEVELS), np.repeat([0, 1], COUNT))


def greedy(boxes: np.ndarray, scores: np.ndarray, groups: np.ndarray, thresh: float) -> np.ndarray:
    """Greedy NMS word for word over rows in order of score."""
    keep = np.zeros(len(scores), bool)
    for i in range(len(scores)):
        rivals = np.flatnonzero(keep[:i] & (groups[:i] == groups[i]))
        low, high = np.maximum(boxes[i, :2], boxes[rivals, :2]), np.minimum(boxes[i, 2:], boxes[rivals, 2:])
        shared = (high - low).clip(0).prod(axis=1)
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
        keep[i] = scores[i] > 0 and not (shared > np.float32(thresh) * (areas[i] + areas[rivals] - shared)).any()
    return keep


def by_hand(picture: np.ndarray) -> np.ndarray:
    """Kept rows [n, 6] (box, score, label) of a picture, best first, ties in order of position."""
    first, second = picture[0, :BOXES].astype(np.float32), picture[1, :BOXES].astype(np.float32)
    boxes = np.stack([first[:, 0], first[:, 1], first[:, 0] + first[:, 2], first[:, 1] + second[:, 0]], axis=1)
    rows = np.column_stack([boxes, second[:, 1] / np.float32(255), second[:, 2] + 1])
    kept = []
    for level in np.split(rows, LEVELS):
        level = level[np.argsort(-level[:, 4], kind="stable")]
        kept.append(level[greedy(level[:, :4], level[:, 4], np.zeros(COUNT), LEVEL_THRESH)])
    rows = np.concatenate(kept)
    rows = rows[np.argsort(-rows[:, 4], kind="stable")]
    return rows[greedy(rows[:, :4], rows[:, 4], rows[:, 5], FINAL_THRESH)]


def assert_exact(runtime: OnnxRuntime, pictures: np.ndarray) -> None:
    answer = runtime.run(pictures, np.array([BUCKET] * len(pictures)))
    for i, picture in enumerate(pictures):
        expected, count = by_hand(picture), int(answer.num_detections[i])
        found = np.column_stack([answer.boxes[i], answer.scores[i], answer.labels[i]])
        assert count == len(expected)
        np.testing.assert_allclose(found[:count], expected, atol=1e-6)
        assert not found[count:].any()


def raw(runtime: OnnxRuntime, pictures: np.ndarray, **start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Certificate and masks of one run."""
    assert runtime._session is not None
    feed = {"images": pictures, "image_sizes_hw": np.array([BUCKET] * len(pictures)), **start}
    converged, state = runtime._session.run([NMS_CONVERGED, "nms_state"], feed)
    return converged, state


def test_a_chain_longer_than_the_rounds_has_no_certificate_and_a_short_one_has(runtime: Opened) -> None:
    assert COUNT > DENSE_ITERATIONS
    pictures = np.stack([chain(tied=False), chain(tied=False, length=DENSE_ITERATIONS - 2), np.zeros((*BUCKET, 3), np.uint8)])
    assert raw(runtime, pictures)[0].tolist() == [False, True, True]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shuffled", [False, True])
def test_unsettled_images_get_the_exact_answer_and_are_counted(runtime: Opened, tied: bool, shuffled: bool) -> None:
    assert_exact(runtime, chain(tied=tied, shuffled=shuffled)[None])
    assert runtime.unsettled == ([] if tied and shuffled else [1])  # a shuffled chain of ties falls into short pieces


def test_neighbours_of_an_unsettled_image_keep_their_answer(runtime: Opened) -> None:
    rng = np.random.default_rng(0)
    pictures = np.stack([crowd(rng, 30, 250), chain(tied=False), crowd(rng, 12, 4), chain(tied=True), np.zeros((*BUCKET, 3), np.uint8)])
    assert_exact(runtime, pictures)
    assert runtime.unsettled == [2]


def crowd(rng: np.random.Generator, spread: int, levels: int) -> np.ndarray:
    """Boxes on a coarse grid, so that overlaps repeat, with scores of few levels, so that they tie."""
    boxes = np.column_stack([rng.integers(0, spread, (BOXES, 2)), rng.integers(1, spread, (BOXES, 2))])
    return spell(boxes, rng.integers(0, levels + 1, BOXES) * (255 // levels), rng.integers(0, 3, BOXES))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), spread=st.integers(3, 100), levels=st.sampled_from([1, 3, 20, 255]))
def test_random_crowds_are_exact(file: Path, seed: int, spread: int, levels: int) -> None:
    runtime = opened(file)
    rng = np.random.default_rng(seed)
    assert_exact(runtime, np.stack([crowd(rng, spread, levels), chain(tied=bool(seed % 2)), crowd(rng, spread, levels)]))


_OPENED: dict[Path, Opened] = {}


def opened(path: Path) -> Opened:
    return _OPENED.setdefault(path, Opened(path))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_whatever_masks_a_run_starts_from_the_certificate_means_the_exact_answer(file: Path, seed: int) -> None:
    runtime = opened(file)
    rng = np.random.default_rng(seed)
    picture = chain(tied=False)[None]
    state = rng.random((1, 2 * BOXES)) < rng.random()
    for _ in range(2 * BOXES):
        converged, state = raw(runtime, picture, **{NMS_START: state})
        if converged[0]:
            break
    assert converged[0]
    exact = np.arange(COUNT) % 2 == 0  # of a chain greedy NMS keeps every other box
    assert state[0, :COUNT].tolist() == exact.tolist()


def test_a_runtime_that_ignores_the_masks_fails_the_image_instead_of_answering_wrongly(file: Path) -> None:
    runtime = Opened(file)
    session = runtime._session
    assert session is not None
    run = session.run
    runtime._session = SimpleNamespace(  # type: ignore[assignment]
        run=lambda outputs, feed, options=None: run(outputs, {name: feed[name] for name in ("images", "image_sizes_hw")}, options)
    )
    with pytest.raises(Exception, match="could not be told apart with certainty"):
        runtime.run(chain(tied=False)[None], np.array([BUCKET]))


def test_the_graph_keeps_the_contract_for_servers_that_know_nothing_of_the_certificate(graph: onnx.ModelProto, runtime: Opened) -> None:
    used = {node.op_type for node in graph.graph.node}
    assert used.isdisjoint({"NonMaxSuppression", "If", "Loop", "Scan", "NonZero"})
    session = runtime._session
    assert session is not None
    assert [value.name for value in session.get_inputs()] == ["images", "image_sizes_hw"]
    described = {value.name: (value.type, value.shape[1:]) for value in session.get_outputs()}
    assert described[NMS_CONVERGED] == ("tensor(bool)", [])
    assert described["nms_state"] == ("tensor(bool)", [2 * BOXES])


def test_eager_and_resumable_strategy_agree_with_greedy_once_they_settle() -> None:
    detector = CertifiedDetector(Spelled())  # type: ignore[arg-type]
    images, sizes_hw = torch.from_numpy(np.stack([chain(tied=False), chain(tied=True)])), torch.tensor([BUCKET] * 2)
    state = torch.ones(1, detector.state_width, dtype=torch.bool)
    runs, converged = 0, torch.zeros(2, dtype=torch.bool)
    while not converged.all():
        *answer, converged, state = detector(images, sizes_hw, state)
        runs += 1
    assert 1 < runs < 10
    for found, expected in zip(answer, Spelled()(images, sizes_hw), strict=True):
        assert torch.equal(found, expected)


def test_certified_rounds_continue_where_they_stopped() -> None:
    boxes = torch.tensor([[[4.0 * i, 0.0, 4.0 * i + 10, 10.0] for i in range(COUNT)]])
    scores = torch.linspace(1, 0.5, COUNT)[None]
    keep, changed = certified_dense_nms(boxes, scores, None, LEVEL_THRESH)
    assert changed[0] > 0
    while changed[0]:
        keep, changed = certified_dense_nms(boxes, scores, None, LEVEL_THRESH, keep)
    assert torch.equal(keep, greedy_nms(boxes, scores, None, LEVEL_THRESH))


def test_one_row_of_masks_serves_every_image() -> None:
    scores = torch.full((6, 5), 0.5)  # 3 images, 2 suppressions each
    start = torch.rand(1, 20) < 0.5
    boxes = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(6, 5, 4) + 10 * torch.arange(5)[:, None]
    nms = ResumableNMS(start, (2, 1))
    assert nms(boxes, scores, None, 0.5).all()  # nothing overlaps: the masks are forgotten after one round
    assert nms.certificate()[0].tolist() == [True] * 3


class Engine:
    """A session as TensorRT's may be: it answers, and does not look at the masks that it is to go on from."""

    def __init__(self, session: ort.InferenceSession, provider: str) -> None:
        self._session, self._provider = session, provider

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def get_providers(self) -> list[str]:
        return [PROVIDER_NAMES[self._provider]]

    def run(self, outputs: list[str], feed: dict[str, Any], *_: Any) -> Any:
        return self._session.run(outputs, {name: value for name, value in feed.items() if name != NMS_START})


@pytest.fixture
def providers_opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Providers of the sessions that were opened, on a machine that has them all."""
    names: list[str] = []

    def open_one(path: Path, name: str, stack: list[Any], threads: int | None) -> Any:
        names.append(name)
        session = open_session(path, "cpu", provider_stack("cpu"), 1)
        return session if name == "cpu" else Engine(session, name)

    monkeypatch.setattr(ort, "get_available_providers", lambda: list(PROVIDER_NAMES.values()))
    monkeypatch.setattr("service.runtime.require_engines", lambda path, device: EnginePlan(tmp_path, (BUCKET,), 2, {}))
    monkeypatch.setattr("service.runtime.open_session", open_one)
    return names


def test_beside_tensorrt_what_finishes_images_is_opened_before_the_first_request(
    file: Path, tmp_path: Path, providers_opened: list[str]
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(file.read_bytes())
    unsettled: list[int] = []
    runtime = OnnxRuntime(path, provider="tensorrt", intra_op_threads=1, on_unsettled=unsettled.append)
    assert providers_opened == ["tensorrt", "cpu"]
    runtime._bound = None  # buffers on the device need one
    path.write_bytes(b"the next version, half written")
    assert_exact(runtime, np.stack([chain(tied=False), chain(tied=True)]))
    assert unsettled == [2]
    assert providers_opened == ["tensorrt", "cpu"]
    runtime.close()
    assert runtime._cpu_session is None


def test_no_second_session_is_opened_where_nothing_needs_it(file: Path, tmp_path: Path, providers_opened: list[str]) -> None:
    for provider in ("cuda", "cpu"):  # these go on from any masks themselves
        OnnxRuntime(file, provider=provider, intra_op_threads=1).close()
    OnnxRuntime(write_model(tmp_path), provider="tensorrt", intra_op_threads=1).close()  # no certificate, nothing to finish
    assert providers_opened == ["cuda", "cpu", "tensorrt"]
