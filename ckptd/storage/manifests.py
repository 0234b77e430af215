"""The manifest on a store: with it a checkpoint is there, and without it there is none."""

from __future__ import annotations

from ckptd.image.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest
from ckptd.storage.store import AlreadyThere, Store


def read_manifest(store: Store) -> Manifest:
    """Returns the manifest of the checkpoint in this directory.

    Raises:
        NotFound: there is none.
        CorruptCheckpoint: it cannot be used.
    """
    return Manifest.read(store.read(MANIFEST_NAME, MAX_MANIFEST_BYTES))


def put_manifest(store: Store, manifest: Manifest) -> None:
    """Makes the checkpoint in this directory be there; its files must be in place.

    Raises:
        AlreadyThere: another checkpoint is there.
        CorruptCheckpoint: we could not read this manifest ourselves; it is not written.
        CkptdError: as the store says.
    """
    data = manifest.write()
    Manifest.read(data)  # what we cannot read ourselves is never published
    try:
        store.put_if_absent(MANIFEST_NAME, data)
    except AlreadyThere:
        # The answer to an earlier try of ours may have been lost.
        if store.read(MANIFEST_NAME, MAX_MANIFEST_BYTES) != data:
            raise
