"""docs/language.md: every layout on the page parses, and every table says what `resolve` says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from layout_oracle import FILL, Arrays, iota, scatter

from ckptd.layout.expressions import Layout
from ckptd.layout.language import parse, show
from ckptd.layout.proof import prove
from ckptd.layout.resolve import resolve

PAGE = (Path(__file__).parents[2] / "docs" / "language.md").read_text("utf-8")
LAYOUTS = re.findall(r"```layout\n(.*?)```", PAGE, re.DOTALL)
TABLES = re.findall(r"<!-- resolve (\S+): (.*?) -->\n((?:\|.*\n)+)", PAGE)


def by_name() -> dict[str, Layout]:
    return {layout.name: layout for layout in map(parse, LAYOUTS)}


def test_every_layout_on_the_page_parses() -> None:
    assert len(by_name()) == len(LAYOUTS) >= 9 and len(TABLES) == len(re.findall("<!-- ", PAGE)) >= 8
    for layout in by_name().values():
        assert parse(show(layout)) == layout


def numbers(given: str, word: str) -> dict[str, int]:
    found = re.search(rf"(?:^|; ){word} ([^;]*)", given)
    pairs = (pair.split("=") for pair in (found[1].split() if found else ()))
    return {key: int(value) for key, value in pairs}


def content(cell: str, marks: Arrays) -> list[int]:
    """`gate[0:2] pad` as the numbers that the elements are marked with."""
    found: list[int] = []
    for word in cell.split():
        if word == "pad":
            found.append(FILL)
        else:
            name, low, high = re.fullmatch(r"(.+)\[(\d+):(\d+)\]", word).groups()  # type: ignore[union-attr]
            assert int(low) < int(high) <= len(marks[name])
            found.extend(marks[name][int(low) : int(high)].tolist())
    return found


@pytest.mark.parametrize(("name", "given", "table"), TABLES, ids=[name for name, _, _ in TABLES])
def test_every_table_on_the_page_is_what_the_layout_means(name: str, given: str, table: str) -> None:
    shapes = {tensor: (size,) for tensor, size in numbers(given, "shapes").items()}
    placement = resolve(
        by_name()[name], parameters=numbers(given, "parameters"), mesh=numbers(given, "mesh"), shapes=shapes
    )
    prove(placement)
    marks = iota(shapes)
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
    assert [int(rank) for rank, *_ in rows] == list(range(placement.mesh.size))
    for rank, *cells in rows:
        arrays = scatter(placement, marks, int(rank), only=True)
        expected = {array: content(cell, marks) for array, cell in zip(head[1:], cells, strict=True)}
        assert {array: values.tolist() for array, values in arrays.items()} == expected
