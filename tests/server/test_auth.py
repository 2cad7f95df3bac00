"""Which project a header belongs to."""

from __future__ import annotations

import base64

import pytest

from retrofill.config import Project
from retrofill.server import auth

from .conftest import KEY, SECRET, Live

SHOP = Project(1, "shop", "key-1", "secret-1")
BLOG = Project(2, "blog", "schlüssel", "geheim:nis")


def header(text: str, scheme: str = "Basic") -> str:
    return f"{scheme} {base64.b64encode(text.encode()).decode()}"


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (header("key-1:secret-1"), SHOP),
        (header("key-1:secret-1", "basic"), SHOP),
        (header("key-1:secret-1", " BASIC "), SHOP),
        (header("schlüssel:geheim:nis"), BLOG),
        (header("key-1:geheim:nis"), None),
        (header("key-1:secret-"), None),
        (header("key-1:secret-12"), None),
        (header("key-1:"), None),
        (header("key-1"), None),
        (header(""), None),
        (header("key-1:secret-1", "Bearer"), None),
        ("Basic key-1:secret-1", None),
        ("Basic", None),
        ("Basic ====", None),
        ("Basic \xff\xff", None),
        ("", None),
    ],
)
def test_basic_keys_find_their_project(given: str, found: Project | None) -> None:
    assert auth.basic(given, [SHOP, BLOG]) == found


def test_every_project_is_compared_whatever_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    def compare(given: bytes, wanted: bytes) -> bool:
        compared.append(wanted)
        return given == wanted

    monkeypatch.setattr("hmac.compare_digest", compare)
    assert auth.basic(header("key-1:secret-1"), [SHOP, BLOG]) == SHOP
    assert auth.basic("nonsense", [SHOP, BLOG]) is None
    assert len(compared) == 4


@pytest.mark.slow
def test_reads_need_both_keys(live: Live) -> None:
    good = {"Authorization": header(f"{KEY}:{SECRET}")}
    answer = live.ask("GET", "/api/2/echo", headers=good)
    assert answer.json == {"project": "shop"}
    assert answer.headers["access-control-allow-origin"] == "*"
    for bad in ({}, {"Authorization": header(f"{KEY}:{KEY}")}):
        answer = live.ask("GET", "/api/2/echo", headers=bad)
        assert answer.status == 401
        assert answer.json["error"]["http_code"] == 401
        assert answer.headers["www-authenticate"].startswith("Basic")
        assert answer.headers["access-control-allow-origin"] == "*"
