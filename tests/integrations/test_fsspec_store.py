"""`ckptd://` for fsspec: DCP's own files under our commit."""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import torch.distributed.checkpoint as dcp
from dcpkit import blank, one_process, same, state
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter

import ckptd
from ckptd.errors import CkptdError, CorruptCheckpoint, InvalidRequest, NoSpace
from ckptd.image.manifest import Manifest
from ckptd.integrations.dcp import Reader, Writer
from ckptd.integrations.fsspec_store import CkptdFileSystem
from ckptd.integrations.lines import generation_for, parent_in
from ckptd.integrations.streams import WrittenFile
from ckptd.storage import catalog
from ckptd.storage.lines import Key, Lines, Start
from ckptd.storage.local_store import LocalStore


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CKPTD_STORE", str(tmp_path / "store"))
    return tmp_path / "store"


def save(where: str, what: dict[str, Any]) -> None:
    with one_process():
        warnings.filterwarnings("ignore", "Detected an existing checkpoint", UserWarning)
        dcp.save(what, checkpoint_id=where)


def load(where: str, like: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = blank(like)
    with one_process():
        dcp.load(found, checkpoint_id=where)
    return found


def put(fs: CkptdFileSystem, path: str, data: bytes) -> None:
    with fs.open(path, "wb") as file:
        file.write(data)


def test_dcp_by_checkpoint_id_alone(store: Path) -> None:
    saved = state(5)
    del saved["model"]["tiny"]  # torch.load refuses to load fp8 with weights_only
    save("ckptd://llama/step-7", saved)
    assert same(load("ckptd://llama/step-7", saved), saved)
    directory = store / "llama" / "step-00000007.g00000"
    files = sorted(path.name for path in directory.iterdir())
    assert files == [
        ".metadata",
        ".metadata.digests",
        "__0_0.distcp",
        "__0_0.distcp.digests",
        "manifest.json",
    ]
    assert json.loads((directory / "manifest.json").read_text())["form"] == "files"
    with ckptd.open("ckptd://llama/step-7") as checkpoint:
        assert checkpoint.verify() == []
    with pytest.raises(InvalidRequest, match="another tool's files"):
        ckptd.load("ckptd://llama/step-7", into={"w": torch.ones(2)})


def test_saving_a_step_again_starts_a_new_line() -> None:
    for step, value in ((5, 1.0), (10, 2.0), (5, 3.0), (10, 4.0), (12, 5.0)):
        save(f"ckptd://llama/step-{step}", {"w": torch.full((4,), value)})
    found = [
        (entry.generation, entry.step) for entry in catalog.entries(str(CkptdFileSystem()._store), "llama")
    ]
    assert sorted(found) == [(0, 5), (0, 10), (1, 5), (1, 10), (1, 12)]
    like = {"w": torch.zeros(4)}
    values = [
        load(f"ckptd://llama/{name}", like)["w"][0] for name in ("step-5", "step-5.g0", "step-10", "latest")
    ]
    assert values == [3, 1, 4, 5]
    with ckptd.open("ckptd://llama/step-10.g1") as second:
        assert second.manifest.parent == (1, 5)
    with pytest.raises(dcp.CheckpointException) as caught:
        save("ckptd://llama/step-5.g1", like)
    assert isinstance(caught.value.failures[0][0], FileExistsError)


def test_the_generation_of_a_new_file() -> None:
    def generation(step: int, *keys: Key, starts: Sequence[Start] = ()) -> int:
        return generation_for(Lines(dict.fromkeys(keys), starts), step)

    assert generation(4) == 0
    assert generation(4, (0, 3)) == 0
    assert generation(4, (0, 3), (0, 9)) == 1
    assert generation(8, (0, 9), (1, 4)) == 1
    assert generation(4, (0, 9), (1, 4)) == 2
    # A rollback to step 3 began generation 1: what comes next is its first checkpoint.
    back = Start(1, (0, 3), "loss spike", 0)
    assert generation(4, (0, 3), (0, 9), starts=[back]) == 1
    assert parent_in(Lines(dict.fromkeys([(0, 3), (0, 9)]), [back]), 4, 1) == (0, 3)


def test_nothing_is_there_before_the_commit() -> None:
    fs, other = fsspec.filesystem("ckptd"), fsspec.filesystem("ckptd")
    assert isinstance(fs, CkptdFileSystem) and fs is not other
    put(fs, "ckptd://llama/step-1/__0_0.distcp", b"data")
    put(fs, "ckptd://llama/step-1/.metadata.tmp", b"index")
    assert fs.exists("ckptd://llama/step-1/__0_0.distcp")  # its writer sees it
    for path in ("ckptd://llama/step-1/__0_0.distcp", "ckptd://llama/step-1", "ckptd://llama"):
        assert not other.exists(path)
    fs.mv("ckptd://llama/step-1/.metadata.tmp", "ckptd://llama/step-1/.metadata")
    assert other.ls("ckptd://llama", detail=False) == ["llama/step-1"]
    assert other.ls("ckptd://llama/step-1", detail=False) == [
        "llama/step-1/.metadata",
        "llama/step-1/__0_0.distcp",
    ]
    assert other.cat_file("ckptd://llama/step-1/__0_0.distcp") == b"data"
    assert other.isdir("ckptd://llama/step-1") and other.isfile("ckptd://llama/step-1/.metadata")
    assert other.ls("ckptd://", detail=False) == ["llama"]


def test_what_an_earlier_try_left_is_replaced() -> None:
    first, second = CkptdFileSystem(), CkptdFileSystem()
    put(first, "llama/step-1/__0_0.distcp", b"old" * 50_000)
    put(second, "llama/step-1/__0_0.distcp", b"new")
    put(second, "llama/step-1/.metadata.tmp", b"index")
    second.rename("llama/step-1/.metadata.tmp", "llama/step-1/.metadata")
    assert CkptdFileSystem().cat_file("llama/step-1/__0_0.distcp") == b"new"


def test_a_failed_save_leaves_no_checkpoint(store: Path) -> None:
    class Unsaveable:
        def __reduce__(self) -> Any:
            raise RuntimeError("no")

    with pytest.raises(dcp.CheckpointException):
        save("ckptd://llama/step-1", {"w": torch.ones(10), "bad": Unsaveable()})
    assert not fsspec.filesystem("ckptd").exists("ckptd://llama/step-1")
    assert not [path for path in store.rglob("*") if path.is_file()]
    save("ckptd://llama/step-1", {"w": torch.ones(10)})
    assert load("ckptd://llama/step-1", {"w": torch.ones(10)})["w"].sum() == 10


def test_overwrite_false_is_refused_by_dcp() -> None:
    save("ckptd://llama/step-1", {"w": torch.ones(1)})
    with one_process(), pytest.raises(dcp.CheckpointException, match="already exists"):
        dcp.save({"w": torch.ones(1)}, storage_writer=FsspecWriter("ckptd://llama/step-1", overwrite=False))


def test_ranks_without_collectives_are_refused() -> None:
    writer = FsspecWriter("ckptd://llama/step-1")
    with pytest.raises((InvalidRequest, dcp.CheckpointException), match="use_collectives"), one_process():
        dcp.save({"w": torch.ones(1)}, storage_writer=writer, use_collectives=False)


def test_many_threads_write_one_checkpoint() -> None:
    saved = {f"w{n}": torch.full((50_000,), float(n)) for n in range(12)}
    with one_process():
        dcp.save(saved, storage_writer=FsspecWriter("ckptd://llama/step-1", thread_count=4))
    found = {name: torch.zeros(50_000) for name in saved}
    with one_process():
        dcp.load(found, storage_reader=FsspecReader("ckptd://llama/step-1"))
    assert same(found, saved)


def test_damage_is_found_when_it_is_read(store: Path) -> None:
    save("ckptd://llama/step-1", {"w": torch.ones(1_000_000)})
    file = next(store.rglob("__0_0.distcp"))
    content = bytearray(file.read_bytes())
    content[3_000_000] ^= 1
    file.write_bytes(content)
    fs = CkptdFileSystem()
    with fs.open("llama/step-1/__0_0.distcp") as stream:
        assert stream.read(1000) == bytes(content[:1000])  # these blocks are whole
        stream.seek(2_999_990)
        with pytest.raises(CorruptCheckpoint, match="do not match their digest"):
            stream.read(20)
    with pytest.raises(dcp.CheckpointException):
        load("ckptd://llama/step-1", {"w": torch.ones(1_000_000)})
    file.write_bytes(content[:-1])
    with pytest.raises(CorruptCheckpoint, match="truncated"):
        fs.open("llama/step-1/__0_0.distcp")


def test_reading_as_any_file_is_read() -> None:
    data = bytes(range(256)) * 9000
    fs = CkptdFileSystem()
    put(fs, "llama/step-1/a", data)
    put(fs, "llama/step-1/empty", b"")
    put(fs, "llama/step-1/.metadata.tmp", b"")
    fs.mv("llama/step-1/.metadata.tmp", "llama/step-1/.metadata")
    assert fs.size("llama/step-1/a") == len(data) and fs.cat_file("llama/step-1/empty") == b""
    with fs.open("llama/step-1/a") as stream:
        for at, count in (
            (0, 10),
            (65_530, 20),
            (1_048_570, 2_000_000),
            (len(data) - 3, 10),
            (len(data) + 5, 1),
        ):
            assert stream.seek(at) == at
            assert stream.read(count) == data[at : at + count]
        stream.seek(-5, 2)
        assert stream.read() == data[-5:]
        with pytest.raises((ValueError, OSError)):
            stream.seek(-1)


def test_names(store: Path) -> None:
    fs = CkptdFileSystem()
    for path in (
        "ckptd://llama/last/a",
        "ckptd://llama/step-1/a/b",
        "ckptd://../step-1/a",
        "ckptd://llama/latest/a",
    ):
        with pytest.raises(InvalidRequest):
            fs.open(path, "wb")
    for path in ("llama/step-1/..", "llama/step-1/manifest.json", "llama/step-1/x.digests", "llama/step-1"):
        with pytest.raises(InvalidRequest):
            fs.open(path, "wb")
    for mode in ("ab", "r+b"):
        with pytest.raises(InvalidRequest):
            fs.open("llama/step-1/a", mode)
    for path in ("llama", "llama/step-1", "llama/step-1/a", "llama/other", "a/b/c/d"):
        assert not fs.exists(path)
        with pytest.raises(FileNotFoundError):
            fs.info(path)
    with pytest.raises(InvalidRequest):
        CkptdFileSystem(store="ckptd://llama")
    assert not store.exists()


def test_a_checkpoint_is_removed_whole(store: Path) -> None:
    save("ckptd://llama/step-1", {"w": torch.ones(1)})
    save("ckptd://llama/step-1", {"w": torch.ones(1)})
    fs = CkptdFileSystem()
    for path, recursive in (("llama/step-1/.metadata", False), ("llama/step-1", False), ("llama", True)):
        with pytest.raises(PermissionError):
            fs.rm(path, recursive=recursive)
    fs.rm("llama/step-1.g0", recursive=True)
    assert fs.exists("llama/step-1")
    fs.rm("llama/step-1", recursive=True)
    assert not fs.exists("llama/step-1")
    assert not [path for path in store.rglob("*") if path.is_file()]


def test_a_removal_that_stops_leaves_no_half(monkeypatch: pytest.MonkeyPatch) -> None:
    save("ckptd://llama/step-1", {"w": torch.ones(1)})
    delete = LocalStore.delete
    left = [1]

    def delete_one(store: LocalStore, name: str) -> None:
        if not left:
            raise CkptdError("the store went away")
        left.pop()
        delete(store, name)

    monkeypatch.setattr(LocalStore, "delete", delete_one)
    with pytest.raises(CkptdError, match="went away"):
        CkptdFileSystem().rm("llama/step-1", recursive=True)
    assert not CkptdFileSystem().exists("llama/step-1")


def test_another_store_is_an_option() -> None:
    files, _ = fsspec.core.url_to_fs("ckptd://llama/step-1", store="memory://elsewhere")
    put(files, "ckptd://llama/step-1/a", b"x" * 200_000)
    put(files, "ckptd://llama/step-1/.metadata.tmp", b"")
    files.mv("ckptd://llama/step-1/.metadata.tmp", "ckptd://llama/step-1/.metadata")
    assert fsspec.filesystem("memory").exists("/elsewhere/llama/step-00000001.g00000/manifest.json")
    assert CkptdFileSystem(store="memory://elsewhere").cat_file("llama/step-1/a") == b"x" * 200_000


def test_a_manifest_of_files_describes_no_tensors(store: Path) -> None:
    with one_process():
        dcp.save({"w": torch.ones(1)}, storage_writer=Writer("ckptd://llama/step-1"))
    path = next(store.rglob("manifest.json"))
    forged = replace(Manifest.read(path.read_bytes()), form="files").write()
    with pytest.raises(CorruptCheckpoint, match="form is files"):
        Manifest.read(forged)


@pytest.mark.parametrize("universal", [True, False])
def test_saves_that_go_on_while_training_does(universal: bool) -> None:
    state = {"w": torch.ones(1000), "step": 1}
    where: dict[str, Any] = {"checkpoint_id": "ckptd://llama/step-1"}
    with one_process():
        going = dcp.async_save(state, **where, storage_writer=Writer() if universal else None)
        state["w"].add_(1)
        going.result(timeout=60)
        found = {"w": torch.zeros(1000), "step": 0}
        dcp.load(found, **where, storage_reader=Reader() if universal else None)
    assert found["step"] == 1 and found["w"].sum() == 1000


# The stream between a writer and a store


def test_a_store_that_fails_stops_the_writer() -> None:
    def put(pieces: Iterable[bytes]) -> None:
        next(iter(pieces))
        raise NoSpace("the disk is full")

    file = WrittenFile(put)
    with pytest.raises(NoSpace):
        for _ in range(100):
            file.write(b"x" * (4 << 20))
    file = WrittenFile(put)
    file.write(b"x")
    with pytest.raises(NoSpace):
        file.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "ckptd-write"]


@pytest.mark.parametrize("leave", ["error", "discard", "forget"])
def test_a_file_that_is_left_is_not_kept(leave: str) -> None:
    ends: list[str] = []

    def put(pieces: Iterable[bytes]) -> None:
        try:
            for _ in pieces:
                pass
        except BaseException:
            ends.append("discarded")
            raise
        ends.append("kept")

    file = WrittenFile(put)
    file.write(b"half")
    if leave == "error":
        with pytest.raises(CkptdError), file:
            raise CkptdError("the writer's own")
    elif leave == "discard":
        file.discard()
        file.close()
    del file
    assert ends == ["discarded"]
