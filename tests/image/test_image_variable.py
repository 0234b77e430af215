"""The variable part: exact round trip, deterministic bytes, strict reading."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.errors import CorruptImage, InvalidRequest
from ckptd.image import (
    ImagePlan,
    Outgrown,
    TensorSpec,
    Variable,
    read_variable,
    roomy_capacity,
    write_variable,
)

PLAN = ImagePlan.build([TensorSpec("a", "F32", (5,))], objects_capacity=320)
HEAD = PLAN.variable_offset


def image_of(variable: Variable, fill: int = 0) -> memoryview:
    image = memoryview(bytearray([fill]) * PLAN.image_bytes)
    PLAN.lay_out(image)
    PLAN.tensor(image, "a")[:] = bytes(20)
    write_variable(PLAN, image, variable)
    return image


variables = st.builds(
    lambda job, generation, step, world, share, objects: Variable(
        job, generation, step, min(world - 1, int(share * world)), world, objects
    ),
    st.from_regex(r"[A-Za-z0-9_-]{1,128}", fullmatch=True),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**64 - 1),
    st.integers(1, 2**32 - 1),
    st.floats(0, 1),
    st.binary(max_size=320),
)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(variables, variables)
def test_round_trip_leaves_nothing_of_what_was_there(first: Variable, second: Variable) -> None:
    image = image_of(first, fill=255)
    assert read_variable(PLAN, image) == first
    write_variable(PLAN, image, second)
    assert read_variable(PLAN, image) == second
    assert image == image_of(second)


def test_outgrowing_the_capacity_says_so_and_writes_nothing() -> None:
    image = image_of(Variable("j", 1, 2, 0, 1, b"abc"))
    before = bytes(image)
    with pytest.raises(Outgrown) as caught:
        write_variable(PLAN, image, Variable("j", 1, 3, 0, 1, bytes(321)))
    assert (caught.value.needed, caught.value.capacity) == (321, 320)
    assert bytes(image) == before


@pytest.mark.parametrize("nbytes", [0, 1, 20_000, 32 << 10, 1_000_000])
def test_a_roomy_capacity_leaves_room(nbytes: int) -> None:
    capacity = roomy_capacity(nbytes)
    assert capacity >= nbytes * 3 / 2
    assert capacity % 4096 == 0
    assert capacity <= max(32 << 10, nbytes * 3 / 2 + 4096)


def test_mistakes_are_refused_before_anything_is_written() -> None:
    image = image_of(Variable("j", 1, 2, 0, 1, b"abc"))
    before = bytes(image)
    for rank, world in ((1, 1), (-1, 1), (0, 0)):
        with pytest.raises(ValueError, match=f"rank {rank} of {world}"):
            write_variable(PLAN, image, Variable("j", 1, 2, rank, world, b""))
    with pytest.raises(ValueError, match="out of range"):
        write_variable(PLAN, image, Variable("j", -1, 2, 0, 1, b""))
    with pytest.raises(InvalidRequest, match="job name"):
        write_variable(PLAN, image, Variable("../j", 1, 2, 0, 1, b""))
    for call in (
        lambda cut: write_variable(PLAN, cut, Variable("j", 1, 2, 0, 1, b"")),
        lambda cut: read_variable(PLAN, cut),
    ):
        with pytest.raises(ValueError, match="flat view"):
            call(image[:-1])
    assert bytes(image) == before


@pytest.mark.parametrize(
    ("at", "bytes_there", "why"),
    [
        (0, b"CKPTDVAR", "begins with"),
        (8, b"\x02", "begins with"),
        (12, b"\x05", "rank 5 of 3"),
        (20, b"\xff\xff\xff\xff", "claims 4294967295 bytes"),
        (20, b"\0", "head are not zeros"),
        (20, b"\x04", "name cannot be read"),
        (40, b"\xff" * 8, "claim 18446744073709551615 bytes"),
        (40, b"\x41\x01", "claim 321 bytes"),
        (48, b"\xff", "name cannot be read"),
        (48, b"..\0", "name cannot be read"),
        (60, b"x", "head are not zeros"),
        (200, b"x", "head are not zeros"),
        (256 + 3, b"x", "behind its objects"),
        (256 + 319, b"x", "behind its objects"),
    ],
)
def test_damage_is_named(at: int, bytes_there: bytes, why: str) -> None:
    image = image_of(Variable("job", 1, 2, 1, 3, b"abc"))
    image[HEAD + at : HEAD + at + len(bytes_there)] = bytes_there
    with pytest.raises(CorruptImage, match=why):
        read_variable(PLAN, image)
