"""Where a history goes and what may be asked of it there.

A destination is named `amplitude`, `amplitude-eu` or by its URL. Its profile holds its limits: of Amplitude's texts the
strictest numbers that satisfy every page (contract, ingest 3b, "backfill client self-limit"), or those of our own server,
which is asked for them. Every number can be given on the command line.
"""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from urllib.parse import urlsplit, urlunsplit

import msgspec
from msgspec import Struct

from retrofill.backfill.keys import Keys
from retrofill.core.schedule import Rates
from retrofill.errors import InputError

DAY_S = 86_400.0
HEALTH_S = 30.0  # ours: how long /healthz is waited for; who gives up too early takes our server for another
COUNT_S = 60.0  # ours: how long rows may take to be counted
SAID_BYTES_MAX = 1024 * 1024  # ours: silenced devices are listed as well


class Profile(Struct, frozen=True, kw_only=True):
    """What a destination takes.

    body_bytes: largest request. memory_days: for how long it knows an insert_id again, 0 = for ever. connections: how
    many requests are under way at most. by_event_time: whether properties go by event time there, so that old values
    change no newer ones.
    """

    name: str
    rates: Rates
    body_bytes: int = 20 * 1024 * 1024  # contract, ingest 3a
    memory_days: int = 7  # contract, events 6
    connections: int = 64
    by_event_time: bool = False


# Source: contract, ingest 3b. 10 events a request: what the backfill guide recommends.
_AMPLITUDE = Rates(
    events_per_s=1000,
    requests_per_s=100,
    device_per_s=300,
    user_per_s=1000,
    events_per_request=10,
    quota_per_day=500_000,
    updates_per_h=1800,
)
PROFILES = {
    "amplitude": Profile(name="amplitude", rates=_AMPLITUDE, connections=128),
    # No hard limit over all on Enterprise plans: contract, ingest 3b.
    "amplitude-enterprise": Profile(
        name="amplitude-enterprise",
        rates=msgspec.structs.replace(
            _AMPLITUDE, events_per_s=0, requests_per_s=0, events_per_request=1000
        ),
        connections=32,
    ),
    "retrofill": Profile(
        name="retrofill",
        rates=Rates(events_per_request=1000),
        memory_days=0,
        connections=16,
    ),
}

_NAMED = {
    "amplitude": ("https://api2.amplitude.com/batch", "https://amplitude.com"),
    "amplitude-eu": ("https://api.eu.amplitude.com/batch", "https://analytics.eu.amplitude.com"),
}


class Target(Struct, frozen=True):
    """Where to send and where to read back. name: as the user said it."""

    name: str
    ingest: str
    read: str

    @property
    def ours(self) -> bool:
        """Whether it is named by its URL, so that it may be our own server."""
        return self.name not in _NAMED


def target(name: str) -> Target:
    """Say where `--to` points. A URL may name the ingest path; without one it is `/batch`. Raises InputError."""
    if name in _NAMED:
        return Target(name, *_NAMED[name])
    parts = urlsplit(name)
    if parts.scheme not in {"http", "https"} or not parts.netloc:
        raise InputError(
            f"{name!r} is no destination",
            mend="Give --to amplitude, --to amplitude-eu or a URL such as http://localhost:8090",
        )
    path = parts.path.rstrip("/")
    known = next((end for end in ("/batch", "/2/httpapi") if path.endswith(end)), "")
    base = path.removesuffix(known)
    root = urlunsplit((parts.scheme, parts.netloc, base, "", ""))
    return Target(name, root + (known or "/batch"), root)


def names_retrofill(root: str) -> bool:
    """Ask a server's /healthz whether it is ours. False also when it cannot be asked."""
    return b"retrofill" in (health(root) or b"").lower()


def health(root: str) -> bytes | None:
    """Return what a server says at /healthz, whatever its status; None when it cannot be asked."""
    try:
        with urllib.request.urlopen(f"{root}/healthz", timeout=HEALTH_S) as answer:  # noqa: S310 - http or https: `target` checked it
            said: bytes = answer.read(4096)
            return said
    except urllib.error.HTTPError as problem:
        with problem:
            return problem.read(4096)
    except (OSError, ValueError, http.client.HTTPException):
        return None


def holds_nothing_live(where: Target, api_key: str, secret_key: str) -> bool:
    """Whether reading proves that our own server holds nothing in this project but what imports brought.

    Only our server can say so: charts and exports do not show identify calls, which change user properties as well.
    False whenever it cannot be known.
    """
    said = _told(where, "/api/1/project/rows", api_key, secret_key)
    try:
        return said is not None and msgspec.json.decode(said, type=_Rows).live == 0
    except msgspec.DecodeError:
        return False


def sync_is_safe(where: Target, profile: Profile, api_key: str, secret_key: str) -> bool:
    """Whether old values surely do no harm there: properties go by event time, or nothing is live yet."""
    return profile.by_event_time or holds_nothing_live(where, api_key, secret_key)


def _told(where: Target, path: str, api_key: str, secret_key: str) -> bytes | None:
    """What our own server answers of this project; None whenever it cannot be known."""
    if not (api_key and secret_key and where.ours and names_retrofill(where.read)):
        return None
    request = urllib.request.Request(f"{where.read}{path}")  # noqa: S310 - http or https: `target` checked it
    Keys(api_key, secret_key).sign(request)
    try:
        with urllib.request.urlopen(request, timeout=COUNT_S) as answer:  # noqa: S310 - the same
            said: bytes = answer.read(SAID_BYTES_MAX)
            return said
    except (OSError, http.client.HTTPException, ValueError):
        return None


class _Rows(Struct, frozen=True):
    """What /api/1/project/rows answers."""

    live: int


class _Limits(Struct, frozen=True):
    """What of a project's limits a run keeps by itself, so that it hardly ever has to be told."""

    batch_eps: int
    httpapi_eps: int
    project_eps: int
    project_requests_per_s: int
    daily_quota: int
    property_updates_per_h: int


class _Settings(Struct, frozen=True):
    """What of a project's settings a run must know."""

    property_time: str = "arrival"


class _Project(Struct, frozen=True):
    """What /api/1/project answers. settings: `property_time` among them; a server without it knows arrival only."""

    limits: _Limits
    settings: _Settings


def _own(where: Target, api_key: str, secret_key: str) -> Profile:
    """The profile of our own server, with the limits that its project has there.

    Rates could be learned from its answers, but then the plan would not know them. Others come too late by an answer:
    beyond the hourly property updates it answers 200 and leaves the user's table as it is; a quota rests for hours.
    """
    said = _told(where, "/api/1/project", api_key, secret_key)
    profile = PROFILES["retrofill"]
    if said is None:
        return profile
    try:
        project = msgspec.json.decode(said, type=_Project)
    except msgspec.DecodeError:
        return profile
    limits, by_event_time = project.limits, project.settings.property_time == "event"
    per_id = limits.httpapi_eps if where.ingest.endswith("/2/httpapi") else limits.batch_eps
    rates = msgspec.structs.replace(
        profile.rates,
        events_per_s=limits.project_eps,
        requests_per_s=limits.project_requests_per_s,
        device_per_s=per_id,
        user_per_s=per_id,
        quota_per_day=limits.daily_quota,
        # Hours of event time are as full as the history makes them, however long anybody waits.
        updates_per_h=0 if by_event_time else limits.property_updates_per_h,
    )
    return msgspec.structs.replace(profile, rates=rates, by_event_time=by_event_time)


def choose(where: Target, name: str | None, api_key: str = "", secret_key: str = "") -> Profile:
    """Return the profile of a name, or the one that fits the destination. Raises InputError.

    With both keys our own server is asked for its limits.
    """
    if name is None:
        ours = where.ours and names_retrofill(where.read)
        name = "retrofill" if ours else "amplitude"
    if name not in PROFILES:
        raise InputError(
            f"There is no profile {name!r}", mend=f"Give --profile {', '.join(PROFILES)}"
        )
    return PROFILES[name] if name != "retrofill" else _own(where, api_key, secret_key)


def adjust(
    profile: Profile,
    *,
    events_per_s: int | None = None,
    requests_per_s: int | None = None,
    device_per_s: int | None = None,
    user_per_s: int | None = None,
    events_per_request: int | None = None,
    quota_per_day: int | None = None,
    updates_per_h: int | None = None,
    updates: bool = False,
) -> Profile:
    """Return the profile with the numbers that were given. updates: whether events can be property updates."""
    given = {
        "events_per_s": events_per_s,
        "requests_per_s": requests_per_s,
        "device_per_s": device_per_s,
        "user_per_s": user_per_s,
        "events_per_request": events_per_request,
        "quota_per_day": quota_per_day,
        "updates_per_h": updates_per_h,
    }
    wrong = [name for name, value in given.items() if value is not None and value < 0]
    if wrong or events_per_request == 0 or (events_per_request or 0) > 2000:
        raise InputError(
            "A limit is out of range",
            where=", ".join(
                f"--{name.replace('_', '-')}" for name in wrong or ["events_per_request"]
            ),
            mend="Rates and quotas are 0 (none) or more, events a request 1 to 2000",
        )
    rates = msgspec.structs.replace(
        profile.rates, **{name: value for name, value in given.items() if value is not None}
    )
    if not updates:
        rates = msgspec.structs.replace(rates, updates_per_h=0)
    return msgspec.structs.replace(
        profile, rates=rates, connections=connections(profile, rates.events_per_request)
    )


def connections(profile: Profile, events_per_request: int) -> int:
    """How many requests may be under way: more of small ones, so that a long way does not slow them."""
    return (
        max(profile.connections, 64) if events_per_request <= 100 else min(profile.connections, 32)
    )


def describe(profile: Profile) -> dict[str, object]:
    """Return the profile's numbers, for the plan and the report."""
    return {
        "profile": profile.name,
        "body_bytes": profile.body_bytes,
        "memory_days": profile.memory_days,
        **json.loads(msgspec.json.encode(profile.rates)),
    }
