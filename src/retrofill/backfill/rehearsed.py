"""The part of the report about a rehearsal, out of what `retrofill rehearse` and `verify` leave in the work directory."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pygal

from retrofill.backfill.drawing import figure, grouped, options, table
from retrofill.backfill.status import duration, moment

FILE = "rehearsal.json"
VERDICT = "rehearsal-verdict.json"
_NAMES = 20  # properties that are drawn

Json = dict[str, Any]


def section(work: Path) -> str:
    """Return the section, nothing if nothing was rehearsed."""
    made = _read(work / FILE)
    if not isinstance(made, dict):
        return ""
    try:
        return "".join(_parts(made, _read(work / VERDICT)))
    except (KeyError, TypeError, ValueError, AttributeError):
        return f"<h2>Rehearsal</h2><p>{FILE} is not of this version: rehearse again.</p>"


def _parts(made: Json, verdict: Any) -> Iterator[str]:
    yield f"<h2>Rehearsal</h2><p>{html.escape(_sentence(made))}</p>"
    yield from _warnings(made)
    yield _figures(made)
    yield _by_day("New users by day, before and after", made["new_users"])
    yield _by_day("Active users by day, before and after", made["active_users"])
    yield _first_seen(made["first_seen"])
    yield _properties(made)
    yield from _lists(made)
    yield _verdict(verdict)


def _read(path: Path) -> Any:
    try:
        return msgspec.json.decode(path.read_bytes())
    except (OSError, msgspec.DecodeError):
        return None


def _sentence(made: Json) -> str:
    at = f", as of block {made['block']:,} at {moment(made['at_ms'])}" if made["block"] else ""
    kind = "exact" if made["exact"] else "an estimate"
    return f"Against {made['against']}{at}: {kind}. Nothing was sent for it."


def _warnings(made: Json) -> Iterator[str]:
    said = list(made["warnings"])
    if made["sample"] < 1:
        said.append(f"All figures are of a sample: {made['sample']:.3g} of the people.")
    said += [f"Not known: {one}" for one in made["unknown"]]
    if said:
        yield f"<ul>{''.join(f'<li>{html.escape(one)}</li>' for one in said)}</ul>"


def _figures(made: Json) -> str:
    volume, seen = made["volume"], made["first_seen"]
    sides = [
        (name, made[side]["people"] if made[side] else None)
        for name, side in (("synced", "synced"), ("skipped", "skipped"))
    ]
    return table(
        [
            ("events the destination takes", volume["events"]),
            ("of them stored", volume["stored"]),
            ("there already", made["duplicates"]),
            ("events that count there", volume["billed"]),
            ("refused by the destination", sum(made["refused"].values())),
            ("refused before sending", sum(made["refused_before"].values())),
            ("new people", made["new_people"]),
            ("people merged", made["merged"]),
            ("probably counted twice", made["doubled"]),
            ("devices shared by many", made["shared_devices"]),
            ("users who join too many", made.get("held_users", 0)),
            ("live people first seen at another time", seen["moved"]),
            *((f"live people whose properties change, {name}", count) for name, count in sides),
            ("ids that have to wait", made["throttled"]),
            ("days of quota", made["quota_days"]),
            ("time at the destination's limits", duration(made["duration_s"])),
        ]
    )


def _by_day(title: str, days: Json) -> str:
    every = dict.fromkeys(sorted({*days["before"], *days["after"]}), 0)
    if not every:
        return ""
    chart = pygal.Bar(
        **options(
            show_legend=True,
            x_label_rotation=45,
            show_minor_x_labels=False,
            x_labels_major_count=12,
        )
    )
    labels: list[str] = []
    for name in ("before", "after"):
        labels, values = grouped({**every, **days[name]})
        chart.add(name, values)
    chart.x_labels = labels
    summed = "" if set(every) <= set(labels) else "<p>Each bar is the sum of its days.</p>"
    return f"<h3>{title}</h3>{summed}{figure(chart)}"


def _first_seen(seen: Json) -> str:
    if not seen["moved"]:
        return ""
    chart = pygal.Bar(**options(height=220))
    chart.x_labels = list(seen["spread"])
    chart.add("people", list(seen["spread"].values()))
    rows = [
        (one["user_id"], moment(one["before_ms"]), moment(one["after_ms"]))
        for one in seen["listed"][:_NAMES]
    ]
    return (
        f"<h3>First seen at another time: how far</h3>{figure(chart)}"
        f"{table(rows, ('user', 'before', 'after'))}"
    )


def _properties(made: Json) -> str:
    sides: dict[str, Mapping[str, int]] = {
        side: made[side]["names"] for side in ("synced", "skipped") if made[side]
    }
    first = next(iter(sides.values()), {})
    every = {name for names in sides.values() for name in names}
    names = sorted(every, key=lambda one: (-first.get(one, 0), one))[:_NAMES]
    if not names:
        return ""
    chart = pygal.HorizontalBar(**options(show_legend=True, height=100 + 32 * len(names)))
    chart.x_labels = [name[:60] for name in reversed(names)]
    for label, side in sides.items():
        chart.add(label, [side.get(name, 0) for name in reversed(names)])
    own = made["skipped" if made["skip_user_properties_sync"] else "synced"] or {"listed": []}
    rows = [(one["name"], one["old"], one["new"], one["people"]) for one in own["listed"]]
    return (
        f"<h3>Properties of live people that change</h3>{figure(chart)}"
        f"{table(rows[:_NAMES], ('property', 'from', 'to', 'people'))}"
    )


def _lists(made: Json) -> Iterator[str]:
    merges = [(one["user_id"], "live" if one["was_live"] else "new") for one in made["merges"]]
    doubles = [(one["evidence"], one["value"], ", ".join(one["ids"])) for one in made["doubles"]]
    shared = [(one["device_id"], one["users"], one["before"]) for one in made["shared"]]
    held = [(one["user_id"], one["devices"]) for one in made.get("held", [])]
    waiting = [(one["kind"], one["id"], one["why"]) for one in made["waiting"]]
    lists: Sequence[tuple[str, Sequence[str], Sequence[tuple[object, ...]]]] = (
        ("People merged", ("into the user", "who was"), merges),
        ("Probably counted twice", ("evidence", "", "ids"), doubles),
        ("Devices shared by many", ("device", "users", "before"), shared),
        ("Users who join too many", ("user", "devices that stay apart"), held),
        ("Refused by the destination", ("reason", "events"), list(made["refused"].items())),
        ("Ids that have to wait", ("", "id", "for"), waiting),
    )
    for title, head, rows in lists:
        if rows:
            yield f"<h3>{title}</h3>{table(rows[:_NAMES], head)}"


def _verdict(found: Any) -> str:
    if not isinstance(found, list):
        return ""
    rows = [
        (one["name"], _said(one["predicted"]), _said(one["found"]), "yes" if one["same"] else "no")
        for one in found
    ]
    return f"<h3>How the rehearsal did</h3>{table(rows, ('', 'predicted', 'found', 'the same'))}"


def _said(value: Any) -> object:
    return f"{sum(value.values()):,} in {len(value):,}" if isinstance(value, dict) else value
