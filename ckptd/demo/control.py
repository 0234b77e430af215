"""The uninterrupted control: the same training in processes that never import ckptd."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ckptd.demo import example
from ckptd.demo.board import Board
from ckptd.demo.children import Child, Children, RecordPipe
from ckptd.demo.cluster import address, trainer_argv, trainer_environment
from ckptd.demo.history import History
from ckptd.demo.options import DemoFailed, ResolvedOptions
from ckptd.demo.scratch import Scratch

# Of one step, or of the interpreters' start, on a busy machine.
STALL_S = 90.0


@dataclass(frozen=True)
class Control:
    """What the control ended with, rank by rank."""

    digests: dict[int, dict[str, str]]
    # rank -> step -> loss as exact hexadecimal
    losses: dict[int, dict[int, str]]

    def to_json(self) -> str:
        return json.dumps({"digests": self.digests, "losses": self.losses})

    @staticmethod
    def from_json(text: str) -> Control:
        """Raises ValueError or KeyError where `text` is no control's result."""
        value: dict[str, Any] = json.loads(text)
        return Control(
            {int(rank): dict(parts) for rank, parts in value["digests"].items()},
            {int(r): {int(step): str(loss) for step, loss in s.items()} for r, s in value["losses"].items()},
        )


async def control(options: ResolvedOptions, places: Scratch, children: Children, board: Board) -> Control:
    """The control's result: from the cache, or by running it (and then into the cache).

    Raises:
        DemoFailed: one of its processes failed; the message shows its log.
        DeadlineExceeded: it does not get on.
    """
    kept = _cache_file(options)
    if kept is not None and kept.is_file():
        board.tell("control", f"the control's result is taken from {kept.parent}")
        return Control.from_json(kept.read_text())
    result = await _run(options, places, children, board)
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(f".{os.getpid()}")
        part.write_text(result.to_json())
        part.rename(kept)
    return result


def key(options: ResolvedOptions) -> str:
    """What decides the control's bits: the source, the text it reads, the options, the versions."""
    parts = [
        example.source_digest(),
        platform.python_version(),
        platform.machine(),
        version("torch"),
        options.nodes,
        options.steps,
        options.seed,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _cache_file(options: ResolvedOptions) -> Path | None:
    return options.control_cache / f"control-{key(options)[:32]}.json" if options.control_cache else None


async def _run(options: ResolvedOptions, places: Scratch, children: Children, board: Board) -> Control:
    history = History(options.nodes)
    board.tell("control", "running the uninterrupted control, which knows nothing of ckptd")

    def receive(record: dict[str, Any]) -> None:
        history.add(0, record)
        board.control_step = history.reached()
        board.changed()

    master = address("127.0.0.1")
    async with asyncio.TaskGroup() as tasks:
        for rank in range(options.nodes):
            tasks.create_task(_succeed(_start(rank, master, options, places, children, receive)))
        for step in range(1, options.steps + 1):
            await board.until(partial(_reached, history, step), STALL_S, f"the control's step {step}")
        await board.until(lambda: history.finished() is not None, STALL_S, "the control's digests")
    digests = history.finished()
    assert digests is not None
    losses = {rank: {step: loss for step, (loss,) in told.items()} for rank, told in history.losses().items()}
    return Control(digests, losses)


def _start(
    rank: int,
    master: str,
    options: ResolvedOptions,
    places: Scratch,
    children: Children,
    receive: Callable[[dict[str, Any]], None],
) -> Child:
    host, _, port = master.rpartition(":")
    pipe = RecordPipe(receive)
    environment = trainer_environment(places) | {
        "RANK": str(rank),
        "WORLD_SIZE": str(options.nodes),
        "MASTER_ADDR": host,
        "MASTER_PORT": port,
    }
    argv = trainer_argv("control.py", options, pipe.path)
    child = children.spawn_trainer(f"control-rank{rank}", argv, environment, [pipe.write_end])
    pipe.handed_over()
    return child


def _reached(history: History, step: int) -> bool:
    return history.reached() >= step


async def _succeed(child: Child) -> None:
    status = await child.wait()
    if status != 0:
        raise DemoFailed.of(f"{child.name} ended with {status}", "the control must end with 0", child.log)
