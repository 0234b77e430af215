"""Which checkpoint is loaded into which layout: all pairs, or few that cover every kind and every size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import product

from reshard_model import Layout

Pair = tuple[Layout, Layout]  # saved in the first, loaded into the second


def pairs_of(chosen: Sequence[Layout], every: bool) -> list[Pair]:
    """The pairs to be tried; where not every one, then such that

    each layout loads its own checkpoint, each is once the source and once the target of another, and each
    pair of numbers of ranks and each pair of kinds (FSDP2 into HSDP, ...) occurs.
    """
    if every:
        return list(product(chosen, chosen))
    picked: list[Pair] = [(layout, layout) for layout in chosen]
    kinds = {(layout.kind, layout.kind) for layout in chosen}
    sources, targets = Counter[Layout](), Counter[Layout]()

    def pick(candidates: Sequence[Pair]) -> None:
        def worth(pair: Pair) -> tuple[bool, int]:
            source, target = pair
            return (source.kind, target.kind) not in kinds, -sources[source] - targets[target]

        if candidates:
            source, target = best = max(candidates, key=worth)  # the first of equals
            picked.append(best)
            kinds.add((source.kind, target.kind))
            sources[source] += 1
            targets[target] += 1

    others = [(source, target) for source, target in product(chosen, chosen) if source != target]
    worlds = sorted({layout.ranks for layout in chosen})
    for sizes in product(worlds, worlds):
        pick([(source, target) for source, target in others if (source.ranks, target.ranks) == sizes])
    for two in product(sorted({layout.kind for layout in chosen}), repeat=2):
        if two not in kinds:
            pick([(source, target) for source, target in others if (source.kind, target.kind) == two])
    for layout in chosen:
        if not sources[layout]:
            pick([pair for pair in others if pair[0] == layout and not targets[pair[1]]] or others)
        if not targets[layout]:
            pick([pair for pair in others if pair[1] == layout])
    return picked
