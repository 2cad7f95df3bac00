"""What Prometheus reads at /metrics.

The ingest path only adds to plain numbers, once a batch; they become metrics when somebody asks. What the engine
counts is taken from its `figures` by name.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from retrofill.limits import MS_PER_S

# Upper ends in seconds of the steps in which times from hand-over to the engine until its answer are counted.
STEPS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

# Engine figure → metric, what it is. A figure that ends in `_ms` is shown in seconds.
COUNTERS = {
    "blocks": ("retrofill_blocks", "Blocks committed"),
    "duplicates": ("retrofill_duplicates", "Events dropped as duplicates"),
    "merges": ("retrofill_merges", "People merged"),
    "held": (
        "retrofill_merges_held",
        "Events whose user joins more people than merges_per_user: nobody was merged",
    ),
    "commit_s": ("retrofill_commit_writing_seconds", "Time spent in commits"),
    "seals": ("retrofill_seals", "Seals done"),
    "seal_failures": (
        "retrofill_seal_failures",
        "Seals that failed; what was acknowledged is whole and waits in the hot store",
    ),
    "sealed_events": ("retrofill_sealed_events", "Events moved into the lake"),
    "checkpoints": ("retrofill_checkpoints", "Checkpoints written"),
}
GAUGES = {
    "waiting_requests": ("retrofill_queue_requests", "Requests that wait for their commit"),
    "waiting_bytes": ("retrofill_queue_bytes", "Bytes of requests that wait for their commit"),
    "unsealed_events": ("retrofill_unsealed_events", "Events committed and not in the lake yet"),
    "last_seal_ms": ("retrofill_last_seal_timestamp_seconds", "When the last seal ended"),
    "last_checkpoint_ms": (
        "retrofill_last_checkpoint_timestamp_seconds",
        "When the last checkpoint was written",
    ),
}


class PathFigures:
    """What one ingest path has done. Plain numbers, added to once a request."""

    __slots__ = ("events", "payload_bytes", "statuses")

    def __init__(self) -> None:
        self.events = 0
        self.payload_bytes = 0
        self.statuses: Counter[int] = Counter()


class Metrics(Collector):
    """The figures of one server."""

    def __init__(self) -> None:
        self.paths: dict[str, PathFigures] = {}
        self.refused: Counter[str] = Counter()
        self.held_bytes: Callable[[], int] = int
        self.connections: Callable[[], int] = int
        self.engine: Callable[[], Mapping[str, float]] = dict
        self._steps = [0] * (len(STEPS_S) + 1)
        self._sum_s = 0.0
        self.registry = CollectorRegistry()
        self.registry.register(self)
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)

    def path(self, path: str) -> PathFigures:
        """Return the figures of a path, made at first."""
        return self.paths.setdefault(path, PathFigures())

    def committed(self, took_s: float) -> None:
        """Count one request that the engine took, by its time."""
        self._steps[bisect_left(STEPS_S, took_s)] += 1
        self._sum_s += took_s

    def collect(self) -> Iterator[Metric]:
        """Yield every metric. Called by prometheus-client."""
        yield from self._requests()
        refused = CounterMetricFamily(
            "retrofill_refused", "Requests refused, by reason", labels=["reason"]
        )
        for reason, count in self.refused.items():
            refused.add_metric([reason], count)
        yield refused
        counts = [str(step) for step in STEPS_S] + ["+Inf"]
        yield HistogramMetricFamily(
            "retrofill_commit_seconds",
            "Time from hand-over to the engine until its answer",
            buckets=list(zip(counts, accumulate(self._steps), strict=True)),
            sum_value=self._sum_s,
        )
        yield GaugeMetricFamily(
            "retrofill_body_bytes", "Bytes of request bodies held", self.held_bytes()
        )
        yield GaugeMetricFamily("retrofill_connections", "Open connections", self.connections())
        figures = self.engine()
        for name, (metric, text) in COUNTERS.items():
            if name in figures:
                yield CounterMetricFamily(metric, text, figures[name])
        for name, (metric, text) in GAUGES.items():
            if name in figures:
                scale = MS_PER_S if name.endswith("_ms") else 1
                yield GaugeMetricFamily(metric, text, figures[name] / scale)

    def _requests(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "retrofill_requests", "Requests answered, by path and status", labels=["path", "status"]
        )
        events = CounterMetricFamily("retrofill_events", "Events accepted", labels=["path"])
        size = CounterMetricFamily(
            "retrofill_payload_bytes", "Bytes of accepted requests", labels=["path"]
        )
        for path, figures in self.paths.items():
            for status, count in figures.statuses.items():
                requests.add_metric([path, str(status)], count)
            events.add_metric([path], figures.events)
            size.add_metric([path], figures.payload_bytes)
        yield from (requests, events, size)
