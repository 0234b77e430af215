"""What to say of a mistake: what was found and what to write instead, for the mistakes that people make."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from lark import Token, Tree
from lark.exceptions import UnexpectedCharacters, UnexpectedInput, UnexpectedToken

from ckptd.errors import LayoutSyntax
from ckptd.layout.language.scan import Source

VERBS = ("rep", "on", "tied", "avg", "drop", "as", "transposed", "when")
ITEMS = ("mesh", "let", "states", "store")
STEPS = ("align", "strip", "then")

_WORDS = {
    "COLON": "`:`", "EQUAL": "`=`", "COMMA": "`,`", "LPAR": "`(`", "RPAR": "`)`", "LSQB": "`[`",
    "RSQB": "`]`", "LBRACE": "`{`", "RBRACE": "`}`", "STAR": "`*`", "VBAR": "`|`", "AT": "`@`",
    "CIRCUMFLEX": "`^`", "LESSTHAN": "`<`", "MORETHAN": "`>`", "_DOUBLE_COLON": "`::`", "_ELLIPSIS": "`...`",
    "NAME": "a name", "INT": "a number", "BARE": "a tensor's name", "STRING": "a quoted name",
    "WORD": "the layout's name", "_SEP": "a new line",
    "PLUS_MINUS": "`+`", "TIMES_OVER": "`*`", "FUNCTION": "a function",
    "_LAYOUT": "`layout`", "_FOLD": "`fold`", "_CAT": "`cat`",
}  # fmt: skip


@dataclass(frozen=True)
class Found:
    """Where the grammar got stuck."""

    text: str  # the word or character there; "" at the end
    before: str  # the item's text up to there (before the body: the header's)
    after: str  # and from there on, to the end of the line
    expected: frozenset[str]  # names of terminals
    start: str  # what is being read: layout | index
    in_body: bool


def explain(source: Source, error: UnexpectedInput, begin: int, start: str) -> LayoutSyntax:
    """Where and what the mistake is; positions in `error` count from `begin`."""
    at, expected = begin + _position(error, source, begin), _expected(error)
    code = source.code
    line_end = code.find("\n", at)
    word = re.match(r'[A-Za-z_][A-Za-z0-9_]*|[0-9]+|"[^"]*"?|::|\.\.\.|[^\n]', code[at:])
    body = code.find("{", 0, at)
    item = max(code.rfind("\n", 0, at), code.rfind(";", 0, at), body, begin - 1) + 1
    found = Found(
        "" if word is None else word[0],
        code[item:at].strip(),
        code[at : line_end if line_end >= 0 else len(code)].strip(),
        expected,
        start,
        body >= 0,
    )
    for rule in _RULES:
        hint = rule(found)
        if hint:
            break
    else:
        hint = f"write {_listed(expected)}" if expected else ""
    what = f"{found.text} does not belong here" if found.text else "the text ends too early"
    if code[at : at + 1] == "\n":
        what = "the line ends too early"
    return source.error(what, at, hint)


def unknown(name: str, known: Sequence[str], what: str) -> str:
    """The hint for a name that is not declared: the closest one, or all."""
    close = closest(name, known)
    if close:
        return f"did you mean {close}?"
    if not known:
        declare = (
            "declare it: `mesh a * b`" if what == "mesh axis" else "declare it as a parameter or by `let`"
        )
        return f"the layout has no {what} at all; {declare}"
    return f"known here: {', '.join(known[:24])}{', ...' if len(known) > 24 else ''}"


def closest(name: str, known: Iterable[str]) -> str:
    """The known word most like this one, or "" if none is."""
    found = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return found[0] if found else ""


def not_a_number(node: Tree[Token], at: int) -> tuple[str, int, str]:
    """(what, where, hint) for an axis where a size belongs."""
    hint = {
        "product": "sizes are multiplied by *: write a * b",
        "split": "a grid of several axes is in parentheses: @(a*b); and only axes are split",
        "pad": "a multiple that is computed is in parentheses: ^(128*tp); and only axes are padded",
        "sum": "a sum {a,b} is an axis of its own: write {a,b} f, not {a,b} * f",
    }[str(node.data)]
    return f"a {node.data} is no number", at, hint


def _position(error: UnexpectedInput, source: Source, begin: int) -> int:
    if isinstance(error, UnexpectedToken) and error.token.type == "$END":
        return len(source.code.rstrip()) - begin if begin == 0 else error.token.end_pos or 0
    return max(error.pos_in_stream or 0, 0)


def _expected(error: UnexpectedInput) -> frozenset[str]:
    if isinstance(error, UnexpectedToken):
        return frozenset(error.expected)
    return frozenset(error.allowed or ()) if isinstance(error, UnexpectedCharacters) else frozenset()


def _listed(expected: Iterable[str]) -> str:
    shown = sorted({_WORDS.get(name, f"`{name.strip('_').lower()}`") for name in expected if name != "$END"})
    return " or ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


# --- one rule for each kind of mistake; the first that knows the mistake gives the hint ------------


def _no_header(found: Found) -> str:
    if "_LAYOUT" in found.expected:
        return "a layout begins with `layout NAME(parameters) {`"
    if not found.in_body and found.start == "layout" and "LBRACE" in found.expected:
        return "after the layout's name come its parameters in (...) and its items in {...}"
    return ""


def _after_the_end(found: Found) -> str:
    ended = found.expected <= {"$END", "_SEP"} and found.start == "layout"
    return "the layout ended with its }; a text holds one layout" if ended else ""


def _comment(found: Found) -> str:
    marks = ("//", "/*", "--")
    is_comment = found.after.startswith(marks) or found.before.startswith(marks)
    return "a comment begins with #" if is_comment else ""


def _brackets_in_a_name(found: Found) -> str:
    glued = (
        found.text == "["
        and re.search(r"[A-Za-z0-9_}]$", found.before)
        and re.match(r"\[[^\]]*\]\s*[:=.\w]", found.after)
    )
    return 'a name with brackets is in quotes: "groups[{g}]"' if glued else ""


def _no_colon(found: Found) -> str:
    if "COLON" in found.expected and found.text == "[":
        return "write `:` between the name and its axes: `name : [a, b]`"
    if found.before.startswith("store") and "_DOUBLE_COLON" in found.expected:
        return 'write `::` between the path and the key: store "path" :: key'
    if "COLON" in found.expected and found.before.startswith("states"):
        return "a state has a dtype: `states param: bf16, exp_avg: f32`"
    return ""


def _item_word(found: Found) -> str:
    """A misspelt `mesh`, `let`, ...: it was taken for a tensor's name."""
    if "COLON" not in found.expected or not re.fullmatch(r"[A-Za-z]+", found.before):
        return ""
    if found.before == "fold":
        return "a fold stands behind the mesh: `mesh a * b, fold c * d = a * b`"
    close = closest(found.before, ITEMS)
    return f"did you mean {close}?" if close else "a rule is `name : [axes] = logical names`"


def _verb(found: Found) -> str:
    if "_REP" not in found.expected or not re.match(r"[A-Za-z_\"{]", found.text):
        return ""
    close = closest(found.text, VERBS)
    if close:
        return f"did you mean {close}? verbs are {', '.join(VERBS)}"
    if found.before.endswith("]") and "EQUAL" in found.expected:
        return "write `=` between the axes and the logical names: `name : [a, b] = layers.{l}.x`"
    return f"{found.text} is no verb; they are {', '.join(VERBS)}; further logical names come after `|`"


def _step(found: Found) -> str:
    if "_STRIP" not in found.expected or not re.match(r"[A-Za-z_]", found.text):
        return ""
    close = closest(found.text, STEPS)
    return f"did you mean {close}?" if close else "steps are align n, ^n, @axis, then, strip"


def _operator_without_operand(found: Found) -> str:
    if found.before.endswith("@"):
        return "@ needs a mesh axis: @tp, or @(tp*dp), the fastest first"
    if found.before.endswith("^"):
        return "^ needs a number: ^128, or ^(128*tp)"
    for verb, needs in {
        "rep": "axes: rep tp*dp", "avg": "axes: avg dp", "tied": "a name: tied embed.weight",
        "as": "a dtype: as BF16", "on": "an axis and a coordinate: on pp 0", "when": "a number: when tied",
    }.items():  # fmt: skip
        if re.search(rf"(^|\s){verb}(\s+\w+)?$" if verb == "on" else rf"(^|\s){verb}$", found.before):
            return f"{verb} needs {needs}"
    return ""


def _grid_in_the_open(found: Found) -> str:
    starred = found.text == "*" and re.search(r"@\w+$", found.before)
    return "a grid of several axes is in parentheses: @(a*b)" if starred else ""


def _doubled(found: Found) -> str:
    if found.text == "=" and found.before.endswith("="):
        return "write one ="
    if found.text in (",", "]") and found.before.endswith((",", "[")):
        return "a dimension is missing: write its size, or _ for as it is"
    return ""


def _no_equals(found: Found) -> str:
    if found.before.startswith("let ") and "EQUAL" in found.expected:
        return "write `let name = value`"
    if found.before.startswith("mesh ") and "EQUAL" in found.expected:
        return "a fold says what it refactors: `fold c * d = a * b`"
    return ""


def _mesh(found: Found) -> str:
    if not found.before.startswith("mesh "):
        return ""
    if found.text == "," or "STAR" in found.expected or "_FOLD" in found.expected:
        return "axes are joined by *, the fastest first: `mesh a * b, fold c * d = a * b`"
    return ""


def _negative(found: Found) -> str:
    return (
        "there are no negative numbers; subtract: (pp - 1)"
        if found.text == "-" and "INT" in found.expected
        else ""
    )


def _index(found: Found) -> str:
    if found.start != "index":
        return ""
    if found.text == "," or not found.before:
        return "an index is {name} or {name@axis}; two tensors are two rules, or pieces joined by |"
    return "an index is {l}, {l@pp}, {l@(pp*vp)}, {e@ep<3,2,3>}, {l@pp+1} or {tp:02}"


def _flat(found: Found) -> str:
    if "_CAT" in found.expected:
        return 'a buffer is cat(module)[ steps ]: store "path" :: key = cat(module)[ ^dp @dp ]'
    return ""


_RULES: tuple[Callable[[Found], str], ...] = (
    _comment, _no_header, _after_the_end, _index, _operator_without_operand, _brackets_in_a_name, _no_equals,
    _no_colon, _mesh, _item_word, _doubled, _step, _verb, _grid_in_the_open, _negative, _flat,
)  # fmt: skip
