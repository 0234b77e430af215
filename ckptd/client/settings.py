"""What the client takes from its environment: the one place that reads it.

A plain dataclass instead of pydantic-settings: a trainer pays for every import at
each restart, and there are nine fields.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ckptd.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Environment:
    """The variables that concern a trainer; None where one is not set."""

    rank: int | None = None
    world_size: int | None = None
    local_rank: int | None = None
    local_world_size: int | None = None
    generation: int = 0  # CKPTD_GENERATION; 0: no launcher of ckptd's is at work
    socket: Path | None = None  # CKPTD_SOCKET
    runtime_dir: Path = Path("/tmp")  # of the embedded daemon's socket, lock and log
    memory_dir: Path = Path("/dev/shm")  # CKPTD_MEMORY_DIR; the embedded daemon's

    @classmethod
    def read(cls, environ: Mapping[str, str] | None = None) -> Environment:
        """Returns what `environ` (default: the process's own) says.

        Raises:
            InvalidRequest: a number is not one.
        """
        environ = os.environ if environ is None else environ
        xdg, own = environ.get("XDG_RUNTIME_DIR"), f"ckptd-{os.getuid()}"
        return cls(
            rank=_number(environ, "RANK"),
            world_size=_number(environ, "WORLD_SIZE"),
            local_rank=_number(environ, "LOCAL_RANK"),
            local_world_size=_number(environ, "LOCAL_WORLD_SIZE"),
            generation=_number(environ, "CKPTD_GENERATION") or 0,
            socket=Path(environ["CKPTD_SOCKET"]) if environ.get("CKPTD_SOCKET") else None,
            runtime_dir=Path(xdg) / "ckptd" if xdg else Path("/tmp") / own,
            memory_dir=Path(environ.get("CKPTD_MEMORY_DIR") or f"/dev/shm/{own}"),
        )


@dataclass(frozen=True, slots=True)
class Place:
    """Which of the job's ranks this process is."""

    rank: int
    world_size: int
    local_world_size: int

    @classmethod
    def find(
        cls, environment: Environment, rank: int | None, world_size: int | None, local_world_size: int | None
    ) -> Place:
        """Returns the arguments where given, else the environment, else torch.distributed, else 0 of 1.

        Where nothing says how many ranks run on this node, all of them do.

        Raises:
            InvalidRequest: the numbers contradict each other.
        """
        grouped = _process_group()
        rank = _first(rank, environment.rank, grouped and grouped[0], 0)
        world_size = _first(world_size, environment.world_size, grouped and grouped[1], 1)
        local_world_size = _first(local_world_size, environment.local_world_size, world_size)
        if not 0 <= rank < world_size or not 1 <= local_world_size <= world_size:
            raise InvalidRequest(
                "rank and world size contradict each other",
                f"rank {rank}, world size {world_size}, local world size {local_world_size}",
                "set RANK, WORLD_SIZE and LOCAL_WORLD_SIZE as torchrun does, or pass rank= and world_size=",
            )
        return cls(rank, world_size, local_world_size)


def _first(*values: int | None) -> int:
    return next(value for value in values if value is not None)


def _number(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name, "")
    if not text:
        return None
    if not text.isdecimal():
        raise InvalidRequest(f"{name} is not a number", f"found {text!r}")
    return int(text)


def _process_group() -> tuple[int, int] | None:
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    return distributed.get_rank(), distributed.get_world_size()
