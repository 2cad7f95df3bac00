"""One HTML page about a work directory: what was planned, what happened, what was read back. It loads nothing.

Charts are static SVG drawn by pygal and stand inside the page; so do the styles. The page is made from the stage, the
journal and, where there were any, the last rehearsal and verification; it may be made while a run goes on.
"""

from __future__ import annotations

import html
from datetime import date, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pygal

from retrofill.backfill import rehearsed, seam
from retrofill.backfill.drawing import figure, grouped, options, table
from retrofill.backfill.drive import staged
from retrofill.backfill.journal import Ledger
from retrofill.backfill.manifest import Manifest
from retrofill.backfill.plan import plan
from retrofill.backfill.profile import Profile
from retrofill.backfill.status import duration, moment, status

POINTS_MAX = 240
SQUARES_MAX = 3700  # ten years of the calendar
VERIFIED = "verify.json"
REHEARSED = rehearsed.FILE

_CSS = """
body{font:15px/1.5 system-ui,sans-serif;color:#1d242c;background:#fff;max-width:64rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem;margin:0}h2{font-size:1.15rem;margin:2.2rem 0 .4rem;border-top:1px solid #dde2e8;padding-top:1rem}
table{border-collapse:collapse;margin:.6rem 0}td,th{padding:.2rem .9rem .2rem 0;text-align:left;vertical-align:top}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}p.lead{color:#39424e;margin:.2rem 0 1rem}
.good{color:#2b7a48}.bad{color:#a8322b}figure{margin:0}figure svg{width:100%;height:auto;max-height:22rem}
.calendar{display:grid;grid-template-columns:repeat(auto-fill,minmax(.8rem,1fr));gap:2px;margin:.5rem 0}
.calendar i{height:.8rem;border-radius:2px;background:#e8ecf0}
.calendar i.h{background:#2f6fab}.calendar i.l{background:#d9822b}.calendar i.b{background:#7b5ea7}
"""


def write(work: Path, path: Path) -> None:
    """Write the report of a work directory. Raises InputError if nothing is staged there."""
    path.write_text(page(work), encoding="utf-8")


def page(work: Path) -> str:
    """Return the whole page."""
    found = staged(work)
    known = status(work)
    ledger = Ledger(work) if (work / "journal.db").exists() else None
    try:
        profile = _profile(ledger)
        sections = [
            _head(found, known),
            rehearsed.section(work),
            _plan_and_outcome(work, found, known, profile, ledger),
            _days(found),
            _types(found),
            _progress(ledger),
            _refused(found, known),
            _verified(work),
            _coverage(work, found),
        ]
    finally:
        if ledger is not None:
            ledger.close()
    title = html.escape(f"Import {found.import_id}")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_CSS}</style></head><body>'
        + "".join(sections)
        + "</body></html>\n"
    )


def _profile(ledger: Ledger | None) -> Profile | None:
    text = ledger.meta().get("limits") if ledger is not None else None
    return None if text is None else msgspec.json.decode(text, type=Profile)


def _head(found: Manifest, known: dict[str, Any]) -> str:
    state = known["state"]
    mark = "good" if state == "complete" else "bad" if state in {"unfinished", "unsure"} else ""
    to = html.escape(str(known.get("destination") or "no destination yet"))
    span = f"{_day(found.first_ms)} to {_day(found.last_ms)}"
    return (
        f"<h1>Import {html.escape(found.import_id)}</h1>"
        f'<p class="lead"><b class="{mark}">{state}</b> · {to} · {found.events:,} events of '
        f"{found.people:,} people, {span}</p>"
    )


def _day(ms: int | None) -> str:
    text = moment(ms)
    return text[:10] if text else "–"


def _plan_and_outcome(
    work: Path,
    found: Manifest,
    known: dict[str, Any],
    profile: Profile | None,
    ledger: Ledger | None,
) -> str:
    planned_s = least_s = requests = took = None
    if profile is not None:
        made = plan(found, profile, destination=str(known.get("destination")), stage=work / "stage")
        planned_s, least_s = duration(made.duration_s), duration(made.least_s)
        requests = made.requests
    if ledger is not None:
        totals = ledger.totals()
        if totals.first_ms is not None and totals.last_ms is not None:
            took = duration((totals.last_ms - totals.first_ms) / 1000)
    rows: list[tuple[object, ...]] = [
        ("events", found.events, known["taken"]),
        ("requests", requests, known.get("requests")),
        ("bytes of events", found.bytes, None),
        ("refused before sending", sum(found.refused.values()), None),
        ("refused by the destination", None, known.get("dead")),
        ("unsure", None, known.get("unsure")),
        ("waiting", None, known["left"]),
        ("time", planned_s, took),
        ("time that the destination's limits alone take", least_s, None),
    ]
    return "<h2>Plan and outcome</h2>" + table(rows, ("", "plan", "outcome"))


def _days(found: Manifest) -> str:
    if not found.days:
        return ""
    names, values = grouped(found.days)
    chart = pygal.Bar(
        **options(x_label_rotation=45, show_minor_x_labels=False, x_labels_major_count=12)
    )
    chart.x_labels = names
    chart.add("events", values)
    return f"<h2>Events by day</h2>{figure(chart)}"


def _types(found: Manifest) -> str:
    top = sorted(found.types.items(), key=lambda item: -item[1])[:20]
    return "<h2>Event types</h2>" + table(top, ("event type", "events"))


def _progress(ledger: Ledger | None) -> str:
    points = ledger.progress() if ledger is not None else []
    if len(points) < 2:
        return ""
    step = max(1, len(points) // POINTS_MAX)
    points = [*points[:-1:step], points[-1]]
    start = points[0][0]
    chart = pygal.XY(**options(show_legend=True, show_dots=False, fill=False, stroke=True))
    chart.x_title = "seconds since the start"
    chart.add("acknowledged", [((at - start) / 1000, taken) for at, taken, *_ in points])
    held = [((at - start) / 1000, held) for at, _, _, held, _ in points]
    parts = [f"<h2>Progress</h2>{figure(chart)}"]
    if any(count for _, count in held):
        throttled = pygal.XY(**options(show_dots=False, fill=True, height=200))
        throttled.add("throttled ids", held)
        parts.append(f"<h2>Throttled ids</h2>{figure(throttled)}")
    rates = [
        ((b[0] - start) / 1000, max(0.0, (b[1] - a[1]) * 1000 / (b[0] - a[0])))
        for a, b in pairwise(points)
        if b[0] > a[0]
    ]
    rate = pygal.XY(**options(show_dots=False, height=200))
    rate.add("events a second", rates)
    parts.append(f"<h2>Events a second</h2>{figure(rate)}")
    return "".join(parts)


def _refused(found: Manifest, known: dict[str, Any]) -> str:
    reasons = {f"before sending: {kind}": count for kind, count in found.refused.items()}
    reasons |= {f"destination: {kind}": n for kind, n in known.get("dead_reasons", {}).items()}
    if not reasons:
        return "<h2>Refused</h2><p>No row was refused.</p>"
    top = sorted(reasons.items(), key=lambda item: -item[1])[:20]
    chart = pygal.HorizontalBar(**options(height=80 + 26 * len(top)))
    chart.x_labels = [name[:60] for name, _ in reversed(top)]
    chart.add("rows", [count for _, count in reversed(top)])
    return f"<h2>Refused</h2>{figure(chart)}{table(top, ('reason', 'rows'))}"


def _verified(work: Path) -> str:
    path = work / VERIFIED
    if not path.exists():
        return "<h2>Verification</h2><p>Not verified yet: <code>retrofill verify</code>.</p>"
    facts = msgspec.json.decode(path.read_bytes())
    rows = [(name.replace("_", " "), value) for name, value in facts.items()]
    return "<h2>Verification</h2>" + table(rows)


def _coverage(work: Path, found: Manifest) -> str:
    """A square a day: history, live data, both. Live days are known after `--until live`."""
    if not found.days:
        return ""
    known = seam.read(work)
    live = {} if known is None else known.days
    first = date.fromisoformat(min([*found.days, *live]))
    last = date.fromisoformat(max([*found.days, *live]))
    days = (last - first).days + 1
    length = min(days, SQUARES_MAX)
    first += timedelta(days=days - length)  # the end is where the seam is
    of = f"the last {length:,} of {days:,} days; " if length < days else ""
    squares = []
    for at in range(length):
        day = (first + timedelta(days=at)).isoformat()
        sent, there = found.days.get(day, 0), live.get(day, 0)
        kind = "b" if sent and there else "h" if sent else "l" if there else ""
        title = f"{day}: {sent:,} of the history, {there:,} live"
        squares.append(f'<i class="{kind}" title="{title}"></i>')
    calendar = f'<div class="calendar">{"".join(squares)}</div>'
    if known is None:
        return f"<h2>Coverage</h2><p>{of}blue: history</p>{calendar}"
    left_out = found.left_out.get("until", 0)
    rows = [(name, moment(one.first_ms), one.events) for name, one in known.types.items()]
    return (
        f"<h2>Coverage</h2><p>{of}blue: history, orange: live, violet: both. "
        f"{left_out:,} rows of the source lie on the live side of their type's seam and were left out; "
        f"{known.imported:,} rows there are of imports and not live.</p>{calendar}"
        + table(rows, ("event type", "live from", "live events"))
    )
