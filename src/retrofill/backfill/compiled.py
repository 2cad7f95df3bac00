"""A mapping compiled against a source: one SQL query that makes finished events of rows.

Compiling parses each expression with DuckDB's own parser, replaces the names in it by the source's columns, asks for its
type, and wraps it so that an error in one row marks that row and no more. What cannot be compiled at all (an unknown
column, a function that is none, a wrong type) is an InputError that names the field and the expression, before any row
is read.

The query's rows, see OUTPUT, are those for which `where` is not false, once for each element of the list that `each`
gives. `bad` is null for an event; else it says why the row is none: a field's number, or one of the negative codes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import msgspec
import pyarrow as pa
from msgspec import Struct, structs

from retrofill.backfill import countries
from retrofill.backfill.columns import WHOLE, Columns, Path
from retrofill.core import mapping
from retrofill.core.glance import FORBIDDEN_IDS
from retrofill.core.mapping import Field, Mapping
from retrofill.core.sql import literal, quoted
from retrofill.errors import InputError
from retrofill.limits import STRING_CHARS_MAX, TIME_MS_MAX

if TYPE_CHECKING:
    import duckdb

UNREADABLE, WHERE, EACH, NO_TYPE, NO_TIME, WRONG_TIME, NO_ID = -1, -2, -3, -4, -5, -6, -7
# Bits of `trouble`: why an id was taken away.
USER_SHORT, USER_FORBIDDEN, DEVICE_SHORT, DEVICE_FORBIDDEN = 1, 2, 4, 8
USER_NULL, DEVICE_NULL, USER_LONG, DEVICE_LONG = 16, 32, 64, 128
_NULLS: Final = (
    "nil",
    "none",
    "null",
    "n/a",
    "na",
    "undefined",
)  # of the forbidden: meant as no id
_OWN: Final = ("event_type", "user_id", "device_id", "insert_id", "time")
_EACH: Final = "each"  # the name that expressions have for the element
# Ours: of the letters of a row that is several events, which all show it: 2,000 of a row of 265 KB took all memory. Beyond that
# they show its beginning.
_PARTS_BYTES_MAX: Final = 4 * 1024 * 1024
_LONG_CHARS: Final = 1000
_FORM: Final = re.compile(r"\b[juof][0-9]+\b")
_PARAMETER = 2**64 - 1  # where the parser says that a lambda's own names stand

# Functions that mappings may use beside DuckDB's. Documented in docs/mapping.md.
_VALUE = "nullif(p->'$.value.string_value', 'null'), CAST(p->>'$.value.int_value' AS JSON), CAST(p->>'$.value.float_value' AS JSON), CAST(p->>'$.value.double_value' AS JSON)"
_COUNTRIES = ", ".join(
    f"{literal(code)}: {literal(name)}" for code, name in countries.NAMES.items()
)
_HELPERS: Final = {
    "_countries()": f"MAP {{{_COUNTRIES}}}",
    "_kept(o, test)": "CAST(map_from_entries(list_filter(list_transform(list_filter(json_keys(o), test), "
    "lambda k: {'k': k, 'v': json_extract(o, _pointer(k))}), lambda e: CAST(e.v AS VARCHAR) != 'null')) AS JSON)",
    "_pointer(k)": "'/' || replace(replace(k, '~', '~0'), '/', '~1')",
}
MACROS: Final = tuple(
    f"CREATE OR REPLACE TEMP MACRO {name} AS {sql}"
    for name, sql in {
        **_HELPERS,
        # Seconds, milliseconds or microseconds since the epoch, told apart by their size, as milliseconds.
        "unix_ms(t)": "CAST(floor(CASE WHEN CAST(t AS DOUBLE) < 1e11 THEN CAST(t AS DOUBLE) * 1000 "
        "WHEN CAST(t AS DOUBLE) < 1e14 THEN CAST(t AS DOUBLE) ELSE CAST(t AS DOUBLE) / 1000 END) AS BIGINT)",
        # A JSON object less the keys that match a regular expression from start to end, or with those alone.
        "without(o, pattern)": "_kept(o, lambda k: NOT regexp_full_match(k, pattern))",
        "matching(o, pattern)": "_kept(o, lambda k: regexp_full_match(k, pattern))",
        # A JSON object whose names have lost a leading `$`; a name that was plain before counts.
        "plain_names(o)": "json_merge_patch(CAST(map_from_entries(list_transform(list_filter(json_keys(o), "
        "lambda k: starts_with(k, '$')), lambda k: {'k': k[2:], 'v': json_extract(o, _pointer(k))})) AS JSON), "
        "without(o, '[$].*'))",
        # The moment inside a UUID of version 7, null for any other text.
        "uuid7_ms(u)": "CASE WHEN regexp_full_match(lower(u), '[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f-]*') "
        "THEN CAST(('0x' || u[1:8] || u[10:13]) AS BIGINT) END",
        # Names of platforms as Amplitude's SDKs spell them.
        "platform_name(p)": "CASE lower(p) WHEN 'ios' THEN 'iOS' WHEN 'android' THEN 'Android' "
        "WHEN 'web' THEN 'Web' ELSE p END",
        # GA4's [{key, value: {string_value, int_value, …}}] as an object, and one value of it as text.
        "params(l)": "CAST(map_from_entries(list_transform(CAST(to_json(l) AS JSON[]), "
        f"lambda p: {{'k': p->>'$.key', 'v': coalesce({_VALUE})}})) AS JSON)",
        "param(l, name)": "params(l)->>_pointer(name)",
        # The English name of a country's ISO 3166 code, other text as it is.
        "country_name(c)": "coalesce(_countries()[upper(c)], c)",
    }.items()
)


# Words that are more likely to mean SQL than a column of their name; who has such a column writes quotes.
_STRUCTURE: Final = frozenset(
    {
        *(
            "and",
            "as",
            "asc",
            "case",
            "cast",
            "collate",
            "desc",
            "distinct",
            "else",
            "end",
            "except",
        ),
        *(
            "false",
            "for",
            "from",
            "ilike",
            "in",
            "is",
            "isnull",
            "lambda",
            "like",
            "not",
            "notnull",
        ),
        *("null", "or", "similar", "then", "true", "try_cast", "when"),
    }
)
# A text, a quoted name, or a word that is no function, no part of a dotted name and no `ORDER BY`.
_TOKEN: Final = re.compile(
    r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|(?<![\w.])(?P<word>[A-Za-z_]\w*)(?!\w)(?!\s*\(|\s+by\b)",
    re.IGNORECASE,
)


class Filter(Struct, frozen=True):
    """An object less some of its members. path: of the object. matching: whether those stay whose names match, or the others."""

    path: Path
    pattern: str
    matching: bool


class Narrowed(Struct, frozen=True):
    """A mapping as SQL over the relation `narrow`: rows already cut into what the expressions need, and events still in pieces.

    forms: the columns of `narrow`, each as `Columns` names it: j0, u1, o2, and f3 for filter 3. paths: of each event's members, with
    the field's kind and the number of the column that goes on as it is, or else where in the answer its piece stands.
    """

    sql: str
    forms: tuple[str, ...]
    filters: tuple[Filter, ...]
    pieces: tuple[Piece, ...]


class Piece(Struct, frozen=True):
    """A member of an event. bare: the number of the column that goes on as it is. column: else that of the answer.

    There a text stands as it is, all but times as JSON.
    """

    path: Path
    kind: mapping.Kind
    bare: int | None = None
    column: str = ""


class Compiled(Struct, frozen=True):
    """A mapping as SQL over the relation `source`. fields: what a `bad` of 0 or more counts in.

    bare: for each field the number of the column that is all of its expression. plain: each row is one event. windowed: what
    a row becomes may depend on others. narrow: the same over cut rows, where that can be.
    """

    sql: str
    fields: tuple[Field, ...]
    bare: tuple[int | None, ...] = ()
    plain: bool = False
    windowed: bool = False
    narrow: Narrowed | None = None


def named(told: Mapping, columns: Columns) -> Compiled | None:
    """Return a mapping, without its query, each of whose expressions is a column's name; None if there is more to ask."""
    expressions = [field.expression for field in told.fields]
    if not _plain(told) or not all(map(columns.has, expressions)):
        return None
    bare = tuple(columns.use((name,)) for name in expressions)
    return Compiled("", tuple(told.fields), bare, plain=True)


def compile_mapping(
    told: Mapping, columns: Columns, connection: duckdb.DuckDBPyConnection, *, id_length_min: int
) -> Compiled:
    """Turn a mapping into one query. connection: has `source`, at least with its columns, and the MACROS.

    Raises InputError naming the field and the expression that cannot be.
    """
    return _Compiler(told, columns, connection, id_length_min).compile()


class _Value(Struct):
    """A field on its way to SQL. bare: the number of the column that is all of its expression. narrow: SQL over cut rows."""

    field: Field
    sql: str
    narrow: str
    bare: int | None = None
    windowed: bool = False
    type_name: str = ""

    @property
    def safe(self) -> bool:
        """Whether no row can fail: the column goes on as it is."""
        return self.bare is not None and self.field.kind in {"text", "value"}

    @property
    def apart(self) -> bool:
        """Whether the expression is worth to be a column of its own, so that it is worked out once."""
        return self.bare is None and not self.windowed

    def result(self, number: int) -> str:
        """Return SQL for the value that came out."""
        return f"t{number}" if self.safe else f"t{number}.v"


class _Compiler:
    def __init__(
        self,
        told: Mapping,
        columns: Columns,
        connection: duckdb.DuckDBPyConnection,
        id_length_min: int,
    ) -> None:
        self.told, self.columns, self.connection = told, columns, connection
        self.id_length_min = id_length_min
        words = connection.execute(
            "SELECT keyword_name FROM duckdb_keywords() WHERE keyword_category IN ('reserved', 'type_function')"
        ).fetchall()
        self._keywords = {word for (word,) in words} - _STRUCTURE
        self._names = frozenset({_EACH} if told.each else ())  # names that are no columns
        self._filters: list[Filter] = []

    def compile(self) -> Compiled:
        values = [self._value(field) for field in self.told.fields]
        parts = self._parts()
        kept = self._parted(self._kept(self._where()), parts)
        self._describe(values, kept)
        return Compiled(
            self._query(values, kept),
            tuple(value.field for value in values),
            tuple(value.bare for value in values),
            _plain(self.told),
            any(value.windowed for value in values),
            self._narrowed(values, kept),
        )

    # Parsing: expressions to SQL over the frame's columns.

    def _value(self, field: Field) -> _Value:
        try:
            node = self._parse(field.expression)
            if node["class"] == "COLUMN_REF" and node["column_names"][0] not in self._names:
                number = self.columns.use(node["column_names"])
                typed = self._typed(number)
                return _Value(field, typed, typed, bare=number)
            windowed = _contains(node, "WINDOW")
            sql = narrow = self._text(self._renamed(node, self._names, lenient=windowed))
            filtered = self._filtered(node)
            if filtered != node:
                names = self._names | {f"f{at}" for at in range(len(self._filters))}
                narrow = self._text(self._renamed(filtered, names, lenient=windowed))
            return _Value(field, sql, narrow, windowed=windowed)
        except InputError as error:
            raise self._wrong(field.name, field.expression, error) from error

    def _where(self) -> str | None:
        if self.told.where is None:
            return None
        try:
            sql = f"TRY({{'v': CAST({self._alone(self.told.where, 'where')} AS BOOLEAN)}})"
            self._type(sql, self.columns.frame())
        except InputError as error:
            raise self._wrong("where", self.told.where, error) from error
        return sql

    def _alone(self, expression: str, name: str) -> str:
        """Return SQL of an expression that says which events a row is, hence may look at no other row."""
        node = self._parse(expression)
        if _contains(node, "WINDOW"):
            raise InputError(f"A window function cannot stand in `{name}`")
        return self._text(self._renamed(node, frozenset(), lenient=False))

    def _kept(self, where: str | None) -> str:
        """Return SQL for the rows that count. doubtful: the code of what did not fit in a row, else null."""
        if where is None:
            return f"SELECT *, CAST(NULL AS INTEGER) AS doubtful FROM ({self.columns.frame()})"
        tested = f"SELECT *, {where} AS keep FROM ({self.columns.frame()})"
        return (
            f"SELECT * EXCLUDE (keep), CASE WHEN keep IS NULL THEN {WHERE} END AS doubtful FROM ({tested}) "
            "WHERE unreadable OR keep IS NULL OR keep.v"
        )

    def _parts(self) -> str | None:
        if self.told.each is None:
            return None
        try:
            sql = self._alone(self.told.each, _EACH)
            if not self._type(sql, self.columns.frame()).endswith("]"):
                raise InputError("This is no list")
        except InputError as error:
            raise self._wrong(_EACH, self.told.each, error) from error
        return f"TRY({{'v': {sql}}})"

    def _parted(self, kept: str, parts: str | None) -> str:
        """Return SQL for the rows, once for each element of their list. What cannot be asked for it stays one row."""
        if parts is None:
            return kept
        asked = f"SELECT *, {parts} AS list FROM ({kept})"
        none = "unreadable OR doubtful IS NOT NULL OR list IS NULL"
        code = f"CASE WHEN list IS NULL THEN coalesce(doubtful, {EACH}) ELSE doubtful END"
        return (
            f"SELECT * EXCLUDE (list, doubtful), {code} AS doubtful, CASE WHEN {none} THEN 1 ELSE len(list.v) END AS parts, "
            f"unnest(CASE WHEN {none} THEN [NULL] ELSE list.v END) AS {_EACH} FROM ({asked})"
        )

    def _parse(self, expression: str) -> dict[str, Any]:
        found = self._serialized(f"SELECT {self._quoted(expression)}")
        if found["error"]:
            raise InputError(str(found["error_message"]))
        node = found["statements"][0]["node"]
        alone = len(found["statements"]) == 1 and len(node.get("select_list", ())) == 1
        if not alone or node["from_table"]["type"] != "EMPTY" or node["where_clause"]:
            raise InputError("This is not one expression")
        expression_node: dict[str, Any] = node["select_list"][0]
        if expression_node["class"] == "STAR":
            raise InputError("A star is no expression: the whole row is source_row")
        if _contains(expression_node, "SUBQUERY"):
            raise InputError("A query inside of an expression is not possible")
        return expression_node

    def _quoted(self, expression: str) -> str:
        """Put quotes around columns whose names are words of SQL, such as `at` or `order`."""
        if self.columns.has(expression):
            return quoted(expression)

        def quote(found: re.Match[str]) -> str:
            word = found["word"]
            if word and word.lower() in self._keywords and self.columns.has(word):
                return quoted(word)
            return found[0]

        return _TOKEN.sub(quote, expression)

    def _serialized(self, sql: str) -> dict[str, Any]:
        asked = "SELECT json_serialize_sql(CAST(? AS VARCHAR))"
        row = self.connection.execute(asked, [sql]).fetchone()
        assert row is not None
        found: dict[str, Any] = msgspec.json.decode(row[0])
        return found

    def _renamed(self, node: Any, own: frozenset[str], *, lenient: bool) -> Any:  # a tree of JSON
        """Return the tree with the source's names replaced. own: the names of lambdas around it."""
        if isinstance(node, list):
            return [self._renamed(one, own, lenient=lenient) for one in node]
        if not isinstance(node, dict):
            return node
        if node.get("class") == "COLUMN_REF":
            names = node["column_names"]
            if names[0] in own:
                return node
            found = self._parse(self._typed(self.columns.use(names), lenient=lenient))
            return {**found, "alias": node["alias"]}  # what a member of a struct is called
        if node.get("class") == "LAMBDA" and node["lhs"].get("query_location") == _PARAMETER:
            inner = own | _parameters(node["lhs"])
            return {**node, "expr": self._renamed(node["expr"], inner, lenient=lenient)}
        renamed = {name: self._renamed(one, own, lenient=lenient) for name, one in node.items()}
        if lenient and node.get("class") == "CAST":
            renamed["try_cast"] = True
        return renamed

    def _filtered(self, node: Any) -> Any:  # a tree of JSON
        """Return the tree with columns f0, f1 … in place of objects less some of their members, one for each object at most."""
        if isinstance(node, list):
            return [self._filtered(one) for one in node]
        if not isinstance(node, dict) or node.get("class") == "LAMBDA":  # it has names of its own
            return node
        number = self._filter(node) if node.get("function_name") in {"without", "matching"} else -1
        if number >= 0:
            return {**node["children"][0], "column_names": [f"f{number}"]}
        return {name: self._filtered(one) for name, one in node.items()}

    def _filter(self, node: dict[str, Any]) -> int:
        """Return the number of the filter that a call is, -1 if it is more than that."""
        parts = node["children"]
        if [part["class"] for part in parts] != ["COLUMN_REF", "CONSTANT"]:
            return -1
        names, pattern = parts[0]["column_names"], parts[1]["value"].get("value")
        number = -1 if names[0] in self._names else self.columns.use(names)
        if number < 0 or self.columns.kind(number) != "JSON" or not isinstance(pattern, str):
            return -1
        used = self.columns.used[number]
        found = Filter(() if used == WHOLE else used, pattern, node["function_name"] == "matching")
        if all(one.path != found.path for one in self._filters):
            self._filters.append(found)
        return self._filters.index(found) if found in self._filters else -1

    def _typed(self, number: int, *, lenient: bool = False) -> str:
        """Return SQL of a column in its own type, an error where the value does not fit."""
        kind = self.columns.kind(number)
        if kind == "VARCHAR" or self.columns.typed(number):
            return f"u{number}"
        if kind == "JSON" and self.columns.style == "json":
            return f"o{number}"
        return f"{'TRY_CAST' if lenient else 'CAST'}(u{number} AS {kind})"

    def _text(self, node: dict[str, Any]) -> str:
        statement = self._serialized("SELECT 1")
        statement["statements"][0]["node"]["select_list"] = [node]
        asked = "SELECT json_deserialize_sql(CAST(? AS JSON))"
        row = self.connection.execute(asked, [msgspec.json.encode(statement).decode()]).fetchone()
        assert row is not None
        return f"({str(row[0]).removeprefix('SELECT ')})"

    def _describe(self, values: list[_Value], kept: str) -> None:
        """Note the types of all values, in two questions; where those fail, one by one, to know whose fault it is."""
        numbered = list(enumerate(values))
        try:
            names = self._types([value.sql for value in values], kept)
            for value, name in zip(values, names, strict=True):
                value.type_name = name
            tried = [self._tried(value, number) for number, value in numbered]
            self._types(tried, self._with_columns(numbered, kept))
        except InputError:
            for number, value in numbered:
                self._describe_one(value, number, kept)
        for value in values:
            if value.field.kind == "millis" and value.type_name == "BOOLEAN":
                reason = InputError("A truth value is no time")
                raise self._wrong(value.field.name, value.field.expression, reason)

    def _describe_one(self, value: _Value, number: int, kept: str) -> None:
        field = value.field
        try:
            value.type_name = self._type(value.sql, kept)
            self._type(self._tried(value, number), self._with_columns([(number, value)], kept))
        except InputError as error:
            raise self._wrong(field.name, field.expression, error) from error

    def _type(self, sql: str, relation: str) -> str:
        (found,) = self._types([sql], relation)
        return found

    def _types(self, expressions: list[str], relation: str) -> list[str]:
        import duckdb  # noqa: PLC0415  # as in `intake.connect`

        named = ", ".join(f"{sql} AS v{at}" for at, sql in enumerate(expressions))
        try:
            rows = self.connection.execute(f"DESCRIBE SELECT {named} FROM ({relation})").fetchall()
        except duckdb.Error as error:
            raise InputError(_first_line(error)) from error
        return [str(row[1]) for row in rows]

    def _wrong(self, name: str, expression: str, error: InputError) -> InputError:
        if expression.strip() == "?":  # as `retrofill map` writes it
            return InputError(
                f"The mapping does not say yet what {name} is",
                where=f"{name}: {expression}",
                mend="Name a column or an expression in place of the question mark, or remove the line",
            )
        return InputError(
            f"The mapping's {name} cannot be: {error.what}",
            where=f"{name}: {expression}",
            mend=error.mend,
        )

    # The query, from the inside out. Each layer adds columns that the next one uses.

    def _query(self, values: list[_Value], kept: str) -> str:
        tried = ", ".join(f"{self._tried(value, at)} AS t{at}" for at, value in enumerate(values))
        layers = (
            tried,
            self._own(values),
            self._troubles(),
            self._usable(),
            f"{self._verdict(list(enumerate(values)))} AS bad",
            f"CASE WHEN bad IS NULL THEN {self._body(values)} END AS body",
        )
        sql = self._with_columns(list(enumerate(values)), kept)
        for layer in layers:
            sql = f"SELECT *, {layer} FROM ({sql})"  # SQL of our own making
        return f"SELECT {self._output(values)} FROM ({sql})"

    def _narrowed(self, values: list[_Value], kept: str) -> Narrowed | None:
        """Return the same over cut rows, which know what can go on as it is; None where a row must be seen whole."""
        if self.columns.style != "json" or any(value.windowed for value in values):
            return None
        bare = [self._goes_on(value) for value in values]
        asked = [
            (at, structs.replace(value, sql=value.narrow))
            for at, value in enumerate(values)
            if bare[at] is None
        ]
        sql = self._with_columns(
            asked,
            kept.replace(
                f"({self.columns.frame()})", "(SELECT *, false AS unreadable FROM narrow)"
            ),
        )
        tried = ", ".join(f"{self._tried(value, at, plain=True)} AS t{at}" for at, value in asked)
        verdict = f"{self._verdict(asked)} AS bad"
        for layer in (tried, self._own(values), self._troubles(), self._usable(), verdict):
            sql = f"SELECT *, {layer} FROM ({sql})"  # SQL of our own making
        names = {"insert_id": "given", "event_type": "event_type", "user_id": "user_id"}
        names |= {"device_id": "device_id", "time": "time_ms"}
        columns = {
            "place": "place",
            "good": "bad IS NULL",
            "trouble": "CAST(user_trouble + device_trouble AS UTINYINT)",
            "time_ms": "time_",
            "event_type": "event_type_",
            "user_id": "user_id",
            "device_id": "device_id",
            "given": "nullif(insert_id_, '')",
        }
        pieces = [Piece((name,), mapping.TARGETS[name], column=at) for name, at in names.items()]
        for at, value in enumerate(values):
            if value.field.path[0] not in _OWN:
                column = "" if bare[at] is not None else f"p{at}"
                pieces.append(Piece(value.field.path, value.field.kind, bare[at], column))
                columns |= {column: value.result(at)} if column else {}
        sql = (
            f"SELECT {', '.join(f'{one} AS {name}' for name, one in columns.items())} FROM ({sql})"
        )
        for number in range(len(self.columns.used)):
            sql = sql.replace(mapping.unquote(f"j{number}"), f"u{number}")
        forms = dict.fromkeys(one for one in _FORM.findall(sql) if self._is_form(one))
        whole = {
            f"{kind}{at}"
            for at, path in enumerate(self.columns.used)
            for kind in "juo"
            if path == WHOLE
        }
        if not whole.isdisjoint(forms):
            return None
        return Narrowed(sql, tuple(forms), tuple(self._filters), tuple(pieces))

    def _is_form(self, name: str) -> bool:
        known = self._filters if name[0] == "f" else self.columns.used
        return int(name[1:]) < len(known)

    def _goes_on(self, value: _Value) -> int | None:
        """Return the number of the column that is all of a field and need not be asked about."""
        if value.bare is None or value.field.path[0] in _OWN:
            return None
        kinds = {"object": "JSON", "integer": "BIGINT", "millis": "BIGINT", "number": "DOUBLE"}
        kind = value.field.kind
        surely = kind in {"text", "value"} or kinds.get(kind) == self.columns.kind(value.bare)
        return value.bare if surely and self.columns.used[value.bare] != WHOLE else None

    def _with_columns(self, values: Sequence[tuple[int, _Value]], kept: str) -> str:
        """Return SQL for the rows with what is worked out before the fields are made of it."""
        columns = [
            f"{value.sql} AS w{at}" if value.windowed else f"TRY({{'v': {value.sql}}}) AS e{at}"
            for at, value in values
            if value.windowed or value.apart
        ]
        return f"SELECT {', '.join(['*', *columns])} FROM ({kept})"  # SQL of our own making

    def _tried(self, value: _Value, number: int, *, plain: bool = False) -> str:
        """Return SQL for {v: …}, NULL where the row's value does not fit; just for v where it always does.

        v is the plain value of the fields that the stage itself looks at, else the piece of JSON. plain: that of all texts.
        """
        field = value.field
        own = field.path[0] in _OWN or (plain and field.kind == "text")
        if value.safe:
            assert value.bare is not None
            return self._passed(value, value.bare, own=own)
        sql = f"w{number}" if value.windowed else f"e{number}.v" if value.apart else value.sql
        if own and field.kind == "text":
            if value.type_name == "JSON":
                sql = mapping.unquote(f"nullif(CAST({sql} AS VARCHAR), 'null')")
            made = f"CAST({sql} AS VARCHAR)"
        elif own:
            made = mapping.millis(sql, type_name=value.type_name)
        else:
            made = mapping.piece(field.kind, sql, type_name=value.type_name)
        tried = f"TRY({{'v': {made}}})"
        return f"CASE WHEN e{number} IS NOT NULL THEN {tried} END" if value.apart else tried

    def _passed(self, value: _Value, number: int, *, own: bool) -> str:
        """Return SQL for a column that goes on as the source wrote it, without any way to fail."""
        if value.field.kind == "value":
            return f"j{number}"
        if own and self.columns.style == "json":
            return mapping.unquote(f"j{number}")
        if own:
            return f"CAST(u{number} AS VARCHAR)"
        text = f"CASE WHEN starts_with(j{number}, '\"') THEN j{number}"
        return f"{text} ELSE CAST(to_json(j{number}) AS VARCHAR) END"

    def _own(self, values: list[_Value]) -> str:
        at = {value.field.name: value.result(number) for number, value in enumerate(values)}
        parts = [
            f"{self._cut(at.get(name, 'CAST(NULL AS VARCHAR)'), name)} AS {name}_"
            for name in ("event_type", "user_id", "device_id", "insert_id")
        ]
        return ", ".join([*parts, f"{at['time']} AS time_"])

    def _cut(self, text: str, name: str) -> str:
        """Return SQL for the text as the core would take it: ids without leading spaces, a type not too long."""
        if name == "insert_id":
            return text
        if name != "event_type":
            return f"CASE WHEN starts_with({text}, ' ') THEN ltrim({text}, ' ') ELSE {text} END"
        # strlen counts bytes, hence looks at nothing.
        long = f"strlen({text}) > {STRING_CHARS_MAX}"
        return f"CASE WHEN {long} THEN left({text}, {STRING_CHARS_MAX}) ELSE {text} END"

    def _troubles(self) -> str:
        user = self._trouble("user_id_", USER_SHORT, USER_LONG, USER_FORBIDDEN, USER_NULL)
        device = self._trouble(
            "device_id_", DEVICE_SHORT, DEVICE_LONG, DEVICE_FORBIDDEN, DEVICE_NULL
        )
        return f"{user} AS user_trouble, {device} AS device_trouble"

    def _trouble(self, name: str, short: int, long: int, forbidden: int, null: int) -> str:
        listed = {word.lower() for word in FORBIDDEN_IDS}
        words = ", ".join(literal(word) for word in sorted(listed))
        nulls = ", ".join(map(literal, _NULLS))
        sizes = ", ".join(str(size) for size in sorted({len(word) for word in listed}))
        size_min = self.id_length_min
        return (
            f"CASE WHEN {name} IS NULL OR {name} = '' THEN 0 "
            f"WHEN strlen({name}) IN ({sizes}) AND lower({name}) IN ({words}) "
            f"THEN CASE WHEN lower({name}) IN ({nulls}) THEN {null} ELSE {forbidden} END "
            f"WHEN strlen({name}) < {4 * size_min} AND length({name}) < {size_min} THEN {short} "
            f"WHEN strlen({name}) > {STRING_CHARS_MAX} AND length({name}) > {STRING_CHARS_MAX} THEN {long} ELSE 0 END"
        )

    def _usable(self) -> str:
        return (
            "CASE WHEN user_trouble = 0 THEN nullif(user_id_, '') END AS user_id, "
            "CASE WHEN device_trouble = 0 THEN nullif(device_id_, '') END AS device_id"
        )

    def _verdict(self, values: Sequence[tuple[int, _Value]]) -> str:
        fails = " ".join(f"WHEN t{at} IS NULL THEN {at}" for at, one in values if not one.safe)
        return (
            f"CASE WHEN unreadable THEN {UNREADABLE} WHEN doubtful IS NOT NULL THEN doubtful {fails} "
            f"WHEN event_type_ IS NULL OR event_type_ = '' THEN {NO_TYPE} "
            f"WHEN time_ IS NULL THEN {NO_TIME} "
            f"WHEN time_ NOT BETWEEN 0 AND {TIME_MS_MAX} THEN {WRONG_TIME} "
            "WHEN user_id IS NULL AND device_id IS NULL AND event_type_ != '$groupidentify' "
            f"THEN {NO_ID} END"
        )

    def _pieces(self, values: list[_Value]) -> list[tuple[Path, str]]:
        """Return SQL of the JSON of an event's insert_id, and of the other fields that the stage itself looks at."""
        bare = {value.field.name: value.bare for value in values}
        texts = {
            "insert_id": "nullif(insert_id_, '')",
            "event_type": "event_type_",
            "user_id": "user_id",
            "device_id": "device_id",
        }
        pieces = [((name,), self._requoted(sql, bare.get(name))) for name, sql in texts.items()]
        return [*pieces, (("time",), "CAST(time_ AS VARCHAR)")]

    def _body(self, values: list[_Value]) -> str:
        pieces = self._pieces(values)[1:]
        pieces += [
            (value.field.path, value.result(at))
            for at, value in enumerate(values)
            if value.field.path[0] not in _OWN
        ]
        return mapping.assemble(pieces)

    def _requoted(self, text: str, column: int | None) -> str:
        """Return SQL for the text as JSON. Where the source's JSON is the text and two quotes, that will do."""
        json = f"CAST(to_json({text}) AS VARCHAR)"
        if column is None or self.columns.style != "json":
            return json
        return f"CASE WHEN strlen(j{column}) = strlen({text}) + 2 THEN j{column} ELSE {json} END"

    def _output(self, values: list[_Value]) -> str:
        shown = self.columns.values() if self.columns.used else "'{}'"
        (_key, sent), *_others = self._pieces(values)
        told, row = f"bad >= {EACH}", "text"
        if self.told.each is not None:
            long = f"(parts > 1 AND strlen(text) * parts > {_PARTS_BYTES_MAX})"
            told = f"{told} AND NOT {long}"
            row = f"CASE WHEN {long} THEN left(text, {_LONG_CHARS}) || '…' ELSE text END"
        columns = {
            "file": "file",
            "line": "line",
            "bad": "CAST(bad AS INTEGER)",
            "row": f"CASE WHEN bad IS NOT NULL THEN {row} END",
            "shown": f"CASE WHEN {told} THEN {shown} END",
            "trouble": f"CAST(CASE WHEN bad IS NULL OR bad = {NO_ID} THEN user_trouble + device_trouble ELSE 0 END AS UTINYINT)",
            "time_ms": "time_",
            "event_type": "event_type_",
            "user_id": "user_id",
            "device_id": "device_id",
            "insert_id": f"coalesce({sent}, md5(body))",
            "body": "body",
        }
        return ", ".join(f"{sql} AS {name}" for name, sql in columns.items())


OUTPUT: Final = pa.schema(
    [
        ("file", pa.int32()),
        ("line", pa.int64()),
        ("bad", pa.int32()),
        ("row", pa.string()),
        ("shown", pa.string()),
        ("trouble", pa.uint8()),
        ("time_ms", pa.int64()),
        ("event_type", pa.string()),
        ("user_id", pa.string()),
        ("device_id", pa.string()),
        ("insert_id", pa.string()),
        ("body", pa.string()),
    ]
)


def _plain(told: Mapping) -> bool:
    return told.where is None and told.each is None


def _contains(node: Any, kind: str) -> bool:  # a tree of JSON
    if isinstance(node, list):
        return any(_contains(one, kind) for one in node)
    if isinstance(node, dict):
        return node.get("class") == kind or any(_contains(one, kind) for one in node.values())
    return False


def _parameters(node: dict[str, Any]) -> frozenset[str]:
    """Return the names that a lambda gives to its arguments."""
    if node["class"] == "COLUMN_REF":
        return frozenset(node["column_names"])
    return frozenset(name for one in node.get("children", ()) for name in _parameters(one))


def _first_line(error: duckdb.Error) -> str:
    return str(error).split("\n", 1)[0]
