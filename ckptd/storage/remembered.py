"""Blocks of a file that holds a share, put together from the rank's image as memory still has it.

What several ranks hold alike is written once (`ckptd.storage.shares`): a file then holds some of its rank's
arrays, at other offsets than the image, and no cell of the image is a block of the file.  The arrays' bytes
are the same, though, and where they lie follows from the file's header; if that is lost, from the shares that
were reckoned, with which the file's layout is made anew.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from typing import Final, Protocol

from ckptd.errors import CkptdError, NotFound
from ckptd.image import ImagePlan, Variable, header
from ckptd.image.digest import CELL_BYTES
from ckptd.image.variable import Outgrown, read_tail
from ckptd.storage import place, shares
from ckptd.storage.describe import names_of_image
from ckptd.storage.parts import LocalTensor, Part
from ckptd.storage.store import Store
from ckptd.storage.writing import share_plan, variable_bytes

_NO_DIGEST: Final = bytes(16)


class Source(Protocol):
    """What memory still holds of the snapshot that a checkpoint was made from; it verifies what it gives."""

    def by_digest(self, digest: bytes, length: int) -> bytes | None:
        """Returns the first `length` bytes of the cell with this digest; None where nobody has it."""

    def image_size(self, rank: int) -> int:
        """Returns the length of a rank's image in bytes.

        Raises:
            NotFound: nobody knows it.
        """

    def image_bytes(self, rank: int, begin: int, end: int) -> bytes:
        """Returns the bytes begin .. end - 1 of a rank's image.

        Raises:
            NotFound: nobody has them all.
        """


class Remembered:
    """One rank's image in memory."""

    def __init__(self, source: Source, rank: int, plan: ImagePlan, head: Variable) -> None:
        self._source = source
        self._rank = rank
        self._plan = plan
        self.head = head

    @classmethod
    def find(cls, source: Source, rank: int) -> Remembered | None:
        """Returns a rank's image; None where memory lacks it, or what is needed to read it."""
        try:
            size = source.image_size(rank)
            first = source.image_bytes(rank, 0, min(size, CELL_BYTES))
            total = header.reserved_bytes(memoryview(first), size)
            plan = ImagePlan.parse(memoryview(source.image_bytes(rank, 0, total)), size)
            tail = source.image_bytes(rank, plan.variable_offset, size)
            return cls(source, rank, plan, read_tail(plan, memoryview(tail)))
        except CkptdError:
            return None

    def layout(self, store: Store) -> ImagePlan | None:
        """Returns how the file of this rank's share was laid out; None where nothing tells."""
        try:
            tensors = [self._unread(*named) for named in names_of_image(self._plan, self.array)]
            root = shares.roots(store)[self._rank]
            name = place.object_name(self._rank)
            offer = Part(self._rank, name, self._plan.image_bytes, root, tuple(tensors))
            given = shares.read(store, [offer])
        except (KeyError, CkptdError):
            return None
        names = None if given is None else given[self._rank].names
        if names is None:
            return None  # the image as it lies: its blocks are found by their digests
        kept = [tensor for tensor in tensors if tensor.name in names]
        return share_plan(self.head, kept, lambda array: self._plan.spec_of[array].shape)

    def array(self, name: str, low: int = 0, high: int | None = None) -> bytes:
        """Returns bytes low .. high - 1 of an array.

        Raises:
            NotFound: memory has not so many of it.
        """
        nbytes = self._plan.spec_of[name].nbytes if name in self._plan.spec_of else -1
        high = nbytes if high is None else high
        if high > nbytes or nbytes < 0:
            raise NotFound(f"{name} of rank {self._rank} is not in memory, or shorter")
        at = self._plan.offset_of[name]
        return self._source.image_bytes(self._rank, at + low, at + high)

    def _unread(self, name: str, array: str) -> LocalTensor:
        """A tensor whose boxes and digest nobody will ask for."""
        spec = self._plan.spec_of[array]
        return LocalTensor.whole(name, spec.dtype, spec.shape, array, _NO_DIGEST)


class RememberedFile:
    """A file of some of a rank's arrays, as it was written from the rank's image in memory.

    Raises:
        NotFound: what varies in the image is longer than in the file: this is not what it was written from.
    """

    def __init__(self, memory: Remembered, layout: ImagePlan) -> None:
        self._memory = memory
        self._layout = layout
        self._offsets = [layout.offset_of[spec.name] for spec in layout.tensors]
        try:
            tail = variable_bytes(layout, memory.head)
        except Outgrown as error:
            raise NotFound("the image in memory is another one", str(error)) from error
        self._ends = ((0, layout.header), (layout.variable_offset, tail))

    def block(self, begin: int, end: int) -> bytes | None:
        """Returns bytes begin .. end - 1 of the file; None where memory lacks some of them.

        The caller compares them with their digest.
        """
        data = bytearray(end - begin)  # what lies between arrays is zeros
        try:
            for at, piece in self._arrays(begin, end):
                data[at - begin : at - begin + len(piece)] = piece
        except NotFound:
            return None
        for at, piece in self._ends:
            low, high = max(begin, at), min(end, at + len(piece))
            if low < high:
                data[low - begin : high - begin] = piece[low - at : high - at]
        return bytes(data)

    def _arrays(self, begin: int, end: int) -> Iterator[tuple[int, bytes]]:
        """Yields the parts of arrays that lie there: (offset in the file, bytes)."""
        first = max(0, bisect_right(self._offsets, begin) - 1)
        for number in range(first, len(self._offsets)):
            at, spec = self._offsets[number], self._layout.tensors[number]
            low, high = max(begin, at), min(end, at + spec.nbytes)
            if at >= end:
                return
            if low < high:
                yield low, self._memory.array(spec.name, low - at, high - at)
