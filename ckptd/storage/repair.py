"""Damaged blocks of a stored checkpoint, rebuilt from what else there is of them; a plan, then its execution.

    with open_checkpoint(url) as checkpoint:
        made = plan(checkpoint, checkpoint.verify())
        execute(checkpoint, made)

A block may come back in three ways, and whatever comes is compared with the block's digest first, so a wrong
guess does no harm:
  - another block with the same digest: what ranks hold alike lies in several files;
  - other covers of the tensors in it: replicas whose blocks are cut elsewhere;
  - a `Source` of the caller's, a peer's memory that still has this snapshot: cells with the same digest, or
    the arrays in it, where the file holds only a share of its rank's.

What comes back in none of them is named: file, rank, bytes, tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from ckptd.errors import CkptdError, CorruptImage, NotFound
from ckptd.image import ImagePlan, header
from ckptd.image.digest import DIGEST_BYTES, cell_digests, digest_of_digests
from ckptd.image.digest_table import BLOCK_BYTES, TABLE_SUFFIX, read_table, write_table
from ckptd.storage.fetch import read_verified
from ckptd.storage.local_store import LocalStore
from ckptd.storage.reading import Checkpoint
from ckptd.storage.remembered import Remembered, RememberedFile, Source
from ckptd.storage.replicas import Arrays, Replicas, arrays_of
from ckptd.storage.store import Reader
from ckptd.storage.transfer import Damage

_ASIDE = ".repaired"


@dataclass(frozen=True, slots=True)
class Lost:
    """Blocks of one file, one after another, that nothing has any more."""

    object: str
    rank: int
    begin: int  # bytes of the file
    end: int
    tensors: tuple[str, ...]  # logical names
    why: str


@dataclass
class FilePlan:
    """What is known of one damaged file."""

    index: int  # of `manifest.objects`
    table: bytes | None = None  # to be written anew
    blocks: dict[int, bytes] = field(default_factory=dict)  # rebuilt
    lost: list[int] = field(default_factory=list)  # blocks that nothing has any more
    cut: bool = False  # the file goes on behind its end
    beyond: bool = False  # nothing can be done: its digests are gone, or its damage is not in its bytes
    why: str = ""

    @property
    def writes_file(self) -> bool:
        return bool(self.blocks) or (self.cut and not self.lost)


@dataclass(frozen=True)
class Repair:
    """What a repair will do."""

    files: tuple[FilePlan, ...]
    lost: tuple[Lost, ...]

    @property
    def blocks(self) -> int:
        return sum(len(file.blocks) for file in self.files)

    @property
    def tables(self) -> int:
        return sum(file.table is not None for file in self.files)


def plan(checkpoint: Checkpoint, damage: Sequence[Damage], source: Source | None = None) -> Repair:
    """Returns what can be rebuilt of what `Checkpoint.verify` found; reads, and writes nothing.

    The rebuilt blocks are in memory until they are written.

    Raises:
        CkptdError: the store cannot be read.
    """
    objects = checkpoint.manifest.objects
    index_of = {stored.name: index for index, stored in enumerate(objects)}
    digests: dict[int, bytes] = {}
    files = []
    for name in dict.fromkeys(found.object for found in damage):
        why = next(found.why for found in damage if found.object == name)
        made = FilePlan(index_of[name], why=why)
        made.lost = sorted({block for found in damage if found.object == name for block in _blocks(found)})
        files.append(made)
        if objects[made.index].packed is not None:
            made.why, made.beyond = f"it is compressed, which no repair writes; {why}", True
            continue
        _table(checkpoint, made, digests)
    for index in range(len(objects)):
        if index not in {made.index for made in files}:
            digests[index] = checkpoint.digests(index)
    where = _where(digests, {(made.index, block) for made in files for block in made.lost})
    for made in files:
        if not made.beyond:
            _rebuild(checkpoint, made, digests, where, source)
    return Repair(tuple(files), tuple(lost for made in files for lost in _lost(checkpoint, made)))


def execute(checkpoint: Checkpoint, made: Repair) -> None:
    """Writes the files that the plan repairs; each is replaced as a whole, the others are not touched.

    Raises:
        NoSpace, CkptdError: as the store says; every file is what it was, or repaired.
    """
    store = checkpoint.store
    for each in made.files:
        stored = checkpoint.manifest.objects[each.index]
        if each.table is not None:
            store.put(stored.name + TABLE_SUFFIX, [each.table])
        if not each.writes_file:
            continue
        with _Old(checkpoint, each.index) as old:
            if isinstance(store, LocalStore):
                store.put(stored.name, _content(old, each))
                continue
            # Other stores may show a file while it is written, and read the old one through its name.
            store.put(stored.name + _ASIDE, _content(old, each))
        with store.open(stored.name + _ASIDE) as reader:
            store.put(stored.name, _pieces(reader))
        store.delete(stored.name + _ASIDE)
    checkpoint.close()


def _table(checkpoint: Checkpoint, made: FilePlan, digests: dict[int, bytes]) -> None:
    """Reads a file's digests, or computes them from a file that is whole; finds which blocks are damaged."""
    stored = checkpoint.manifest.objects[made.index]
    try:
        digests[made.index] = checkpoint.digests(made.index)
    except CkptdError as error:
        made.why = str(error)
        try:
            with checkpoint.open(made.index) as reader:
                found = b"".join(cell_digests(piece) for piece in _pieces(reader))
        except CkptdError:
            found = b""
        made.beyond = digest_of_digests(found) != stored.root
        if not made.beyond:
            made.table = write_table(stored.nbytes, found)
            digests[made.index] = read_table(stored.name, made.table, stored.nbytes, stored.root)
            made.lost = []
        return
    if len(made.lost) == _count(stored.nbytes):  # as a whole: gone, of another length, or of no use
        with _Old(checkpoint, made.index) as old:
            made.cut = old.size > stored.nbytes
            own = digests[made.index]
            made.lost = [block for block in made.lost if not _fits(old.block(block), own, block)]
        made.beyond = not made.lost and not made.cut


def _rebuild(
    checkpoint: Checkpoint,
    made: FilePlan,
    digests: dict[int, bytes],
    where: dict[bytes, list[tuple[int, int]]],
    source: Source | None,
) -> None:
    """Moves blocks from `lost` to `blocks`; those with an equal elsewhere first, as the head may be."""
    nbytes = checkpoint.manifest.objects[made.index].nbytes
    own = digests[made.index]
    for block in list(made.lost):
        digest = _digest(own, block)
        length = min(BLOCK_BYTES, nbytes - block * BLOCK_BYTES)
        found = _equal(checkpoint, where.get(digest, []), length, digests)
        if found is None and source is not None:
            found = source.by_digest(digest, length)
        _take(made, block, found, own)
    if made.lost:
        with _Old(checkpoint, made.index) as old:
            if source is not None:
                _from_memory(checkpoint, made, old, own, source)
            layout = _plan_of(made, old)
            replicas = None if layout is None else Replicas(checkpoint, made.index, layout)
            for block in list(made.lost):
                if replicas is None:
                    break
                known = old.block(block).ljust(old.length(block), b"\0")
                _take(made, block, replicas.block(block, known), own)


def _from_memory(checkpoint: Checkpoint, made: FilePlan, old: _Old, own: bytes, source: Source) -> None:
    """Moves the blocks that a rank's image in memory has the arrays of; the head may be among them."""
    memory = Remembered.find(source, checkpoint.manifest.objects[made.index].rank)
    if memory is None:
        return
    layout = _plan_of(made, old) or memory.layout(checkpoint.store)
    if layout is None or layout.image_bytes != old.nbytes:
        return
    with contextlib.suppress(NotFound):
        file = RememberedFile(memory, layout)
        for block in list(made.lost):
            begin = block * BLOCK_BYTES
            _take(made, block, file.block(begin, begin + old.length(block)), own)


def _take(made: FilePlan, block: int, found: bytes | None, digests: bytes) -> None:
    if found is not None and _fits(found, digests, block):
        made.blocks[block] = found
        made.lost.remove(block)


def _where(digests: dict[int, bytes], damaged: set[tuple[int, int]]) -> dict[bytes, list[tuple[int, int]]]:
    """Where else the content of each damaged block lies, by digest: objects and blocks."""
    wanted: dict[bytes, list[tuple[int, int]]] = {
        _digest(digests[index], block): [] for index, block in damaged if index in digests
    }
    if wanted:
        for index, table in digests.items():
            for block in range(len(table) // DIGEST_BYTES):
                places = wanted.get(_digest(table, block))
                if places is not None and (index, block) not in damaged:
                    places.append((index, block))
    return wanted


def _equal(
    checkpoint: Checkpoint, places: Sequence[tuple[int, int]], length: int, digests: dict[int, bytes]
) -> bytes | None:
    """A block with the same digest; zeros fill up a last block, so that it may be longer."""
    for index, block in places:
        stored = checkpoint.manifest.objects[index]
        there = min(BLOCK_BYTES, stored.nbytes - block * BLOCK_BYTES)
        data = bytearray(there)
        try:
            with checkpoint.open(index) as reader:
                read_verified(reader, block * BLOCK_BYTES, memoryview(data), digests[index], stored.name)
        except CkptdError:
            continue
        return bytes(data[:length]).ljust(length, b"\0")
    return None


def _lost(checkpoint: Checkpoint, made: FilePlan) -> Iterator[Lost]:
    """What stays damaged of a file, in ranges of the same tensors."""
    stored = checkpoint.manifest.objects[made.index]
    arrays = arrays_of(checkpoint, made.index)
    with _Old(checkpoint, made.index) as old:
        layout = None if made.beyond else _plan_of(made, old)
    if made.beyond:
        yield Lost(stored.name, stored.rank, 0, stored.nbytes, _tensors(arrays, layout, 0), made.why)
        return
    named = [(block, _tensors(arrays, layout, block)) for block in made.lost]
    for (_, names), group in groupby(enumerate(named), key=lambda item: (item[1][0] - item[0], item[1][1])):
        run = [block for _, (block, _) in group]
        end = min((run[-1] + 1) * BLOCK_BYTES, stored.nbytes)
        yield Lost(stored.name, stored.rank, run[0] * BLOCK_BYTES, end, names, made.why)


def _tensors(arrays: Arrays, layout: ImagePlan | None, block: int) -> tuple[str, ...]:
    """The logical tensors that lie in a block of a file; all of the file where nobody knows."""
    begin, end = block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES
    hit = (
        arrays.keys()
        if layout is None
        else [
            spec.name
            for spec in layout.tensors
            if layout.offset_of[spec.name] < end and layout.offset_of[spec.name] + spec.nbytes > begin
        ]
    )
    return tuple(sorted({stored.name for name in hit for stored, _ in arrays.get(name, [])}))


class _Old:
    """A file as it is now, damaged or not; nothing, where it is gone."""

    def __init__(self, checkpoint: Checkpoint, index: int) -> None:
        self._stored = checkpoint.manifest.objects[index]
        self._reader: Reader | None = None
        self.size = 0
        with contextlib.suppress(NotFound):
            self._reader = checkpoint.store.open(self._stored.name)
            self.size = self._reader.size

    def __enter__(self) -> _Old:
        return self

    def __exit__(self, *_: object) -> None:
        if self._reader is not None:
            self._reader.close()

    @property
    def nbytes(self) -> int:
        return self._stored.nbytes

    def length(self, block: int) -> int:
        """Bytes that a block should have."""
        return min(BLOCK_BYTES, self._stored.nbytes - block * BLOCK_BYTES)

    def block(self, block: int) -> bytes:
        """Returns what there is of a block; b"" where the file ends before, or cannot be read."""
        begin = block * BLOCK_BYTES
        data = bytearray(max(0, min(self.length(block), self.size - begin)))
        if self._reader is None or not data:
            return b""
        try:
            self._reader.read_into(begin, memoryview(data))
        except CkptdError:  # a bad sector
            return b""
        return bytes(data)


def _plan_of(made: FilePlan, old: _Old) -> ImagePlan | None:
    """Where the arrays of a file lie, by its header: as it is, or as it was rebuilt."""

    def blocks(count: int) -> bytes:
        return b"".join(made.blocks.get(n) or old.block(n) for n in range(count))

    try:
        total = header.reserved_bytes(memoryview(blocks(1)), old.nbytes)
        count = _count(total)
        if any(block < count for block in made.lost):
            return None
        return ImagePlan.parse(memoryview(blocks(count))[:total], old.nbytes)
    except CorruptImage:
        return None


def _content(old: _Old, made: FilePlan) -> Iterator[bytes]:
    """The bytes of a repaired file: rebuilt blocks, and the others as they are."""
    for block in range(_count(old.nbytes)):
        found = made.blocks.get(block)
        yield old.block(block).ljust(old.length(block), b"\0") if found is None else found


def _pieces(reader: Reader) -> Iterator[bytes]:
    for begin in range(0, reader.size, 16 * BLOCK_BYTES):
        data = bytearray(min(16 * BLOCK_BYTES, reader.size - begin))
        reader.read_into(begin, memoryview(data))
        yield bytes(data)


def _fits(data: bytes, digests: bytes, block: int) -> bool:
    return len(data) > 0 and cell_digests(data) == _digest(digests, block)


def _digest(digests: bytes, block: int) -> bytes:
    return digests[block * DIGEST_BYTES : (block + 1) * DIGEST_BYTES]


def _count(nbytes: int) -> int:
    return -(-nbytes // BLOCK_BYTES)


def _blocks(found: Damage) -> range:
    return range(found.begin // BLOCK_BYTES, _count(found.end))
