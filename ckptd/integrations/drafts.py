"""A checkpoint of files that is being written: nothing of it is there for anyone before `publish`."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from ckptd.errors import NotFound
from ckptd.image import DIGEST_BYTES
from ckptd.image.digest import digest_of_digests
from ckptd.image.digest_table import HEAD_BYTES, TABLE_SUFFIX, read_table, table_bytes, write_table
from ckptd.image.manifest import Manifest, StoredObject
from ckptd.integrations.streams import VerifiedFile, WrittenFile
from ckptd.storage.manifests import put_manifest, read_manifest
from ckptd.storage.store import Store
from ckptd.storage.writing import Digesting


@dataclass(frozen=True)
class Draft:
    """Where a checkpoint is written, and what its manifest will say of it."""

    store: Store
    job: str
    step: int
    generation: int
    parent: tuple[int, int] | None


def writer(store: Store, name: str) -> WrittenFile:
    """Returns a file to write to; one of this name is replaced."""

    def put(pieces: Iterable[bytes]) -> None:
        delete(store, name)  # what an earlier try left
        stream = Digesting(pieces)
        store.put(name, stream)
        store.put(name + TABLE_SUFFIX, [write_table(stream.nbytes, stream.digests())])

    return WrittenFile(put)


def delete(store: Store, name: str) -> None:
    """Removes a file; without its digests it does not count."""
    store.delete(name + TABLE_SUFFIX)
    store.delete(name)


def described(store: Store, name: str, number: int) -> StoredObject:
    """A file that is written, as a manifest describes it."""
    with store.open(name) as reader:
        nbytes = reader.size
    table = store.read(name + TABLE_SUFFIX, table_bytes(nbytes))
    root = digest_of_digests(table[HEAD_BYTES:])
    read_table(name, table, nbytes, root)
    return StoredObject(name, nbytes, root, number)


def unpublished(store: Store, name: str) -> io.BufferedReader:
    """Returns a file that is written, to be read and verified."""
    found = described(store, name, 0)
    digests = store.read(name + TABLE_SUFFIX, table_bytes(found.nbytes))[HEAD_BYTES:]
    assert len(digests) % DIGEST_BYTES == 0
    return VerifiedFile.buffered(store.open(name), digests, name)


def written(store: Store) -> list[str]:
    """Returns the files that have their digests."""
    there = store.list()
    return [name for name in there if name + TABLE_SUFFIX in there]


def published(store: Store) -> list[str]:
    """Returns the files of the checkpoint that is there, in the manifest's order.

    Raises:
        CorruptCheckpoint: its manifest cannot be used.
    """
    return [stored.name for stored in read_manifest(store).objects]


def publish(draft: Draft, only: Collection[str] | None = None) -> None:
    """Writes the manifest of all files that have their digests, or of those named.

    A file that an earlier try with more ranks left is among all: DCP's own index does not name it.

    Raises:
        AlreadyThere: another has published this checkpoint.
        NotFound: a file that is named was given up.
        CkptdError: as the store says.
    """
    names = [name for name in written(draft.store) if only is None or name in only]
    if lost := sorted(set(only or ()) - set(names)):
        raise NotFound(f"{', '.join(lost)} was not written to {draft.store.url}", "nothing is published")
    files = tuple(described(draft.store, name, number) for number, name in enumerate(names))
    manifest = Manifest(
        draft.job, draft.generation, draft.step, "files", 1, files, tensors=(), parent=draft.parent
    )
    put_manifest(draft.store, manifest)
