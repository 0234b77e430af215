"""Lightning's sharded checkpoints at `ckptd://`.

    class Strategy(Sharded, ModelParallelStrategy): ...

    trainer = Trainer(strategy=Strategy(), ...)
    trainer.save_checkpoint("ckptd://llama/step-7")

Lightning's ModelParallelStrategy makes a `pathlib.Path` of what it is given, and so of a URL a folder named
`ckptd:` in the working directory.  These classes, put before it, save and load what it would, in files of the
same names (DCP's, and Lightning's `meta.pt`), under our commit.  Other paths are left to it.

Nothing here imports Lightning by name: `lightning` and its other names are served.  The files are read with
DCP and Lightning's own CheckpointIO, pickles among them: whoever loads them trusts who wrote them.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import IO, TYPE_CHECKING, Any, Final, cast

import torch
from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.checkpoint.storage import WriteResult
from torch.nn import Module
from torch.optim import Optimizer

from ckptd.errors import InvalidRequest
from ckptd.storage import place

META: Final = "meta.pt"  # Lightning's name for what belongs to no model and no optimizer

if TYPE_CHECKING:
    _Strategy = Any
else:
    _Strategy = object


class Sharded(_Strategy):  # type: ignore[misc]  # the strategy it is put before
    """What comes before `lightning.pytorch.strategies.ModelParallelStrategy`.

    Raises (all methods):
        InvalidRequest: the URL is no checkpoint's, or the option has no meaning there.
        CheckpointException: of DCP: a rank failed; all raise this, and there is no checkpoint.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None
    ) -> None:
        url = self.broadcast(filepath)
        if not _ours(url):
            super().save_checkpoint(checkpoint, filepath, storage_options=storage_options)
            return
        _refuse(url, self._save_distributed_checkpoint, storage_options=storage_options)
        state = {"state_dict": checkpoint.pop("state_dict")}
        for index, optimizer in enumerate(checkpoint.pop("optimizer_states", [])):
            state[f"optimizer_{index}"] = optimizer
        save(state, storage_writer=_Writer(url, checkpoint))

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        url = self.broadcast(checkpoint_path)
        if not _ours(url):
            theirs: dict[str, Any] = super().load_checkpoint(checkpoint_path, weights_only=weights_only)
            return theirs
        optimizers = {f"optimizer_{index}": each for index, each in enumerate(self.optimizers)}
        _load(url, "state_dict", self.model, optimizers, self.lightning_module.strict_loading)
        rest: dict[str, Any] = self.checkpoint_io.load_checkpoint(f"{url}/{META}", weights_only=weights_only)
        return rest


class FabricSharded(_Strategy):  # type: ignore[misc]  # the strategy it is put before
    """What comes before `lightning.fabric.strategies.ModelParallelStrategy`; raises what `Sharded` does."""

    def save_checkpoint(
        self,
        path: Any,
        state: dict[str, Any],
        storage_options: Any | None = None,
        filter: Any | None = None,
    ) -> None:
        url = self.broadcast(path)
        if not _ours(url):
            super().save_checkpoint(path, state, storage_options=storage_options, filter=filter)
            return
        _refuse(url, self._save_distributed_checkpoint, storage_options=storage_options, filter=filter)
        _, model = _one_model(url, state)
        options = StateDictOptions(cpu_offload=True)
        sharded: dict[str, Any] = {}
        rest: dict[str, Any] = {}
        for key, value in state.items():
            if isinstance(value, Module):
                sharded[key] = get_model_state_dict(value, options=options)
            elif isinstance(value, Optimizer):
                sharded[key] = get_optimizer_state_dict(model, value, options=options)
            else:
                rest[key] = value.state_dict() if isinstance(value, Stateful) else value
        save(sharded, storage_writer=_Writer(url, rest))

    def load_checkpoint(
        self, path: Any, state: Any | None = None, strict: bool = True, weights_only: bool | None = None
    ) -> dict[str, Any]:
        url = self.broadcast(path)
        if not _ours(url):
            theirs: dict[str, Any] = super().load_checkpoint(path, state, strict, weights_only)
            return theirs
        if not isinstance(state, dict):
            raise InvalidRequest(f"{url} cannot be loaded", "its shards go into a model", "give state={...}")
        key, model = _one_model(url, state)
        optimizers = {name: each for name, each in state.items() if isinstance(each, Optimizer)}
        _load(url, key, model, optimizers, strict)
        # This strategy's own `checkpoint_io` refuses to be used.
        fabric = super().load_checkpoint.__module__.partition(".strategies")[0]
        reader = importlib.import_module(f"{fabric}.plugins").TorchCheckpointIO()
        rest: dict[str, Any] = reader.load_checkpoint(f"{url}/{META}", weights_only=weights_only)
        wanted = state.keys() - optimizers.keys() - {key}
        if strict and not rest.keys() >= wanted:
            raise InvalidRequest(f"{url} has no {', '.join(sorted(wanted - rest.keys()))}")
        state.update({name: rest.pop(name) for name in wanted & rest.keys()})
        return rest


class _Writer(FsspecWriter):
    """DCP's writer, which writes Lightning's own file, too, before the commit."""

    def __init__(self, url: str, rest: dict[str, Any]) -> None:
        super().__init__(url)
        self._rest = rest

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        # DCP calls this on one rank, and tells all of them if it fails.
        with self.fs.create_stream(self.fs.concat_path(self.path, META), "wb") as file:
            torch.save(self._rest, cast("IO[bytes]", file))
        super().finish(metadata, results)


def _ours(path: object) -> bool:
    return str(path).startswith(place.SCHEME)


def _refuse(url: str, distributed: bool, **options: object) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given or not distributed:
        what = given[0] if given else "save_distributed_checkpoint=False"
        raise InvalidRequest(
            f"{url} cannot be saved with {what}", "it holds all shards as they are", "drop it"
        )


def _one_model(url: str, state: dict[str, Any]) -> tuple[str, Module]:
    models = [(key, value) for key, value in state.items() if isinstance(value, Module)]
    if len(models) != 1:
        raise InvalidRequest(f"{url} holds one model", f"there are {len(models)} in the state")
    return models[0]


def _load(url: str, key: str, model: Module, optimizers: Mapping[str, Optimizer], strict: bool) -> None:
    found: dict[str, Any] = {key: get_model_state_dict(model)}
    load(found, checkpoint_id=url)
    model.load_state_dict(found[key], strict=strict)
    for name, optimizer in optimizers.items():
        found = {name: get_optimizer_state_dict(model, optimizer)}
        load(found, checkpoint_id=url)
        options = StateDictOptions(cpu_offload=True)
        set_optimizer_state_dict(model, optimizer, optim_state_dict=found[name], options=options)
