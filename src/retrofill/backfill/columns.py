"""The columns of a source as a mapping's expressions name them.

Three styles of source lie behind one face. `json`: a row is a JSON object; a name is a key, and `context.app.version`
reaches into it. `cells`: a row of CSV; all cells are text, and a column whose first thousands of values all look like
numbers counts as numbers. `native`: Parquet, with the types of the file.

Each column that is used exists in up to three forms: `j0` is its JSON text as the source wrote it, which a field that
names nothing but the column sends on unchanged; `u0` is its plain text, from which a typed expression casts it, so that a
value which does not fit is an error in that row and not a silent null; `o0` is the same as DuckDB's JSON type.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from types import NoneType
from typing import Any, Final, Literal, TypeAlias

import msgspec

from retrofill.core.mapping import unquote
from retrofill.core.sql import literal, quoted
from retrofill.errors import InputError

Style: TypeAlias = Literal["json", "cells", "native"]
Path: TypeAlias = tuple[str, ...]

# Beside the columns of Parquet, which may have any name.
FILE: Final = "_retrofill_file"
LINE: Final = "_retrofill_line"
WHOLE: Final[Path] = (
    "source_row",
)  # the name under which an expression has all columns, as one JSON object
_DEPTH_SEEN = 5  # objects inside one another whose keys can be named with dots
_KINDS: Final[dict[type, str]] = {
    bool: "BOOLEAN",
    int: "BIGINT",
    float: "DOUBLE",
    str: "VARCHAR",
}
_PATHS_MAX = 5_000  # names kept of a sample; objects with made-up keys have too many
_INTEGER = re.compile(r"-?(0|[1-9]\d{0,17})")
_DECIMAL = re.compile(r"-?(0|[1-9]\d{0,14})(\.\d{1,15})?")
_INTEGER_SQL = literal(_INTEGER.pattern.replace(r"\d", "[0-9]"))
_DECIMAL_SQL = literal(_DECIMAL.pattern.replace(r"\d", "[0-9]"))


def json_types(rows: Iterable[str]) -> dict[Path, str]:
    """Return each key's DuckDB type as most JSON objects have it, with the keys of inner objects."""
    found = []
    for row in rows:
        try:
            found.append(msgspec.json.decode(row))
        except (msgspec.DecodeError, RecursionError):
            continue
    whole = [one for one in found if isinstance(one, dict)]
    seen: dict[Path, Counter[str]] = {}
    _see(whole, (), seen)
    for key, values in _by_key(whole, _PATHS_MAX).items():
        _see(told_objects(values), (key,), seen)
    return {path: _one_type(kinds) for path, kinds in seen.items()}


def text_types(name: str, values: Iterable[Any]) -> dict[Path, str]:
    """Return the types of what is inside of a column whose texts are JSON objects, as `json_types` does; else none."""
    seen: dict[Path, Counter[str]] = {}
    _see(told_objects(values), (name,), seen)
    return {path: _one_type(kinds) for path, kinds in seen.items()}


def told_objects(values: Iterable[Any]) -> list[dict[str, Any]]:
    """Return the objects that a column's texts hold, if all of them look like one."""
    texts = [value for value in values if value is not None]
    found = []
    for text in texts:
        if not isinstance(text, str) or not text.lstrip().startswith("{"):
            return []
        try:
            found.append(msgspec.json.decode(text))
        except (msgspec.DecodeError, RecursionError):
            continue
    return found


def _see(found: Sequence[dict[str, Any]], above: Path, seen: dict[Path, Counter[str]]) -> None:
    """Count the kinds of each key's values in some objects, and of those inside of them."""
    columns = _by_key(found, _PATHS_MAX - len(seen))
    for key, values in columns.items():
        kinds = seen[*above, key] = Counter()
        for kind, count in Counter(map(type, values)).items():
            if kind is not NoneType:
                kinds[_KINDS.get(kind, "JSON")] += count
    if len(above) + 1 < _DEPTH_SEEN:
        for key, values in columns.items():
            inner = [value for value in values if isinstance(value, dict)]
            if inner:
                _see(inner, (*above, key), seen)


def _by_key(found: Sequence[dict[str, Any]], keys_max: int) -> dict[str, list[Any]]:
    """Return the values of each key, of so many keys at most."""
    columns: dict[str, list[Any]] = {}
    for one in found:
        for key, value in one.items():
            if key in columns:
                columns[key].append(value)
            elif len(columns) < keys_max:
                columns[key] = [value]
    return columns


def _one_type(kinds: Counter[str]) -> str:
    if not kinds:
        return "VARCHAR"
    most = kinds.most_common(1)[0][0]
    return "DOUBLE" if most == "BIGINT" and kinds["DOUBLE"] else most


def cell_type(values: Sequence[str | None]) -> str:
    """Return the DuckDB type that all of a column's values fit. Leading zeros and dates stay text."""
    given = {value for value in values if value is not None}
    if not given:
        return "VARCHAR"
    if all(_INTEGER.fullmatch(value) for value in given):
        return "BIGINT"
    if all(_DECIMAL.fullmatch(value) for value in given):
        return "DOUBLE"
    if given <= {"true", "false", "True", "False", "TRUE", "FALSE"}:
        return "BOOLEAN"
    return "VARCHAR"


class Columns:
    """The columns of one source, and which of them are used.

    types: by path; of CSV and Parquet also what is inside of a column. declared: types that a mapping states; such a
    column may be missing from the source and is then null.
    """

    def __init__(
        self, style: Style, types: Mapping[Path, str], declared: Mapping[str, str]
    ) -> None:
        stated = {tuple(name.split(".")): kind for name, kind in declared.items()}
        self.style = style
        self.here = {
            path: kind for path, kind in types.items() if style == "json" or len(path) == 1
        }
        self.inside = {_fold(path) for path in types if len(path) > 1}
        self.types = {**types, **stated}
        self.used: list[Path] = []
        self._folded: dict[Path, list[Path]] = {}
        for path in self.types:
            self._folded.setdefault(_fold(path), []).append(path)

    def has(self, name: str) -> bool:
        """Say whether a column has just this name."""
        return (name,) in self.types

    def use(self, parts: Sequence[str]) -> int:
        """Return the number of the column that the parts name. Raises InputError if there is none."""
        path = self._find(tuple(parts))
        if path not in self.used:
            self.used.append(path)
        return self.used.index(path)

    def _find(self, path: Path) -> Path:
        if path in self.types or path == WHOLE:
            return path
        if self.style == "native" and self._may_hold(path):
            return path
        alike = self._folded.get(_fold(path), [])
        if len(alike) == 1:
            return alike[0]
        if not self.types:
            raise InputError(f"The source has no row, so it has no column {'.'.join(path)!r}")
        known = {".".join(one): one for one in self.types}
        near = difflib.get_close_matches(".".join(path), known, n=3, cutoff=0.5)
        raise InputError(
            f"The source has no column {'.'.join(path)!r}",
            mend=f"Near it: {', '.join(near)}"
            if near
            else f"It has {', '.join(sorted(known)[:20])}",
        )

    def _may_hold(self, path: Path) -> bool:
        """Whether Parquet may have a column inside of another: what is inside of a struct is known, DuckDB knows the rest."""
        above = [self.types[path[:end]] for end in range(1, len(path)) if path[:end] in self.types]
        return bool(above) and not (above[-1].startswith("STRUCT(") and above[-1].endswith(")"))

    def kind(self, number: int) -> str:
        """Return the DuckDB type of a used column."""
        path = self.used[number]
        return "JSON" if path == WHOLE else self.types.get(path, "VARCHAR")

    def typed(self, number: int) -> bool:
        """Whether a used column has its type already, so that no text is cast to it."""
        return self.style == "native" and not self._in_text(self.used[number])

    def _in_text(self, path: Path) -> bool:
        """Whether a column is inside of another one that holds JSON objects as text."""
        texts = {"VARCHAR"} if self.style == "json" else {"VARCHAR", "JSON"}
        return len(path) > 1 and self.here.get(path[:1]) in texts

    def frame(self) -> str:
        """Return SQL that selects from `source`: file, line, text, unreadable and the used columns' forms."""
        if self.style == "json":
            return self._json_frame()
        forms = ", ".join(self._forms(number, path) for number, path in enumerate(self.used))
        more = f", {forms}" if forms else ""
        place, text = "file, line", "text"
        if self.style == "native":
            place, text = f"{FILE} AS file, {LINE} AS line", self._row()
        return f"SELECT {place}, {text} AS text, false AS unreadable{more} FROM source"  # names are quoted

    def _json_frame(self) -> str:
        outer = (path[:1] if self._in_text(path) else path for path in self.used)
        pointers = ", ".join(literal(_pointer(path)) for path in outer) or "'/'"
        values = "".join(
            f", {self._found(number, path)} AS j{number}" for number, path in enumerate(self.used)
        )
        plain = "".join(
            (
                f", CAST(j{number} AS JSON) AS o{number}"
                if self._in_text(path)
                else f", CASE WHEN j{number} IS NOT NULL THEN x[{number + 1}] END AS o{number}"
            )
            if self.kind(number) == "JSON"
            else f", {unquote(f'j{number}')} AS u{number}"
            for number, path in enumerate(self.used)
        )
        return (
            f"SELECT * EXCLUDE (x){plain} FROM (SELECT file, line, text, x, x IS NULL AS unreadable{values} "  # names are constants
            f"FROM (SELECT file, line, text, TRY(json_extract(text, [{pointers}])) AS x FROM source))"
        )

    def _found(self, number: int, path: Path) -> str:
        """Return SQL for the JSON of one of the values `x` that were taken out of a row."""
        value = f"x[{number + 1}]"
        if self._in_text(path):
            return _inner(f"json_extract_string({value}, '$')", path)
        return f"nullif(CAST({value} AS VARCHAR), 'null')"

    def _row(self) -> str:
        """Return SQL for the text of all columns as one JSON object."""
        if self.style == "native":
            row = ", ".join(f"{quoted(path[0])} := {self._native(path)}" for path in self.here)
            return f"CAST(to_json(struct_pack({row})) AS VARCHAR)"
        cells = ", ".join(
            f"{literal(path[0])}, CAST({self._cell_json(quoted(f'cell_{at}'), kind)} AS JSON)"
            for at, (path, kind) in enumerate(self.here.items())
        )
        return f"CAST(json_object({cells}) AS VARCHAR)"

    def _native(self, path: Path) -> str:
        """Return SQL for a column of Parquet. NaN is how many tools write that there is nothing, and JSON has none."""
        name = ".".join(map(quoted, path))
        floating = self.here.get(path) in {"DOUBLE", "FLOAT"}
        return f"CASE WHEN isfinite({name}) THEN {name} END" if floating else name

    def _forms(self, number: int, path: Path) -> str:
        if path == WHOLE:
            return f"CAST({self._row()} AS JSON) AS u{number}, {self._row()} AS j{number}"
        known = path[:1] in self.here
        if self._in_text(path):
            at = list(self.here).index(path[:1])
            name = quoted(path[0] if self.style == "native" else f"cell_{at}")
            json = _inner(name, path)
            return f"{json if self.kind(number) == 'JSON' else unquote(json)} AS u{number}, {json} AS j{number}"
        if known and self.style == "native" and len(path) > 1 and path in self.types:
            known = _fold(path) in self.inside  # else it is only declared
        if not known:
            kind = self.types[path]
            return f"CAST(NULL AS {kind}) AS u{number}, CAST(NULL AS VARCHAR) AS j{number}"
        if self.style == "native":
            name = self._native(path)
            return f"{name} AS u{number}, nullif(CAST(to_json({name}) AS VARCHAR), 'null') AS j{number}"
        name = quoted(f"cell_{list(self.here).index(path)}")
        return f"{name} AS u{number}, {self._cell_json(name, self.here[path])} AS j{number}"

    def _cell_json(self, name: str, kind: str) -> str:
        """Return SQL for a cell's JSON: a value that is not of its column's type goes as text."""
        text = f"CAST(to_json({name}) AS VARCHAR)"
        bare = {
            "BIGINT": f"regexp_full_match({name}, {_INTEGER_SQL})",
            "DOUBLE": f"regexp_full_match({name}, {_DECIMAL_SQL})",
            "BOOLEAN": f"lower({name}) IN ('true', 'false')",
        }.get(kind)
        return text if bare is None else f"CASE WHEN {bare} THEN lower({name}) ELSE {text} END"

    def values(self) -> str:
        """Return SQL for a JSON object of the used columns, to show what a refused row held."""
        parts = ", ".join(
            f"{literal('.'.join(path))}, CAST(j{number} AS JSON)"
            for number, path in enumerate(self.used)
        )
        return f"CAST(json_object({parts}) AS VARCHAR)"


def _fold(path: Path) -> Path:
    return tuple(part.lower() for part in path)


def _inner(text: str, path: Path) -> str:
    """Return SQL for the JSON of a column inside of another one's text; null where that is no JSON."""
    found = f"json_extract(TRY_CAST({text} AS JSON), {literal(_pointer(path[1:]))})"
    return f"nullif(CAST({found} AS VARCHAR), 'null')"


def _pointer(path: Path) -> str:
    return (
        ""
        if path == WHOLE
        else "".join("/" + part.replace("~", "~0").replace("/", "~1") for part in path)
    )
