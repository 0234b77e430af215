"""What every store does: one suite for the local disk, fsspec's memory, and S3 over HTTP."""

from __future__ import annotations

import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from storagekit import arrays, write_split

from ckptd.errors import CkptdError, CorruptCheckpoint, InvalidRequest, NotFound
from ckptd.layout.placements import Shard
from ckptd.storage import place, writing
from ckptd.storage.local_store import LocalStore
from ckptd.storage.reading import open_checkpoint
from ckptd.storage.remote_store import FsspecStore
from ckptd.storage.store import SCRATCH_PREFIX, AlreadyThere, Store, open_store


@pytest.fixture(params=["local", "file-url", "memory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        request.getfixturevalue("s3")
        return f"s3://tests/{uuid.uuid4().hex}"
    urls = {
        "local": str(tmp_path),
        "file-url": f"file://{tmp_path}",
        "memory": f"memory://{uuid.uuid4().hex}",
    }
    return urls[request.param]


@pytest.fixture
def store(url: str) -> Store:
    return open_store(url).inside("a")


def test_the_url_chooses(url: str) -> None:
    kind = type(open_store(url)).__name__
    assert kind == ("S3Store" if url.startswith("s3") else "FsspecStore" if "memory" in url else "LocalStore")
    assert {FsspecStore.__name__, LocalStore.__name__}  # both are of the suite


def test_files_are_written_whole_replaced_and_removed(store: Store) -> None:
    assert store.list() == []
    store.put("x", [b"one", memoryview(b"two"), b""])
    assert store.read("x", 6) == b"onetwo"
    store.put("x", iter([b"other"]))
    assert store.read("x", 6) == b"other"
    store.put("empty", [])
    assert store.read("empty", 0) == b""
    store.delete("x")
    store.delete("x")
    with pytest.raises(NotFound):
        store.open("x")
    with pytest.raises(NotFound):
        store.read("x", 10)
    assert store.list() == ["empty"]


def test_names_are_listed_in_order_and_directories_too(store: Store) -> None:
    names = [f"f-{number:03}" for number in range(30)]
    random.Random(1).shuffle(names)
    for name in names:
        store.put(name, [b"1"])
    store.inside("sub").inside("deeper").put("y", [b"2"])
    store.put("sub-not", [b"3"])  # orders between "sub" and "sub/"
    store.put(f"{SCRATCH_PREFIX}1", [b"4"])
    assert store.list() == [*sorted(names), "sub", "sub-not"]
    assert store.inside("sub").list() == ["deeper"] and store.inside("nothing").list() == []


def test_ranges_are_read_from_many_threads(store: Store) -> None:
    data = random.Random(2).randbytes(300_000)
    store.put("x", [data[:1], data[1:100_000], data[100_000:]])
    wrong: list[int] = []

    def read(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(6):
            start = rng.randrange(len(data))
            stop = rng.randrange(start, len(data) + 1)
            into = bytearray(stop - start)
            reader.read_into(start, memoryview(into))
            if into != data[start:stop]:
                wrong.append(seed)

    with store.open("x") as reader:
        assert reader.size == len(data)
        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not wrong and not any(thread.is_alive() for thread in threads)
        for start, length in ((len(data) - 1, 2), (len(data), 1), (len(data) + 9, 1)):
            with pytest.raises(CorruptCheckpoint, match="truncated"):
                reader.read_into(start, memoryview(bytearray(length)))
    with pytest.raises(CorruptCheckpoint, match="at most 5"):
        store.read("x", 5)


def test_a_large_file_in_uneven_pieces(store: Store) -> None:
    data = random.Random(3).randbytes(17 << 20)
    cuts = sorted(random.Random(4).sample(range(len(data)), 20))
    store.put("x", (data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)))
    with store.open("x") as reader:
        into = bytearray(len(data))
        reader.read_into(0, memoryview(into))
        assert into == data


@pytest.mark.parametrize("nbytes", [100, 18 << 20])
def test_a_writer_that_fails_leaves_nothing(store: Store, nbytes: int) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(3):
            yield bytes(nbytes // 3)
        raise KeyError("mine")

    with pytest.raises(KeyError):
        store.put("x", pieces())
    assert store.list() == []


def test_one_of_many_publishers_wins_and_the_others_learn_it(store: Store) -> None:
    store.put_if_absent("m0", b"first")
    with pytest.raises(AlreadyThere):
        store.put_if_absent("m0", b"second")
    assert store.read("m0", 10) == b"first"
    for turn in range(1, 4):
        won: list[bytes] = []
        lost: list[bytes] = []
        barrier = threading.Barrier(4)

        def publish(
            mine: bytes,
            name: str = f"m{turn}",
            barrier: threading.Barrier = barrier,
            won: list[bytes] = won,
            lost: list[bytes] = lost,
        ) -> None:
            barrier.wait(30)
            try:
                store.put_if_absent(name, mine)
                won.append(mine)
            except AlreadyThere:
                lost.append(mine)

        threads = [threading.Thread(target=publish, args=(b"%d" % n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(won) == 1 and len(lost) == 3
        assert store.read(f"m{turn}", 10) == won[0]


def test_two_coordinators_publish_the_same_step(url: str) -> None:
    store = open_store(url).inside("c")
    one = write_split_in(url, step=3)
    writing.publish(store, writing.Heading("job", 3, world_size=2), one)
    # The same manifest again is a lost answer; another one learns that it lost.
    writing.publish(store, writing.Heading("job", 3, world_size=2), one)
    with pytest.raises(AlreadyThere):
        writing.publish(store, writing.Heading("job", 3, generation=1, world_size=2), one)
    found = open_checkpoint(store.url)
    assert found.manifest.generation == 0 and found.verify() == []
    for name, whole in arrays(7).items():
        assert (found[name][...] == whole).all()


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "/etc", "a\0", "a b", "x" * 129])
def test_no_name_leads_out(store: Store, name: str) -> None:
    calls: list[Callable[[], object]] = [
        lambda: store.put(name, [b""]),
        lambda: store.put_if_absent(name, b""),
        lambda: store.open(name),
        lambda: store.inside(name),
        lambda: store.delete(name),
        lambda: store.modified(name),
    ]
    for call in calls:
        with pytest.raises(InvalidRequest):
            call()


def test_times_and_removal(store: Store) -> None:
    assert store.touched() == 0.0
    began = time.time()
    store.put("x", [b"1"])
    store.put(f"{SCRATCH_PREFIX}dead", [b"1"])
    # Stores count in seconds, and by their own clock.
    assert abs(store.modified("x") - began) < 60 and abs(store.touched() - began) < 60
    with pytest.raises(NotFound):
        store.modified("y")
    store.remove(began + 3600)
    assert store.list() == ["x"]
    store.delete("x")
    store.remove(began + 3600)
    assert store.list() == [] and store.touched() in (0.0, pytest.approx(began, abs=60))


def test_a_missing_bucket_is_named(s3: object) -> None:
    with pytest.raises(CkptdError, match="make the bucket"):
        open_store("s3://no-such-bucket/x").put("a", [b"1"])
    with pytest.raises(InvalidRequest, match="no bucket"):
        open_store("s3://")


def write_split_in(url: str, step: int) -> list[writing.Part]:
    directory = place.join(url, "c")
    return write_split(directory, arrays(7), (2,), (Shard(0),), publish=False, step=step)  # type: ignore[arg-type]
