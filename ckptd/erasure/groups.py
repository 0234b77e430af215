"""Which nodes protect each other.

Groups are cut per generation from the roster by a pure function, so every party
derives the same ones.  Two wishes pull on the number of groups: large groups need
less memory (a node stores m / (n - m) images of parity), and small ones are more, so
that the nodes of a failure domain can be kept apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

# A group of 8 with one parity stores 1/7 image of parity per node; larger groups save
# little more, and a decode reads from more nodes.
GROUP_NODES = 8

# Groups stay below 2 * (parity + 1) nodes when parity is large, and a code has at most 255 symbols.
MAX_PARITY = 127


def cut(members: Sequence[tuple[str, str]], parity: int) -> tuple[tuple[str, ...], ...]:
    """The groups: every node in exactly one, in rank order in its group, groups by their first node.

    Sizes differ by at most one, and are at most `GROUP_NODES` where that leaves
    parity + 1 nodes in each.  There are more and smaller groups where that keeps two
    nodes of one domain out of one group or, where that is impossible, keeps a
    domain's loss within what a group's parity covers.  A domain too large for either
    is spread evenly and changes nothing else.

    Fewer than parity + 1 nodes, or parity 0, give one group of all that protects
    nothing: see `protected`.  No members give no group.

    Args:
        members: (node, failure domain) in rank order; an empty domain means the node's own.
        parity: nodes of a group that may vanish (m).

    Raises: ValueError: parity not in 0..127, or a node listed twice.
    """
    if not 0 <= parity <= MAX_PARITY:
        raise ValueError(f"parity must be 0..{MAX_PARITY}; found {parity}")
    twice = [node for node, count in Counter(node for node, _ in members).items() if count > 1]
    if twice:
        raise ValueError(f"a node is one member of a roster; listed twice: {', '.join(twice)}")
    if not members:
        return ()
    domains = _domains(members)
    count = _group_count([len(ranks) for ranks in domains], parity)
    # Dealt one by one, with the nodes of a domain next to each other: any `count` cards in a
    # row go to different groups, so each domain is spread as evenly as can be, and so are sizes.
    dealt = [rank for ranks in domains for rank in ranks]
    groups = sorted(sorted(dealt[start::count]) for start in range(count))
    return tuple(tuple(members[rank][0] for rank in group) for group in groups)


def protected(group: Sequence[str], parity: int) -> bool:
    """Whether a group of `cut` survives the loss of a node."""
    return 1 <= parity < len(group)


def _domains(members: Sequence[tuple[str, str]]) -> list[list[int]]:
    """Positions in `members` by domain, both in rank order."""
    by_domain: dict[tuple[str, str], list[int]] = {}
    for rank, (node, domain) in enumerate(members):
        # A node's own domain is no named one, even if a domain has the node's name.
        key = (domain, "") if domain else ("", node)
        by_domain.setdefault(key, []).append(rank)
    return list(by_domain.values())


def _group_count(domain_sizes: Sequence[int], parity: int) -> int:
    nodes = sum(domain_sizes)
    if parity == 0:
        return 1
    most = nodes // (parity + 1)  # every group keeps parity + 1 nodes
    if most < 2:
        return 1
    count = -(-nodes // GROUP_NODES)
    for size in domain_sizes:
        # In `size` groups no two of its nodes meet; in size / parity, never more than parity covers.
        for enough in (size, -(-size // parity)):
            if enough <= most:
                count = max(count, enough)
                break
    return min(count, most)
