"""The geometry is a consistent bijection, and any m nodes may vanish: told by the real code."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from ckptd.erasure import Code
from ckptd.erasure.stripe import CELL_BYTES, Geometry

ALL = [Geometry(n, m) for n in range(2, 13) for m in range(1, n)]


def test_the_geometry_is_one_bijection() -> None:
    """Every (stripe, symbol) lies on exactly one node, and every way to ask agrees."""
    for g in ALL:
        k, held = g.data_chunks, {}
        assert k == g.nodes - g.parity >= 1
        for node in range(g.nodes):
            for chunk in range(k):
                stripe = g.stripe_of(node, chunk)
                assert stripe == (node - g.parity - chunk) % g.nodes
                assert g.data_source(stripe, chunk) == (node, chunk)
                assert g.symbol_on(node, stripe) == chunk
                assert held.setdefault((stripe, chunk), node) == node
            for p in range(g.parity):
                stripe = g.parity_stripe(node, p)
                assert g.parity_nodes(stripe)[p] == node == (stripe + p) % g.nodes
                assert g.symbol_on(node, stripe) == k + p
                assert held.setdefault((stripe, k + p), node) == node
            # One symbol of every stripe: no node's loss costs a stripe two.
            assert {g.stripe_of(node, c) for c in range(k)} | {
                g.parity_stripe(node, p) for p in range(g.parity)
            } == set(range(g.nodes))
        assert set(held) == set(itertools.product(range(g.nodes), range(g.nodes)))
    print(f"{len(ALL)} geometries")


def test_mirroring() -> None:
    g = Geometry(2, 1)
    assert (g.data_chunks, g.parity_nodes(0), g.data_source(0, 0)) == (1, (0,), (1, 0))
    image = b"the image of node 1"
    mirror = bytearray(len(image))
    Code(1, 1).encode([image], [mirror])
    assert mirror == image


@pytest.mark.parametrize(("nodes", "parity"), [(1, 1), (3, 0), (3, 3), (2, 5), (256, 1), (0, -1)])
def test_impossible_groups_are_refused(nodes: int, parity: int) -> None:
    with pytest.raises(ValueError, match=f"found {nodes} nodes with parity {parity}"):
        Geometry(nodes, parity)


def test_what_does_not_exist_is_refused() -> None:
    g = Geometry(4, 1)
    for call, message in (
        (lambda: g.stripe_of(4, 0), r"node 4 does not exist: the group has 0\.\.3"),
        (lambda: g.stripe_of(0, 3), r"chunk 3 does not exist: the group has 0\.\.2"),
        (lambda: g.parity_stripe(-1, 0), "node -1"),
        (lambda: g.parity_stripe(0, 1), "parity 1"),
        (lambda: g.parity_nodes(4), "stripe 4"),
        (lambda: g.data_source(4, 0), "stripe 4"),
        (lambda: g.data_source(0, 3), "data symbol 3"),
        (lambda: g.symbol_on(4, 0), "node 4"),
        (lambda: g.symbol_on(0, -1), "stripe -1"),
        (lambda: g.decodable([4], []), "node 4"),
        (lambda: g.decodable([0], [9]), "node 9"),
        (lambda: g.chunk_bytes(-1), "found -1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("nodes", "parity", "longest", "chunk"),
    [
        (4, 1, 0, 0),
        (4, 1, 1, CELL_BYTES),
        (4, 1, 3 * CELL_BYTES, CELL_BYTES),
        (4, 1, 3 * CELL_BYTES + 1, 2 * CELL_BYTES),
        (2, 1, 5 * CELL_BYTES, 5 * CELL_BYTES),
        (6, 2, 10**12, 250_000_048_128),
    ],
)
def test_chunks_are_whole_cells_that_hold_the_longest_image(
    nodes: int, parity: int, longest: int, chunk: int
) -> None:
    g = Geometry(nodes, parity)
    assert g.chunk_bytes(longest) == chunk
    assert chunk % CELL_BYTES == 0 and chunk * g.data_chunks >= longest
    assert chunk == 0 or (chunk - CELL_BYTES) * g.data_chunks < longest, "not a cell more than needed"


def subsets(count: int) -> list[tuple[int, ...]]:
    return [c for size in range(count + 1) for c in itertools.combinations(range(count), size)]


class Group:
    """Images and folded parity of a group with real bytes, one short row per chunk."""

    LENGTH = 33

    def __init__(self, geometry: Geometry) -> None:
        g = self.g = geometry
        self.code = Code(g.data_chunks, g.parity)
        random = np.random.default_rng(g.nodes * 100 + g.parity)
        self.images = random.integers(0, 256, (g.nodes, g.data_chunks, self.LENGTH), dtype=np.uint8)
        self.parity = np.zeros((g.nodes, g.parity, self.LENGTH), dtype=np.uint8)
        for node, chunk in itertools.product(range(g.nodes), range(g.data_chunks)):
            for p, holder in enumerate(g.parity_nodes(g.stripe_of(node, chunk))):
                self.code.update_one(chunk, p, self.images[node, chunk], self.parity[holder, p])

    def rebuild(self, images: tuple[int, ...], parities: tuple[int, ...]) -> bool:
        """Whether every image comes back, stripe by stripe, from what is on these nodes."""
        g = self.g
        for stripe in range(g.nodes):
            present, missing = {}, {}
            for node in range(g.nodes):
                symbol = g.symbol_on(node, stripe)
                if symbol >= g.data_chunks:
                    if node in parities:
                        present[symbol] = self.parity[node, symbol - g.data_chunks]
                elif node in images:
                    present[symbol] = self.images[node, symbol]
                else:
                    missing[symbol] = bytearray(self.LENGTH)
            if missing and len(present) < g.data_chunks:
                return False
            self.code.decode(present, missing)
            for symbol, row in missing.items():
                node, chunk = g.data_source(stripe, symbol)
                assert row == self.images[node, chunk].tobytes()
        return True


def test_any_m_nodes_may_vanish() -> None:
    losses = 0
    for g in (geometry for geometry in ALL if geometry.nodes <= 7):
        group = Group(g)
        for alive in subsets(g.nodes):
            if len(alive) >= g.nodes - g.parity:
                assert g.decodable(alive, alive)
                assert group.rebuild(alive, alive)
                losses += 1
            else:
                assert not g.decodable(alive, alive)
    print(f"{losses} losses of up to m nodes rebuilt with real bytes")


def test_decodable_says_what_the_code_can_do() -> None:
    """Images and parity vanish apart: a node that sealed may not have folded."""
    asked = 0
    for g in (geometry for geometry in ALL if geometry.nodes <= 5):
        group = Group(g)
        for images, parities in itertools.product(subsets(g.nodes), repeat=2):
            assert g.decodable(images, parities) == group.rebuild(images, parities), (g, images, parities)
            asked += 1
    print(f"{asked} holdings of images and parities")
