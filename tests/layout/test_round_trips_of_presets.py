"""A -> B -> A is bit-identical for every ordered pair of presets of one family, on random models and meshes.

A family is a model: all presets that can hold it, at meshes of their own.  Every placement is first written
from the logical tensors by numpy, counting that each element of each array is written once, by a tile or as
padding.  Then A is moved to B by the plan, into arrays that hold other bits everywhere: what is no padding
must be exactly what B should hold, and what is padding must not be touched; and back the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from math import prod

import numpy as np
import pytest
from numpy.random import Generator
from numpy.typing import NDArray

from ckptd.layout import presets
from ckptd.layout.plan import Plan, execute, plan
from ckptd.layout.proof import prove
from ckptd.layout.resolve import Placement, resolve
from ckptd.layout.tiles import Tiles

Words = NDArray[np.uint16]
Shapes = dict[str, tuple[int, ...]]
Arrays = dict[tuple[int, str], Words]


@dataclass(frozen=True)
class Model:
    family: str
    sizes: Mapping[str, int]
    shapes: Shapes
    te: int = 0


@dataclass
class Held:
    """A placement, the bits that its arrays should have, and which elements are padding."""

    label: str
    placement: Placement
    arrays: Arrays = field(default_factory=dict)
    padding: dict[tuple[int, str], NDArray[np.bool_]] = field(default_factory=dict)
    tiles: dict[str, Tiles] = field(default_factory=dict)


# --- models: the family's logical names ---------------------------------------------------------------------


def attention(s: Mapping[str, int], at: str, bias: bool, norms: bool) -> Shapes:
    h, d, g, r = s["h"], s["d"], s["g"], s["r"]
    found: Shapes = {f"{at}.norm.weight": (h,)}
    for name, rows in (("q", g * r * d), ("k", g * d), ("v", g * d)):
        found[f"{at}.{name}.weight"] = (rows, h)
        if bias:
            found[f"{at}.{name}.bias"] = (rows,)
    found[f"{at}.out.weight"] = (h, g * r * d)
    if norms:
        found |= {f"{at}.{name}_norm.weight": (d,) for name in "qk"}
    return found


def gated(s: Mapping[str, int], at: str) -> Shapes:
    h, f = s["h"], s["f"]
    return {f"{at}.gate.weight": (f, h), f"{at}.up.weight": (f, h), f"{at}.down.weight": (h, f)}


def llama(s: Mapping[str, int], rng: Generator) -> Model:
    shapes: Shapes = {"embed.weight": (s["vocab"], s["h"])}
    bias, norms = bool(rng.integers(2)), bool(rng.integers(2))
    for n in range(s["layers"]):
        shapes |= attention(s, f"layers.{n}.attn", bias, norms)
        shapes |= {f"layers.{n}.mlp.norm.weight": (s["h"],)} | gated(s, f"layers.{n}.mlp")
    shapes["norm.weight"] = (s["h"],)
    if not s["tied"]:
        shapes["lm_head.weight"] = (s["vocab"], s["h"])
    return Model("llama", {**s, "e": 0}, shapes, te=int(rng.integers(2)))


def mixtral(s: Mapping[str, int], rng: Generator) -> Model:
    shapes: Shapes = {"embed.weight": (s["vocab"], s["h"])}
    for n in range(s["layers"]):
        shapes |= attention(s, f"layers.{n}.attn", False, False)
        shapes |= {f"layers.{n}.mlp.norm.weight": (s["h"],)}
        shapes[f"layers.{n}.mlp.router.weight"] = (s["e"], s["h"])
        for e in range(s["e"]):
            shapes |= gated(s, f"layers.{n}.mlp.experts.{e}")
    shapes |= {"norm.weight": (s["h"],), "lm_head.weight": (s["vocab"], s["h"])}
    return Model("mixtral", {**s, "tied": 0}, shapes, te=int(rng.integers(2)))


def gpt2(s: Mapping[str, int], rng: Generator) -> Model:
    h, f = s["h"], s["f"]
    shapes: Shapes = {"embed.weight": (s["vocab"], h), "positions.weight": (7, h)}
    for n in range(2):
        at = f"layers.{n}"
        shapes |= attention({**s, "r": 1}, f"{at}.attn", True, False)
        shapes |= {
            f"{at}.attn.norm.bias": (h,), f"{at}.attn.out.bias": (h,),
            f"{at}.mlp.norm.weight": (h,), f"{at}.mlp.norm.bias": (h,),
            f"{at}.mlp.fc.weight": (f, h), f"{at}.mlp.fc.bias": (f,),
            f"{at}.mlp.down.weight": (h, f), f"{at}.mlp.down.bias": (h,),
        }  # fmt: skip
    shapes |= {"norm.weight": (h,), "norm.bias": (h,)}
    if not s["tied"]:
        shapes["lm_head.weight"] = (s["vocab"], h)
    return Model("gpt2", {**s, "r": 1, "e": 0, "layers": 2}, shapes, te=int(rng.integers(2)))


def torchtitan(s: Mapping[str, int], rng: Generator) -> Model:
    """The state dict of a model and its optimizer, by torchtitan's names; steps have no dimensions."""
    h, f, heads = s["h"], s["f"], s["g"] * s["d"]
    shapes: Shapes = {"tok_embeddings.weight": (s["vocab"], h)}
    for n in range(2):
        at = f"layers.{n}"
        shapes |= {f"{at}.attention.{name}.weight": (heads, h) for name in ("wq", "wk", "wv")}
        shapes |= {f"{at}.attention.wo.weight": (h, heads), f"{at}.attention_norm.weight": (h,)}
        shapes |= {f"{at}.feed_forward.{name}.weight": (f, h) for name in ("w1", "w3")}
        shapes |= {f"{at}.feed_forward.w2.weight": (h, f), f"{at}.ffn_norm.weight": (h,)}
    shapes |= {"norm.weight": (h,), "output.weight": (s["vocab"], h), "freqs": (3, 2, 2)}
    for name, shape in list(shapes.items()):
        shapes |= {f"optim.state.{name}.exp_avg": shape, f"optim.state.{name}.step": ()}
    return Model("torchtitan", s, shapes)


MODELS = {"llama": llama, "mixtral": mixtral, "gpt2": gpt2, "torchtitan": torchtitan}


def random_sizes(rng: Generator) -> dict[str, int]:
    return {
        "layers": 4,
        "h": int(rng.integers(3, 7)),
        "g": int(rng.integers(2, 5)),
        "r": int(rng.integers(1, 4)),
        "d": int(rng.integers(1, 4)),
        "f": int(rng.integers(3, 9)),
        "e": int(rng.integers(2, 5)),
        "vocab": int(rng.integers(5, 14)),
        "tied": int(rng.integers(2)),
    }


# --- placements: every preset that can hold the model, at a mesh of its own ---------------------------------


def held(label: str, name: str, model: Model, mesh: dict[str, int], **more) -> Held:  # type: ignore[no-untyped-def]
    parameters = more.pop("parameters", {})
    layout = presets.load(name)
    at = ", ".join(f"{axis} {size}" for axis, size in mesh.items())
    placement = resolve(layout, parameters=parameters, mesh=mesh, shapes=model.shapes, **more)
    prove(placement)
    return Held(f"{label} ({at})", placement)


def torch_placements(model: Model, rng: Generator) -> Iterator[Held]:
    axes = {
        "torch-ddp": ("dp",), "torch-fsdp2": ("dp",), "torch-dcp": ("dp",), "torch-tp": ("tp",),
        "torch-hsdp": ("shard", "replicate"), "torch-fsdp2-tp": ("tp", "dp"),
    }  # fmt: skip
    for name, mesh in axes.items():
        yield held(name, name, model, {axis: int(rng.integers(2, 5 - len(mesh) + 1)) for axis in mesh})


def deepspeed_placements(model: Model, rng: Generator) -> Iterator[Held]:
    names = [str(name) for name in rng.permutation(list(model.shapes))]
    cut = int(rng.integers(1, len(names)))
    orders = {"group[0]": names[:cut], "group[1]": names[cut:]}
    for stage in (1, 2, 3):
        state = str(rng.choice(["fp32", "exp_avg", "exp_avg_sq"]))
        parameters = {} if stage == 3 else {"alignment": int(rng.choice([1, 4]))}
        mesh = {"dp": int(rng.integers(2, 5))}
        yield held(
            f"deepspeed-zero{stage} {state}", f"deepspeed-zero{stage}", model, mesh,
            parameters=parameters, orders=orders, state=state,
        )  # fmt: skip


def megatron(
    model: Model, label: str, rng: Generator, mesh: dict[str, int], vp: int, distributed: int
) -> Held:
    ranks = mesh["tp"] * mesh["cp"] * mesh["dp"]
    etp = ep = 1
    if model.sizes["e"]:
        ep = int(rng.choice([n for n in (2, 3, 4) if ranks % n == 0]))
        etp = int(rng.choice([n for n in (1, 2) if ranks // ep % n == 0]))
    whole = {**mesh, "etp": etp, "ep": ep, "edp": ranks // etp // ep}
    whole["domain"] = mesh["tp"] * mesh["pp"]
    parameters = {name: model.sizes[name] for name in ("layers", "g", "r", "d", "e", "tied")}
    parameters |= {
        "vp": vp,
        "divisible_by": int(rng.choice([2, 4])),
        "te": model.te,
        "distributed": distributed,
    }
    parameters["grouped"] = int(rng.integers(2))
    more: dict[str, object] = {}
    if distributed:
        state = str(rng.choice(["fp32", "exp_avg", "exp_avg_sq"]))
        more["state"], label = state, f"{label} {state}"
        if model.sizes["e"]:
            plain = held(label, "megatron-gpt", model, whole, parameters={**parameters, "distributed": 0})
            ranks_ = range(plain.placement.mesh.size)
            names = dict.fromkeys(name for rank in ranks_ for name in plain.placement.arrays(rank))
            more["orders"] = {"experts": [name for name in names if ".mlp.experts." in name]}
    return held(f"megatron-gpt {label} vp {vp}", "megatron-gpt", model, whole, parameters=parameters, **more)


def megatron_placements(model: Model, rng: Generator) -> Iterator[Held]:
    stages = model.sizes["layers"] // 2
    yield megatron(model, "dense", rng, {"tp": 2, "cp": 1, "dp": 2, "pp": 1}, 1, 0)
    sizes = [int(size) for size in rng.permutation([1, 1, 2])]
    staged = {**dict(zip(("tp", "cp", "dp"), sizes, strict=True)), "pp": 2}
    yield megatron(model, "staged", rng, staged, stages, 0)
    tp, dp = (int(size) for size in rng.permutation([1, 2]))
    flat = {"tp": tp, "cp": 1, "dp": dp, "pp": 2}
    yield megatron(model, "distributed", rng, flat, int(rng.integers(1, stages + 1)), 1)


def placements(model: Model, rng: Generator) -> Iterator[Held]:
    yield from torch_placements(model, rng)
    if model.family == "torchtitan":
        return
    yield from deepspeed_placements(model, rng)
    yield from megatron_placements(model, rng)
    parameters = {"layers": model.sizes["layers"]}
    if model.family == "mixtral":
        parameters["experts"] = model.sizes["e"]
    yield held(f"hf-{model.family}", f"hf-{model.family}", model, {}, parameters=parameters)


# --- what a placement should hold, by numpy -----------------------------------------------------------------


def write(it: Held, logical: dict[str, Words], rng: Generator) -> None:
    """Fills `arrays` and `padding`; asserts that each element of each array is written once."""
    times: dict[tuple[int, str], NDArray[np.int64]] = {}
    for place in range(it.placement.mesh.size):
        for name, shape in it.placement.arrays(place).items():
            it.arrays[place, name] = rng.integers(0, 1 << 16, prod(shape), np.uint16)
            it.padding[place, name] = np.zeros(prod(shape), bool)
            times[place, name] = np.zeros(prod(shape), np.int64)
        for filler in it.placement.fillers(place):
            key = (place, filler.array)
            at = positions(filler.start, filler.sizes, filler.strides)
            it.padding[key][at] = True
            times[key][at] += 1
    for name, whole in logical.items():
        tiles = it.tiles[name] = it.placement.tiles(name)
        for i in range(len(tiles)):
            low, size = tiles.offsets[i].tolist(), tiles.sizes[i].tolist()
            box = whole[tuple(slice(a, a + n) for a, n in zip(low, size, strict=True))]
            at = positions(int(tiles.start[i]), size, tiles.strides[i].tolist())
            key = (int(tiles.place[i]), tiles.arrays[tiles.array[i]])
            it.arrays[key][at] = box.reshape(-1)
            np.add.at(times[key], at, 1)
    for key, count in times.items():
        assert (count == 1).all(), f"{it.label}: {key} has elements that are written 0 or 2 times"


def positions(start: int, sizes, strides) -> NDArray[np.int64]:  # type: ignore[no-untyped-def]
    at = np.full((), start, np.int64)
    for size, stride in zip(sizes, strides, strict=True):
        at = at[..., None] + np.arange(size) * stride
    return at.reshape(-1)


# --- round trips --------------------------------------------------------------------------------------------


def planned(source: Held, target: Held) -> Plan:
    return plan((name, source.tiles[name], target.tiles[name]) for name in source.placement.names)


def moved(made: Plan, arrays: Arrays, target: Held) -> Arrays:
    """The target's arrays after the plan, which found other bits everywhere."""
    found = {key: ~array for key, array in target.arrays.items()}
    for name in made:
        execute(
            made.copies(name),
            lambda place, array: arrays[place, array],
            lambda place, array: found[place, array],
        )
    return found


def check_same(it: Held, found: Arrays, way: str) -> int:
    """Every element that is no padding has its bits; padding has those that were there before."""
    count = 0
    for key, expected in it.arrays.items():
        pad = it.padding[key]
        wrong = np.flatnonzero(np.where(pad, found[key] != ~expected, found[key] != expected))
        assert len(wrong) == 0, f"{way}: {len(wrong)} elements of {key} differ, the first is {wrong[0]}"
        count += int((~pad).sum())
    return count


def round_trips(seed: int, family: str) -> tuple[int, int, int]:
    """(ordered pairs, placements, elements compared) of one random model."""
    rng = np.random.default_rng(seed)
    model = MODELS[family](random_sizes(rng), rng)
    logical = {name: rng.integers(0, 1 << 16, shape, np.uint16) for name, shape in model.shapes.items()}
    all_held = list(placements(model, rng))
    for it in all_held:
        write(it, logical, rng)
    pairs = elements = 0
    for a, b in combinations(all_held, 2):
        way = f"seed {seed}, {a.label} <-> {b.label}"
        there, back = planned(a, b), planned(b, a)
        # a -> b -> a -> b: of both orders the way there and back.
        at_b = moved(there, a.arrays, b)
        at_a = moved(back, at_b, a)
        again = moved(there, at_a, b)
        elements += check_same(b, at_b, way) + check_same(a, at_a, way) + check_same(b, again, way)
        pairs += 2
    return pairs, len(all_held), elements


@pytest.mark.parametrize("family", MODELS)
def test_there_and_back_is_bit_identical_for_every_pair_of_presets(family: str) -> None:
    seed = 20261130
    pairs, placed, elements = round_trips(seed, family)
    print(f"{pairs} pairs of {placed} {family} placements, seed {seed}, {elements:,} elements compared")
    assert pairs == placed * (placed - 1)


@pytest.mark.soak
@pytest.mark.parametrize("family", MODELS)
def test_there_and_back_on_many_meshes(family: str) -> None:
    seeds = range(20261200, 20261220)
    found = [round_trips(seed, family) for seed in seeds]
    pairs, elements = sum(each[0] for each in found), sum(each[2] for each in found)
    print(
        f"{pairs} pairs of {family} placements, seeds {seeds[0]} .. {seeds[-1]}, "
        f"{elements:,} elements compared"
    )
