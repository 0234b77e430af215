"""Stores: whole files or none, names checked, and the manifest as the commit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from storagekit import arrays, write_split

from ckptd.errors import CkptdError, CorruptCheckpoint, NoSpace, NotFound
from ckptd.layout.placements import Shard
from ckptd.storage import catalog, place, writing
from ckptd.storage import store as stores
from ckptd.storage.reading import open_checkpoint
from ckptd.storage.store import AlreadyThere, Store, open_store


@pytest.fixture(params=["local", "file-url", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    urls = {
        "local": str(tmp_path),
        "file-url": f"file://{tmp_path}",
        "memory": f"memory://{uuid.uuid4().hex}",
    }
    return open_store(urls[request.param]).inside("a")


def test_every_store_keeps_what_it_is_given(store: Store) -> None:
    assert store.list() == []
    store.put("x", [b"one", memoryview(b"two"), b""])
    store.inside("b").put("y", [b"z"])
    assert store.read("x", 6) == b"onetwo"
    assert store.list() == ["b", "x"] and store.inside("b").list() == ["y"]
    with store.open("x") as reader:
        into = bytearray(3)
        reader.read_into(2, memoryview(into))
        assert (reader.size, bytes(into)) == (6, b"etw")
        with pytest.raises(CorruptCheckpoint, match="truncated"):
            reader.read_into(4, memoryview(into))
    with pytest.raises(CorruptCheckpoint, match="at most 5"):
        store.read("x", 5)
    store.put_if_absent("m", b"first")
    with pytest.raises(AlreadyThere):
        store.put_if_absent("m", b"second")
    assert store.read("m", 10) == b"first"
    store.delete("x")
    store.delete("x")
    with pytest.raises(NotFound):
        store.open("x")
    assert store.list() == ["b", "m"]


def test_a_writer_that_fails_leaves_nothing(store: Store) -> None:
    def pieces() -> object:
        yield b"x" * 100
        raise KeyError("mine")

    with pytest.raises(KeyError):
        store.put("x", pieces())  # type: ignore[arg-type]
    assert "x" not in store.list()


def test_nothing_is_left_where_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, data: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(NoSpace, match="free space"):
        open_store(str(tmp_path)).put("x", [b"1"])
    assert not list(tmp_path.iterdir())


class Calls:
    """The system calls that make files durable, in order: "fsync x", "rename x", "link x"."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[str] = []
        self.failing = ""  # the call that fails with EIO
        fsync, replace, link = os.fsync, os.replace, os.link
        monkeypatch.setattr(
            os, "fsync", lambda fd: self._do("fsync", Path(f"/proc/self/fd/{fd}").readlink(), fsync, fd)
        )
        monkeypatch.setattr(os, "replace", lambda old, new: self._do("rename", new, replace, old, new))
        monkeypatch.setattr(os, "link", lambda old, new: self._do("link", new, link, old, new))

    def _do(self, name: str, path: Path, call: Callable[..., None], *arguments: object) -> None:
        shown = "scratch" if path.name.startswith(stores.SCRATCH_PREFIX) else path.name
        self.made.append(f"{name} {shown}")
        if self.made[-1] == self.failing:
            raise OSError(5, "Input/output error")
        call(*arguments)


def test_a_failed_fsync_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    calls.failing = "fsync scratch"
    store = open_store(str(tmp_path))
    puts: list[Callable[[], object]] = [
        lambda: store.put("x", [b"1"]),
        lambda: store.put_if_absent("x", b"1"),
    ]
    for put in puts:
        calls.made.clear()
        with pytest.raises(CkptdError, match="Input/output"):
            put()
        assert calls.made[-1] == "fsync scratch" and calls.made.count("fsync scratch") == 1
        assert not list(tmp_path.iterdir())


def test_files_and_directories_are_synced_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    store = open_store(str(tmp_path)).inside("job").inside("step")
    store.put("x", [b"1"])
    above = {f"fsync {path.name}" for path in tmp_path.parents}  # they may be as new as these
    below = [call for call in calls.made if call not in above]
    assert below == [f"fsync {tmp_path.name}", "fsync job", "fsync scratch", "rename x", "fsync step"]
    calls.made.clear()
    store.put_if_absent("m", b"1")
    assert calls.made == ["fsync scratch", "link m", "fsync step"]
    calls.made.clear()
    with pytest.raises(AlreadyThere):
        store.put_if_absent("m", b"2")
    assert calls.made == ["fsync scratch", "link m", "fsync step"]
    calls.made.clear()
    store.delete("x")
    assert calls.made == ["fsync step"]


def test_a_directory_that_another_made_is_synced_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "step").mkdir()
    calls = Calls(monkeypatch)
    store = open_store(str(tmp_path)).inside("step")
    store.put("x", [b"1"])
    store.put("y", [b"1"])
    assert calls.made.count(f"fsync {tmp_path.name}") == 1
    assert calls.made[0] == f"fsync {tmp_path.name}"


def test_a_new_directory_whose_fsync_failed_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(monkeypatch)
    calls.failing = f"fsync {tmp_path.name}"
    store = open_store(str(tmp_path)).inside("step")
    with pytest.raises(CkptdError, match="Input/output"):
        store.put("x", [b"1"])
    assert not list(tmp_path.iterdir()) and calls.made == [f"fsync {tmp_path.name}"]
    calls.failing = ""
    store.put("x", [b"1"])
    assert store.read("x", 1) == b"1"


def test_what_may_not_be_durable_is_not_called_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(monkeypatch)
    store = open_store(str(tmp_path)).inside("step")
    store.put("x", [b"1"])
    calls.failing = "fsync step"
    with pytest.raises(CkptdError, match="Input/output"):
        store.put_if_absent("m", b"1")
    calls.failing = ""
    calls.made.clear()
    # A second fsync would succeed, and say nothing: what is there is put anew first, by any object.
    with pytest.raises(AlreadyThere):
        open_store(str(tmp_path)).inside("step").put_if_absent("m", b"2")
    put = ["fsync scratch", "rename m", "fsync step"]
    assert [call for call in calls.made if call in put or call == "link m"][:5] == [
        "fsync scratch", "link m", *put,
    ]  # fmt: skip
    assert store.read("m", 1) == b"1"
    calls.made.clear()
    with pytest.raises(AlreadyThere):
        store.put_if_absent("m", b"1")
    assert "rename m" not in calls.made


def test_a_link_in_place_of_a_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"s")
    (tmp_path / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(CkptdError):
        open_store(str(tmp_path)).open("link")


KILLED = """
import sys, os, signal
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from storagekit import arrays, write_split
from ckptd.layout.placements import Shard
from ckptd.storage import store
at = int(sys.argv[3])
count = 0
def wrapped(call):
    def counted(*arguments, **more):
        global count
        count += 1
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **more)
    return counted
for name in ("open", "write", "fsync", "link"):
    setattr(store.os, name, wrapped(getattr(os, name)))
write_split(Path(sys.argv[1]), arrays(seed=5, count=2), (2,), (Shard(0),))
print("calls", count)
"""


@pytest.mark.parametrize("at", [1, 4, 9, 15, 21, 24, 25, 26, 27, 28, 29, 10_000])
def test_a_writer_killed_at_a_system_call_leaves_a_checkpoint_or_none(tmp_path: Path, at: int) -> None:
    root = tmp_path / "c"
    command = [sys.executable, "-c", KILLED, str(root), str(Path(__file__).parent), str(at)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode == 0:
        assert at == 10_000, done.stdout
    else:
        assert done.returncode == -signal.SIGKILL, done.stderr
    try:
        found = open_checkpoint(str(root))
    except NotFound:
        assert at != 10_000
        return
    assert found.verify() == []
    assert at > 20


def test_a_place_is_written_once(tmp_path: Path) -> None:
    write_split(tmp_path / "c", arrays(1), (1,), (Shard(0),))
    with pytest.raises(AlreadyThere, match="written once"):
        writing.target(str(tmp_path / "c"))


def test_publishing_again_is_fine_and_another_one_is_not(tmp_path: Path) -> None:
    parts = write_split(tmp_path, arrays(1), (2,), (Shard(0),))
    store = open_store(str(tmp_path))
    writing.publish(store, writing.Heading("job", 3, world_size=2), parts)
    with pytest.raises(AlreadyThere):
        writing.publish(store, writing.Heading("job", 4, world_size=2), parts)


def test_nothing_is_published_while_a_part_is_missing(tmp_path: Path) -> None:
    parts = write_split(tmp_path, arrays(1), (2,), (Shard(0),), publish=False)
    store = open_store(str(tmp_path))
    for suffix in (".digests", ""):
        store.delete(place.object_name(1) + suffix)
        with pytest.raises(CorruptCheckpoint, match="not in place"):
            writing.publish(store, writing.Heading("job", 3, world_size=2), parts)
    assert "manifest.json" not in store.list()


def test_the_catalog_lists_what_has_a_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPTD_STORE", str(tmp_path))
    for step, generation in ((5, 0), (5, 1), (9, 0), (12, 0)):
        directory = tmp_path / "job" / place.directory_name(step, generation)
        parts = write_split(directory, arrays(step), (1,), (Shard(0),), publish=False, step=step)
        if step != 12:
            writing.publish(open_store(str(directory)), writing.Heading("job", step, generation), parts)
    (tmp_path / "job" / "step-junk").mkdir()
    found = catalog.entries(str(tmp_path), "job")
    assert [(e.step, e.generation) for e in found] == [(5, 0), (5, 1), (9, 0)]
    assert open_checkpoint("ckptd://job/step-5").store.url.endswith("step-00000005.g00001")
    assert open_checkpoint("ckptd://job/step-5.g0").store.url.endswith("step-00000005.g00000")
    assert open_checkpoint("ckptd://job/latest").store.url.endswith("step-00000005.g00001")  # newest line
    with pytest.raises(NotFound, match="step 12"):
        open_checkpoint("ckptd://job/step-12")
    # The newest line counts first; what cannot be used is passed over, and named.
    newest, skipped = catalog.newest(str(tmp_path), "job")
    assert newest == catalog.Entry(5, 1) and skipped == []
    (tmp_path / "job" / found[1].directory / place.object_name(0)).write_bytes(b"short")
    newest, skipped = catalog.newest(str(tmp_path), "job")
    assert newest == catalog.Entry(9, 0)
    assert [s.entry for s in skipped] == [found[1]] and "truncated" in skipped[0].why


def test_the_default_store_is_in_the_state_directory() -> None:
    assert place.store_url({"XDG_STATE_HOME": "/s"}) == "/s/ckptd/checkpoints"
    assert place.store_url({"CKPTD_STORE": "s3://bucket/x"}) == "s3://bucket/x"
    for step, generation in ((0, 0), (1000, 7), (123456789, 0)):
        assert place.parse_directory(place.directory_name(step, generation)) == (step, generation)
    assert place.directory_name(1000, 7) == "step-00001000.g00007"
    assert place.parse_directory("step-000001000.g00007") is None
