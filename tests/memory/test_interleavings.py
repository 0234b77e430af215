"""No reachable state without a common step: every interleaving, after every loss that the parity covers.

The rules are the product's (`releasable`, `next_schedule`, `newest_recoverable`, ...); the
order in which nodes capture, seal, exchange, fold, report and learn is anything at all.
Every state is judged after the loss of every set of at most m nodes of each group.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
from protocol_losses import Losses
from protocol_model import Bounds, Fault, Held, Nodes, Phase
from protocol_search import Result, Search

from ckptd.memory.inventory import Unrecoverable


def searched(bounds: Bounds, directory: Path, *, keep_seen: bool = False) -> Result:
    """The result of a search that found no loss, printed."""
    result = Search(bounds, directory).run(keep_seen=keep_seen)
    shape = f"{bounds.groups} groups of {bounds.nodes}, m={bounds.parity}, {bounds.slots} slots"
    print(f"{result}: {shape}, {bounds.steps} steps")
    assert result.loss is None, f"a protected step is lost\n{result.loss}"
    assert not result.stuck, "protection stands still\n" + "\n".join(result.stuck[0])
    return result


@pytest.mark.parametrize(
    "bounds",
    [
        pytest.param(Bounds(groups=2, slots=2, steps=4), id="2-groups-2-slots"),
        pytest.param(Bounds(groups=2, slots=3, steps=2, eager=True), id="2-groups-3-slots"),
        pytest.param(Bounds(groups=3, slots=2, steps=2), id="3-groups-2-slots"),
        pytest.param(Bounds(groups=1, nodes=3, slots=3, steps=2, eager=True), id="a-group-of-3"),
        pytest.param(Bounds(groups=1, nodes=3, parity=2, steps=2, eager=True), id="every-pair-of-3"),
        pytest.param(Bounds(groups=1, nodes=4, parity=2, steps=2, eager=True), id="every-pair-of-4"),
    ],
)
def test_every_state_keeps_a_common_step(bounds: Bounds, tmp_path: Path) -> None:
    result = searched(bounds, tmp_path)
    assert result.watermarks == set(range(1, bounds.steps + 1))


def test_steps_that_are_given_up_cost_no_protected_one(tmp_path: Path) -> None:
    """Any rank may give a step up, before or after its image was taken, or for damage found when sending."""
    result = searched(Bounds(groups=2, steps=2, aborts=True), tmp_path)
    assert result.watermarks == {1, 2}


@pytest.mark.parametrize(
    "bounds",
    [
        pytest.param(Bounds(groups=1, steps=2, aborts=True, restarts=1, reorder=True), id="daemon"),
        pytest.param(Bounds(groups=1, steps=2, aborts=True, takeovers=1, reorder=True), id="coordinator"),
    ],
)
def test_a_successor_without_a_memory_costs_no_protected_step(bounds: Bounds, tmp_path: Path) -> None:
    """A new daemon, or a new coordinator, while schedules of the old one arrive in any order."""
    searched(bounds, tmp_path)


def test_before_the_first_protection_recovery_may_wait_for_the_dead(tmp_path: Path) -> None:
    """One group has folded step 1, the other holds nothing yet, and one of the first is lost.

    Nothing was protected, so a fresh start would lose nothing; but holding nothing is also
    what a survivor looks like whose memory was lost, and so it denies nothing.
    """
    result = searched(Bounds(groups=2, steps=1), tmp_path)
    assert result.cautious is not None
    print(f"1 way to a recovery that waits:\n{result.cautious}")
    assert result.cautious.claimed is None
    assert isinstance(result.cautious.found, Unrecoverable)
    assert searched(Bounds(groups=1, steps=1), tmp_path).cautious is None


@pytest.mark.parametrize("fault", [fault for fault in Fault if fault is not Fault.NONE])
def test_the_search_finds_what_a_wrong_rule_loses(fault: Fault, tmp_path: Path) -> None:
    result = Search(Bounds(groups=2, slots=2, steps=2, fault=fault), tmp_path).run()
    assert result.loss is not None, f"{result}, and no loss although {fault.value}"
    print(f"{result.states:,} states until a loss, where {fault.value}:\n{result.loss}")
    assert result.loss.claimed == 1
    assert isinstance(result.loss.found, Unrecoverable)
    assert len(result.loss.dead) == 1


@pytest.mark.parametrize(
    "bounds",
    [
        Bounds(groups=2, steps=1),
        Bounds(groups=1, steps=2, slots=3),
        Bounds(groups=1, nodes=3, steps=1),
        Bounds(groups=1, steps=1, aborts=True, restarts=1, takeovers=1, reorder=True),
    ],
    ids=["groups", "slots", "of-3", "trouble"],
)
def test_the_reductions_hide_no_state(bounds: Bounds, tmp_path: Path) -> None:
    """Without them there are more states, which differ in names and in stale reports only."""
    (tmp_path / "exact").mkdir()
    reduced = searched(bounds, tmp_path, keep_seen=True)
    exact = searched(dataclasses.replace(bounds, exact=True), tmp_path / "exact", keep_seen=True)
    assert exact.states > reduced.states
    assert exact.seen == reduced.seen


@pytest.mark.parametrize(
    "bounds",
    [Bounds(groups=2, steps=2), Bounds(groups=1, steps=3, slots=3), Bounds(groups=1, nodes=3, steps=1)],
    ids=["groups", "slots", "of-3"],
)
def test_what_is_taken_eagerly_hides_nothing_that_recovery_sees(bounds: Bounds, tmp_path: Path) -> None:
    (tmp_path / "eager").mkdir()
    patient = searched(bounds, tmp_path, keep_seen=True)
    eager = searched(dataclasses.replace(bounds, eager=True), tmp_path / "eager", keep_seen=True)
    assert eager.states < patient.states
    assert eager.shown == patient.shown


def test_a_loss_is_every_set_that_the_parity_covers(tmp_path: Path) -> None:
    """Nothing held anywhere is a fresh start, whoever is lost; two groups may each lose one."""
    bounds = Bounds(groups=2)
    nodes = Nodes(bounds, tmp_path)
    losses = Losses(bounds, nodes)
    assert losses.each == len(list(itertools.product(range(3), repeat=2)))
    assert losses.worst(((),) * 4, False).step == 0
    protected = ((1, True, True),)
    assert losses.worst((protected,) * 4, True).step == 1
    assert losses.worst((protected, protected, protected, ((1, True, False),)), True).step == -1
    told = nodes.inventory([Held(1, Phase.SEALED, folded=True)], 1, 0)
    assert [(fact.position, fact.sealed, fact.folded) for fact in told] == [("b0", True, True)]
    nodes.close()


@pytest.mark.soak
@pytest.mark.timeout(14400)
@pytest.mark.parametrize(
    "bounds",
    [
        pytest.param(Bounds(groups=2, slots=3, steps=3), id="2-groups-3-slots"),
        pytest.param(Bounds(groups=2, slots=3, steps=4, eager=True), id="2-groups-3-slots-4-steps"),
        pytest.param(Bounds(groups=3, slots=2, steps=4), id="3-groups-2-slots"),
        pytest.param(Bounds(groups=3, slots=3, steps=2, eager=True), id="3-groups-3-slots"),
        pytest.param(Bounds(groups=2, nodes=3, slots=2, steps=2, eager=True), id="groups-of-3"),
        pytest.param(Bounds(groups=1, nodes=4, parity=2, slots=2, steps=4), id="every-pair-of-4"),
        pytest.param(Bounds(groups=2, steps=3, aborts=True), id="given-up"),
        pytest.param(Bounds(groups=2, steps=2, aborts=True, restarts=1, reorder=True), id="daemon"),
        pytest.param(Bounds(groups=2, steps=1, aborts=True, takeovers=1, reorder=True), id="coordinator"),
    ],
)
def test_larger_bounds(bounds: Bounds, tmp_path: Path) -> None:
    searched(bounds, tmp_path)
