"""No interleaving of capture, seal, fold, watermark and one loss leaves the job without a common step.

Every reachable state within the bounds is visited, and in each of them every node is lost
once; what the survivors hold must give back a step that is not older than any watermark
that anybody ever knew.  The same search finds the loss in three rules that look reasonable.
"""

from __future__ import annotations

import pytest
from protocol_model import Bounds, Fault, Search

SMALL = [
    pytest.param(Bounds(groups=2, nodes=2, parity=1, slots=2, steps=3), 1, id="2 groups, 2 slots"),
    pytest.param(Bounds(groups=1, nodes=2, parity=1, slots=3, steps=4), 1, id="1 group, 3 slots"),
    pytest.param(
        Bounds(groups=1, nodes=3, parity=2, slots=2, steps=3), 2, id="1 group of 3, m = 2, two lost"
    ),
]
LARGE = [
    pytest.param(Bounds(groups=1, nodes=3, parity=1, slots=3, steps=3), 1, id="1 group of 3, 3 slots"),
    pytest.param(Bounds(groups=2, nodes=2, parity=1, slots=3, steps=4), 1, id="2 groups, 3 slots"),
    pytest.param(Bounds(groups=3, nodes=2, parity=1, slots=2, steps=3), 1, id="3 groups, 2 slots"),
    pytest.param(Bounds(groups=2, nodes=3, parity=1, slots=2, steps=3), 1, id="2 groups of 3, 2 slots"),
]


def _none_is_lost(bounds: Bounds, losses: int) -> None:
    search = Search(bounds, losses=losses)
    found = search.run()
    print(f"{bounds}: {search.states} states, {search.transitions} transitions, {search.checks} losses")
    assert found is None, _readable(found)
    assert search.deepest_watermark >= bounds.steps - 1, "the search never came to a release"


def _readable(found: object) -> str:
    # Nodes of a group are alike and groups are alike: a name stands for one of them.
    trace, lost, why = found  # type: ignore[misc]
    return "\n".join([*trace, f"then {', '.join(lost)} is lost: {why}"])


@pytest.mark.parametrize(("bounds", "losses"), SMALL)
def test_every_interleaving_keeps_a_common_step(bounds: Bounds, losses: int) -> None:
    _none_is_lost(bounds, losses)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("bounds", "losses"), LARGE)
def test_every_interleaving_of_larger_jobs_keeps_a_common_step(bounds: Bounds, losses: int) -> None:
    _none_is_lost(bounds, losses)


@pytest.mark.parametrize("fault", [Fault.SINGLE_PARITY, Fault.RELEASE_ON_SEAL, Fault.RELEASE_BY_GROUP])
def test_the_search_finds_what_is_wrong_with_a_reasonable_looking_rule(fault: Fault) -> None:
    search = Search(Bounds(groups=2, nodes=2, parity=1, slots=2, steps=2), fault)
    found = search.run()
    assert found is not None, f"{fault.value}: nothing found in {search.states} states"
    print(f"{fault.value}: after {len(found.trace)} actions, {search.states} states\n{_readable(found)}")
