"""The meaning of a layout, confirmed by references: what the proof cannot know.

A layout with k and v exchanged is a perfect bijection.  What tells it from the right one is something else
that knows the logical tensors: fingerprints recorded under their names (a universal checkpoint's manifest has
them), or a second checkpoint in another layout.  Each tensor's fingerprint is read through the layout and
compared.

A tensor is *confirmed* if at least one reference has exactly these bits under this name and none has others.
Equality says nothing where a wrong layout would give it as well, and then the tensor stays unconfirmed, with
the reason: its elements are all equal, or it equals another tensor (norms of a fresh model, zero moments), or
the second checkpoint is read by the very same rule (k and v exchanged in both agree; where the meshes differ
it may contradict all the same).  Without a reference nothing is confirmed.
`prove(placement, references=confirmation.confirmed)` puts it into the proof's report.

Replicas are compared, never assumed equal; a fingerprint finds mistakes and damage, not malice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from ckptd.errors import LayoutRefused
from ckptd.layout.distinct import distinct
from ckptd.layout.expressions import Rule
from ckptd.layout.fingerprint import Kernel
from ckptd.layout.resolve import Placement
from ckptd.layout.sums import Read, Sum, Sums, read_sums, transposed, whole

# A message names so many tensors.
SHOWN = 5

# Fingerprint -> the tensors of the placement that have it, by references or as found.
Same = Mapping[int, frozenset[str]]


@dataclass(frozen=True)
class Expected:
    """What a reference says of a tensor, and where it knows them, more."""

    fingerprint: int
    shape: tuple[int, ...] | None = None
    width: int | None = None  # bytes of an element
    rule: Rule | None = None  # by which it reads the tensor: the same rule has the same mistakes


@dataclass(frozen=True)
class Reference:
    """Something that knows logical tensors by their names."""

    name: str  # for messages: "the manifest of step 7"
    tensors: Mapping[str, Expected]


@dataclass(frozen=True)
class Contradiction:
    """A tensor that is something else than a reference says."""

    tensor: str
    reference: str
    expected: int  # fingerprint
    found: int
    cover: int
    why: str = ""  # what is there instead, where that can be told

    def __str__(self) -> str:
        said = f"{self.tensor}: {self.reference} has {self.expected:016x}, and here is {self.found:016x}"
        return f"{said} ({self.why})" if self.why else said


@dataclass(frozen=True)
class Difference:
    """A tensor whose replicas differ, though the layout declares them equal."""

    tensor: str
    fingerprints: Mapping[int, int]  # cover -> fingerprint
    places: Mapping[int, tuple[int, ...]]  # cover -> the places that hold it

    def __str__(self) -> str:
        shown = ", ".join(
            f"{found:016x} on place{'s' if len(self.places[cover]) > 1 else ''} "
            + ", ".join(map(str, self.places[cover][:SHOWN]))
            + (" ..." if len(self.places[cover]) > SHOWN else "")
            for cover, found in list(self.fingerprints.items())[:SHOWN]
        )
        return f"the replicas of {self.tensor} differ: {shown}"


@dataclass(frozen=True)
class Confirmation:
    """What references say of a layout.  `str(confirmation)` is a few lines for the user."""

    layout: str
    confirmed: frozenset[str]
    contradicted: tuple[Contradiction, ...]
    differing: tuple[Difference, ...]
    unconfirmed: Mapping[str, str]  # tensor -> why; none is confirmed or contradicted

    def __str__(self) -> str:
        lines = [f"{self.layout}: {len(self.confirmed)} tensors confirmed by references"]
        if self.unconfirmed:
            lines.append(f"layout unconfirmed: {len(self.unconfirmed)} tensors")
            by_reason = defaultdict(list)
            for name, why in self.unconfirmed.items():
                by_reason[why.partition(":")[0]].append(name)
            lines.extend(f"  {why}: {_listed(names)}" for why, names in by_reason.items())
        if self.contradicted:
            lines.append(f"layout contradicted: {len({found.tensor for found in self.contradicted})} tensors")
        lines.extend(f"  {found}" for found in self.contradicted)
        lines.extend(map(str, self.differing))
        return "\n".join(lines)

    def refuse(self) -> None:
        """Refuses a layout that a reference contradicts.  Raises: LayoutRefused."""
        if self.contradicted:
            names = list(dict.fromkeys(found.tensor for found in self.contradicted))
            raise LayoutRefused(
                f"the layout {self.layout} is contradicted: {_listed(names)}",
                tensor=names[0],
                why=str(self.contradicted[0]),
                next="check the order of pieces, of indices and of grids, and which matrices are transposed",
            )


def confirm(
    placement: Placement,
    read: Read,
    references: Iterable[Reference],
    *,
    names: Iterable[str] | None = None,
    every_replica: bool = True,
    kernel: Kernel | None = None,
) -> Confirmation:
    """Reads tensors through the layout, and says which of them references confirm or contradict.

    Args:
        references: `recorded(...)`, `second(...)`; with none, nothing is confirmed.
        names: only these tensors are looked at; the others stay unconfirmed.
        every_replica: False reads one replica, and neither confirms nor compares the others.
        kernel: as of `fingerprint`.

    Raises:
        LayoutRefused: an array is too short for its boxes.
        ValueError: a name is unknown, or an array is not flat, or not of its tensor's dtype.
    """
    found = read_sums(placement, read, names=names, every_replica=every_replica, kernel=kernel)
    judged = judge(placement, found, tuple(references))
    contradicted = tuple(_explained(placement, read, each) for each in judged.contradicted)
    return replace(judged, contradicted=contradicted)


def recorded(
    name: str,
    fingerprints: Mapping[str, int],
    *,
    shapes: Mapping[str, Sequence[int]] | None = None,
    widths: Mapping[str, int] | None = None,
) -> Reference:
    """A reference of fingerprints that were recorded, such as a manifest's.

    Give `widths` (bytes of an element) where they are known: a float32 master is no reference for bfloat16.
    """
    said: dict[str, Expected] = {}
    for tensor, number in fingerprints.items():
        shape = None if shapes is None or tensor not in shapes else tuple(shapes[tensor])
        said[tensor] = Expected(number, shape, None if widths is None else widths.get(tensor))
    return Reference(name, said)


def second(name: str, placement: Placement, read: Read, *, kernel: Kernel | None = None) -> Reference:
    """A reference that is another checkpoint of the same tensors; one whose replicas differ says nothing.

    Raises: as `confirm`.
    """
    said = {}
    found = read_sums(placement, read, kernel=kernel)
    for tensor in placement.names:
        replicas = whole(placement, found, tensor)
        if len({each.fingerprint for each in replicas.values()}) == 1:
            one = next(iter(replicas.values()))
            said[tensor] = Expected(
                one.fingerprint, placement.shape(tensor), one.width, _rule(placement, tensor)
            )
    return Reference(name, said)


def judge(placement: Placement, found: Sums, references: Sequence[Reference]) -> Confirmation:
    """`confirm` of what was read already.

    A tied name is the tensor that it is tied to.  An averaged one whose replicas differ has no bits to
    compare.
    """
    said, same = _by_fingerprint(placement, found, references)
    confirmed: set[str] = set()
    contradicted: list[Contradiction] = []
    differing: list[Difference] = []
    unconfirmed: dict[str, str] = {}
    for name in placement.names:
        owner = placement.claims.tied.get(name, name)
        replicas = whole(placement, found, owner)
        differs = len({each.fingerprint for each in replicas.values()}) > 1
        if differs and owner == name and placement.lossy.get(name) != "avg":
            differing.append(_difference(placement, name, replicas))
        why = _nothing_to_compare(placement, name, owner, replicas, differs)
        wrong = [] if why else _against(placement, name, replicas, references)
        why = why or _uncompared(placement, name, replicas, references) or _indistinct(owner, replicas, same)
        if wrong:
            contradicted.extend(_named(each, said) for each in wrong)
        elif why:
            unconfirmed[name] = why
        else:
            assert not differs, "one of two different replicas is not what the reference says"
            confirmed.add(name)
    return Confirmation(
        placement.layout.name, frozenset(confirmed), tuple(contradicted), tuple(differing), unconfirmed
    )


# --- one tensor ---------------------------------------------------------------------------------------------


def _nothing_to_compare(
    placement: Placement, name: str, owner: str, replicas: Mapping[int, Sum], differs: bool
) -> str:
    if placement.lossy.get(name) == "drop":
        return "dropped"
    if placement.lossy.get(owner) == "avg" and differs:
        return "averaged"
    return "" if replicas else "nothing was read" if prod(placement.shape(name)) else "no elements"


def _against(
    placement: Placement, name: str, replicas: Mapping[int, Sum], references: Sequence[Reference]
) -> list[Contradiction]:
    """For each reference that says something else: the first replica that differs from it."""
    found = []
    for reference in references:
        said, shape = reference.tensors.get(name), placement.shape(name)
        if said is None:
            continue
        other = said.shape is not None and said.shape != shape
        for cover, each in replicas.items():
            if other or (said.width in (None, each.width) and each.fingerprint != said.fingerprint):
                why = f"there its shape is {list(said.shape or ())}, here {list(shape)}" if other else ""
                found.append(
                    Contradiction(name, reference.name, said.fingerprint, each.fingerprint, cover, why)
                )
                break
    return found


def _uncompared(
    placement: Placement, name: str, replicas: Mapping[int, Sum], references: Sequence[Reference]
) -> str:
    """Why no reference can confirm the tensor; empty where one can."""
    said = [reference.tensors[name] for reference in references if name in reference.tensors]
    width = next(iter(replicas.values())).width
    fitting = [one for one in said if one.width in (None, width)]
    if any(one.rule is None or one.rule != _rule(placement, name) for one in fitting):
        return ""
    if fitting:
        return "the reference reads it by the same rule"
    return "no reference of this dtype" if said else "no reference"


def _rule(placement: Placement, name: str) -> Rule:
    return placement.layout.rules[placement.claims.owner[name]]


def _indistinct(owner: str, replicas: Mapping[int, Sum], same: Same) -> str:
    """Why a wrong layout would give the same bits; empty where it would not."""
    one = next(iter(replicas.values()))
    if one.value is not None and one.elements > 1:
        return "all its elements are equal"
    others = same[one.fingerprint] - {owner}
    return f"it equals another tensor: {min(others)}" if others else ""


def _by_fingerprint(placement: Placement, found: Sums, references: Sequence[Reference]) -> tuple[Same, Same]:
    """(tensors of the placement by what references say of them, by that or what was found); tied are one."""
    names, tied = set(placement.names), placement.claims.tied
    said: dict[int, set[str]] = defaultdict(set)
    both: dict[int, set[str]] = defaultdict(set)
    for reference in references:
        for name in names & reference.tensors.keys():
            for one in (said, both):
                one[reference.tensors[name].fingerprint].add(tied.get(name, name))
    for name in found:
        for each in whole(placement, found, name).values():
            both[each.fingerprint].add(name)
    return _frozen(said), _frozen(both)


def _frozen(found: Mapping[int, set[str]]) -> Same:
    return {number: frozenset(names) for number, names in found.items()}


def _named(found: Contradiction, said: Same) -> Contradiction:
    """With the name of the tensor that is there instead."""
    others = said.get(found.found, frozenset()) - {found.tensor}
    return replace(found, why=f"that is {min(others)}") if others and not found.why else found


def _explained(placement: Placement, read: Read, found: Contradiction) -> Contradiction:
    """With the remark that the transpose would be right, where it would."""
    shape = placement.shape(found.tensor)
    if found.why or len(shape) < 2 or shape != shape[::-1]:
        return found
    tiles = placement.tiles(placement.claims.tied.get(found.tensor, found.tensor))
    turned = transposed(tiles.at(tiles.cover == found.cover), read)
    return replace(found, why="it is stored transposed") if turned == found.expected else found


def _difference(placement: Placement, name: str, replicas: Mapping[int, Sum]) -> Difference:
    tiles = placement.tiles(name)
    return Difference(
        name,
        {cover: each.fingerprint for cover, each in replicas.items()},
        {cover: tuple(distinct(tiles.place[tiles.cover == cover]).tolist()) for cover in replicas},
    )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
