"""A mapping read from a file, or by the name of one that comes with the program."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from retrofill.core import mapping
from retrofill.core.mapping import Mapping
from retrofill.errors import InputError


def load(name: str) -> Mapping:
    """Read a mapping: a preset's name or a file's path. Raises InputError with the line that is no YAML."""
    path = Path(name)
    if path.is_file():
        return _read(path.read_text(encoding="utf-8"), name)
    preset = resources.files("retrofill.backfill.presets") / f"{name}.yaml"
    if "/" not in name and preset.is_file():
        return _read(preset.read_text(encoding="utf-8"), name)
    raise InputError(
        f"There is no mapping {name!r}",
        mend=f"Name a file or one of {', '.join(presets())}; `retrofill map` writes a first one",
    )


def presets() -> list[str]:
    """Return the names of the mappings that come with the program."""
    inside = resources.files("retrofill.backfill.presets").iterdir()
    return sorted(one.name.removesuffix(".yaml") for one in inside if one.name.endswith(".yaml"))


class _Loader(yaml.SafeLoader):
    """Reads YAML in which no name stands twice in one block: YAML itself lets the last one win unsaid."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002  # as in yaml
        seen: set[Any] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value!r} stands there twice", key.start_mark
                )
            seen.add(key.value)
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found


def _read(text: str, name: str) -> Mapping:
    try:
        document = yaml.load(text, _Loader)  # noqa: S506  # a SafeLoader
    except yaml.YAMLError as error:
        raise InputError(f"The mapping is no YAML: {error}", where=name) from error
    try:
        return mapping.parse(document)
    except InputError as error:
        raise InputError(error.what, where=error.where or name, mend=error.mend) from error
