"""What a page is drawn with: tables, and charts as static SVG that stand inside it and load nothing."""

from __future__ import annotations

import html
import re
import sys
from collections import Counter
from collections.abc import Sequence
from datetime import date, timedelta
from typing import Any

from pygal.style import Style

# pygal puts a finder for its plugins before every later import of the process, in a form that Python has given up. We
# use no plugins.
sys.meta_path[:] = [one for one in sys.meta_path if type(one).__module__ != "pygal"]

BARS_MAX = 120  # days beyond this are drawn as weeks or months

_STYLE = Style(
    background="transparent",
    plot_background="transparent",
    foreground="#39424e",
    foreground_strong="#1d242c",
    foreground_subtle="#8b95a1",
    colors=("#2f6fab", "#d9822b", "#3d9a5f", "#b3413a", "#7b5ea7"),
    font_family="system-ui, sans-serif",
    label_font_size=11,
    major_label_font_size=11,
    legend_font_size=12,
    opacity=0.9,
)


def table(rows: Sequence[tuple[object, ...]], head: Sequence[str] = ()) -> str:
    """Return a table; numbers stand to the right."""

    def cell(tag: str, value: object) -> str:
        number = isinstance(value, int) and not isinstance(value, bool)
        text = f"{value:,}" if number else html.escape("–" if value is None else str(value))
        return f"<{tag}{' class=n' if number else ''}>{text}</{tag}>"

    lines = []
    if head:
        lines.append("<tr>" + "".join(f"<th>{html.escape(one)}</th>" for one in head) + "</tr>")
    lines += ["<tr>" + "".join(cell("td", value) for value in row) + "</tr>" for row in rows]
    return f"<table>{''.join(lines)}</table>"


def figure(chart: Any) -> str:
    """Return a chart as it stands in the page."""
    svg = chart.render(is_unicode=True)
    # The scripts would show tooltips; a page that runs nothing needs none.
    svg = re.sub(r"<script.*?</script>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    return f"<figure>{svg}</figure>"


def options(**more: object) -> dict[str, object]:
    """Return what every chart is made with."""
    # Without `js` pygal would name a script on a server of its own.
    return {"style": _STYLE, "js": [], "height": 320, "width": 960, "show_legend": False, **more}


def grouped(days: dict[str, int]) -> tuple[list[str], list[int]]:
    """Days with their gaps filled, or weeks or months if there are too many to draw. Returns names and sums."""
    first, last = (date.fromisoformat(day) for day in (min(days), max(days)))
    length = (last - first).days + 1
    if length > BARS_MAX * 7:
        sums: Counter[str] = Counter()
        for day, count in days.items():
            sums[day[:7]] += count
        return sorted(sums), [sums[name] for name in sorted(sums)]
    step = 1 if length <= BARS_MAX else 7
    totals = [0] * -(-length // step)
    for day, count in days.items():
        totals[(date.fromisoformat(day) - first).days // step] += count
    names = [(first + timedelta(days=at * step)).isoformat() for at in range(len(totals))]
    return names, totals
