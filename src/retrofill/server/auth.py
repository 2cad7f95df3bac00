"""Who asks: the API key and secret key of a project, compared in constant time with every project's.

Reading needs both keys (HTTP Basic: the API key is the user, the secret key the password). Writing needs the API key in
the request and is `ingest`'s. Source: contract, read 1.
"""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import Iterable

from retrofill.config import Project


def basic(header: str, projects: Iterable[Project]) -> Project | None:
    """Return the project whose keys `Authorization: Basic …` holds, or None.

    Every project is compared, whole, whatever is found: the time says nothing about keys.
    """
    scheme, _, encoded = header.strip().partition(" ")
    try:
        given = base64.b64decode(encoded.strip(), validate=True)
    except (binascii.Error, ValueError):
        given = b""
    found = None
    for project in projects:
        wanted = f"{project.api_key}:{project.secret_key}".encode()
        if hmac.compare_digest(given, wanted):
            found = project
    return found if scheme.lower() == "basic" else None
