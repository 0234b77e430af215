"""Tiles against local arrays that numpy made: every construct, element by element."""

from __future__ import annotations

import numpy as np
import pytest
from layout_oracle import (
    Arrays,
    chunk,
    compare,
    ext,
    iota,
    layout,
    name,
    padded,
    prod,
    rep,
    size,
    split,
    total,
)

from ckptd.errors import LayoutRefused
from ckptd.layout.expressions import (
    Align,
    As,
    Call,
    Drop,
    Flat,
    Number,
    On,
    Operation,
    Pad,
    PadTo,
    Rest,
    Rule,
    SplitOver,
    Store,
    Strip,
    Tied,
    Transposed,
    When,
)
from ckptd.layout.proof import prove
from ckptd.layout.resolve import resolve


def _ranks(**sizes: int) -> list[dict[str, int]]:
    found: list[dict[str, int]] = [{}]
    for axis, count in reversed(sizes.items()):
        found = [{axis: at, **point} for point in found for at in range(count)]
    return sorted(found, key=lambda point: sum(point[a] * s for a, s in _strides(sizes).items()))


def _strides(sizes: dict[str, int]) -> dict[str, int]:
    strides, stride = {}, 1
    for axis, count in sizes.items():
        strides[axis] = stride
        stride *= count
    return strides


def test_megatron_model_parallel_with_gqa_swiglu_vocabulary_and_virtual_stages() -> None:
    tp, dp, pp, vp, layers, g, r, d, f, h, vocab = 2, 2, 2, 2, 8, 4, 3, 2, 6, 5, 11
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (vocab, h)}
    for n in range(layers):
        shapes |= {
            f"layers.{n}.attn.q": (g * r * d, h),
            f"layers.{n}.attn.k": (g * d, h),
            f"layers.{n}.attn.v": (g * d, h),
        }
        shapes |= {
            f"layers.{n}.attn.out": (h, g * r * d),
            f"layers.{n}.mlp.gate": (f, h),
            f"layers.{n}.mlp.up": (f, h),
        }
        shapes |= {f"layers.{n}.mlp.down": (h, f), f"layers.{n}.norm": (h,)}
    shapes["lm_head.weight"] = (vocab, h)
    stage = {"l": ("pp", "vp")}  # pp runs fastest, so that stages take turns
    at = "decoder.layers.{l}."
    vocabulary = split(Pad(ext("vocab"), Operation("*", Number(2), size("tp"))), "tp")
    model = layout(
        ("tp", "dp", "pp"),
        Rule(
            name("embedding.weight"),
            (vocabulary, ext("h")),
            (name("embed.weight"),),
            (rep("dp"), On("pp", Number(0))),
        ),
        Rule(
            name(at + "qkv", **stage),
            (prod(split(ext("g"), "tp"), total(q="r", k=1, v=1), ext("d")), ext("h")),
            tuple(name("layers.{l}.attn." + part) for part in "qkv"),
            (rep("dp"),),
        ),
        Rule(
            name(at + "proj", **stage),
            (ext("h"), split(prod(ext("g"), ext("r"), ext("d")), "tp")),
            (name("layers.{l}.attn.out"),),
            (rep("dp"),),
        ),
        Rule(
            name(at + "fc1", **stage),
            (prod(total(gate=1, up=1), split(ext("f"), "tp")), ext("h")),
            (name("layers.{l}.mlp.gate"), name("layers.{l}.mlp.up")),
            (rep("dp"),),
        ),
        Rule(
            name(at + "fc2", **stage),
            (ext("h"), split(ext("f"), "tp")),
            (name("layers.{l}.mlp.down"),),
            (rep("dp"),),
        ),
        Rule(name(at + "*", **stage), (ext("h"),), (name("layers.{l}.*"),), (rep("tp", "dp"),)),
        Rule(
            name("output.weight"),
            (vocabulary, ext("h")),
            (name("lm_head.weight"),),
            (rep("dp"), On("pp", Operation("-", size("pp"), Number(1)))),
        ),
        parameters=("vocab", "h", "g", "r", "d", "f", "layers", "vp"),
        lets=(("l", size("layers")),),
    )
    sizes = {"vocab": vocab, "h": h, "g": g, "r": r, "d": d, "f": f, "layers": layers, "vp": vp}
    placement = resolve(model, parameters=sizes, mesh={"tp": tp, "dp": dp, "pp": pp}, shapes=shapes)
    marks = iota(shapes)

    expected: dict[int, Arrays] = {}
    for rank, at_ in enumerate(_ranks(tp=tp, dp=dp, pp=pp)):
        t, p = at_["tp"], at_["pp"]
        own: Arrays = {}
        if p == 0:
            own["embedding.weight"] = chunk(padded(marks["embed.weight"], 2 * tp), tp, t)
        # Megatron: global layer = vp * (layers / vp) + pp * (layers / pp / vp) + local
        held = [
            v * (layers // vp) + p * (layers // pp // vp) + i
            for v in range(vp)
            for i in range(layers // pp // vp)
        ]
        for local, n in enumerate(held):
            m = {
                key[len(f"layers.{n}.") :]: value
                for key, value in marks.items()
                if key.startswith(f"layers.{n}.")
            }
            q = m["attn.q"].reshape(g, r * d, h)
            k, v_ = (m[f"attn.{x}"].reshape(g, d, h) for x in "kv")
            fused = np.concatenate([q, k, v_], axis=1)  # [g, (r + 2) d, h]
            own[f"decoder.layers.{local}.qkv"] = fused[t * g // tp : (t + 1) * g // tp].reshape(-1, h)
            own[f"decoder.layers.{local}.proj"] = chunk(m["attn.out"], tp, t, 1)
            own[f"decoder.layers.{local}.fc1"] = np.concatenate(
                [chunk(m["mlp.gate"], tp, t), chunk(m["mlp.up"], tp, t)]
            )
            own[f"decoder.layers.{local}.fc2"] = chunk(m["mlp.down"], tp, t, 1)
            own[f"decoder.layers.{local}.norm"] = m["norm"]
        if p == pp - 1:
            own["output.weight"] = chunk(padded(marks["lm_head.weight"], 2 * tp), tp, t)
        expected[rank] = own
    compare(placement, marks, expected)
    assert list(placement.arrays(0)) == list(expected[0]), "in the module's order"
    report = prove(placement)
    assert report.tensors == len(shapes) and report.padding == 2 * h * dp  # row 12 of two tables
    assert str(report).endswith(f"layout unconfirmed: {len(shapes)} tensors")


def test_megatron_distributed_optimizer() -> None:
    tp, dp, pp, h, f = 2, 2, 2, 5, 6
    shapes: dict[str, tuple[int, ...]] = {"embed": (7, h)}
    for n in range(4):
        shapes |= {f"l.{n}.gate": (f, h), f"l.{n}.up": (f, h), f"l.{n}.norm": (h,)}
    steps = (
        (Align(Number(16)),),
        (PadTo(Call("lcm", (size("dp"), Number(32)))), SplitOver(("dp",))),
    )
    model = layout(
        ("tp", "dp", "pp"),
        Rule(
            name("embed"), (split(Pad(ext(7), size("tp"), "last"), "tp"), ext(h)), (), (On("pp", Number(0)),)
        ),
        Rule(
            name("d.{l}.fc1", l=("pp",)),
            (prod(total(gate=1, up=1), split(ext(f), "tp")), ext(h)),
            (name("l.{l}.gate"), name("l.{l}.up")),
        ),
        Rule(name("d.{l}.norm", l=("pp",)), (ext(h),), (name("l.{l}.norm"),), (rep("tp"),)),
        lets=(("l", Number(4)),),
        states=(("param", "bf16"), ("exp_avg", "f32")),
        stores=(Store(name("dist"), name("bucket.{tp:02}.{pp}.{state}"), Flat("module", True, *steps)),),
    )
    placement = resolve(
        model, parameters={}, mesh={"tp": tp, "dp": dp, "pp": pp}, shapes=shapes, state="exp_avg"
    )
    marks = iota(shapes)
    expected: dict[int, Arrays] = {}
    for rank, at in enumerate(_ranks(tp=tp, dp=dp, pp=pp)):
        t, p = at["tp"], at["pp"]
        module = [chunk(padded(marks["embed"], tp), tp, t)] if p == 0 else []
        for n in (2 * p, 2 * p + 1):
            module.append(
                np.concatenate([chunk(marks[f"l.{n}.gate"], tp, t), chunk(marks[f"l.{n}.up"], tp, t)])
            )
            module.append(marks[f"l.{n}.norm"])
        buffer = np.zeros(0, np.int64)
        for array in reversed(module):
            buffer = np.concatenate([padded(buffer, 16), array.ravel()])
        expected[rank] = {f"bucket.{t:02}.{p}.exp_avg": chunk(padded(buffer, 32), dp, at["dp"])}
    compare(placement, marks, expected)
    assert {filler.fill for place in range(8) for filler in placement.fillers(place)} == {"zero", "last"}
    assert prove(placement).padding == sum(
        int((a == -1).sum()) for own in expected.values() for a in own.values()
    )


ZERO_SHAPES = {"a": (3, 5), "b": (4,), "scale": (), "c": (2, 3, 4), "d": (1, 2)}


@pytest.mark.parametrize("strip", [False, True])
@pytest.mark.parametrize("dp", [1, 2, 3, 4, 16])
def test_zero_1_and_2(dp: int, strip: bool) -> None:
    order = ["c", "a", "d", "b", "scale"]
    whole = (PadTo(Operation("*", Number(2), size("dp"))), SplitOver(("dp",)), *((Strip(),) if strip else ()))
    model = layout(
        ("dp",),
        Rule(name("*"), None),
        stores=(Store(name("z"), name("groups.{g}"), Flat("g", whole=whole)),),
    )
    placement = resolve(
        model,
        parameters={},
        mesh={"dp": dp},
        shapes=ZERO_SHAPES,
        orders={"g[0]": order[:3], "g[1]": order[3:]},
    )
    marks = iota(ZERO_SHAPES)
    expected: dict[int, Arrays] = {rank: {} for rank in range(dp)}
    for number, names in enumerate((order[:3], order[3:])):
        flat = np.concatenate([marks[n].ravel() for n in names])
        for rank in range(dp):
            share = chunk(padded(flat, 2 * dp), dp, rank)
            if strip:
                share = share[: max(0, len(flat) - rank * len(share))]
            expected[rank][f"groups.{number}"] = share
    compare(placement, marks, expected)
    prove(placement)


@pytest.mark.parametrize("dp", [1, 2, 3, 8])
def test_zero_3(dp: int) -> None:
    item = (PadTo(size("dp")), SplitOver(("dp",)))
    model = layout(
        ("tp", "dp"),
        Rule(name("c"), (ext(2), split(ext(3), "tp"), ext(4))),
        Rule(name("*"), None, (), (rep("tp"),)),
        stores=(Store(name("z"), name("fp32"), Flat("module", per_item=item)),),
    )
    placement = resolve(model, parameters={}, mesh={"tp": 2, "dp": dp}, shapes=ZERO_SHAPES)
    marks = iota(ZERO_SHAPES)
    expected = {}
    for rank, at in enumerate(_ranks(tp=2, dp=dp)):
        local = {"c": chunk(marks["c"], 2, at["tp"], 1)} | {n: marks[n] for n in ("a", "b", "scale", "d")}
        flat = [chunk(padded(array.ravel(), dp), dp, at["dp"]) for array in local.values()]
        expected[rank] = {"fp32": np.concatenate(flat)}
    compare(placement, marks, expected)
    prove(placement)


@pytest.mark.parametrize(("tp", "dp"), [(2, 2), (2, 3), (3, 4)])
def test_fsdp2_with_tensor_parallel_swiglu(tp: int, dp: int) -> None:
    """Megatron #2769: FSDP splits what a tensor-parallel rank has, so gate and up stay apart on each."""
    f, h = 7, 3
    shapes = {"gate": (f, h), "up": (f, h), "down": (h, f), "odd.x": (5, 2), "odd.y": (4,)}
    swiglu = split(prod(total(gate=1, up=1), split(ext("f"), "tp")), "dp")
    model = layout(
        ("tp", "dp"),
        Rule(name("w1"), (swiglu, Rest()), (name("gate"), name("up"))),
        Rule(name("down"), (split(ext("h"), "dp"), split(ext("f"), "tp"))),
        Rule(name("o.*"), (split(ext("_"), "dp"), Rest()), (name("odd.*"),), (rep("tp"),)),
        parameters=("f", "h"),
    )
    placement = resolve(model, parameters={"f": f, "h": h}, mesh={"tp": tp, "dp": dp}, shapes=shapes)
    marks = iota(shapes)
    expected = {}
    for rank, at in enumerate(_ranks(tp=tp, dp=dp)):
        fused = np.concatenate([chunk(marks["gate"], tp, at["tp"]), chunk(marks["up"], tp, at["tp"])])
        expected[rank] = {
            "w1": chunk(fused, dp, at["dp"]),
            "down": chunk(chunk(marks["down"], tp, at["tp"], 1), dp, at["dp"]),
            "o.x": chunk(marks["odd.x"], dp, at["dp"]),
            "o.y": chunk(marks["odd.y"], dp, at["dp"]),
        }
    compare(placement, marks, expected)
    prove(placement)


def test_experts_on_a_folded_mesh() -> None:
    experts, f, h = 6, 4, 3
    shapes: dict[str, tuple[int, ...]] = {"router": (experts, h)}
    for e in range(experts):
        shapes |= {f"experts.{e}.gate": (f, h), f"experts.{e}.up": (f, h)}
    model = layout(
        ("tp", "dp"),
        Rule(name("router"), None, (), (rep("tp", "dp"),)),
        Rule(
            name("local_experts.{e}", e=("ep",)),
            (prod(total(gate=1, up=1), split(ext(f), "etp")), ext(h)),
            (name("experts.{e}.gate"), name("experts.{e}.up")),
            (rep("edp"),),
        ),
        parameters=("e",),
        folds=((("etp", "ep", "edp"), ("tp", "dp")),),
    )
    placement = resolve(
        model, parameters={"e": experts}, mesh={"tp": 4, "dp": 3, "etp": 2, "ep": 3}, shapes=shapes
    )
    marks = iota(shapes)
    expected = {}
    for rank in range(12):
        etp, ep = rank % 2, rank // 2 % 3
        own: Arrays = {"router": marks["router"]}
        for local in range(2):
            e = 2 * ep + local
            own[f"local_experts.{local}"] = np.concatenate(
                [chunk(marks[f"experts.{e}.gate"], 2, etp), chunk(marks[f"experts.{e}.up"], 2, etp)]
            )
        expected[rank] = own
    compare(placement, marks, expected)
    report = prove(placement, references=["router"])
    assert report.confirmed == {"router"} and len(report.unconfirmed) == 2 * experts
    assert set(placement.tiles("experts.0.up").cover.tolist()) == {0, 1}


def test_experts_stacked_in_one_tensor() -> None:
    """`[e@ep, {gate,up} f, h] = layers.{l}.experts.{e}.gate | ...`: a dimension that is an index of names."""
    shapes: dict[str, tuple[int, ...]] = {}
    for n in range(2):
        for e in range(5):
            shapes |= {f"layers.{n}.experts.{e}.gate": (4, 3), f"layers.{n}.experts.{e}.up": (4, 3)}
    model = layout(
        ("ep", "dp"),
        Rule(
            name("{l}.gate_up"),
            (split(ext("e"), "ep"), prod(total(gate=1, up=1), ext(4)), ext(3)),
            (name("layers.{l}.experts.{e}.gate"), name("layers.{l}.experts.{e}.up")),
        ),
        parameters=("e", "l"),
        stores=(
            Store(name("s"), name("flat"), Flat("module", whole=(PadTo(size("dp")), SplitOver(("dp",))))),
        ),
    )
    marks = iota(shapes)
    for stores in ((), model.stores):
        from dataclasses import replace

        placement = resolve(
            replace(
                model,
                stores=stores,
                rules=tuple(replace(r, verbs=() if stores else (rep("dp"),)) for r in model.rules),
            ),
            parameters={"e": 5, "l": 2},
            mesh={"ep": 2, "dp": 3},
            shapes=shapes,
        )
        expected = {}
        for rank, at in enumerate(_ranks(ep=2, dp=3)):
            stacked = [
                np.stack(
                    [
                        np.concatenate([marks[f"layers.{n}.experts.{e}.{p}"] for p in ("gate", "up")])
                        for e in range(5)
                    ]
                )
                for n in range(2)
            ]
            own = [chunk(array, 2, at["ep"]) for array in stacked]
            if stores:
                flat = np.concatenate([array.ravel() for array in own])
                expected[rank] = {"flat": chunk(padded(flat, 3), 3, at["dp"])}
            else:
                expected[rank] = {f"{n}.gate_up": array for n, array in enumerate(own)}
        compare(placement, marks, expected)
        prove(placement)


def test_padding_in_several_dimensions_and_after_a_split() -> None:
    shapes = {"w": (5, 7)}
    axes = (Pad(split(ext(5), "a"), Number(4)), split(Pad(ext(7), Number(4), "last"), "b"))
    placement = resolve(
        layout(("a", "b"), Rule(name("w"), axes)), parameters={}, mesh={"a": 2, "b": 2}, shapes=shapes
    )
    marks = iota(shapes)
    wide = padded(np.ascontiguousarray(marks["w"].T), 4).T
    expected = {
        rank: {"w": padded(chunk(chunk(wide, 2, at["b"], 1), 2, at["a"]), 4)}
        for rank, at in enumerate(_ranks(a=2, b=2))
    }
    compare(placement, marks, expected)
    prove(placement)


def test_aliases_and_dropped_tensors_have_no_tiles_and_are_reported() -> None:
    shapes = {"embed": (4, 2), "head": (4, 2), "rope.freqs": (8,), "w": (2,)}
    model = layout(
        ("dp",),
        Rule(name("head"), None, (), (Tied(name("embed")),)),
        Rule(name("rope.*"), None, (), (Drop(),)),
        Rule(name("*"), None, (), (rep("dp"), As("BF16"))),
    )
    placement = resolve(model, parameters={}, mesh={"dp": 2}, shapes=shapes)
    assert len(placement.tiles("head")) == len(placement.tiles("rope.freqs")) == 0
    assert placement.dtype("w") == "BF16" and placement.dtype("head") is None
    report = prove(placement, references=["embed", "w", "head", "rope.freqs"])
    assert report.tied == {"head": "embed"} and report.lossy == {"rope.freqs": "drop"} and report.tensors == 2
    assert "confirmed by references" in str(report)


def test_a_specific_rule_goes_before_a_wild_one_and_the_longer_wild_one_before_the_shorter() -> None:
    shapes = {"l.0.w": (4, 4), "l.1.w": (4, 4), "l.0.bias": (4,), "x": (4,)}
    model = layout(
        ("tp",),
        Rule(name("*"), None, (), (rep("tp"),)),
        Rule(name("*.bias"), (split(ext("_"), "tp"),)),
        Rule(name("l.0.w"), (split(ext("_"), "tp"), Rest())),
    )
    placement = resolve(model, parameters={}, mesh={"tp": 2}, shapes=shapes)
    found = {tensor: placement.claims.owner[tensor] for tensor in shapes}
    assert found == {"l.0.w": 2, "l.1.w": 0, "l.0.bias": 1, "x": 0}


def test_one_place_is_the_same_as_that_place_among_all_and_a_wrong_place_is_refused() -> None:
    model = layout(("tp", "dp"), Rule(name("w"), (split(ext(10), "tp"), ext(3)), (), (rep("dp"),)))
    placement = resolve(model, parameters={}, mesh={"tp": 4, "dp": 2}, shapes={"w": (10, 3)})
    every = placement.tiles("w")
    for place in range(8):
        mine, same = placement.tiles("w", [place]), every.at(every.place == place)
        for column in ("offsets", "sizes", "place", "array", "start", "strides", "cover"):
            np.testing.assert_array_equal(getattr(mine, column), getattr(same, column))
    with pytest.raises(ValueError, match="not all in a mesh of 8"):
        placement.tiles("w", [8])
    with pytest.raises(ValueError, match="not among"):
        placement.tiles("v")


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            (Rule(name("w"), (ext(3), ext(4))),),
            r"line 1: w says that w has shape \[3, 4\], but its shape is \[4, 3\]",
        ),
        ((Rule(name("w"), (ext(4),)),), r"has shape \[4\], but its shape is \[4, 3\]"),
        ((Rule(name("w"), (total(a=2, b=2), ext(3))),), "2 summands and 1 pieces"),
        ((Rule(name("w"), (ext("nope"), ext(3))),), "nope has no value"),
        ((Rule(name("w"), (split(ext(4), "zz"), ext(3))),), "zz is no axis"),
        ((Rule(name("w"), (split(ext(4), "tp", widths=(1, 2)), ext(3))),), "add up to 3, and there are 4"),
        (
            (Rule(name("w"), (split(ext(4), "tp"), ext(3)), (), (rep("tp"),)),),
            "equal over tp, and also split",
        ),
        ((Rule(name("w"), None, (), (On("zz", Number(0)),)),), "no such mesh axis"),
        ((Rule(name("w"), None, (), (rep("zz"),)),), "equal over zz, which is no mesh axis"),
        ((Rule(name("w"), None, (), (Tied(name("v")),)),), "w is tied to v, which is not stored"),
    ],
)
def test_a_rule_that_does_not_fit_is_refused(rules: tuple[Rule, ...], message: str) -> None:
    with pytest.raises(LayoutRefused, match=message):
        resolve(layout(("tp",), *rules), parameters={}, mesh={"tp": 2}, shapes={"w": (4, 3)})


def test_a_transposed_tensor_is_stored_with_its_dimensions_reversed() -> None:
    """GPT-2's Conv1D: `c_attn [h, {q,k,v} (n d)@tp]` holds three linear weights [n d, h]."""
    h, wide = 5, 6
    shapes = dict.fromkeys("qkv", (wide, h))
    axes = (ext("h"), prod(total(q=1, k=1, v=1), split(ext("wide"), "tp")))
    rule = Rule(name("c_attn"), axes, tuple(name(key) for key in "qkv"), (Transposed(),))
    model = layout(("tp",), rule, parameters=("h", "wide"))
    placement = resolve(model, parameters={"h": h, "wide": wide}, mesh={"tp": 2}, shapes=shapes)
    marks = iota(shapes)
    expected = {
        r: {"c_attn": np.concatenate([chunk(marks[key], 2, r).T for key in "qkv"], axis=1)} for r in range(2)
    }
    compare(placement, marks, expected)
    prove(placement)
    own = layout(("tp",), Rule(name("*"), (ext("_"), split(ext("_"), "tp")), (), (Transposed(),)))
    placement = resolve(own, parameters={}, mesh={"tp": 2}, shapes={"w": (4, 3)})
    marks = iota({"w": (4, 3)})
    compare(placement, marks, {r: {"w": marks["w"].T[:, 2 * r : 2 * r + 2]} for r in range(2)})


def test_rules_and_stores_are_there_when_their_condition_is_not_0() -> None:
    tied = Rule(name("head"), None, (), (Tied(name("embed")), When(size("tied"))))
    own = Rule(name("head"), None, (), (rep("dp"), When(Operation("-", Number(1), size("tied")))))
    steps = (PadTo(size("dp")), SplitOver(("dp",)))
    store = Store(name("f"), name("b"), Flat("module", whole=steps), when=size("flat"))
    embed = Rule(name("embed"), None, (), (rep("dp"),))
    model = layout(("dp",), embed, tied, own, parameters=("tied", "flat"), stores=(store,))
    shapes = {"embed": (2,), "head": (2,)}
    found = {
        (t, f): resolve(model, parameters={"tied": t, "flat": f}, mesh={"dp": 2}, shapes=shapes).arrays(0)
        for t in (0, 1)
        for f in (0, 1)
    }
    assert found == {
        (0, 0): {"embed": (2,), "head": (2,)},
        (0, 1): {"b": (2,)},
        (1, 0): {"embed": (2,)},
        (1, 1): {"b": (1,)},
    }
