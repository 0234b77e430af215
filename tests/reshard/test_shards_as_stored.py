"""What is said of a rank's shards, live or in an image, is what torch stores there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from reshard_model import Layout, cut, mesh_of
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from xxhash import xxh3_128_digest

from ckptd.client import targets
from ckptd.client.tensors import Form
from ckptd.errors import StateMismatch
from ckptd.image import Variable, encode
from ckptd.storage import writing
from ckptd.storage.describe import STATIC_NAME, tensors_of_image
from ckptd.storage.local_store import LocalStore
from ckptd.storage.parts import LocalTensor


def image_of(directory: Path, name: str, local: torch.Tensor, form: Form) -> memoryview:
    """An image that holds one shard and its form, as the client writes it."""
    static = bytearray(encode({"aliases": {}, "forms": {name: tuple(form)}}))
    held = {name: ("I64", local), STATIC_NAME: ("U8", torch.frombuffer(static, dtype=torch.uint8))}
    tensors = [
        LocalTensor.whole(key, code, tuple(t.shape), key, xxh3_128_digest(targets.stored_bytes(t)))
        for key, (code, t) in held.items()
    ]
    writing.write_arrays(
        LocalStore(directory),
        Variable("job", 0, 3, 0, 1, writing.empty_objects()),
        tensors,
        lambda key: tuple(held[key][1].shape),
        lambda key: targets.stored_bytes(held[key][1]),
    )
    (file,) = directory.glob("*.safetensors")
    return memoryview(file.read_bytes())


@pytest.mark.parametrize("size", range(14))
@pytest.mark.parametrize("mesh", [(2, 2), (3, 2), (2, 3)])
def test_shards_in_images_are_what_fully_shard_stores(
    tmp_path: Path, mesh: tuple[int, int], size: int
) -> None:
    """Of 7 rows over 3 x 2 ranks, rank 5 has the last one; as torch's placements read, rank 4 had."""
    layout, whole = Layout("fsdp-tp", mesh), torch.arange(size)
    kinds = (("strided", 0, mesh[1]), ("shard", 0))
    for rank in range(layout.ranks):
        local = cut(whole, layout.cuts("model.block.up.bias", 1, rank))
        form = Form((size,), (1,), kinds, mesh, ("dp", "tp"), divmod(rank, mesh[1]))
        described = {t.name: t for t in tensors_of_image(image_of(tmp_path / str(rank), "w", local, form))}[
            "w"
        ]
        found = [
            at
            for offset, length in zip(described.offsets[:, 0], described.sizes[:, 0], strict=True)
            for at in range(int(offset), int(offset + length))
        ]
        assert found == local.tolist(), rank


def test_a_shard_that_is_not_what_its_placements_say_is_refused() -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=3)
    try:
        bias = Layout("fsdp", (3,)).build(seed=3).get_parameter("block.up.bias")
        assert isinstance(bias, DTensor)
        assert targets.describe("bias", bias, 0).tiles.sizes.tolist() == [[3]]
        bias._local_tensor = bias.to_local().detach()[:-1]
        with pytest.raises(StateMismatch, match=r"bias is not stored as .* has \[2\] of \[7\]"):
            targets.describe("bias", bias, 0)
    finally:
        dist.destroy_process_group()
        mesh_of.cache_clear()
