"""Plans: images are valid safetensors files whose geometry never moves."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.errors import InvalidRequest
from ckptd.image import ImagePlan, TensorSpec, Variable, write_variable
from ckptd.image.plan import ALIGN_BYTES, DTYPE_BITS, MAX_IMAGE_BYTES, VARIABLE_NAME

NUMPY_CODES = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "I16": "i2", "U16": "u2", "F16": "f2", "I32": "i4",
    "U32": "u4", "F32": "f4", "I64": "i8", "U64": "u8", "F64": "f8", "C64": "c8",
}  # fmt: skip


def filled(plan: ImagePlan, seed: int = 3) -> memoryview:
    """An image of `plan` in memory that was full of garbage, with seeded contents."""
    rng = random.Random(seed)
    image = memoryview(bytearray(rng.randbytes(plan.image_bytes)))
    plan.lay_out(image)
    for spec in plan.tensors:
        body = rng.randbytes(spec.nbytes)
        # A bool has two values; every other dtype takes any bits.
        plan.tensor(image, spec.name)[:] = bytes(b & 1 for b in body) if spec.dtype == "BOOL" else body
    write_variable(plan, image, Variable("job", 7, 9, 0, 2, b"{}"[: plan.objects_capacity]))
    return image


tensor_names = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=12).filter(
    lambda name: name.isprintable() and not name.startswith("__")
)
shapes = st.lists(st.integers(0, 9), max_size=4).map(tuple)
specs = st.builds(
    TensorSpec, tensor_names, st.sampled_from(sorted(set(DTYPE_BITS) - {"F4", "F6_E2M3", "F6_E3M2"})), shapes
)
spec_lists = st.lists(specs, max_size=12, unique_by=lambda spec: spec.name)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(tensors=spec_lists, capacity=st.integers(0, 5000))
def test_any_plan_is_a_stock_safetensors_file_and_reads_back(
    tensors: list[TensorSpec], capacity: int
) -> None:
    plan = ImagePlan.build(tensors, objects_capacity=capacity)
    image = filled(plan)
    stock = dict(safetensors.deserialize(bytes(image)))
    for spec in tensors:
        found = stock[spec.name]
        assert found["dtype"] == spec.dtype
        assert tuple(found["shape"]) == spec.shape
        assert bytes(found["data"]) == plan.tensor(image, spec.name).tobytes()
    again = ImagePlan.parse(image)
    assert again == plan
    for field in dataclasses.fields(ImagePlan):
        assert getattr(again, field.name) == getattr(plan, field.name), field.name


@settings(deadline=None, derandomize=True, max_examples=60)
@given(tensors=spec_lists, capacity=st.integers(0, 5000))
def test_geometry_is_aligned_ordered_and_without_holes(tensors: list[TensorSpec], capacity: int) -> None:
    plan = ImagePlan.build(tensors, objects_capacity=capacity)
    assert capacity <= plan.objects_capacity < capacity + ALIGN_BYTES
    assert len(plan.header) % ALIGN_BYTES == 0
    assert plan.plan_hash == xxhash.xxh3_128_digest(plan.header)
    spans = [(plan.offset_of[spec.name], spec.nbytes) for spec in plan.tensors]
    assert all(offset % ALIGN_BYTES == 0 for offset, _ in spans)
    assert [offset for offset, _ in spans] == sorted(offset for offset, _ in spans)
    spans += [(pad.offset, pad.nbytes) for pad in plan.pads]
    assert all(0 < pad.nbytes < ALIGN_BYTES for pad in plan.pads)
    end = len(plan.header)
    for offset, nbytes in sorted(spans):
        assert offset == end
        end += nbytes
    assert plan.variable_offset == end
    assert plan.objects_offset + plan.objects_capacity == plan.image_bytes


def test_stock_readers_open_every_dtype(tmp_path: Path) -> None:
    tensors = [TensorSpec(f"t.{code}", code, (3, 5)) for code in NUMPY_CODES]
    tensors += [TensorSpec("scalar", "F64", ()), TensorSpec("empty", "F32", (0, 4))]
    plan = ImagePlan.build(tensors, objects_capacity=100)
    image = filled(plan)
    path = tmp_path / "image.safetensors"
    path.write_bytes(image)
    arrays = safetensors.numpy.load_file(path)
    for spec in tensors:
        expected = np.frombuffer(plan.tensor(image, spec.name), NUMPY_CODES[spec.dtype]).reshape(spec.shape)
        assert arrays[spec.name].tobytes() == expected.tobytes()
        assert arrays[spec.name].shape == spec.shape
    with safetensors.safe_open(path, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "ckptd": "image/1"}
        assert opened.offset_keys()[-1] == VARIABLE_NAME
        assert tuple(opened.get_slice("t.F32").get_shape()) == (3, 5)
    bf16 = ImagePlan.build(
        [TensorSpec("a", "BF16", (2,)), TensorSpec("b", "F8_E4M3", (3,))], objects_capacity=0
    )
    loaded = safetensors.torch.load(bytes(filled(bf16)))
    assert loaded["a"].shape == (2,)


@pytest.mark.parametrize("code", DTYPE_BITS)
def test_sizes_of_all_codes_are_those_of_safetensors(code: str) -> None:
    plan = ImagePlan.build([TensorSpec("a", code, (8, 3))], objects_capacity=0)
    found = dict(safetensors.deserialize(bytes(filled(plan))))["a"]
    assert len(found["data"]) == plan.tensors[0].nbytes


def test_a_plan_is_of_its_tensors_alone() -> None:
    tensors = [TensorSpec("a", "F32", (3,)), TensorSpec("b", "I8", (5,))]
    plan = ImagePlan.build(tensors, objects_capacity=64)
    assert ImagePlan.build(tensors, objects_capacity=1).plan_hash == plan.plan_hash  # same rounded capacity
    assert hash(ImagePlan.build(tensors, objects_capacity=64)) == hash(plan)
    for other in (tensors[::-1], tensors[:1], [TensorSpec("a", "F32", (3,)), TensorSpec("b", "U8", (5,))]):
        assert ImagePlan.build(other, objects_capacity=64).plan_hash != plan.plan_hash
    assert ImagePlan.build(tensors, objects_capacity=128).plan_hash != plan.plan_hash


def test_what_changes_in_a_later_step_is_the_tail_alone() -> None:
    plan = ImagePlan.build([TensorSpec("a", "F32", (1000,))], objects_capacity=1000)
    image = filled(plan)
    before = bytes(image)
    write_variable(plan, image, Variable("job", 8, 10, 0, 2, b"x" * 999))
    assert bytes(image)[: plan.variable_offset] == before[: plan.variable_offset]
    assert ImagePlan.parse(image).plan_hash == plan.plan_hash


def test_lay_out_leaves_no_trace_of_what_was_there() -> None:
    plan = ImagePlan.build([TensorSpec("a", "I8", (3,)), TensorSpec("b", "I8", (70,))], objects_capacity=10)
    images = [memoryview(bytearray([fill]) * plan.image_bytes) for fill in (0, 255)]
    for image in images:
        plan.lay_out(image)
        for spec in plan.tensors:
            plan.tensor(image, spec.name)[:] = bytes(spec.nbytes)
        write_variable(plan, image, Variable("job", 1, 1, 0, 1, b"abc"))
    assert images[0] == images[1]


def test_mistakes_are_refused() -> None:
    a = TensorSpec("a", "F32", (3,))
    with pytest.raises(ValueError, match="'a' is given twice"):
        ImagePlan.build([a, TensorSpec("b", "F32", ()), a], objects_capacity=0)
    with pytest.raises(ValueError, match="negative"):
        ImagePlan.build([a], objects_capacity=-1)
    with pytest.raises(ValueError, match="at most 200000"):
        ImagePlan.build([a] * 200_001, objects_capacity=0)
    with pytest.raises(ValueError, match="at most"):
        ImagePlan.build([TensorSpec(n, "U8", (MAX_IMAGE_BYTES,)) for n in "ab"], objects_capacity=0)
    with pytest.raises(InvalidRequest, match="reserved"):
        TensorSpec("__ckptd.pad.0", "U8", (1,))
    plan = ImagePlan.build([a], objects_capacity=0)
    for wrong in (bytearray(plan.image_bytes - 1), np.zeros((plan.image_bytes, 1), np.uint8)):
        with pytest.raises(ValueError, match="flat view"):
            plan.lay_out(memoryview(wrong))
    with pytest.raises(KeyError):
        plan.tensor(memoryview(bytearray(plan.image_bytes)), "b")


@pytest.mark.parametrize(
    ("dtype", "shape", "why"),
    [
        ("C128", (1,), "no safetensors dtype"),
        ("F32", (-1,), "at least 0"),
        ("F32", (True,), "plain ints"),
        ("F32", (1.0,), "plain ints"),
        ("F32", (1,) * 65, "65 dims"),
        ("F4", (3,), "does not end at a byte"),
        ("F32", (1 << 62, 1 << 62, 0), "beyond"),
    ],
)
def test_specs_that_no_image_can_hold_are_refused(dtype: str, shape: tuple[int, ...], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        TensorSpec("a", dtype, shape)
