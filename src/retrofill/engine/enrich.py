"""What an event does not say itself: its device from the user agent, its place from the IP address.

Both answers depend on data files that change with time, so they are written into the event before it is stored: a
block folds to the same rows wherever and whenever it is folded. Explicit values always win; any explicit part of the
place means that no part of it is looked up. Without a location database nothing is looked up.

Source: contract, events 2 (`user_agent`, `ip`) and 8.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import maxminddb
import ua_parser

from retrofill.core.event import Batch, Event, encode
from retrofill.errors import InputError
from retrofill.limits import STRING_CHARS_MAX


class Enricher:
    """Fills in what can be looked up. geoip: a MaxMind city database file, or None."""

    def __init__(self, geoip: Path | None) -> None:
        self._places: Any = None
        if geoip is not None:
            try:
                self._places = maxminddb.open_database(geoip)
            except (OSError, ValueError, maxminddb.InvalidDatabaseError) as problem:
                raise InputError(
                    f"The location database cannot be read: {problem}",
                    where=str(geoip),
                    mend="Give a MaxMind city database (.mmdb) with --geoip",
                ) from problem

    def enrich(self, batch: Batch) -> None:
        """Fill in a batch in place; its body is written anew if anything was."""
        events = batch.events
        if self._places is None:
            events = [event for event in events if event.user_agent]
        changed = False
        for event in events:
            if event.user_agent:
                changed |= _device(event)
            if self._places is not None and event.ip:
                changed |= self._place(event, batch.remote)
        if changed:
            batch.body = encode(batch.events)

    def _place(self, event: Event, remote: str | None) -> bool:
        if not (event.country is event.region is event.city is event.dma is None):
            return False
        address = remote if event.ip == "$remote" else event.ip
        if address is None:  # a peer on a local socket has none
            return False
        try:
            found: Any = self._places.get(address)
        except ValueError:
            return False
        if not found:
            return False
        event.country = _name(found.get("country"))
        event.region = _name((found.get("subdivisions") or [None])[0])
        event.city = _name(found.get("city"))
        return True


def _name(place: Any) -> str | None:
    name = (place or {}).get("names", {}).get("en")
    return name if isinstance(name, str) else None


def _device(event: Event) -> bool:
    os_name, os_version, model = _parsed(event.user_agent or "")
    changed = False
    if event.os_name is None and event.os_version is None and os_name:
        event.os_name, event.os_version = os_name, os_version
        changed = True
    if event.device_model is None and model:
        event.device_model = model
        changed = True
    return changed


@lru_cache(maxsize=4096)
def _parsed(user_agent: str) -> tuple[str | None, str | None, str | None]:
    """Return browser or system, its version, and the device model. Amplitude shows a browser as the system."""
    found = ua_parser.parse(user_agent[: 4 * STRING_CHARS_MAX])
    browser, device = found.user_agent, found.device
    version = None
    if browser is not None:
        version = ".".join(part for part in (browser.major, browser.minor) if part) or None
    model = device.model if device is not None else None
    return (browser.family if browser else None, version, model)
