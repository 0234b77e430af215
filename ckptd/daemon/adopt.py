"""What an earlier daemon left behind: what verifies is adopted, the rest is thrown away."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from ckptd.daemon.job import Job, Trainer
from ckptd.daemon.job_memory import NO_PLAN
from ckptd.erasure.groups import cut
from ckptd.errors import CkptdError, CorruptImage
from ckptd.failpoints import failpoint
from ckptd.image.digest import DIGEST_BYTES, cells_of, mismatches
from ckptd.memory import records
from ckptd.memory.arena import Arena, arena_paths
from ckptd.memory.holding import Holding, Parity, Place, seal_fault
from ckptd.v1 import memory_pb2

log = logging.getLogger("ckptd.adopt")


def adopt(memory_dir: Path, node: str, changed: Callable[[], None]) -> dict[str, Job]:
    """The jobs whose memory lies in `memory_dir`; every cell is verified here (seconds per GiB)."""
    jobs = {}
    for directory in sorted((memory_dir / "jobs").iterdir() if (memory_dir / "jobs").is_dir() else ()):
        try:
            record = records.read_job(directory / "job.record")
            cut([(member.node, member.domain) for member in record.roster.members], record.roster.parity)
        except (CkptdError, ValueError) as error:
            log.warning("%s is not a job that can be adopted: %s", directory, error)
            _remove(directory)
            continue
        jobs[record.job] = _adopt_job(directory, record, node, changed)
    return jobs


def _remove(path: Path) -> None:
    """Removes whatever lies at `path`."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _adopt_job(directory: Path, record: memory_pb2.JobRecord, node: str, changed: Callable[[], None]) -> Job:
    job = Job(
        record.job,
        node,
        directory,
        record.owner_uid,
        changed,
        spec=record.spec,
        roster=record.roster,
        stop_through=record.stop_through,
        started_generation=record.started_generation,
        confirmed_stopped=record.confirmed_stopped,
    )
    job.schedule.generation = job.generation
    for seen in record.trainers:
        job.trainers[seen.rank] = Trainer(
            seen.rank, seen.generation, seen.pid, state=seen.state, step=seen.step, exit=seen.exit
        )
    for path in records.scratch_paths(directory):
        _remove(path)
    for path in arena_paths(directory):
        try:
            arena = Arena.adopt(path)
        except CkptdError as error:
            log.warning("%s", error)
            _remove(path)
            continue
        job.memory.arenas[arena.label, arena.plan_hash] = arena
    for path in records.holding_paths(directory):
        try:
            holding = _adopt_holding(job, records.read_holding(path))
        except CkptdError as error:
            log.warning("%s is not adopted: %s", path.name, error)
            _remove(path)
            continue
        job.memory.holdings[holding.key] = holding
        failpoint("daemon.adopting")
        log.info("job %s: adopted step %d of generation %d", job.name, holding.step, holding.generation)
    return job


def _adopt_holding(job: Job, record: memory_pb2.HoldingRecord) -> Holding:
    """A holding with exactly those parts whose bytes match their digests.

    Raises:
        CorruptImage: the record contradicts itself.
    """
    if record.position not in record.group:
        raise CorruptImage(f"{record.position} is not in its group", ", ".join(record.group))
    for seal in record.seals:
        if fault := seal_fault(seal, job.name, record.generation, record.step, seal.node):
            raise CorruptImage(f"the seal record of {seal.node} is wrong", fault)
    seals = {seal.node: seal for seal in record.seals}
    own = seals.pop(record.position, None)
    ranks = tuple(rank.rank for rank in own.ranks) if own else tuple(job.member.ranks if job.member else ())
    holding = Holding(
        record.generation,
        record.step,
        tuple(record.group),
        record.position,
        record.parity,
        ranks,
        seals=seals,
    )
    rank_seals = {rank.rank: rank for rank in own.ranks} if own else {}
    for image in record.images:
        arena = job.memory.rank_arena(image.rank, image.plan_hash)
        if arena is None or image.slot >= arena.slots or image.rank not in rank_seals:
            continue
        place = Place(arena, image.slot, image.image_bytes)
        if _matches([place.image], [rank_seals[image.rank].cell_digests]):
            holding.places[image.rank] = place
            holding.seal_rank(rank_seals[image.rank], job.name)
    if record.folded and not holding.protected_group:
        holding.folded = holding.sealed
    elif record.folded:
        holding.parity = _adopt_parity(job, record)
        holding.folded = holding.parity is not None
    return holding


def _adopt_parity(job: Job, record: memory_pb2.HoldingRecord) -> Parity | None:
    arena = job.memory.arenas.get((f"parity-{record.parity_slot:05d}", NO_PLAN))
    if arena is None:
        return None
    size, digests = record.chunk_bytes, list(record.parity_digests)
    chunks = [arena.slot(0)[p * size : (p + 1) * size] for p in range(record.parity)]
    return Parity(record.parity_slot, size, chunks, digests) if _matches(chunks, digests) else None


def _matches(parts: Sequence[memoryview], digests: Sequence[bytes]) -> bool:
    """Whether all bytes are there, and are what was digested."""
    lengths = [cells_of(len(part)) * DIGEST_BYTES for part in parts]
    if [len(digest) for digest in digests] != lengths:
        return False
    return not any(mismatches(part, digest) for part, digest in zip(parts, digests, strict=True))
