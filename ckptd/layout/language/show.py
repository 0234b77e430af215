"""A layout as text, in one way only: `parse(show(layout)) == layout`.

That holds for every layout in normal form, which is what `parse` makes: a Product has two factors or more and
none of them is a Product; a name has no two Texts side by side and none empty; grids and widths are not
empty; numbers are naturals; every name that is used is declared; no two rules claim the same.
"""

from __future__ import annotations

from ckptd.layout.expressions import (
    Align,
    Arith,
    As,
    Average,
    Axis,
    Call,
    Drop,
    Extent,
    Flat,
    Grid,
    Index,
    Layout,
    Name,
    Number,
    On,
    Operation,
    Pad,
    PadTo,
    Pattern,
    Product,
    Rep,
    Rest,
    Rule,
    Split,
    SplitOver,
    Step,
    Store,
    Strip,
    Sum,
    Tied,
    Transposed,
    Verb,
    When,
)
from ckptd.layout.language import names


def show(layout: Layout) -> str:
    """The layout's text, ending with a newline."""
    head = f"layout {layout.name}"
    if layout.parameters:
        head += f"({', '.join(layout.parameters)})"
    body = []
    if layout.mesh:
        folds = "".join(f", fold {' * '.join(axes)} = {' * '.join(of)}" for axes, of in layout.folds)
        body.append(f"mesh {' * '.join(layout.mesh)}{folds}")
    body += [f"let {name} = {arithmetic(value)}" for name, value in layout.lets]
    if layout.states:
        body.append("states " + ", ".join(f"{state}: {dtype}" for state, dtype in layout.states))
    for block in ([rule(one) for one in layout.rules], [store(one) for one in layout.stores]):
        if body and block:
            body.append("")
        body += block
    return "\n".join([f"{head} {{", *(f"  {line}".rstrip() for line in body), "}", ""])


def rule(given: Rule) -> str:
    """One rule, on one line."""
    shown = [pattern(given.name)]
    if given.axes is not None:
        shown.append(f": [{', '.join(map(axis, given.axes))}]")
    elif not given.pieces:
        shown.append(":")
    if given.pieces:
        shown.append("= " + " | ".join(map(pattern, given.pieces)))
    return " ".join([*shown, *map(verb, given.verbs)])


def store(given: Store) -> str:
    """One store, on one line."""
    shown = f"store {names.show(given.path, index, quoted=True)} :: {pattern(given.key)}"
    if given.flat is not None:
        shown += f" = {flat(given.flat)}"
    return shown if given.when is None else f"{shown} when {_atom(given.when)}"


def pattern(given: Pattern) -> str:
    """A name."""
    return names.show(given, index)


def index(given: Index) -> str:
    """`{l@pp+1:02}`."""
    shown = given.id
    if given.grid:
        shown += f"@{places(given.grid)}{_widths(given.widths)}"
    if given.start != Number(0):
        shown += f"+{_atom(given.start)}"
    return f"{{{shown}:0{given.digits}}}" if given.digits else f"{{{shown}}}"


def verb(given: Verb) -> str:
    """One verb with what belongs to it."""
    match given:
        case Rep(grid):
            return f"rep {'*'.join(grid)}"
        case Average(grid):
            return f"avg {'*'.join(grid)}"
        case On(mesh_axis, coordinate):
            return f"on {mesh_axis} {_atom(coordinate)}"
        case Tied(name):
            return f"tied {pattern(name)}"
        case As(dtype):
            return f"as {dtype}"
        case When(condition):
            return f"when {_atom(condition)}"
        case Drop():
            return "drop"
        case Transposed():
            return "transposed"


def axis(given: Axis | Rest) -> str:
    """One dimension."""
    match given:
        case Rest():
            return "..."
        case Extent(size):
            return arithmetic(size)
        case Product(factors):
            return " ".join(map(_factor, factors))
        case Sum(parts):
            return f"{{{', '.join(_summand(label, size) for label, size in parts)}}}"
        case Split(inner, grid, widths):
            return f"{_inner(inner)}@{places(grid)}{_widths(widths)}"
        case Pad(inner, multiple, fill):
            return f"{_inner(inner)}^{_atom(multiple)}{'' if fill == 'zero' else f'={fill}'}"


def arithmetic(given: Arith) -> str:
    """A size; with no more parentheses than it needs."""
    match given:
        case Number(value):
            return str(value)
        case Name(id):
            return id
        case Call(function, arguments):
            return f"{function}({', '.join(map(arithmetic, arguments))})"
        case Operation(sign, left, right):
            # `a - b - c` is (a - b) - c: an operand on the right of the same rank keeps its parentheses.
            rank = _rank(given)
            shown_left = arithmetic(left) if _rank(left) >= rank else f"({arithmetic(left)})"
            shown_right = arithmetic(right) if _rank(right) > rank else f"({arithmetic(right)})"
            return f"{shown_left} {sign} {shown_right}"


def flat(given: Flat) -> str:
    """`cat(order)[ steps of each item then steps of the whole ]`."""
    order = f"reversed({given.order})" if given.is_reversed else given.order
    steps = [step(one) for one in given.per_item]
    if given.whole:
        steps += ["then", *(step(one) for one in given.whole)]
    return f"cat({order})[ {' '.join(steps)} ]" if steps else f"cat({order})"


def step(given: Step) -> str:
    """One step of a flat buffer."""
    match given:
        case Align(multiple):
            return f"align {_atom(multiple)}"
        case PadTo(multiple):
            return f"^{_atom(multiple)}"
        case SplitOver(grid):
            return f"@{places(grid)}"
        case Strip():
            return "strip"


def places(grid: Grid) -> str:
    """What stands after `@`."""
    return grid[0] if len(grid) == 1 else f"({'*'.join(grid)})"


def _rank(given: Arith) -> int:
    if not isinstance(given, Operation):
        return 2
    return 0 if given.sign in "+-" else 1


def _atom(given: Arith) -> str:
    return f"({arithmetic(given)})" if isinstance(given, Operation) else arithmetic(given)


def _summand(label: str, size: Arith) -> str:
    return label if size == Number(1) else f"{label}: {arithmetic(size)}"


def _factor(given: Axis) -> str:
    assert not isinstance(given, Product), "a product's factors are no products"
    return f"({axis(given)})" if _is_operation(given) else axis(given)


def _inner(given: Axis) -> str:
    """What a split or a pad is of."""
    if isinstance(given, Product) or _is_operation(given):
        return f"({axis(given)})"
    return f"{axis(given)} " if isinstance(given, (Split, Pad)) else axis(given)


def _is_operation(given: Axis) -> bool:
    return isinstance(given, Extent) and isinstance(given.size, Operation)


def _widths(widths: tuple[int, ...] | None) -> str:
    return "" if widths is None else f"<{','.join(map(str, widths))}>"
