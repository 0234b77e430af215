"""A protected snapshot becomes a checkpoint: every node writes its ranks' images, the manifest comes last.

    offered = described(images)                     # each node: what its ranks hold
    shares.put_offers(store, parts)                 # each node
    shares.put_when_whole(store, ranks)             # one node, until it returns True
    write_parts(store, offered, shares.read(...))   # each node, once there are shares
    publish_when_whole(store, heading, ranks)       # one node, until it returns True

Nodes need not hear from each other: each part leaves a record beside its file, and whoever finds the
records of all ranks may publish.  Two who do so write the same manifest, and only once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from ckptd.errors import CkptdError, CorruptImage, NotFound
from ckptd.image.digest import digest_of_digests, mismatches
from ckptd.image.manifest import MANIFEST_NAME
from ckptd.storage import catalog, place, shares
from ckptd.storage.describe import tensors_of_image
from ckptd.storage.manifests import read_manifest
from ckptd.storage.parts import Part
from ckptd.storage.store import AlreadyThere, Store
from ckptd.storage.writing import Heading, publish, write_image, write_share

log = logging.getLogger("ckptd.storage")

_RECORD_SUFFIX: Final = ".part"


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
    """Whether there is a checkpoint; it is durable then."""
    if MANIFEST_NAME not in store.list():
        return False
    store.settle()
    return True


@dataclass(frozen=True)
class Offered:
    """A rank's image, and the part of a checkpoint that it is as a whole."""

    sealed: SealedImage
    part: Part


def described(images: Sequence[SealedImage]) -> list[Offered]:
    """Returns what lies in these images.

    Raises:
        CorruptImage: bytes in memory are not those that were sealed.
        CorruptCheckpoint: what an image says of its own tensors does not fit them.
    """
    found = []
    for sealed in images:
        tensors = tensors_of_image(sealed.image)
        wrong = mismatches(sealed.image, sealed.digests)
        if wrong:
            raise CorruptImage(
                f"rank {sealed.rank}'s image is damaged in memory",
                f"{len(wrong)} of its cells differ from their digests, first cell {wrong[0]}",
                "the scrub repairs it; save a later step",
            )
        name, root = place.object_name(sealed.rank), digest_of_digests(sealed.digests)
        found.append(Offered(sealed, Part(sealed.rank, name, len(sealed.image), root, tuple(tensors))))
    return found


def is_there(store: Store, offered: Sequence[Offered]) -> bool:
    """Whether there is a checkpoint already; it is durable then, and made from these images.

    Raises:
        AlreadyThere: it is another snapshot's.
    """
    if not is_published(store):
        return False
    roots = {stored.rank: stored.root for stored in read_manifest(store).objects} | shares.roots(store)
    for each in offered:
        if roots.get(each.part.rank) != each.part.root:
            raise AlreadyThere(
                f"another checkpoint is at {store.url}",
                "a job of the same name wrote it in an earlier life, of which nobody here knows",
                "give this job another name, or another store",
            )
    return True


def write_parts(
    store: Store,
    offered: Sequence[Offered],
    shared: Mapping[int, shares.Share] | None = None,
    *,
    compress: bool = False,
    spend: Callable[[int], None] | None = None,
) -> None:
    """Writes each rank's share, its digests and its record; durable when this returns.

    What is published already stays.

    Args:
        shared: by rank; None: everybody writes all that it has.
        compress: as `ckptd.storage.compression` says.
        spend: called with the number of bytes before they are written; it may wait.

    Raises:
        AlreadyThere: what is published there is another snapshot's.
        CorruptImage: bytes in memory are not those that were offered; this part has no record then.
        NoSpace, CkptdError: as the store says.
    """
    if is_there(store, offered):
        return
    for each in offered:
        names = None if shared is None else shared[each.part.rank].names
        image, digests = each.sealed.image, each.sealed.digests
        if names is None:
            part = write_image(store, each.part, image, digests, compress=compress, spend=spend)
        else:
            kept = [tensor for tensor in each.part.tensors if tensor.name in names]
            part = write_share(store, image, kept, compress=compress, spend=spend)
        store.put(_record_name(part.rank), [part.write()])


def publish_when_whole(store: Store, heading: Heading, ranks: Sequence[int]) -> bool:
    """Publishes the manifest if the parts of all ranks are there; returns whether they are.

    Raises:
        CorruptCheckpoint, StateMismatch: the parts do not make a checkpoint.
    """
    there = set(store.list())
    names = [_record_name(rank) for rank in ranks]
    if not there.issuperset(names):
        # Whoever published may have died, or failed, when some of the records were removed.
        return MANIFEST_NAME in there and is_published(store)
    try:
        parts = [Part.read(store.read(name, shares.MAX_RECORD_BYTES)) for name in names]
    except NotFound:  # another one has published meanwhile, and removed them
        return is_published(store)
    publish(store, heading, parts)
    for rank, name in zip(ranks, names, strict=True):
        store.delete(name)
        store.delete(shares.offer_name(rank))
    return True


def lacking(store: Store, ranks: Sequence[int]) -> set[int]:
    """Returns the ranks whose part is not there; none where the manifest is."""
    there = set(store.list())
    return {rank for rank in ranks if _record_name(rank) not in there and MANIFEST_NAME not in there}


def generations(store: str, job: str) -> catalog.Generations:
    """Returns the generations that a job's checkpoints and rollbacks used.

    A store that cannot be looked at must not keep a job from training: then a collision is noticed when a
    snapshot is written.
    """
    try:
        return catalog.generations(store, job)
    except CkptdError as error:
        log.warning("the checkpoints of job %s cannot be looked at: %s", job, error)
        return catalog.Generations()


def parent_of(
    store: str, job: str, generation: int, step: int, start: tuple[int, int]
) -> tuple[int, int] | None:
    """The checkpoint that this one goes on from, (generation, step); None for the first of a job.

    Args:
        start: (generation, step) of the state that the generation began with.
    """
    known = catalog.keyed_lines(store, job)
    own = known.at_most((generation, step - 1))
    # What a rollback left may be of a lower generation than `start`, and nearer; lines know better.
    return own if own is not None and own[0] == generation else known.at_most(start)


def _record_name(rank: int) -> str:
    return place.object_name(rank) + _RECORD_SUFFIX
