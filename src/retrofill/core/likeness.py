"""Who is likely to be one person under two ids: the forms of a user_id, and the addresses in properties.

Nothing here decides who is who. It names what a person should look at before an import counts somebody twice:

- a user_id, trimmed and in lower case, that equals another one;
- a user_id with a short word before it (`user-`, `auth0|`, `id:`) that without the word equals another one, which is
  at least five characters long and has a digit in it, since short words alone prove nothing;
- the same mail address or telephone number in a property that is named so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

_PREFIX = re.compile(r"[a-z][a-z0-9]{0,15}[|:/_.-](?=(.{5,})$)")
_DIGIT = re.compile(r"\d")
_NOT_LETTERS = re.compile(r"[^a-z]+")
_MAIL_NAMES = frozenset({"mail", "email", "emailaddress", "mailaddress", "useremail"})
_PHONE_NAMES = frozenset(
    {"phone", "phonenumber", "telephone", "tel", "mobile", "mobilenumber", "mobilephone", "msisdn"}
)
_MAIL = re.compile(r"[^@\s]+@[^@\s]+\.[^@\s]+")
_PHONE_DIGITS_MIN = 7


def plain(user_id: str) -> str:
    """Return a user_id trimmed and in lower case."""
    return user_id.strip().casefold()


def without_prefix(user_id: str) -> str | None:
    """Return a user_id without the word before it, None if there is none or too little is left."""
    text = plain(user_id)
    found = _PREFIX.match(text)
    if found is None or not _DIGIT.search(found[1]):
        return None
    return found[1]


def forms(user_id: str) -> Iterator[str]:
    """Yield the texts under which a user_id is looked for: two ids that share one are likely one person."""
    yield plain(user_id)
    short = without_prefix(user_id)
    if short is not None:
        yield short


def alike(one: str, other: str) -> str | None:
    """Say how two user_ids show that they may be one person: `case or space`, `prefix`, or None.

    Two different prefixes prove nothing: one of the two has to stand alone.
    """
    if one == other:
        return None
    if plain(one) == plain(other):
        return "case or space"
    if plain(one) == without_prefix(other) or without_prefix(one) == plain(other):
        return "prefix"
    return None


def contacts(properties: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (property name, address) of each mail address and telephone number, as they are compared."""
    for name, value in properties.items():
        kind = _NOT_LETTERS.sub("", name.lower())
        if kind in _MAIL_NAMES and isinstance(value, str) and _MAIL.fullmatch(value.strip()):
            yield name, value.strip().casefold()
        elif kind in _PHONE_NAMES and isinstance(value, str | int) and value is not True:
            digits = re.sub(r"\D", "", str(value))
            if len(digits) >= _PHONE_DIGITS_MIN:
                yield name, digits
