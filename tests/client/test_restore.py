"""A state that does not fit is refused by name, before anything is changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fakedaemon import FakeDaemon, Memory
from torch import nn
from trainees import Trainee, assert_same, attach, batch, seed_all, state_of

from ckptd import errors

Start = Callable[..., FakeDaemon]


def make(
    width: int = 4,
    dtype: torch.dtype = torch.float32,
    optimizer: type[torch.optim.Optimizer] = torch.optim.Adam,
    groups: int = 1,
    reverse: bool = False,
    tie: bool = False,
    **more: Any,
) -> Trainee:
    model = nn.Sequential(nn.Linear(6, width), nn.Linear(width, width), nn.Linear(width, width)).to(dtype)
    if tie:
        model[2].weight = model[1].weight
    parameters = list(model.parameters())
    if reverse:
        parameters.reverse()
    param_groups = (
        [{"params": parameters}] if groups == 1 else [{"params": parameters[:2]}, {"params": parameters[2:]}]
    )
    opt = optimizer(param_groups, lr=0.1)

    def step(i: int) -> None:
        model(batch(i).to(dtype)).sum().backward()
        opt.step()

    return Trainee({"model": model, "optimizer": opt, **more}, step)


@pytest.fixture
def stored(fake: Start, socket_path: Path) -> dict[int, Memory]:
    """Memory that holds `make()` after two steps."""
    seed_all(4)
    daemon = fake()
    trainee = make()
    with attach(trainee, socket_path, max_lag=1) as run:
        run.resume()
        for i in range(2):
            trainee.step(i)
            run.step()
        run.fence()  # the first snapshots end with their audit
        daemon.wait(lambda d: d.captured == [1, 2])
        run.close(park=True)
    return daemon.memory


class Tiny:
    def __init__(self, refuse: bool = False) -> None:
        self.refuse = refuse

    def state_dict(self) -> dict[str, Any]:
        return {"a": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.refuse:
            raise KeyError("missing")


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"width": 5}, r"model.0.weight does not fit: stored F32 \[4, 6\], live F32 \[5, 6\]"),
        ({"dtype": torch.bfloat16}, "stored F32 .*, live BF16"),
        ({"optimizer": torch.optim.SGD}, "optimizer was a Adam, and is a SGD"),
        ({"groups": 2}, "had 1 parameter groups, and has 2"),
        ({"reverse": True}, "in another order"),
        ({"tie": True}, "are one tensor here, but were two"),
        ({"more": Tiny()}, "objects do not match: not in the stored state: more"),
    ],
)
def test_another_state_is_refused_and_nothing_is_changed(
    other: dict[str, Any], says: str, stored: dict[int, Memory], fake: Start, socket_path: Path
) -> None:
    fake(memory=stored, generation=2)
    trainee = make(**other)
    before = state_of(trainee)
    with attach(trainee, socket_path) as run, pytest.raises(errors.StateMismatch, match=says):
        run.resume()
    assert_same(before, state_of(trainee))


def test_missing_and_unexpected_tensors_are_named(
    stored: dict[int, Memory], fake: Start, socket_path: Path
) -> None:
    fake(memory=stored, generation=2)
    trainee = make()
    trainee.objects["model"].register_buffer("new", torch.zeros(1))
    del trainee.objects["model"][2]
    with attach(trainee, socket_path) as run, pytest.raises(errors.StateMismatch) as error:
        run.resume()
    assert "not in the stored state: model.new" in str(error.value)
    assert "only in the stored state: model.2.bias, model.2.weight" in str(error.value)


def test_another_world_size_needs_resharding(
    stored: dict[int, Memory], fake: Start, socket_path: Path
) -> None:
    fake(memory=stored, generation=2)
    with (
        attach(make(), socket_path, world_size=2) as run,
        pytest.raises(errors.StateMismatch, match="1 ranks"),
    ):
        run.resume()


@pytest.mark.parametrize("what", ["job", "step", "bytes"])
def test_an_image_of_something_else_is_refused(
    what: str, stored: dict[int, Memory], fake: Start, socket_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = fake(memory=stored, generation=2)
    memory = stored[0]
    slot = memory.holds[2]
    if what == "bytes":
        import os

        os.pwrite(memory.fd, b"no header", slot * memory.slot_bytes)
    if what == "step":
        memory.holds[9] = slot
    import ckptd

    trainee = make()
    name = "other" if what == "job" else "job"
    before = state_of(trainee)
    run = ckptd.attach(name, socket=socket_path, rank=0, world_size=1, **trainee.objects)
    with run, pytest.raises(errors.CorruptImage):
        run.resume()
    assert daemon.complaints == []
    assert_same(before, state_of(trainee))


@pytest.mark.parametrize("where", [0.0, 0.5, 0.999])
def test_a_bit_that_flips_after_the_daemons_look_is_never_loaded(
    where: float, stored: dict[int, Memory], fake: Start, socket_path: Path
) -> None:
    daemon = fake(memory=stored, generation=2)
    daemon.flip_bit = int(stored[0].image_bytes * 8 * where) + 3
    trainee = make()
    before = state_of(trainee)
    with attach(trainee, socket_path) as run, pytest.raises(errors.CorruptImage, match="changed between"):
        run.resume()
    assert_same(before, state_of(trainee))


def test_an_object_that_refuses_its_state_is_named(fake: Start, socket_path: Path) -> None:
    daemon = fake()
    trainee = make(tiny=Tiny())
    with attach(trainee, socket_path, max_lag=1) as run:
        run.resume()
        trainee.step(0)
        run.step()
        run.fence()  # the first snapshots end with their audit
        daemon.wait(lambda d: d.captured == [1])
        run.close(park=True)
    fake(memory=daemon.memory, generation=2)
    with (
        attach(make(tiny=Tiny(refuse=True)), socket_path) as run,
        pytest.raises(errors.StateMismatch, match="tiny does not take its state back: KeyError"),
    ):
        run.resume()


def test_state_that_the_image_lacks_is_cleared(
    stored: dict[int, Memory], fake: Start, socket_path: Path
) -> None:
    """A warm-up before resume() leaves nothing behind; tensors that fit are filled in place."""
    fake(memory=stored, generation=2)
    trainee = make()
    trainee.step(0)
    optimizer = trainee.objects["optimizer"]
    parameter = trainee.objects["model"][0].weight
    optimizer.state[parameter]["extra"] = torch.ones(1)
    kept = optimizer.state[parameter]["exp_avg"]
    with attach(trainee, socket_path) as run:
        run.resume()
    assert "extra" not in optimizer.state[parameter]
    assert optimizer.state[parameter]["exp_avg"] is kept


def test_tied_weights_stay_one_tensor(fake: Start, socket_path: Path) -> None:
    daemon = fake()
    trainee = make(tie=True)
    with attach(trainee, socket_path, max_lag=1) as run:
        run.resume()
        trainee.step(0)
        run.step()
        run.fence()  # the first snapshots end with their audit
        daemon.wait(lambda d: d.captured == [1])
        expected = state_of(trainee)
        run.close(park=True)
    from safetensors.torch import load

    assert "model.2.weight" not in load(daemon.images[1])
    fake(memory=daemon.memory, generation=2)
    revived = make(tie=True)
    with attach(revived, socket_path) as run:
        run.resume()
    assert_same(expected, state_of(revived))
    # What was one may be two: both get the bytes. (Two that became one are refused above.)
