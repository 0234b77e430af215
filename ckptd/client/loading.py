"""`ckptd.open` and `ckptd.load`: a stored checkpoint into tensors, however they are laid out now."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

from ckptd.client import optimizers as optim
from ckptd.client import settings, targets
from ckptd.client.attached import RESERVED, extra_path, give_back
from ckptd.client.matching import Allowed, Match, States, match
from ckptd.client.tensors import DTYPES
from ckptd.client.universal_state import Universal, assign, owned_by, take_apart
from ckptd.errors import StateMismatch
from ckptd.image import TensorRef
from ckptd.storage.assemble import own_name
from ckptd.storage.marks import leased
from ckptd.storage.reading import Checkpoint, open_checkpoint
from ckptd.storage.transfer import Job, Transferred

_BUFFERED_BYTES: Final = 128 << 20  # of tensors that are filled through buffers, at a time


@dataclass(frozen=True)
class LoadReport:
    """What was loaded, and what was not."""

    job: str
    step: int
    generation: int
    tensors: int
    needed_bytes: int
    read_bytes: int
    missing: tuple[str, ...]  # wanted, and not in the checkpoint
    unexpected: tuple[str, ...]  # in the checkpoint, and not wanted
    differs: tuple[str, ...]  # ranks had kept different values of these; one rank's were loaded
    cast: tuple[str, ...]  # loaded from another dtype

    @property
    def amplification(self) -> float:
        """Bytes read per byte needed."""
        return self.read_bytes / self.needed_bytes if self.needed_bytes else 1.0


def open(url: str) -> Checkpoint:
    """Returns the checkpoint at `url`: `ckpt[name][slices]` reads what it needs, and gives a tensor.

    Raises:
        NotFound: no checkpoint is there.
        CorruptCheckpoint: its manifest cannot be used.
    """
    return open_checkpoint(str(url), wrap=as_tensor)


def as_tensor(array: np.ndarray[Any, Any], code: str) -> torch.Tensor:
    """Returns a tensor of safetensors dtype `code` on the memory of an array that was read."""
    values = np.ascontiguousarray(array).reshape(array.shape)
    if values.dtype == np.bool_:
        return torch.from_numpy(values)
    return torch.from_numpy(values).view(DTYPES[code])


def load(
    url: str,
    into: object,
    *,
    strict: bool = True,
    allow_missing: Allowed = False,
    allow_unexpected: Allowed = False,
    cast: bool = False,
) -> LoadReport:
    """Fills `into` from the checkpoint at `url`, whatever the layouts of both.

    Args:
        into: a module; or a dict of tensors, DTensors, modules, optimizers, objects with a state_dict, plain
            values, and dicts of these.  Tensors are filled in place; an optimizer's missing state is made.
        strict: names on both sides must be the same, but for those that are allowed.
        allow_missing: names that the checkpoint may lack; they stay as they are.
        allow_unexpected: names of the checkpoint that need no place.
        cast: whether a tensor may be loaded into another dtype, by torch's rules.

    Returns:
        What was read, and what differed.

    Raises:
        StateMismatch: names, shapes or dtypes differ; nothing was changed.
        CorruptCheckpoint: something is missing, truncated or malformed: nothing was changed; or a block
            is damaged:
            no byte of it reached a tensor, but others may be filled: load again, from another checkpoint.
        NotFound, InvalidRequest, UnsafeObject: as they say; nothing was changed.
    """
    with open(url) as checkpoint, leased(checkpoint.store):
        found = take_apart(into)
        matched = match(
            checkpoint,
            found,
            settings.Place.find(settings.Environment.read(), None, None, None).rank,
            strict=strict,
            allow_missing=allow_missing,
            allow_unexpected=allow_unexpected,
            cast=cast,
        )
        return Loading(checkpoint, found, matched).run()


class Loading:
    """One load of what was matched; the only place where things are changed."""

    def __init__(self, checkpoint: Checkpoint, found: Universal, matched: Match) -> None:
        self._checkpoint = checkpoint
        self._found = found
        self._matched = matched

    def run(self) -> LoadReport:
        """Reads, and changes what was given."""
        direct, buffered = self._jobs()
        values = self._values()
        extras = {name: self._resolved(extra) for name, extra in self._matched.extras.items()}
        reports = [direct.check(), *(make()[0].check() for make in buffered)]
        done = [direct.run()]
        for make in buffered:
            job, finish = make()
            done.append(job.run())
            finish()
        self._finish(values, extras)
        assert [r.read_bytes for r in reports] == [r.read_bytes for r in done]
        return self._report(done)

    def _jobs(self) -> tuple[Job, list[Callable[[], tuple[Job, Callable[[], None]]]]]:
        """What is read in place, and batches of what goes through buffers, made when their turn comes."""
        direct = Job(self._checkpoint)
        waiting: list[tuple[str, Any]] = []
        for name, described in self._matched.described.items():
            code = self._checkpoint.tensor(name).dtype
            if not len(described.tiles):
                continue
            if targets.in_place(described, code):
                direct.want(name, targets.memory_tiles(described), {"": targets.flat(described.local)})
            else:
                waiting.extend((name, slab) for slab in targets.slabs(described, code))
        batches: list[list[tuple[str, Any]]] = [[]]
        size = 0
        for name, slab in waiting:
            nbytes = slab[1].numel() * slab[1].element_size()
            if size and size + nbytes > _BUFFERED_BYTES:
                batches.append([])
                size = 0
            batches[-1].append((name, slab))
            size += nbytes
        return direct, [self._batch(batch) for batch in batches if batch]

    def _batch(self, batch: list[tuple[str, Any]]) -> Callable[[], tuple[Job, Callable[[], None]]]:
        def make() -> tuple[Job, Callable[[], None]]:
            job = Job(self._checkpoint)
            buffers = [torch.empty_like(slab[1], device="cpu") for _, slab in batch]
            for number, ((name, slab), buffer) in enumerate(zip(batch, buffers, strict=True)):
                # Slabs of one tensor are asked for under one name each.
                job.want(name, slab[0], {"": targets.flat(buffer)}, label=f"{name}#{number}")

            def finish() -> None:
                with torch.no_grad():
                    for (_, slab), buffer in zip(batch, buffers, strict=True):
                        targets.write(slab[2], buffer)

            return job, finish

        return make

    def _values(self) -> dict[str, Any]:
        """The stored values that are no tensors, read and checked."""
        values = {}
        for name, optimizer in self._found.attached.optimizers.items():
            kept = self._matched.tree.get(name)
            if not isinstance(kept, dict) or "groups" not in kept:
                continue
            groups = kept["groups"]
            if len(groups) != len(optimizer.param_groups):
                raise StateMismatch(
                    f"{name} had {len(groups)} parameter groups, and has {len(optimizer.param_groups)} now",
                    next="make the same groups",
                )
            values[name] = {key: self._resolved(kept.get(key)) for key in ("groups", "state", "other")}
        for name in self._found.attached.objects:
            if name in self._matched.tree:
                values[name] = self._resolved(self._matched.tree[name])
        return values

    def _resolved(self, tree: Any) -> Any:
        """The tree with its tensors read, as who kept the tree kept them."""
        if isinstance(tree, TensorRef):
            rank = self._matched.tree_rank
            own = own_name(tree.name, rank)
            return self._checkpoint[own if own in self._checkpoint else tree.name].read(..., rank)
        if type(tree) in (list, tuple):
            return type(tree)(self._resolved(item) for item in tree)
        if isinstance(tree, dict):
            made = tree.copy()
            made.update((key, self._resolved(value)) for key, value in tree.items())
            return made
        return tree

    def _finish(self, values: dict[str, Any], extras: dict[str, Any]) -> None:
        for name, optimizer in self._found.attached.optimizers.items():
            own = values.get(name, {})
            states: States = {key: state for key, state in self._matched.states[name].items() if state}
            owned = owned_by(self._found, name)
            for parameter, rest in (own.get("state") or {}).items():
                if parameter in owned:
                    states.setdefault(owned[parameter].parameter, {}).update(rest)
            states.update(own.get("other") or {})
            optim.reset_state(optimizer, states)
            if own:
                with torch.no_grad():
                    optim.restore_settings(optimizer, own["groups"])
        stored, prefix = self._matched.tree.get(RESERVED, {}).get("values", {}), self._matched.prefix
        for name, leaf in self._found.leaves.items():
            if prefix + name in stored:
                assign(leaf, self._resolved(stored[prefix + name]))
        for name, extra in extras.items():
            give_back(extra_path(name), self._found.extras[name].set_extra_state, extra)
        for name, target in self._found.attached.objects.items():
            if name in values:
                give_back(name, target.load_state_dict, values[name])

    def _report(self, done: list[Transferred]) -> LoadReport:
        manifest, matched = self._checkpoint.manifest, self._matched
        stored = manifest.by_name
        return LoadReport(
            manifest.job,
            manifest.step,
            manifest.generation,
            len(matched.described),
            sum(r.needed_bytes for r in done),
            sum(r.read_bytes for r in done),
            matched.missing,
            matched.unexpected,
            tuple(name for name in matched.described if stored[name].differs),
            tuple(name for name, d in matched.described.items() if d.dtype != stored[name].dtype),
        )


__all__ = ["LoadReport", "as_tensor", "load", "open"]
