"""Resuming from storage: the newest checkpoint that is whole, into the layout that the job has now."""

from __future__ import annotations

import json
import logging
from contextlib import ExitStack
from dataclasses import dataclass

from ckptd.client.attached import RESERVED, Attached
from ckptd.client.loading import Loading
from ckptd.client.loading import open as open_for_load
from ckptd.client.matching import match
from ckptd.client.random_state import restore_random
from ckptd.client.ranks import Ranks
from ckptd.client.report import ResumeReport, Skipped
from ckptd.client.universal_state import of_attached
from ckptd.errors import CkptdError, CorruptCheckpoint, NotFound
from ckptd.storage import catalog, marks
from ckptd.storage.store import open_store

log = logging.getLogger("ckptd")

_EXTRA_STATES = "*extra_state"  # checkpoints of older releases have none: said, and gone on without
_OTHER_RANKS = "*@[0-9]*"  # what only one rank had, in a form of its own


@dataclass(frozen=True)
class Newest:
    """The checkpoint to resume from; `url` is empty where there is none."""

    url: str
    skipped: tuple[Skipped, ...]
    generation: int = 0
    step: int = 0


def newest(store: str, job: str, damaged: tuple[Skipped, ...] = ()) -> Newest:
    """Returns the newest whole checkpoint of a job, the same on every rank of torch's process group.

    Args:
        damaged: what was found damaged when it was read; it is passed over.

    Raises:
        CorruptCheckpoint: there are checkpoints, and none can be used: a start from nothing would hide that.
        CkptdError: the store cannot be listed.
    """
    ranks = Ranks(None)

    def look() -> bytes:
        if ranks.rank:
            return b""
        known = [(catalog.Entry(each.step, each.generation), each.why) for each in damaged]
        entry, skipped = catalog.newest(store, job, known)
        passed = [(each.entry.generation, each.entry.step, each.why) for each in skipped]
        told = {(each.generation, each.step) for each in damaged[:-1]}
        for generation, step, why in (each for each in passed if each[:2] not in told):
            log.warning("step %d.g%d of job %s is passed over: %s", step, generation, job, why)
        if entry is None:
            _refuse_to_forget(store, job, passed)
            return json.dumps(["", passed, 0, 0]).encode("ascii")
        url = catalog.job_store(store, job).inside(entry.directory).url
        return json.dumps([url, passed, entry.generation, entry.step]).encode("ascii")

    # Rank 0 looks: a daemon may publish one more while the others would.
    url, passed, generation, step = json.loads(ranks.gather(ranks.together(look, "resume"))[0])
    return Newest(url, tuple(Skipped(*each) for each in passed), generation, step)


def _refuse_to_forget(store: str, job: str, passed: list[tuple[int, int, str]]) -> None:
    ours = [each for each in passed if each[2] != catalog.FOREIGN]
    if ours:
        generation, step, why = ours[0]
        raise CorruptCheckpoint(
            f"none of the {len(ours)} checkpoints that job {job} could resume from in {store} can be used",
            f"the newest, step {step}.g{generation}: {why}",
            f"ckptd verify {job}/step-{step}.g{generation} --repair; or start anew under another name",
        )


def resume(
    store: str, job: str, found: Newest, attached: Attached, rank: int, world_size: int
) -> ResumeReport:
    """Loads the checkpoint into what is attached; one that turns out to be damaged is passed over, too.

    A prune leaves it alone meanwhile.

    Raises:
        StateMismatch: names, shapes or dtypes differ; nothing was changed.
        CorruptCheckpoint: something is damaged, and nothing older is whole, or the ranks have no process
            group in which they could agree on another; no damaged byte reached a tensor.
    """
    ranks = Ranks(None)
    while True:
        with ExitStack() as lease:

            def load(found: Newest = found, lease: ExitStack = lease) -> ResumeReport | CkptdError:
                try:
                    if ranks.rank == 0:
                        lease.enter_context(marks.leased(open_store(found.url)))
                    return _load(found, attached, rank, world_size)
                except (CorruptCheckpoint, NotFound) as error:  # damaged, or removed since
                    return error

            outcome = ranks.together(load, "resume")
            mine = str(outcome) if isinstance(outcome, CkptdError) else ""
            why = next(filter(None, (text.decode() for text in ranks.gather(mine.encode()))), "")
        if isinstance(outcome, ResumeReport) and not why:
            return outcome
        if ranks.size != world_size:  # others may have read what they need, and gone on
            assert isinstance(outcome, CkptdError)
            raise outcome
        found = newest(store, job, (*found.skipped, Skipped(found.generation, found.step, why)))
        if not found.url:
            raise NotFound(f"the checkpoints of job {job} were removed while one was read", why)


def _load(found: Newest, attached: Attached, rank: int, world_size: int) -> ResumeReport:
    with open_for_load(found.url) as checkpoint:
        manifest = checkpoint.manifest
        state = of_attached(attached)
        matched = match(
            checkpoint,
            state,
            rank,
            strict=True,
            allow_missing=_EXTRA_STATES,
            allow_unexpected=_OTHER_RANKS,
            cast=False,
        )
        if matched.missing:
            log.warning("%s has no %s; these stay as they are", found.url, ", ".join(matched.missing))
        Loading(checkpoint, state, matched).run()
        own = matched.tree.get(RESERVED, {})
        changed = None
        if manifest.world_size != world_size:
            changed = f"{manifest.world_size} ranks, now {world_size}"
        elif "random" in own:
            restore_random(own["random"])
    return ResumeReport(
        manifest.step,
        "storage",
        verified=True,
        generation=manifest.generation,
        layout_change=changed,
        skipped=found.skipped,
    )
