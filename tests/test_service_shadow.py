from __future__ import annotations

import asyncio

import numpy as np
import pytest
from service_fakes import INPUT, make_settings, picture, run, running, sample, until
from service_onnx import write_model

from service.app import create_app
from service.inference import ImageDetections
from service.manifest import InputSpec
from service.shadow import agree, iou

PNG = {"content-type": "image/png"}
SAME = np.ones(4, np.float32)


def detections(*rows):
    """Rows of (box, score, label)."""
    boxes, scores, labels = zip(*rows, strict=True) if rows else ((), (), ())
    return ImageDetections(np.array(boxes, np.float32).reshape(-1, 4), np.array(scores, np.float32), np.array(labels, np.int64))


def test_agreement_by_hand():
    one, other = ((0, 0, 10, 20), 0.9, 1), ((30, 0, 50, 20), 0.8, 2)
    assert agree(detections(one, other), detections(other, one), SAME)
    assert agree(detections(), detections(), SAME)
    assert agree(detections(one), detections(one, ((0, 0, 5, 5), 0.3, 1)), SAME)  # below the score that anybody is shown
    assert not agree(detections(one), detections(), SAME)
    assert not agree(detections(one), detections(one, other), SAME)
    assert not agree(detections(one), detections(((0, 0, 10, 20), 0.9, 2)), SAME)
    assert not agree(detections(one), detections(((0, 0, 10, 20), 0.7, 1)), SAME)
    assert not agree(detections(one), detections(((8, 0, 18, 20), 0.9, 1)), SAME)
    assert not agree(detections(one, one), detections(one, ((0, 0, 10, 20), 0.9, 2)), SAME)
    assert agree(detections(one), detections(((0, 0, 5, 10), 0.9, 1)), 2 * SAME)


@pytest.mark.parametrize(("other", "value"), [((0, 0, 10, 20), 1.0), ((5, 0, 15, 20), 1 / 3), ((10, 0, 20, 20), 0.0), ((0, 0, 0, 0), 0.0)])
def test_iou_by_hand(other, value):
    assert iou(np.array((0, 0, 10, 20), np.float32), np.array(other, np.float32)) == pytest.approx(value)


def shadowed(root, shadow, requests, **candidate):
    """Counts by outcome, and the answers, after `requests` pictures with a candidate version 2."""
    write_model(root, version="1")
    write_model(root, version="2", **candidate)

    async def scenario():
        app = create_app(make_settings(model_repository=root, provider="cpu", model=("blobs@1",), shadow=shadow))
        async with running(app) as client:
            responses = [await client.post("/v1/detect", content=picture(), headers=PNG) for _ in range(requests)]
            shadow_part = app.state.parts.pipeline.shadow
            if shadow_part is not None:
                await until(lambda: not shadow_part._running)
            counts = {outcome: sample(app, "detector_shadow_images_total", outcome=outcome) for outcome in ("agree", "disagree", "failed")}
            return counts, [response.json()["model"]["version"] for response in responses], app

    return run(scenario())


def test_a_like_candidate_agrees_on_its_share_and_never_answers(tmp_path):
    counts, versions, app = shadowed(tmp_path, "blobs@2=0.25", 12)
    assert counts == {"agree": 3, "disagree": 0, "failed": 0}
    assert versions == ["1"] * 12
    assert sample(app, "detector_images_total", outcome="ok") == 12


def test_an_unlike_candidate_disagrees(tmp_path):
    counts, versions, _ = shadowed(tmp_path, "blobs@2=1", 4, score=0.3)
    assert counts == {"agree": 0, "disagree": 4, "failed": 0}
    assert versions == ["1"] * 4


def test_a_candidate_with_another_input_size_is_compared_in_the_same_frame(tmp_path):
    other = InputSpec(short_side=64, long_side=128, buckets=[(64, 128), (128, 64), (96, 96)])
    assert other.buckets != INPUT.buckets
    counts, _, _ = shadowed(tmp_path, "blobs@2=1", 4, input=other)
    assert counts == {"agree": 4, "disagree": 0, "failed": 0}


def test_a_candidate_that_does_not_load_keeps_nobody_from_work(tmp_path):
    counts, versions, app = shadowed(tmp_path, "blobs@2=1", 3, golden_score=0.1)
    assert counts == {"agree": 0, "disagree": 0, "failed": 0}
    assert versions == ["1"] * 3
    assert app.state.parts.pipeline.shadow is None


def test_a_failing_candidate_is_counted_and_the_answers_stay(tmp_path):
    write_model(tmp_path, version="1")
    write_model(tmp_path, version="2")

    async def scenario():
        app = create_app(make_settings(model_repository=tmp_path, provider="cpu", model=("blobs@1",), shadow="blobs@2=1"))
        async with running(app) as client:
            shadow = app.state.parts.pipeline.shadow
            shadow.candidate.loaded.runtimes[0].close()
            responses = await asyncio.gather(*(client.post("/v1/detect", content=picture(), headers=PNG) for _ in range(4)))
            assert {response.status_code for response in responses} == {200}
            await until(lambda: sample(app, "detector_shadow_images_total", outcome="failed") == 4)
            assert sample(app, "detector_images_total", outcome="failed") == 0

    run(scenario())
