"""What the dashboard shows: every panel as its title, its queries and the sentence that an operator reads when it looks wrong.

The first row reads the recorded series of the whole fleet, every other row the raw series of the replicas that the variable `instance`
selects. dashboard.py turns this into Grafana's JSON.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SELECT = 'job="detector", instance=~"$instance"'
WINDOW = "[$__rate_interval]"

NOT_FROM_THE_SERVICE = {
    "DCGM_": "needs dcgm-exporter and an NVIDIA GPU (compose profile `gpu`)",
    "container_": "needs cAdvisor, which every kubelet carries and plain Docker does not",
}
"""Beginnings of the metrics on this dashboard that another exporter gives, and which."""


@dataclass(frozen=True)
class Panel:
    """One panel: queries as {legend: expression}, `{{label}}` in a legend stands for the label's value."""

    title: str
    about: str
    queries: dict[str, str]
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 8
    height: int = 8
    options: dict[str, Any] = field(default_factory=dict)
    custom: dict[str, Any] = field(default_factory=dict)
    limits: tuple[tuple[str, float], ...] = ()
    """(colour, from this value on), drawn as lines or as a stat's colour."""


def rate(metric: str, by: str, extra: str = "") -> str:
    """A counter's rate of change over the selected replicas."""
    return f"sum by ({by}) (rate({metric}{{{SELECT}{extra}}}{WINDOW}))"


def mean(histogram: str, by: str, extra: str = "") -> str:
    """A histogram's mean: the rate of its sum over the rate of its count."""
    return f"{rate(histogram + '_sum', by, extra)} / ({rate(histogram + '_count', by, extra)} > 0)"


def quantile(q: float, histogram: str, by: str = "", extra: str = "") -> str:
    """A histogram's quantile over the selected replicas."""
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({q}, {rate(histogram + '_bucket', labels, extra)})"


STACKED = {"stacking": {"mode": "normal"}, "fillOpacity": 40}
OBJECTIVE_LINE = {"thresholdsStyle": {"mode": "line"}}
RED_FROM = {"green": "green", "amber": "orange", "red": "red"}


def stat(title: str, about: str, expression: str, unit: str, **limits: float) -> Panel:
    """One number of the first line, coloured by its limits (amber=, red=)."""
    steps = tuple((RED_FROM[colour], value) for colour, value in limits.items())
    return Panel(title, about, {title: expression}, unit, "stat", width=4, height=4, limits=steps)


TRAFFIC = [
    stat("Frames per second", "Pictures answered each second, over the last minute.", "detector:images_served:rate1m", "short"),
    stat(
        "p99",
        "One request in a hundred takes longer. Red from the objective on.",
        "detector:request_seconds:p99_rate1m",
        "s",
        amber=0.15,
        red=0.25,
    ),
    stat("Server errors", "Share of 5xx. Any is our fault.", "detector:errors:ratio_rate5m", "percentunit", amber=0.001, red=0.01),
    stat(
        "Refused (429)",
        "Share of requests told to come back later.",
        "detector:overload:ratio_rate5m",
        "percentunit",
        amber=0.001,
        red=0.01,
    ),
    stat(
        "Saturation",
        "Share of the time that the devices infer. Past 0.9 add a replica.",
        "detector:saturation:ratio_rate1m",
        "percentunit",
        amber=0.8,
        red=0.9,
    ),
    stat("Alerts firing", "Each has a section in deploy/RUNBOOK.md.", 'count(ALERTS{alertstate="firing"}) or vector(0)', "short", red=1),
    Panel(
        "Offered and served",
        "The gap is what was refused, failed or cancelled. Goodput counts the requests that were answered within the objective.",
        {
            "offered": "detector:images_offered:rate1m",
            "served": "detector:images_served:rate1m",
            "goodput": "detector:goodput:rate1m",
        },
        "ops",
    ),
    Panel(
        "Latency percentiles",
        "Answers with status 200, from the first header to the last byte. The dashed line is the objective.",
        {
            "p50": "detector:request_seconds:p50_rate1m",
            "p95": "detector:request_seconds:p95_rate1m",
            "p99": "detector:request_seconds:p99_rate1m",
            "p99.9": "detector:request_seconds:p999_rate1m",
            "objective": "detector:latency_objective_seconds",
        },
        "s",
    ),
    Panel(
        "Answers by status",
        "429: overload. Other 4xx: the clients' pictures or keys. 500: device or model. 503: no model, or draining. 504: too late.",
        {"{{status}}": "detector:requests:rate1m"},
        "reqps",
        custom=STACKED,
    ),
]

STAGES = [
    Panel(
        "Mean time of each stage",
        "decode grows: more decode_threads or smaller pictures. queue grows: see Batching. infer grows: see Device.",
        {"{{stage}}": mean("detector_stage_duration_seconds", "stage")},
        "s",
        custom=STACKED,
    ),
    Panel(
        "Queue against infer, p95",
        "Waiting well above working: the device is full; add a replica, or raise max_batch_size if memory allows.",
        {
            "queue": quantile(0.95, "detector_stage_duration_seconds", extra=', stage="queue"'),
            "infer": quantile(0.95, "detector_stage_duration_seconds", extra=', stage="infer"'),
        },
        "s",
    ),
    Panel(
        "Latency heat map",
        "Two bands mean two kinds of requests (sizes, batch sizes); a cloud that climbs means a queue that grows.",
        {
            "{{le}}": "sum by (le) (increase(detector_http_request_duration_seconds_bucket{"
            + SELECT
            + ', route=~"/v1/detect.*|/v2/.*infer"}'
            + WINDOW
            + "))"
        },
        "s",
        "heatmap",
        options={"calculate": False, "yAxis": {"unit": "s"}, "color": {"mode": "scheme", "scheme": "Oranges", "steps": 64}},
    ),
]

BATCHING = [
    Panel(
        "Mean batch size",
        "Near 1 under load: pictures fall into too many buckets. At max_batch_size: the device is the limit.",
        {"{{instance}}": mean("detector_batch_size", "instance")},
        width=6,
    ),
    Panel(
        "Padding",
        "Share of the pixels that is padding. High: the model's buckets do not fit the pictures.",
        {"{{instance}}": mean("detector_batch_padding_ratio", "instance")},
        "percentunit",
        width=6,
    ),
    Panel(
        "Queue depth",
        "Decoded pictures that wait. Those read, decoded and inferred count against max_queue_images too, so refusals begin below it.",
        {"{{instance}}": f"detector_queue_depth{{{SELECT}}}"},
        width=6,
    ),
    Panel(
        "Oldest in the queue",
        "Age of the head of the queue. High while the device is not busy: it hangs.",
        {"{{instance}}": f"detector_queue_oldest_age_seconds{{{SELECT}}}"},
        "s",
        width=6,
    ),
    Panel(
        "Refused by reason",
        "queue_full and deadline: overload. The others: what clients send.",
        {"{{reason}}": rate("detector_rejected_total", "reason")},
        "ops",
        width=8,
        custom=STACKED,
    ),
    Panel(
        "Cancelled by phase",
        "Clients that left before the answer: their time-outs are shorter than our latency.",
        {"{{phase}}": rate("detector_cancelled_total", "phase")},
        "ops",
        width=8,
        custom=STACKED,
    ),
    Panel(
        "Pictures by outcome",
        "ok, rejected, failed (the device), cancelled (the client).",
        {"{{outcome}}": rate("detector_images_total", "outcome")},
        "ops",
        width=8,
        custom=STACKED,
    ),
]

DEVICE = [
    Panel(
        "Device busy",
        "Seconds of inference each second, by replica (a replica with two devices can reach 2).",
        {"{{instance}}": rate("detector_stage_duration_seconds_sum", "instance", ', stage="infer"')},
        "percentunit",
        width=8,
    ),
    Panel(
        "Device errors",
        "out_of_memory: lower max_batch_size. lost: the driver; see dmesg. bad_output: the model.",
        {"{{kind}} {{instance}}": rate("detector_device_errors_total", "kind, instance")},
        "ops",
        width=8,
    ),
    Panel(
        "GPU engine activity",
        "Share of the time that any engine of the GPU works. High with few frames: small batches.",
        {"{{Hostname}} {{gpu}}": "DCGM_FI_PROF_GR_ENGINE_ACTIVE"},
        "percentunit",
        width=8,
    ),
    Panel(
        "GPU memory",
        "Used share. Grows with every new shape until warm; then it must stand still.",
        {"{{Hostname}} {{gpu}}": "DCGM_FI_DEV_FB_USED / (DCGM_FI_DEV_FB_USED + DCGM_FI_DEV_FB_FREE)"},
        "percentunit",
        width=8,
        limits=(("red", 0.9),),
        custom=OBJECTIVE_LINE,
    ),
    Panel(
        "GPU power",
        "Watts. A fall under load means throttling or a device that waits for the CPU.",
        {"{{Hostname}} {{gpu}}": "DCGM_FI_DEV_POWER_USAGE"},
        "watt",
        width=8,
    ),
    Panel(
        "GPU temperature",
        "Celsius. Most cards slow down from about 85 degrees.",
        {"{{Hostname}} {{gpu}}": "DCGM_FI_DEV_GPU_TEMP"},
        "celsius",
        width=8,
    ),
]

PROCESS = [
    Panel(
        "CPU used",
        "Cores. At the container's limit: decoding or a CPU model starves the rest.",
        {"{{instance}}": rate("process_cpu_seconds_total", "instance")},
        width=6,
    ),
    Panel(
        "CPU throttled",
        "Share of scheduler periods in which the container had to stop. Above a few percent: raise its CPU limit.",
        {
            "{{pod}}": 'sum by (pod) (rate(container_cpu_cfs_throttled_periods_total{container="detector"}'
            + WINDOW
            + ')) / sum by (pod) (rate(container_cpu_cfs_periods_total{container="detector"}'
            + WINDOW
            + "))"
        },
        "percentunit",
        width=6,
    ),
    Panel(
        "Memory",
        "Resident bytes. A line that only climbs is a leak.",
        {"{{instance}}": f"process_resident_memory_bytes{{{SELECT}}}"},
        "bytes",
        width=6,
    ),
    Panel(
        "Event loop lag, p99",
        "Above 10 ms something computes where it must not.",
        {"{{instance}}": quantile(0.99, "detector_event_loop_lag_seconds", "instance")},
        "s",
        width=6,
    ),
    Panel("In flight", "Requests being answered now.", {"{{instance}}": f"detector_inflight_requests{{{SELECT}}}"}, width=6),
    Panel(
        "Restarts",
        "Starts of the process within the window.",
        {"{{instance}}": f"changes(process_start_time_seconds{{{SELECT}}}[30m])"},
        width=6,
    ),
    Panel(
        "Alerts",
        "What was pending and firing when.",
        {"{{alertname}} {{alertstate}}": "sum by (alertname, alertstate) (ALERTS)"},
        kind="state-timeline",
        width=12,
    ),
]

MODEL = [
    Panel(
        "Versions in service",
        "Model, version and provider by replica: they must agree.",
        {"{{model}} {{version}} {{provider}} {{instance}}": f"detector_model_info{{{SELECT}}}"},
        kind="state-timeline",
        width=12,
    ),
    Panel(
        "Reloads by outcome",
        "failed: the old version is still served; the service's log says why.",
        {"{{outcome}}": f"sum by (outcome) (increase(detector_reloads_total{{{SELECT}}}[5m]))"},
        width=6,
    ),
    Panel(
        "Time to load a version, p99",
        "Load, warm-up and golden pictures.",
        {"p99": f"histogram_quantile(0.99, sum by (le) (detector_model_load_duration_seconds_bucket{{{SELECT}}}))"},
        "s",
        width=6,
    ),
    Panel(
        "Detections in a picture",
        "A jump without a new version means that the pictures changed.",
        {"mean": mean("detector_detections_per_image", "job")},
        width=6,
    ),
    Panel(
        "Best score in a picture, median",
        "Sinks when the pictures drift away from what the model was trained on.",
        {"median": quantile(0.5, "detector_top_score")},
        "percentunit",
        width=6,
    ),
    Panel(
        "Size of pictures",
        "Megapixels as they come. Decoding time follows.",
        {"mean": mean("detector_input_megapixels", "job"), "p95": quantile(0.95, "detector_input_megapixels")},
        width=6,
    ),
    Panel(
        "Shadow version",
        "Pictures by how the candidate's answer compares.",
        {"{{outcome}}": rate("detector_shadow_images_total", "outcome")},
        "ops",
        width=6,
        custom=STACKED,
    ),
]

ROWS = {
    "Traffic, errors, latency (whole fleet)": TRAFFIC,
    "Stages": STAGES,
    "Batching": BATCHING,
    "Device": DEVICE,
    "Process": PROCESS,
    "Model and pictures": MODEL,
}
