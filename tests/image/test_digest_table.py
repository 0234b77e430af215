"""The table of digests: what it says is checked against length and root before any of it is believed."""

from __future__ import annotations

import pytest

from ckptd.errors import CorruptCheckpoint
from ckptd.image import cell_digests
from ckptd.image.digest import digest_of_digests
from ckptd.image.digest_table import BLOCK_BYTES, HEAD_BYTES, as_rows, read_table, table_bytes, write_table


@pytest.mark.parametrize("nbytes", [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 5 * BLOCK_BYTES])
def test_round_trip(nbytes: int) -> None:
    digests = cell_digests(bytes(range(256)) * (nbytes // 256 + 1))[: table_bytes(nbytes) - HEAD_BYTES]
    table = write_table(nbytes, digests)
    assert len(table) == table_bytes(nbytes)
    assert read_table("f", table, nbytes, digest_of_digests(digests)) == digests
    assert as_rows(digests).shape == (-(-nbytes // BLOCK_BYTES), 16)


def test_every_changed_byte_and_every_other_length_is_refused() -> None:
    nbytes = 3 * BLOCK_BYTES
    digests = cell_digests(bytes(nbytes))
    table, root = write_table(nbytes, digests), digest_of_digests(digests)
    for at in range(len(table)):
        changed = bytearray(table)
        changed[at] ^= 1
        with pytest.raises(CorruptCheckpoint):
            read_table("f", changed, nbytes, root)
    for other in (table[:-1], table + b"\0", table[:HEAD_BYTES], b""):
        with pytest.raises(CorruptCheckpoint, match="bytes"):
            read_table("f", other, nbytes, root)
    with pytest.raises(CorruptCheckpoint):
        read_table("f", table, nbytes + BLOCK_BYTES, root)
    with pytest.raises(CorruptCheckpoint, match="root"):
        read_table("f", table, nbytes, bytes(16))


def test_digests_must_be_as_many_as_blocks() -> None:
    with pytest.raises(ValueError, match="2 blocks"):
        write_table(BLOCK_BYTES + 1, bytes(16))
