"""Settings of one server: what the command line and the environment decide, checked once."""

from __future__ import annotations

from pathlib import Path

from msgspec import Struct


class Settings(Struct, frozen=True, kw_only=True):
    """How one server runs. data: its directory, made if missing. geoip: a MaxMind city database file, or None."""

    data: Path
    host: str = "127.0.0.1"
    port: int = 8090
    limits: str = "amplitude"
    geoip: Path | None = None


class Project(Struct, frozen=True):
    """One project: its number (`app` in rows), its name and its two keys. `limits` names or holds its limits."""

    number: int
    name: str
    api_key: str
    secret_key: str
