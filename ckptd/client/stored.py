"""Resuming from storage: the newest checkpoint that is whole, into the layout that the job has now."""

from __future__ import annotations

import json
from dataclasses import dataclass

from ckptd.client.attached import RESERVED, Attached, has_extra_state, named_modules
from ckptd.client.loading import Loading, give
from ckptd.client.loading import open as open_for_load
from ckptd.client.random_state import restore_random
from ckptd.client.ranks import Ranks
from ckptd.client.report import ResumeReport, Skipped
from ckptd.client.universal_state import of_attached
from ckptd.storage import catalog

_OTHER_RANKS = "*@[0-9]*"  # what only one rank had, in a form of its own


@dataclass(frozen=True)
class Newest:
    """The checkpoint to resume from; `url` is empty where there is none."""

    url: str
    skipped: tuple[Skipped, ...]


def newest(store: str, job: str) -> Newest:
    """Returns the newest whole checkpoint of a job, the same on every rank of torch's process group.

    Raises:
        CkptdError: the store cannot be listed.
    """
    ranks = Ranks(None)

    def look() -> bytes:
        if ranks.rank:
            return b""
        entry, skipped = catalog.newest(store, job)
        url = "" if entry is None else catalog.job_store(store, job).inside(entry.directory).url
        passed = [(each.entry.generation, each.entry.step, each.why) for each in skipped]
        return json.dumps([url, passed]).encode("ascii")

    # Rank 0 looks: a daemon may publish one more while the others would.
    url, passed = json.loads(ranks.gather(ranks.together(look))[0])
    return Newest(url, tuple(Skipped(*each) for each in passed))


def resume(found: Newest, attached: Attached, rank: int, world_size: int) -> ResumeReport:
    """Loads the checkpoint into what is attached.

    Raises:
        StateMismatch: names, shapes or dtypes differ; nothing was changed.
        CorruptCheckpoint: something is damaged; no damaged byte reached a tensor.
    """
    with open_for_load(found.url) as checkpoint:
        manifest = checkpoint.manifest
        loading = Loading(checkpoint, of_attached(attached), rank)
        loading.match(strict=True, allow_missing=False, allow_unexpected=_OTHER_RANKS, cast=False)
        loading.run()
        own = loading.tree.get(RESERVED, {})
        extras = own.get("extra", {})
        for name, module in named_modules(attached):
            if has_extra_state(module) and name in extras:
                give(f"{name}.extra_state", module.set_extra_state, loading.resolved(extras[name]))
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
