"""Names with axes, as text: `layers.{l@pp}.*` and `"any text, {tp:02}"`, read and printed.

Without quotes a name has letters, digits and `_ . - /`.  Within quotes it has anything; a backslash makes
plain characters of `" \\ { } *`, and there are `\\n`, `\\t`, `\\uXXXX`, `\\UXXXXXXXX`.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from ckptd.layout.expressions import Index, Pattern, Text, Wild
from ckptd.layout.language.scan import Source

# These begin an item, so a rule for a tensor of this name has it in quotes.
ITEM_WORDS = ("mesh", "let", "states", "store")
MAX_PARTS = 64

_BARE = re.compile(r"[A-Za-z0-9_./-]+")
_SPECIAL = '"\\{}*'
_ESCAPES = {"n": "\n", "t": "\t"} | {char: char for char in _SPECIAL}

# Reads the inside of `{...}` that lies at [begin, end) of the text.
ReadIndex = Callable[[int, int], Index]


def read(source: Source, begin: int, end: int, index: ReadIndex) -> Pattern:
    """The name that lies at [begin, end) of the text, quotes included.

    Raises: LayoutSyntax: empty, an unknown escape, or an index that is none.
    """
    code = source.code
    quoted = code[begin] == '"'
    at, stop = (begin + 1, end - 1) if quoted else (begin, end)
    parts: list[Text | Index | Wild] = []
    text: list[str] = []
    while at < stop:
        char = code[at]
        if char == "\\":
            value, at = _escape(source, at)
            text.append(value)
            continue
        if char in "*{":
            if text:
                parts.append(Text("".join(text)))
                text = []
            close = at if char == "*" else code.find("}", at, stop)
            if close < 0:
                raise source.error(
                    "this { is never closed", at, "close it with }, or write \\{ for the character"
                )
            parts.append(Wild() if char == "*" else index(at + 1, close))
            at = close + 1
        elif char == "}":
            raise source.error("this } closes nothing", at, "write \\} for the character")
        else:
            text.append(char)
            at += 1
    if text:
        parts.append(Text("".join(text)))
    if not parts:
        raise source.error("a name cannot be empty", begin, "write the tensor's name, or * for any")
    if len(parts) > MAX_PARTS:
        raise source.error(f"a name has at most {MAX_PARTS} parts", begin)
    return tuple(parts)


def show(pattern: Pattern, index: Callable[[Index], str], *, quoted: bool = False) -> str:
    """The name as `read` reads it; in quotes where it must be, or where asked."""
    texts = [part.value for part in pattern if isinstance(part, Text)]
    if quoted or not all(map(_BARE.fullmatch, texts)) or "".join(texts) in ITEM_WORDS:
        return f'"{"".join(_part(part, index, _quoted) for part in pattern)}"'
    return "".join(_part(part, index, str) for part in pattern)


def _part(part: Text | Index | Wild, index: Callable[[Index], str], text: Callable[[str], str]) -> str:
    if isinstance(part, Text):
        return text(part.value)
    return "*" if isinstance(part, Wild) else index(part)


def _quoted(text: str) -> str:
    return "".join(f"\\{char}" if char in _SPECIAL else _visible(char) for char in text)


def _visible(char: str) -> str:
    if char.isprintable():
        return char
    return f"\\u{ord(char):04x}" if ord(char) < 0x10000 else f"\\U{ord(char):08x}"


def _escape(source: Source, at: int) -> tuple[str, int]:
    """(the character that the escape at `at` means, the position after it)."""
    kind = source.code[at + 1]
    if kind in _ESCAPES:
        return _ESCAPES[kind], at + 2
    width = {"u": 4, "U": 8}.get(kind, 0)
    digits = source.code[at + 2 : at + 2 + width]
    if width and re.fullmatch(rf"[0-9A-Fa-f]{{{width}}}", digits) and int(digits, 16) < 0x110000:
        return chr(int(digits, 16)), at + 2 + width
    raise source.error(
        f"the escape \\{kind} means nothing", at, 'known are \\" \\\\ \\{ \\} \\* \\n \\t \\uXXXX \\UXXXXXXXX'
    )
