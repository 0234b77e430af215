"""A holding: its bytes as one image, its seal, and when its slots may be used again."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.image.digest import CELL_BYTES, cell_digests
from ckptd.memory.arena import Arena, padded
from ckptd.memory.holding import (
    Holding,
    Parity,
    Place,
    free_slots,
    node_bytes,
    node_digests,
    releasable,
    seal_fault,
)
from ckptd.v1 import bulk_pb2

JOB = "job"
GROUP = ("n0", "n1", "n2")


def _held(directory: Path, sizes: list[int], seed: int, generation: int = 1, step: int = 5) -> Holding:
    """A sealed holding of one rank per size, in arenas of their own."""
    rng = random.Random(seed)
    holding = Holding(generation, step, GROUP, "n1", 1, tuple(range(len(sizes))))
    for rank, size in enumerate(sizes):
        arena = Arena.create(directory, f"rank-{rank:05d}", bytes(16), 2, max(size, 1))
        place = holding.places[rank] = Place(arena, 1, size)
        place.image[:] = rng.randbytes(size)
        sealed = bulk_pb2.RankSeal(
            rank=rank, image_bytes=size, plan_hash=bytes(16), cell_digests=cell_digests(place.image)
        )
        assert holding.seal_rank(sealed, JOB) == (rank == len(sizes) - 1)
    return holding


SIZES = st.lists(
    st.one_of(st.integers(1, 3 * CELL_BYTES), st.sampled_from([1, CELL_BYTES, CELL_BYTES + 1])),
    min_size=1,
    max_size=4,
)


@settings(deadline=None, max_examples=30)
@given(sizes=SIZES, seed=st.integers(0, 1 << 30), data=st.data())
def test_data_cells_are_those_of_the_plain_concatenation(
    sizes: list[int], seed: int, data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as name:
        holding = _held(Path(name), sizes, seed)
        whole = b"".join(bytes(p.image).ljust(padded(p.image_bytes), b"\0") for p in holding.places.values())
        total = len(whole) // CELL_BYTES
        for first in range(total + 2):
            for count in range(total + 3 - first):
                expected = whole[first * CELL_BYTES : (first + count) * CELL_BYTES].ljust(
                    count * CELL_BYTES, b"\0"
                )
                assert b"".join(holding.data_cells(first, count)) == expected, (first, count)
        # The seal speaks of the same bytes.
        seal = holding.seals["n1"]
        assert node_bytes(seal) == len(whole)
        assert node_digests(seal) == cell_digests(whole)
        for arena in {id(p.arena): p.arena for p in holding.places.values()}.values():
            arena.discard()


def test_views_are_the_arena_itself(tmp_path: Path) -> None:
    """Rebuilt cells are written through them."""
    holding = _held(tmp_path, [2 * CELL_BYTES, CELL_BYTES], 1)
    for view in holding.data_cells(1, 2):
        view[:] = b"\x07" * len(view)
    assert bytes(holding.places[0].image[CELL_BYTES:]) == b"\x07" * CELL_BYTES
    assert bytes(holding.places[1].image) == b"\x07" * CELL_BYTES


def test_a_node_is_sealed_when_all_its_ranks_are_in_their_order(tmp_path: Path) -> None:
    holding = Holding(2, 9, GROUP, "n1", 1, (4, 5, 6))
    for rank, last in [(6, False), (4, False), (4, False), (5, True)]:
        assert not holding.sealed
        assert (
            holding.seal_rank(bulk_pb2.RankSeal(rank=rank, image_bytes=1, cell_digests=bytes(16)), JOB)
            == last
        )
    assert holding.sealed
    seal = holding.seals["n1"]
    assert [rank.rank for rank in seal.ranks] == [4, 5, 6]
    assert seal_fault(seal, JOB, 2, 9, "n1") is None


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("job", "other", "it names"),
        ("generation", 3, "it names"),
        ("step", 8, "it names"),
        ("node", "n2", "it names"),
        ("cell_bytes", 4096, "4096 bytes, expected 65536"),
    ],
)
def test_a_seal_of_something_else_is_named_as_such(
    tmp_path: Path, field: str, value: object, why: str
) -> None:
    seal = _held(tmp_path, [100], 1).seals["n1"]
    setattr(seal, field, value)
    fault = seal_fault(seal, JOB, 1, 5, "n1")
    assert fault is not None and why in fault


def test_a_seal_with_too_few_or_no_digests_is_refused(tmp_path: Path) -> None:
    seal = _held(tmp_path, [CELL_BYTES + 1, 7], 1).seals["n1"]
    for rank, digests in [(0, bytes(16)), (1, bytes(32)), (1, b""), (0, bytes(31))]:
        wrong = bulk_pb2.SealRecord()
        wrong.CopyFrom(seal)
        wrong.ranks[rank].cell_digests = digests
        fault = seal_fault(wrong, JOB, 1, 5, "n1")
        assert fault is not None and f"rank {rank} has {len(digests)} digest bytes" in fault
    del seal.ranks[:]
    assert seal_fault(seal, JOB, 1, 5, "n1") == "it holds no rank"


def test_chunks_are_as_long_as_the_longest_member_needs(tmp_path: Path) -> None:
    holding = _held(tmp_path, [1], 1)
    for node, size in [("n0", 5 * CELL_BYTES), ("n2", 3 * CELL_BYTES)]:
        ranks = [bulk_pb2.RankSeal(image_bytes=size, cell_digests=bytes(16 * (size // CELL_BYTES)))]
        holding.seals[node] = bulk_pb2.SealRecord(node=node, ranks=ranks)
    assert holding.chunk_bytes == 3 * CELL_BYTES  # 5 cells in two chunks


def test_which_groups_can_hold_parity() -> None:
    def protected(nodes: int, parity: int) -> bool:
        return Holding(1, 1, tuple(f"n{i}" for i in range(nodes)), "n0", parity, (0,)).protected_group

    assert [protected(n, m) for n, m in [(1, 0), (1, 1), (2, 0), (2, 2), (2, 1), (3, 1), (3, 2)]] == [
        False,
        False,
        False,
        False,
        True,
        True,
        True,
    ]


def test_slots_of_a_grant_or_a_holding_are_not_free(tmp_path: Path) -> None:
    arena, other = (Arena.create(tmp_path, f"rank-{rank:05d}", bytes(16), 4, 1) for rank in (0, 1))
    holdings = [
        Holding(1, 1, GROUP, "n0", 1, (0, 1), places={0: Place(arena, 2, 1), 1: Place(other, 0, 1)}),
        Holding(2, 1, GROUP, "n0", 1, (0,), places={0: Place(arena, 2, 1)}),
    ]
    assert free_slots(arena, holdings, []) == [0, 1, 3]
    assert free_slots(arena, holdings, [0, 3]) == [1]
    assert free_slots(other, holdings, []) == [1, 2, 3]
    assert free_slots(arena, [], []) == [0, 1, 2, 3]


KEYS = st.tuples(st.integers(1, 4), st.integers(0, 12))


@settings(deadline=None, max_examples=80)
@given(
    keys=st.sets(KEYS, max_size=12),
    generation=st.integers(1, 4),
    watermark=st.one_of(st.none(), st.integers(0, 12)),
    given_up=st.sets(st.integers(0, 12), max_size=4),
)
def test_the_one_rule(
    keys: set[tuple[int, int]], generation: int, watermark: int | None, given_up: set[int]
) -> None:
    """A slot of step s is reused only when the watermark known here is greater than s."""
    holdings = {key: Holding(*key, GROUP, "n0", 1, (0,)) for key in keys}
    gone = set(releasable(holdings, generation, watermark, given_up))
    assert gone <= keys
    for held, step in keys:
        if held == generation:
            passed = watermark is not None and watermark > step
            # Given up by the whole job: it is no snapshot, and can never become one.
            given = step in given_up and not (watermark is not None and step <= watermark)
            assert ((held, step) in gone) == (passed or given)
        elif held < generation:
            # Until this generation has protected something, all that protects the job is older.
            assert ((held, step) in gone) == (watermark is not None)
        else:
            assert (held, step) not in gone
    # Never is the watermark's own step among them.
    assert watermark is None or (generation, watermark) not in gone


@settings(deadline=None, max_examples=40)
@given(
    keys=st.sets(KEYS, max_size=12),
    generation=st.integers(1, 4),
    marks=st.lists(st.integers(0, 12), min_size=2, max_size=2).map(sorted),
)
def test_knowing_more_never_takes_a_release_back(
    keys: set[tuple[int, int]], generation: int, marks: list[int]
) -> None:
    holdings = {key: Holding(*key, GROUP, "n0", 1, (0,)) for key in keys}
    early, late = (set(releasable(holdings, generation, mark, [])) for mark in marks)
    assert set(releasable(holdings, generation, None, [])) <= early <= late


def test_a_record_holds_what_is_certain_and_nothing_else(tmp_path: Path) -> None:
    """Places without digests and unfolded parity are not worth adopting."""
    holding = _held(tmp_path, [10, 20], 1)
    del holding.rank_seals[1]
    holding.parity = Parity(1, CELL_BYTES, [memoryview(bytes(CELL_BYTES))], [bytes(16)])
    record = holding.record(JOB)
    assert [(image.rank, image.slot, image.image_bytes) for image in record.images] == [(0, 1, 10)]
    assert not record.folded and list(record.parity_digests) == [] and record.chunk_bytes == 0
    holding.folded = True
    record = holding.record(JOB)
    assert record.folded and (record.parity_slot, record.chunk_bytes) == (1, CELL_BYTES)
    assert list(record.parity_digests) == [bytes(16)]
