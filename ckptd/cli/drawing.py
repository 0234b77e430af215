"""Lines drawn as columns of characters, the newest checkpoint on top; pure.

*   step 1100.g3          the newest line is the first column
| o step 1500.g1          a line that was left
|/
*   step 900.g1           both go on from here
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ckptd.storage.lines import Key


def draw(
    parents: Mapping[Key, Key | None], newest: tuple[Key, ...], mark: Callable[[Key], str]
) -> list[tuple[str, Key | None]]:
    """Returns rows: the drawing, and the checkpoint that it stands for; None for a row that only joins lines.

    Args:
        parents: of every checkpoint.
        newest: the checkpoints of the newest line; it has the first column.
        mark: the character of a checkpoint.
    """
    columns: list[Key | None] = [newest[0] if newest else None]  # which checkpoint each column waits for
    begun = [False]
    rows: list[tuple[str, Key | None]] = []
    for key in sorted(parents, key=lambda key: (key[1], key[0]), reverse=True):
        waiting = [i for i, wanted in enumerate(columns) if wanted == key]
        if not waiting:
            free = next((i for i, wanted in enumerate(columns) if wanted is None and i), len(columns))
            if free == len(columns):
                columns.append(None)
                begun.append(False)
            columns[free] = key
            waiting = [free]
        first, *others = waiting
        for column in reversed(others):
            rows.append((_join(columns, begun, first, column), None))
            columns[column], begun[column] = None, False
        begun[first] = True
        cells = [mark(key) if i == first else _bar(columns, begun, i) for i in range(len(columns))]
        rows.append((" ".join(cells).rstrip(), key))
        columns[first] = parents[key]
        begun[first] = parents[key] is not None
        while len(columns) > 1 and columns[-1] is None:
            columns.pop()
            begun.pop()
    return rows


def _bar(columns: list[Key | None], begun: list[bool], i: int) -> str:
    return "|" if begun[i] and columns[i] is not None else " "


def _join(columns: list[Key | None], begun: list[bool], into: int, column: int) -> str:
    cells = [" "] * (2 * len(columns))
    for i in range(len(columns)):
        if i != column:
            cells[2 * i] = _bar(columns, begun, i)
    cells[2 * into] = "|"
    cells[2 * column - 1] = "/"
    for at in range(2 * into + 1, 2 * column - 1):
        if cells[at] == " ":
            cells[at] = "_"
    return "".join(cells).rstrip()
