"""The two keys of a destination: given, from the environment or from a file. They are never written or shown."""

from __future__ import annotations

import base64
import os
import urllib.request
from pathlib import Path

from msgspec import Struct

from retrofill.errors import InputError

API_KEY = "RETROFILL_API_KEY"
SECRET_KEY = "RETROFILL_SECRET_KEY"  # noqa: S105 - the name of a variable


class Keys(Struct, frozen=True):
    """api_key to send, both to read. Empty if unknown."""

    api_key: str = ""
    secret_key: str = ""

    def __repr__(self) -> str:
        return "Keys(…)"

    def sign(self, request: urllib.request.Request) -> None:
        """Let a request carry both keys, but no further: where it is redirected to must not learn them."""
        token = base64.b64encode(f"{self.api_key}:{self.secret_key}".encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")


def find(api_key: str | None, secret_key: str | None, file: Path | None) -> Keys:
    """Return the keys: as given, else of the file, else of the environment.

    The file has lines `api_key=…` and `secret_key=…`, or `RETROFILL_API_KEY=…`. White space around a key, as a file that
    was read into the environment leaves it, is none of it. Raises InputError if the file cannot be read.
    """
    known = _file(file) if file is not None else {}
    api = api_key or known.get("api_key") or os.environ.get(API_KEY, "")
    secret = secret_key or known.get("secret_key") or os.environ.get(SECRET_KEY, "")
    return Keys(api.strip(), secret.strip())


def need_api_key(keys: Keys) -> None:
    """Raise InputError without an API key."""
    if not keys.api_key:
        raise InputError(
            "No API key", mend=f"Give --api-key KEY, set {API_KEY}, or name a --key-file"
        )


def need_both(keys: Keys) -> None:
    """Raise InputError without both keys: reading needs them."""
    need_api_key(keys)
    if not keys.secret_key:
        raise InputError(
            "No secret key: reading back needs it",
            mend=f"Give --secret-key KEY, set {SECRET_KEY}, or name a --key-file",
        )


def _file(path: Path) -> dict[str, str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise InputError("The key file cannot be read", where=str(path)) from problem
    found = {}
    for line in text.splitlines():
        name, mark, value = line.strip().removeprefix("export ").partition("=")
        short = name.strip().lower().removeprefix("retrofill_")
        if mark and short in {"api_key", "secret_key"}:
            found[short] = value.strip().strip("'\"")
    if not found:
        raise InputError(
            "The key file names no key",
            where=str(path),
            mend="Write a line api_key=KEY and, for reading, a line secret_key=KEY",
        )
    return found
