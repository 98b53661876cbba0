"""Prometheus metrics: names, help and buckets, in a registry that belongs to one app.

Labels are bounded: routes are templates, statuses are numbers, the rest are the words listed here. Frames per second are never a gauge:
`sum(rate(detector_images_total{outcome="ok"}[1m]))`.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.core import Metric, UnknownMetricFamily
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from service.exposition import Exposition

REQUEST_SECONDS = (0.0025, 0.005, 0.01, 0.015, 0.025, 0.035, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.5, 0.75, 1, 2.5, 5, 10)
STAGE_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, *REQUEST_SECONDS)
LAG_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
LOAD_SECONDS = (0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)

STAGES = ("read", "decode", "queue", "assemble", "infer", "postprocess", "serialise")
OUTCOMES = ("ok", "rejected", "failed", "cancelled")
REASONS = ("queue_full", "deadline", "too_large", "too_many_pixels", "bad_image", "bad_request", "draining", "unauthorised")
PHASES = ("queued", "running")


class Metrics:
    """All metrics of one app. Attributes are prometheus-client objects, or their children where the labels are known words."""

    def __init__(self, *, triton_aliases: bool = False) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for every counter, which nobody reads
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self._add_request_metrics()
        self._add_image_metrics()
        self._add_batch_metrics()
        self._add_model_metrics()
        if triton_aliases:
            self.registry.register(_TritonAliases(self))
        self._exposition = Exposition(self.registry)

    def _add_request_metrics(self) -> None:
        self.request_seconds = Histogram(
            "detector_http_request_duration_seconds",
            "From the request's headers to the last byte of the answer handed to the socket.",
            ["route", "method", "status"],
            buckets=REQUEST_SECONDS,
            registry=self.registry,
        )
        stages = Histogram(
            "detector_stage_duration_seconds",
            "Time of one stage: read, decode, queue, postprocess and serialise an image, assemble and infer a batch.",
            ["stage"],
            buckets=STAGE_SECONDS,
            registry=self.registry,
        )
        self.stage_seconds = {stage: stages.labels(stage) for stage in STAGES}
        self.inflight_requests = Gauge("detector_inflight_requests", "Requests being answered now.", registry=self.registry)
        self.event_loop_lag = Histogram(
            "detector_event_loop_lag_seconds",
            "How late the event loop wakes from a short sleep; high values mean that something computes on it.",
            buckets=LAG_SECONDS,
            registry=self.registry,
        )

    def _add_image_metrics(self) -> None:
        images = Counter(
            "detector_images", "Images by outcome; the rate of `ok` is the frames per second.", ["outcome"], registry=self.registry
        )
        self.images = {outcome: images.labels(outcome) for outcome in OUTCOMES}
        rejected = Counter("detector_rejected", "Images and requests refused, by reason.", ["reason"], registry=self.registry)
        self.rejected = {reason: rejected.labels(reason) for reason in REASONS}
        cancelled = Counter(
            "detector_cancelled",
            "Images whose client left: before the device took them, or while it ran.",
            ["phase"],
            registry=self.registry,
        )
        self.cancelled = {phase: cancelled.labels(phase) for phase in PHASES}
        self.detections_per_image = Histogram(
            "detector_detections_per_image",
            "Detections above the graph's floor; a drift of this tells of a drift of the pictures.",
            buckets=(0, 1, 2, 5, 10, 20, 50, 100, 200),
            registry=self.registry,
        )
        self.top_score = Histogram(
            "detector_top_score", "Best score of an image.", buckets=tuple(i / 10 for i in range(1, 11)), registry=self.registry
        )
        self.input_megapixels = Histogram(
            "detector_input_megapixels",
            "Size of a picture as it came.",
            buckets=(0.1, 0.3, 0.5, 1, 2, 4, 8, 12, 24, 50),
            registry=self.registry,
        )

    def _add_batch_metrics(self) -> None:
        self.batch_size = Histogram("detector_batch_size", "Images in one inference.", buckets=(1, 2, 4, 8, 16, 32), registry=self.registry)
        self.batch_padding_ratio = Histogram(
            "detector_batch_padding_ratio",
            "Share of a batch's pixels that is padding.",
            buckets=tuple(i / 20 for i in range(1, 21)),
            registry=self.registry,
        )
        self.queue_depth = Gauge("detector_queue_depth", "Decoded images that wait for a device.", registry=self.registry)
        self.queue_oldest_age = Gauge("detector_queue_oldest_age_seconds", "Age of the oldest image that waits.", registry=self.registry)
        device_errors = Counter(
            "detector_device_errors", "Errors of the device: memory, lost, or bad output.", ["kind"], registry=self.registry
        )
        self.device_errors = {kind: device_errors.labels(kind) for kind in ("out_of_memory", "lost", "bad_output", "other")}
        self.devices = Gauge("detector_devices", "Devices that serve: those configured less those lost.", registry=self.registry)
        self.nms_unconverged = Counter(
            "detector_nms_unconverged",
            "Images whose dense NMS was not settled after the graph's rounds and was finished by further runs.",
            registry=self.registry,
        )

    def _add_model_metrics(self) -> None:
        self.model_info = Gauge(
            "detector_model_info", "1 for each version in service.", ["model", "version", "sha256", "provider"], registry=self.registry
        )
        self.model_load_seconds = Histogram(
            "detector_model_load_duration_seconds",
            "Load, warm-up and golden check of a version.",
            buckets=LOAD_SECONDS,
            registry=self.registry,
        )
        reloads = Counter("detector_reloads", "Versions loaded at run time, by outcome.", ["outcome"], registry=self.registry)
        self.reloads = {outcome: reloads.labels(outcome) for outcome in ("ok", "failed")}
        shadow = Counter(
            "detector_shadow_images",
            "Images also given to the shadow version, by how its answer compares.",
            ["outcome"],
            registry=self.registry,
        )
        self.shadow = {outcome: shadow.labels(outcome) for outcome in ("agree", "disagree", "failed", "skipped")}

    def render(self) -> bytes:
        """The exposition text."""
        return self._exposition.render()


class _TritonAliases(Collector):
    """The same counters under the names that dashboards made for Triton ask for. Durations are microseconds, as there."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        """Read the sums of our own metrics at the time of the scrape."""
        images = {outcome: _value(child) for outcome, child in self._metrics.images.items()}
        executions, _ = _count_and_sum(self._metrics.batch_size)
        stages = {stage: _count_and_sum(child)[1] * 1e6 for stage, child in self._metrics.stage_seconds.items()}
        rows = [
            ("nv_inference_request_success", "Images answered", images["ok"]),
            ("nv_inference_request_failure", "Images refused or failed", images["failed"] + images["rejected"] + images["cancelled"]),
            ("nv_inference_count", "Images inferred", images["ok"]),
            ("nv_inference_exec_count", "Batches inferred", executions),
            ("nv_inference_queue_duration_us", "Time in the queue", stages["queue"]),
            ("nv_inference_compute_input_duration_us", "Time to assemble batches", stages["assemble"]),
            ("nv_inference_compute_infer_duration_us", "Time of the device", stages["infer"]),
            ("nv_inference_compute_output_duration_us", "Time to make answers", stages["postprocess"] + stages["serialise"]),
        ]
        for name, text, value in rows:
            yield UnknownMetricFamily(name, text, value)  # untyped: Triton's counters do not end in _total


def _value(counter: Counter) -> float:
    return next(sample.value for metric in counter.collect() for sample in metric.samples if sample.name.endswith("_total"))


def _count_and_sum(histogram: Histogram) -> tuple[float, float]:
    samples = {sample.name.rsplit("_", 1)[1]: sample.value for metric in histogram.collect() for sample in metric.samples}
    return samples["count"], samples["sum"]
