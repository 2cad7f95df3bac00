"""The house as data: its modules, their floors and imports, its files and documents.

Everything is read with `ast` or as text, so that the tests see what is written, whether or not it runs.
"""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
SRC = ROOT / "src"
PACKAGE = "retrofill"

# Source: ARCHITECTURE.md, "Floors".
FLOORS = {
    "errors": 0,
    "glibc": 0,
    "limits": 0,
    "clock": 0,
    "config": 0,
    "core": 1,
    "hot": 2,
    "lake": 2,
    "queue": 2,
    "engine": 3,
    "server": 4,
    "console": 4,
    "backfill": 4,
    "rehearse": 5,
    "cli": 6,
    "__main__": 7,
}


@dataclass(frozen=True, slots=True)
class Import:
    """One import statement's target, as a full dotted name, and the line it stands on."""

    module: str
    target: str
    line: int

    @property
    def where(self) -> str:
        """Where the import stands, for a failure's message."""
        return f"{self.module} line {self.line} imports {self.target}"


def rooms(name: str) -> list[str]:
    """Return the dotted name's parts below the package: `retrofill.core.event` gives core, event."""
    return name.split(".")[1:]


def room(name: str) -> str:
    """Return the package (or top module) a module belongs to; `` for the root itself."""
    return (rooms(name) or [""])[0]


@cache
def modules() -> dict[str, Path]:
    """Return every module of the source by its dotted name."""
    found = {}
    for path in sorted((SRC / PACKAGE).rglob("*.py")):
        parts = path.relative_to(SRC).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree(path: Path) -> ast.Module:
    """Return the parsed file."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@cache
def imports() -> tuple[Import, ...]:
    """Return every import of every module, those inside functions too."""
    return tuple(one for name, path in modules().items() for one in _imports(name, path))


def _imports(name: str, path: Path) -> Iterator[Import]:
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(name, alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                kept = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*kept, base] if base else kept)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield Import(name, full if full in modules() else base, node.lineno)


def inside() -> list[Import]:
    """Return the imports of our own modules."""
    return [one for one in imports() if one.target.split(".")[0] == PACKAGE]


def strings(package: str) -> Iterator[str]:
    """Yield every text constant in a package's code, docstrings left out."""
    for name, path in modules().items():
        if room(name) == package:
            yield from _strings(tree(path))


def _strings(parsed: ast.Module) -> Iterator[str]:
    prose = {
        id(node.value)
        for node in ast.walk(parsed)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(parsed):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.value


def document(name: str) -> str:
    """Return a document's text."""
    return (ROOT / name).read_text(encoding="utf-8")


def documents() -> str:
    """Return the text of everything in docs/."""
    return "\n".join(
        path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").rglob("*.md"))
    )


def tracked() -> list[Path]:
    """Return every file of the project: as git lists them, or all outside hidden and made folders."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False, text=True
    )
    if listed.returncode == 0:
        names = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:
        made = {".venv", "node_modules", ".git"}
        names = [path for path in ROOT.rglob("*") if not made & set(path.relative_to(ROOT).parts)]
    return [path for path in names if path.is_file() and not path.is_symlink()]
