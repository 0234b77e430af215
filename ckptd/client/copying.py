"""Copies on the host, made ready: pieces that are short, and that any thread may do.

Every piece runs on its caller's thread alone.  torch would start a team of threads for
a large tensor, and the team would take the processors from training; so large
tensors are copied as bytes, and those that are not their bytes in parts too small for
a team.  Small ones are copied many at a time: a call that lets go of the interpreter's
lock costs more than they do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch

from ckptd.client.streaming import byte_copy

Piece = Callable[[], None]
Pair = tuple[torch.Tensor, torch.Tensor]  # target, source

# Long enough that the interpreter's lock is seldom asked for, short enough to be waited for.
PIECE_BYTES = 4 << 20
# From 32,768 elements on (at::internal::GRAIN_SIZE), torch splits a copy among threads.
TEAM_ELEMENTS = 1 << 15


def copy_all(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copies tensors pairwise; from a CUDA device into pinned memory without waiting for it."""
    if targets:
        torch._foreach_copy_(tuple(targets), tuple(sources), non_blocking=True)


def pieces_of(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> list[Piece]:
    """Returns what copies tensors of the host pairwise when all of it was called once, in any order.

    Args:
        targets: contiguous, of the same dtypes and shapes as `sources`.
    """
    small: list[Pair] = []
    pieces: list[Piece] = []
    for pair in zip(targets, sources, strict=True):
        target, source = pair
        if source.numel() < TEAM_ELEMENTS:
            small.append(pair)
        elif source.is_contiguous() and not source.is_conj() and not source.is_neg():
            begins = range(0, source.nbytes, PIECE_BYTES)
            pieces += [Run(target, source, b, min(b + PIECE_BYTES, source.nbytes)) for b in begins]
        else:
            small.extend(_below_a_team(pair))
    return list(chain(pieces, map(Several, _batches(small))))


@dataclass(frozen=True, slots=True)
class Run:
    """Bytes [begin, end) of a contiguous tensor."""

    target: torch.Tensor
    source: torch.Tensor
    begin: int
    end: int

    def __call__(self) -> None:
        # Addresses are asked for now: tensors are kept, memory under them may have been exchanged.
        target, source = self.target.data_ptr(), self.source.data_ptr()
        byte_copy()(target + self.begin, source + self.begin, self.end - self.begin)


@dataclass(frozen=True, slots=True)
class Several:
    """Small tensors, copied by torch in one call."""

    pairs: list[Pair]

    def __call__(self) -> None:
        copy_all(*zip(*self.pairs, strict=True))


def _below_a_team(pair: Pair) -> Iterator[Pair]:
    """Yields parts of a tensor that torch copies on one thread."""
    target, source = pair
    if source.numel() < TEAM_ELEMENTS:
        yield pair
        return
    dim = max(range(source.dim()), key=lambda d: source.shape[d])
    half = source.shape[dim] // 2
    for begin, length in ((0, half), (half, source.shape[dim] - half)):
        yield from _below_a_team((target.narrow(dim, begin, length), source.narrow(dim, begin, length)))


def _batches(pairs: Iterable[Pair]) -> Iterator[list[Pair]]:
    batch: list[Pair] = []
    nbytes = 0
    for pair in pairs:
        batch.append(pair)
        nbytes += pair[1].nbytes
        if nbytes >= PIECE_BYTES:
            yield batch
            batch, nbytes = [], 0
    if batch:
        yield batch
