"""The command `retrofill serve` as a real process on a real directory."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.faults.process import PATIENCE_S

from retrofill.cli.serve import projects_of
from retrofill.errors import InputError

KEY, SECRET = "a" * 32, "b" * 32
COMMAND = [sys.executable, "-c", "from retrofill.cli.main import app; app()"]
EVENT = {"event_type": "click", "user_id": "user-1", "device_id": "device-1", "insert_id": "one"}


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **more}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


class Process:
    """A server process that is ready. said: what it told on stdout before that."""

    def __init__(self, data: Path, *arguments: str, **variables: str) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, "serve", "--data", str(data), "--port", "0", *arguments],
            env=environment(**variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.said: list[str] = []
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line.strip())
            if "listens on" in line:
                break
        self.port = int(self.said[-1].rsplit(":", 1)[1]) if self.said else 0

    def ask(self, method: str, path: str, body: bytes | None = None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        with contextlib.closing(connection):
            connection.request(method, path, body)
            response = connection.getresponse()
            return response.status, json.loads(response.read())

    def send(self, *events: dict[str, Any], key: str = KEY) -> tuple[int, Any]:
        return self.ask("POST", "/batch", json.dumps({"api_key": key, "events": events}).encode())

    def end(self) -> str:
        """Ask it to stop; return its log."""
        self.process.send_signal(signal.SIGTERM)
        _, logged = self.process.communicate(timeout=PATIENCE_S)
        return logged


@contextlib.contextmanager
def serving(data: Path, *arguments: str, **variables: str) -> Iterator[Process]:
    server = Process(data, *arguments, **variables)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.communicate()


@pytest.mark.slow
def test_a_server_takes_events_and_ends_with_0(tmp_path: Path) -> None:
    project = f"shop:{KEY}:{SECRET}"
    with serving(tmp_path / "data", "--project", project) as server:
        assert server.ask("GET", "/healthz")[0] == 200
        status, said = server.send(EVENT)
        assert (status, said["code"], said["events_ingested"]) == (200, 200, 1)
        logged = server.end()
        assert server.process.returncode == 0
    assert "batch_accepted project=shop path=/batch events=1" in logged
    assert "stopped" in logged
    assert "Traceback" not in logged
    assert KEY not in logged
    assert SECRET not in logged
    with serving(tmp_path / "data") as server:
        assert server.send(EVENT)[0] == 200
        assert not any(KEY in line for line in server.said)
        server.end()
        assert server.process.returncode == 0


@pytest.mark.slow
def test_a_first_start_makes_a_project_and_tells_its_keys_once(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        keys = {line.rsplit(maxsplit=1)[0]: line.split()[-1] for line in server.said[1:3]}
        assert sorted(keys) == ["api key", "secret key"]
        assert server.send(EVENT, key=keys["api key"])[0] == 200
        logged = server.end()
    assert keys["api key"] not in logged
    with serving(tmp_path) as server:
        assert len(server.said) == 1
        assert server.send(EVENT, key=keys["api key"])[0] == 200


@pytest.mark.slow
def test_projects_come_from_the_environment_and_from_files(tmp_path: Path) -> None:
    listed = tmp_path / "projects"
    listed.write_text(f"# ours\nblog:{'c' * 32}:{SECRET}\n\n")
    named = f"shop:{KEY}:{SECRET} @{listed}"
    with serving(tmp_path / "data", RETROFILL_PROJECTS=named) as server:
        assert len(server.said) == 1
        assert server.send(EVENT)[0] == 200
        assert server.send(EVENT, key="c" * 32)[0] == 200


@pytest.mark.slow
def test_a_second_server_on_a_directory_is_refused(tmp_path: Path) -> None:
    with serving(tmp_path):
        second = run("serve", "--data", str(tmp_path), "--port", "0")
    assert second.returncode == 2
    assert "Another process is using this data directory" in second.stderr
    assert str(tmp_path) in second.stderr
    assert "Traceback" not in second.stderr


@pytest.mark.slow
def test_a_port_that_is_taken_is_told(tmp_path: Path) -> None:
    with serving(tmp_path / "one") as server:
        second = run("serve", "--data", str(tmp_path / "two"), "--port", str(server.port))
    assert second.returncode == 2
    assert f"127.0.0.1 port {server.port}" in second.stderr
    assert "--port" in second.stderr
    assert not (tmp_path / "two").exists()


@pytest.mark.slow
def test_a_name_with_other_keys_is_refused(tmp_path: Path) -> None:
    with serving(tmp_path, "--project", f"shop:{KEY}:{SECRET}") as server:
        server.end()
    other = run(
        "serve", "--data", str(tmp_path), "--port", "0", "--project", f"shop:{SECRET}:{KEY}"
    )
    assert other.returncode == 2
    assert "shop" in other.stderr
    assert KEY not in other.stderr
    assert SECRET not in other.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ("serve",),
        ("serve", "--data", "x", "--limits", "many"),
        ("serve", "--data", "x", "--port", "70000"),
        ("serve", "--data", "x", "--project", "shop"),
        ("serve", "--data", "x", "--geoip", "/no/such/file"),
        ("serve", "--data", "/dev/null/x", "--port", "0"),
        ("no-such-verb",),
    ],
)
def test_wrong_usage_ends_with_2_and_no_traceback(arguments: tuple[str, ...]) -> None:
    said = run(*arguments)
    assert said.returncode == 2
    assert said.stdout == ""
    assert said.stderr
    assert "Traceback" not in said.stderr


@pytest.mark.slow
def test_help_ends_with_an_example() -> None:
    for arguments in (("--help",), ("serve", "--help")):
        said = run(*arguments)
        assert said.returncode == 0
        assert "Example: retrofill serve --data" in said.stdout.strip().splitlines()[-1]
    assert run("--version").stdout.startswith("retrofill ")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "shop",
        "shop:key",
        "shop:key:secret:more",
        "a b:key:secret",
        "shop::secret",
        "shop:k y:s",
        "x" * 65 + ":k:s",
    ],
)
def test_a_project_that_cannot_be_is_told_without_its_keys(text: str) -> None:
    with pytest.raises(InputError, match="NAME:API_KEY:SECRET_KEY") as told:
        projects_of([text])
    assert "secret" not in str(told.value)
    assert ":key" not in str(told.value)


def test_projects_are_read_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "projects").write_text("# ours\n\nshop:key:secret\n  blog:yek:terces\n")
    expected = [("shop", "key", "secret"), ("blog", "yek", "terces"), ("x", "y", "z")]
    assert projects_of([f"@{tmp_path}/projects", "x:y:z"]) == expected
    with pytest.raises(InputError, match="cannot be read"):
        projects_of([f"@{tmp_path}/none"])
