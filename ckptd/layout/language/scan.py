"""Before the grammar: bounds on the text, comments, quotes, brackets, and which newlines end an item.

What comes out has the length of what went in, so that a position in one is the position in the other.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ckptd.errors import LayoutSyntax

MAX_BYTES = 1 << 20
MAX_DEPTH = 64
MAX_TOKENS = 30_000  # so that any text is read or refused within about a second

_TOKEN = re.compile(r'[A-Za-z0-9_./-]+|"(?:\\.|[^"\\\n])*"|[^ \n]')
_CLOSING = {"(": ")", "[": "]", "{": "}"}
_BLANKS = (" ", "\n")
_GO_ON_AFTER = ("=", "|", ",")  # at the end of a line
_GO_ON_BEFORE = ("=", "|", ",", ":")  # at the beginning of the next
_WIDTH = 100  # characters of a line that a message shows

# Characters that look like the language's and are not.
_LOOKS_LIKE = {
    "\u201c": '"', "\u201d": '"', "\u201e": '"', "\u00ab": '"', "\u00bb": '"', "\u2018": '"', "\u2019": '"',
    "'": '"', "`": '"', "\u00d7": "*", "\u00b7": "*", "\u2217": "*", "\u2013": "-", "\u2014": "-",
    "\u2212": "-",
    "\u2026": "...", "\u00f7": "/", "\u2215": "/", "\uff1a": ":", "\uff0c": ",", "\u2223": "|",
    "\u00a0": "a space", "\ufeff": "nothing (a byte order mark)", "\u200b": "nothing (a zero-width space)",
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A layout's text, and `code`: the same with comments and the newlines inside of items blanked."""

    text: str
    code: str

    def error(self, what: str, position: int, hint: str = "") -> LayoutSyntax:
        """A mistake at this position of the text."""
        return mistake(self.text, what, position, hint)

    def line(self, position: int) -> int:
        """The line, from 1."""
        return self.text.count("\n", 0, position) + 1


def mistake(text: str, what: str, position: int, hint: str = "") -> LayoutSyntax:
    """The error with line, column, and the line with a caret."""
    position = min(max(position, 0), len(text))
    begin = text.rfind("\n", 0, position) + 1
    end = text.find("\n", position)
    shown, column = text[begin : end if end >= 0 else len(text)], position - begin
    cut = max(0, column - _WIDTH // 2)
    excerpt = "".join(c if c.isprintable() else " " for c in shown[cut : cut + _WIDTH])
    return LayoutSyntax(
        what if len(what) <= 2 * _WIDTH else f"{what[:_WIDTH]} ... {what[-_WIDTH // 2 :]}",
        line=text.count("\n", 0, position) + 1,
        column=column + 1,
        hint=hint,
        excerpt=f"    {excerpt}\n    {' ' * (column - cut)}^",
    )


def scan(text: str) -> Source:
    """The text as the grammar reads it.

    Raises: LayoutSyntax: too long, too deep, brackets that do not match, a string without end, or a foreign
        character.
    """
    if len(text) > MAX_BYTES or len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise mistake(
            text[: _WIDTH * 2],
            f"the text is longer than {MAX_BYTES} bytes",
            0,
            "split it into several layouts",
        )
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    code = _joined(_bare(text))
    for count, token in enumerate(_TOKEN.finditer(code)):
        if count == MAX_TOKENS:
            raise mistake(text, f"the text has more than {MAX_TOKENS} words and signs", token.start())
    return Source(text, code)


def _bare(text: str) -> str:
    """Comments blanked; refuses strings without end and characters that are not the language's."""
    out: list[str] = []
    at = 0
    while at < len(text):
        char = text[at]
        if char == '"':
            end = string_end(text, at)
            out.append(text[at:end])
            at = end
        elif char == "#":
            end = text.find("\n", at)
            end = len(text) if end < 0 else end
            out.append(" " * (end - at))
            at = end
        elif char in "\n\t " or (" " < char <= "~" and char not in _LOOKS_LIKE):
            out.append(" " if char == "\t" else char)
            at += 1
        else:
            looks = _LOOKS_LIKE.get(char)
            raise mistake(
                text,
                f"the character {char!r} is not of the language",
                at,
                f"write {looks}" if looks else "put a name with such characters into double quotes",
            )
    return "".join(out)


def string_end(text: str, begin: int) -> int:
    """The position after the string that begins here."""
    at = begin + 1
    while at < len(text) and text[at] != "\n":
        if text[at] == '"':
            return at + 1
        at += 2 if text[at] == "\\" else 1
    raise mistake(text, "this string has no end", begin, 'end it with " on the same line')


def _joined(code: str) -> str:
    """Newlines that end no item become spaces: those in brackets, and those around `=`, `|`, `,` and `::`."""
    out = list(code)
    opened: list[tuple[str, int]] = []
    at, last, following = 0, "", 0  # following: the next position, from `at`, that is no blank
    while at < len(code):
        char = code[at]
        if char == '"':
            at, last = string_end(code, at), '"'
            continue
        if char in _CLOSING:
            opened.append((char, at))
            if len(opened) > MAX_DEPTH:
                raise mistake(code, f"brackets are nested deeper than {MAX_DEPTH}", at, "name parts by `let`")
        elif char in ")]}":
            _close(code, opened, char, at)
        elif char == "\n" and _inside(opened):
            out[at] = " "
        elif char == "\n":
            while following <= at or code[following : following + 1] in _BLANKS:
                following += 1
            if last in _GO_ON_AFTER or code[following : following + 1] in _GO_ON_BEFORE:
                out[at] = " "
        if char not in " \n":
            last = char
        at += 1
    if opened:
        char, where = opened[-1]
        raise mistake(code, f"this {char} is never closed", where, f"close it with {_CLOSING[char]}")
    return "".join(out)


def _inside(opened: list[tuple[str, int]]) -> bool:
    """Whether a newline here is within an item (or before the body, where it means nothing)."""
    return len(opened) != 1 or opened[0][0] != "{"


def _close(code: str, opened: list[tuple[str, int]], char: str, at: int) -> None:
    if not opened:
        raise mistake(code, f"this {char} closes nothing", at, "remove it, or open a bracket before it")
    if char != "}" and len(opened) == 1 and opened[0][0] == "{":
        raise mistake(code, f"this {char} closes nothing", at, "remove it, or open a bracket before it")
    begun, where = opened.pop()
    if _CLOSING[begun] != char:
        line = code.count("\n", 0, where) + 1
        raise mistake(
            code,
            f"this {char} does not close the {begun} of line {line}",
            at,
            f"write {_CLOSING[begun]} first",
        )
