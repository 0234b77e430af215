"""An image becomes live state: everything is checked before the first byte is written.

Modules first, then optimizers, then other objects through load_state_dict, random
states last.  Names, dtypes, shapes and shards must be the same on both sides; the
optimizer's state is made where the live optimizer has none yet.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ckptd.client import optimizers as optim
from ckptd.client.arena import tensor_at
from ckptd.client.attached import RESERVED, extra_path, give_back, with_extra_state
from ckptd.client.capture import Origin
from ckptd.client.random_state import restore_random
from ckptd.client.state import FORMAT, STATIC, Survey
from ckptd.client.tensors import Form, is_tensor, plain, spec_of, with_form, writable
from ckptd.errors import CorruptImage, StateMismatch
from ckptd.image import ImagePlan, TensorRef, cell_digests, decode, read_variable
from ckptd.image.digest import digest_of_digests

_NAMED_AT_MOST = 5


def verify(image: memoryview, digest: bytes) -> None:
    """Compares an image with what its daemon sealed, right before it is loaded.

    Args:
        digest: the xxh3_128 of the digests of the image's cells.

    Raises:
        CorruptImage: its bytes changed after the daemon looked at them.
    """
    if digest_of_digests(cell_digests(image)) != digest:
        raise CorruptImage(
            "the image changed between the daemon's verification and this load",
            f"its {len(image):,} bytes do not match their digest",
            "start again: the daemon verifies it again, and has it rebuilt by its peers",
        )


def restore(image: memoryview, survey: Survey, origin: Origin, step: int) -> None:
    """Loads a rank's image into the surveyed modules, optimizers and objects.

    Args:
        image: one whole image, writable (a private mapping will do); nothing is written to it.

    Raises:
        CorruptImage: this is no image of ours.
        StateMismatch: it does not fit the live state; nothing was changed, except where
            the message names an object whose own load_state_dict refused.
    """
    stored = _Stored.read(image, origin, step)
    _check_modules(stored, survey)
    _check_optimizers(stored, survey)
    _check_objects(stored, survey)
    states = [_optimizer_state(stored, survey, name) for name in survey.attached.optimizers]
    # From here on live state changes.
    with torch.no_grad():
        for name in [*survey.module_names, *_loose_names(survey)]:
            entry = survey.entries.get(name)
            if entry is not None:
                _write(entry.tensor, stored.tensor(name))
        for optimizer, state in zip(survey.attached.optimizers.values(), states, strict=True):
            optim.reset_state(optimizer, {key: make() for key, make in state.items()})
        for name, optimizer in survey.attached.optimizers.items():
            optim.restore_settings(optimizer, stored.values(stored.tree[name]["groups"]))
    _load_objects(stored, survey)
    restore_random(stored.tree[RESERVED]["random"])


@dataclass(frozen=True, slots=True)
class _Stored:
    """An image that was read: its tensors, its tree, and what was fixed with its plan."""

    plan: ImagePlan
    tree: dict[str, Any]
    static: dict[str, Any]
    bytes: torch.Tensor
    # Tensors that objects hold, cloned once each, so that shared ones stay shared.
    clones: dict[tuple[str, torch.device], torch.Tensor]

    @classmethod
    def read(cls, image: memoryview, origin: Origin, step: int) -> _Stored:
        plan = ImagePlan.parse(image)
        variable = read_variable(plan, image)
        found = (variable.job, variable.rank, variable.step)
        if found != (origin.job, origin.rank, step):
            raise CorruptImage(
                "this image belongs elsewhere",
                f"found job {found[0]}, rank {found[1]}, step {found[2]}; "
                f"expected job {origin.job}, rank {origin.rank}, step {step}",
            )
        if variable.world_size != origin.world_size:
            raise StateMismatch(
                f"this state is of {variable.world_size} ranks, the job has {origin.world_size}",
                "resharding comes with a later release",
                f"start {variable.world_size} ranks",
            )
        tree = decode(variable.objects)
        try:
            own = tree[RESERVED]  # type: ignore[index]
            if own["format"] != FORMAT:
                raise StateMismatch(f"the state is of format {own['format']}, this ckptd reads {FORMAT}")
            static = decode(plan.tensor(image, STATIC))
        except (TypeError, KeyError) as error:
            raise CorruptImage("this image's objects are not a rank's state", str(error)) from error
        whole = torch.frombuffer(image, dtype=torch.uint8)
        return cls(plan, tree, static, whole, {})  # type: ignore[arg-type]

    def tensor(self, name: str) -> torch.Tensor:
        """Returns a view of the image's bytes; an alias leads to the tensor it is another name of."""
        name = self.static["aliases"].get(name, name)
        spec = self.plan.spec_of.get(name)
        if spec is None:
            raise CorruptImage("this image lacks a tensor that its objects name", name)
        return tensor_at(self.bytes, self.plan.offset_of[name], spec.nbytes, spec.dtype, spec.shape)

    def clone(self, name: str, device: torch.device) -> torch.Tensor:
        """Returns a tensor of its own on `device`; the same one for every name of one storage."""
        key = (self.static["aliases"].get(name, name), device)
        if key not in self.clones:
            self.clones[key] = self.tensor(name).clone().to(device)
        return self.clones[key]

    def form(self, name: str) -> Form | None:
        form = self.static["forms"].get(name)
        return None if form is None else Form(*form)

    def values(self, tree: Any, like: Any = None) -> Any:
        """Returns a part of the tree with its tensors in place, on the devices of those in `like`."""
        if isinstance(tree, TensorRef):
            return self.clone(tree.name, like.device if is_tensor(like) else torch.device("cpu"))
        kind = type(tree)
        if kind is dict or kind is OrderedDict:
            inner = like if isinstance(like, dict) else {}
            return kind((key, self.values(value, inner.get(key))) for key, value in tree.items())
        if kind is list or kind is tuple:
            items = like if isinstance(like, (list, tuple)) and len(like) == len(tree) else [None] * len(tree)
            return kind(self.values(value, item) for value, item in zip(tree, items, strict=True))
        return tree


def _check_modules(stored: _Stored, survey: Survey) -> None:
    _same_names("tensors of modules", stored.static["modules"], survey.module_names)
    loose = [name for optimizer in stored.static["optimizers"].values() for name in optimizer["loose"]]
    _same_names("parameters of optimizers", loose, _loose_names(survey))
    for name in [*survey.module_names, *_loose_names(survey)]:
        _check_one(name, stored, survey)


def _check_one(name: str, stored: _Stored, survey: Survey) -> None:
    """Refuses a tensor of another form, and one that shares its bytes with others only on one side."""
    live_first, stored_first = survey.aliases.get(name, name), stored.static["aliases"].get(name, name)
    live = spec_of(name, survey.entries[live_first].tensor)
    kept = stored.plan.spec_of.get(stored_first)
    if kept is None:
        raise CorruptImage("this image lacks a tensor that its objects name", stored_first)
    if (kept.dtype, kept.shape) != (live.dtype, live.shape):
        raise StateMismatch(
            f"{name} does not fit",
            f"stored {kept.dtype} {list(kept.shape)}, live {live.dtype} {list(live.shape)}",
            "resume with the model that was captured",
        )
    if stored.form(name) != survey.forms.get(name):
        raise StateMismatch(
            f"{name} is sharded in another way",
            f"stored {_shown(stored.form(name))}, live {_shown(survey.forms.get(name))}",
            "use the mesh and placements that were captured; resharding comes with a later release",
        )
    if live_first != name and stored.static["aliases"].get(live_first, live_first) != stored_first:
        raise StateMismatch(
            f"{name} and {live_first} are one tensor here, but were two when captured",
            next="tie the same parameters as then",
        )


def _check_optimizers(stored: _Stored, survey: Survey) -> None:
    _same_names("optimizers", stored.static["optimizers"], survey.attached.optimizers)
    for name, optimizer in survey.attached.optimizers.items():
        kept = stored.static["optimizers"][name]
        live = [[owned.name for owned in group] for group in survey.groups[name]]
        if kept["class"] != optim.class_name(optimizer):
            raise StateMismatch(f"{name} was a {kept['class']}, and is a {optim.class_name(optimizer)} now")
        if len(kept["groups"]) != len(live):
            raise StateMismatch(f"{name} had {len(kept['groups'])} parameter groups, and has {len(live)} now")
        for number, (before, now) in enumerate(zip(kept["groups"], live, strict=True)):
            _same_names(f"parameters in group {number} of {name}", before, now)
            if before != now:
                raise StateMismatch(f"group {number} of {name} holds its parameters in another order")


def _check_objects(stored: _Stored, survey: Survey) -> None:
    _same_names("objects", stored.static["objects"], survey.attached.objects)
    live = [name for name, _ in with_extra_state(survey.attached)]
    _same_names("extra states of modules", stored.tree[RESERVED].get("extra", {}), live)


def _optimizer_state(stored: _Stored, survey: Survey, name: str) -> dict[Any, Callable[[], Any]]:
    """Returns what makes each parameter's state; all checks are done when it returns."""
    tree, kept = stored.tree[name], stored.static["optimizers"][name]
    state: dict[Any, Callable[[], Any]] = {}
    for owned in (parameter for group in survey.groups[name] for parameter in group):
        keys = kept["state"].get(owned.name, [])
        values = tree["state"].get(owned.name, {})
        if not keys and not values:
            continue
        live = optim.state_of(survey.attached.optimizers[name], owned.parameter)
        makers = {}
        for key, on_parameters_device in keys:
            device = owned.parameter.device if on_parameters_device else torch.device("cpu")
            makers[key] = _state_tensor(
                stored, survey, f"{name}.{owned.name}.{key}", device, owned.parameter, live.get(key)
            )
        state[owned.parameter] = _all_of(stored, makers, values)
    for key, values in tree["other"].items():
        state[key] = _all_of(stored, {}, values)
    return state


def _all_of(stored: _Stored, makers: dict[str, Callable[[], torch.Tensor]], rest: Any) -> Callable[[], Any]:
    def make_all() -> Any:
        if not makers:
            return stored.values(rest)
        return {key: make() for key, make in makers.items()} | stored.values(rest)

    return make_all


def _state_tensor(
    stored: _Stored, survey: Survey, name: str, device: torch.device, parameter: torch.Tensor, live: Any
) -> Callable[[], torch.Tensor]:
    """Returns what makes one state tensor: in place where the live optimizer has its like, anew otherwise."""
    source, form = stored.tensor(name), stored.form(name)
    first = stored.static["aliases"].get(name)
    if first in survey.entries and not first.startswith(tuple(f"{own}." for own in survey.groups)):
        # The state is the parameter itself, or another module's tensor, under a second name.
        return lambda: with_form(name, survey.entries[first].tensor, form, parameter)
    if is_tensor(live):
        target = plain(name, live)
        if (target.dtype, target.shape, target.device) == (source.dtype, source.shape, device):

            def refill() -> torch.Tensor:
                _write(target, source)
                return live  # type: ignore[no-any-return]

            return refill
    # Fails now, before anything is written, if the parameter is on no such mesh.
    with_form(name, torch.empty_like(source, device=device), form, parameter)
    return lambda: with_form(name, stored.clone(name, device), form, parameter)


def _load_objects(stored: _Stored, survey: Survey) -> None:
    extras = stored.tree[RESERVED].get("extra", {})
    for name, module in with_extra_state(survey.attached):
        give_back(extra_path(name), module.set_extra_state, stored.values(extras[name]))
    for name, target in survey.attached.objects.items():
        live = target.state_dict()
        state = stored.values(stored.tree[name], live)
        # A disabled GradScaler has no state, and refuses to be given none.
        if state or live:
            give_back(name, target.load_state_dict, state)


def _write(target: torch.Tensor, source: torch.Tensor) -> None:
    live = writable(target)
    for dim, size in enumerate(live.shape):
        source = source.narrow(dim, 0, size)
    live.copy_(source)


def _loose_names(survey: Survey) -> list[str]:
    return [
        owned.name for groups in survey.groups.values() for group in groups for owned in group if owned.loose
    ]


def _same_names(what: str, stored: Iterable[str], live: Iterable[str]) -> None:
    stored, live = list(stored), list(live)
    missing, unexpected = sorted(set(live) - set(stored)), sorted(set(stored) - set(live))
    if missing or unexpected:
        sides = [("not in the stored state", missing), ("only in the stored state", unexpected)]
        why = "; ".join(f"{side}: {_listed(names)}" for side, names in sides if names)
        raise StateMismatch(f"the {what} do not match", why, "resume with what was captured")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED_AT_MOST} more" if len(names) > _NAMED_AT_MOST else ""
    return ", ".join(names[:_NAMED_AT_MOST]) + more


def _shown(form: Form | None) -> str:
    if form is None:
        return "whole"
    mesh = f"mesh {list(form.mesh_shape)} at {list(form.coordinate)}"
    return f"{list(form.placements)} of {list(form.shape)} on {mesh}"
