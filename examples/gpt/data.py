"""Real text that every machine has, and a sampler whose order is a pure function.

The text is the Python standard library's own source.  The sampler has a position
and nothing else that varies, so a run that goes on elsewhere continues with the
very next sample.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CORPUS_BYTES = 1 << 20


def corpus(limit_bytes: int = CORPUS_BYTES) -> bytes:
    """The first `limit_bytes` of the standard library's top-level modules, sorted by name."""
    text = bytearray()
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        text += path.read_bytes()
        if len(text) >= limit_bytes:
            break
    return bytes(text[:limit_bytes])


def offset(seed: int, index: int, span: int) -> int:
    """Where global sample `index` starts, in [0, span): splitmix64 of (seed, index)."""
    mask = (1 << 64) - 1
    z = (seed * 0xD1342543DE82EF95 + (index + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) % span


class Sampler:
    """Batches of (inputs, targets) for one rank; `position` counts the batches of all ranks.

    Sample i of batch p on rank r is the global sample (p * world_size + r) * batch + i:
    whoever holds the position knows what comes next.
    """

    def __init__(
        self, text: bytes, *, context: int, batch: int, rank: int, world_size: int, seed: int
    ) -> None:
        if len(text) <= context + 1:
            raise ValueError(f"the text has {len(text)} bytes, but one sample needs {context + 1}")
        self.position = 0
        self._text = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self._context = context
        self._batch = batch
        self._rank = rank
        self._world_size = world_size
        self._seed = seed

    def __iter__(self) -> Sampler:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        """The next batch: two int64 tensors [batch, context], the second one byte ahead."""
        first = (self.position * self._world_size + self._rank) * self._batch
        span = len(self._text) - self._context
        starts = [offset(self._seed, first + i, span) for i in range(self._batch)]
        rows = torch.stack([self._text[at : at + self._context + 1] for at in starts]).long()
        self.position += 1
        return rows[:, :-1], rows[:, 1:]

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "seed": self._seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["seed"] != self._seed:
            raise ValueError(f"the state is of seed {state['seed']}, this sampler's is {self._seed}")
        self.position = int(state["position"])
