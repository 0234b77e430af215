"""Where every byte of a group's images and parity lies.

A group is n nodes with m parity; k = n - m.  Every node's image is cut into k chunks
of equal length.  There are n stripes: stripe j keeps its m parity chunks on nodes
j..j+m-1 (mod n) and its k data chunks on the others, so every node holds exactly one
symbol of every stripe.  A node thus stores its image and m parity chunks.

    n = 4, m = 1                     n = 4, m = 2
    stripe  node 0  1  2  3          stripe  node 0  1  2  3
    0            P  d0 d1 d2         0            P0 P1 d0 d1
    1            d2 P  d0 d1         1            d1 P0 P1 d0
    2            d1 d2 P  d0         2            d0 d1 P0 P1
    3            d0 d1 d2 P          3            P1 d0 d1 P0
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from ckptd.erasure.matrix import MAX_SYMBOLS

# The unit of sending, digesting and repairing, in bytes.
CELL_BYTES = 65536


@dataclass(frozen=True)
class Geometry:
    """The geometry of one group.  Nodes, stripes and symbols are counted from 0.

    Symbols 0..k-1 of a stripe are data and k..n-1 are parity, as in `Code(k, m)`.
    Every method raises ValueError for a node, stripe, chunk or symbol that does not exist.

    Raises: ValueError: not 1 <= parity < nodes <= 255.
    """

    nodes: int
    parity: int

    def __post_init__(self) -> None:
        if not 1 <= self.parity < self.nodes <= MAX_SYMBOLS:
            raise ValueError(
                f"a group needs 1 <= parity < nodes <= {MAX_SYMBOLS}; "
                f"found {self.nodes} nodes with parity {self.parity}"
            )

    @property
    def data_chunks(self) -> int:
        """k: the chunks that an image is cut into, and the data symbols of a stripe."""
        return self.nodes - self.parity

    def stripe_of(self, node: int, chunk: int) -> int:
        """The stripe that has this chunk of this node's image as its data symbol number `chunk`."""
        _check("node", node, self.nodes)
        _check("chunk", chunk, self.data_chunks)
        return (node - self.parity - chunk) % self.nodes

    def parity_stripe(self, node: int, p: int) -> int:
        """The stripe whose parity number p lies on this node."""
        _check("node", node, self.nodes)
        _check("parity", p, self.parity)
        return (node - p) % self.nodes

    def parity_nodes(self, stripe: int) -> tuple[int, ...]:
        """The nodes that hold the parity of this stripe; entry p holds parity number p."""
        _check("stripe", stripe, self.nodes)
        return tuple((stripe + p) % self.nodes for p in range(self.parity))

    def data_source(self, stripe: int, symbol: int) -> tuple[int, int]:
        """(node, chunk): where data symbol 0..k-1 of this stripe lies; the inverse of `stripe_of`."""
        _check("stripe", stripe, self.nodes)
        _check("data symbol", symbol, self.data_chunks)
        return (stripe + self.parity + symbol) % self.nodes, symbol

    def symbol_on(self, node: int, stripe: int) -> int:
        """The one symbol of this stripe that this node holds: 0..k-1 data, k..n-1 parity."""
        _check("node", node, self.nodes)
        _check("stripe", stripe, self.nodes)
        distance = (node - stripe) % self.nodes
        if distance < self.parity:
            return self.data_chunks + distance
        return distance - self.parity

    def chunk_bytes(self, longest_node_bytes: int) -> int:
        """The length of every chunk of the group, in bytes: whole cells, k of them hold the longest image.

        Raises: ValueError: a negative length.
        """
        if longest_node_bytes < 0:
            raise ValueError(f"an image has at least 0 bytes; found {longest_node_bytes}")
        share = -(-longest_node_bytes // self.data_chunks)
        return -(-share // CELL_BYTES) * CELL_BYTES

    def decodable(self, images: Collection[int], parities: Collection[int]) -> bool:
        """Whether the image of every node of the group can be had.

        Args:
            images: the nodes whose own image is available.
            parities: the nodes whose parity, all m chunks, is available.
        """
        for node in (*images, *parities):
            _check("node", node, self.nodes)
        have_image, have_parity = set(images), set(parities)
        # Stripes do not help each other: each has to replace its own lost data by its own parity.
        for stripe in range(self.nodes):
            holders = set(self.parity_nodes(stripe))
            lost = self.data_chunks - len(have_image - holders)
            if lost > len(have_parity & holders):
                return False
        return True


def _check(name: str, value: int, count: int) -> None:
    if not 0 <= value < count:
        raise ValueError(f"{name} {value} does not exist: the group has 0..{count - 1}")
