"""Imports go down the floors, never sideways between packages, never in a circle; each dependency has one home."""

from __future__ import annotations

import re
import sys
import tomllib
from graphlib import CycleError, TopologicalSorter

from tests.manners.house import FLOORS, PACKAGE, ROOT, imports, inside, modules, room

# A dependency is imported in one package. These are needed in more, each for a reason.
SHARED = {
    "msgspec": "values, JSON and blocks are its types: the language that all floors speak",
    "numpy": "columns of a block and fingerprints travel between floors as its arrays",
    "pyarrow": "rows travel from the lake and the unsealed blocks to the readers as its tables",
    "duckdb": "the lake writes with it, the engine asks it over lake and unsealed rows, a rehearsal reads exports",
    "xxhash": "checksums of blocks, fingerprints of keys",
    "isal": "gzip of requests and exports on one side, of sources on the other: two packages that never meet",
    "httptools": "the server bounds what uvicorn leaves open, the client reads answers: never met either",
    "uvloop": "server, client and rehearsal each run a loop of their own",
    "rich": "progress and tables of the command line; the demo's too",
    "structlog": "the engine logs a line a batch, the server and the command line set it up",
    "prometheus_client": "the engine counts, the server publishes",
}


def test_every_module_has_a_floor() -> None:
    assert {room(name) for name in modules()} - {""} <= FLOORS.keys()


def test_imports_go_down_only() -> None:
    wrong = [
        one.where
        for one in inside()
        if room(one.module)
        and room(one.target)
        and room(one.module) != room(one.target)
        and not _below(room(one.target), room(one.module))
    ]
    assert not wrong, "\n".join(wrong)


def _below(target: str, module: str) -> bool:
    # The five single modules of the ground floor may use each other; packages of one floor may not.
    return FLOORS[target] < FLOORS[module] or FLOORS[target] == FLOORS[module] == 0


def test_nothing_is_imported_in_a_circle() -> None:
    graph: dict[str, set[str]] = {name: set() for name in modules()}
    for one in inside():
        # A package's __init__ names what is public; a module may import its sibling through it.
        if one.target != one.module and not one.module.startswith(f"{one.target}."):
            graph[one.module].add(one.target)
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as circle:
        raise AssertionError(" → ".join(circle.args[1])) from None


def test_the_core_only_computes() -> None:
    forbidden = {
        *("asyncio", "io", "logging", "multiprocessing", "os", "pathlib", "random", "secrets"),
        *("shutil", "socket", "sqlite3", "subprocess", "tempfile", "threading", "time"),
    }
    wrong = [
        one.where
        for one in imports()
        if room(one.module) == "core" and one.target.split(".")[0] in forbidden
    ]
    assert not wrong, "\n".join(wrong)


def test_each_dependency_has_one_home() -> None:
    homes: dict[str, set[str]] = {}
    for one in imports():
        name = one.target.split(".")[0]
        if name != PACKAGE and name not in sys.stdlib_module_names:
            homes.setdefault(name, set()).add(room(one.module))
    wrong = {name: sorted(at) for name, at in homes.items() if len(at) > 1 and name not in SHARED}
    assert not wrong


def test_each_import_is_a_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {_module(line) for line in project["dependencies"]}
    used = {one.target.split(".")[0] for one in imports()} - sys.stdlib_module_names - {PACKAGE}
    assert used <= declared, f"declare in pyproject.toml: {sorted(used - declared)}"


def _name(requirement: str) -> str:
    return re.split(r"[\[<>=~! ]", requirement, maxsplit=1)[0]


def _module(requirement: str) -> str:
    name = _name(requirement)
    return {"PyYAML": "yaml"}.get(name, name.replace("-", "_"))


def test_each_dependency_is_said_to_save_something() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    missing = [line for line in project["dependencies"] if _name(line) not in text]
    assert not missing
