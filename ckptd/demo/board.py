"""All that the demo knows at this moment, and waiting for it to change."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ckptd.demo.figures import Event
from ckptd.demo.history import History
from ckptd.errors import DeadlineExceeded


@dataclass
class NodeView:
    """A node as the coordinator sees it, and what the demo did to it."""

    state: str = "starting"
    ranks: tuple[int, ...] = ()
    group: int | None = None
    # The demo's own knowledge: "", killed, stopped, daemon killed.
    harm: str = ""


@dataclass
class Board:
    """One demo's state.  Whoever changes it calls `changed()`; whoever waits uses `until()`."""

    history: History
    steps: int
    nodes: dict[str, NodeView]
    events: list[Event] = field(default_factory=list)
    generation: int = 0
    watermark: int | None = None
    phase: str = "starting"
    now: str = "starting"
    # Nothing was struck, or the job came back from it: no trainer may fail.
    calm: bool = True
    # Steps of the control; None before it runs.
    control_step: int | None = None
    _signal: asyncio.Event = field(default_factory=asyncio.Event)

    def changed(self) -> None:
        """Wakes everybody who waits."""
        signal, self._signal = self._signal, asyncio.Event()
        signal.set()

    def tell(self, name: str, text: str, at_s: float | None = None) -> None:
        """An event of the demo's own, and what happens now."""
        at = time.monotonic() if at_s is None else at_s
        self.events.append(Event(name, at, text))
        self.now = text
        self.changed()

    def loss(self) -> float | None:
        """The newest step's mean loss over all ranks; None before there is one."""
        generations = self.history.generations()
        return self.history.loss(generations[-1], self.history.reached()) if generations else None

    def record(self, generation: int, record: Mapping[str, Any]) -> None:
        """A trainer's line."""
        self.history.add(generation, record)
        self.changed()

    async def until(self, condition: Callable[[], bool], deadline_s: float, what: str) -> None:
        """Returns once `condition()` holds.

        Raises:
            DeadlineExceeded: it did not within `deadline_s`; `what` says what was waited for.
        """
        try:
            async with asyncio.timeout(deadline_s):
                while not condition():
                    await self._signal.wait()
        except TimeoutError:
            raise DeadlineExceeded(
                f"waited {deadline_s:.0f} s for {what}", f"the last thing that happened: {self.now}"
            ) from None
