"""Records beside the arenas: written whole or not at all, read with suspicion."""

from __future__ import annotations

import re
from pathlib import Path

from google.protobuf.message import DecodeError

from ckptd.errors import CorruptImage
from ckptd.image.names import check_name
from ckptd.v1 import memory_pb2

_HOLDING = re.compile(r"(\d{10})-(\d{12})\.holding")
MAX_RECORD_BYTES = 1 << 30


def job_directory(memory_dir: Path, job: str) -> Path:
    """The one place where a job's name becomes a path."""
    return memory_dir / "jobs" / check_name("job", job)


def holding_path(directory: Path, generation: int, step: int) -> Path:
    return directory / f"{generation:010d}-{step:012d}.holding"


def holding_paths(directory: Path) -> list[Path]:
    """The holding records in `directory`, oldest first."""
    return sorted(path for path in directory.glob("*.holding") if _HOLDING.fullmatch(path.name))


def write_record(path: Path, record: memory_pb2.JobRecord | memory_pb2.HoldingRecord) -> None:
    """Replaces the record at `path`; a crash leaves the old one or the new one."""
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_bytes(record.SerializeToString())
    scratch.replace(path)  # tmpfs: survives the process, and needs no fsync


def read_holding(path: Path) -> memory_pb2.HoldingRecord:
    """The record at `path`.

    Raises:
        CorruptImage: it does not parse, or names another step than its file.
    """
    record = memory_pb2.HoldingRecord()
    _parse(path, record)
    if path.name != holding_path(path.parent, record.generation, record.step).name:
        raise CorruptImage(f"{path} names another step", f"({record.generation}, {record.step})")
    return record


def read_job(path: Path) -> memory_pb2.JobRecord:
    """The job record at `path`.

    Raises:
        CorruptImage: it does not parse.
    """
    record = memory_pb2.JobRecord()
    _parse(path, record)
    return record


def _parse(path: Path, record: memory_pb2.JobRecord | memory_pb2.HoldingRecord) -> None:
    size = path.stat().st_size
    if size > MAX_RECORD_BYTES:
        raise CorruptImage(f"{path} has {size:,} bytes", f"more than {MAX_RECORD_BYTES:,}")
    try:
        record.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise CorruptImage(f"{path} does not parse", str(error)) from error
