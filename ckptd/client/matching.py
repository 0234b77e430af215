"""What of a checkpoint belongs to what of a state: names, shapes, dtypes.  Nothing is changed here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Final

import torch

from ckptd.client import optimizers as optim
from ckptd.client import targets
from ckptd.client.attached import RESERVED, extra_path
from ckptd.client.targets import Described
from ckptd.client.tensors import DTYPES, is_dtensor
from ckptd.client.universal_state import Universal, owned_by
from ckptd.errors import CorruptCheckpoint, StateMismatch
from ckptd.image import TensorRef
from ckptd.image.manifest import StoredTensor
from ckptd.storage.assemble import common_name
from ckptd.storage.reading import Checkpoint

Allowed = bool | Iterable[str]  # all, none, or those that match one of these patterns
States = dict[Any, dict[str, Any]]  # of one optimizer, by parameter
_NAMED_AT_MOST: Final = 5


@dataclass(frozen=True)
class Match:
    """What is to be loaded, and where to."""

    prefix: str  # of the state's names in the checkpoint
    tree: dict[Any, Any]  # the stored values that are no tensors
    tree_rank: int  # who kept them
    extras: Mapping[str, Any]  # extra states that are there, by the module's name in the state
    described: Mapping[str, Described]  # the tensors to fill, by stored name
    states: Mapping[str, States]  # what every optimizer is to be given, with tensors that it lacked made
    missing: tuple[str, ...]  # wanted, and not in the checkpoint
    unexpected: tuple[str, ...]  # in the checkpoint, and not wanted


def match(
    checkpoint: Checkpoint,
    found: Universal,
    rank: int,
    *,
    strict: bool,
    allow_missing: Allowed,
    allow_unexpected: Allowed,
    cast: bool,
) -> Match:
    """Finds what belongs to what, and refuses what does not fit.

    Raises:
        StateMismatch: names, shapes or dtypes differ, more than the arguments (`load`'s) allow.
        CorruptCheckpoint: what is stored is no state.
    """
    prefix, (tree_rank, tree) = _prefix(checkpoint, found), _tree(checkpoint, rank)
    wanted = {prefix + name: tensor for name, tensor in found.tensors.items()}
    states = {name: _states(checkpoint, found, name, wanted) for name in found.attached.optimizers}
    stored = checkpoint.manifest.by_name
    own = tree.get(RESERVED, {})
    values = own.get("values", {})
    kept = {extra_path(name): extra for name, extra in own.get("extra", {}).items()}
    extras = {name: extra_path(prefix.removesuffix("."), name) for name in found.extras}
    here = {*wanted, *(prefix + name for name in found.leaves), *extras.values()}
    there = {name for name in (*stored, *values, *kept) if name.startswith(prefix)}
    # What a tree refers to is nobody's tensor; an extra state may be a tensor alone, and has its name.
    referred = _of_objects(found, tree) - kept.keys()
    surplus = {name for name in there - here if common_name(name) not in referred}
    missing, unexpected = sorted(here - there), sorted(surplus)
    if strict:
        refused = [n for n in missing if not _allowed(n, allow_missing)]
        too_many = [n for n in unexpected if not _allowed(n, allow_unexpected)]
        if refused or too_many:
            raise _names_differ(checkpoint, refused, too_many)
    described = {}
    for name in sorted(here & stored.keys() & wanted.keys()):
        targets.check_materialized(name, wanted[name])
        described[name] = targets.describe(name, wanted[name], rank)
    _check_forms(described, stored, cast)
    given = {name: kept[path] for name, path in extras.items() if path in kept}
    return Match(prefix, tree, tree_rank, given, described, states, tuple(missing), tuple(unexpected))


def _states(checkpoint: Checkpoint, found: Universal, name: str, wanted: dict[str, torch.Tensor]) -> States:
    """Adds an optimizer's state to what is wanted; what it lacks is made, and given to it at the end."""
    owned = owned_by(found, name)
    optimizer = found.attached.optimizers[name]
    states: States = {}
    for parameter in owned.values():
        states[parameter.parameter] = dict(optim.state_of(optimizer, parameter.parameter))
        for key, value in optim.tensor_values(states[parameter.parameter]).items():
            wanted[f"{name}.{parameter.name}.{key}"] = value
    for stored in checkpoint.manifest.tensors:
        rest = stored.name.removeprefix(f"{name}.")
        parameter_name, _, key = rest.rpartition(".")
        if rest == stored.name or parameter_name not in owned:
            continue
        owner = owned[parameter_name].parameter
        live = wanted.get(stored.name)
        if live is None or tuple(live.shape) != stored.shape:
            wanted[stored.name] = states[owner][key] = _new_state(optimizer, owner, stored)
    return states


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


def _tree(checkpoint: Checkpoint, rank: int) -> tuple[int, dict[Any, Any]]:
    """The stored values, and who kept them: this rank's, or those of the first one where it had none.

    In the consolidated form one file holds those of all ranks; it is the first or the last.
    """
    ranks = [stored.rank for stored in checkpoint.manifest.objects]
    wanted = [rank] if rank in ranks else ranks[:1]
    wanted += [*ranks[:1], *ranks[-1:]] if checkpoint.manifest.form == "consolidated" else []
    trees = ((each, checkpoint.objects(each)) for each in dict.fromkeys(wanted))
    keeper, tree = next(((each, tree) for each, tree in trees if tree is not None), (rank, {}))
    own = tree.get(RESERVED, {}) if isinstance(tree, dict) else None
    parts = [own.get(part, {}) for part in ("values", "extra")] if isinstance(own, dict) else [own]
    if not isinstance(tree, dict) or not all(map(_is_named, parts)):
        raise CorruptCheckpoint(
            "the objects of this checkpoint are not a state", next="use another checkpoint"
        )
    return keeper, tree


def _is_named(part: object) -> bool:
    return isinstance(part, dict) and all(isinstance(name, str) for name in part)


def _of_objects(found: Universal, tree: Mapping[Any, Any]) -> set[str]:
    """Tensors that belong to objects which were given: they are found through the tree."""
    names: set[str] = set()

    def walk(part: Any) -> None:
        if isinstance(part, TensorRef):
            names.add(part.name)
        elif isinstance(part, (list, tuple)):
            for item in part:
                walk(item)
        elif isinstance(part, dict):
            for item in part.values():
                walk(item)

    for name in (*found.attached.objects, *found.attached.optimizers):
        walk(tree.get(name))
    walk(tree.get(RESERVED))  # extra states and random states are no tensors of anyone's
    return names


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
