"""Moves what is wanted out of a checkpoint's files: checks everything, then reads with a few threads.

job = Job(checkpoint)
job.want("model.w", tiles, {"model.w": flat_array})       # as many as there are
job.check()                                               # metadata of all of it; nothing is written yet
report = job.run()
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from ckptd.errors import CkptdError, CorruptCheckpoint
from ckptd.image.digest import DIGEST_BYTES, cells_of, mismatches
from ckptd.image.digest_table import BLOCK_BYTES
from ckptd.image.manifest import StoredTensor
from ckptd.image.plan import DTYPE_BITS
from ckptd.layout import boxes, plan
from ckptd.layout.byte_runs import Runs
from ckptd.layout.distinct import distinct_rows
from ckptd.layout.tiles import Tiles
from ckptd.storage.fetch import (
    CHUNK_BLOCKS,
    CHUNK_BYTES,
    Bytes,
    Load,
    Pieces,
    Schedule,
    Staging,
    read_chunks,
    read_verified,
    schedule,
)
from ckptd.storage.retrying import SILENT
from ckptd.storage.store import Reader

if TYPE_CHECKING:
    from ckptd.storage.reading import Checkpoint, OpenObject

Ints = NDArray[np.int64]
_CACHED_BYTES: Final = 8 << 20  # reads up to this size go through the checkpoint's cache of blocks
_TASK_CHUNKS: Final = 16  # 16 MiB: what a thread takes at a time


@dataclass(frozen=True, slots=True)
class Transferred:
    """What a job read."""

    tensors: int
    needed_bytes: int  # that were written to the targets
    read_bytes: int  # in whole blocks
    objects: int  # files that were opened

    @property
    def amplification(self) -> float:
        """Bytes read per byte needed; 1.0 where nothing was."""
        return self.read_bytes / self.needed_bytes if self.needed_bytes else 1.0


@dataclass(frozen=True, slots=True)
class Damage:
    """Something of an object that cannot be used."""

    object: str
    begin: int  # bytes of the object
    end: int
    tensors: tuple[str, ...]  # arrays of the object that lie there
    why: str


class Job:
    """What shall be read from one checkpoint; used once."""

    def __init__(self, checkpoint: Checkpoint, *, threads: int | None = None) -> None:
        self._checkpoint = checkpoint
        self._threads = threads or min(4, len(os.sched_getaffinity(0)))
        self._wanted: list[tuple[str, Tiles, Tiles]] = []
        self._wishes: dict[str, tuple[StoredTensor, Mapping[str, NDArray[np.generic]]]] = {}
        self._schedules: dict[int, Schedule] | None = None
        self._targets: list[Bytes] = []
        self._checked: Transferred | None = None

    def want(
        self,
        name: str,
        target: Tiles,
        arrays: Mapping[str, NDArray[np.generic]],
        *,
        label: str = "",
        source: Tiles | None = None,
    ) -> None:
        """Asks for the boxes `target` of a tensor, in arrays that are flat, contiguous and of the
        stored width.

        Args:
            target: all at one place, that of this process: with it the nearest replica is chosen.
            arrays: by the names in `target.arrays`.
            label: another word for this wish, where a tensor is asked for several times.
            source: read these of its tiles, and no others.

        Raises:
            NotFound: no such tensor.
            ValueError: shapes or widths differ.
        """
        stored = self._checkpoint.tensor(name)
        width = DTYPE_BITS[stored.dtype] // 8
        if target.shape != stored.shape:
            raise ValueError(f"{name} is of shape {stored.shape}, not {target.shape}")
        for array in arrays.values():
            if array.ndim != 1 or not array.flags.c_contiguous or array.itemsize != width:
                raise ValueError(f"{name}: an array is not flat and contiguous with items of {width} bytes")
        if len(target):
            if source is None:
                source = self._checkpoint.tiles(name)
                if stored.differs:
                    source = self._own_cover(source, int(target.place[0]))
            wish = label or name
            self._wanted.append((wish, source, target))
            self._wishes[wish] = (stored, arrays)

    def _own_cover(self, source: Tiles, rank: int) -> Tiles:
        """Of a tensor that differs between ranks: what this rank kept, or the first one did."""
        ranks = np.array([o.rank for o in self._checkpoint.manifest.objects], np.int64)[source.place]
        mine = source.cover[ranks == rank]
        return source.at(source.cover == (mine[0] if len(mine) else source.cover.min()))

    def check(self) -> Transferred:
        """Checks all that can be known before data is read: parts, tables, headers, dtypes, bounds.

        Returns:
            What `run` will read.

        Raises:
            CorruptCheckpoint: something of it does not fit.
        """
        parts: dict[int, list[Pieces]] = {}
        found = plan.plan(self._wanted)
        runs: dict[tuple[int, int], Runs] = {}
        for wish in found:
            stored = self._wishes[wish][0]
            width = DTYPE_BITS[stored.dtype] // 8
            key = (found.members[wish], width)
            if key not in runs:
                runs[key] = plan.runs(found.classes[key[0]], width)
            self._place(wish, stored, runs[key], found.arrays[wish], parts)
        self._schedules = {
            index: schedule(_joined(parts[index]), self._checkpoint.manifest.objects[index].nbytes)
            for index in sorted(parts)
        }
        plans = self._schedules.values()
        needed = sum(s.pieces.nbytes for s in plans)
        self._checked = Transferred(len(self._wanted), needed, sum(s.read_bytes for s in plans), len(plans))
        return self._checked

    def run(self) -> Transferred:
        """Reads everything into the arrays.

        Raises:
            CorruptCheckpoint: as `check`, then with nothing written; or a block is damaged: no
                unverified byte
                was written, but other tensors may be filled already.
        """
        report = self._checked or self.check()
        assert self._schedules is not None
        cached = report.read_bytes <= _CACHED_BYTES
        queue = _Queue(self._checkpoint, self._schedules)
        threads = 1 if cached else self._threads
        work = partial(self._work, queue, cached)
        try:
            if threads > 1:
                with ThreadPoolExecutor(threads - 1, thread_name_prefix="ckptd-read") as pool:
                    others = [pool.submit(work) for _ in range(threads - 1)]
                    work()
                for other in others:
                    other.result()
            else:
                work()
        finally:
            queue.close()
        return report

    def _work(self, queue: _Queue, cached: bool) -> None:
        """What each thread does: one task after another, until there is none or one has failed."""
        staging = Staging()
        try:
            while (task := queue.take()) is not None:
                load = _loader(self._checkpoint, task.index, task.reader, cached)
                read_chunks(task.schedule, task.chunks, load, self._targets, staging)
                queue.finished(task)
        except BaseException:
            queue.stop()
            raise

    def _place(
        self,
        wish: str,
        stored: StoredTensor,
        runs: Runs,
        arrays: tuple[tuple[str, ...], tuple[str, ...]],
        parts: dict[int, list[Pieces]],
    ) -> None:
        """Adds a tensor's runs, as bytes of files, to the parts of each object."""
        name, code = stored.name, stored.dtype
        base = len(self._targets)
        self._targets.extend(self._wishes[wish][1][array].view(np.uint8) for array in arrays[1])
        reach = (runs.source_start + ((runs.repeats - 1) * runs.source_steps).sum(axis=1)) + runs.length
        pairs, _, which = distinct_rows(np.stack([runs.source_place, runs.source_array], axis=1))
        for number, (index, array) in enumerate(pairs.tolist()):
            chosen = np.flatnonzero(which == number)
            opened = self._checkpoint.opened(index)
            offset = _array_offset(opened, arrays[0][array], name, code, int(reach[chosen].max()))
            parts.setdefault(index, []).append(_pieces(runs.at(chosen), offset, base, name))


def _array_offset(opened: OpenObject, array: str, name: str, code: str, reach: int) -> int:
    """Returns where an array begins in its file, if it is what the manifest says it is."""
    spec = opened.plan.spec_of.get(array)
    if spec is None or spec.dtype != code or spec.nbytes < reach:
        found = "is not there" if spec is None else f"is {spec.dtype} of {spec.nbytes} bytes"
        raise CorruptCheckpoint(
            f"{name} cannot be read from {opened.stored.name}",
            f"its array {array!a} {found}, the manifest wants {code} up to byte {reach}",
            "use another checkpoint",
        )
    return opened.plan.offset_of[array]


def _pieces(runs: Runs, offset: int, base: int, name: str) -> Pieces:
    """The runs as pieces: the last dim of their grid becomes rows, the others are written out."""
    grid = runs.repeats.shape[1]
    if grid == 0:
        one, zero = np.ones(len(runs), np.int64), np.zeros(len(runs), np.int64)
        return Pieces(
            runs.source_start + offset,
            zero,
            one,
            runs.length,
            runs.target_array + base,
            runs.target_start,
            zero,
        )
    outer = runs.repeats[:, :-1]
    counts = boxes.volume(outer)
    which = np.repeat(np.arange(len(runs)), counts)
    rest = boxes.spans(np.zeros(len(runs), np.int64), counts)
    source, target = runs.source_start[which] + offset, runs.target_start[which].copy()
    for dim in reversed(range(grid - 1)):
        at, rest = rest % outer[which, dim], rest // outer[which, dim]
        source += at * runs.source_steps[which, dim]
        target += at * runs.target_steps[which, dim]
    rows, length = runs.repeats[which, -1], runs.length[which]
    step = np.where(rows > 1, runs.source_steps[which, -1], 0)
    if ((step < length) & (rows > 1)).any():
        raise CorruptCheckpoint(
            f"{name} cannot be read", "two of its elements lie in one place", "use another checkpoint"
        )
    return Pieces(
        source, step, rows, length, runs.target_array[which] + base, target, runs.target_steps[which, -1]
    )


def _joined(parts: list[Pieces]) -> Pieces:
    fields = Pieces.__dataclass_fields__
    return Pieces(*(np.concatenate([getattr(part, field) for part in parts]) for field in fields))


def _loader(checkpoint: Checkpoint, index: int, reader: Reader, cached: bool) -> Load:
    opened = checkpoint.opened(index)

    def load(begin: int, into: memoryview) -> None:
        read_verified(reader, begin, into, opened.digests, opened.stored.name)

    def load_cached(begin: int, into: memoryview) -> None:
        first, count = begin // BLOCK_BYTES, cells_of(len(into))
        known = checkpoint.cache.get(index, first, count)
        if known is None:
            load(begin, into)
            checkpoint.cache.put(index, first, into)
        else:
            into[:] = b"".join(known)

    return load_cached if cached else load


@dataclass(frozen=True, slots=True)
class _Task:
    index: int
    schedule: Schedule
    chunks: range
    reader: Reader


class _Queue:
    """Tasks in the order of files, for several threads; a file is open while tasks of it are at work."""

    def __init__(self, checkpoint: Checkpoint, schedules: Mapping[int, Schedule]) -> None:
        self._checkpoint = checkpoint
        self._lock = threading.Lock()
        self._waiting = (
            (index, schedule_, range(at, min(at + _TASK_CHUNKS, len(schedule_))))
            for index, schedule_ in schedules.items()
            for at in range(0, len(schedule_), _TASK_CHUNKS)
        )
        self._readers: dict[int, Reader] = {}
        self._left: dict[int, int] = {index: len(schedule_) for index, schedule_ in schedules.items()}
        self._stopped = False

    def take(self) -> _Task | None:
        with self._lock:
            found = None if self._stopped else next(self._waiting, None)
            if found is None:
                return None
            index, schedule_, chunks = found
            if index not in self._readers:
                self._readers[index] = self._checkpoint.open(index)
            return _Task(index, schedule_, chunks, self._readers[index])

    def finished(self, task: _Task) -> None:
        with self._lock:
            self._left[task.index] -= len(task.chunks)
            if self._left[task.index] == 0:
                self._readers.pop(task.index).close()

    def stop(self) -> None:
        """Lets no task begin any more; another one has failed."""
        with self._lock:
            self._stopped = True

    def close(self) -> None:
        """Closes what is open; no task is at work any more."""
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()


def verify(checkpoint: Checkpoint, progress: Callable[[int, int], None] | None) -> list[Damage]:
    """Reads every byte of every object and compares it with its digest.

    Returns:
        What is damaged; [] if nothing is.
    """
    total = sum(stored.nbytes for stored in checkpoint.manifest.objects)
    done = 0
    damage: list[Damage] = []
    buffer = memoryview(bytearray(CHUNK_BYTES))
    for index, stored in enumerate(checkpoint.manifest.objects):
        try:
            digests = checkpoint.digests(index)
            with checkpoint.open(index) as reader:
                for begin in range(0, stored.nbytes, CHUNK_BYTES):
                    view = buffer[: min(CHUNK_BYTES, stored.nbytes - begin)]
                    reader.read_into(begin, view)
                    first = begin // BLOCK_BYTES
                    wanted = digests[first * DIGEST_BYTES : (first + CHUNK_BLOCKS) * DIGEST_BYTES]
                    damage += [
                        _damage(checkpoint, index, first + wrong) for wrong in mismatches(view, wanted)
                    ]
                    done += len(view)
                    if progress is not None:
                        progress(done, total)
            if checkpoint.manifest.form != "files":
                checkpoint.variable(index)
        except SILENT:
            raise
        except CkptdError as error:
            if not any(found.object == stored.name for found in damage):
                damage.append(Damage(stored.name, 0, stored.nbytes, (), str(error)))
    return damage


def _damage(checkpoint: Checkpoint, index: int, block: int) -> Damage:
    stored = checkpoint.manifest.objects[index]
    begin, end = block * BLOCK_BYTES, min((block + 1) * BLOCK_BYTES, stored.nbytes)
    try:
        layout = checkpoint.opened(index).plan
    except SILENT:
        raise
    except CkptdError as error:
        return Damage(stored.name, begin, end, (), f"the block does not match its digest; {error.what}")
    hit = [
        spec.name
        for spec in layout.tensors
        if layout.offset_of[spec.name] < end and layout.offset_of[spec.name] + spec.nbytes > begin
    ]
    return Damage(stored.name, begin, end, tuple(hit), "the block does not match its digest")
