"""Who writes what of a snapshot: what several ranks hold alike is written once, in equal shares.

    rank-00000.safetensors.offer    what a rank holds, as the part that its whole image would be
    shares.json                     which of it each rank writes

Nodes need not hear from each other: each leaves the offers of its ranks, one of them writes the shares when
all offers are there, and all follow.  The shares name the image that each rank had offered, so that they can
be taken for those of no other snapshot; they stay beside the manifest, to say so later, too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from ckptd.errors import CorruptCheckpoint, NotFound
from ckptd.image import columns
from ckptd.image.fields import Fields, MalformedField
from ckptd.storage import place
from ckptd.storage.assemble import writers
from ckptd.storage.parts import Part
from ckptd.storage.store import Store

SHARES_NAME: Final = "shares.json"
MAX_RECORD_BYTES: Final = 256 << 20
_OFFER_SUFFIX: Final = ".offer"
_MAX_RANK: Final = 1 << 32
_MAX_TENSORS: Final = 1 << 20
# A rank that need not write less than this part of its image writes all of it: its digests are known, and
# what lies there twice can be repaired.
_WORTH: Final = 16


@dataclass(frozen=True)
class Share:
    """What one rank writes.

    Attributes:
        root: of the image in memory that it was reckoned for.
        names: of its tensors; None: all, the image as it lies.
    """

    root: bytes
    names: frozenset[str] | None


def reckon(offers: Sequence[Part]) -> dict[int, Share]:
    """Returns the share of every rank."""
    shares = {}
    for part, chosen in zip(offers, writers([offer.tensors for offer in offers]), strict=True):
        arrays = {t.array: t.nbytes for t in part.tensors}
        kept = {t.array for t in part.tensors if t.name in chosen}
        saved = sum(nbytes for array, nbytes in arrays.items() if array not in kept)
        whole = saved * _WORTH < part.nbytes
        shares[part.rank] = Share(part.root, None if whole else frozenset(chosen))
    return shares


def put_offers(store: Store, parts: Sequence[Part]) -> None:
    """Leaves what ranks hold for whoever reckons the shares."""
    for part in parts:
        store.put(offer_name(part.rank), [part.write()])


def put_when_whole(store: Store, ranks: Sequence[int]) -> bool:
    """Writes the shares if the offers of all ranks are there; returns whether they are.

    Raises:
        CorruptCheckpoint: an offer cannot be read.
    """
    if lacking(store, ranks):
        return False
    offers = [Part.read(store.read(offer_name(rank), MAX_RECORD_BYTES)) for rank in ranks]
    store.put(SHARES_NAME, [_written(offers, reckon(offers))])
    return True


def lacking(store: Store, ranks: Sequence[int]) -> set[int]:
    """Returns the ranks whose offer is not there."""
    there = set(store.list())
    return {rank for rank in ranks if offer_name(rank) not in there}


def read(store: Store, offers: Sequence[Part]) -> Mapping[int, Share] | None:
    """Returns the shares of these ranks; None where there are none, or those of an earlier snapshot.

    Raises:
        CorruptCheckpoint: they cannot be read.
    """
    shares = _load(store, {offer.rank: offer for offer in offers})
    for offer in offers:
        if offer.rank not in shares or shares[offer.rank].root != offer.root:
            return None
    return shares


def roots(store: Store) -> dict[int, bytes]:
    """Returns the roots of the images that a checkpoint was made from, by rank; {} where nothing tells.

    Raises:
        CorruptCheckpoint: the shares cannot be read.
    """
    return {rank: share.root for rank, share in _load(store, {}).items()}


def offer_name(rank: int) -> str:
    """The name of a rank's offer."""
    return place.object_name(rank) + _OFFER_SUFFIX


def _written(offers: Sequence[Part], shares: Mapping[int, Share]) -> bytes:
    rows: list[list[object]] = []
    for offer in offers:
        share = shares[offer.rank]
        row: list[object] = [offer.rank, share.root.hex()]
        if share.names is not None:
            numbers = [n for n, tensor in enumerate(offer.tensors) if tensor.name in share.names]
            row += [len(numbers), columns.pack(np.array(numbers, np.int64))]
        rows.append(row)
    return json.dumps({"ckptd.shares": 1, "ranks": rows}, separators=(",", ":")).encode("ascii")


def _load(store: Store, offers: Mapping[int, Part]) -> dict[int, Share]:
    try:
        return _read(store.read(SHARES_NAME, MAX_RECORD_BYTES), offers)
    except NotFound:
        return {}
    except (MalformedField, ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"{SHARES_NAME} in {store.url} cannot be read", str(error)) from error


def _read(data: bytes, offers: Mapping[int, Part]) -> dict[int, Share]:
    """The shares; names are looked up for the ranks of `offers` alone."""
    given = Fields(json.loads(data), "the shares of a snapshot")
    if given.number("ckptd.shares", 1) != 1:
        raise MalformedField("the shares of a snapshot are of an unknown version")
    rows = given.items("ranks", _MAX_RANK)
    given.done()
    shares = {}
    for row in rows:
        known = (
            ("rank", "root") if isinstance(row, list) and len(row) == 2 else ("rank", "root", "n", "tensors")
        )
        one = Fields.of_list(row, "a share", known)
        rank, root, names = one.number("rank", _MAX_RANK), one.hex_bytes("root", 16), None
        if len(known) > 2:
            count, packed = one.number("n", _MAX_TENSORS), one.take("tensors")
            names = _names(columns.unpack(packed, count).tolist(), offers.get(rank))
        shares[rank] = Share(root, names)
    return shares


def _names(numbers: list[int], offer: Part | None) -> frozenset[str]:
    if offer is None:
        return frozenset()
    if any(not 0 <= number < len(offer.tensors) for number in numbers):
        raise MalformedField(f"a share of rank {offer.rank} is of a tensor that it has not")
    return frozenset(offer.tensors[number].name for number in numbers)
