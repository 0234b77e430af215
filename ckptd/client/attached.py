"""What the user attached, sorted by kind, and the names of what is inside modules.

Names are the user's keyword, then the module's own fully qualified name without the
prefixes that wrappers add: `model.layers.0.weight`, whether or not `model` is inside
DDP, `torch.compile` or activation checkpointing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import nn
from torch.optim import Optimizer

from ckptd.errors import InvalidRequest, StateMismatch, UnsafeObject

RESERVED = "ckptd"  # our own part of the objects' tree
_WRAPPED = frozenset({"_orig_mod", "_checkpoint_wrapped_module"})
# What a load_state_dict of somebody else's may raise when the state does not suit it.
_FOREIGN = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


@runtime_checkable
class Stateful(Protocol):
    """Anything whose state can be taken and put back."""

    def state_dict(self) -> Any: ...
    def load_state_dict(self, state: Any, /) -> Any: ...


class GeneratorState:
    """A torch.Generator as something with a state_dict."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def state_dict(self) -> dict[str, Any]:
        return {"state": self._generator.get_state().numpy()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._generator.set_state(torch.from_numpy(state["state"].copy()))


@dataclass(slots=True)
class Attached:
    """The attached objects by name; a list's or dict's items are named `key.item`."""

    modules: dict[str, nn.Module] = field(default_factory=dict)
    optimizers: dict[str, Optimizer] = field(default_factory=dict)
    objects: dict[str, Stateful] = field(default_factory=dict)

    @classmethod
    def sort(cls, given: Mapping[str, object]) -> Attached:
        """Returns `given` sorted by kind; None values are left out.

        Raises:
            InvalidRequest: something has no state_dict and load_state_dict; the
                message names it.
        """
        attached = cls()
        for name, value in given.items():
            if name == RESERVED:
                raise InvalidRequest(f"the name {name!r} is ckptd's own", next="choose another keyword")
            if isinstance(value, (list, tuple)):
                for index, item in enumerate(value):
                    attached._add(f"{name}.{index}", item)
            elif type(value) is dict:
                for key, item in value.items():
                    attached._add(f"{name}.{key}", item)
            elif value is not None:
                attached._add(name, value)
        if not (attached.modules or attached.optimizers or attached.objects):
            raise InvalidRequest("nothing was attached", next="pass model=..., optimizer=...")
        return attached

    def _add(self, name: str, value: object) -> None:
        if isinstance(value, nn.Module):
            _refuse_fsdp1(name, value)
            self.modules[name] = value
        elif isinstance(value, Optimizer):
            self.optimizers[name] = value
        elif isinstance(value, torch.Generator):
            self.objects[name] = GeneratorState(value)
        elif isinstance(value, (Stateful, GeneratorState)) and not isinstance(value, type):
            self.objects[name] = value
        else:
            raise InvalidRequest(
                f"{name} cannot be attached",
                f"{type(value).__name__} has no state_dict() and load_state_dict()",
                "pass modules, optimizers and objects that have both; wrap anything else in a small class",
            )


class Held(NamedTuple):
    """A named tensor inside a module."""

    name: str
    tensor: torch.Tensor
    is_parameter: bool


def tensors_of(attached: Attached) -> Iterator[Held]:
    """Yields all parameters and persistent buffers, one for every name they have."""
    for prefix, module in named_modules(attached):
        for key, parameter in module._parameters.items():
            if parameter is not None:
                yield Held(f"{prefix}.{key}", parameter, True)
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in module._non_persistent_buffers_set:
                yield Held(f"{prefix}.{key}", buffer, False)


def named_modules(attached: Attached) -> Iterator[tuple[str, nn.Module]]:
    """Yields every module with its name, parents first; a shared one once for every name."""
    stack = [(name, module) for name, module in reversed(attached.modules.items())]
    while stack:
        prefix, module = stack.pop()
        yield prefix, module
        for key, child in reversed(module._modules.items()):
            if child is not None:
                stack.append((prefix if _wraps(module, key) else f"{prefix}.{key}", child))


def distinct_modules(attached: Attached) -> list[nn.Module]:
    """Returns every module at least once, in a fixed order; the fast path of each step."""
    stack: list[nn.Module | None] = list(attached.modules.values())
    found = []
    while stack:
        module = stack.pop()
        if module is not None:
            found.append(module)
            if module._modules:
                stack.extend(module._modules.values())
    return found


def with_extra_state(attached: Attached) -> list[tuple[str, nn.Module]]:
    """Returns the modules that keep more than their tensors, in the way torch provides for it, by name."""
    plain = nn.Module.get_extra_state
    return [(n, module) for n, module in named_modules(attached) if type(module).get_extra_state is not plain]


def extra_path(*names: str) -> str:
    """Returns what a module's extra state is called; `names` make the module's, and may be empty."""
    return ".".join(filter(None, (*names, "extra_state")))


def take(name: str, give: Callable[[], Any]) -> Any:
    """Returns a state as its owner's own method gives it.

    Raises:
        UnsafeObject: the owner fails; the message names it.
    """
    try:
        return give()
    except _FOREIGN as error:
        raise UnsafeObject(
            f"{name} gives no state", f"{type(error).__name__}: {error}", "mend it, or leave it out"
        ) from error


def give_back(name: str, load: Callable[[Any], Any], state: Any) -> None:
    """Puts a state back by its owner's own method.

    Raises:
        StateMismatch: the owner refuses it; the message names the owner.
    """
    try:
        load(state)
    except _FOREIGN as error:
        raise StateMismatch(
            f"{name} does not take its state back",
            f"{type(error).__name__}: {error}",
            "use the kind of object that was saved; do not go on training with this one",
        ) from error


def with_own_saving(attached: Attached) -> list[str]:
    """Returns the names of modules that write a state_dict of their own, which we do not call."""
    plain = nn.Module._save_to_state_dict
    return [name for name, module in named_modules(attached) if type(module)._save_to_state_dict is not plain]


def reshard(attached: Attached) -> None:
    """Puts FSDP2's sharded parameters back in place, where a forward pass left whole ones.

    The whole ones are working copies; the shards are the state.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return
    for module in distinct_modules(attached):
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()


def _wraps(module: nn.Module, key: str) -> bool:
    if key in _WRAPPED:
        return True
    return key == "module" and isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel))


def _refuse_fsdp1(name: str, module: nn.Module) -> None:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and any(isinstance(m, fsdp.FullyShardedDataParallel) for m in module.modules()):
        raise InvalidRequest(
            f"{name} cannot be attached",
            "FullyShardedDataParallel moves its parameters between buffers at every pass",
            "use fully_shard (FSDP2)",
        )
