"""From records and events to figures, text and the JSON object."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ckptd.demo import figures
from ckptd.demo.figures import Event
from ckptd.demo.history import History
from ckptd.demo.result import SCHEMA, DemoResult

FIELDS = {
    "schema",
    "kill",
    "nodes",
    "parity",
    "seed",
    "steps",
    "killed_at_step",
    "resumed_at_step",
    "lost_steps",
    "rung",
    "detected_s",
    "planned_s",
    "transferred_s",
    "restart_s",
    "resumed_s",
    "step_s",
    "lag_steps_max",
    "dropped",
    "blocked_s",
    "final_digest",
    "control_digest",
    "identical",
}


def tell(history: History, generation: int, rank: int, event: str, t: float, **more: Any) -> None:
    history.add(generation, {"event": event, "rank": rank, "t": t, **more})


def steps(history: History, generation: int, rank: int, first: int, last: int, t: float, dt: float) -> None:
    for step in range(first, last + 1):
        tell(history, generation, rank, "step", t, step=step, loss=float(step).hex(), value=float(step))
        statistics = {"lag_steps": step % 3, "dropped": {"late": 1}, "blocked_s": 0.5 * (rank + 1)}
        tell(history, generation, rank, "kept", t, step=step, statistics=statistics)
        t += dt


def two_generations() -> tuple[History, list[Event]]:
    """Two ranks: rank 0 completes 10 steps, rank 1 dies with 9; both go on from 8 to 12."""
    history = History(2)
    for rank, last in ((0, 10), (1, 9)):
        tell(history, 1, rank, "begin", 0.0, step=0, rung="none")
        steps(history, 1, rank, 1, last, t=1.0, dt=0.1)
    for rank, rung in ((0, "own-memory"), (1, "parity")):
        tell(history, 2, rank, "started", 5.0)
        tell(history, 2, rank, "imported", 6.0)
        tell(history, 2, rank, "built", 6.5)
        tell(history, 2, rank, "begin", 6.75, step=8, rung=rung)
        steps(history, 2, rank, 9, 12, t=7.0 + rank, dt=0.1)
        tell(history, 2, rank, "finished", 9.0, digests={"weights": f"w{rank}", "optimizer": "o"})
    names = ("node-suspect", "incident", "planned", "committed", "transferred", "started", "running")
    times = (2.0625, 2.125, 2.25, 2.5, 2.75, 3.0, 8.5)
    events = [Event(name, at, name) for name, at in zip(names, times, strict=True)]
    return history, [Event("incident", 0.5, "an earlier one"), *events]


def test_a_step_counts_when_every_rank_has_completed_it() -> None:
    history, _ = two_generations()
    assert history.completed(1) == 9
    assert history.completed(2) == history.reached() == 12
    assert history.completed(3) is None


def test_the_figures_of_a_recovery() -> None:
    history, events = two_generations()
    back = figures.recovery(events, history, struck_s=2.0, generation=1)
    assert back is not None
    assert (back.killed_at_step, back.resumed_at_step, back.lost_steps) == (9, 8, 1)
    assert back.rung == "parity"
    assert (back.detected_s, back.planned_s, back.transferred_s) == (0.0625, 0.4375, 0.25)
    # The phases touch each other: nothing between strike and first step is left out but the start order.
    assert back.own_s == 0.75
    assert (back.restart_s, back.resumed_s) == (5.0, 6.0)
    assert history.startup(2) == {
        "imports": 1.0,
        "process group and model": 0.5,
        "state": 0.25,
        "first step": 1.25,
    }


def test_no_figures_before_the_job_is_back() -> None:
    history, events = two_generations()
    assert figures.recovery(events, history, struck_s=8.9, generation=2) is None


def test_step_time_losses_and_totals() -> None:
    history, _ = two_generations()
    assert history.step_s() == pytest.approx(0.1)
    assert history.loss(2, 12) == 12.0
    assert history.last(1) == (12, 12.0)
    totals = history.capture_totals()
    # dropped and blocked_s are counted by a process: they add up over generations.
    assert (totals.lag_steps_max, totals.dropped, totals.blocked_s) == (2, 2, 2.0)


def test_a_step_done_again_with_another_loss_is_a_difference() -> None:
    history, _ = two_generations()
    final = history.finished()
    assert final is not None
    control = {rank: {step: (float(step).hex(),) for step in range(1, 13)} for rank in (0, 1)}
    assert figures.differences(final, final, history.losses(), control) == []
    steps(history, 3, 1, 9, 9, t=20.0, dt=0.1)
    tell(history, 3, 1, "step", 21.0, step=10, loss=(0.5).hex(), value=0.5)
    found = figures.differences(final, final, history.losses(), control)
    assert found == ["rank 1: the loss of 1 steps, the first of them 10"]


def test_what_an_older_generation_still_says_counts_for_nothing() -> None:
    history, events = two_generations()
    before = figures.recovery(events, history, struck_s=2.0, generation=1), history.capture_totals()
    steps(history, 1, 1, 10, 11, t=30.0, dt=0.1)
    tell(history, 1, 1, "kept", 31.0, step=11, statistics={"lag_steps": 9, "dropped": {}, "blocked_s": 40.0})
    assert (figures.recovery(events, history, struck_s=2.0, generation=1), history.capture_totals()) == before


def test_another_digest_names_rank_and_part() -> None:
    final = {0: {"weights": "a", "optimizer": "b"}, 1: {"weights": "c", "optimizer": "d"}}
    control = {0: {"weights": "a", "optimizer": "x"}, 1: {"weights": "c", "optimizer": "d"}}
    assert figures.differences(final, control, {}, {}) == ["rank 0: optimizer"]
    assert figures.differences({0: final[0]}, {0: final[0], 1: final[1]}, {}, {}) != []
    assert figures.combined_digest(final) != figures.combined_digest(control)


def result(different: tuple[str, ...] = (), killed: bool = True) -> DemoResult:
    history, events = two_generations()
    back = figures.recovery(events, history, struck_s=2.0, generation=1)
    return DemoResult(
        kill="node" if killed else "none",
        nodes=2,
        parity=1,
        seed=5,
        steps=12,
        recovery=back if killed else None,
        step_s=0.1,
        capture=history.capture_totals(),
        final_digest="f",
        control_digest="f",
        different=different,
        timeline=tuple(figures.timeline(events, 2.0)),
        startup=history.startup(2),
    )


def test_the_json_object_has_exactly_the_fields_of_its_schema() -> None:
    for killed in (True, False):
        value = json.loads(result(killed=killed).to_json())
        assert set(value) == FIELDS
        assert value["schema"] == SCHEMA == "ckptd.demo/1"
        assert value["identical"] is True
        absent = {name for name, found in value.items() if found is None}
        assert absent == (
            set()
            if killed
            else {
                "killed_at_step",
                "resumed_at_step",
                "lost_steps",
                "rung",
                "detected_s",
                "planned_s",
                "transferred_s",
                "restart_s",
                "resumed_s",
            }
        )


def test_only_identical_is_success() -> None:
    assert result().exit_code == 0
    other = result(("rank 0: weights",))
    assert other.exit_code == 1
    assert json.loads(other.to_json())["identical"] is False
    assert "DIFFERENT" in other.text()
    assert "rank 0: weights" in other.text()


def test_the_text_tells_what_it_cost() -> None:
    text = result().text()
    assert "   +0.062 s  node-suspect" in text
    assert "1 completed steps done again, state from parity" in text
    assert "IDENTICAL: after 12 steps" in text
