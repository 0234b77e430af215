"""The presets: each proved on its family's models, compared with numpy, converted to all others and back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import permutations

import numpy as np
import pytest
from layout_oracle import Arrays, chunk, compare, iota, padded

from ckptd.errors import InvalidRequest, LayoutRefused
from ckptd.layout import plan, presets
from ckptd.layout.proof import prove
from ckptd.layout.resolve import Placement, resolve

NAMES = (
    "deepspeed-zero1", "deepspeed-zero2", "deepspeed-zero3", "hf-gpt2", "hf-llama", "hf-mixtral",
    "megatron-gpt",
    "torch-dcp", "torch-ddp", "torch-fsdp2", "torch-fsdp2-tp", "torch-hsdp", "torch-tp",
)  # fmt: skip

LAYERS, GROUPS, HEADS, HEAD, HIDDEN, FFN, VOCABULARY, EXPERTS = 2, 2, 2, 3, 6, 8, 10, 4
Shapes = dict[str, tuple[int, ...]]


def model(kind: str, *, tied: bool = False, layers: int = LAYERS) -> Shapes:
    """A small llama, gpt2 (with biases, multi-head) or mixtral under the family's logical names."""
    heads = 1 if kind == "gpt2" else HEADS
    widths = {"q": GROUPS * heads * HEAD, "k": GROUPS * HEAD, "v": GROUPS * HEAD}
    shapes: Shapes = {"embed.weight": (VOCABULARY, HIDDEN)}
    if kind == "gpt2":
        shapes["positions.weight"] = (7, HIDDEN)
    for layer in range(layers):
        own: Shapes = {"attn.norm.weight": (HIDDEN,), "mlp.norm.weight": (HIDDEN,)}
        own |= {f"attn.{part}.weight": (width, HIDDEN) for part, width in widths.items()}
        own["attn.out.weight"] = (HIDDEN, widths["q"])
        if kind == "mixtral":
            own["mlp.router.weight"] = (EXPERTS, HIDDEN)
        blocks = [f"mlp.experts.{e}" for e in range(EXPERTS)] if kind == "mixtral" else ["mlp"]
        inner = ("fc",) if kind == "gpt2" else ("gate", "up")
        for block in blocks:
            own |= {f"{block}.{part}.weight": (FFN, HIDDEN) for part in inner}
            own[f"{block}.down.weight"] = (HIDDEN, FFN)
        if kind == "gpt2":
            own |= {name.replace("weight", "bias"): shape[:1] for name, shape in own.items()}
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in own.items()}
    shapes["norm.weight"] = (HIDDEN,)
    if kind == "gpt2":
        shapes["norm.bias"] = (HIDDEN,)
    if not tied:
        shapes["lm_head.weight"] = (VOCABULARY, HIDDEN)
    return shapes


MEGATRON = {
    "layers": LAYERS, "vp": 1, "g": GROUPS, "r": HEADS, "d": HEAD, "e": 0, "divisible_by": 4, "tied": 0,
    "te": 0, "grouped": 0, "distributed": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    preset: str
    mesh: Mapping[str, int] = field(default_factory=dict)
    parameters: Mapping[str, int] = field(default_factory=dict)
    state: str = ""

    def place(self, shapes: Shapes) -> Placement:
        names = list(shapes)
        orders = {"group[0]": names[1::2], "group[1]": names[::2]}
        # One logical name for each array: gate and up are one.
        orders["experts"] = [name for name in names if re.search(r"experts\.\d+\.(gate|down)", name)]
        return resolve(
            presets.load(self.preset), parameters=self.parameters, mesh=self.mesh, shapes=shapes,
            orders=orders, state=self.state,
        )  # fmt: skip


def megatron(
    kind: str, tp: int, cp: int, dp: int, pp: int, ep: int = 1, etp: int = 1, state: str = "", **more: int
) -> Case:
    own = {"r": 1} if kind == "gpt2" else {"e": EXPERTS} if kind == "mixtral" else {}
    mesh = {"tp": tp, "cp": cp, "dp": dp, "pp": pp, "ep": ep, "etp": etp}
    return Case("megatron-gpt", mesh, MEGATRON | own | more, state)


GENERIC = [
    Case("torch-ddp", {"dp": 2}),
    Case("torch-fsdp2", {"dp": 4}),
    Case("torch-hsdp", {"shard": 3, "replicate": 2}),
    Case("torch-dcp", {"dp": 3}),
    Case("torch-tp", {"tp": 3}),
    Case("torch-fsdp2-tp", {"tp": 2, "dp": 3}),
    Case("deepspeed-zero1", {"dp": 3}, {"alignment": 1}),
    Case("deepspeed-zero1", {"dp": 2}, {"alignment": 8}, "exp_avg"),
    Case("deepspeed-zero2", {"dp": 4}, {"alignment": 1}, "exp_avg_sq"),
    Case("deepspeed-zero3", {"dp": 4}),
    Case("deepspeed-zero3", {"dp": 3}, state="exp_avg"),
]
LAYERED = {"layers": LAYERS}
FAMILIES = {
    "llama": [
        Case("hf-llama", {}, LAYERED),
        megatron("llama", 2, 1, 2, 1, vp=2),
        megatron("llama", 3, 2, 1, 2, te=1),  # more ranks than query groups: they are cut
        megatron("llama", 2, 1, 3, 2, state="exp_avg", distributed=1),
    ],
    "gpt2": [Case("hf-gpt2", {}, LAYERED), megatron("gpt2", 2, 1, 1, 2), megatron("gpt2", 2, 1, 2, 1, te=1)],
    "mixtral": [
        Case("hf-mixtral", {}, {"layers": LAYERS, "experts": EXPERTS}),
        megatron("mixtral", 2, 1, 2, 2, ep=2, etp=2),
        megatron("mixtral", 2, 2, 2, 1, ep=4, te=1, grouped=1),
        megatron("mixtral", 2, 1, 2, 2, ep=2, state="fp32", distributed=1),
    ],
}
Flat = dict[tuple[int, str], np.ndarray]


def test_names_and_load() -> None:
    assert presets.names() == NAMES
    assert all(presets.load(name).name == name and presets.text(name) for name in NAMES)
    assert presets.load("torch-ddp") is presets.load("torch-ddp")
    with pytest.raises(InvalidRequest, match=r"there is no preset ../torch.*hf-gpt2, hf-llama"):
        presets.load("../torch")


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_preset_is_proved_on_its_family(kind: str) -> None:
    shapes = model(kind)
    for case in FAMILIES[kind] + GENERIC:
        report = prove(case.place(shapes))
        assert report.tensors == len(shapes) and not report.lossy, case
        assert len(report.unconfirmed) == len(shapes)


def empty(placement: Placement) -> Flat:
    return {
        (place, name): np.full(int(np.prod(shape)), -2)
        for place in range(placement.mesh.size)
        for name, shape in placement.arrays(place).items()
    }


def convert(source: Placement, held: Flat, target: Placement) -> Flat:
    """Every array of the target, from the source's arrays; what no tensor fills is -2."""
    found = empty(target)
    for name in source.names:
        copies = plan.copies(source.tiles(name), target.tiles(name))
        plan.execute(
            copies, lambda place, array: held[place, array], lambda place, array: found[place, array]
        )
    return found


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_conversion_and_back_is_bit_identical_for_every_pair(kind: str) -> None:
    shapes = model(kind)
    cases = FAMILIES[kind] + GENERIC
    whole = Case("torch-ddp", {"dp": 1})
    logical: Flat = {(0, name): array.ravel() for name, array in iota(shapes).items()}
    placements = [case.place(shapes) for case in cases]
    held = [convert(whole.place(shapes), logical, placement) for placement in placements]
    pairs = 0
    own = len(FAMILIES[kind])
    for a, b in permutations(range(len(cases)), 2):
        if kind != "llama" and min(a, b) >= own:
            continue  # both are of no family, and the llama's turn has them
        there = convert(placements[a], held[a], placements[b])
        for key, array in there.items():
            np.testing.assert_array_equal(array, held[b][key], err_msg=f"{cases[a]} -> {cases[b]}: {key}")
        pairs += 1
    # a -> b gives what b holds, for every a and b: so a -> b -> a gives what a holds.
    print(f"{pairs} pairs of {len(cases)} layouts of the {kind} family")
    generic = len(GENERIC) if kind != "llama" else 0
    assert pairs == len(cases) * (len(cases) - 1) - generic * max(generic - 1, 0)


# --- against arrays that numpy made ----------------------------------------------------------------


def test_megatron_holds_what_megatron_holds() -> None:
    """TP x PP x VPP with GQA, SwiGLU and a padded vocabulary: layers of a virtual stage, rows of a group."""
    shapes, tp, dp, pp, vp = model("llama", layers=4), 2, 2, 2, 2
    placement = megatron("llama", tp, 1, dp, pp, vp=vp, layers=4).place(shapes)
    marks = iota(shapes)
    expected: dict[int, Arrays] = {}
    for rank in range(tp * dp * pp):
        t, p = rank % tp, rank // (tp * dp)
        own: Arrays = {}
        if p == 0:
            own["embedding.word_embeddings.weight"] = chunk(padded(marks["embed.weight"], 4 * tp), tp, t)
        for local, layer in enumerate((p, p + pp)):  # one layer per virtual stage, and the stages take turns
            own_head = f"layers.{layer}."
            m = {
                name.removeprefix(own_head).removesuffix(".weight"): array
                for name, array in marks.items()
                if name.startswith(own_head)
            }
            q, k, v = (m[f"attn.{part}"].reshape(GROUPS, -1, HIDDEN) for part in "qkv")
            groups = np.concatenate([q, k, v], axis=1)[t * GROUPS // tp : (t + 1) * GROUPS // tp]
            head = f"decoder.layers.{local}."
            own[head + "input_layernorm.weight"] = m["attn.norm"]
            own[head + "self_attention.linear_proj.weight"] = chunk(m["attn.out"], tp, t, 1)
            own[head + "self_attention.linear_qkv.weight"] = groups.reshape(-1, HIDDEN)
            own[head + "pre_mlp_layernorm.weight"] = m["mlp.norm"]
            own[head + "mlp.linear_fc1.weight"] = np.concatenate(
                [chunk(m["mlp.gate"], tp, t), chunk(m["mlp.up"], tp, t)]
            )
            own[head + "mlp.linear_fc2.weight"] = chunk(m["mlp.down"], tp, t, 1)
        if p == pp - 1:
            own["decoder.final_layernorm.weight"] = marks["norm.weight"]
            own["output_layer.weight"] = chunk(padded(marks["lm_head.weight"], 4 * tp), tp, t)
        expected[rank] = own
    compare(placement, marks, expected)
    assert list(placement.arrays(0)) == list(expected[0])


def test_megatron_experts_are_on_the_folded_mesh() -> None:
    shapes = model("mixtral")
    placement = megatron("mixtral", 2, 1, 4, 1, ep=2, etp=2, te=1).place(shapes)
    for rank in range(8):
        etp, ep = rank % 2, rank // 2 % 2  # and edp = rank // 4
        arrays = placement.arrays(rank)
        mine = [name for name in arrays if "layers.1.mlp.experts" in name]
        assert len(mine) == 2 * EXPERTS // 2
        gate = placement.tiles(f"layers.1.mlp.experts.{2 * ep + 1}.gate.weight", [rank])
        assert gate.arrays == ("decoder.layers.1.mlp.experts.local_experts.1.linear_fc1.weight",)
        assert gate.offsets.tolist() == [[etp * FFN // 2, 0]]
        assert len(placement.tiles(f"layers.1.mlp.experts.{2 * (1 - ep)}.gate.weight", [rank])) == 0
        assert arrays["decoder.layers.0.mlp.router.weight"] == (EXPERTS, HIDDEN)


def test_a_tied_model_has_no_output_layer() -> None:
    alias = model("llama")
    placement = megatron("llama", 2, 1, 1, 2, tied=1).place(alias)
    assert prove(placement).tied == {"lm_head.weight": "embed.weight"}
    assert "output_layer.weight" not in placement.arrays(3)
    # The last stage of a real one has a copy of the embedding under that name, and it is no surprise.
    held = {place: dict(placement.arrays(place)) for place in range(4)}
    held[3]["output_layer.weight"] = (8, HIDDEN)
    prove(placement, stored=held)
    for case in (megatron("llama", 2, 1, 1, 2, tied=1), Case("hf-llama", {}, LAYERED)):
        report = prove(case.place(model("llama", tied=True)))
        assert not report.tied and report.tensors == len(alias) - 1
    untied = megatron("llama", 2, 1, 1, 2).place(model("llama", tied=True))
    with pytest.raises(LayoutRefused, match="output_layer"):
        prove(untied, stored=held)


def test_hf_gpt2_keeps_weights_transposed() -> None:
    shapes = model("gpt2")
    placement = Case("hf-gpt2", {}, LAYERED).place(shapes)
    marks = iota(shapes)
    expected: Arrays = {
        "transformer.wte.weight": marks["embed.weight"],
        "transformer.wpe.weight": marks["positions.weight"],
    }
    for layer in range(LAYERS):
        own, head = f"layers.{layer}.", f"transformer.h.{layer}."
        for part, ours in {"ln_1": "attn.norm", "ln_2": "mlp.norm"}.items():
            expected |= {f"{head}{part}.{kind}": marks[f"{own}{ours}.{kind}"] for kind in ("weight", "bias")}
        for part, ours in {"attn.c_proj": "attn.out", "mlp.c_fc": "mlp.fc", "mlp.c_proj": "mlp.down"}.items():
            expected[f"{head}{part}.weight"] = marks[f"{own}{ours}.weight"].T
            expected[f"{head}{part}.bias"] = marks[f"{own}{ours}.bias"]
        for kind in ("weight", "bias"):
            fused = np.concatenate([marks[f"{own}attn.{part}.{kind}"] for part in "qkv"])
            expected[f"{head}attn.c_attn.{kind}"] = fused.T
    expected |= {f"transformer.ln_f.{kind}": marks[f"norm.{kind}"] for kind in ("weight", "bias")}
    expected["lm_head.weight"] = marks["lm_head.weight"]
    compare(placement, marks, {0: expected})


@pytest.mark.parametrize("dp", [1, 2, 3, 5])
def test_deepspeed_buffers(dp: int) -> None:
    shapes: Shapes = {"a": (3, 5), "b": (4,), "c": (2, 3), "d": (7,)}
    orders = {"group[0]": ["c", "a"], "group[1]": ["b", "d"]}
    marks = iota(shapes)
    cases = ((1, "fp32", 1), (2, "exp_avg", 1), (2, "fp32", 4), (3, "fp32", 1), (3, "exp_avg_sq", 1))
    for stage, state, alignment in cases:
        placement = resolve(
            presets.load(f"deepspeed-zero{stage}"), parameters={} if stage == 3 else {"alignment": alignment},
            mesh={"dp": dp}, shapes=shapes, orders=orders, state=state,
        )  # fmt: skip
        expected: dict[int, Arrays] = {}
        for rank in range(dp):
            own: Arrays = {}
            for group in (0, 1):
                items = [marks[name].ravel() for name in orders[f"group[{group}]"]]
                if stage == 3:
                    fp32 = f"fp32_flat_groups[{group}]"
                    key = fp32 if state == "fp32" else f"optimizer_state_dict.state[{group}].{state}"
                    value = np.concatenate([chunk(padded(item, dp), dp, rank) for item in items])
                else:
                    fp32 = f"single_partition_of_fp32_groups[{group}]"
                    key = fp32 if state == "fp32" else f"base_optimizer_state.state[{group}].{state}"
                    flat = np.concatenate([padded(items[0], alignment), items[1]])
                    value = chunk(padded(flat, 2 * dp), dp, rank)
                    if state == "fp32":
                        value = value[: max(0, len(flat) - rank * len(value))]
                own[f"optimizer_state_dict.{key}"] = value
            expected[rank] = own
        compare(placement, marks, expected)
        prove(placement)


def test_torch_presets_and_tensors_without_dimensions() -> None:
    """As torch: rank = dp_rank * tp + tp_rank; FSDP2 cuts what a tp rank has; a step is everywhere."""
    tp, dp = 2, 3
    shapes: Shapes = {
        "x.0.wq.weight": (10, 3), "x.0.wo.weight": (7, 4), "x.0.norm.weight": (4,), "x.0.wq.weight.step": (),
        "x.0.wo.bias": (5,),
    }  # fmt: skip
    marks = iota(shapes)
    expected: dict[int, Arrays] = {}
    for rank in range(tp * dp):
        t, s = rank % tp, rank // tp
        expected[rank] = {
            "x.0.wq.weight": chunk(chunk(marks["x.0.wq.weight"], tp, t), dp, s),
            "x.0.wo.weight": chunk(chunk(marks["x.0.wo.weight"], tp, t, 1), dp, s),
            "x.0.norm.weight": chunk(marks["x.0.norm.weight"], dp, s),
            "x.0.wq.weight.step": marks["x.0.wq.weight.step"],
            "x.0.wo.bias": chunk(marks["x.0.wo.bias"], dp, s),
        }
    placement = Case("torch-fsdp2-tp", {"tp": tp, "dp": dp}).place(shapes)
    compare(placement, marks, expected)
    prove(placement)
    hsdp = Case("torch-hsdp", {"shard": 3, "replicate": 2}).place(shapes)
    full = {r: {name: chunk(a, 3, r % 3) if a.ndim else a for name, a in marks.items()} for r in range(6)}
    compare(hsdp, marks, full)
    dims = {"x.0.wq.weight": 0, "x.0.wo.weight": 1}
    only_tp = {
        t: {name: chunk(a, tp, t, dims[name]) if name in dims else a for name, a in marks.items()}
        for t in range(tp)
    }
    compare(Case("torch-tp", {"tp": tp}).place(shapes), marks, only_tp)
    for preset in ("torch-fsdp2", "torch-dcp"):
        own = {r: {name: chunk(a, 4, r) if a.ndim else a for name, a in marks.items()} for r in range(4)}
        compare(Case(preset, {"dp": 4}).place(shapes), marks, own)


def test_a_wrong_size_is_refused_with_the_line_of_the_preset() -> None:
    shapes = model("llama")
    with pytest.raises(LayoutRefused, match=r"linear_proj.*has shape") as caught:
        megatron("llama", 2, 1, 1, 1, d=HEAD + 1).place(shapes)
    line = presets.text("megatron-gpt").splitlines()[caught.value.rule - 1]
    assert "linear_proj.weight" in line
    with pytest.raises(LayoutRefused, match="is no whole number"):
        megatron("llama", 1, 1, 1, 3).place(shapes)
    with pytest.raises(LayoutRefused, match="no rule claims"):
        prove(Case("hf-llama", {}, LAYERED).place(shapes | {"vision.weight": (3,)}))
