from __future__ import annotations

import itertools
import re

from prometheus_client import generate_latest

from service.metrics import REQUEST_SECONDS, Metrics

# From the list of names that dashboards, alerts and autoscaling are written against.
NAMES = {
    "detector_http_request_duration_seconds": {"route", "method", "status"},
    "detector_stage_duration_seconds": {"stage"},
    "detector_images_total": {"outcome"},
    "detector_rejected_total": {"reason"},
    "detector_cancelled_total": {"phase"},
    "detector_batch_size": set(),
    "detector_batch_padding_ratio": set(),
    "detector_queue_depth": set(),
    "detector_queue_oldest_age_seconds": set(),
    "detector_inflight_requests": set(),
    "detector_model_info": {"model", "version", "sha256", "provider"},
    "detector_model_load_duration_seconds": set(),
    "detector_reloads_total": {"outcome"},
    "detector_event_loop_lag_seconds": set(),
    "detector_detections_per_image": set(),
    "detector_top_score": set(),
    "detector_input_megapixels": set(),
}


def used(**kinds) -> Metrics:
    metrics = Metrics(**kinds)
    metrics.request_seconds.labels("/v1/detect", "POST", 200).observe(0.01)
    metrics.model_info.labels("cells", "1", "ab", "cpu").set(1)
    return metrics


def samples(metrics: Metrics) -> dict[str, dict[str, str]]:
    return {sample.name: sample.labels for family in metrics.registry.collect() for sample in family.samples}


def test_names_and_labels_are_the_published_ones():
    found = samples(used())
    for name, labels in NAMES.items():
        sample = found.get(name, found.get(name + "_count"))
        assert sample is not None, name
        assert set(sample) == labels, name


def test_every_metric_has_help_and_a_unit_where_it_is_a_time():
    for family in used().registry.collect():
        assert family.documentation, family.name
        if family.name.startswith("detector_") and re.search("_(duration|age|lag)", family.name):
            assert family.name.endswith("_seconds")


def test_words_of_labels_are_there_before_the_first_event():
    text = used().render().decode()
    for line in (
        'detector_images_total{outcome="cancelled"} 0.0',
        'detector_rejected_total{reason="too_many_pixels"} 0.0',
        'detector_cancelled_total{phase="queued"} 0.0',
        'detector_stage_duration_seconds_count{stage="assemble"} 0.0',
    ):
        assert line in text


def test_request_buckets_are_fine_where_answers_are():
    bounds = re.findall(r'detector_http_request_duration_seconds_bucket{le="([^"]+)"', used().render().decode())
    assert [float(bound) for bound in bounds] == [*REQUEST_SECONDS, float("inf")]
    assert REQUEST_SECONDS[0] == 0.0025
    assert all(later <= 2.5 * earlier for earlier, later in itertools.pairwise(REQUEST_SECONDS))


def test_two_apps_do_not_share_counts():
    first, second = Metrics(), Metrics()
    first.images["ok"].inc()
    assert second.registry.get_sample_value("detector_images_total", {"outcome": "ok"}) == 0


def test_aliases_only_by_choice_and_equal_to_ours():
    assert "nv_inference" not in used().render().decode()
    metrics = used(triton_aliases=True)
    metrics.images["ok"].inc(3)
    metrics.images["rejected"].inc(2)
    metrics.batch_size.observe(3)
    metrics.stage_seconds["queue"].observe(0.002)
    text = metrics.render().decode()
    for line in ("nv_inference_request_success 3.0", "nv_inference_request_failure 2.0", "nv_inference_exec_count 1.0"):
        assert line in text
    assert "nv_inference_queue_duration_us 2000.0" in text


def _still(text: bytes) -> list[bytes]:
    """Without what the process itself changes between two looks."""
    return [line for line in text.splitlines() if not line.startswith(b"process_")]


def test_the_text_is_the_librarys_own_at_every_scrape():
    metrics = used(triton_aliases=True)
    metrics.model_info.labels('a "quoted\\name"', "two\nlines", "", "cpu").set(1)
    for depth in (0.0, 1e9, 0.1 + 0.2, float("inf")):
        metrics.inflight_requests.set(depth)
        metrics.request_seconds.labels("/v1/detect", "POST", 503).observe(depth)
        assert _still(metrics.render()) == _still(generate_latest(metrics.registry))
    metrics.model_info.remove('a "quoted\\name"', "two\nlines", "", "cpu")
    assert _still(metrics.render()) == _still(generate_latest(metrics.registry))
