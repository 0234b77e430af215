"""`ckptd.save`: a state as a checkpoint, by one process or by all ranks of a torch.distributed job."""

from __future__ import annotations

from typing import Any

import torch
from xxhash import xxh3_128_digest

from ckptd.client import optimizers as optim
from ckptd.client import targets
from ckptd.client.attached import RESERVED, extra_path, take
from ckptd.client.ranks import Ranks
from ckptd.client.state import FORMAT
from ckptd.client.tensors import local_of
from ckptd.client.universal_state import Universal, take_apart
from ckptd.errors import InvalidRequest
from ckptd.image import TensorRef, Variable, encode
from ckptd.image.manifest import Manifest, StoredLayout
from ckptd.storage import assemble, writing
from ckptd.storage.parts import LocalTensor, Part
from ckptd.storage.store import Store


def save(
    url: str,
    state: object,
    *,
    layout: StoredLayout | None = None,
    step: int | None = None,
    generation: int = 0,
    job: str | None = None,
    group: Any = None,
    compress: bool = False,
) -> Manifest:
    """Writes `state` as a checkpoint at `url`; durable and visible when this returns, or not there at all.

    Where torch.distributed has more than one rank, all ranks of `group` call this; each writes what it
    holds, and what several hold alike, to the byte, is written once.

    Args:
        state: as for `ckptd.load`.
        layout: the layout that names and tensors follow, to be kept with them.
        step, job: of the checkpoint, where the URL does not say them (0 and "save").
        compress: in seekable frames (`docs/format.md`); ranges of it are read as ever.

    Returns:
        The manifest, on every rank.

    Raises:
        UnsafeObject: something has no safe form; the message names it.
        StateMismatch: the ranks' tensors do not make whole ones.
        InvalidRequest, NoSpace, CkptdError: as they say.
        SaveFailed: another rank failed; the message has its error.
    """
    ranks = Ranks(group)
    found = take_apart(state)
    store, named_job, named_step = ranks.together(lambda: writing.target(str(url), generation))
    if step is not None and named_step not in (None, step):
        raise InvalidRequest(f"{url} is of step {named_step}, not {step}", next="pass one of them")
    heading = writing.Heading(
        job=named_job or job or "save",
        step=named_step if named_step is not None else step or 0,
        generation=generation,
        form="consolidated" if ranks.size == 1 else "distributed",
        world_size=ranks.size,
        layout=layout,
    )
    return _save(store, heading, found, ranks, compress)


def _save(store: Store, heading: writing.Heading, found: Universal, ranks: Ranks, compress: bool) -> Manifest:
    held, objects = ranks.together(lambda: _hold(found, ranks.rank))
    mine = {t.name: t for t, _ in held}
    table = Part(ranks.rank, "table", 0, bytes(16), tuple(mine.values())).write()
    everyone = [Part.read(data).tensors for data in ranks.gather(table)]
    chosen = assemble.writers(everyone)[ranks.rank]
    head = Variable(heading.job, heading.generation, heading.step, ranks.rank, ranks.size, objects)
    local = {t.name: tensor for t, tensor in held}

    def write() -> Part:
        return writing.write_arrays(
            store,
            head,
            [t for name, t in mine.items() if name in chosen],
            lambda name: tuple(local[name].shape),
            lambda name: targets.stored_bytes(local[name]),
            compress=compress,
        )

    parts = [Part.read(data) for data in ranks.gather(ranks.together(write).write())]
    published = ranks.together(
        lambda: writing.publish(store, heading, parts).write() if ranks.rank == 0 else b""
    )
    return Manifest.read(ranks.gather(published)[0])


def _hold(found: Universal, rank: int) -> tuple[list[tuple[LocalTensor, torch.Tensor]], bytes]:
    """What this rank has: its tensors as they would lie in a file, and the encoded rest."""
    tensors = dict(found.tensors)
    own: dict[str, Any] = {"format": FORMAT, "values": {n: leaf.value for n, leaf in found.leaves.items()}}
    if found.extras:
        own["extra"] = {
            name: _referenced(extra_path(name), take(extra_path(name), module.get_extra_state), tensors)
            for name, module in found.extras.items()
        }
    tree: dict[str, Any] = {RESERVED: own}
    for name, optimizer in found.attached.optimizers.items():
        values = {}
        for owned in (parameter for group in found.groups[name] for parameter in group):
            state = optim.state_of(optimizer, owned.parameter)
            for key, value in optim.tensor_values(state).items():
                tensors[f"{name}.{owned.name}.{key}"] = value
            rest = optim.other_values(state)
            if rest:
                values[owned.name] = rest
        groups = _referenced(f"{name}.groups", optim.settings_of(optimizer), tensors)
        other = _referenced(f"{name}.other", optim.other_state(optimizer), tensors)
        tree[name] = {"groups": groups, "state": values, "other": other}
    for name, target in found.attached.objects.items():
        tree[name] = _referenced(name, take(name, target.state_dict), tensors)
    held = [_local(name, tensor, rank) for name, tensor in tensors.items()]
    return held, encode(tree)


def _local(name: str, tensor: torch.Tensor, rank: int) -> tuple[LocalTensor, torch.Tensor]:
    """A tensor as it lies contiguous in a file: its boxes, and the digest of its bytes."""
    described = targets.describe(name, tensor, rank)
    local = local_of(tensor).detach()
    data = targets.stored_bytes(local)
    held = LocalTensor.of_tiles(name, described.dtype, described.tiles, name, xxh3_128_digest(data))
    return held.fingerprinted(data), local


def _referenced(path: str, value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The value with its tensors replaced by references, and added to `tensors` under their paths."""
    if isinstance(value, torch.Tensor):
        if path in tensors:
            raise InvalidRequest(f"two tensors are named {path}", next="give them different keys")
        tensors[path] = value
        return TensorRef(path)
    if type(value) in (list, tuple):
        return type(value)(_referenced(f"{path}.{i}", item, tensors) for i, item in enumerate(value))
    if isinstance(value, dict):
        made = value.copy()
        made.update((key, _referenced(f"{path}.{key}", item, tensors)) for key, item in value.items())
        return made
    return value
