"""Language tags and their English names."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrofill.core import language


@pytest.mark.parametrize(
    ("text", "name"),
    [
        # Source: contract, events 2, `language`.
        ("en-US", "English"),
        ("ar_eg", "Arabic"),
        ("English", "English"),
        ("en", "English"),
        ("EN", "English"),
        ("eng", "English"),
        ("english", "English"),
        ("de-AT", "German"),
        ("zh-Hant-TW", "Chinese"),
        ("pt_BR", "Portuguese"),
        ("iw", "Hebrew"),
        ("fil", "Filipino"),
        ("nb", "Norwegian Bokmål"),
        ("norwegian bokmål", "Norwegian Bokmål"),
        ("en_US.UTF-8", "English"),
        ("Klingonisch", "Klingonisch"),
        ("xx-YY", "xx-YY"),
        ("", ""),
        ("-", "-"),
    ],
)
def test_a_tag_becomes_the_name_of_its_language(text: str, name: str) -> None:
    assert language.name(text) == name


def test_a_name_stands_for_itself() -> None:
    for name in language.NAMES.values():
        assert language.name(name) == name
        assert language.name(name.upper()) == name


def test_the_table_is_whole() -> None:
    assert len(language.NAMES) > 900
    assert all(tag.isascii() and tag.islower() and 2 <= len(tag) <= 3 for tag in language.NAMES)
    assert not any(";" in name or "," in name or "\n" in name for name in language.NAMES.values())


@given(st.text(max_size=20))
def test_any_text_has_a_name_that_is_its_own_name(text: str) -> None:
    assert language.name(language.name(text)) == language.name(text)
