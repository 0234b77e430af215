"""ckptd.save, ckptd.load and ckptd.open with torch's tensors, modules and optimizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ckptd
from ckptd.client.tensors import DTYPES
from ckptd.errors import CorruptCheckpoint, InvalidRequest, NotFound, StateMismatch, UnsafeObject
from ckptd.storage import place
from ckptd.storage.store import AlreadyThere


def trained(seed: int, optimizer: str = "AdamW", **options: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 33), nn.BatchNorm1d(33), nn.Linear(33, 5))
    opt = getattr(torch.optim, optimizer)(model.parameters(), lr=0.05, **options)
    for _ in range(3):
        step(model, opt)
    return model, opt


def step(model: nn.Module, opt: torch.optim.Optimizer) -> None:
    opt.zero_grad()
    model(torch.randn(7, 12)).square().mean().backward()
    opt.step()


def same_states(left: torch.optim.Optimizer, right: torch.optim.Optimizer) -> None:
    ours, theirs = left.state_dict(), right.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    for key, state in ours["state"].items():
        assert state.keys() == theirs["state"][key].keys()
        for name, value in state.items():
            other = theirs["state"][key][name]
            assert torch.equal(value, other) if torch.is_tensor(value) else value == other
            assert not torch.is_tensor(value) or (value.dtype, value.device) == (other.dtype, other.device)


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        ("AdamW", {}),
        ("AdamW", {"foreach": True}),
        ("AdamW", {"fused": True}),
        ("Adam", {"amsgrad": True}),
        ("SGD", {"momentum": 0.9}),
        ("Adafactor", {}),
        ("Rprop", {}),
    ],
)
def test_a_fresh_optimizer_goes_on_like_the_saved_one(tmp_path: Path, optimizer: str, options: Any) -> None:
    model, opt = trained(1, optimizer, **options)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1)
    step(model, opt)
    scheduler.step()
    ckptd.save(str(tmp_path / "c"), {"model": model, "opt": opt, "scheduler": scheduler, "epoch": 4}, step=3)
    torch.manual_seed(99)
    fresh = nn.Sequential(nn.Linear(12, 33), nn.BatchNorm1d(33), nn.Linear(33, 5))
    fresh_opt = getattr(torch.optim, optimizer)(fresh.parameters(), lr=0.5, **options)
    fresh_scheduler = torch.optim.lr_scheduler.StepLR(fresh_opt, 1)
    steps: list[int] = []
    fresh_opt.register_step_pre_hook(lambda *_: steps.append(1))
    state = {"model": fresh, "opt": fresh_opt, "scheduler": fresh_scheduler, "epoch": 0}
    report = ckptd.load(str(tmp_path / "c"), state)
    assert not steps, "loading stepped the optimizer"
    assert (report.step, report.missing, report.unexpected, state["epoch"]) == (3, (), (), 4)
    same_states(opt, fresh_opt)
    assert scheduler.state_dict() == fresh_scheduler.state_dict()
    torch.manual_seed(5)
    step(model, opt)
    torch.manual_seed(5)
    step(fresh, fresh_opt)
    for ours, theirs in zip(model.state_dict().values(), fresh.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


HOW = ("foreach", "fused", "capturable", "differentiable")
WAYS = ({"foreach": False}, {"foreach": True}, {"fused": True})


@pytest.mark.parametrize("saved", WAYS)
@pytest.mark.parametrize("live", WAYS)
def test_how_an_optimizer_computes_is_its_own(tmp_path: Path, saved: Any, live: Any) -> None:
    """Its state and settings come from the checkpoint, and it goes on in the way that it was made for."""
    model, opt = trained(1, "AdamW", weight_decay=0.3, **saved)
    ckptd.save(str(tmp_path / "c"), {"model": model, "opt": opt})
    torch.manual_seed(99)
    fresh = nn.Sequential(nn.Linear(12, 33), nn.BatchNorm1d(33), nn.Linear(33, 5))
    fresh_opt = torch.optim.AdamW(fresh.parameters(), lr=0.5, **live)
    made_as = {key: fresh_opt.param_groups[0][key] for key in HOW}
    ckptd.load(str(tmp_path / "c"), {"model": fresh, "opt": fresh_opt})
    group = fresh_opt.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (0.05, 0.3)
    assert {key: group[key] for key in HOW} == made_as
    for seed in range(3):
        for which in ((model, opt), (fresh, fresh_opt)):
            torch.manual_seed(seed)
            step(*which)
    same_bits = {"rtol": 0.0, "atol": 0.0} if saved == live else {"rtol": 1e-4, "atol": 1e-5}
    batch = torch.randn(7, 12)
    torch.testing.assert_close(fresh(batch), model(batch), **same_bits)


def test_every_dtype_and_every_memory_layout(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(7)
    state: dict[str, torch.Tensor] = {}
    for code, dtype in DTYPES.items():
        raw = torch.randint(0, 2, (6, 10 * dtype.itemsize), dtype=torch.uint8, generator=generator)
        state[code] = raw.view(dtype) if dtype != torch.bool else raw.bool()
    wide = torch.randn(4, 3, 5, 6, generator=generator)
    state |= {
        "channels_last": wide.to(memory_format=torch.channels_last),
        "transposed": torch.randn(9, 4, generator=generator).t(),
        "strided": torch.randn(20, 8, generator=generator)[::3, 1:7:2],
        "expanded": torch.randn(5, 1, generator=generator).expand(5, 4),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "parameter": nn.Parameter(torch.randn(3, generator=generator)),
        "conjugate": torch.randn(3, 2, dtype=torch.complex64, generator=generator).conj(),
    }
    ckptd.save(str(tmp_path / "c"), state)
    target = {}
    for name, tensor in state.items():
        base = torch.zeros(tensor.numel() * 9 + 64, dtype=tensor.dtype)
        resolved = tensor.detach().resolve_conj()
        target[name] = base.as_strided(resolved.shape, resolved.stride())
    ckptd.load(str(tmp_path / "c"), target)
    opened = ckptd.open(str(tmp_path / "c"))
    for name, tensor in state.items():
        expected = tensor.detach().resolve_conj().contiguous().view(-1).view(torch.uint8)
        for found in (target[name], opened[name][...]):
            assert found.dtype == tensor.dtype and found.shape == tensor.shape
            assert torch.equal(found.contiguous().view(-1).view(torch.uint8), expected), name


def test_what_differs_is_named_and_nothing_is_changed(tmp_path: Path) -> None:
    url = str(tmp_path / "c")
    ckptd.save(url, {"a": torch.ones(3), "b": torch.ones(2, 2), "only.there": torch.ones(1)})

    def refused(into: dict[str, torch.Tensor], text: str, **options: Any) -> None:
        with pytest.raises(StateMismatch, match=text):
            ckptd.load(url, into, **options)
        assert all((t == 0).all() for t in into.values())

    zeros = {"a": torch.zeros(3), "b": torch.zeros(2, 2)}
    refused(
        {**zeros, "only.here": torch.zeros(1)}, "1 not in the checkpoint: only.here; 1 only in .*: only.there"
    )
    refused(dict(zeros), "only.there", allow_unexpected=["other*"])
    refused(
        {**zeros, "b": torch.zeros(4)}, r"b is stored as F32 \[2, 2\], and is F32 \[4\] here", strict=False
    )
    refused({**zeros, "b": torch.zeros(2, 2).double()}, "stored as F32", strict=False)
    with pytest.raises(StateMismatch, match="no memory"):
        ckptd.load(url, {"a": torch.zeros(3, device="meta")}, strict=False)
    report = ckptd.load(
        url,
        {"a": zeros["a"], "b": torch.zeros(2, 2).double(), "mine": torch.zeros(1)},
        allow_missing="mi*",
        allow_unexpected=True,
        cast=True,
    )
    assert (report.missing, report.unexpected, report.cast) == (("mine",), ("only.there",), ("b",))
    assert (zeros["a"] == 1).all()


def test_a_damaged_block_reaches_no_tensor(tmp_path: Path) -> None:
    url = str(tmp_path / "c")
    ckptd.save(url, {"a": torch.ones(1 << 20)})
    file = tmp_path / "c" / place.object_name(0)
    data = bytearray(file.read_bytes())
    data[4096 + 3_000_000] ^= 1
    file.write_bytes(data)
    target = torch.zeros(1 << 20)
    with pytest.raises(CorruptCheckpoint, match="damaged"):
        ckptd.load(url, {"a": target})
    assert set(target.unique().tolist()) <= {0.0, 1.0}
    at = 3_000_000 // 65536 * 65536 // 4
    assert (target[at : at + 16384 - 1024] == 0).all()
    file.write_bytes(data[:-5])
    target.zero_()
    with pytest.raises(CorruptCheckpoint, match="truncated"):
        ckptd.load(url, {"a": target})
    assert (target == 0).all()


def test_a_lone_module_finds_its_names_under_a_key(tmp_path: Path) -> None:
    model, opt = trained(1)
    ckptd.save(str(tmp_path / "a"), {"model": model, "opt": opt})
    ckptd.save(str(tmp_path / "b"), model)
    for place_ in ("a", "b"):
        other, _ = trained(2)
        assert ckptd.load(str(tmp_path / place_), other).tensors == len(model.state_dict())
        for ours, theirs in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
            assert torch.equal(ours, theirs)


def test_the_configured_store_is_where_ckptd_urls_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPTD_STORE", str(tmp_path))
    manifest = ckptd.save("ckptd://llama/step-7", {"a": torch.ones(3)})
    assert (manifest.job, manifest.step, manifest.form) == ("llama", 7, "consolidated")
    assert (tmp_path / "llama" / "step-00000007.g00000" / "manifest.json").exists()
    assert ckptd.open("ckptd://llama/latest")["a"][1:].tolist() == [1.0, 1.0]
    with pytest.raises(AlreadyThere):
        ckptd.save("ckptd://llama/step-7", {"a": torch.ones(3)})
    with pytest.raises(NotFound):
        ckptd.open("ckptd://llama/step-8")


def test_values_and_nested_dicts(tmp_path: Path) -> None:
    saved = {"a": {"x": torch.ones(2), "n": [1, 2]}, "list": [torch.zeros(1), 5], "plain": {"k": (1, "z")}}
    ckptd.save(str(tmp_path / "c"), saved)
    into = {"a": {"x": torch.zeros(2), "n": None}, "list": [torch.ones(1), 0], "plain": None}
    ckptd.load(str(tmp_path / "c"), into)
    assert into["a"]["n"] == [1, 2] and into["list"][1] == 5 and into["plain"] == {"k": (1, "z")}  # type: ignore[index]
    with pytest.raises(InvalidRequest, match="needs its model"):
        ckptd.load(str(tmp_path / "c"), trained(1)[1])


class Noted(nn.Linear):
    """A module that keeps more than its tensors."""

    notes: Any = None

    def get_extra_state(self) -> Any:
        return self.notes

    def set_extra_state(self, state: Any) -> None:
        self.notes = state


def noted(notes: Any) -> nn.Module:
    model = nn.Sequential(Noted(4, 3), nn.Linear(3, 2), Noted(2, 2))
    for index in (0, 2):
        model[index].notes = notes
    return model


@pytest.mark.parametrize("alone", ["loaded", "both", "neither"])
def test_the_extra_states_of_modules_are_saved_and_loaded(tmp_path: Path, alone: str) -> None:
    kept, fresh = noted({"scale": torch.tensor([1.5, 2.5]), "n": [3, None]}), noted(None)
    url = str(tmp_path / "step-1")
    ckptd.save(url, kept if alone == "both" else {"model": kept})
    report = ckptd.load(url, into={"model": fresh} if alone == "neither" else fresh)
    assert not report.missing and not report.unexpected
    for mine, theirs in zip(kept.modules(), fresh.modules(), strict=True):
        if isinstance(theirs, Noted):
            assert isinstance(mine, Noted)
            assert torch.equal(theirs.notes["scale"], mine.notes["scale"]) and theirs.notes["n"] == [3, None]
    same = zip(kept.state_dict().values(), fresh.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in same if torch.is_tensor(a))


def test_the_extra_state_of_the_root_module_has_a_name_too(tmp_path: Path) -> None:
    model, fresh = Noted(2, 2), Noted(2, 2)
    model.notes = {"n": 7}
    ckptd.save(str(tmp_path / "step-1"), model)
    ckptd.load(str(tmp_path / "step-1"), into=fresh)
    assert fresh.notes == {"n": 7}
    ckptd.save(str(tmp_path / "step-2"), {"model": model})
    fresh.notes = None
    ckptd.load(str(tmp_path / "step-2"), into=fresh)
    assert fresh.notes == {"n": 7}


def test_a_missing_or_surplus_extra_state_is_named(tmp_path: Path) -> None:
    with_notes, without = noted({"n": 1}), nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2), nn.Linear(2, 2))
    ckptd.save(str(tmp_path / "step-1"), {"model": with_notes})
    ckptd.save(str(tmp_path / "step-2"), {"model": without})
    with pytest.raises(StateMismatch, match=r"2 only in the checkpoint: model\.0\.extra_state"):
        ckptd.load(str(tmp_path / "step-1"), into={"model": without})
    with pytest.raises(StateMismatch, match=r"2 not in the checkpoint: model\.0\.extra_state"):
        ckptd.load(str(tmp_path / "step-2"), into={"model": noted(None)})
    report = ckptd.load(str(tmp_path / "step-2"), into={"model": noted(None)}, allow_missing="*.extra_state")
    assert report.missing == ("model.0.extra_state", "model.2.extra_state")


def test_an_extra_state_that_is_a_tensor_alone_is_named_too(tmp_path: Path) -> None:
    ckptd.save(str(tmp_path / "step-1"), {"model": noted(torch.ones(3))})
    fresh = noted(None)
    ckptd.load(str(tmp_path / "step-1"), into={"model": fresh})
    assert torch.equal(fresh.get_submodule("0").notes, torch.ones(3))
    plain = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2), nn.Linear(2, 2))
    with pytest.raises(StateMismatch, match=r"2 only in the checkpoint: model\.0\.extra_state"):
        ckptd.load(str(tmp_path / "step-1"), into={"model": plain})


def test_an_extra_state_that_has_no_safe_form_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnsafeObject, match="extra"):
        ckptd.save(str(tmp_path / "step-1"), {"model": noted(object())})
    assert not list(tmp_path.iterdir())
