"""Groups: a partition, even, large enough, spread over failure domains, and the same for everybody."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.erasure.groups import GROUP_NODES, MAX_PARITY, cut, protected
from ckptd.erasure.stripe import Geometry


def plain(count: int) -> list[tuple[str, str]]:
    return [(f"n{i}", "") for i in range(count)]


def racks(*sizes: int) -> list[tuple[str, str]]:
    return [(f"r{rack}n{i}", f"rack{rack}") for rack, size in enumerate(sizes) for i in range(size)]


def worst(members: list[tuple[str, str]], groups: tuple[tuple[str, ...], ...]) -> int:
    """Most nodes of one named domain in one group."""
    domain = dict(members)
    return max(max(Counter(domain[node] for node in group).values()) for group in groups)


@pytest.mark.parametrize(
    ("count", "parity", "sizes"),
    [
        (2, 1, [2]),
        (4, 1, [4]),
        (5, 2, [5]),
        (8, 2, [8]),
        (9, 1, [5, 4]),
        (9, 6, [9]),  # two groups would be too small for parity 6
        (16, 2, [8, 8]),
        (17, 2, [6, 6, 5]),
        (30, 9, [10, 10, 10]),  # parity + 1 is more than the usual size
        (100, 1, [8] * 9 + [7] * 4),
    ],
)
def test_sizes(count: int, parity: int, sizes: list[int]) -> None:
    groups = cut(plain(count), parity)
    assert sorted(map(len, groups), reverse=True) == sizes
    assert all(protected(group, parity) for group in groups)


def test_too_few_nodes_are_one_unprotected_group() -> None:
    assert cut(plain(2), 2) == (("n0", "n1"),)
    assert not protected(("n0", "n1"), 2)
    assert cut(plain(1), 1) == (("n0",),)
    assert cut(plain(3), 0) == (("n0", "n1", "n2"),)
    assert not protected(("n0", "n1", "n2"), 0)
    assert cut([], 1) == ()


def test_order_is_rank_order() -> None:
    assert cut(plain(10), 1) == (("n0", "n2", "n4", "n6", "n8"), ("n1", "n3", "n5", "n7", "n9"))
    members = [("c", "x"), ("a", "y"), ("b", "x"), ("d", "y")]
    assert cut(members, 1) == (("c", "a"), ("b", "d"))


def test_racks_are_kept_apart() -> None:
    members = racks(2, 2, 2, 2)
    assert cut(members, 1) == (("r0n0", "r1n0", "r2n0", "r3n0"), ("r0n1", "r1n1", "r2n1", "r3n1"))
    for halves in (racks(8, 8), racks(3, 1, 1, 1)):  # down to mirrors across the racks
        assert worst(halves, cut(halves, 1)) == 1


def test_a_rack_that_cannot_be_kept_apart_stays_within_parity() -> None:
    members = racks(5, 5, 2)
    groups = cut(members, 2)  # at most four groups of three, so a rack of five meets itself
    assert len(groups) == 3 and worst(members, groups) == 2


def test_a_rack_that_holds_everything_changes_nothing() -> None:
    assert [len(group) for group in cut(racks(16), 1)] == [8, 8]
    assert [len(group) for group in cut(racks(4), 1)] == [4]


def test_an_empty_domain_is_no_named_one() -> None:
    assert len(cut([("a", "x"), ("b", "x"), ("c", "y"), ("d", "z")], 1)) == 2
    assert len(cut([("a", ""), ("b", ""), ("c", "y"), ("d", "z")], 1)) == 1
    assert len(cut([("x", ""), ("b", "x"), ("c", ""), ("d", "")], 1)) == 1


def test_mistakes_are_refused() -> None:
    with pytest.raises(ValueError, match="listed twice: n1"):
        cut([("n1", ""), ("n2", ""), ("n1", "x")], 1)
    for parity in (-1, 128):
        with pytest.raises(ValueError, match=f"parity must be 0..127; found {parity}"):
            cut(plain(3), parity)


MEMBERS = st.lists(st.sampled_from(["", "a", "b", "c", "d", "e"]), min_size=1, max_size=60).map(
    lambda domains: [(f"n{i}", domain) for i, domain in enumerate(domains)]
)


@settings(deadline=None, max_examples=200)
@given(MEMBERS, st.integers(1, 12))
def test_laws(members: list[tuple[str, str]], parity: int) -> None:
    groups = cut(members, parity)
    assert groups == cut(list(members), parity)
    rank = {node: i for i, (node, _) in enumerate(members)}
    assert sorted(node for group in groups for node in group) == sorted(rank)
    assert all(list(group) == sorted(group, key=rank.__getitem__) for group in groups)
    assert list(groups) == sorted(groups, key=lambda group: rank[group[0]])
    sizes = [len(group) for group in groups]
    assert max(sizes) - min(sizes) <= 1
    most = len(members) // (parity + 1)
    if most < 1:
        assert len(groups) == 1 and not protected(groups[0], parity)
        return
    assert all(protected(group, parity) for group in groups)
    assert max(sizes) <= GROUP_NODES or len(groups) == most, "large only where smaller would not protect"
    for domain, size in Counter(domain for _, domain in members if domain).items():
        counts = [sum(dict(members)[node] == domain for node in group) for group in groups]
        assert max(counts) - min(counts) <= 1
        if size <= most:
            assert max(counts) <= 1, "two nodes of one domain met where that can be avoided"
        elif -(-size // parity) <= most:
            assert max(counts) <= parity, "the loss of a domain could have been covered"


def test_every_group_has_a_geometry() -> None:
    for parity in (1, 2, 5, 63, MAX_PARITY):
        for count in range(parity + 1, 600, 7):
            for group in cut(plain(count), parity):
                Geometry(len(group), parity)
