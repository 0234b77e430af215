"""The tree's axes, sizes and names as abstract syntax; a name that is used must be declared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from importlib.resources import files
from typing import Literal, cast

from lark import Lark, Token, Tree
from lark.exceptions import UnexpectedInput

from ckptd.layout.expressions import (
    Align,
    Arith,
    Axis,
    Call,
    Extent,
    Flat,
    Grid,
    Index,
    Name,
    Number,
    Operation,
    Pad,
    PadTo,
    Pattern,
    Product,
    Rest,
    Split,
    SplitOver,
    Step,
    Strip,
    Sum,
)
from ckptd.layout.language import hints, names
from ckptd.layout.language.scan import MAX_DEPTH, Source

Node = Tree[Token]
Child = Node | Token | None

MAX_DIGITS = 18  # of a number: sizes are 64-bit integers
FILLS = {"zero": "zero", "0": "zero", "last": "last", "none": "none"}


@cache
def grammar() -> Lark:
    """The parser, made once."""
    text = files("ckptd.layout.language").joinpath("grammar.lark").read_text("utf-8")
    return Lark(
        text, parser="lalr", start=["layout", "index"], propagate_positions=True, maybe_placeholders=True
    )


def tree_of(source: Source, start: str, begin: int = 0, end: int | None = None) -> Node:
    """The tree of a part of the text.  Raises: LayoutSyntax."""
    try:
        return grammar().parse(source.code[begin:end], start=start)
    except UnexpectedInput as error:
        raise hints.explain(source, error, begin, start) from None


def position(node: Child, default: int = 0) -> int:
    """Where a node begins in the text."""
    if isinstance(node, Token):
        return node.start_pos or 0
    if isinstance(node, Tree) and not node.meta.empty:
        return node.meta.start_pos
    return default


class Reader:
    """Makes abstract syntax of the tree's nodes, and refuses names that are not declared."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.axes: list[str] = []  # of the mesh and of its folds
        self.sizes: list[str] = []  # all names that have a value

    # --- names -------------------------------------------------------------------------------------

    def pattern(self, token: Child, also: tuple[str, ...] = ()) -> Pattern:
        """A tensor's, file's or key's name; its indices are sizes that are known, or `also` these."""
        assert isinstance(token, Token) and token.start_pos is not None
        begin = token.start_pos
        return names.read(
            self.source, begin, begin + len(token), lambda low, high: self._index(low, high, also)
        )

    def _index(self, begin: int, end: int, also: tuple[str, ...]) -> Index:
        tree = tree_of(self.source, "index", begin, end)
        id, places, widths, sign, start, colon, digits = tree.children
        assert isinstance(id, Token)
        self.known(id, [*self.sizes, *also], "index", begin)
        grid = () if places is None else self.grid(places, self.sizes, begin)
        first = Number(0) if start is None else self.arithmetic(start, 0, begin)
        if sign == "-":
            raise self.source.error(
                "an index counts from + a number", begin + position(sign), "write + for -"
            )
        if colon is not None and (not str(digits).startswith("0") or int(str(digits)[:9]) > 32):
            hint = "write {tp:02} for two digits"
            raise self.source.error(f"the format :{digits} is not 0 and a number of digits", begin, hint)
        return Index(
            str(id), grid, first, self.widths(widths, begin), 0 if digits is None else int(str(digits))
        )

    def known(self, token: Token, known: list[str], what: str, offset: int = 0) -> str:
        """The token's text. Raises: LayoutSyntax: it is not among those known."""
        if str(token) not in known:
            raise self.source.error(
                f"{token} is no {what} of this layout",
                offset + position(token),
                hints.unknown(str(token), known, what),
            )
        return str(token)

    def grid(self, node: Child, known: list[str], offset: int = 0) -> Grid:
        """Mesh axes, the fastest first. Raises: LayoutSyntax: unknown, or one twice."""
        assert isinstance(node, Tree)
        found: list[str] = []
        for token in node.children:
            assert isinstance(token, Token)
            if token in found:
                raise self.source.error(
                    f"{token} is twice in one grid", offset + position(token), "name it once"
                )
            found.append(self.known(token, known, "mesh axis", offset))
        return tuple(found)

    def widths(self, node: Child, offset: int = 0) -> tuple[int, ...] | None:
        if node is None:
            return None
        assert isinstance(node, Tree)
        return tuple(self.number(token, offset) for token in node.children)

    # --- arithmetic --------------------------------------------------------------------------------

    def number(self, token: Child, offset: int = 0) -> int:
        assert isinstance(token, Token)
        if len(token) > MAX_DIGITS:
            raise self.source.error(f"a number has at most {MAX_DIGITS} digits", offset + position(token))
        return int(token)

    def arithmetic(self, node: Child, depth: int, offset: int = 0, *, own: bool = False) -> Arith:
        """A size. `own`: `_` is a size, too (that of the logical dimension)."""
        assert isinstance(node, Tree)
        at, children = offset + position(node), node.children
        self._check_depth(depth, at)
        match node.data:
            case "number":
                return Number(self.number(children[0], offset))
            case "name":
                assert isinstance(children[0], Token)
                known = [*self.sizes, "_"] if own else self.sizes
                return Name(self.known(children[0], known, "name", offset))
            case "group":
                return self.arithmetic(children[0], depth, offset, own=own)
            case "call":
                given = tuple(self.arithmetic(child, depth + 1, offset, own=own) for child in children[1:])
                function = str(children[0])
                if function == "ceil" and len(given) != 2:
                    raise self.source.error(
                        "ceil takes two numbers", at, "write ceil(a, b): a / b, rounded up"
                    )
                return Call(cast(Literal["lcm", "min", "max", "ceil"], function), given)
            case "plus" | "times":
                self._check_depth(depth + len(children) // 2, at)
                result = self.arithmetic(children[0], depth + len(children) // 2, offset, own=own)
                for sign, operand in zip(children[1::2], children[2::2], strict=True):
                    right = self.arithmetic(operand, depth + 1, offset, own=own)
                    result = Operation(cast(Literal["+", "-", "*", "/"], str(sign)), result, right)
                return result
        raise self.source.error(*hints.not_a_number(node, at))

    def _check_depth(self, depth: int, at: int) -> None:
        if depth > MAX_DEPTH:
            raise self.source.error(
                f"an expression is nested deeper than {MAX_DEPTH}", at, "name parts by `let`"
            )

    # --- axes --------------------------------------------------------------------------------------

    def dimensions(self, node: Child) -> tuple[Axis | Rest, ...] | None:
        """A rule's `[...]`."""
        if node is None:
            return None
        assert isinstance(node, Tree)
        children: list[Child] = [*node.children]
        found: list[Axis | Rest] = []
        for child in children:
            if child is None:
                continue  # the placeholder of `[]`
            if found and isinstance(found[-1], Rest):
                raise self.source.error(
                    "... is not the last dimension", position(child), "put ... at the end, once"
                )
            assert isinstance(child, Tree)
            found.append(Rest() if child.data == "rest" else self.axis(child, 0))
        return tuple(found)

    def axis(self, node: Child, depth: int) -> Axis:
        """One dimension."""
        assert isinstance(node, Tree)
        at, children = position(node), node.children
        self._check_depth(depth, at)
        match node.data:
            case "product":
                return Product(tuple(self._factors(children, depth + 1)))
            case "sum":
                return self._sum(children, depth)
            case "split":
                inner = self.axis(children[0], depth + 1)
                return Split(inner, self.grid(children[1], self.sizes), self.widths(children[2]))
            case "pad":
                inner = self.axis(children[0], depth + 1)
                return Pad(inner, self.arithmetic(children[1], depth + 1, own=True), self._fill(children[2]))
            case "group":
                return self.axis(children[0], depth)
        return Extent(self.arithmetic(node, depth, own=True))

    def _factors(self, children: Sequence[Child], depth: int) -> Iterator[Axis]:
        """Products within a product are that product: row-major order is associative."""
        for child in children:
            factor = self.axis(child, depth)
            if isinstance(factor, Product):
                yield from factor.factors
            else:
                yield factor

    def _sum(self, children: Sequence[Child], depth: int) -> Sum:
        parts: dict[str, Arith] = {}
        for child in children:
            assert isinstance(child, Tree)
            label, size = child.children
            if str(label) in parts:
                raise self.source.error(f"the summand {label} is here twice", position(label), "rename one")
            parts[str(label)] = Number(1) if size is None else self.arithmetic(size, depth + 1, own=True)
        return Sum(tuple(parts.items()))

    def _fill(self, token: Child) -> Literal["zero", "last", "none"]:
        fill = FILLS.get("zero" if token is None else str(token))
        if fill is None:
            hint = "write =zero, =last (repeat the last index) or =none (only read)"
            raise self.source.error(f"{token} is no fill", position(token), hint)
        return cast(Literal["zero", "last", "none"], fill)

    # --- flat buffers ------------------------------------------------------------------------------

    def flat(self, node: Child) -> Flat | None:
        if node is None:
            return None
        assert isinstance(node, Tree)
        order, item, _, whole = node.children
        is_reversed = isinstance(order, Tree)
        name = str(order.children[0] if isinstance(order, Tree) else order)
        return Flat(name, is_reversed, self._steps(item), self._steps(whole))

    def _steps(self, node: Child) -> tuple[Step, ...]:
        return () if node is None else tuple(self._step(child) for child in cast(Node, node).children)

    def _step(self, node: Child) -> Step:
        assert isinstance(node, Tree)
        match node.data:
            case "align":
                return Align(self.arithmetic(node.children[0], 0))
            case "pad_to":
                return PadTo(self.arithmetic(node.children[0], 0))
            case "split_over":
                return SplitOver(self.grid(node.children[0], self.axes))
        return Strip()
