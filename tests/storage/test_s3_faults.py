"""Snapshots to an S3 server behind a faulty network: what is said to be durable is, and every run ends."""

from __future__ import annotations

import contextlib
import functools
import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from fault_proxy import FaultProxy, Schedule
from s3kit import PART_BYTES, QUICK, S3
from storagekit import same, sealed

from ckptd.errors import CkptdError, DeadlineExceeded, Unreachable
from ckptd.image.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest
from ckptd.storage import catalog, multipart, place, snapshot, writing
from ckptd.storage.parts import Part
from ckptd.storage.reading import Checkpoint
from ckptd.storage.snapshot import SealedImage
from ckptd.storage.store import SCRATCH_PREFIX, AlreadyThere, Store
from ckptd.storage.writing import Heading

RANKS = (0, 1)
LANES = 3  # schedules at a time, each with a proxy of its own: most of a run is waiting
HURRIED = replace(QUICK, tries=6, try_s=0.7, total_s=6.0, budget=25)


def test_forty_schedules(s3: S3) -> None:
    _schedules(s3, range(40))


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_five_hundred_schedules(s3: S3) -> None:
    _schedules(s3, range(1000, 1500))


def _schedules(s3: S3, seeds: range) -> None:
    began = time.monotonic()
    lanes = [seeds[n::LANES] for n in range(LANES)]
    with contextlib.ExitStack() as stack:
        proxies = [stack.enter_context(contextlib.closing(FaultProxy(s3.proxy.target))) for _ in lanes]
        runs = [
            functools.partial(_lane, replace(s3, proxy=p), lane)
            for p, lane in zip(proxies, lanes, strict=True)
        ]
        durable = sum(_together(runs, seeds[0], 1700))
    faults: Counter[str] = sum((proxy.injected for proxy in proxies), Counter())
    print(
        f"{len(seeds)} schedules, {sum(faults.values())} faults injected "
        f"({', '.join(f'{kind} {count}' for kind, count in sorted(faults.items()))}), "
        f"{durable} steps durable, seeds {seeds[0]} to {seeds[-1]}, {time.monotonic() - began:.0f} s"
    )
    assert durable > len(seeds) // 3  # faults that pass do not keep a step from being durable
    assert durable < len(seeds)  # and some stores were gone for good


def _lane(s3: S3, seeds: range) -> int:
    """One job saves a step under each schedule, after one without faults; returns how many are durable."""
    prefix = f"run-{uuid.uuid4().hex}"
    clean = s3.store(prefix, direct=True)
    assert _node(clean, 1, 0) and _node(clean, 1, 1) and _coordinator(clean, 1)
    durable = [1]
    for step, seed in enumerate(seeds, 2):
        s3.proxy.use(Schedule.of(seed))
        reported = _one(s3.store(prefix, policy=HURRIED, seed=seed), step, durable[-1], seed)
        s3.proxy.use(Schedule())
        there = snapshot.is_published(_directory(clean, step))
        assert there or not reported, f"seed {seed}: reported, and not there"
        durable += [step] if there else []
    for step in durable:
        _read(clean, step, seeds[max(0, step - 2)])
    return len(durable) - 1


def _one(store: Store, step: int, old: int, seed: int) -> bool:
    """Two nodes and two coordinators save a step; returns whether one said that it is durable."""
    _together([functools.partial(_node, store, step, rank) for rank in RANKS], seed)
    said = _together([functools.partial(_coordinator, store, step)] * 2, seed)
    with contextlib.suppress(
        Unreachable, DeadlineExceeded
    ):  # and nothing else is said of a step that is there
        why = catalog.why_not(store.inside("job"), catalog.Entry(old, 0))
        assert why is None, f"seed {seed}: step {old} is said to be lost: {why}"
        _read(store, old, seed)
    return any(said)


def _node(store: Store, step: int, rank: int) -> bool:
    for _ in range(2):
        try:
            snapshot.write_parts(_directory(store, step), snapshot.described([_images(step)[rank]]))
        except CkptdError:
            continue
        return True
    return False


def _coordinator(store: Store, step: int) -> bool:
    """Publishes as the flush does; returns whether it says that the step is durable."""
    for _ in range(2):
        try:
            return snapshot.publish_when_whole(
                _directory(store, step), Heading("job", step, world_size=2), RANKS
            )
        except CkptdError:
            continue
    return False


def _read(store: Store, step: int, seed: int) -> None:
    """Reads a step: its digests are the manifest's, and its bytes those that were sealed."""
    checkpoint = _open(store, step)
    assert checkpoint.verify() == [], f"seed {seed}: step {step} is called damaged"
    for rank, sealed_image in enumerate(_images(step)):
        with checkpoint.open(rank) as reader:
            found = bytearray(reader.size)
            reader.read_into(0, memoryview(found))
        assert checkpoint.digests(rank) == sealed_image.digests, f"seed {seed}: wrong digests of step {step}"
        assert found == sealed_image.image, f"seed {seed}: wrong bytes of step {step}"


@functools.cache
def _images(step: int) -> list[SealedImage]:
    return [sealed(9, rank, len(RANKS), step) for rank in RANKS]


def _open(store: Store, step: int) -> Checkpoint:
    inside = _directory(store, step)
    return Checkpoint(inside, Manifest.read(inside.read(MANIFEST_NAME, MAX_MANIFEST_BYTES)))


def _directory(store: Store, step: int) -> Store:
    return store.inside("job").inside(place.directory_name(step, 0))


def _together(calls: Sequence[Callable[[], Any]], seed: int, deadline_s: float = 90) -> list[Any]:
    """Returns what the calls return, in the order in which they end; each in a thread."""
    errors: list[BaseException] = []
    found: list[Any] = []

    def run(call: Callable[[], Any]) -> None:
        try:
            found.append(call())
        except BaseException as error:  # noqa: BLE001  # a thread's top frame: it is raised below
            errors.append(error)

    threads = [threading.Thread(target=run, args=(call,), daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(deadline_s)
    assert not any(thread.is_alive() for thread in threads), f"seed {seed} does not end"
    if errors:
        raise errors[0]
    return found


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


@pytest.mark.parametrize("kind", ["lost", "closed", "silent", "500", "503", "429", "409", "reset", "cut"])
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


def test_an_upload_that_is_gone_was_completed_by_an_earlier_try_or_not_at_all(s3: S3) -> None:
    store = s3.store(f"gone-{uuid.uuid4().hex}", policy=HURRIED)
    data = random.Random(1).randbytes(3 * PART_BYTES)
    s3.proxy.use(Scripted(("POST", ""), ("POST", "lost"), ("POST", "gone")))
    store.put("x", [data])
    assert store.read("x", len(data)) == data
    s3.proxy.use(Scripted(("POST", ""), ("POST", "gone")))
    with pytest.raises(CkptdError, match="NoSuchUpload"):
        store.put("x", [data])  # what lies there is another put's
    assert _uploads(store) == []


@pytest.mark.parametrize("kind", ["closed", "silent", "500", "503", "429", "reset", "cut"])
def test_what_is_asked_again_is_answered_right(s3: S3, kind: str) -> None:
    store = s3.store(f"again-{uuid.uuid4().hex}", policy=HURRIED)
    store.put("x", [b"right"])
    asked = ("list-type", "GET /tests/", "HEAD", "DELETE")
    s3.proxy.use(Scripted(*[(what, kind) for what in asked]))
    assert store.list() == ["x"]
    assert store.read("x", 5) == b"right"
    assert store.modified("x") > 0
    store.delete("x")
    assert s3.proxy.schedule.script == []  # type: ignore[attr-defined]
    s3.proxy.use(Schedule())
    assert store.list() == []


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
        if method == "list_objects_v2":
            arguments["MaxKeys"] = 3
        return call(what, method, **arguments)

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

    _together([functools.partial(publish, n) for n in range(3)], 0)
    assert len(won) == 1 and len(lost) == 2
    assert store.read("n", 3) == b"%d" % won[0]
    assert [found.name for found in store._found() if found.name.startswith(SCRATCH_PREFIX)] == []


def test_two_coordinators_publish_one_step_and_the_other_learns_it(s3: S3) -> None:
    store = s3.store(f"two-{uuid.uuid4().hex}")
    inside = _directory(store, 2)
    snapshot.write_parts(inside, snapshot.described(_images(2)))
    parts = [Part.read(inside.read(f"{place.object_name(rank)}.part", 1 << 20)) for rank in RANKS]

    def publish(parent: int) -> object:
        try:
            return writing.publish(inside, Heading("job", 2, world_size=2, parent=(0, parent)), parts)
        except AlreadyThere as error:
            return error

    said = _together([functools.partial(publish, p) for p in (0, 1)], 0)
    (won,) = [one for one in said if isinstance(one, Manifest)]
    assert any(isinstance(one, AlreadyThere) for one in said)
    found = _open(store, 2)
    assert found.manifest.write() == won.write() and same(found, _images(2))


def _uploads(store: Any) -> list[str]:
    return [key for key, *_ in multipart.uploads(store._calls, store._prefix)]
