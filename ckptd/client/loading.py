"""`ckptd.open` and `ckptd.load`: a stored checkpoint into tensors, however they are laid out now."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Final

import numpy as np
import torch

from ckptd.client import optimizers as optim
from ckptd.client import settings, targets
from ckptd.client.attached import RESERVED
from ckptd.client.targets import Described
from ckptd.client.tensors import DTYPES, is_dtensor
from ckptd.client.universal_state import Universal, assign, owned_by, take_apart
from ckptd.errors import CorruptCheckpoint, InvalidRequest, StateMismatch
from ckptd.image import TensorRef
from ckptd.image.manifest import StoredTensor
from ckptd.storage.marks import leased
from ckptd.storage.reading import Checkpoint, open_checkpoint
from ckptd.storage.transfer import Job, Transferred

Allowed = bool | Iterable[str]  # all, none, or those that match one of these patterns
_NAMED_AT_MOST: Final = 5
_BUFFERED_BYTES: Final = 128 << 20  # of tensors that are filled through buffers, at a time
_FOREIGN = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


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
        loading = Loading(
            checkpoint, found, rank=settings.Place.find(settings.Environment.read(), None, None, None).rank
        )
        loading.match(strict, allow_missing, allow_unexpected, cast)
        return loading.run()


class Loading:
    """One load: everything is checked by `match`, then `run` changes things."""

    def __init__(self, checkpoint: Checkpoint, found: Universal, rank: int) -> None:
        self.checkpoint = checkpoint
        self.found = found
        self.rank = rank
        self.prefix = _prefix(checkpoint, found)
        self.tree = _tree(checkpoint, rank)
        self.described: dict[str, Described] = {}  # by stored name
        self.states: dict[str, dict[Any, dict[str, Any]]] = {}  # of optimizers, by parameter
        self.missing: list[str] = []
        self.unexpected: list[str] = []

    def match(self, strict: bool, allow_missing: Allowed, allow_unexpected: Allowed, cast: bool) -> None:
        """Finds what belongs to what, and refuses what does not fit."""
        wanted = {self.prefix + name: tensor for name, tensor in self.found.tensors.items()}
        for name in self.found.attached.optimizers:
            self._optimizer(name, wanted)
        stored = self.checkpoint.manifest.by_name
        values = self.tree.get(RESERVED, {}).get("values", {})
        here = {*wanted, *(self.prefix + name for name in self.found.leaves)}
        there = {name for name in (*stored, *values) if name.startswith(self.prefix)}
        self.missing, self.unexpected = sorted(here - there), sorted(there - here - _of_objects(self))
        if strict:
            refused = [n for n in self.missing if not _allowed(n, allow_missing)]
            surplus = [n for n in self.unexpected if not _allowed(n, allow_unexpected)]
            if refused or surplus:
                raise _names_differ(self.checkpoint, refused, surplus)
        for name in sorted(here & stored.keys() & wanted.keys()):
            targets.check_materialized(name, wanted[name])
            self.described[name] = targets.describe(name, wanted[name], self.rank)
        _check_forms(self.described, stored, cast)

    def run(self) -> LoadReport:
        """Reads, and changes what was given."""
        direct, buffered = self._jobs()
        values = self._values()
        reports = [direct.check(), *(job.check() for job, _ in map(_first, buffered))]
        done = [direct.run()]
        for make in buffered:
            job, finish = make()
            done.append(job.run())
            finish()
        self._finish(values)
        assert [r.read_bytes for r in reports] == [r.read_bytes for r in done]
        return self._report(done)

    def _jobs(self) -> tuple[Job, list[Callable[[], tuple[Job, Callable[[], None]]]]]:
        """What is read in place, and batches of what goes through buffers, made when their turn comes."""
        direct = Job(self.checkpoint)
        waiting: list[tuple[str, Any]] = []
        for name, described in self.described.items():
            code = self.checkpoint.tensor(name).dtype
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
            job = Job(self.checkpoint)
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

    def _optimizer(self, name: str, wanted: dict[str, torch.Tensor]) -> None:
        """Adds an optimizer's state to what is wanted; what it lacks is made, and given to it at the end."""
        owned = owned_by(self.found, name)
        optimizer = self.found.attached.optimizers[name]
        states: dict[Any, dict[str, Any]] = {}
        for parameter in owned.values():
            states[parameter.parameter] = dict(optim.state_of(optimizer, parameter.parameter))
            for key, value in optim.tensor_values(states[parameter.parameter]).items():
                wanted[f"{name}.{parameter.name}.{key}"] = value
        for stored in self.checkpoint.manifest.tensors:
            rest = stored.name.removeprefix(f"{name}.")
            parameter_name, _, key = rest.rpartition(".")
            if rest == stored.name or parameter_name not in owned:
                continue
            owner = owned[parameter_name].parameter
            live = wanted.get(stored.name)
            if live is None or tuple(live.shape) != stored.shape:
                wanted[stored.name] = states[owner][key] = _new_state(optimizer, owner, stored)
        self.states[name] = states

    def _values(self) -> dict[str, Any]:
        """The stored values that are no tensors, read and checked."""
        values = {}
        for name, optimizer in self.found.attached.optimizers.items():
            kept = self.tree.get(name)
            if not isinstance(kept, dict) or "groups" not in kept:
                continue
            groups = kept["groups"]
            if len(groups) != len(optimizer.param_groups):
                raise StateMismatch(
                    f"{name} had {len(groups)} parameter groups, and has {len(optimizer.param_groups)} now",
                    next="make the same groups",
                )
            values[name] = {key: self.resolved(kept.get(key)) for key in ("groups", "state", "other")}
        for name in self.found.attached.objects:
            if name in self.tree:
                values[name] = self.resolved(self.tree[name])
        return values

    def resolved(self, tree: Any) -> Any:
        """The tree with its tensors read."""
        if isinstance(tree, TensorRef):
            return self.checkpoint[tree.name][...]
        if type(tree) in (list, tuple):
            return type(tree)(self.resolved(item) for item in tree)
        if isinstance(tree, dict):
            made = tree.copy()
            made.update((key, self.resolved(value)) for key, value in tree.items())
            return made
        return tree

    def _finish(self, values: dict[str, Any]) -> None:
        for name, optimizer in self.found.attached.optimizers.items():
            own = values.get(name, {})
            states: dict[Any, dict[str, Any]] = {
                key: state for key, state in self.states[name].items() if state
            }
            owned = owned_by(self.found, name)
            for parameter, rest in (own.get("state") or {}).items():
                if parameter in owned:
                    states.setdefault(owned[parameter].parameter, {}).update(rest)
            states.update(own.get("other") or {})
            optim.reset_state(optimizer, states)
            if own:
                with torch.no_grad():
                    optim.restore_settings(optimizer, own["groups"])
        stored = self.tree.get(RESERVED, {}).get("values", {})
        for name, leaf in self.found.leaves.items():
            if self.prefix + name in stored:
                assign(leaf, self.resolved(stored[self.prefix + name]))
        for name, target in self.found.attached.objects.items():
            if name in values:
                give(name, target, values[name])

    def _report(self, done: list[Transferred]) -> LoadReport:
        manifest = self.checkpoint.manifest
        stored = manifest.by_name
        return LoadReport(
            manifest.job,
            manifest.step,
            manifest.generation,
            len(self.described),
            sum(r.needed_bytes for r in done),
            sum(r.read_bytes for r in done),
            tuple(self.missing),
            tuple(self.unexpected),
            tuple(name for name in self.described if stored[name].differs),
            tuple(name for name, d in self.described.items() if d.dtype != stored[name].dtype),
        )


def _first(make: Callable[[], tuple[Job, Callable[[], None]]]) -> tuple[Job, Callable[[], None]]:
    return make()


def _new_state(
    optimizer: torch.optim.Optimizer, parameter: torch.Tensor, stored: StoredTensor
) -> torch.Tensor:
    """Returns a tensor for a state that the optimizer does not have yet, without stepping it.

    What has the parameter's shape is laid out as the parameter is; a scalar lies where the optimizer
    would put it.

    Raises:
        StateMismatch: the parameter is distributed, and nothing says how this state would be.
    """
    dtype = DTYPES[stored.dtype]
    if tuple(parameter.shape) == stored.shape:
        return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
    if stored.shape and is_dtensor(parameter):
        raise StateMismatch(
            f"{stored.name} cannot be placed",
            f"it is of shape {list(stored.shape)}, its distributed parameter of {list(parameter.shape)}",
            "take one optimizer step before loading, so that the state exists",
        )
    on_device = any(
        any(parameter is p for p in group["params"]) and (group.get("capturable") or group.get("fused"))
        for group in optimizer.param_groups
    )
    device = parameter.device if stored.shape or on_device else torch.device("cpu")
    return torch.zeros(stored.shape, dtype=dtype, device=device)


def _prefix(checkpoint: Checkpoint, found: Universal) -> str:
    """Under which name a lone module is stored: as it is, or as the only one that has all of its names."""
    if not found.lone or any(name in checkpoint for name in found.tensors):
        return ""
    heads = {name.partition(".")[0] for name in checkpoint}
    fitting = [h for h in sorted(heads) if all(f"{h}.{name}" in checkpoint for name in found.tensors)]
    return f"{fitting[0]}." if len(fitting) == 1 and found.tensors else ""


def _tree(checkpoint: Checkpoint, rank: int) -> dict[Any, Any]:
    """The stored values: this rank's, or those of the first one where it had none.

    In the consolidated form one file holds those of all ranks; it is the first or the last.
    """
    ranks = [stored.rank for stored in checkpoint.manifest.objects]
    wanted = [rank] if rank in ranks else ranks[:1]
    wanted += [*ranks[:1], *ranks[-1:]] if checkpoint.manifest.form == "consolidated" else []
    tree = next((t for t in map(checkpoint.objects, dict.fromkeys(wanted)) if t is not None), None)
    if tree is None:
        return {}
    own = tree.get(RESERVED, {}) if isinstance(tree, dict) else None
    if not isinstance(tree, dict) or not isinstance(own, dict) or not isinstance(own.get("values", {}), dict):
        raise CorruptCheckpoint(
            "the objects of this checkpoint are not a state", next="use another checkpoint"
        )
    return tree


def _of_objects(loading: Loading) -> set[str]:
    """Tensors that belong to objects which were given: they are found through the tree."""
    found: set[str] = set()

    def walk(tree: Any) -> None:
        if isinstance(tree, TensorRef):
            found.add(tree.name)
        elif isinstance(tree, (list, tuple)):
            for item in tree:
                walk(item)
        elif isinstance(tree, dict):
            for item in tree.values():
                walk(item)

    attached = loading.found.attached
    for name in (*attached.objects, *attached.optimizers):
        walk(loading.tree.get(name))
    walk(loading.tree.get(RESERVED))  # extra states and random states are no tensors of anyone's
    return found


def _allowed(name: str, allowed: Allowed) -> bool:
    if isinstance(allowed, bool):
        return allowed
    patterns = [allowed] if isinstance(allowed, str) else allowed
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _check_forms(described: Mapping[str, Described], stored: Mapping[str, StoredTensor], cast: bool) -> None:
    wrong = []
    for name, mine in described.items():
        theirs = stored[name]
        if theirs.dtype not in DTYPES:
            raise CorruptCheckpoint(f"{name} has the dtype {theirs.dtype}", "torch has none such")
        if mine.shape != theirs.shape or (mine.dtype != theirs.dtype and not cast):
            there, here = f"{theirs.dtype} {list(theirs.shape)}", f"{mine.dtype} {list(mine.shape)}"
            wrong.append(f"{name} is stored as {there}, and is {here} here")
    if wrong:
        raise StateMismatch(
            f"{len(wrong)} tensors do not fit",
            _listed(wrong, "; "),
            "load into the model that was saved; pass cast=True where only dtypes differ",
        )


def _names_differ(checkpoint: Checkpoint, missing: list[str], unexpected: list[str]) -> StateMismatch:
    sides = [("not in the checkpoint", missing), ("only in the checkpoint", unexpected)]
    return StateMismatch(
        f"the names do not match those in {checkpoint.store.url}",
        "; ".join(f"{len(names)} {side}: {_listed(names, ', ')}" for side, names in sides if names),
        "allow them by allow_missing= or allow_unexpected= (True, or patterns), or pass strict=False",
    )


def _listed(names: list[str], separator: str) -> str:
    more = f" and {len(names) - _NAMED_AT_MOST} more" if len(names) > _NAMED_AT_MOST else ""
    return separator.join(names[:_NAMED_AT_MOST]) + more


def give(name: str, target: Any, state: Any) -> None:
    try:
        target.load_state_dict(state)
    except _FOREIGN as error:
        raise StateMismatch(
            f"{name} does not take its state back",
            f"{type(error).__name__}: {error}",
            "load into the kind of object that was saved",
        ) from error


__all__ = ["InvalidRequest", "LoadReport", "as_tensor", "load", "open"]
