"""A layout from its text.

The grammar gives a tree; here it becomes the abstract syntax, and every name that is used must be
declared, so that a mistake is shown where it was written and not where a mesh is given to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from lark import Token, Tree

from ckptd.layout.expressions import (
    Arith,
    As,
    Average,
    Axis,
    Drop,
    Grid,
    Layout,
    On,
    Pattern,
    Rep,
    Rest,
    Rule,
    Store,
    Tied,
    Transposed,
    Verb,
    When,
)
from ckptd.layout.language import hints
from ckptd.layout.language.reader import Child, Node, Reader, position, tree_of
from ckptd.layout.language.scan import Source, scan

MAX_ITEMS = 5_000
# safetensors' names; a layout may spell them in small letters.
DTYPES = (
    "BOOL", "F4", "F6_E2M3", "F6_E3M2", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ",
    "F8_E5M2FNUZ", "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "C64", "F64", "I64", "U64",
)  # fmt: skip
FUNCTIONS = ("lcm", "min", "max", "ceil")


def parse(text: str) -> Layout:
    """The layout that the text describes.

    Raises: LayoutSyntax: it is not of the language; with line, column and a hint.
    """
    source = scan(text)
    return _Items(source, tree_of(source, "layout")).read()


class _Items:
    """Reads the items in two passes: what declares names, then what uses them."""

    def __init__(self, source: Source, tree: Node) -> None:
        self.source, self.reader = source, Reader(source)
        self.name, self.head, *items = tree.children
        if len(items) > MAX_ITEMS:
            raise source.error(f"a layout has at most {MAX_ITEMS} items", position(items[MAX_ITEMS]))
        self.items = [item for item in items if item is not None]
        self.parameters: list[str] = []
        self.mesh: Grid = ()
        self.folds: list[tuple[Grid, Grid]] = []
        self.lets: dict[str, Arith] = {}
        self.states: dict[str, str] = {}

    def read(self) -> Layout:
        self._parameters()
        self._mesh()
        for item in self._of("let"):
            self._let(item)
        for item in self._of("states"):
            self._states(item)
        rules = tuple(self._rule(item) for item in self._of("rule"))
        stores = tuple(self._store(item) for item in self._of("store"))
        self._refuse_duplicates(rules)
        return Layout(
            str(self.name), tuple(self.parameters), self.mesh, tuple(self.folds), tuple(self.lets.items()),
            tuple(self.states.items()), rules, stores,
        )  # fmt: skip

    def _of(self, kind: str) -> list[Node]:
        return [item for item in self.items if not isinstance(item, str) and item.data == kind]

    # --- what declares names -----------------------------------------------------------------------

    def _parameters(self) -> None:
        for token in getattr(self.head, "children", ()):
            if token is not None:
                self._declare(token, self.parameters, "parameter")
                self.parameters.append(str(token))
        self.reader.sizes += self.parameters

    def _mesh(self) -> None:
        items = self._of("mesh")
        if len(items) > 1:
            raise self.source.error(
                "a layout has one mesh", position(items[1]), "put all axes into one mesh item"
            )
        for item in items:
            own, *folds = item.children
            self.mesh = self._axes(own)
            for axes, of in zip(folds[::2], folds[1::2], strict=True):
                self.folds.append((self._axes(axes), self.reader.grid(of, list(self.mesh))))
        self.reader.sizes += [axis for axis in self.reader.axes if axis not in self.parameters]

    def _axes(self, grid: Child) -> Grid:
        """Declares a grid's axes.  A parameter may have the name of an axis: it is that axis's size."""
        assert isinstance(grid, Tree)
        for token in grid.children:
            self._declare(token, self.reader.axes, "mesh axis")
            self.reader.axes.append(str(token))
        return tuple(map(str, grid.children))

    def _declare(self, token: Child, taken: Sequence[str], what: str) -> None:
        name = str(token)
        if name in taken:
            raise self.source.error(
                f"{name} is declared twice", position(token), f"give this {what} another name"
            )
        if name in FUNCTIONS or name == "_":
            meant = "the logical dimension's own size" if name == "_" else "a function"
            raise self.source.error(f"{name} is {meant}", position(token), f"give this {what} another name")

    def _let(self, item: Node) -> None:
        token, value = item.children
        self._declare(token, self.reader.sizes, "name")
        self.lets[str(token)] = self.reader.arithmetic(value, 0)
        self.reader.sizes.append(str(token))

    def _states(self, item: Node) -> None:
        for state in item.children:
            assert not isinstance(state, str) and state is not None
            name, dtype = state.children
            if str(name) in self.states:
                raise self.source.error(f"the state {name} is here twice", position(name), "name it once")
            self.states[str(name)] = self._dtype(dtype)

    def _dtype(self, token: Child) -> str:
        dtype = str(token)
        if dtype.upper() not in DTYPES:
            raise self.source.error(
                f"{dtype} is no dtype", position(token), hints.unknown(dtype.upper(), list(DTYPES), "dtype")
            )
        return dtype

    # --- what uses them ----------------------------------------------------------------------------

    def _rule(self, item: Node) -> Rule:
        name, *rest = item.children
        axes: tuple[Axis | Rest, ...] | None = None
        pieces: tuple[Pattern, ...] = ()
        verbs = []
        for child in rest:
            if not isinstance(child, Tree):
                continue  # the colon, and the placeholders of what is not there
            if child.data == "axes":
                axes = self.reader.dimensions(child)
            elif child.data == "pieces":
                pieces = tuple(self.reader.pattern(piece) for piece in child.children)
            else:
                verbs.append(self._verb(child))
        return Rule(self.reader.pattern(name), axes, pieces, tuple(verbs), self.source.line(position(name)))

    def _verb(self, node: Node) -> Verb:
        reader, children = self.reader, node.children
        match node.data:
            case "rep":
                return Rep(reader.grid(children[0], reader.axes))
            case "average":
                return Average(reader.grid(children[0], reader.axes))
            case "on":
                axis = reader.known(cast(Token, children[0]), reader.axes, "mesh axis")
                return On(axis, reader.arithmetic(children[1], 0))
            case "tied":
                return Tied(reader.pattern(children[0]))
            case "as_dtype":
                return As(self._dtype(children[0]))
            case "when":
                return When(reader.arithmetic(children[0], 0))
            case "drop":
                return Drop()
        assert node.data == "transposed", node.data
        return Transposed()

    def _store(self, item: Node) -> Store:
        path, key, flat, when = item.children
        buffer = self.reader.flat(flat)
        also = ("state",) if buffer is None else ("state", buffer.order)
        return Store(
            self.reader.pattern(path, also),
            self.reader.pattern(key, also),
            buffer,
            line=self.source.line(position(path)),
            when=None if when is None else self.reader.arithmetic(when, 0),
        )

    def _refuse_duplicates(self, rules: tuple[Rule, ...]) -> None:
        """Two rules that claim the same tensors, whatever mesh and tensors are given."""
        first: dict[object, Rule] = {}
        for rule, item in zip(rules, self._of("rule"), strict=True):
            if any(isinstance(verb, When) for verb in rule.verbs):
                continue  # at most one of them may hold
            key = (rule.pieces or (rule.name,), None if rule.axes is None else len(rule.axes), _is_open(rule))
            other = first.setdefault(key, rule)
            if other is not rule:
                raise self.source.error(
                    f"line {other.line} has a rule for the same tensors",
                    position(item),
                    "remove one of the two",
                )


def _is_open(rule: Rule) -> bool:
    return rule.axes is not None and bool(rule.axes) and isinstance(rule.axes[-1], Rest)
