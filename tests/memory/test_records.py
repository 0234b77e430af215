"""Records beside the arenas: whole or refused, and names from outside become no paths."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.errors import CorruptImage, InvalidRequest
from ckptd.memory import records
from ckptd.v1 import bulk_pb2, common_pb2, memory_pb2


def _holding(job: str = "job", generation: int = 3, step: int = 17) -> memory_pb2.HoldingRecord:
    seal = bulk_pb2.SealRecord(job=job, generation=generation, step=step, node="n0", cell_bytes=65536)
    return memory_pb2.HoldingRecord(
        job=job, generation=generation, step=step, group=["n0", "n1"], position="n0", parity=1, seals=[seal]
    )


def _directory(tmp_path: Path, job: str = "job") -> Path:
    directory = records.job_directory(tmp_path, job)
    directory.mkdir(parents=True)
    return directory


def test_a_record_comes_back_as_it_went(tmp_path: Path) -> None:
    directory = _directory(tmp_path)
    path = records.holding_path(directory, 3, 17)
    records.write_record(path, _holding())
    assert records.read_holding(path) == _holding()
    job = memory_pb2.JobRecord(job="job", owner_uid=-1, roster=common_pb2.Roster(generation=3))
    records.write_record(directory / "job.record", job)
    assert records.read_job(directory / "job.record") == job
    assert sorted(p.name for p in directory.iterdir()) == ["0000000003-000000000017.holding", "job.record"]


def test_a_write_that_is_cut_short_leaves_the_old_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The moment before the rename is the moment of the crash."""
    directory = _directory(tmp_path)
    path = records.holding_path(directory, 3, 17)
    records.write_record(path, _holding())

    def crash(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", crash)
    changed = _holding()
    changed.folded = True
    with pytest.raises(KeyboardInterrupt):
        records.write_record(path, changed)
    assert records.read_holding(path) == _holding()
    # What lies there half-written is not taken for a record.
    assert records.holding_paths(directory) == [path]


def test_records_are_found_oldest_first_and_nothing_else_is(tmp_path: Path) -> None:
    directory = _directory(tmp_path)
    for generation, step in [(2, 5), (1, 1000), (2, 4)]:
        path = records.holding_path(directory, generation, step)
        records.write_record(path, _holding("job", generation, step))
    for name in ("x.holding", "1-2.holding", "0000000001-000000000001.holding.tmp", "job.record"):
        (directory / name).write_bytes(b"")
    found = [records.read_holding(path) for path in records.holding_paths(directory)]
    assert [(r.generation, r.step) for r in found] == [(1, 1000), (2, 4), (2, 5)]


def test_a_record_under_another_name_is_refused(tmp_path: Path) -> None:
    """A copied or renamed record must not stand for another step or another job."""
    directory = _directory(tmp_path)
    path = records.holding_path(directory, 3, 18)
    records.write_record(path, _holding())
    with pytest.raises(CorruptImage, match="names another step"):
        records.read_holding(path)
    path = records.holding_path(directory, 3, 17)
    records.write_record(path, _holding("other"))
    with pytest.raises(CorruptImage, match="names another job"):
        records.read_holding(path)
    records.write_record(directory / "job.record", memory_pb2.JobRecord(job="../job"))
    with pytest.raises(CorruptImage, match="names another job"):
        records.read_job(directory / "job.record")


@pytest.mark.parametrize("garbage", [b"\xff" * 20, b"\x0a\x7f", b"\x0b\x0b", bytes(10), b""])
def test_garbage_is_refused(tmp_path: Path, garbage: bytes) -> None:
    directory = _directory(tmp_path)
    path = records.holding_path(directory, 3, 17)
    path.write_bytes(garbage)
    (directory / "job.record").write_bytes(garbage)
    with pytest.raises(CorruptImage) as caught:
        records.read_holding(path)
    assert str(path) in str(caught.value)
    with pytest.raises(CorruptImage):
        records.read_job(directory / "job.record")


@settings(deadline=None, max_examples=60)
@given(
    flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 255)), min_size=1, max_size=5),
    cut=st.integers(0, 200),
)
def test_damage_is_refused_and_never_another_error(
    tmp_path_factory: pytest.TempPathFactory, flips: list[tuple[int, int]], cut: int
) -> None:
    directory = tmp_path_factory.getbasetemp() / "damage" / "jobs" / "job"
    directory.mkdir(parents=True, exist_ok=True)
    path = records.holding_path(directory, 3, 17)
    records.write_record(path, _holding())
    text = bytearray(path.read_bytes())
    for at, bits in flips:
        text[at % len(text)] ^= bits
    path.write_bytes(bytes(text[: max(1, len(text) - cut % len(text))]))
    try:
        record = records.read_holding(path)
    except CorruptImage:
        return
    assert record == _holding()  # the flips undid each other


def test_a_record_torn_anywhere_or_with_any_bit_flipped_is_refused(tmp_path: Path) -> None:
    directory = _directory(tmp_path)
    path = records.holding_path(directory, 3, 17)
    records.write_record(path, _holding())
    text = path.read_bytes()
    flipped = [_flipped(text, bit) for bit in range(8 * len(text))]
    for damaged in [*(text[:length] for length in range(len(text))), *flipped]:
        path.write_bytes(damaged)
        with pytest.raises(CorruptImage):
            records.read_holding(path)
    print(f"{len(text)} prefixes and {len(flipped)} flips of a holding's record refused")


def test_a_job_record_with_any_bit_flipped_is_read_as_it_was(tmp_path: Path) -> None:
    """It says who owns the job and which generations are over: nothing else could tell."""
    path = _directory(tmp_path) / "job.record"
    job = memory_pb2.JobRecord(job="job", owner_uid=1000, stop_through=7)
    records.write_record(path, job)
    text = path.read_bytes()
    for bit in range(8 * len(text)):
        path.write_bytes(_flipped(text, bit))
        assert records.read_job(path) == job
    path.write_bytes(text[: len(text) // 2])
    assert records.read_job(path) == job
    path.write_bytes(_flipped(_flipped(text, 3), 8 * len(text) - 3))
    with pytest.raises(CorruptImage, match="is damaged"):
        records.read_job(path)


def _flipped(text: bytes, bit: int) -> bytes:
    damaged = bytearray(text)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


@pytest.mark.parametrize("kind", ["missing", "directory", "dangling", "link", "pipe"])
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path: Path, kind: str) -> None:
    directory = _directory(tmp_path)
    path = records.holding_path(directory, 3, 17)
    if kind == "directory":
        path.mkdir()
    elif kind == "dangling":
        path.symlink_to(directory / "nothing")
    elif kind == "link":
        (directory / "real").write_bytes(_holding().SerializeToString())
        path.symlink_to(directory / "real")
    elif kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(CorruptImage):
        records.read_holding(path)


def test_an_endless_record_is_refused_before_it_is_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "MAX_RECORD_BYTES", 1000)
    directory = _directory(tmp_path)
    path = records.holding_path(directory, 3, 17)
    path.write_bytes(random.Random(1).randbytes(1001))
    with pytest.raises(CorruptImage, match="1,000 bytes"):
        records.read_holding(path)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "a/b",
        "/etc",
        "a\\b",
        "a\0b",
        "a\nb",
        " a",
        "a b",
        "a" * 129,
        "é",
        "a:b",
        "~",
        "$HOME",
    ],
)
def test_a_job_name_that_is_a_path_is_refused_before_any_path_is_made(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidRequest):
        records.job_directory(tmp_path, name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a", "llama-7b.v2_x", "A" * 128, "...", "-", "_.."])
def test_a_job_name_stays_under_its_directory(tmp_path: Path, name: str) -> None:
    directory = records.job_directory(tmp_path, name)
    assert directory.parent == tmp_path / "jobs"
    assert directory.resolve().parent == (tmp_path / "jobs").resolve()
