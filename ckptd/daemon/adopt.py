"""What an earlier daemon left behind: what verifies is adopted, the rest is thrown away."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from ckptd.daemon.job import Job, Trainer
from ckptd.daemon.job_memory import NO_PLAN, rank_label
from ckptd.errors import CkptdError
from ckptd.image.digest import mismatches
from ckptd.memory import records
from ckptd.memory.arena import Arena, arena_paths
from ckptd.memory.holding import Holding, Parity, Place
from ckptd.v1 import memory_pb2

log = logging.getLogger("ckptd.adopt")


def adopt(memory_dir: Path, node: str, changed: Callable[[], None]) -> dict[str, Job]:
    """The jobs whose memory lies in `memory_dir`; every cell is verified here (seconds per GiB)."""
    jobs = {}
    for directory in sorted((memory_dir / "jobs").iterdir() if (memory_dir / "jobs").is_dir() else ()):
        try:
            record = records.read_job(directory / "job.record")
        except (CkptdError, FileNotFoundError) as error:
            log.warning("%s is not a job that can be adopted: %s", directory, error)
            shutil.rmtree(directory, ignore_errors=True)
            continue
        jobs[record.job] = _adopt_job(directory, record, node, changed)
    return jobs


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
    for path in arena_paths(directory):
        try:
            arena = Arena.adopt(path)
        except CkptdError as error:
            log.warning("%s", error)
            path.unlink()
            continue
        job.memory.arenas[arena.label, arena.plan_hash] = arena
    for path in records.holding_paths(directory):
        try:
            holding = _adopt_holding(job, records.read_holding(path))
        except (CkptdError, KeyError, ValueError, AssertionError) as error:
            log.warning("%s is not adopted: %s", path.name, error)
            path.unlink()
            continue
        job.memory.holdings[holding.key] = holding
        log.info("job %s: adopted step %d of generation %d", job.name, holding.step, holding.generation)
    return job


def _adopt_holding(job: Job, record: memory_pb2.HoldingRecord) -> Holding:
    """A holding with exactly those parts whose bytes match their digests."""
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
        arena = job.memory.arenas[rank_label(image.rank), image.plan_hash]
        place = Place(arena, image.slot, image.image_bytes)
        if image.rank in rank_seals and not mismatches(place.image, rank_seals[image.rank].cell_digests):
            holding.places[image.rank] = place
            holding.seal_rank(rank_seals[image.rank], job.name)
    if record.folded and not holding.protected_group:
        holding.folded = holding.sealed
    elif record.folded:
        arena = job.memory.arenas[f"parity-{record.parity_slot:05d}", NO_PLAN]
        size = record.chunk_bytes
        chunks = [arena.slot(0)[p * size : (p + 1) * size] for p in range(record.parity)]
        pairs = zip(chunks, record.parity_digests, strict=True)
        if not any(mismatches(chunk, digests) for chunk, digests in pairs):
            holding.parity = Parity(record.parity_slot, size, chunks, list(record.parity_digests))
            holding.folded = True
    return holding
