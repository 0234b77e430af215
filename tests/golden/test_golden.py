"""Checkpoints of earlier days stay readable for ever, by ckptd and by a reader that knows the page only.

A failure here means that the format changed.  Do not make the files anew; make the reader read both.
"""

from __future__ import annotations

import ast
import base64
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from naive_reader import Naive
from xxhash import xxh3_128_digest, xxh3_128_hexdigest

import ckptd
from ckptd.integrations.fsspec_store import CkptdFileSystem
from ckptd.layout.fingerprint import fingerprint
from ckptd.storage import marks
from ckptd.storage.lines import Start
from ckptd.storage.local_store import LocalStore

HERE = Path(__file__).parent
LIMIT_BYTES = 320 << 10
FORMS = ("distributed", "consolidated", "packed")

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
    "files/.metadata": "5b416fac0487a13ae6fde8be1ffbdeee",
    "files/.metadata.digests": "895884bb97fb1647f353066f75b03890",
    "files/__0_0.distcp": "718c11f616308dda93319a385487e44a",
    "files/__0_0.distcp.digests": "c8c15bbcbd904fb0a5d85a06373538a9",
    "files/manifest.json": "e586245d7c032bae86e1f879bd10ab57",
    "lines/g00003.json": "d36aa9909259bc5e53754633da49c710",
    "packed/manifest.json": "8aa2c484a63bd4f2488c932ba1ac0570",
    "packed/pinned": "f4c06cddd88bcd4bcfe47c08a62c1319",
    "packed/rank-00000.safetensors": "3935e494f1a627265548fe6345b1d494",
    "packed/rank-00000.safetensors.digests": "1ca98bd6209045c9291a48655f28981b",
    "packed/rank-00000.safetensors.frames": "44fc28b04f3c85cb0ffbc9e72d38ce83",
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


def test_the_second_reader_is_short_and_knows_nothing_of_ours() -> None:
    text = (HERE / "naive_reader.py").read_text()
    assert text.count("\n") < 100
    imported = {
        name.name if isinstance(node, ast.Import) else node.module
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in node.names
    }
    assert imported - {"__future__", "base64", "struct", "pathlib", "typing"} == {
        "json",
        "numpy",
        "zstandard",
    }


@pytest.mark.parametrize("form", [*FORMS, "files"])
def test_digests_are_as_the_page_says(form: str) -> None:
    naive = Naive(HERE / form)
    text = (HERE / form / "manifest.json").read_bytes()
    body = text[: text.rindex(b',"digest":"')]
    assert text == body + b',"digest":"%b"}\n' % xxh3_128_hexdigest(body).encode()
    assert naive.manifest["ckptd.manifest"] == 1
    for data, (name, nbytes, root, _, *packed) in zip(naive.files, naive.manifest["objects"], strict=True):
        table = (HERE / form / f"{name}.digests").read_bytes()
        blocks = [data[at : at + 65536].ljust(65536, b"\0") for at in range(0, nbytes, 65536)]
        digests = b"".join(map(xxh3_128_digest, blocks))
        assert table == struct.pack("<8sIIQQ", b"ckptdtab", 1, 65536, nbytes, len(blocks)) + digests
        assert xxh3_128_hexdigest(digests) == root
        if packed:
            frames = (HERE / form / f"{name}.frames").read_bytes()
            rows = list(struct.iter_unpack("<IB3x", frames[32:]))
            head = struct.pack("<8sIIQQ", b"ckptdfrm", 1, 1 << 20, nbytes, len(rows))
            assert frames[:32] == head and len(rows) == -(-nbytes // (1 << 20))
            length = (HERE / form / name).stat().st_size
            assert packed == ["zstd-planes/1", length, xxh3_128_hexdigest(frames)]


@pytest.mark.parametrize("form", FORMS)
def test_both_readers_find_what_was_trained(form: str) -> None:
    naive = Naive(HERE / form)
    wanted = expected("distributed-rank-0.json" if form == "distributed" else "consolidated.json")
    with ckptd.open(str(HERE / form)) as checkpoint:
        of_manifest = "consolidated" if form == "packed" else form
        assert checkpoint.manifest.form == naive.manifest["form"] == of_manifest
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


def test_compressed_groups_are_of_every_kind() -> None:
    frames = (HERE / "packed/rank-00000.safetensors.frames").read_bytes()
    assert [width for _, width in struct.iter_unpack("<IB3x", frames[32:])] == [4, 1, 1, 0]
    with ckptd.open(str(HERE / "packed")) as checkpoint:
        wide, long = checkpoint["wide"][...], checkpoint["long"][...]
        assert torch.equal(wide, (torch.arange(300_000) % 977).float())
        assert torch.equal(long, (torch.arange(len(long)) % 251).to(torch.uint8))
        assert torch.equal(checkpoint["wide"][200_000:200_003], wide[200_000:200_003])
        assert (
            checkpoint.objects()["ckptd"]["values"]["text"]
            == Naive(HERE / "packed").objects(0)["ckptd"]["values"]["text"]
        )


def mixed(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def weight(dim: int, i: int) -> int:
    def table(m: int, j: int) -> int:
        key = mixed((0x636B7074640001 + m + 0x9E3779B97F4A7C15) % 2**64)
        return mixed((key + (j + 1) * 0x9E3779B97F4A7C15) % 2**64) | 1

    return table(2 * dim + 1, i // 4096) * table(2 * dim, i % 4096) % 2**64


def test_fingerprints_are_as_the_page_says() -> None:
    """In Python's numbers, element by element."""
    naive = Naive(HERE / "packed")
    prints = naive.manifest["fingerprints"]
    assert prints.keys() == {tensor["name"] for tensor in naive.manifest["tensors"]}
    for name, stored in prints.items():
        if name == "long":
            continue  # it has a million elements
        values, total = naive.covers(name)[0], 0
        if name == "wide":  # more than one table of weights is long; and this goes by tables
            first = sum(int(v) * weight(0, i) for i, v in enumerate(values[:9000].tolist())) % 2**64
            assert first == fingerprint(values[:9000])
            continue
        for x in np.ndindex(values.shape):
            product = 1
            for dim, i in enumerate(x):
                product = product * weight(dim, i) % 2**64
            bits = int(values[x])
            if values.itemsize == 8:
                bits = (bits % 2**32) * weight(65536, 0) + (bits >> 32) * weight(65536, 1)
            total += bits * product
        assert f"{total % 2**64:016x}" == stored, name


def test_files_of_other_tools_are_kept_verbatim(tmp_path: Path) -> None:
    held = {
        "__0_0.distcp": bytes(i % 253 for i in range(70_000)),
        ".metadata": b"no pickle, but kept like one",
    }
    naive = Naive(HERE / "files")
    assert dict(zip([o[0] for o in naive.manifest["objects"]], naive.files, strict=True)) == held
    assert naive.manifest["form"] == "files" and naive.manifest["tensors"] == []
    shutil.copytree(HERE / "files", tmp_path / "golden/step-00000007.g00000")
    fs = CkptdFileSystem(store=str(tmp_path))
    assert {name: fs.cat_file(f"golden/step-7/{name}") for name in held} == held


def test_lines_and_pins_are_read() -> None:
    data = (HERE / "lines/g00003.json").read_bytes()
    assert Start.read(data, 3) == Start(3, (2, 900), "loss spike at 1200", 1_800_000_000)
    naive = json.loads(data)
    assert naive.pop("digest") == xxh3_128_hexdigest(data[: data.rindex(b',"digest":"')])
    assert naive == {
        "ckptd.line": 1, "job": "golden", "generation": 3, "parent": [2, 900],
        "reason": "loss spike at 1200", "time_s": 1_800_000_000,
    }  # fmt: skip
    assert marks.pin_of(LocalStore(HERE / "packed")) == marks.Pin("kept for ever", 1_800_000_000)
    pin = json.loads((HERE / "packed/pinned").read_bytes())
    assert pin == {"ckptd.pin": 1, "reason": "kept for ever", "time_s": 1_800_000_000}


def test_objects_are_the_same_to_both() -> None:
    for form, count in (("packed", 1), ("distributed", 2), ("consolidated", 1)):
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

    for form in FORMS:
        file = "distributed-rank-0.json" if form == "distributed" else "consolidated.json"
        state = trained(0, sharded=False)
        for parameter in state["model"].parameters():
            parameter.data.zero_()
        report = ckptd.load(
            str(HERE / form), state, allow_unexpected=("long", "wide", "seen", "epoch", "text", "*@1")
        )
        assert report.step in (1, 3) and not report.missing
        wanted = expected(file)
        for name, parameter in state["model"].named_parameters():
            assert bits(parameter.detach()) == wanted[f"model.{name}"].tobytes(), name
            for key, value in state["optimizer"].state[parameter].items():
                assert bits(value) == wanted[f"optimizer.model.{name}.{key}"].tobytes(), (name, key)
