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
from tests.manners.house import ROOT, document, documents, strings
from typer.core import TyperGroup

from retrofill import errors, limits
from retrofill.limits import PROFILES, Limits

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


def test_each_command_and_option_is_documented() -> None:
    text = document("docs/cli.md")
    missing = []
    for name, command in _commands():
        if f"`retrofill {name}" not in text:
            missing.append(name)
        missing += [
            f"{name} {option}"
            for parameter in command.params
            for option in (*parameter.opts, *parameter.secondary_opts)
            if option.startswith("--") and f"`{option}" not in text
        ]
    assert not missing


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
