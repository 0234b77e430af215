"""Numbers of a layout: parameters, `let`s and mesh sizes, and what is computed from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import lcm

from ckptd.errors import LayoutRefused
from ckptd.layout.expressions import Arith, Call, Name, Number, Operation


def evaluate(expression: Arith, values: Mapping[str, int]) -> int:
    """The expression's value.

    Raises: LayoutRefused: a name without a value, a division that leaves a rest or is by zero, or a function
        with the wrong number of arguments.
    """
    if isinstance(expression, Number):
        return expression.value
    if isinstance(expression, Name):
        if expression.id not in values:
            raise LayoutRefused(
                f"{expression.id} has no value",
                why="it is no parameter, `let` or mesh axis of this layout",
                next=f"known here: {', '.join(sorted(values))}",
            )
        return values[expression.id]
    if isinstance(expression, Operation):
        return _operation(expression, evaluate(expression.left, values), evaluate(expression.right, values))
    return _call(expression, [evaluate(argument, values) for argument in expression.arguments])


def show(expression: Arith) -> str:
    """The expression as the language spells it, for messages."""
    if isinstance(expression, Number):
        return str(expression.value)
    if isinstance(expression, Name):
        return expression.id
    if isinstance(expression, Operation):
        return f"({show(expression.left)} {expression.sign} {show(expression.right)})"
    return f"{expression.function}({', '.join(map(show, expression.arguments))})"


def environment(
    parameters: Sequence[str],
    lets: Sequence[tuple[str, Arith]],
    given: Mapping[str, int],
    sizes: Mapping[str, int],
) -> dict[str, int]:
    """Every name's value: parameters as given, mesh sizes, then the `let`s in order.

    Raises: LayoutRefused: a parameter is missing or unknown, or a `let` cannot be computed.
    """
    for name in given:
        if name not in parameters:
            raise LayoutRefused(
                f"the layout has no parameter {name}", next=f"it has: {', '.join(parameters)}"
            )
    # A parameter may carry the name of a mesh axis: `layout x(tp) { mesh tp * dp }` needs tp once only.
    missing = [name for name in parameters if name not in given and name not in sizes]
    if missing:
        raise LayoutRefused(
            f"no value was given for parameter {', '.join(missing)}", next=f"give {missing[0]}=N"
        )
    values = dict(sizes)
    for name, value in given.items():
        if values.setdefault(name, value) != value:
            raise LayoutRefused(
                f"parameter {name} is {value}, but the mesh axis of that name has {values[name]}"
            )
    for name, expression in lets:
        values[name] = evaluate(expression, values)
    return values


def _operation(operation: Operation, left: int, right: int) -> int:
    if operation.sign == "+":
        return left + right
    if operation.sign == "-":
        return left - right
    if operation.sign == "*":
        return left * right
    if right == 0 or left % right:
        raise LayoutRefused(
            f"{show(operation)} = {left} / {right} is no whole number",
            next="choose sizes that divide, or use ceil(a, b)",
        )
    return left // right


def _call(call: Call, values: Sequence[int]) -> int:
    if call.function == "lcm":
        return lcm(*values)
    if not values or (call.function == "ceil" and len(values) != 2):
        raise LayoutRefused(f"{show(call)}: wrong number of arguments")
    if call.function == "ceil":
        if values[1] < 1:
            raise LayoutRefused(f"{show(call)}: division by {values[1]}")
        return -(-values[0] // values[1])
    return min(values) if call.function == "min" else max(values)
