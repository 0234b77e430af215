"""What is killed, and when: drawn from the seed, then handed to the killer's process."""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptd.demo import killer
from ckptd.demo.children import Children, RecordPipe
from ckptd.demo.options import STRIKE_WINDOW_STEPS, DemoFailed

# An answer comes this long after the strike at the latest.
ANSWER_S = 10.0


@dataclass(frozen=True)
class Draw:
    """A seed's choice: which ranks are hit, and where in the window of time the strike falls."""

    ranks: tuple[int, ...]
    # In [0, 1) of the window.
    at: float

    def delay_s(self, step_s: float) -> float:
        """From now to the strike: a time, not a step."""
        return self.at * STRIKE_WINDOW_STEPS * step_s


def draw(name: str, seed: int, ranks: int, victims: int) -> Draw:
    """The choice of `seed` for the strike called `name`; any rank can be hit, rank 0 included."""
    chance = random.Random(f"{name}:{seed}")
    return Draw(tuple(sorted(chance.sample(range(ranks), victims))), chance.random())


class Killer:
    """The killer's process, and orders to it."""

    def __init__(self, children: Children, environment: Mapping[str, str]) -> None:
        self._answers: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        orders, self._orders = os.pipe()
        answers = RecordPipe(self._answers.put_nowait)
        argv = [sys.executable, "-I", str(Path(killer.__file__))]
        self._child = children.spawn("killer", argv, environment, stdin=orders, stdout=answers.write_end)
        os.close(orders)
        answers.handed_over()

    async def strike(
        self, signals: Sequence[tuple[int, str]], remove: Sequence[Path] = (), delay_s: float = 0.0
    ) -> float:
        """Strikes in `delay_s`; returns the CLOCK_MONOTONIC time at which it did.

        Raises:
            DemoFailed: the killer failed, or a victim was gone before.
        """
        order = {
            "at_s": time.monotonic() + delay_s,
            "signals": list(signals),
            "remove": [str(path) for path in remove],
        }
        os.write(self._orders, json.dumps(order).encode() + b"\n")
        try:
            answer = await asyncio.wait_for(self._answers.get(), delay_s + ANSWER_S)
        except TimeoutError:
            raise DemoFailed.of("the killer did not answer", "it has failed", self._child.log) from None
        if answer["missing"]:
            raise DemoFailed("a victim was gone before the strike", f"processes {answer['missing']}")
        return float(answer["struck_s"])

    def close(self) -> None:
        """Ends the killer by the end of its orders."""
        os.close(self._orders)
