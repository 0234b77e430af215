"""The layout language's abstract syntax: what a `.layout` file says, before any mesh or shape is known.

Every node is a frozen value; `language.parse` makes them, `language.show` prints them, and `resolve` gives
them a meaning.  Grammar and semantics: `docs/language.md`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

# --- arithmetic: sizes that are known once the parameters and the mesh are ----------------------------------


@dataclass(frozen=True)
class Number:
    value: int


@dataclass(frozen=True)
class Name:
    """A parameter of the layout, a `let`, or the size of a mesh axis."""

    id: str


@dataclass(frozen=True)
class Operation:
    """`+ - * /`; a division that leaves a rest is refused when it is evaluated."""

    sign: Literal["+", "-", "*", "/"]
    left: Arith
    right: Arith


@dataclass(frozen=True)
class Call:
    """`lcm(a, b)`, `min`, `max`, `ceil(a, b)` (a divided by b, rounded up)."""

    function: Literal["lcm", "min", "max", "ceil"]
    arguments: tuple[Arith, ...]


Arith = Number | Name | Operation | Call

Grid = tuple[str, ...]  # mesh axes, the fastest first


# --- axes: one dimension of a stored tensor -----------------------------------------------------------------


@dataclass(frozen=True)
class Extent:
    """So many consecutive indices.  `_` as the name: as many as the logical tensor has in this dimension."""

    size: Arith


@dataclass(frozen=True)
class Product:
    """Row-major product: the last factor runs fastest."""

    factors: tuple[Axis, ...]


@dataclass(frozen=True)
class Sum:
    """Ordered sum `{q:r, k:1, v:1}`: one summand after another, each a piece of its own logical tensor."""

    parts: tuple[tuple[str, Arith], ...]


@dataclass(frozen=True)
class Split:
    """`axis@grid`: consecutive shares over the ranks of `grid`.

    `widths` None is torch.chunk's rule (shares of ceil(n / ranks), the last ones shorter or empty); otherwise
    the share of each coordinate.
    """

    axis: Axis
    grid: Grid
    widths: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Pad:
    """`axis^n`: filler at the end, up to a multiple of n."""

    axis: Axis
    multiple: Arith
    fill: Literal["zero", "last", "none"] = "zero"


@dataclass(frozen=True)
class Rest:
    """`...`, last in a rule's axes: the logical tensor's remaining dimensions, as they are."""


Axis = Extent | Product | Sum | Split | Pad


# --- names: they have axes too ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    value: str


@dataclass(frozen=True)
class Index:
    """`{l@pp}`: a number in a name.  With a grid, a place holds its share, and numbers it from `start`.

    `digits` is the least number of digits, with leading zeros: `{tp:02}`.
    """

    id: str
    grid: Grid = ()
    start: Arith = Number(0)
    widths: tuple[int, ...] | None = None
    digits: int = 0


@dataclass(frozen=True)
class Wild:
    """`*`: any run of characters but none that a more specific rule claims."""


Pattern = tuple[Text | Index | Wild, ...]


# --- rules --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rep:
    """Equal on every rank of the grid (proved by digest at run time)."""

    grid: Grid


@dataclass(frozen=True)
class On:
    """`on pp 0`, `on pp (pp - 1)`: only the ranks with this coordinate hold it."""

    axis: str
    coordinate: Arith


@dataclass(frozen=True)
class Tied:
    """Another name for a tensor that is stored once."""

    name: Pattern


@dataclass(frozen=True)
class Average:
    """Differs over the grid; what is loaded is the mean.  Loses information, so it is recorded."""

    grid: Grid


@dataclass(frozen=True)
class Drop:
    """Claimed, and left out.  Loses information, so it is recorded."""


@dataclass(frozen=True)
class As:
    """Stored in this dtype (safetensors' name, e.g. `BF16`)."""

    dtype: str


@dataclass(frozen=True)
class Transposed:
    """Stored with the dimensions in reverse order: the axes are the stored tensor's (GPT-2's Conv1D)."""


@dataclass(frozen=True)
class When:
    """`when tied`: the rule is of the layout only where the condition is not 0."""

    condition: Arith


Verb = Rep | On | Tied | Average | Drop | As | Transposed | When


@dataclass(frozen=True)
class Rule:
    """`name : [axes] = piece | piece verbs`.  `axes` None: as the logical tensor is, whole."""

    name: Pattern
    axes: tuple[Axis | Rest, ...] | None
    pieces: tuple[Pattern, ...] = ()  # () is: the logical tensor of the same name
    verbs: tuple[Verb, ...] = ()
    line: int = field(default=0, compare=False)  # in the text, for messages


# --- flat buffers -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Align:
    """Each item starts at a multiple."""

    multiple: Arith


@dataclass(frozen=True)
class PadTo:
    multiple: Arith


@dataclass(frozen=True)
class SplitOver:
    grid: Grid


@dataclass(frozen=True)
class Strip:
    """The padding at the buffer's end is not stored."""


Step = Align | PadTo | SplitOver | Strip


@dataclass(frozen=True)
class Flat:
    """`cat(order)[ items then whole ]`: ravel every local tensor, one after another.

    `per_item` steps apply to each tensor's ravel, `whole` steps to the buffer.  `order` is `module` (the
    order of the rules' tensors as given), `reversed`, or a name under which the caller passes a list of
    tensor names.
    """

    order: str
    is_reversed: bool = False
    per_item: tuple[Step, ...] = ()
    whole: tuple[Step, ...] = ()


@dataclass(frozen=True)
class Store:
    """`store "path" :: key [= flat]`: the file, and the key in it, of a place's tensors or a buffer."""

    path: Pattern
    key: Pattern
    flat: Flat | None = None
    line: int = field(default=0, compare=False)  # in the text, for messages
    when: Arith | None = None  # the store is of the layout only where this is not 0


@dataclass(frozen=True)
class Layout:
    """One layout: written once per framework and model family, symbolic in the mesh."""

    name: str
    parameters: tuple[str, ...]
    mesh: Grid
    folds: tuple[tuple[Grid, Grid], ...] = ()  # (other axes, the mesh axes that they refactor)
    lets: tuple[tuple[str, Arith], ...] = ()
    states: tuple[tuple[str, str], ...] = ()  # state -> dtype; the first is the parameter itself
    rules: tuple[Rule, ...] = ()
    stores: tuple[Store, ...] = ()
