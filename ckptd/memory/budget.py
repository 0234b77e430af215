"""The memory sum of a job on one node, known before training starts."""

from __future__ import annotations

from collections.abc import Mapping

from ckptd.erasure.stripe import Geometry
from ckptd.errors import NoSpace
from ckptd.memory.arena import padded

TRANSFER_BYTES = 16 << 20  # receive and send buffers of the bulk plane, per job


def needed_bytes(image_bytes: int, ranks: int, slots: int, nodes: int, parity: int, flushing: int = 0) -> int:
    """Bytes that a job takes on this node.

    Images times (slots x (1 + m/(n-m)) + 1 where a background flush is on), plus transfer
    buffers (design, section 4), each chunk of parity rounded up to whole cells.

    Args:
        image_bytes: of one rank.
        ranks: on this node.
        slots: per rank.
        nodes: in the erasure group.
        parity: m; a group of fewer than m + 1 nodes holds no parity.
        flushing: images per rank that a flush holds on to beside the slots.
    """
    images = padded(image_bytes) * ranks
    protected = 1 <= parity < nodes
    chunks = parity * Geometry(nodes, parity).chunk_bytes(images) if protected else 0
    return slots * (images + chunks) + flushing * images + TRANSFER_BYTES


def check(job: str, needed: int, limit: int, held: Mapping[str, int]) -> int:
    """Returns the bytes available to `job`.

    Raises:
        NoSpace: with the numbers and who holds what.
    """
    others = {name: nbytes for name, nbytes in held.items() if name != job and nbytes}
    available = limit - sum(others.values())
    if needed <= available:
        return available
    holders = (
        ", ".join(f"{name} holds {nbytes:,}" for name, nbytes in sorted(others.items()))
        or "nobody else holds any"
    )
    raise NoSpace(
        f"job {job} needs {needed:,} bytes of memory on this node",
        f"{available:,} of {limit:,} bytes are free ({holders})",
        "free a parked job with 'ckptd forget JOB', use fewer slots, or raise --memory-limit-bytes",
    )
