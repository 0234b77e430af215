"""What `ckptd.save` and `ckptd.load` are given, taken apart: named tensors, named values, optimizers,
objects.

Names are those of attached state: `model.layers.0.weight` for a module under the key `model`,
`optimizer.layers.0.weight.exp_avg` hangs its state on the parameter's own name; nested dicts and lists are
joined by dots.  A lone module's names have no prefix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, MutableSequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import Optimizer

from ckptd.client import optimizers as optim
from ckptd.client.attached import (
    RESERVED,
    Attached,
    GeneratorState,
    Stateful,
    reshard,
    tensors_of,
    with_extra_state,
)
from ckptd.client.tensors import is_tensor
from ckptd.errors import InvalidRequest

_LONE = "_"  # key of a module that was given alone


@dataclass
class Leaf:
    """A value that is no tensor, and where it is held."""

    container: Any
    key: Any

    @property
    def value(self) -> Any:
        return self.container[self.key]


@dataclass
class Universal:
    """The parts of a state."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    leaves: dict[str, Leaf] = field(default_factory=dict)
    attached: Attached = field(default_factory=Attached)
    groups: dict[str, list[list[optim.OwnedParameter]]] = field(default_factory=dict)
    extras: dict[str, torch.nn.Module] = field(default_factory=dict)  # modules with get_extra_state
    lone: bool = False  # a module alone

    def add(self, name: str, tensor: torch.Tensor) -> None:
        if name in self.tensors or name in self.leaves:
            raise InvalidRequest(f"two parts of this state are named {name}", next="rename one of them")
        self.tensors[name] = tensor


def take_apart(state: object) -> Universal:
    """Returns the parts of a module, or of a dict of tensors, modules, optimizers and values.

    Raises:
        InvalidRequest: it is something else, or two parts have one name.
        UnsupportedOptimizer: an optimizer whose state cannot be kept.
    """
    found = Universal()
    if isinstance(state, torch.nn.Module):
        found.attached, found.lone = Attached.sort({_LONE: state}), True
    elif isinstance(state, Mapping):
        _walk(found, "", state)
    else:
        raise InvalidRequest(
            f"a {type(state).__name__} is no state",
            "expected a module or a dict",
            'pass {"model": model, "optimizer": optimizer}: an optimizer needs its model for the names',
        )
    _name_modules(found)
    return found


def of_attached(attached: Attached) -> Universal:
    """Returns the parts of what is attached to a run, under the names that its images have."""
    found = Universal(attached=attached)
    _name_modules(found)
    return found


def _walk(found: Universal, prefix: str, state: Any) -> None:
    for key, value in _items(state):
        name = f"{prefix}{key}"
        if name == RESERVED:
            raise InvalidRequest(f"the name {name!r} is ckptd's own", next="choose another key")
        if is_tensor(value):
            found.add(name, value)
        elif isinstance(value, torch.nn.Module):
            found.attached.modules.update(Attached.sort({name: value}).modules)
        elif isinstance(value, Optimizer):
            optim.check_supported(name, value)
            found.attached.optimizers[name] = value
        elif isinstance(value, torch.Generator):
            found.attached.objects[name] = GeneratorState(value)
        elif isinstance(value, (Mapping, list, tuple)) and _holds_more(value):
            _walk(found, f"{name}.", value)
        elif isinstance(value, Stateful) and not isinstance(value, type):
            found.attached.objects[name] = value
        elif name in found.tensors or name in found.leaves:
            raise InvalidRequest(f"two parts of this state are named {name}", next="rename one of them")
        else:
            found.leaves[name] = Leaf(state, key)


def _items(state: Any) -> Iterator[tuple[Any, Any]]:
    return iter(state.items()) if isinstance(state, Mapping) else iter(enumerate(state))


def _holds_more(value: Any) -> bool:
    """Whether there is a tensor, a module or the like inside: what is all plain values is one value."""
    if is_tensor(value) or isinstance(value, (torch.nn.Module, Optimizer, torch.Generator)):
        return True
    if isinstance(value, (Mapping, list, tuple)):
        return any(_holds_more(item) for _, item in _items(value))
    return isinstance(value, Stateful) and not isinstance(value, type)


def _name_modules(found: Universal) -> None:
    reshard(found.attached)
    names: dict[int, str] = {}
    for held in tensors_of(found.attached):
        name = held.name.removeprefix(f"{_LONE}.") if found.lone else held.name
        found.add(name, held.tensor)
        if held.is_parameter:
            names.setdefault(id(held.tensor), name)
    for name, module in with_extra_state(found.attached):
        found.extras[name.removeprefix(_LONE).removeprefix(".") if found.lone else name] = module
    for name, optimizer in found.attached.optimizers.items():
        found.groups[name] = optim.parameters_of(name, optimizer, names)
        for owned in (parameter for group in found.groups[name] for parameter in group):
            if owned.loose:
                found.add(owned.name, owned.parameter)


def owned_by(found: Universal, optimizer: str) -> dict[str, optim.OwnedParameter]:
    """Returns an optimizer's parameters by name."""
    return {owned.name: owned for group in found.groups[optimizer] for owned in group}


def assign(leaf: Leaf, value: Any) -> None:
    """Puts a loaded value where the old one was.

    Raises:
        InvalidRequest: its container cannot be changed.
    """
    if not isinstance(leaf.container, (MutableMapping, MutableSequence)):
        raise InvalidRequest(f"a {type(leaf.container).__name__} cannot be loaded into", next="use a dict")
    leaf.container[leaf.key] = value
