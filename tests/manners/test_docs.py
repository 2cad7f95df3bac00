"""What the code offers is in the documents: each number, endpoint, error, command and option.

And the other way where it matters: each command that the README shows exists.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import typer
from tests.manners.house import ROOT, document, documents, strings, tracked
from typer.core import TyperGroup

from retrofill import errors, limits
from retrofill.backfill import compiled, mapping_file
from retrofill.backfill.deadletter import Letter
from retrofill.backfill.profile import PROFILES as DESTINATIONS
from retrofill.backfill.profile import describe
from retrofill.core import mapping
from retrofill.limits import PROFILES, Limits
from retrofill.rehearse.outcome import Outcome
from retrofill.server import metrics

# A path as a sender or reader writes it. `/` alone is the oldest SDKs' endpoint.
PATH = re.compile(r"/[a-z0-9_.{}/:-]*")
# A row of a table in docs/limits.md: | `name` | value | value | …
ROW = re.compile(r"^\| `(\w+)` \|(.*)\|$", re.MULTILINE)


def _written(value: object) -> str:
    """Say a value as docs/limits.md writes it: 1,048,576, on, `contract`."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, int | float):
        return f"{value:,}"
    return f"`{value}`"


def _rows() -> dict[str, list[str]]:
    found = ROW.findall(document("docs/limits.md"))
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in found}


@pytest.mark.parametrize("field", Limits.__struct_fields__)
def test_each_limit_of_a_project_is_documented_with_its_value_in_each_profile(field: str) -> None:
    expected = [_written(getattr(profile, field)) for profile in PROFILES.values()]
    row = " | ".join([f"| `{field}`", *expected, "…"])
    assert _rows().get(field, [])[: len(expected)] == expected, f"docs/limits.md needs: {row}"


CONSTANTS = {
    name: value
    for name, value in vars(limits).items()
    if name.isupper() and isinstance(value, int | float | str)
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_each_bound_of_the_server_is_documented_with_its_value(name: str) -> None:
    expected = _written(CONSTANTS[name])
    assert _rows().get(name, [""])[0] == expected, (
        f"docs/limits.md needs: | `{name}` | {expected} |"
    )


def test_no_documented_limit_is_gone_from_the_code() -> None:
    assert _rows().keys() <= {*CONSTANTS, *Limits.__struct_fields__}


def test_each_profile_is_documented() -> None:
    header = next(line for line in document("docs/limits.md").splitlines() if "`amplitude`" in line)
    assert all(f"`{profile}`" in header for profile in PROFILES)
    assert msgspec.structs.asdict(PROFILES["amplitude"]) == msgspec.structs.asdict(Limits())


def _paths() -> set[str]:
    return {
        text for text in strings("server") if PATH.fullmatch(text) and not text.startswith("//")
    }


def test_each_endpoint_is_documented() -> None:
    text = document("docs/api.md")
    plain = re.sub(r"\{[^}]*\}", "{}", text)
    missing = [
        path for path in sorted(_paths()) if f"{re.sub(r'{[^}]*}', '{}', path)}" not in plain
    ]
    assert not missing


def test_each_error_is_documented() -> None:
    text = documents()
    classes = [name for name, one in vars(errors).items() if inspect.isclass(one)]
    assert [name for name in classes if f"`{name}`" not in text] == []


def _commands() -> Iterator[tuple[str, Any]]:
    from retrofill.cli.main import app  # noqa: PLC0415  # only these tests need the command line

    root = typer.main.get_command(app)
    assert isinstance(root, TyperGroup)
    yield from root.commands.items()


def _sections() -> dict[str, str]:
    """Return each verb's part of docs/cli.md."""
    parts = re.split(r"^## ", document("docs/cli.md"), flags=re.MULTILINE)
    return {found[1]: part for part in parts if (found := re.match(r"`retrofill ([a-z-]+)", part))}


def test_each_metric_is_documented() -> None:
    found = metrics.Metrics()
    found.engine = lambda: dict.fromkeys([*metrics.COUNTERS, *metrics.GAUGES], 0.0)
    shown = document("docs/api.md")
    for metric in found.collect():
        total = "_total" if metric.type == "counter" else ""
        assert f"`{metric.name}{total}`" in shown, metric.name


def test_each_command_and_option_is_documented_with_an_example() -> None:
    sections = _sections()
    commands = dict(_commands())
    assert list(sections) == list(commands)
    missing = []
    for name, command in commands.items():
        text = sections[name]
        if f"\n$ retrofill {name} " not in text:
            missing.append(f"{name}: an example with its output")
        missing += [
            f"{name} {option}"
            for parameter in command.params
            for option in (*parameter.opts, *parameter.secondary_opts)
            if option.startswith("--") and not re.search(rf"`{option}[ `]", text)
        ]
    assert not missing


def test_no_documented_option_is_gone_from_the_code() -> None:
    for name, command in _commands():
        known = {
            option
            for parameter in command.params
            for option in (*parameter.opts, *parameter.secondary_opts)
        }
        cells = re.findall(r"^\| (`-[^|]*)\|", _sections()[name], re.MULTILINE)
        shown = {option for cell in cells for option in re.findall(r"`(--?[a-z-]+)", cell)}
        assert shown <= known, name


def test_each_part_of_a_mapping_is_documented() -> None:
    text = document("docs/mapping.md")
    functions = [re.findall(r"MACRO (\w+\(.*?\)) AS", macro)[0] for macro in compiled.MACROS]
    named = [
        *mapping.TARGETS,
        *mapping.FORMATS,
        *mapping_file.presets(),
        *Letter.__struct_fields__,
        *(one for one in functions if not one.startswith("_")),
    ]
    assert [name for name in named if f"`{name}`" not in text] == []


def test_each_figure_of_a_rehearsal_is_documented() -> None:
    text = document("docs/rehearse.md")
    assert [name for name in Outcome.__struct_fields__ if f"`{name}`" not in text] == []


def test_each_number_of_a_destination_is_documented() -> None:
    rows = ROW.findall(document("docs/backfill.md"))
    profiles = [{**describe(one), "connections": one.connections} for one in DESTINATIONS.values()]
    expected = {
        name: [_written(one[name]) for one in profiles] for name in profiles[0] if name != "profile"
    }
    assert {
        name: [cell.strip() for cell in cells.split("|")][:3] for name, cells in rows
    } == expected


def test_each_example_at_the_end_of_a_help_can_be_typed() -> None:
    for name, command in _commands():
        assert command.epilog is not None, name
        program, verb, *words = command.epilog.removeprefix("Example: ").split()
        known = {option for parameter in command.params for option in parameter.opts}
        assert (program, verb) == ("retrofill", name)
        assert {word for word in words if word.startswith("--")} <= known, name


def test_each_command_of_the_readme_exists() -> None:
    commands = dict(_commands())
    targets = set(re.findall(r"^([a-z-]+):", document("Makefile"), re.MULTILINE))
    shown = re.findall(
        r"^(?:\$ )?((?:make|(?:\.venv/bin/)?retrofill) .+)$", document("README.md"), re.MULTILINE
    )
    assert shown
    for line in shown:
        program, verb, *rest = line.split()
        if program == "make":
            assert verb in targets, line
            continue
        known = {option for one in commands[verb].params for option in one.opts}
        assert {word for word in rest if word.startswith("--")} <= known, line


def test_each_block_of_code_is_closed() -> None:
    for path in (path for path in tracked() if path.suffix == ".md"):
        text = path.read_text(encoding="utf-8")
        assert len(re.findall(r"^```", text, re.MULTILINE)) % 2 == 0, path


def test_each_decision_answers_the_same_questions() -> None:
    decisions = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    assert decisions
    for number, path in enumerate(decisions, start=1):
        text = path.read_text(encoding="utf-8")
        assert path.name.startswith(f"{number:04d}-"), path.name
        for heading in ("Question", "Choice", "Why", "Cost", "Source"):
            assert f"**{heading}.**" in text, f"{path.name} lacks {heading}"


def test_each_link_between_documents_leads_somewhere() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}: {link}"
        for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
        for link in re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8"))
        if "://" not in link and not (path.parent / link).exists()
    ]
    assert not wrong
