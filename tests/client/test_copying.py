"""Copies on the host: every byte arrives, none beside it is touched, whatever the geometry."""

from __future__ import annotations

import ctypes
import random

import pytest
import torch

from ckptd.client import copying, streaming
from ckptd.erasure.kernel import library_paths

SEED = 7
LENGTHS = (0, 1, 63, 64, 65, 255, 256, 4096, 4097, 1 << 20, (1 << 20) + 7)


def streaming_copies() -> list[streaming.ByteCopy]:
    found: list[streaming.ByteCopy] = [streaming.plain_copy]
    for path in library_paths():
        try:
            found.append(streaming.StreamingCopy(path))
        except (OSError, AttributeError):
            continue
    return found


@pytest.mark.parametrize("copy", streaming_copies(), ids=lambda copy: type(copy).__name__)
@pytest.mark.parametrize("length", LENGTHS)
def test_exactly_these_bytes_are_copied(copy: streaming.ByteCopy, length: int) -> None:
    generator = random.Random(SEED + length)
    source = torch.frombuffer(bytearray(generator.randbytes(length + 256)), dtype=torch.uint8)
    for source_at, target_at in ((0, 0), (64, 0), (1, 0), (0, 3), (17, 130)):
        target = torch.full((length + 256,), 0xA5, dtype=torch.uint8)
        expected = target.clone()
        expected[target_at : target_at + length] = source[source_at : source_at + length]
        copy(target.data_ptr() + target_at, source.data_ptr() + source_at, length)
        assert torch.equal(target, expected), f"seed {SEED}, from {source_at} to {target_at}"


def test_a_copy_that_misses_bytes_or_writes_others_is_found_out() -> None:
    def short(target: int, source: int, nbytes: int) -> None:
        ctypes.memmove(target, source, nbytes - (nbytes > 192))

    def long(target: int, source: int, nbytes: int) -> None:
        ctypes.memmove(target, source, nbytes + 1)

    assert streaming.copies_right(streaming.plain_copy)
    assert not streaming.copies_right(short)
    assert not streaming.copies_right(long)


def tensors() -> list[torch.Tensor]:
    """Contiguous and not, small and beyond a piece, empty, 0-dim, and two that are not their bytes."""
    generator = torch.Generator().manual_seed(SEED)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    large = values(3 * (copying.PIECE_BYTES // 4) // 2 + 5)
    return [
        values(5),
        values(0, 4),
        values(),
        large,
        values(300, 400).t(),
        values(600, 200)[::2],
        values(40, 50).to(torch.bfloat16),
        torch.randint(0, 2, (70_000,), generator=generator).bool(),
        torch.complex(values(200, 300), values(200, 300)).conj(),
        torch.complex(values(64), values(64)).imag.neg(),
    ]


def test_all_pieces_in_any_order_copy_everything() -> None:
    sources = tensors()
    expected = [source.contiguous().resolve_conj().resolve_neg().clone() for source in sources]
    targets = [torch.zeros_like(each) for each in expected]
    pieces = copying.pieces_of(targets, sources)
    random.Random(SEED).shuffle(pieces)
    for piece in pieces:
        piece()
    for number, (target, wanted) in enumerate(zip(targets, expected, strict=True)):
        assert torch.equal(target.reshape(-1).view(torch.uint8), wanted.reshape(-1).view(torch.uint8)), number


def test_no_piece_is_long_enough_for_a_team_of_threads() -> None:
    sources = tensors()
    targets = [torch.empty_like(source.contiguous()) for source in sources]
    for piece in copying.pieces_of(targets, sources):
        if isinstance(piece, copying.Run):
            assert piece.end - piece.begin <= copying.PIECE_BYTES
        else:
            assert isinstance(piece, copying.Several)
            assert all(source.numel() < copying.TEAM_ELEMENTS for _, source in piece.pairs)
