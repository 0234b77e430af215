"""The daemon's memory for this rank, mapped into the trainer.

The mapping is shared and not inherited by forked children (MADV_DONTFORK); with CUDA
it is registered as pinned memory, so that the device copies straight into it.
"""

from __future__ import annotations

import mmap
import os

import torch

from ckptd.client.device import register_pinned, unregister_pinned
from ckptd.client.tensors import DTYPES
from ckptd.errors import CorruptImage
from ckptd.image import ImagePlan


class Arena:
    """Slots of one plan's images.

    Invariant: only the slot that was granted for the step being captured is written.
    """

    def __init__(self, fd: int, plan: ImagePlan, slots: int, slot_bytes: int) -> None:
        """Maps the arena; closes `fd`.

        Raises:
            CorruptImage: the descriptor's file is shorter than the daemon says.
        """
        try:
            stat = os.fstat(fd)
            self.inode = (stat.st_dev, stat.st_ino)
            size = slots * slot_bytes
            if stat.st_size < size or slot_bytes < plan.image_bytes:
                raise CorruptImage(
                    "this arena cannot hold the image",
                    f"{stat.st_size:,} bytes for {slots} slots of {slot_bytes:,}; "
                    f"the image takes {plan.image_bytes:,}",
                )
            # The daemon has taken the pages; without this the first snapshots would fault in each.
            self._map = mmap.mmap(fd, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        finally:
            os.close(fd)
        self._map.madvise(mmap.MADV_DONTFORK)
        self.plan = plan
        self.slots = slots
        self.slot_bytes = slot_bytes
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self._laid_out: set[int] = set()
        self._registered = False
        self._views: list[dict[str, torch.Tensor]] = [self._views_of(slot) for slot in range(slots)]

    def image(self, slot: int) -> memoryview:
        """Returns the image's bytes in a slot, with header and pads written at the first use."""
        begin = slot * self.slot_bytes
        image = memoryview(self._map)[begin : begin + self.plan.image_bytes]
        if slot not in self._laid_out:
            self.plan.lay_out(image)
            self._laid_out.add(slot)
        return image

    def view(self, slot: int, name: str) -> torch.Tensor:
        """Returns a tensor of a slot's image; writing to it writes the image."""
        return self._views[slot][name]

    def pin(self) -> None:
        """Registers the mapping with CUDA, once."""
        if self._registered:
            return
        self._registered = register_pinned(self._bytes)

    def release(self) -> None:
        """Unregisters the mapping; it is unmapped when nothing looks at it any more."""
        if self._registered:
            unregister_pinned(self._bytes)
            self._registered = False
        self._views.clear()

    def _views_of(self, slot: int) -> dict[str, torch.Tensor]:
        begin = slot * self.slot_bytes
        views = {}
        for spec in self.plan.tensors:
            start = begin + self.plan.offset_of[spec.name]
            views[spec.name] = tensor_at(self._bytes, start, spec.nbytes, spec.dtype, spec.shape)
        return views


def tensor_at(
    whole: torch.Tensor, start: int, nbytes: int, code: str, shape: tuple[int, ...]
) -> torch.Tensor:
    """Returns a view of a flat uint8 tensor as a tensor of the given safetensors dtype code and shape."""
    return whole[start : start + nbytes].view(DTYPES[code]).view(shape)
