"""Checkpoints of earlier days stay readable for ever, by ckptd and by a reader that knows the page only.

A failure here means that the format changed.  Do not make the files anew; make the reader read both.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from naive_reader import Naive
from xxhash import xxh3_128_hexdigest

import ckptd

HERE = Path(__file__).parent
LIMIT_BYTES = 200 << 10

# The bytes themselves are fixed: nobody "repairs" a golden file.
DIGESTS = {
    "consolidated/manifest.json": "a4c327967b30dfc2778094e6166e6a8c",
    "consolidated/rank-00000.safetensors": "60d0a42c8b8dcbc5c15e06a2f62ee34a",
    "consolidated/rank-00000.safetensors.digests": "1751aaf234b0189df7b4f25701127795",
    "consolidated.json": "057fe453a66d43fa4737874dce589e3f",
    "distributed/manifest.json": "f0419cdf589ec063fb393887ef47a94b",
    "distributed/rank-00000.safetensors": "d984c4c9d83d9847f2e56cf1ea910084",
    "distributed/rank-00000.safetensors.digests": "fb87d69eaa64130ddc8177ab482f5a03",
    "distributed/rank-00001.safetensors": "0e3bdb968f8f2e5da1279805948dd26f",
    "distributed/rank-00001.safetensors.digests": "dca5e7d089d195c375aea1e5c39edd64",
    "distributed-rank-0.json": "6febe083187de6d01ae47112c1132750",
    "distributed-rank-1.json": "da41d8fdc1af31c7d308bd9bf852bf5c",
}


def expected(file: str) -> dict[str, np.ndarray[Any, Any]]:
    """What the live tensors held, as unsigned integers."""
    held = json.loads((HERE / file).read_text())
    return {
        name: np.frombuffer(base64.b64decode(data), f"<u{width}").reshape(shape)
        for name, (width, shape, data) in held.items()
    }


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_golden_bytes_are_what_they_were() -> None:
    files = {path.relative_to(HERE).as_posix(): path for path in sorted(HERE.rglob("*")) if path.is_file()}
    golden = {name: p.read_bytes() for name, p in files.items() if p.suffix not in (".py", ".pyc")}
    assert {name: xxh3_128_hexdigest(data) for name, data in golden.items()} == DIGESTS
    assert sum(map(len, golden.values())) < LIMIT_BYTES


@pytest.mark.parametrize("form", ["distributed", "consolidated"])
def test_both_readers_find_what_was_trained(form: str) -> None:
    naive = Naive(HERE / form)
    wanted = expected("distributed-rank-0.json" if form == "distributed" else "consolidated.json")
    with ckptd.open(str(HERE / form)) as checkpoint:
        assert checkpoint.manifest.form == naive.manifest["form"] == form
        assert checkpoint.names == [tensor["name"] for tensor in naive.manifest["tensors"]]
        for name in checkpoint.names:
            view, covers = checkpoint[name], naive.covers(name)
            first = covers[0]
            assert tuple(view.shape) == first.shape
            assert bits(view[...]) == first.tobytes(), name
            if view.shape and view.shape[0] > 2:
                assert bits(view[1:-1]) == first[1:-1].tobytes(), name
            if not view.differs:
                assert all(cover.tobytes() == first.tobytes() for cover in covers.values())
            if name in wanted:
                assert wanted[name].shape == first.shape and wanted[name].tobytes() == first.tobytes(), name
        assert checkpoint.verify() == []
        assert wanted.keys() <= set(checkpoint.names)
        dtypes = {checkpoint[name].dtype for name in checkpoint}
        assert {"BF16", "F32", "F64", "I32", "I64", "BOOL"} <= dtypes
        shapes = {checkpoint[name].shape for name in checkpoint}
        assert () in shapes and (0, 3) in shapes


def test_ranks_keep_what_is_their_own() -> None:
    naive, other = Naive(HERE / "distributed"), expected("distributed-rank-1.json")
    marked = {tensor["name"] for tensor in naive.manifest["tensors"] if tensor.get("differs")}
    assert marked == {"model.norm.running_mean", "model.norm.running_var"}
    for name in marked:
        assert naive.covers(name)[1].tobytes() == other.pop(name).tobytes()
    assert list(other) == ["model.ragged"]
    assert naive.covers("model.ragged@1")[0].tobytes() == other["model.ragged"].tobytes()
    with ckptd.open(str(HERE / "distributed")) as checkpoint:
        assert bits(checkpoint["model.ragged@1"][...]) == other["model.ragged"].tobytes()


def test_shards_aliases_and_blocks_are_of_every_kind() -> None:
    with ckptd.open(str(HERE / "distributed")) as checkpoint:
        tiles = checkpoint.tiles("model.embed.weight")
        assert dict(zip(tiles.place.tolist(), tiles.sizes[:, 0].tolist(), strict=True)) == {0: 4, 1: 3}
        assert checkpoint.tiles("model.head.weight").place.tolist() == [0], "rank 1 holds none of one row"
        tied = [checkpoint.tiles(f"model.block.{i}.weight") for i in (0, 2)]
        assert tied[0].arrays == tied[1].arrays == ("model.block.0.weight",)
        assert checkpoint.manifest.world_size == len(checkpoint.manifest.objects) == 2
    with ckptd.open(str(HERE / "consolidated")) as checkpoint:
        long = checkpoint["long"][...]
        assert bits(long) == bytes(i % 251 for i in range(53504))
        assert checkpoint.manifest.objects[0].nbytes > 65536


def test_objects_are_the_same_to_both() -> None:
    for form, count in (("distributed", 2), ("consolidated", 1)):
        naive = Naive(HERE / form)
        with ckptd.open(str(HERE / form)) as checkpoint:
            for rank in range(count):
                tree: Any = checkpoint.objects(rank)
                plain = naive.objects(rank)
                assert tree["scheduler"]["last_epoch"] == plain["scheduler"]["last_epoch"] == 3
                assert tree["optimizer"]["groups"][0]["betas"] == tuple(
                    plain["optimizer"]["groups"][0]["betas"]
                )
    values = plain["ckptd"]["values"]
    assert (values["epoch"], values["seen"]) == (4, [1, 2.5, None])
    assert tree["ckptd"]["values"]["seen"] == (1, 2.5, None)


def test_they_load_into_a_model_of_today() -> None:
    from make import trained

    for form, file in (("distributed", "distributed-rank-0.json"), ("consolidated", "consolidated.json")):
        state = trained(0, sharded=False)
        for parameter in state["model"].parameters():
            parameter.data.zero_()
        report = ckptd.load(str(HERE / form), state, allow_unexpected=("long", "seen", "epoch", "*@1"))
        assert report.step in (1, 3) and not report.missing
        wanted = expected(file)
        for name, parameter in state["model"].named_parameters():
            assert bits(parameter.detach()) == wanted[f"model.{name}"].tobytes(), name
            for key, value in state["optimizer"].state[parameter].items():
                assert bits(value) == wanted[f"optimizer.model.{name}.{key}"].tobytes(), (name, key)
