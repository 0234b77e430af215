"""Layouts of frameworks and model families, as `.layout` files; users write their own the same way."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from ckptd.errors import InvalidRequest
from ckptd.layout.expressions import Layout
from ckptd.layout.language import parse

_SUFFIX = ".layout"


@cache
def names() -> tuple[str, ...]:
    """All presets, sorted."""
    found = (entry.name for entry in files(__name__).iterdir() if entry.name.endswith(_SUFFIX))
    return tuple(sorted(name.removesuffix(_SUFFIX) for name in found))


def text(name: str) -> str:
    """The preset as it was written, with its comments.

    Raises: InvalidRequest: no such preset.
    """
    if name not in names():
        raise InvalidRequest(f"there is no preset {name}", next=f"presets are: {', '.join(names())}")
    return files(__name__).joinpath(name + _SUFFIX).read_text("utf-8")


@cache
def load(name: str) -> Layout:
    """The preset.

    Raises: InvalidRequest: no such preset.
    """
    return parse(text(name))
