"""Optimizers: the names of their state, its values, its return, and its size before it exists.

Names come from parameter groups: the state `key` of a parameter is
`{optimizer}.{parameter}.{key}`.  Nothing here steps the user's optimizer or asks
torch.distributed.checkpoint about it (which would step it); state that does not
exist is absent until the first real step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from ckptd.client.tensors import is_tensor, local_of
from ckptd.errors import UnsupportedOptimizer

_GROWS = "its state holds a history that changes size from step to step"
_ELSEWHERE = "its state is spread over other ranks' optimizers"
_REFUSED = {"LBFGS": _GROWS, "ZeroRedundancyOptimizer": _ELSEWHERE}

# How an optimizer computes, not what: it was made for the devices and the layout that the job has now.
# foreach=True fails where plain tensors and DTensors are mixed, capturable=True on a CPU.
_HOW = ("foreach", "fused", "capturable", "differentiable")

# What a throw-away optimizer of a foreign class may raise on the meta device.
_FOREIGN = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


def check_supported(name: str, optimizer: Optimizer) -> None:
    """Returns if the optimizer's state can be kept.

    Raises:
        UnsupportedOptimizer: it cannot, or its steps cannot be seen.
    """
    for kind in type(optimizer).__mro__:
        if kind.__name__ in _REFUSED:
            why = _REFUSED[kind.__name__]
            raise UnsupportedOptimizer(
                f"{name} is a {kind.__name__}, which cannot be kept", why, "choose another"
            )
    if not hasattr(type(optimizer).step, "hooked"):
        # Optimizer.__init__ patches step() of its class; a wrapper that never calls it has no hooks.
        raise UnsupportedOptimizer(
            f"{name} ({type(optimizer).__name__}) calls no step hooks",
            "it wraps another optimizer",
            "attach the inner one",
        )


def class_name(optimizer: Optimizer) -> str:
    """Returns the name that must be the same when the state comes back."""
    return type(optimizer).__qualname__


@dataclass(frozen=True, slots=True)
class OwnedParameter:
    """A parameter of an optimizer."""

    name: str
    parameter: torch.Tensor
    loose: bool  # in no attached module: its value is kept under the optimizer's name


def parameters_of(name: str, optimizer: Optimizer, name_of: Mapping[int, str]) -> list[list[OwnedParameter]]:
    """Returns the parameters of every group.

    Args:
        name_of: names of the modules' parameters, by id.
    """
    groups = []
    for number, group in enumerate(optimizer.param_groups):
        owned = []
        for index, parameter in enumerate(group["params"]):
            known = name_of.get(id(parameter))
            owned.append(OwnedParameter(known or f"{name}.params.{number}.{index}", parameter, known is None))
        groups.append(owned)
    return groups


def settings_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Returns every group's values but its parameters."""
    return [
        {key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups
    ]


def restore_settings(optimizer: Optimizer, settings: list[dict[str, Any]]) -> None:
    """Sets every group's values, in place where both old and new are tensors (a captured lr).

    The live group's choice of an implementation stays.
    """
    for group, saved in zip(optimizer.param_groups, settings, strict=True):
        for key, value in saved.items():
            if key in _HOW and key in group:
                continue
            live = group.get(key)
            if isinstance(live, torch.Tensor) and isinstance(value, torch.Tensor):
                local_of(live).detach().copy_(value)
            else:
                group[key] = value


def estimate(optimizer: Optimizer) -> list[dict[str, torch.Tensor]] | None:
    """Returns the state tensors that each parameter will have, on the meta device, in group order.

    A throw-away optimizer of the same class and groups takes one step on meta
    tensors of the local shapes.  None where that fails: then the size is known only
    after the first real step.
    """
    groups = []
    for group in optimizer.param_groups:
        twins = [_meta(local_of(parameter), parameter.requires_grad) for parameter in group["params"]]
        # Fused and capturable kernels have no meta form; they keep the same state, elsewhere.
        twin_group: dict[str, Any] = {**group, "params": twins}
        twin_group.update((key, False) for key in ("fused", "foreach", "capturable") if key in group)
        groups.append(twin_group)
    step = getattr(type(optimizer).step, "__wrapped__", type(optimizer).step)
    try:
        with torch.random.fork_rng(devices=[]):
            make: Callable[[list[dict[str, Any]]], Optimizer] = type(optimizer)
            twin = make(groups)
            step(twin)  # the undecorated step: no hook of the user's sees the twin
    except _FOREIGN:
        return None
    return [
        {key: value for key, value in twin.state.get(p, {}).items() if is_tensor(value)}
        for group in twin.param_groups
        for p in group["params"]
    ]


def state_of(optimizer: Optimizer, parameter: torch.Tensor) -> dict[str, Any]:
    """Returns a parameter's state; empty, and not created, where there is none."""
    states: Mapping[Any, dict[str, Any]] = optimizer.state  # a defaultdict, whose get() makes nothing
    return states.get(parameter, {})


def tensor_values(state: Mapping[Any, Any]) -> dict[str, torch.Tensor]:
    """Returns the part of a parameter's state that becomes named tensors."""
    return {key: value for key, value in state.items() if type(key) is str and is_tensor(value)}


def other_values(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """Returns the rest of a parameter's state."""
    return {key: value for key, value in state.items() if type(key) is not str or not is_tensor(value)}


def other_state(optimizer: Optimizer) -> dict[str, Any]:
    """Returns the state that belongs to no parameter but to a name."""
    state: Mapping[Any, Any] = optimizer.state
    return {key: value for key, value in state.items() if isinstance(key, str)}


def reset_state(optimizer: Optimizer, state: Mapping[Any, dict[str, Any]]) -> None:
    """Makes `state` (by parameter, or by a name of the optimizer's own) the optimizer's whole state."""
    own: dict[Any, Any] = optimizer.state
    for key in [key for key in own if key not in state]:
        del own[key]
    for key, values in state.items():
        if isinstance(key, str):
            own[key] = values
            continue
        live = own.setdefault(key, {})
        for gone in [name for name in live if name not in values]:
            del live[gone]
        live.update(values)


def _meta(parameter: torch.Tensor, requires_grad: bool) -> torch.Tensor:
    twin = torch.empty_like(parameter, device="meta", requires_grad=requires_grad)
    if requires_grad:
        twin.grad = torch.empty_like(twin)
    return twin
