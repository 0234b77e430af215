"""Writing a checkpoint: parts by as many processes as hold them, then the manifest by one.

    store = target(url)
    part = write_arrays(store, head, tensors, ...)              # in each process; or `write_image`
    publish(store, header, parts)                               # in one, when all parts are there

Files are written once.  Until the manifest is there, nothing is: a writer that dies leaves no checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from xxhash import xxh3_128_digest

from ckptd.errors import CorruptCheckpoint, CorruptImage, InvalidRequest, NotFound
from ckptd.image import CELL_BYTES, ImagePlan, TensorSpec, Variable, cell_digests, encode
from ckptd.image.digest import digest_of_digests
from ckptd.image.digest_table import TABLE_SUFFIX, read_table, table_bytes, write_table
from ckptd.image.manifest import (
    MANIFEST_NAME,
    Manifest,
    Packed,
    StoredLayout,
    StoredObject,
)
from ckptd.image.variable import read_variable, write_variable
from ckptd.storage import catalog, compression, place
from ckptd.storage.assemble import Table, table
from ckptd.storage.manifests import put_manifest
from ckptd.storage.parts import LocalTensor, Part
from ckptd.storage.store import AlreadyThere, Store, open_store

if TYPE_CHECKING:
    from typing_extensions import Buffer

_PACE_BYTES: Final = 4 << 20
_SLICE_BYTES: Final = 16 * CELL_BYTES  # digested and written while in the cache


@dataclass(frozen=True)
class Heading:
    """What a manifest says beside its files and tensors."""

    job: str
    step: int
    generation: int = 0
    form: str = "distributed"
    world_size: int = 1
    parent: tuple[int, int] | None = None
    mesh: tuple[tuple[str, int], ...] = ()
    layout: StoredLayout | None = None
    fingerprints: dict[str, int] | None = None


def target(url: str, generation: int | None = None) -> tuple[Store, str | None, int | None]:
    """Returns the directory that a new checkpoint goes to; job and step too, where the URL says them.

    Raises:
        InvalidRequest: the URL names no place for a new checkpoint.
        AlreadyThere: a checkpoint is there.
    """
    wanted = place.parse(url)
    if isinstance(wanted, str):
        store, job, step = open_store(wanted), None, None
    else:
        if wanted.step is None:
            raise InvalidRequest(f"{url} names no step", next="write to ckptd://JOB/step-N")
        job, step = wanted.job, wanted.step
        number = wanted.generation if wanted.generation is not None else generation or 0
        store = catalog.job_store(wanted.store, job).inside(place.directory_name(step, number))
    if MANIFEST_NAME in store.list():
        raise AlreadyThere(
            f"a checkpoint is at {store.url} already",
            "files are written once",
            "choose another step or place",
        )
    return store, job, step


def write_image(
    store: Store,
    part: Part,
    image: memoryview,
    digests: bytes,
    *,
    compress: bool = False,
    spend: Callable[[int], None] | None = None,
) -> Part:
    """Writes a rank's image as it is, and its digests; durable when this returns.

    Args:
        part: what lies in it.
        digests: of its cells, as they were sealed; they are not computed again.
        compress: as `ckptd.storage.compression` says.
        spend: called with the number of bytes before they are written; it may wait.

    Raises:
        NoSpace, CkptdError: as the store says.
    """
    plan = ImagePlan.parse(image) if compress else None
    packed = _put(store, part.object, _paced([image], spend), plan)
    store.put(part.object + TABLE_SUFFIX, [write_table(len(image), digests)])
    return replace(part, packed=packed)


def write_share(
    store: Store,
    image: memoryview,
    tensors: Sequence[LocalTensor],
    *,
    compress: bool = False,
    spend: Callable[[int], None] | None = None,
) -> Part:
    """Writes some of the tensors of a rank's image, and all else that the rank has.

    Raises:
        CorruptImage: an array's bytes are not what its digest says.
        NoSpace, CkptdError: as the store says.
    """
    plan = ImagePlan.parse(image)
    head = read_variable(plan, image)
    digest_of = {tensor.array: tensor.digest for tensor in tensors}

    def load(array: str) -> memoryview:
        data = plan.tensor(image, array)
        if xxh3_128_digest(data) != digest_of[array]:
            raise CorruptImage(
                f"{array} of rank {head.rank} is damaged in memory",
                next="the scrub repairs it; save a later step",
            )
        return data

    return write_arrays(
        store, head, tensors, lambda array: plan.spec_of[array].shape, load, compress=compress, spend=spend
    )


def write_arrays(
    store: Store,
    head: Variable,
    tensors: Sequence[LocalTensor],
    shape_of: Callable[[str], tuple[int, ...]],
    load: Callable[[str], Buffer],
    *,
    compress: bool = False,
    spend: Callable[[int], None] | None = None,
) -> Part:
    """Writes a file of arrays, one after another: no more than one is in memory at a time.

    Args:
        head: where the file belongs; its rank names it.
        tensors: what lies in the arrays; an array that holds several is written once.
        shape_of, load: give an array's own shape, and its bytes, contiguous.
        compress: as `ckptd.storage.compression` says.
        spend: called with the number of bytes before they are written; it may wait.

    Raises:
        ValueError: an array's bytes are not as long as its dtype and shape say.
        NoSpace, CkptdError: as the store says.
    """
    plan = share_plan(head, tensors, shape_of)
    name = place.object_name(head.rank)
    stream = Digesting(_paced(_pieces(plan, head, load), spend))
    packed = _put(store, name, stream, plan if compress else None)
    digests, nbytes = stream.digests(), stream.nbytes
    store.put(name + TABLE_SUFFIX, [write_table(nbytes, digests)])
    return Part(head.rank, name, nbytes, digest_of_digests(digests), tuple(tensors), packed)


def share_plan(
    head: Variable, tensors: Sequence[LocalTensor], shape_of: Callable[[str], tuple[int, ...]]
) -> ImagePlan:
    """Returns how `write_arrays` lays out a file of these tensors' arrays.

    Raises:
        ValueError: as `ImagePlan.build`.
    """
    dtype_of = {tensor.array: tensor.dtype for tensor in tensors}
    specs = [TensorSpec(array, dtype, shape_of(array)) for array, dtype in dtype_of.items()]
    return ImagePlan.build(specs, objects_capacity=len(head.objects))


def variable_bytes(plan: ImagePlan, head: Variable) -> bytes:
    """Returns the variable tensor of a file of this plan, which is its end.

    Raises:
        Outgrown: the objects of `head` do not fit the plan.
    """
    # As in an image that holds nothing else.
    bare = ImagePlan.build([], objects_capacity=plan.objects_capacity)
    image = memoryview(bytearray(bare.image_bytes))
    write_variable(bare, image, head)
    return bytes(image[bare.variable_offset :])


def empty_objects() -> bytes:
    """Returns the encoded objects of a part that has none."""
    return encode(None)


def publish(store: Store, heading: Heading, parts: Sequence[Part]) -> Manifest:
    """Checks that all parts are in place, and writes the manifest: now there is a checkpoint.

    Raises:
        CorruptCheckpoint: a part is not in place.
        StateMismatch: the parts do not make whole tensors.
        AlreadyThere: another checkpoint is there.
    """
    parts = sorted(parts, key=lambda part: part.rank)
    made = table(parts)
    for part in parts:
        check_in_place(store, part)
    manifest = manifest_of(heading, parts, made)
    put_manifest(store, manifest)
    return manifest


def manifest_of(heading: Heading, parts: Sequence[Part], made: Table) -> Manifest:
    """Returns the manifest of these parts, in this order."""
    return Manifest(
        job=heading.job,
        generation=heading.generation,
        step=heading.step,
        form=heading.form,
        world_size=heading.world_size,
        objects=tuple(StoredObject(p.object, p.nbytes, p.root, p.rank, p.packed) for p in parts),
        tensors=made.tensors,
        classes=made.classes,
        parent=heading.parent,
        mesh=heading.mesh,
        layout=heading.layout,
        fingerprints=heading.fingerprints or made.fingerprints or None,
    )


def check_in_place(store: Store, part: Part) -> None:
    """Returns if a part's file and digests are there as the part says.

    Raises:
        CorruptCheckpoint: they are not.
    """
    try:
        with store.open(part.object) as reader:
            found = reader.size
        digests = store.read(part.object + TABLE_SUFFIX, table_bytes(part.nbytes))
        if part.packed is not None:
            compression.load_frames(store, part.object, part.nbytes, part.packed)
    except NotFound as error:
        raise CorruptCheckpoint(
            f"{part.object} is not in place", str(error), "write this part again"
        ) from error
    expected = part.nbytes if part.packed is None else part.packed.nbytes
    if found != expected:
        raise CorruptCheckpoint(
            f"{part.object} is not in place",
            f"it has {found} bytes, expected {expected}",
            "write it again",
        )
    read_table(part.object, digests, part.nbytes, part.root)


class Digesting:
    """Passes pieces on in slices, and digests them by the way."""

    def __init__(self, pieces: Iterable[Buffer]) -> None:
        self._pieces = pieces
        self._found: list[bytes] = []
        self._rest = bytearray()  # the beginning of a cell
        self.nbytes = 0

    def __iter__(self) -> Iterator[memoryview]:
        for piece in self._pieces:
            view = memoryview(piece).cast("B") if memoryview(piece).nbytes else memoryview(b"")
            # The first slice ends with a cell of the stream, so that the others begin with one.
            at = min(len(view), -self.nbytes % CELL_BYTES)
            bounds = [0, at, *range(at + _SLICE_BYTES, len(view), _SLICE_BYTES), len(view)]
            for begin, end in pairwise(bounds):
                if begin < end:
                    self._add(view[begin:end])
                    yield view[begin:end]

    def digests(self) -> bytes:
        """Returns the digests of all that was passed on."""
        last = [cell_digests(self._rest)] if self._rest else []
        return b"".join(self._found + last)

    def _add(self, view: memoryview) -> None:
        self.nbytes += len(view)
        if self._rest:
            self._rest += view
            if len(self._rest) < CELL_BYTES:
                return
            assert len(self._rest) == CELL_BYTES
            self._found.append(cell_digests(self._rest))
            self._rest.clear()
            return
        whole = len(view) - len(view) % CELL_BYTES
        self._found.append(cell_digests(view[:whole]))
        self._rest += view[whole:]


def _paced(pieces: Iterable[Buffer], spend: Callable[[int], None] | None) -> Iterator[Buffer]:
    """Yields the bytes of the pieces, those of large ones in slices where somebody wants to keep the pace."""
    if spend is None:
        yield from pieces
        return
    for piece in pieces:
        view = memoryview(piece).cast("B") if memoryview(piece).nbytes else memoryview(b"")
        for at in range(0, len(view), _PACE_BYTES):
            data = view[at : at + _PACE_BYTES]
            spend(len(data))
            yield data


def _put(store: Store, name: str, pieces: Iterable[Buffer], compress: ImagePlan | None) -> Packed | None:
    """Writes a file: as it is, or in frames with their table beside it."""
    if compress is None:
        store.put(name, pieces)
        return None
    packing = compression.Packing(pieces, compression.widths_of(compress))
    store.put(name, packing)
    table = packing.table()
    store.put(name + compression.FRAMES_SUFFIX, [table])
    return Packed(packing.nbytes, compression.frames_root(table))


def _pieces(plan: ImagePlan, head: Variable, load: Callable[[str], Buffer]) -> Iterator[Buffer]:
    """Yields the bytes of an image from its first to its last."""
    yield plan.header
    at = len(plan.header)
    for spec in plan.tensors:
        offset = plan.offset_of[spec.name]
        if offset > at:
            yield bytes(offset - at)
        data = memoryview(load(spec.name))
        if data.nbytes != spec.nbytes:
            raise ValueError(
                f"{spec.name}: {data.nbytes} bytes, {spec.dtype} of {spec.shape} takes {spec.nbytes}"
            )
        yield data
        at = offset + spec.nbytes
    if plan.variable_offset > at:
        yield bytes(plan.variable_offset - at)
    yield variable_bytes(plan, head)
