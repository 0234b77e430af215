"""A StorageWriter of torch.distributed.checkpoint that writes the universal form.

Each rank writes its tensors as one file; what is no tensor travels to the coordinator as JSON, which writes
it as one more file, and then the manifest.
"""

from __future__ import annotations

import os
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future
from xxhash import xxh3_128_digest

from ckptd.client import targets
from ckptd.client.tensors import DTYPE_CODES, plain
from ckptd.errors import InvalidRequest, UnsafeObject
from ckptd.image import Variable
from ckptd.image.manifest import Manifest
from ckptd.integrations.dcp import objects
from ckptd.integrations.dcp.place_of import PlaceOf
from ckptd.integrations.lines import generation_for, parent_in
from ckptd.layout import boxes
from ckptd.storage import catalog, place, writing
from ckptd.storage.parts import LocalTensor, Part
from ckptd.storage.store import Store

if TYPE_CHECKING:
    from typing_extensions import Buffer

_JOB: Final = "save"  # of a checkpoint whose URL names none, as in `ckptd.save`


class Writer(PlaceOf, StorageWriter):
    """Writes a checkpoint at `url`; `dcp.save` returns when it is durable and visible, or raises.

    Args:
        url: `ckptd://JOB/step-N[.gG]`, or a path or fsspec URL of the checkpoint's own directory.  None: the
            `checkpoint_id` that `dcp.save` is given.
        job, step: of the checkpoint, where the URL does not say them ("save" and 0).
        generation: of the checkpoint, where the URL does not say it.  None: the newest of the job, or the
            next where that is at this step already (`ckptd.integrations.lines`).

    Attributes:
        manifest: of the last checkpoint, at the coordinator.

    Raises (what `dcp.save` reports):
        InvalidRequest: the URL is none; the planner has no `lookup_object`, or changes what it had planned.
        UnsafeObject: an object or a tensor has no safe form; the message names the item.
        AlreadyThere: a checkpoint is there.
        StateMismatch: the ranks' chunks do not make whole tensors.
        NoSpace, CkptdError: as the store says.
    """

    def __init__(
        self,
        url: str | os.PathLike[str] | None = None,
        *,
        job: str | None = None,
        step: int | None = None,
        generation: int | None = None,
    ) -> None:
        super().__init__(url)
        self.manifest: Manifest | None = None
        self._job, self._step, self._generation = job, step, generation
        self._rank = 0
        self._target: tuple[Store, writing.Heading] | None = None  # of the save that is going on

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A new save begins; at `checkpoint_id`, where one is given."""
        self.manifest = None
        self._move(checkpoint_id)

    # torch passes rank and use_collectives only to a parameter that is named `kwargs`.
    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """A save begins.

        Raises:
            InvalidRequest: ranks save without each other, so nobody could say when all is there.
        """
        self._target = None
        self._rank = kwargs.get("rank") or 0
        if not kwargs.get("use_collectives", True):
            raise InvalidRequest(
                "this writer needs collectives",
                "with use_collectives=False no rank knows when all of them have written",
                "call dcp.save without use_collectives=False",
            )

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Returns the plan, if the place is free."""
        self._target = self._find_target()
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Tells every rank how many there are."""
        return [replace(p, storage_data={"ranks": len(plans)}) if p.usable else p for p in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes this rank's file; its description and the objects travel with the first result."""
        items = _Items(plan, planner)
        told: dict[str, Any] = {"objects": items.objects()}
        if items.tensors:
            assert self._target is not None
            store, heading = self._target
            head = _head(heading, self._rank, plan.storage_data["ranks"], writing.empty_objects())
            part = writing.write_arrays(store, head, list(items.tensors.values()), items.shape_of, items.load)
            told["part"] = items.digested(part).write().decode("ascii")
        results = [WriteResult(item.index, items.nbytes(item), None) for item in plan.items]
        if results:
            results[0] = replace(results[0], storage_data=told)
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Writes the file of objects, and the manifest: now there is a checkpoint."""
        told = [result.storage_data for rank in results for result in rank if result.storage_data]
        kept = {name: text for one in told for name, text in one["objects"].items()}
        parts = [Part.read(one["part"].encode("ascii")) for one in told if "part" in one]
        found = metadata.state_dict_metadata
        tensors = [name for name, kind in found.items() if isinstance(kind, TensorStorageMetadata)]
        tree = objects.encode_tree(kept, tensors, metadata.planner_data)
        assert self._target is not None
        store, heading = self._target
        size = len(results)
        head = _head(heading, size, size + 1, tree)
        parts.append(writing.write_arrays(store, head, [], _no_array, _no_array))
        self.manifest = writing.publish(store, replace(heading, world_size=size), parts)

    def _find_target(self) -> tuple[Store, writing.Heading]:
        """Where this save goes: decided once, so that all its steps agree."""
        wanted, generation, parent = place.parse(self._url), self._generation, None
        if isinstance(wanted, place.Wanted) and wanted.step is not None:
            if self._step not in (None, wanted.step):
                raise InvalidRequest(
                    f"{self._url} is of step {wanted.step}, not {self._step}", next="pass one"
                )
            known = catalog.keyed_lines(wanted.store, wanted.job)
            generation = generation if wanted.generation is None else wanted.generation
            generation = generation_for(known, wanted.step) if generation is None else generation
            parent = parent_in(known, wanted.step, generation)
        store, job, step = writing.target(self._url, generation)
        step = step if step is not None else self._step or 0
        head = writing.Heading(job or self._job or _JOB, step, generation or 0, "consolidated", parent=parent)
        return store, head


class _Items:
    """What one rank has to write."""

    def __init__(self, plan: SavePlan, planner: SavePlanner) -> None:
        self._planner = planner
        self._bytes_of: list[WriteItem] = []
        self._item_of: dict[str, WriteItem] = {}  # by array
        self._digest_of: dict[str, bytes] = {}  # by array; known when it is written
        self.tensors: dict[str, LocalTensor] = {}  # by array
        names = {item.index.fqn for item in plan.items}
        for item in plan.items:
            if item.type == WriteItemType.BYTE_IO:
                self._bytes_of.append(item)
                continue
            array, number = item.index.fqn, 0
            while array in self._item_of or (number and array in names):  # several chunks of one tensor
                number += 1
                array = f"{item.index.fqn}#{number}"
            self._item_of[array] = item
            self.tensors[array] = _local(item, array)

    def objects(self) -> dict[str, str]:
        """Returns the items that are no tensors, as text.

        Raises:
            InvalidRequest: the planner gives them only as the bytes of torch.save, which are a pickle.
            UnsafeObject: one has no safe form.
        """
        look_up = getattr(self._planner, "lookup_object", None)
        if not self._bytes_of:
            return {}
        if look_up is None:
            raise InvalidRequest(
                f"the item {self._bytes_of[0].index.fqn} cannot be kept",
                f"{type(self._planner).__name__} has no lookup_object; its resolve_data gives a pickle",
                "use DefaultSavePlanner, or give the planner a lookup_object(index) that returns the object",
            )
        names = [item.index for item in self._bytes_of]
        return {index.fqn: objects.encode_object(index.fqn, look_up(index)) for index in names}

    def shape_of(self, array: str) -> tuple[int, ...]:
        return _chunk_shape(self._item_of[array])

    def load(self, array: str) -> Buffer:
        """Returns an array's bytes.

        Raises:
            InvalidRequest: the planner gives another tensor than it had planned.
            UnsafeObject: the tensor has no safe form.
        """
        item, tensor = self._item_of[array], self.tensors[array]
        data = self._planner.resolve_data(item)
        if not isinstance(data, torch.Tensor):
            raise InvalidRequest(f"the item {tensor.name} is a {type(data).__name__}", "a tensor was planned")
        local = plain(tensor.name, data)
        found = DTYPE_CODES[local.dtype], tuple(local.shape)
        if found != (tensor.dtype, _chunk_shape(item)):
            raise InvalidRequest(
                f"the planner changed {tensor.name} after it was planned",
                f"it is {found[0]} {list(found[1])}, planned were {tensor.dtype} {list(_chunk_shape(item))}",
                "let the planner say the new dtype in the plan (TensorProperties.dtype)",
            )
        written = targets.stored_bytes(local)
        self._digest_of[array] = xxh3_128_digest(written)
        return written

    def digested(self, part: Part) -> Part:
        """Returns the part with the digests of its arrays, which were not known before they were written."""
        return replace(part, tensors=tuple(replace(t, digest=self._digest_of[t.array]) for t in part.tensors))

    def nbytes(self, item: WriteItem) -> int:
        """Returns the bytes of a tensor's chunk; 0 for other items."""
        if item.tensor_data is None:
            return 0
        return prod(_chunk_shape(item)) * item.tensor_data.properties.dtype.itemsize


def _local(item: WriteItem, array: str) -> LocalTensor:
    """Returns where an item's chunk lies: alone in an array, row-major."""
    data = item.tensor_data
    assert data is not None
    name, dtype = item.index.fqn, data.properties.dtype
    if dtype not in DTYPE_CODES:
        raise UnsafeObject(f"{name} cannot be kept", f"safetensors has no code for {dtype}", "convert it")
    sizes, d = _chunk_shape(item), len(data.size)
    n = int(all(sizes))
    offsets = np.array([list(data.chunk.offsets)], np.int64).reshape(1, d)[:n]
    strides = np.array([boxes.row_major(sizes)], np.int64).reshape(1, d)[:n]
    extent = np.array([list(sizes)], np.int64).reshape(1, d)[:n]
    start = np.zeros(n, np.int64)
    shape = tuple(data.size)
    return LocalTensor(name, DTYPE_CODES[dtype], shape, array, offsets, extent, start, strides, bytes(16))


def _chunk_shape(item: WriteItem) -> tuple[int, ...]:
    assert item.tensor_data is not None
    return tuple(item.tensor_data.chunk.sizes)


def _head(heading: writing.Heading, number: int, of: int, encoded: bytes) -> Variable:
    return Variable(heading.job, heading.generation, heading.step, number, of, encoded)


def _no_array(array: str) -> Any:
    raise AssertionError(f"this file has no array {array}")
