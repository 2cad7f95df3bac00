"""Health, metrics and the description of the endpoints."""

from __future__ import annotations

import json
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from retrofill import __version__
from retrofill.core.throttle import Throttled
from retrofill.engine import charts
from retrofill.errors import BusyError
from retrofill.server.ingest import METHODS
from retrofill.server.openapi import description

from .conftest import KEY, SECRET, Live


@pytest.mark.slow
def test_health_says_whether_reads_and_writes_work(live: Live) -> None:
    answer = live.ask("GET", "/healthz")
    expected = {"status": "ok", "service": "retrofill", "version": __version__}
    assert (answer.status, answer.json) == (200, expected)
    live.engine.reason = "The disk is full"
    answer = live.ask("GET", "/healthz")
    assert (answer.status, answer.json["reason"]) == (503, "The disk is full")
    assert answer.json["status"] != "ok"


def figures(live: Live) -> dict[tuple[str, ...], float]:
    answer = live.ask("GET", "/metrics")
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/plain")
    text = answer.body.decode()
    assert KEY not in text
    assert SECRET not in text
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.mark.slow
def test_metrics_count_what_was_done(live: Live, event: dict[str, Any]) -> None:
    size = json.loads(live.send([event, event]).body)["payload_size_bytes"]
    live.send([{"user_id": "user-1"}])
    live.ask("POST", "/batch", b"{")
    live.engine.outcome = Throttled(30, {"device-1": 31}, {}, {}, {}, [0], 1)
    live.send([event], path="/batch")
    live.engine.outcome = BusyError("Too much is waiting")
    live.send([event])
    found = figures(live)
    assert found["retrofill_requests_total", "/2/httpapi", "200"] == 1
    assert found["retrofill_requests_total", "/2/httpapi", "400"] == 1
    assert found["retrofill_requests_total", "/2/httpapi", "503"] == 1
    assert found["retrofill_requests_total", "/batch", "429"] == 1
    assert found["retrofill_events_total", "/2/httpapi"] == 2
    assert found["retrofill_payload_bytes_total", "/2/httpapi"] == size
    assert found["retrofill_refused_total", "faults"] == 1
    assert found["retrofill_refused_total", "invalid_json"] == 1
    assert found["retrofill_refused_total", "throttled"] == 1
    assert found["retrofill_refused_total", "unavailable"] == 1
    assert found["retrofill_commit_seconds_count",] == 2
    assert found["retrofill_commit_seconds_bucket", "+Inf"] == 2
    assert found["retrofill_body_bytes",] == 0
    assert found["retrofill_connections",] == 1


@pytest.mark.slow
def test_metrics_show_what_the_engine_counts(live: Live) -> None:
    found = figures(live)
    assert found["retrofill_blocks_total",] == 3
    assert found["retrofill_duplicates_total",] == 2
    assert found["retrofill_unsealed_events",] == 7
    assert found["retrofill_last_seal_timestamp_seconds",] == 1_700_000_000


@pytest.mark.slow
def test_the_description_is_published(live: Live) -> None:
    answer = live.ask("GET", "/openapi.json")
    assert answer.headers["content-type"] == "application/json"
    assert answer.json == json.loads(json.dumps(description()))


def test_the_description_names_every_ingest_path_and_method() -> None:
    paths = description()["paths"]
    for path, methods in METHODS.items():
        assert sorted(method.lower() for method in methods) == sorted(paths[path])


def test_every_reference_of_the_description_leads_somewhere() -> None:
    found = description()

    def references(value: Any) -> list[str]:
        if isinstance(value, dict):
            here = [value["$ref"]] if "$ref" in value else []
            return here + [one for inner in value.values() for one in references(inner)]
        if isinstance(value, list):
            return [one for inner in value for one in references(inner)]
        return []

    for reference in references(found):
        target = found
        for step in reference.removeprefix("#/").split("/"):
            target = target[step]


@pytest.mark.slow
def test_the_segmentation_describes_every_metric_that_it_has(live: Live) -> None:
    found = live.ask("GET", "/openapi.json").json
    (metric,) = (
        one["schema"]
        for one in found["paths"]["/api/2/events/segmentation"]["get"]["parameters"]
        if one["name"] == "m"
    )
    assert (metric["enum"], metric["default"]) == (list(charts.METRICS), charts.METRICS[0])
