"""Stages small sources for the tests and reads the events back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import yaml

from retrofill.backfill import mapping_file
from retrofill.backfill.manifest import Manifest, Options
from retrofill.backfill.sets import JSON, SCHEMA, TEXT, Set
from retrofill.backfill.stage import Asked, stage
from retrofill.core import mapping

Json = dict[str, Any]
COLUMNS = [JSON if name == TEXT else name for name in SCHEMA.names]


def ndjson(path: Path, rows: Sequence[Json | str]) -> Path:
    texts = [row if isinstance(row, str) else msgspec.json.encode(row).decode() for row in rows]
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return path


def told(document: str | Json) -> mapping.Mapping:
    """A mapping from YAML text, a document, or a preset's name."""
    if isinstance(document, str) and "\n" not in document:
        return mapping_file.load(document)
    return mapping.parse(yaml.safe_load(document) if isinstance(document, str) else document)


def run(
    work: Path,
    source: Path | str | Sequence[str],
    document: str | Json,
    *,
    query: str | None = None,
    endpoint: str | None = None,
    **options: Any,
) -> Manifest:
    named = [str(source)] if isinstance(source, str | Path) else list(source)
    asked = Asked(named=named, mapping=told(document), query=query, endpoint=endpoint)
    return stage(work, asked, Options(**{"import_id": "spring", "sets": 2, **options}))


def table(path: Path) -> pa.Table:
    """A whole set."""
    schema = pa.schema([SCHEMA.field(TEXT if name == JSON else name) for name in COLUMNS])
    with Set(path) as one:
        found = [*one.batches(COLUMNS)]
    return pa.Table.from_batches(
        found, None if found else schema.empty_table().rename_columns(COLUMNS).schema
    )


def rows(work: Path) -> list[Json]:
    """All staged rows, set after set, in the order of sending."""
    found: list[Json] = []
    for path in sorted((work / "stage").glob("set-*.rows")):
        found += table(path).to_pylist()
    return found


def events(work: Path) -> list[Json]:
    """All staged events in the order of the source, less what every one of them carries."""
    staged = sorted(rows(work), key=lambda row: (row["file"], row["line"]))
    found = [msgspec.json.decode(row["json"]) for row in staged]
    for event in found:
        assert event.pop("ingestion_metadata") == {
            "source_name": "retrofill",
            "source_version": "spring",
        }
    return found


def letters(work: Path) -> list[Json]:
    text = (work / "dead-letters.ndjson").read_text(encoding="utf-8")
    return [msgspec.json.decode(line) for line in text.splitlines()]
