"""Strict reading of decoded JSON: every value has a type, a bound and a name in the message."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from ckptd.errors import InvalidRequest

_T = TypeVar("_T")
_HEX = re.compile(r"[0-9a-f]*")


class MalformedField(Exception):
    """Something is not as the format says; the caller makes it one of our errors."""


class Fields:
    """The fields of one JSON object, taken one by one."""

    def __init__(self, given: object, what: str) -> None:
        if type(given) is not dict:
            raise MalformedField(f"{what} is {_shown(given)}, expected an object")
        self._given: dict[str, Any] = dict(given)
        self.what = what

    @classmethod
    def of_list(cls, given: object, what: str, keys: Sequence[str]) -> Fields:
        """The fields of a list whose items have fixed meanings."""
        if type(given) is not list or len(given) != len(keys):
            raise MalformedField(f"{what} is {_shown(given)}, expected [{', '.join(keys)}]")
        return cls(dict(zip(keys, given, strict=True)), what)

    def has(self, key: str) -> bool:
        return key in self._given

    def done(self) -> None:
        """Refuses fields that nobody asked for."""
        if self._given:
            raise MalformedField(f"{self.what} has the unknown field {ascii(next(iter(self._given)))[:80]}")

    def take(self, key: str) -> Any:
        if key not in self._given:
            raise MalformedField(f"{self.what} has no {key!r}")
        return self._given.pop(key)

    def optional(self, key: str, read: Callable[[Fields, str], _T]) -> _T | None:
        if key in self._given and self._given[key] is None:
            del self._given[key]
            return None
        return read(self, key)

    def inner(self, key: str) -> Fields:
        return Fields(self.take(key), f"{self.what}'s {key!r}")

    def number(self, key: str, most: int, *, least: int = 0) -> int:
        value = self.take(key)
        if type(value) is not int or not least <= value <= most:
            raise self._wrong(key, value, f"a number from {least} to {most}")
        return value

    def text(self, key: str, most: int) -> str:
        value = self.take(key)
        if type(value) is not str or len(value) > most:
            raise self._wrong(key, value, f"a text of at most {most} characters")
        return value

    def name(self, key: str, check: Callable[[str, str], str]) -> str:
        """Takes a name that `check(kind, name)` accepts."""
        value = self.text(key, 512)
        try:
            return check(key, value)
        except InvalidRequest as error:
            raise MalformedField(
                f"{self.what}'s {key} {ascii(value)[:80]} is refused: {error.why}"
            ) from error

    def one_of(self, key: str, values: Sequence[_T]) -> _T:
        value = self.take(key)
        for allowed in values:
            if type(value) is type(allowed) and value == allowed:
                return allowed
        raise self._wrong(key, value, " or ".join(map(repr, values)))

    def hex_bytes(self, key: str, length: int) -> bytes:
        value = self.take(key)
        if type(value) is not str or len(value) != 2 * length or _HEX.fullmatch(value) is None:
            raise self._wrong(key, value, f"{2 * length} hex digits")
        return bytes.fromhex(value)

    def hex_numbers(self, key: str, most: int) -> dict[str, int]:
        """Takes an object whose values are numbers of 16 hex digits."""
        inner = self.inner(key)
        if len(inner._given) > most:
            raise MalformedField(f"{inner.what} has {len(inner._given)} entries, at most {most} are read")
        return {name: int.from_bytes(inner.hex_bytes(name, 8), "big") for name in list(inner._given)}

    def items(self, key: str, most: int) -> list[Any]:
        value = self.take(key)
        if type(value) is not list or len(value) > most:
            raise self._wrong(key, value, f"a list of at most {most} items")
        return value

    def numbers(self, key: str, most_items: int, most: int) -> tuple[int, ...]:
        value = self.items(key, most_items)
        if any(type(x) is not int or not 0 <= x <= most for x in value):
            raise self._wrong(key, value, f"numbers from 0 to {most}")
        return tuple(value)

    def pair_of_numbers(self, key: str, most: int) -> tuple[int, int]:
        value = self.numbers(key, 2, most)
        if len(value) != 2:
            raise self._wrong(key, list(value), "two numbers")
        return value[0], value[1]

    def shape(self, key: str, dims: int, elements: int) -> tuple[int, ...]:
        """Takes a shape; dims of 0 are passed over in the bound, as other readers multiply from the left."""
        value = self.numbers(key, dims, elements)
        if math.prod(filter(None, value)) > elements:
            raise self._wrong(key, list(value), f"at most {elements} elements")
        return value

    def all_numbers(self, most: int) -> dict[str, int]:
        """Takes all that is left, as numbers by name."""
        return {key: self.number(key, most) for key in list(self._given)}

    def _wrong(self, key: str, value: object, expected: str) -> MalformedField:
        return MalformedField(f"{self.what}'s {key!r} is {_shown(value)}, expected {expected}")


def _shown(value: object) -> str:
    if isinstance(value, (list, dict)):
        return f"a {type(value).__name__} of {len(value)}"
    return ascii(value)[:80] if not isinstance(value, int) or abs(value) < 1 << 256 else "a huge number"
