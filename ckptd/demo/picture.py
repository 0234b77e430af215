"""The picture on stderr: live on a terminal, a line for every event elsewhere."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ckptd.demo.board import Board, NodeView
from ckptd.demo.figures import Event

REFRESH_S = 0.15
PROGRESS_EVERY_STEPS = 10
EVENTS_SHOWN = 8
BAR_WIDTH = 60

STATE_STYLE = {
    "active": "green",
    "standby": "cyan",
    "suspect": "yellow",
    "dead": "red",
    "quarantined": "red",
}


class Picture:
    """Shows a board until it is told to stop; `show()` is a task's body."""

    def __init__(self, board: Board, title: str) -> None:
        self._board = board
        self._title = title
        self._console = Console(stderr=True)
        self._began_s = time.monotonic()
        self._told = 0
        self._progress_told = 0

    async def show(self) -> None:
        """Runs until cancelled."""
        if self._console.is_terminal:
            with self._live() as live:
                while True:
                    await asyncio.sleep(REFRESH_S)
                    live.update(self._frame(), refresh=True)
        try:
            while True:
                await asyncio.sleep(REFRESH_S)
                self._print_news()
        finally:
            self._print_news()

    @contextmanager
    def _live(self) -> Iterator[Live]:
        with Live(
            self._frame(), console=self._console, auto_refresh=False, transient=True, redirect_stdout=False
        ) as live:
            yield live

    def _print_news(self) -> None:
        board = self._board
        for event in board.events[self._told :]:
            self._line(event.at_s, event.text or event.name)
        self._told = len(board.events)
        step = board.history.reached()
        if step >= self._progress_told + PROGRESS_EVERY_STEPS or step < self._progress_told:
            self._progress_told = step
            loss = board.loss()
            self._line(
                time.monotonic(),
                f"step {step} of {board.steps}, loss {'-' if loss is None else f'{loss:.3f}'}, "
                f"protected: {_number(board.watermark)}",
            )

    def _line(self, at_s: float, text: str) -> None:
        self._console.print(
            f"{at_s - self._began_s:7.2f} s  {text}", highlight=False, markup=False, soft_wrap=True
        )

    def _frame(self) -> Group:
        board = self._board
        step, loss = board.history.reached(), board.loss()
        facts = Text.assemble(
            ("step ", "dim"),
            f"{step}/{board.steps}   ",
            ("loss ", "dim"),
            f"{'-' if loss is None else f'{loss:.3f}'}   ",
            ("protected ", "dim"),
            f"{_number(board.watermark)}   ",
            ("generation ", "dim"),
            f"{board.generation}   ",
            ("job ", "dim"),
            board.phase,
        )
        parts: list[RenderableType] = [Text(self._title, style="bold"), facts]
        done = step
        if board.control_step is not None:
            done = board.control_step
            parts.append(Text.assemble(("control ", "dim"), f"step {done}/{board.steps}"))
        parts += [_bar(done, board.steps), self._nodes()]
        parts += [Text(self._moment(event)) for event in board.events[-EVENTS_SHOWN:]]
        return Group(*parts, Text(f"> {board.now}", "bold"))

    def _moment(self, event: Event) -> str:
        first = (event.text or event.name).partition("\n")[0]
        return f"{event.at_s - self._began_s:7.2f} s  {first}"

    def _nodes(self) -> Table:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for name in ("node", "state", "group", "rank", "step", "loss", ""):
            table.add_column(name, min_width=6)
        for name, node in self._board.nodes.items():
            table.add_row(*self._row(name, node))
        return table

    def _row(self, name: str, node: NodeView) -> list[Text]:
        steps = [self._board.history.last(rank) for rank in node.ranks]
        cells = [
            name,
            "",
            "-" if node.group is None else str(node.group),
            ",".join(map(str, node.ranks)) or "-",
            ",".join("-" if last is None else str(last[0]) for last in steps) or "-",
            ",".join("-" if last is None else f"{last[1]:.3f}" for last in steps) or "-",
        ]
        row = [Text(cell) for cell in cells]
        row[1] = Text(node.state, STATE_STYLE.get(node.state, ""))
        return [*row, Text(node.harm, "bold red")]


def _bar(done: int, steps: int) -> Text:
    full = BAR_WIDTH * done // steps
    return Text.assemble(("━" * full, "green"), ("━" * (BAR_WIDTH - full), "bright_black"))


def _number(step: int | None) -> str:
    return "-" if step is None else f"step {step}"
