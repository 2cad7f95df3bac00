"""Which person an event belongs to.

People are resolved by order of receipt, within one project. The rule looks at four values: the amplitude_id that the
event's device had last, the user_id that owns it, the event's own user_id and the amplitude_id known for that.
An anonymous person (no owner) becomes a user when one first logs in on its device, and is merged into a user who is
known already. Two owners are never merged. A merged person is never a survivor later: survivors have owners, and
only people without one are absorbed, so merges never chain.

A user who has absorbed as many people as the project allows absorbs no more (`full`): such an id is shared by many, or
stands for nobody. The event is the user's, and whoever is anonymous on the device stays who it is, device and all: the
next event with both ids asks again.

Source: contract, identity 2. Where it is silent: docs/decisions/0004. `full`: ours, docs/decisions/0017.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

from msgspec import Struct


class Resolution(Struct, frozen=True, gc=False):
    """The person of one event.

    fresh: this person was made by the event. adopts: the anonymous person now belongs to the event's user.
    absorbed: the anonymous person that the event shows to be this one, or 0. held: it is not absorbed, and keeps the device.
    """

    amplitude_id: int
    fresh: bool = False
    adopts: bool = False
    absorbed: int = 0
    held: bool = False


def resolve(
    *,
    device_person: int,
    device_owner: str | None,
    user: str | None,
    user_person: int,
    fresh: int,
    full: bool = False,
) -> Resolution:
    """Say which person an event belongs to.

    device_person: the amplitude_id last seen on the device, merges followed, 0 if none. device_owner: its user_id.
    user: the event's user_id. user_person: the amplitude_id known for it, 0 if none.
    fresh: the next unused amplitude_id, drawn by the caller: same arguments, same answer. full: the user may absorb nobody.
    """
    if user is None:
        return Resolution(device_person) if device_person else Resolution(fresh, fresh=True)
    if user_person:
        anonymous = device_person and device_person != user_person and device_owner is None
        if anonymous and full:
            return Resolution(user_person, held=True)
        return Resolution(user_person, absorbed=device_person if anonymous else 0)
    if device_person and device_owner is None:
        return Resolution(device_person, adopts=True)
    return Resolution(fresh, fresh=True)


@lru_cache(maxsize=65_536)
def derived_device(user_id: str) -> str:
    """Make the device_id of an event that has only a user_id: UUIDv5-shaped, the same for the same user.

    Source: contract, events 2, `device_id` (a hash of `user_id`; real rows show version nibble 5).
    """
    text = hashlib.sha1(b"retrofill.device:" + user_id.encode(), usedforsecurity=False).hexdigest()
    variant = "89ab"[int(text[16], 16) & 3]
    return f"{text[:8]}-{text[8:12]}-5{text[13:16]}-{variant}{text[17:20]}-{text[20:32]}"
