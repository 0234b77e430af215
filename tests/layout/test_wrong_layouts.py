"""Twelve wrong layouts: wrong structure is refused by the proof, wrong meaning contradicted by references.

A wrong meaning is a perfect bijection with all the right shapes: the proof passes, and must not say that
it is confirmed.  The checkpoint itself is laid out by numpy alone, written down as the framework does it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from ckptd.errors import LayoutRefused
from ckptd.layout.confirm import Reference, confirm, recorded, second
from ckptd.layout.fingerprint import fingerprint
from ckptd.layout.language import parse
from ckptd.layout.proof import prove
from ckptd.layout.resolve import Placement, resolve

Logical = dict[str, NDArray[np.generic]]
Places = dict[int, dict[str, NDArray[np.generic]]]

RIGHT = """
layout mini(layers, vp, g, r, d, e, m) {
  mesh tp * dp * pp
  let l = layers
  embed                      : [_^(4*tp) @tp, _]           = embed rep dp on pp 0
  b.{l@(pp*vp)}.qkv          : [(g {q: r, k, v} d)@tp, _]  = layers.{l}.q | layers.{l}.k | layers.{l}.v rep dp
  b.{l@(pp*vp)}.proj         : [_, (g r d)@tp]             = layers.{l}.out rep dp
  b.{l@(pp*vp)}.fc1          : [{gate, up} _@tp, _]        = layers.{l}.gate | layers.{l}.up rep dp
  b.{l@(pp*vp)}.fc2          : [_, _@tp]                   = layers.{l}.down rep dp
  b.{l@(pp*vp)}.mix          : [_, _]                      = layers.{l}.mix rep tp*dp
  b.{l@(pp*vp)}.experts.{e@dp}.w                           = layers.{l}.experts.{e}.w rep tp
}
"""


@dataclass(frozen=True)
class Sizes:
    tp: int = 2
    dp: int = 2
    pp: int = 2
    vp: int = 2
    layers: int = 4
    g: int = 2
    r: int = 3
    d: int = 2
    e: int = 4
    vocab: int = 10
    hidden: int = 4
    f: int = 6

    @property
    def mesh(self) -> dict[str, int]:
        return {"tp": self.tp, "dp": self.dp, "pp": self.pp}

    @property
    def parameters(self) -> dict[str, int]:
        names = ("layers", "vp", "g", "r", "d", "e")
        return {**{name: getattr(self, name) for name in names}, "m": self.e // self.dp}


def shapes_of(s: Sizes) -> dict[str, tuple[int, ...]]:
    h, kv = s.hidden, (s.g * s.d, s.hidden)
    found: dict[str, tuple[int, ...]] = {"embed": (s.vocab, h)}
    for n in range(s.layers):
        mine = {
            "q": (s.g * s.r * s.d, h), "k": kv, "v": kv, "out": (h, s.g * s.r * s.d), "gate": (s.f, h),
            "up": (s.f, h), "down": (h, s.f), "mix": (h, h),
            **{f"experts.{x}.w": (3, h) for x in range(s.e)},
        }  # fmt: skip
        found.update({f"layers.{n}.{name}": shape for name, shape in mine.items()})
    return found


def random_tensors(s: Sizes, dtype: str, seed: int) -> Logical:
    """float32, or the bits of bfloat16."""
    rng = np.random.default_rng(seed)
    whole = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes_of(s).items()}
    if dtype == "float32":
        return dict(whole)
    return {name: (array.view(np.uint32) >> 16).astype(np.uint16) for name, array in whole.items()}


def laid_out(s: Sizes, logical: Logical) -> Places:
    """What each rank really has, as Megatron does it; no tile is asked."""
    found: Places = {}
    for rank in range(s.tp * s.dp * s.pp):
        tp, dp, pp = rank % s.tp, rank // s.tp % s.dp, rank // s.tp // s.dp
        mine: dict[str, NDArray[np.generic]] = {}
        if pp == 0:
            rows = -(-s.vocab // (4 * s.tp)) * 4 * s.tp
            padded = np.zeros((rows, s.hidden), logical["embed"].dtype)
            padded[: s.vocab] = logical["embed"]
            mine["embed"] = np.split(padded, s.tp)[tp]
        local, share = 0, s.layers // (s.pp * s.vp)
        for stage in range(s.vp):
            for n in range(share):
                layer = stage * (s.layers // s.vp) + pp * share + n
                get = {
                    name: logical[f"layers.{layer}.{name}"]
                    for name in ("q", "k", "v", "out", "gate", "up", "down", "mix")
                }
                heads = [get[name].reshape(s.g, -1, s.d, s.hidden) for name in "qkv"]
                qkv = np.concatenate(heads, axis=1)
                mine[f"b.{local}.qkv"] = np.split(qkv.reshape(-1, s.hidden), s.tp)[tp]
                mine[f"b.{local}.proj"] = np.split(get["out"], s.tp, axis=1)[tp]
                halves = [np.split(get[name], s.tp)[tp] for name in ("gate", "up")]
                mine[f"b.{local}.fc1"] = np.concatenate(halves)
                mine[f"b.{local}.fc2"] = np.split(get["down"], s.tp, axis=1)[tp]
                mine[f"b.{local}.mix"] = get["mix"]
                for x in range(s.e // s.dp):
                    expert = dp * (s.e // s.dp) + x
                    mine[f"b.{local}.experts.{x}.w"] = logical[f"layers.{layer}.experts.{expert}.w"]
                local += 1
        found[rank] = {name: np.ascontiguousarray(array) for name, array in mine.items()}
    return found


def reader(places: Places):  # type: ignore[no-untyped-def]
    return lambda place, name: places[place][name].reshape(-1)


def stored(places: Places) -> dict[int, dict[str, tuple[int, ...]]]:
    return {place: {name: a.shape for name, a in arrays.items()} for place, arrays in places.items()}


def placed(text: str, s: Sizes, **other: int) -> Placement:
    return resolve(parse(text), parameters={**s.parameters, **other}, mesh=s.mesh, shapes=shapes_of(s))


def changed(*pairs: tuple[str, str]) -> str:
    """The right layout with some text replaced; every pattern must be there."""
    text = RIGHT
    for pattern, by in pairs:
        text, count = re.subn(pattern, by, text)
        assert count > 0, pattern
    return text


# --- references ---------------------------------------------------------------------------------------------

OTHER = Sizes(tp=1, dp=1, pp=1, vp=1)


def references(logical: Logical) -> dict[str, Reference]:
    """Everything at hand that knows these tensors, each by itself."""
    shapes = {name: array.shape for name, array in logical.items()}
    plain = resolve(
        parse("layout plain { mesh one; * : [...] }"), parameters={}, mesh={"one": 1}, shapes=shapes
    )
    # The same family, spelled otherwise and at another mesh: not one rule is the same.
    family = placed(re.sub(r"\bb\.", "blocks.", RIGHT).replace("embed  ", "embedding  ", 1), OTHER)
    files = {
        0: {re.sub(r"^b\.", "blocks.", name.replace("embed", "embedding")): array
            for name, array in laid_out(OTHER, logical)[0].items()}
    }  # fmt: skip
    return {
        "fingerprints": recorded(
            "the manifest", {name: fingerprint(array) for name, array in logical.items()}
        ),
        "a consolidated checkpoint": second("plain", plain, reader({0: dict(logical)})),
        "a checkpoint of another mesh": second("mini at one rank", family, reader(files)),
    }


SIZES = [Sizes(), Sizes(tp=1, dp=4, pp=3, vp=2, layers=12, hidden=6), Sizes(tp=2, dp=1, pp=2, vp=3, layers=6)]
SIZES_IDS = ["tp2-dp2-pp2-vp2", "tp1-dp4-pp3-vp2", "tp2-dp1-pp2-vp3"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", SIZES, ids=SIZES_IDS)
def test_the_right_layout_is_confirmed_by_every_reference(sizes: Sizes, dtype: str) -> None:
    logical = random_tensors(sizes, dtype, 20261121)
    files = laid_out(sizes, logical)
    placement = placed(RIGHT, sizes)
    report = prove(placement, stored=stored(files))
    assert not report.confirmed and f"layout unconfirmed: {len(logical)} tensors" in str(report)
    known = [
        recorded("the manifest", {name: fingerprint(array) for name, array in logical.items()}),
        *(list(references(logical).values()) if sizes == SIZES[0] else []),
    ]
    for reference in known:
        found = confirm(placement, reader(files), [reference])
        assert found.confirmed == set(logical) and not found.contradicted and not found.differing
        found.refuse()
        report = prove(placement, stored=stored(files), references=found.confirmed)
        assert str(report).endswith("layout confirmed by references")
    print(f"{len(known)} references, {len(logical)} tensors")


# --- wrong meanings -----------------------------------------------------------------------------------------

MEANINGS = {
    # name: (what is replaced, which tensors are then others)
    "k and v": ([(r"layers\.\{l\}\.k \| layers\.\{l\}\.v", "layers.{l}.v | layers.{l}.k")], r"\.[kv]$"),
    "gate and up": (
        [(r"layers\.\{l\}\.gate \| layers\.\{l\}\.up", "layers.{l}.up | layers.{l}.gate")],
        r"\.(gate|up)$",
    ),
    "square transpose": ([(r"layers\.\{l\}\.mix", "layers.{l}.mix transposed")], r"\.mix$"),
    "virtual stages": ([(r"\(pp\*vp\)", "(vp*pp)")], r"^layers\.[12]\."),
    "experts": ([(r"\{e@dp\}", "{e@(dp*m)}")], r"\.experts\.[12]\.w$"),
    "order of splits": ([(r"\{gate, up\} _@tp", "({gate, up} _)@tp")], r"\.(gate|up)$"),
    # Two more that systems got wrong:
    "query groups": ([(r"\(g \{q: r, k, v\} d\)@tp", "({q: g*r, k: g, v: g} d)@tp")], r"\.[qkv]$"),
    "order of ranks": ([(r"mesh tp \* dp \* pp", "mesh dp * tp * pp")], r"."),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MEANINGS)
def test_a_wrong_meaning_passes_the_proof_and_is_contradicted_by_every_reference(
    name: str, dtype: str
) -> None:
    sizes = Sizes()
    logical = random_tensors(sizes, dtype, 20261122)
    files = laid_out(sizes, logical)
    pairs, wrong = MEANINGS[name]
    placement = placed(changed(*pairs), sizes)
    report = prove(placement, stored=stored(files))
    assert not report.confirmed and f"layout unconfirmed: {len(logical)} tensors" in str(report)
    others = {tensor for tensor in logical if re.search(wrong, tensor)}
    assert others
    for label, reference in references(logical).items():
        found = confirm(placement, reader(files), [reference])
        contradicted = {one.tensor for one in found.contradicted}
        if name == "order of ranks":  # what both axes leave alone (mix) or replicate is right by chance
            assert contradicted and contradicted >= {
                f"layers.0.{one}" for one in ("q", "out", "gate", "down")
            }
        else:
            assert contradicted == others, label
        assert found.confirmed == logical.keys() - contradicted - {one.tensor for one in found.differing}
        with pytest.raises(LayoutRefused, match="the layout mini is contradicted") as refused:
            found.refuse()
        assert refused.value.tensor in contradicted and refused.value.exit_code == 7
        assert "layout confirmed" not in str(prove(placement, references=found.confirmed))
    print(f"{len(references(logical))} references contradict {len(others)} tensors of {len(logical)}")


@pytest.mark.parametrize("name", [None, *MEANINGS])
def test_without_a_reference_nothing_is_confirmed(name: str | None) -> None:
    sizes = Sizes()
    files = laid_out(sizes, random_tensors(sizes, "float32", 20261123))
    placement = placed(changed(*MEANINGS[name][0]) if name else RIGHT, sizes)
    found = confirm(placement, reader(files), [])
    assert not found.confirmed and not found.contradicted
    assert set(found.unconfirmed) == set(placement.names) and set(found.unconfirmed.values()) == {
        "no reference"
    }
    for text in (str(found), str(prove(placement, references=found.confirmed))):
        assert f"layout unconfirmed: {len(placement.names)} tensors" in text
        assert not re.search("proven|proved|layout confirmed", text)


@pytest.mark.parametrize("name", MEANINGS)
def test_a_checkpoint_that_is_read_by_the_same_wrong_layout_confirms_nothing(name: str) -> None:
    """k and v exchanged twice agree; what the other mesh makes different is contradicted all the same."""
    sizes = Sizes()
    logical = random_tensors(sizes, "float32", 20261124)
    pairs, wrong = MEANINGS[name]
    text = changed(*pairs)
    once = second("the same", placed(text, OTHER), reader(laid_out(OTHER, logical)))
    found = confirm(placed(text, sizes), reader(laid_out(sizes, logical)), [once])
    assert not found.confirmed & {tensor for tensor in logical if re.search(wrong, tensor)}
    assert bool(found.contradicted) == (
        name not in ("k and v", "gate and up", "square transpose", "query groups")
    )


def test_a_contradiction_says_what_is_there_instead() -> None:
    sizes = Sizes()
    logical = random_tensors(sizes, "float32", 20261125)
    files = laid_out(sizes, logical)
    known = [references(logical)["fingerprints"]]
    said = {}
    for name in ("k and v", "square transpose", "experts"):
        found = confirm(placed(changed(*MEANINGS[name][0]), sizes), reader(files), known)
        said.update({one.tensor: one.why for one in found.contradicted})
        assert "the manifest has " in str(found)
    assert said["layers.2.k"] == "that is layers.2.v" and said["layers.1.mix"] == "it is stored transposed"
    assert said["layers.0.experts.1.w"] == "that is layers.0.experts.2.w"


# --- wrong structure ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refused:
    pairs: list[tuple[str, str]]
    message: str
    tensor: str
    other: tuple[tuple[str, int], ...] = ()
    alone: bool = False  # the layout by itself is a bijection: the real arrays show that it is another's


STRUCTURES = {
    "layer twice, by two rules": Refused(
        [(r"\n\}", "\n  extra = layers.2.down\n}")],
        r"layers\.2\.down is claimed twice, by line \d+ \(.*\) and by line \d+ \(.*\)",
        "layers.2.down",
    ),
    "layer twice, on two stages": Refused(
        [(r"\{l@\(pp\*vp\)\}\.fc2", "{l}.fc2")],
        r"line 9: layers\.0\.down is held 2 times over axis pp, but the layout does not say `rep pp`",
        "layers.0.down",
    ),
    "expert never": Refused(
        [], r"no rule claims layers\.0\.experts\.3\.w", "layers.0.experts.3.w", (("e", 3),)
    ),
    "forgotten padding": Refused(
        [(r"_\^\(4\*tp\) @tp", "_@tp")],
        r"rank 0 holds embed with shape \[8, 4\] = 32 elements, and the layout says \[5, 4\] = 20: "
        r"the volumes do not close",
        "embed",
        alone=True,
    ),
    "non-square split dimension": Refused(
        [(r"\.fc2          : \[_, _@tp\]", ".fc2 : [_@tp, _]")],
        r"rank 0 holds b\.0\.fc2 with shape \[4, 3\] = 12 elements, and the layout says \[2, 6\] = 12",
        "b.0.fc2",
        alone=True,
    ),
    "volumes that do not close": Refused(
        [],
        r"line 6: b\..* says that layers\.0\.q has shape \[8, 4\], but its shape is \[12, 4\]",
        "layers.0.q",
        (("r", 2),),
    ),
    "volumes of arrays that do not close": Refused(
        [(r"\.mix          : \[_, _\] .* rep tp\*dp", ".mix : [_, _@dp] = layers.{l}.mix rep tp")],
        r"rank 0 holds b\.0\.mix with shape \[4, 4\] = 16 elements, and the layout says \[4, 2\] = 8: "
        r"the volumes do not close",
        "b.0.mix",
        alone=True,
    ),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_wrong_structure_is_refused_by_the_proof(name: str) -> None:
    sizes, wrong = Sizes(), STRUCTURES[name]
    files = laid_out(sizes, random_tensors(sizes, "float32", 20261126))
    if wrong.alone:
        assert prove(placed(changed(*wrong.pairs), sizes)).elements
    with pytest.raises(LayoutRefused) as refused:
        prove(placed(changed(*wrong.pairs), sizes, **dict(wrong.other)), stored=stored(files))
    assert re.search(wrong.message, str(refused.value)), str(refused.value)
    assert refused.value.tensor == wrong.tensor


FLAT = """
layout flat(alignment) {
  mesh dp
  * : [...] rep dp
  store "rank_{dp}" :: "buffer" = cat(module)[ align alignment then ^(dp*%d) @dp ]
}
"""
FLAT_SHAPES = {"a": (3, 3), "b": (7,), "c": (4, 2), "d": (5, 5)}


def flat_files(logical: Logical, ranks: int, alignment: int, multiple: int) -> Places:
    whole = np.zeros(0, np.float32)
    for array in logical.values():
        whole = np.concatenate([whole, np.zeros(-len(whole) % alignment, np.float32), array.reshape(-1)])
    whole = np.concatenate([whole, np.zeros(-len(whole) % (ranks * multiple), np.float32)])
    return {rank: {"buffer": part} for rank, part in enumerate(np.split(whole, ranks))}


@pytest.mark.parametrize("multiple", [1, 64])
def test_a_flat_buffer_with_the_wrong_alignment_is_refused(multiple: int) -> None:
    """By its length; and where the padding at its end hides that, by every reference."""
    rng = np.random.default_rng(20261127)
    logical = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in FLAT_SHAPES.items()}
    files = flat_files(logical, 2, 8, multiple)
    known = recorded("the manifest", {name: fingerprint(array) for name, array in logical.items()})

    def flat(alignment: int) -> Placement:
        return resolve(
            parse(FLAT % multiple), parameters={"alignment": alignment}, mesh={"dp": 2}, shapes=FLAT_SHAPES
        )

    prove(flat(8), stored=stored(files))
    assert confirm(flat(8), reader(files), [known]).confirmed == set(logical)
    for wrong in (1, 2, 4, 16):
        prove(flat(wrong))
        if stored(files)[0] != flat(wrong).arrays(0):
            with pytest.raises(
                LayoutRefused, match=r"rank 0 holds buffer with shape \[\d+\].*volumes do not close"
            ):
                prove(flat(wrong), stored=stored(files))
        else:
            assert not prove(flat(wrong), stored=stored(files)).confirmed
            found = confirm(flat(wrong), reader(files), [known])
            assert {one.tensor for one in found.contradicted} >= {"c", "d"} and "a" in found.confirmed
            assert multiple == 64, "a length shows the alignment where nothing hides it"
