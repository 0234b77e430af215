"""A protected snapshot becomes a checkpoint: every node writes its ranks' images, the manifest comes last.

Nodes need not hear from each other: each part leaves a record beside its file, and whoever finds the
records of all ranks may publish.  Two who do so write the same manifest, and only once.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ckptd.errors import CkptdError, CorruptImage, NotFound
from ckptd.image.digest import digest_of_digests, mismatches
from ckptd.image.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest
from ckptd.storage import catalog, place
from ckptd.storage.parts import Part
from ckptd.storage.store import AlreadyThere, Store
from ckptd.storage.writing import Heading, publish, write_image

log = logging.getLogger("ckptd.storage")

_RECORD_SUFFIX: Final = ".part"
_MAX_RECORD_BYTES: Final = 256 << 20


@dataclass(frozen=True)
class SealedImage:
    """One rank's image in memory, and its cells' digests."""

    rank: int
    image: memoryview
    digests: bytes


def directory_of(store: str, job: str, step: int, generation: int) -> Store:
    """The directory of this snapshot's checkpoint."""
    return catalog.job_store(store, job).inside(place.directory_name(step, generation))


def is_published(store: Store) -> bool:
    """Whether there is a checkpoint."""
    return MANIFEST_NAME in store.list()


def write_parts(store: Store, images: Sequence[SealedImage]) -> None:
    """Writes images, digests and records; durable when this returns.  What is published already stays.

    Raises:
        AlreadyThere: what is published there is another snapshot's.
        CorruptImage: bytes in memory are not those that were sealed; nothing of this image is written.
        NoSpace, CkptdError: as the store says.
    """
    if is_published(store):
        _check_same(store, images)
        return
    for sealed in images:
        wrong = mismatches(sealed.image, sealed.digests)
        if wrong:
            raise CorruptImage(
                f"rank {sealed.rank}'s image is damaged in memory",
                f"{len(wrong)} of its cells differ from their digests, first cell {wrong[0]}",
                "the scrub repairs it; save a later step",
            )
        part = write_image(store, sealed.rank, sealed.image, digests=sealed.digests)
        store.put(_record_name(sealed.rank), [part.write()])


def publish_when_whole(store: Store, heading: Heading, ranks: Sequence[int]) -> bool:
    """Publishes the manifest if the parts of all ranks are there; returns whether they are.

    Raises:
        CorruptCheckpoint, StateMismatch: the parts do not make a checkpoint.
    """
    there = set(store.list())
    names = [_record_name(rank) for rank in ranks]
    if not there.issuperset(names):
        return False
    try:
        parts = [Part.read(store.read(name, _MAX_RECORD_BYTES)) for name in names]
    except NotFound:  # another one has published meanwhile, and removed them
        return is_published(store)
    publish(store, heading, parts)
    for name in names:
        store.delete(name)
    return True


def newest_generation(store: str, job: str) -> int:
    """The greatest generation of this job's checkpoints and rollbacks, which none may use again; 0 for none.

    A store that cannot be looked at must not keep a job from training: then a collision is noticed when a
    snapshot is written.
    """
    try:
        return catalog.newest_generation(store, job)
    except CkptdError as error:
        log.warning("the checkpoints of job %s cannot be looked at: %s", job, error)
        return 0


def parent_of(
    store: str, job: str, generation: int, step: int, start: tuple[int, int]
) -> tuple[int, int] | None:
    """The checkpoint that this one goes on from, (generation, step); None for the first of a job.

    Args:
        start: (generation, step) of the state that the generation began with.
    """
    known = [(entry.generation, entry.step) for entry in catalog.entries(store, job)]
    own = [key for key in known if key[0] == generation and key[1] < step]
    before = [key for key in known if key[0] < generation and key <= start]
    return max(own or before, default=None)


def _check_same(store: Store, images: Sequence[SealedImage]) -> None:
    manifest = Manifest.read(store.read(MANIFEST_NAME, MAX_MANIFEST_BYTES))
    roots = {stored.rank: stored.root for stored in manifest.objects}
    for sealed in images:
        if roots.get(sealed.rank) != digest_of_digests(sealed.digests):
            raise AlreadyThere(
                f"another checkpoint is at {store.url}",
                "a job of the same name wrote it in an earlier life, of which nobody here knows",
                "give this job another name, or another store",
            )


def _record_name(rank: int) -> str:
    return place.object_name(rank) + _RECORD_SUFFIX
