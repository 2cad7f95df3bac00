"""A person is saved whole, whatever numbers its properties hold."""

from __future__ import annotations

from retrofill.core import person
from retrofill.core.person import Person


def test_a_number_that_no_file_holds_is_saved_as_one_that_it_does() -> None:
    """None gets in any more: a history that began before may hold one."""
    odd = {"a": 2**64, "b": [1, {"c": -(2**63) - 1}], "d": 10**400, "e": 2**64 - 1}
    found = person.decode(person.encode(Person(7, "user-7", odd)))
    assert found == Person(7, "user-7", {"a": 2.0**64, "b": [1, {"c": -(2.0**63)}], "e": 2**64 - 1})
    assert odd["a"] == 2**64
