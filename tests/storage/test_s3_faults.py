"""Snapshots to an S3 server behind a faulty network: what is said to be durable is, and every run ends."""

from __future__ import annotations

import random
import threading
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from conftest import PART_BYTES, QUICK, S3
from fault_proxy import Schedule
from storagekit import same, sealed

from ckptd.errors import CkptdError, DeadlineExceeded, Unreachable
from ckptd.image.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest
from ckptd.storage import catalog, multipart, place, snapshot
from ckptd.storage.reading import Checkpoint
from ckptd.storage.store import SCRATCH_PREFIX, AlreadyThere, Store
from ckptd.storage.writing import Heading

RANKS = (0, 1)
OLD, NEW = 1, 2
IMAGES = {step: [sealed(9, rank, len(RANKS), step) for rank in RANKS] for step in (OLD, NEW)}
HURRIED = replace(QUICK, tries=6, try_s=0.7, total_s=6.0, budget=25)


def test_forty_schedules(s3: S3) -> None:
    _schedules(s3, range(40))


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_five_hundred_schedules(s3: S3) -> None:
    _schedules(s3, range(1000, 1500))


def _schedules(s3: S3, seeds: range) -> None:
    s3.proxy.injected.clear()
    ends: Counter[str] = Counter()
    for seed in seeds:
        ends[_one(s3, seed)] += 1
    faults = ", ".join(f"{kind} {count}" for kind, count in sorted(s3.proxy.injected.items()))
    print(f"{len(seeds)} schedules of seeds {seeds[0]} to {seeds[-1]}: {dict(ends)}; faults: {faults}")
    assert ends["durable"] > len(seeds) // 3  # faults that pass do not keep a step from being durable
    assert ends["not durable"]  # and some stores were gone for good


def _one(s3: S3, seed: int) -> str:
    """One run of two nodes and two coordinators; returns how it ended."""
    prefix = f"run-{seed}-{uuid.uuid4().hex}"
    clean = s3.store(prefix, direct=True)
    _write(clean, OLD, 3)
    s3.proxy.use(Schedule.of(seed))
    faulty = s3.store(prefix, policy=HURRIED, seed=seed)
    reported: list[str] = []
    _together([lambda rank=rank: _node(faulty, rank) for rank in RANKS], seed)
    _together([lambda: reported.extend(_coordinator(faulty)) for _ in range(2)], seed)
    _read(faulty, OLD, seed)
    s3.proxy.use(Schedule())
    _check(clean, reported, seed)
    return "durable" if reported else "not durable"


def _node(store: Store, rank: int) -> None:
    for _ in range(2):
        try:
            snapshot.write_parts(_directory(store, NEW), [IMAGES[NEW][rank]])
        except CkptdError:
            continue
        return


def _coordinator(store: Store) -> list[str]:
    """Publishes as the flush does; returns what it says is durable."""
    for _ in range(2):
        try:
            if snapshot.publish_when_whole(_directory(store, NEW), Heading("job", NEW, world_size=2), RANKS):
                return ["durable"]
        except CkptdError:
            continue
    return []


def _read(store: Store, step: int, seed: int) -> None:
    """Reads through the faults: the right bytes, or an error that says that the store does not answer."""
    try:
        assert catalog.why_not(store.inside("job"), catalog.Entry(step, 0)) is None, f"seed {seed}"
        assert same(_open(store, step), IMAGES[step]), f"seed {seed}"
    except (Unreachable, DeadlineExceeded):
        pass


def _check(clean: Store, reported: list[str], seed: int) -> None:
    assert same(_open(clean, OLD), IMAGES[OLD]), f"seed {seed}: the old step is lost"
    there = snapshot.is_published(_directory(clean, NEW))
    assert there or not reported, f"seed {seed}: reported, and not there"
    if there:
        assert same(_open(clean, NEW), IMAGES[NEW]), f"seed {seed}: half a step is visible"


def _write(store: Store, step: int, tries: int) -> None:
    snapshot.write_parts(_directory(store, step), IMAGES[step])
    assert snapshot.publish_when_whole(_directory(store, step), Heading("job", step, world_size=2), RANKS)


def _open(store: Store, step: int) -> Checkpoint:
    inside = _directory(store, step)
    return Checkpoint(inside, Manifest.read(inside.read(MANIFEST_NAME, MAX_MANIFEST_BYTES)))


def _directory(store: Store, step: int) -> Store:
    return store.inside("job").inside(place.directory_name(step, 0))


def _together(calls: list[Callable[[], Any]], seed: int) -> None:
    errors: list[BaseException] = []

    def run(call: Callable[[], Any]) -> None:
        try:
            call()
        except BaseException as error:  # noqa: BLE001  # a thread's top frame: it is raised below
            errors.append(error)

    threads = [threading.Thread(target=run, args=(call,), daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    assert not any(thread.is_alive() for thread in threads), f"seed {seed} does not end"
    if errors:
        raise errors[0]


class Scripted(Schedule):
    """Faults by what is asked: the first requests that match get them."""

    def __init__(self, *script: tuple[str, str]) -> None:
        super().__init__(silent_s=30)
        self.script = list(script)

    def fault(self, number: int, what: str, before: int) -> str:
        for index, (matched, kind) in enumerate(self.script):
            if matched in what:
                del self.script[index]
                return kind
        return ""


@pytest.mark.parametrize("kind", ["lost", "silent", "500", "503", "reset", "cut"])
def test_an_answer_that_was_lost_is_found_by_reading_back(s3: S3, kind: str) -> None:
    store = s3.store(f"lost-{uuid.uuid4().hex}", policy=HURRIED)
    store.put_if_absent("first", b"1")  # whether the store has conditional puts is known from here on
    s3.proxy.use(Scripted(("PUT", kind)))
    store.put_if_absent("m", b"mine")
    assert s3.proxy.schedule.script == []  # type: ignore[attr-defined]
    assert store.read("m", 9) == b"mine"
    s3.proxy.use(Scripted(("PUT", kind)))
    with pytest.raises(AlreadyThere):
        store.put_if_absent("m", b"mine")  # another put of the same bytes is another put
    # The end of a large file's upload, twice: the second try finds no upload any more.
    data = random.Random(1).randbytes(5 * PART_BYTES + 7)
    s3.proxy.use(Scripted(("POST", ""), ("POST", kind), ("PUT", kind), ("PUT", kind)))
    store.put("x", [data])
    assert store.read("x", len(data)) == data
    assert _uploads(store) == []


def test_a_put_that_fails_or_is_broken_off_leaves_no_upload(s3: S3) -> None:
    store = s3.store(f"broken-{uuid.uuid4().hex}", policy=HURRIED)
    data = random.Random(1).randbytes(12 * PART_BYTES)
    s3.proxy.use(Scripted(*[("partNumber=7", "500")] * 30))
    with pytest.raises((Unreachable, DeadlineExceeded), match="tried 6 times"):
        store.put("x", [data])

    def pieces() -> Any:
        yield data
        raise KeyError("mine")

    s3.proxy.use(Schedule())
    with pytest.raises(KeyError):
        store.put("x", pieces())
    assert store.list() == [] and _uploads(store) == []


def test_uploads_of_dead_writers_are_aborted_and_the_others_not(s3: S3) -> None:
    root = s3.store(f"stale-{uuid.uuid4().hex}")
    other = s3.store(f"other-{uuid.uuid4().hex}")
    calls = root._calls
    for store, name in ((root, "a"), (root.inside("job"), "b"), (other, "c")):
        calls.call("begin", "create_multipart_upload", Key=store._key(name))
    prefix = root._prefix + "/"
    assert multipart.abort_stale(calls, prefix, older_s=3600) == 0
    assert multipart.abort_stale(calls, prefix, older_s=-3600) == 2
    assert _uploads(root) == [] and len(_uploads(other)) == 1
    multipart.abort_stale(calls, other._prefix, older_s=-3600)


def test_a_first_large_put_looks_for_stale_uploads(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    root = s3.store(f"sweep-{uuid.uuid4().hex}")
    root._calls.call("begin", "create_multipart_upload", Key=root.inside("job")._key("dead"))
    monkeypatch.setattr(multipart.abort_stale, "__defaults__", (-3600.0,))
    root.inside("job").inside("step").put("x", [bytes(3 * PART_BYTES)])
    assert _uploads(root) == []


def test_more_names_than_a_page(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    store = s3.store(f"pages-{uuid.uuid4().hex}")
    for number in range(11):
        store.put(f"n{number:02}", [b""]) if number % 2 else store.inside(f"n{number:02}").put("x", [b""])
    call = store._calls.call

    def in_small_pages(what: str, method: str, **arguments: Any) -> Any:
        more = {"MaxKeys": 3} if method == "list_objects_v2" else {}
        return call(what, method, **arguments, **more)

    monkeypatch.setattr(store._calls, "call", in_small_pages)
    assert store.list() == [f"n{number:02}" for number in range(11)]


@pytest.mark.parametrize("how", ["refuse", "ignore"])
def test_without_conditional_puts_a_lock_decides(s3: S3, how: str, caplog: pytest.LogCaptureFixture) -> None:
    s3.proxy.use(Schedule(no_conditional_put=how))
    prefix = f"lock-{uuid.uuid4().hex}"
    store = s3.store(prefix)
    store.put_if_absent("m", b"first")
    assert "has no conditional put" in caplog.text
    with pytest.raises(AlreadyThere):
        store.put_if_absent("m", b"second")
    won: list[int] = []
    lost: list[int] = []

    def publish(number: int) -> None:
        mine = s3.store(prefix, seed=number)
        try:
            mine.put_if_absent("n", b"%d" % number)
            won.append(number)
        except AlreadyThere:
            lost.append(number)

    _together([lambda n=n: publish(n) for n in range(3)], 0)
    assert len(won) == 1 and len(lost) == 2
    assert store.read("n", 3) == b"%d" % won[0]
    assert [found.name for found in store._found() if found.name.startswith(SCRATCH_PREFIX)] == []


def test_two_coordinators_with_different_manifests(s3: S3) -> None:
    store = s3.store(f"two-{uuid.uuid4().hex}")
    inside = _directory(store, NEW)
    snapshot.write_parts(inside, IMAGES[NEW])
    said: list[object] = []

    def publish(parent: tuple[int, int]) -> None:
        heading = Heading("job", NEW, world_size=2, parent=parent)
        try:
            said.append(snapshot.publish_when_whole(inside, heading, RANKS))
        except AlreadyThere as error:
            said.append(error)

    _together([lambda p=p: publish((0, p)) for p in (0, 1)], 0)
    assert len(said) == 2 and same(_open(store, NEW), IMAGES[NEW])
    if all(one is True for one in said):  # the second came when the first was done
        assert snapshot.is_published(inside)


def _uploads(store: Any) -> list[str]:
    return [key for key, *_ in multipart.uploads(store._calls, store._prefix)]
