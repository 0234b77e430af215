"""A StorageReader of torch.distributed.checkpoint for universal checkpoints, whoever wrote them."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from ckptd.client import targets
from ckptd.client.loading import as_tensor
from ckptd.client.tensors import DTYPES
from ckptd.errors import CorruptCheckpoint, InvalidRequest, StateMismatch
from ckptd.image import TensorRef
from ckptd.integrations.dcp import objects
from ckptd.integrations.dcp.place_of import PlaceOf
from ckptd.layout.tiles import Tiles
from ckptd.storage.reading import Checkpoint, open_checkpoint
from ckptd.storage.transfer import Job

_BATCH_BYTES: Final = 128 << 20  # of tensors that are filled through buffers, at a time
_BATCH_ITEMS: Final = 4096


class Reader(PlaceOf, StorageReader):
    """Reads the checkpoint at `url`: each block of it that is needed, verified before it reaches a tensor.

    Args:
        url: `ckptd://JOB/step-N[.gG]`, `ckptd://JOB/latest`, or a path or fsspec URL of the checkpoint's own
            directory.  None: the `checkpoint_id` that `dcp.load` is given.

    Raises (what `dcp.load` reports):
        NotFound: no checkpoint is there.
        CorruptCheckpoint: something is missing, truncated or damaged; no damaged byte reached a tensor.
        StateMismatch: a tensor of the plan is not in the checkpoint, or lies outside of it.
    """

    def __init__(self, url: str | os.PathLike[str] | None = None) -> None:
        super().__init__(url)
        self._checkpoint: Checkpoint | None = None
        self._items: dict[str, Any] = {}
        self._rank = 0

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A new load begins; from `checkpoint_id`, where one is given."""
        if self._checkpoint is not None:
            self._checkpoint.close()
        self._checkpoint, self._items = None, {}
        self._move(checkpoint_id)

    # torch passes the rank only to a parameter that is named `kwargs`.
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Returns DCP's view of the manifest; a tensor is one chunk, since any box of it can be read."""
        self.reset()
        checkpoint = self._checkpoint = open_checkpoint(self._url, wrap=as_tensor)
        self._items, record = objects.items_of(_tree(checkpoint))
        found: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {
            name: BytesStorageMetadata() for name in record.items
        }
        for stored in checkpoint.manifest.tensors:
            if stored.dtype not in DTYPES:
                raise CorruptCheckpoint(f"{stored.name} has the dtype {stored.dtype}", "torch has none such")
            size = torch.Size(stored.shape)
            whole = ChunkStorageMetadata(offsets=torch.Size([0] * len(size)), sizes=size)
            properties = TensorProperties(dtype=DTYPES[stored.dtype])
            found[stored.name] = TensorStorageMetadata(properties, size, [whole])
        paths = record.paths or {}
        return Metadata(
            state_dict_metadata=found,
            planner_data={name: paths.get(name, (name,)) for name in found},
            storage_data={},
            storage_meta=StorageMeta(checkpoint_id=self._url),
        )

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Takes the rank: of several equal sources, its own is read."""
        self._rank = kwargs.get("rank") or 0

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fills the plan's tensors, and hands its objects to the planner."""
        checkpoint = self._checkpoint
        if checkpoint is None:
            raise InvalidRequest("this reader has read no metadata", next="call read_metadata first")
        for batch in _batches(checkpoint, plan):
            job = Job(checkpoint)
            fills = [_Fill(checkpoint, item, planner, self._rank, n) for n, item in enumerate(batch)]
            for fill in fills:
                fill.want(job)
            job.run()
            for fill in fills:
                fill.finish(planner)
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                planner.load_bytes(item, self._bytes(checkpoint, item.storage_index.fqn))
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _bytes(self, checkpoint: Checkpoint, name: str) -> io.BytesIO:
        """What planners expect, torch.save's bytes: of an object that was decoded from JSON, made here."""
        if name not in self._items:
            raise StateMismatch(f"{name} is not in {checkpoint.store.url}", "the plan wants it as an object")
        made = io.BytesIO()
        torch.save(_resolved(checkpoint, self._items[name]), made)
        made.seek(0)
        return made


class _Fill:
    """One item of a plan: a box of a stored tensor, and the tensor that it fills."""

    def __init__(
        self, checkpoint: Checkpoint, item: ReadItem, planner: LoadPlanner, rank: int, number: int
    ) -> None:
        self._item = item
        self._name = item.storage_index.fqn
        self._label = f"{self._name}#{number}"
        stored = checkpoint.tensor(self._name)
        self._target = planner.resolve_tensor(item).detach()
        if self._target.shape != item.lengths:
            raise StateMismatch(
                f"the planner gave another tensor for {self._name}",
                f"it is of shape {list(self._target.shape)}, planned was {list(item.lengths)}",
            )
        self._box = _box(stored.shape, item, self._name)
        self._rank = rank
        dtype, live = DTYPES[stored.dtype], self._target
        self._buffer = live if _is_direct(live, dtype) else torch.empty(live.shape, dtype=dtype)

    def want(self, job: Job) -> None:
        """Adds the box to what a job reads."""
        if self._buffer.numel() == 0:
            return
        stride = self._buffer.stride()
        zero = np.zeros(1, np.int64)
        d = len(self._box.shape)
        tiles = Tiles(
            self._box.shape,
            np.array([list(self._box.offsets)], np.int64).reshape(1, d),
            np.array([list(self._box.sizes)], np.int64).reshape(1, d),
            np.array([self._rank], np.int64),
            zero,
            zero,
            np.array([list(stride)], np.int64).reshape(1, d),
            zero,
            ("",),
        )
        job.want(self._name, tiles, {"": targets.flat(self._buffer)}, label=self._label)

    def finish(self, planner: LoadPlanner) -> None:
        """Moves what was read to where it belongs, and tells the planner."""
        if self._buffer is not self._target:
            with torch.no_grad():
                self._target.copy_(self._buffer)
        planner.commit_tensor(self._item, self._target)


def _is_direct(live: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether stored elements can be written straight into a tensor's memory."""
    if live.device.type != "cpu" or live.dtype != dtype or live.is_conj() or live.is_neg():
        return False
    return all(step or size == 1 for size, step in zip(live.shape, live.stride(), strict=True))


@dataclass(frozen=True)
class _Box:
    shape: tuple[int, ...]  # of the logical tensor
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


def _box(shape: tuple[int, ...], item: ReadItem, name: str) -> _Box:
    """Returns which elements an item wants.

    Raises:
        StateMismatch: some of them do not exist.
    """
    begins = item.storage_index.offset or torch.Size([0] * len(shape))
    sizes = tuple(item.lengths)
    if not len(begins) == len(item.storage_offsets) == len(sizes) == len(shape):
        raise StateMismatch(f"{name} has {len(shape)} dims", f"the plan wants a box of {len(sizes)}")
    offsets = tuple(a + b for a, b in zip(begins, item.storage_offsets, strict=True))
    if any(o < 0 or o + n > size for o, n, size in zip(offsets, sizes, shape, strict=True)):
        raise StateMismatch(
            f"{name} is of shape {list(shape)}", f"the plan wants {list(sizes)} from {list(offsets)} on"
        )
    return _Box(shape, offsets, sizes)


def _batches(checkpoint: Checkpoint, plan: LoadPlan) -> Iterator[list[ReadItem]]:
    """The plan's tensors in groups: what a group may allocate is bounded."""
    batch: list[ReadItem] = []
    size = 0
    for item in plan.items:
        if item.type == LoadItemType.BYTE_IO:
            continue
        code = checkpoint.tensor(item.storage_index.fqn).dtype
        nbytes = item.lengths.numel() * DTYPES[code].itemsize
        if batch and (size + nbytes > _BATCH_BYTES or len(batch) == _BATCH_ITEMS):
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += nbytes
    if batch:
        yield batch


def _tree(checkpoint: Checkpoint) -> object:
    """The stored objects: of the first file that has some (`Writer` keeps them in its last)."""
    numbers = [stored.rank for stored in checkpoint.manifest.objects]
    for number in dict.fromkeys([*numbers[:1], *numbers[-1:]]):
        tree = checkpoint.objects(number)
        if tree is not None:
            return tree
    return None


def _resolved(checkpoint: Checkpoint, value: Any) -> Any:
    """The value with its tensors read."""
    if isinstance(value, TensorRef):
        return checkpoint[value.name][...]
    if type(value) in (list, tuple):
        return type(value)(_resolved(checkpoint, item) for item in value)
    if isinstance(value, dict):
        made = value.copy()
        made.update((key, _resolved(checkpoint, item)) for key, item in value.items())
        return made
    return value


__all__ = ["Reader"]
