"""Records beside the arenas: written whole or not at all, read with suspicion.

A record is the xxh3_128 of its message and the message.  A job's record, without which none
of its memory is of use, lies in its file twice, so that a flipped bit costs nothing.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from google.protobuf.message import DecodeError
from xxhash import xxh3_128_digest

from ckptd.errors import CorruptImage
from ckptd.failpoints import failpoint
from ckptd.image.digest import DIGEST_BYTES
from ckptd.image.names import check_name
from ckptd.v1 import memory_pb2

_HOLDING = re.compile(r"(\d{10})-(\d{12})\.holding")
MAX_RECORD_BYTES = 1 << 30
# Ends the name of a record that is being written.
_SCRATCH = ".tmp"


def job_directory(memory_dir: Path, job: str) -> Path:
    """The one place where a job's name becomes a path."""
    return memory_dir / "jobs" / check_name("job", job)


def holding_path(directory: Path, generation: int, step: int) -> Path:
    return directory / f"{generation:010d}-{step:012d}.holding"


def holding_paths(directory: Path) -> list[Path]:
    """The holding records in `directory`, oldest first."""
    return sorted(path for path in directory.glob("*.holding") if _HOLDING.fullmatch(path.name))


def scratch_paths(directory: Path) -> list[Path]:
    """What an earlier daemon was writing when it died; nobody will ever read it."""
    return sorted(directory.glob(f"*{_SCRATCH}"))


def write_record(path: Path, record: memory_pb2.JobRecord | memory_pb2.HoldingRecord) -> None:
    """Replaces the record at `path`; a crash leaves the old one or the new one."""
    text = record.SerializeToString()
    whole = xxh3_128_digest(text) + text
    scratch = path.with_name(path.name + _SCRATCH)
    scratch.write_bytes(whole * 2 if isinstance(record, memory_pb2.JobRecord) else whole)
    failpoint("daemon.record-written")
    scratch.replace(path)  # tmpfs: survives the process, and needs no fsync
    failpoint("daemon.record-renamed")


def read_holding(path: Path) -> memory_pb2.HoldingRecord:
    """The record at `path`.

    Raises:
        CorruptImage: it cannot be read, does not parse, or names another job or step than its file.
    """
    record = memory_pb2.HoldingRecord()
    _parse(path, record)
    if path.name != holding_path(path.parent, record.generation, record.step).name:
        raise CorruptImage(f"{path} names another step", f"({record.generation}, {record.step})")
    _check_job(path, record.job)
    return record


def read_job(path: Path) -> memory_pb2.JobRecord:
    """The job record at `path`.

    Raises:
        CorruptImage: it cannot be read, does not parse, or names another job than its directory.
    """
    record = memory_pb2.JobRecord()
    _parse(path, record)
    _check_job(path, record.job)
    return record


def _check_job(path: Path, job: str) -> None:
    if path.parent.name != job:
        raise CorruptImage(f"{path} names another job", repr(job))


def _parse(path: Path, record: memory_pb2.JobRecord | memory_pb2.HoldingRecord) -> None:
    try:
        # Neither a link to somewhere else nor a pipe that never ends is a record of ours.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            text = file.read(MAX_RECORD_BYTES + 1)
    except OSError as error:
        raise CorruptImage(f"{path} cannot be read", error.strerror or str(error)) from error
    if len(text) > MAX_RECORD_BYTES:
        raise CorruptImage(f"{path} is too long", f"more than {MAX_RECORD_BYTES:,} bytes")
    try:
        record.ParseFromString(_verified(path, text))
    except DecodeError as error:
        raise CorruptImage(f"{path} does not parse", str(error)) from error


def _verified(path: Path, text: bytes) -> bytes:
    """The message in a record's file: it lies there once, or twice."""
    half = len(text) // 2
    for whole in (text, text[:half], text[half:]):
        if len(whole) >= DIGEST_BYTES and xxh3_128_digest(whole[DIGEST_BYTES:]) == whole[:DIGEST_BYTES]:
            return whole[DIGEST_BYTES:]
    raise CorruptImage(f"{path} is damaged", f"its {len(text):,} bytes do not match their digest")
