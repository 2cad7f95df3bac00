"""The events that speed is measured with are what the figures say: about 530 bytes, each one new, decoded whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench.events import bodies, lines, templates


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    return lines(tmp_path_factory.mktemp("bench"), 2000)


def test_an_event_has_about_530_bytes(made: list[bytes]) -> None:
    assert 500 <= sum(map(len, made)) / len(made) <= 560


def test_no_insert_id_is_sent_twice(made: list[bytes]) -> None:
    sent = [
        event["insert_id"]
        for body in bodies(templates(made, events=100, api_key="k"), 60)
        for event in json.loads(body)["events"]
    ]
    assert len(sent) == len(set(sent)) == 6000
    assert {len(one) for one in sent} == {36}


def test_some_people_are_more_active_than_others_but_nobody_is_most_of_it(
    made: list[bytes],
) -> None:
    people = [json.loads(line)["device_id"] for line in made]
    most = max(map(people.count, set(people)))
    assert 5 <= most <= 200
    assert len(set(people)) > 1000


def test_the_same_events_are_made_each_time(made: list[bytes], tmp_path: Path) -> None:
    assert lines(tmp_path, 2000) == made
