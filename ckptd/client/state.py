"""What a rank's state is made of: named local tensors with their classes, and a tree of the rest.

*Quiescent* tensors (parameters, optimizer state) change only in their owner's step;
they are copied behind the next forward and backward.  *Volatile* ones (buffers,
tensors of other objects, whatever was caught moving) are copied at the cut.

A `Survey` is a full look at everything; `unchanged` says in about a millisecond
whether the last one still holds.  Tensors of objects (`tree_of`) are looked at anew
for every snapshot, since a state_dict may make new ones each time.
"""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch

from ckptd.client import optimizers as optim
from ckptd.client.attached import (
    RESERVED,
    Attached,
    distinct_modules,
    extra_path,
    reshard,
    tensors_of,
    with_extra_state,
)
from ckptd.client.device import ORDERED_DEVICES
from ckptd.client.random_state import capture_random
from ckptd.client.tensors import (
    Form,
    StorageKey,
    form_of,
    is_dtensor,
    is_tensor,
    local_of,
    plain,
    storage_key,
)
from ckptd.errors import InvalidRequest
from ckptd.image import TensorRef, encode

FORMAT = 1
_REGISTRIES_OF = operator.attrgetter("_modules", "_parameters", "_buffers")
_PASSING_OF = operator.attrgetter("_non_persistent_buffers_set")
_VALUES_OF = operator.methodcaller("values")
STATIC = f"{RESERVED}.static"  # the tensor that holds what changes only with the plan, as encoded objects


@dataclass(slots=True)
class Entry:
    """One stored tensor."""

    name: str
    tensor: torch.Tensor  # plain, local, detached; follows the live one's changes in place
    quiescent: bool
    owners: set[int] = field(default_factory=set)  # indices of the optimizers that step it


@dataclass(slots=True)
class Tree:
    """Everything that is not a module's or an optimizer's tensor, as of one moment."""

    encoded: bytes
    tensors: list[tuple[str, torch.Tensor]]  # volatile; named by their paths


class Survey:
    """One full look at the attached modules and optimizers.

    Raises (when made):
        UnsafeObject: a tensor has no safe form.
        InvalidRequest: two different tensors have one name.
    """

    def __init__(self, attached: Attached, *, tentative: bool = False) -> None:
        """Looks at everything.

        Args:
            tentative: only sizes are asked for; uninitialized tensors are passed over,
                meta tensors count.
        """
        self.attached = attached
        self._tentative = tentative
        self.entries: dict[str, Entry] = {}
        self.aliases: dict[str, str] = {}  # other names of stored tensors
        self.forms: dict[str, Form] = {}
        self.parameter_names: dict[int, str] = {}  # first name of each, by id
        self.module_names: list[str] = []  # every name inside modules, aliases included
        self.groups: dict[str, list[list[optim.OwnedParameter]]] = {}
        self._by_storage: dict[StorageKey, str] = {}
        reshard(attached)
        self._look_at_modules()
        for index, name in enumerate(attached.optimizers):
            self._look_at_optimizer(index, name)
        self._seen = None if tentative else _Seen(attached)
        self._has_values = any(
            optim.other_values(state) for o in attached.optimizers.values() for state in _dicts(o)
        )
        self._has_others = any(optim.other_state(o) for o in attached.optimizers.values())
        self._with_extra = with_extra_state(attached)
        # A tensor of its own, not a part of the tree: it is encoded once, and its bytes stay unchanged.
        static = torch.frombuffer(bytearray(encode(self._static())), dtype=torch.uint8)
        self.entries[STATIC] = Entry(STATIC, static, quiescent=False)

    def unchanged(self) -> bool:
        """Whether the same tensors are in the same places; does not look at their bytes."""
        assert self._seen is not None, "a tentative survey only tells sizes"
        if self._seen.holds(self.attached):
            return True
        # A forward pass outside of training leaves FSDP2's whole parameters in place.
        reshard(self.attached)
        return self._seen.holds(self.attached)

    def tree_of(self) -> Tree:
        """Returns objects, extra states, optimizer settings and random states as they are now.

        Raises:
            UnsafeObject: something has no safe form; the message names its path.
        """
        walk = _Extraction(self._by_storage)
        tree: dict[str, Any] = {RESERVED: {"format": FORMAT, "random": capture_random()}}
        for name, module in self._with_extra:
            tree[RESERVED].setdefault("extra", {})[name] = walk(extra_path(name), module.get_extra_state())
        for name, optimizer in self.attached.optimizers.items():
            tree[name] = {
                "groups": walk(f"{name}.groups", optim.settings_of(optimizer)),
                "state": walk(f"{name}.state", self._values_of(name, optimizer)),
                "other": walk(f"{name}.other", optim.other_state(optimizer)) if self._has_others else {},
            }
        for name, value in self.attached.objects.items():
            tree[name] = walk(name, value.state_dict())
        return Tree(encode(tree), walk.tensors)

    def _look_at_modules(self) -> None:
        for name, tensor, is_parameter in tensors_of(self.attached):
            self.module_names.append(name)
            if is_parameter:
                self.parameter_names.setdefault(id(tensor), name)
            self._add(name, tensor, quiescent=is_parameter)

    def _look_at_optimizer(self, index: int, name: str) -> None:
        optimizer = self.attached.optimizers[name]
        self.groups[name] = optim.parameters_of(name, optimizer, self.parameter_names)
        for owned in (parameter for group in self.groups[name] for parameter in group):
            if owned.loose:
                self._add(owned.name, owned.parameter, quiescent=True)
            entry = self.entries.get(self.aliases.get(owned.name, owned.name))
            if entry is not None:
                entry.owners.add(index)
            for key, value in optim.tensor_values(optim.state_of(optimizer, owned.parameter)).items():
                self._add(f"{name}.{owned.name}.{key}", value, quiescent=True, owner=index)

    def _add(self, name: str, tensor: torch.Tensor, *, quiescent: bool, owner: int | None = None) -> None:
        if self._tentative and torch.nn.parameter.is_lazy(tensor):
            return
        if name in self.entries or name in self.aliases:
            raise InvalidRequest(f"two tensors are named {name}", next="rename one of them, or its keyword")
        form = form_of(name, tensor)
        if form is not None:
            self.forms[name] = form
        local = plain(name, tensor, meta=self._tentative)
        quiescent = quiescent and local.device.type in ORDERED_DEVICES
        key = None if local.device.type == "meta" else storage_key(local)
        first = self._by_storage.get(key) if key is not None else None
        if first is None:
            entry = self.entries[name] = Entry(name, local, quiescent)
            if key is not None:
                self._by_storage[key] = name
        else:
            self.aliases[name] = first
            entry = self.entries[first]
            entry.quiescent = entry.quiescent and quiescent
        if owner is not None:
            entry.owners.add(owner)

    def _values_of(self, name: str, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
        """State values of parameters that are not tensors themselves."""
        if not self._has_values:
            return {}
        values: dict[str, dict[str, Any]] = {}
        for owned in (parameter for group in self.groups[name] for parameter in group):
            rest = optim.other_values(optim.state_of(optimizer, owned.parameter))
            if rest:
                values[owned.name] = rest
        return values

    def _static(self) -> dict[str, Any]:
        """What changes only with the survey: names, aliases, shards, optimizers."""
        return {
            "modules": self.module_names,
            "aliases": self.aliases,
            "forms": {name: tuple(form) for name, form in self.forms.items()},
            "objects": list(self.attached.objects),
            "optimizers": {
                name: {
                    "class": optim.class_name(optimizer),
                    "groups": [[owned.name for owned in group] for group in self.groups[name]],
                    "loose": [owned.name for group in self.groups[name] for owned in group if owned.loose],
                    "state": self._state_keys(name, optimizer),
                }
                for name, optimizer in self.attached.optimizers.items()
            },
        }

    def _state_keys(self, name: str, optimizer: torch.optim.Optimizer) -> dict[str, list[tuple[str, bool]]]:
        """Each parameter's state tensors: their keys, and whether they lie on the parameter's device."""
        keys = {}
        for owned in (parameter for group in self.groups[name] for parameter in group):
            state = optim.tensor_values(optim.state_of(optimizer, owned.parameter))
            keys[owned.name] = [(key, value.device == owned.parameter.device) for key, value in state.items()]
        return keys


class _Seen:
    """Identities of everything a survey saw, in an order that can be walked again at the speed of C."""

    def __init__(self, attached: Attached) -> None:
        self.modules = distinct_modules(attached)
        self.roots = list(attached.modules.values())
        self.registries = _registries(self.modules)
        self.held = _values(self.registries)  # children, parameters, buffers
        self.registry_sizes = list(map(len, self.registries))
        self.passing_sizes = _passing_sizes(self.modules)
        self.parameters = _group_parameters(attached)
        self.states = _state_dicts(attached)
        self.state_sizes = _state_sizes(attached, self.states)
        # Where state tensors and other values are: dicts, and keys in them.
        self.places: tuple[list[dict[Any, Any]], list[Any]] = ([], [])
        self.value_places: tuple[list[dict[Any, Any]], list[Any]] = ([], [])
        for state in self.states:
            for key, value in state.items():
                dicts, keys = self.places if is_tensor(value) else self.value_places
                dicts.append(state)
                keys.append(key)
        self.state_tensors: list[torch.Tensor] = list(map(operator.getitem, *self.places))
        every = [
            t
            for t in (*_module_tensors(self.modules), *self.parameters, *self.state_tensors)
            if t is not None
        ]
        distinct = list({id(tensor): tensor for tensor in every}.values())
        self.sharded = [tensor for tensor in distinct if is_dtensor(tensor)]
        self.shards = list(map(local_of, self.sharded))
        self.locals = list(map(local_of, distinct))
        self.pointers = list(map(torch.Tensor.data_ptr, self.locals))

    def holds(self, attached: Attached) -> bool:
        """Whether everything is where it was; well under a millisecond for 3,000 tensors."""
        # The same modules with the same children, from the roots down: so it is the same tree.
        if not _same(list(attached.modules.values()), self.roots):
            return False
        registries = _registries(self.modules)
        if not _same(registries, self.registries) or list(map(len, registries)) != self.registry_sizes:
            return False
        if not _same(_values(registries), self.held) or _passing_sizes(self.modules) != self.passing_sizes:
            return False
        if not _same(_group_parameters(attached), self.parameters):
            return False
        states = _state_dicts(attached)
        if not _same(states, self.states) or _state_sizes(attached, states) != self.state_sizes:
            return False
        try:
            kept = all(map(operator.is_, map(operator.getitem, *self.places), self.state_tensors))
            values = list(map(operator.getitem, *self.value_places))
        except KeyError:
            return False
        if not kept or any(map(is_tensor, values)):
            return False
        # Catches a DTensor's new local shard, and `parameter.data = other`.
        if not all(map(operator.is_, map(local_of, self.sharded), self.shards)):
            return False
        return list(map(torch.Tensor.data_ptr, self.locals)) == self.pointers


class _Extraction:
    """Replaces the tensors of a tree by references, and keeps them."""

    def __init__(self, known: Mapping[StorageKey, str]) -> None:
        self._known = known
        self._mine: dict[StorageKey, str] = {}
        self._names: set[str] = set()
        self.tensors: list[tuple[str, torch.Tensor]] = []

    def __call__(self, path: str, value: Any) -> Any:
        kind = type(value)
        if kind is dict or kind is OrderedDict:
            return kind((key, self(f"{path}.{key}", item)) for key, item in value.items())
        if kind is list or kind is tuple:
            return kind(self(f"{path}.{index}", item) for index, item in enumerate(value))
        return self._reference(path, value) if is_tensor(value) else value

    def _reference(self, path: str, tensor: torch.Tensor) -> TensorRef:
        local = plain(path, tensor)
        key = storage_key(local)
        known = None if key is None else self._known.get(key) or self._mine.get(key)
        if known is not None:
            return TensorRef(known)
        if path in self._names:
            raise InvalidRequest(
                f"two tensors are named {path}", next="give them different keys in the state_dict"
            )
        if form_of(path, tensor) is not None:
            raise InvalidRequest(
                f"{path} is a DTensor inside an object's state",
                next="attach the module or optimizer that owns it",
            )
        self._names.add(path)
        if key is not None:
            self._mine[key] = path
        self.tensors.append((path, local))
        return TensorRef(path)


def _same(left: list[Any], right: list[Any]) -> bool:
    return len(left) == len(right) and all(map(operator.is_, left, right))


def _registries(modules: list[torch.nn.Module]) -> list[dict[str, Any]]:
    """Returns where modules hold their children, parameters and buffers."""
    return list(chain.from_iterable(map(_REGISTRIES_OF, modules)))


def _values(registries: list[dict[str, Any]]) -> list[Any]:
    return list(chain.from_iterable(map(_VALUES_OF, registries)))


def _passing_sizes(modules: list[torch.nn.Module]) -> list[int]:
    """Returns how many buffers of each module are no state."""
    return list(map(len, map(_PASSING_OF, modules)))


def _module_tensors(modules: list[torch.nn.Module]) -> list[torch.Tensor | None]:
    tensors: list[torch.Tensor | None] = []
    for module in modules:
        if module._parameters:
            tensors.extend(module._parameters.values())
        if module._buffers:
            passing = module._non_persistent_buffers_set
            tensors.extend(
                module._buffers.values()
                if not passing
                else [buffer for key, buffer in module._buffers.items() if key not in passing]
            )
    return tensors


def _group_parameters(attached: Attached) -> list[torch.Tensor]:
    parameters: list[torch.Tensor] = []
    for optimizer in attached.optimizers.values():
        for group in optimizer.param_groups:
            parameters.extend(group["params"])
    return parameters


def _state_dicts(attached: Attached) -> list[dict[Any, Any]]:
    return [state for optimizer in attached.optimizers.values() for state in _dicts(optimizer)]


def _state_sizes(attached: Attached, states: list[dict[Any, Any]]) -> list[int]:
    return [*map(len, states), *(len(optimizer.state) for optimizer in attached.optimizers.values())]


def _dicts(optimizer: torch.optim.Optimizer) -> list[dict[Any, Any]]:
    return [value for value in optimizer.state.values() if type(value) is dict]
