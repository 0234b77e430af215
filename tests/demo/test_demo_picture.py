"""The picture: what a terminal shows of a board."""

from __future__ import annotations

import asyncio
import io
import time

import pytest
from rich.console import Console

from ckptd.demo import picture as module
from ckptd.demo.board import Board, NodeView
from ckptd.demo.figures import Event
from ckptd.demo.history import History
from ckptd.demo.picture import Picture
from ckptd.errors import DeadlineExceeded


def board() -> Board:
    view = Board(History(2), steps=50, nodes={"node0": NodeView(), "node1": NodeView(), "node2": NodeView()})
    for rank in (0, 1):
        view.record(1, {"event": "begin", "rank": rank, "t": 0.0, "step": 0, "rung": "none"})
        view.record(1, {"event": "step", "rank": rank, "t": 1.0, "step": 7, "loss": (2.5 + rank).hex()})
    view.nodes["node0"] = NodeView("active", (0,), 0)
    view.nodes["node1"] = NodeView("dead", (1,), 0, "killed, memory removed")
    view.nodes["node2"] = NodeView("standby")
    view.generation, view.watermark, view.phase = 1, 6, "running"
    view.events.append(Event("incident", time.monotonic(), "incident: node node1 died"))
    view.now = "incident: node node1 died"
    return view


def rendered(shown: Picture) -> str:
    out = io.StringIO()
    Console(file=out, width=110).print(shown._frame())
    return out.getvalue()


def test_a_frame_shows_nodes_steps_loss_protection_and_what_happens() -> None:
    text = rendered(Picture(board(), "ckptd demo --kill node"))
    assert "step 7/50" in text
    assert "loss 3.000" in text
    assert "protected step 6" in text
    rows = {line.split()[0]: line for line in text.splitlines() if line.startswith("node")}
    assert rows["node0"].split() == ["node0", "active", "0", "0", "7", "2.500"]
    assert "killed, memory removed" in rows["node1"]
    assert rows["node2"].split()[:3] == ["node2", "standby", "-"]
    assert "> incident: node node1 died" in text


def test_a_frame_of_the_control_shows_its_steps() -> None:
    view = board()
    view.control_step = 21
    assert "control step 21/50" in rendered(Picture(view, "t"))


def test_elsewhere_every_event_is_a_line_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "REFRESH_S", 0.001)

    async def body() -> None:
        view = board()
        task = asyncio.create_task(Picture(view, "t").show())
        await asyncio.sleep(0.01)
        view.tell("one", "the first thing")
        await asyncio.sleep(0.01)
        view.tell("two", "told just before the end")
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(body())
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("the first thing") == told.err.count("told just before the end") == 1


def test_waiting_names_what_was_waited_for() -> None:
    async def body() -> None:
        view = board()
        await view.until(lambda: True, 1.0, "nothing")
        await view.until(lambda: False, 0.01, "the moon")

    with pytest.raises(DeadlineExceeded, match=r"for the moon.*node1 died"):
        asyncio.run(body())
