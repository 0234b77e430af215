"""Where a run begins: with the newest state in memory, with a stored checkpoint, or afresh."""

from __future__ import annotations

import logging
import mmap
import os

from ckptd import errors
from ckptd.client import stored
from ckptd.client.attached import Attached
from ckptd.client.capture import Origin
from ckptd.client.link import Link, Terms
from ckptd.client.report import ResumeReport, Skipped
from ckptd.client.restore import restore, verify
from ckptd.client.state import Survey
from ckptd.v1 import local_pb2

log = logging.getLogger("ckptd")


def resume(link: Link, attached: Attached, timeout_s: float) -> ResumeReport:
    """Loads the newest recoverable state into what is attached; on a fresh start, touches nothing.

    Args:
        timeout_s: how long the job's recovery may take, seconds.

    Raises:
        StateMismatch, CorruptImage, CorruptCheckpoint, DeadlineExceeded, Unreachable, StaleGeneration:
            as `Run.resume` says.
    """
    located, fd = _locate(link, timeout_s)
    if fd is None and (kept := _stored(link)).url:
        return _resume_stored(link, attached, kept)
    if fd is not None:
        _load(link.terms, attached, located, fd)
    report = ResumeReport(
        located.step,
        located.rung or "none",
        located.verified,
        generation=located.generation if located.step else link.generation,
        skipped=tuple(Skipped(s.generation, s.step, s.why) for s in located.skipped),
    )
    log.info("resumed at step %d (%s)", report.step, report.rung)
    return report


def check_fresh(link: Link, timeout_s: float) -> None:
    """Returns if the job has nothing to resume from: only then may it begin without asking.

    Raises:
        InvalidRequest: there is a state; the message names it.
        DeadlineExceeded, Unreachable, StaleGeneration: no answer from the daemon.
    """
    located, fd = _locate(link, timeout_s)
    if fd is not None:
        os.close(fd)
    kept = "" if fd is not None else _stored(link).url
    if fd is not None or kept:
        raise errors.InvalidRequest(
            f"job {link.terms.job} has a state to resume from, {kept or f'step {located.step}'}",
            "this run would leave it behind",
            "call run.resume() before the first step, or choose another job name",
        )


def _locate(link: Link, timeout_s: float) -> tuple[local_pb2.Located, int | None]:
    message = local_pb2.TrainerMessage(locate=local_pb2.Locate())
    arrival = link.request(message, "located", timeout_s)
    return arrival.message.located, arrival.fd


def _load(terms: Terms, attached: Attached, located: local_pb2.Located, fd: int) -> None:
    begin = located.slot * located.slot_bytes
    end = begin + located.image_bytes
    try:
        if os.fstat(fd).st_size < end:
            raise errors.CorruptImage("the arena is shorter than the daemon says", f"{end:,} bytes expected")
        # Private: nothing that happens here can change the image.
        private = mmap.mmap(fd, end, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    finally:
        os.close(fd)
    private.madvise(mmap.MADV_DONTFORK)
    origin = Origin(terms.job, terms.rank, terms.world_size)
    image = memoryview(private)[begin:end]
    verify(image, located.digest)
    restore(image, Survey(attached), origin, located.step)


def _stored(link: Link) -> stored.Newest:
    """The checkpoint in the node's store that this job would go on from."""
    store = link.welcome.store
    return stored.newest(store, link.terms.job) if store else stored.Newest("", ())


def _resume_stored(link: Link, attached: Attached, kept: stored.Newest) -> ResumeReport:
    store, terms = link.welcome.store, link.terms
    report = stored.resume(store, terms.job, kept, attached, terms.rank, terms.world_size)
    resumed = local_pb2.Resumed(generation=report.generation, step=report.step)
    link.tell(local_pb2.TrainerMessage(resumed=resumed))
    log.info("resumed at step %d from %s", report.step, store)
    return report
