"""The layout language: text to abstract syntax and back, `parse(show(layout)) == layout`.

Taught in docs/language.md.
"""

from __future__ import annotations

from ckptd.layout.language.parse import parse
from ckptd.layout.language.show import show

__all__ = ["parse", "show"]
