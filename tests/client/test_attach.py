"""What attach refuses, in whose words; what it counts; what it leaves alone."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fakedaemon import FakeDaemon
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from trainees import Trainee, attach, batch, plain

import ckptd
from ckptd import errors
from ckptd.client.attached import Attached
from ckptd.client.estimate import estimated_bytes
from ckptd.client.settings import Environment, Place
from ckptd.client.state import Survey
from ckptd.v1 import common_pb2

Start = Callable[..., FakeDaemon]


class Holder:
    """An object with whatever state."""

    def __init__(self, state: Any = None) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"job": "a/b"}, errors.InvalidRequest, "job name"),
        ({"every": 0}, errors.InvalidRequest, "every=0"),
        ({"slots": 1}, errors.InvalidRequest, "slots=1"),
        ({"max_lag": 2, "every": 3}, errors.InvalidRequest, "max_lag=2"),
        ({"capture": "now"}, errors.InvalidRequest, "'now'"),
        ({"rank": 3, "world_size": 2}, errors.InvalidRequest, "rank 3, world size 2"),
        ({"model": None}, errors.InvalidRequest, "nothing was attached"),
        ({"extra": {"a": [1, 2]}}, errors.InvalidRequest, "extra.a cannot be attached"),
        ({"extra": torch.zeros(3)}, errors.InvalidRequest, "extra cannot be attached"),
        ({"data": [1, 2]}, errors.InvalidRequest, "data.0 cannot be attached"),
        ({"ckptd": Holder()}, errors.InvalidRequest, "'ckptd'"),
        ({"extra": Holder({"a": [1, {"f": lambda: 0}]})}, errors.UnsafeObject, "extra.a[1].f"),
        ({"extra": Holder({"t": torch.zeros(2).to_sparse()})}, errors.UnsafeObject, "extra.t"),
        ({"extra": Holder({"t": torch.zeros(2, dtype=torch.complex128)})}, errors.UnsafeObject, "complex128"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else None,
)
def test_wrong_requests_are_refused_by_name(
    options: dict[str, Any], error: type[Exception], says: str, fake: Start, socket_path: Path
) -> None:
    fake()
    given: dict[str, Any] = {
        "job": "job",
        "model": nn.Linear(2, 2),
        "socket": socket_path,
        "rank": 0,
        "world_size": 1,
    }
    with pytest.raises(error, match=says.replace("[", r"\[").replace("]", r"\]")):
        ckptd.attach(**{**given, **options})


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_sparse_and_quantized_tensors_of_modules_are_refused_by_name(fake: Start, socket_path: Path) -> None:
    fake()
    for tensor, says in (
        (torch.eye(3).to_sparse(), "sparse"),
        (torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "qint8"),
    ):
        model = nn.Module()
        model.register_buffer("mask", tensor)
        with pytest.raises(errors.UnsafeObject, match=f"model.mask.*{says}"):
            ckptd.attach("job", model=model, socket=socket_path, rank=0, world_size=1)


def test_optimizers_that_cannot_be_kept_are_refused_by_name(fake: Start, socket_path: Path) -> None:
    fake()
    model = nn.Linear(2, 2)
    with pytest.raises(errors.UnsupportedOptimizer, match="LBFGS"):
        ckptd.attach("job", model=model, optimizer=torch.optim.LBFGS(model.parameters()), socket=socket_path)


def test_a_socket_where_nobody_listens(socket_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(errors.Unreachable, match="ckptd daemon"):
        attach(plain(), socket_path)
    monkeypatch.setenv("CKPTD_SOCKET", str(socket_path))
    with pytest.raises(errors.Unreachable, match=str(socket_path)):
        ckptd.attach("job", model=nn.Linear(1, 1))


def test_a_daemon_of_another_version(fake: Start, socket_path: Path) -> None:
    fake(protocol=7)
    with pytest.raises(errors.ProtocolMismatch, match="another version"):
        attach(plain(), socket_path)


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (common_pb2.ERROR_CODE_RANK_TAKEN, errors.RankTaken),
        (common_pb2.ERROR_CODE_STALE_GENERATION, errors.StaleGeneration),
        (common_pb2.ERROR_CODE_NOT_OWNER, errors.InvalidRequest),
        (common_pb2.ERROR_CODE_NOT_FOUND, errors.NotFound),
    ],
)
def test_the_daemons_refusal_is_the_users_error(
    code: common_pb2.ErrorCode,
    error: type[Exception],
    fake: Start,
    socket_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    daemon = fake()
    monkeypatch.setattr(daemon, "_on_hello", lambda link, message, rank: daemon._failure(link, code, "no"))
    with pytest.raises(error, match=r"no: the fake says so\. Next: nothing"):
        attach(plain(), socket_path)


def test_a_state_that_does_not_fit_is_refused_before_training(fake: Start, socket_path: Path) -> None:
    daemon = fake(space_bytes=1 << 20)
    model = nn.Linear(300, 300)  # 360 KB; with AdamW's state 1.08 MB, twice
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(errors.NoSpace, match=str(1 << 20)):
        attach(Trainee({"model": model, "optimizer": optimizer}, print), socket_path)
    daemon.wait(lambda d: not d._links)
    assert daemon.plans == 0


def test_a_size_that_is_not_known_before_is_checked_after_the_first_step(
    fake: Start, socket_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ckptd")
    fake(space_bytes=1 << 20)
    model = nn.Linear(300, 300)
    optimizer = torch.optim.ASGD(model.parameters())  # its step reads a number back, which meta has not
    trainee = Trainee({"model": model, "optimizer": optimizer}, print)
    with attach(trainee, socket_path) as run:
        assert any("optimizer" in r.message and "checked after" in r.message for r in caplog.records)
        run.resume()
        model(torch.ones(300)).sum().backward()
        optimizer.step()
        with pytest.raises(errors.NoSpace):
            run.step()


@pytest.mark.parametrize(
    "optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad, torch.optim.Muon]
)
def test_the_estimate_is_what_the_first_step_needs(
    optimizer: Callable[..., torch.optim.Optimizer], fake: Start, socket_path: Path
) -> None:
    daemon = fake()
    model = nn.Sequential(nn.Linear(6, 64, bias=False), nn.Linear(64, 3, bias=False))
    options = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    opt = optimizer(model.parameters(), lr=0.1, **options)
    with attach(Trainee({"model": model, "optimizer": opt}, print), socket_path, max_lag=1) as run:
        run.resume()
        model(batch(0)).sum().backward()
        opt.step()
        run.step()
        needed = daemon.memory[0].image_bytes
        assert abs(daemon.reserved[0] - needed) <= 8192, (daemon.reserved, needed)


def test_attach_steps_nothing_and_makes_no_state(fake: Start, socket_path: Path) -> None:
    fake()
    calls = []
    trainee = plain()
    handle = register_optimizer_step_pre_hook(lambda *_: calls.append("step"))
    before = torch.get_rng_state()
    try:
        with attach(trainee, socket_path) as run:
            run.resume()
    finally:
        handle.remove()
    assert calls == []
    assert not trainee.objects["optimizer"].state
    assert torch.equal(before, torch.get_rng_state())


def test_names_are_the_models_own_whatever_wraps_it() -> None:
    inner = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    wrapped = nn.Module()
    wrapped.add_module("_orig_mod", inner)
    parallel = nn.DataParallel(inner)
    plain_names = Survey(Attached.sort({"model": inner})).module_names
    assert plain_names[:2] == ["model.0.weight", "model.0.bias"]
    assert Survey(Attached.sort({"model": wrapped})).module_names == plain_names
    assert Survey(Attached.sort({"model": parallel})).module_names == plain_names


def test_non_persistent_buffers_are_no_state() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("cache", torch.zeros(3), persistent=False)
    assert Survey(Attached.sort({"model": model})).module_names == ["model.weight", "model.bias"]


def test_classes_and_owners() -> None:
    one, two = nn.Linear(2, 2), nn.BatchNorm1d(2)
    first = torch.optim.SGD(one.parameters(), lr=0.1, momentum=0.9)
    loose = nn.Parameter(torch.ones(2))
    second = torch.optim.SGD([loose, one.bias], lr=0.1)
    one(torch.ones(1, 2)).sum().backward()
    first.step()
    survey = Survey(Attached.sort({"model": [one, two], "optimizer": {"a": first, "b": second}}))
    classes = {name: (entry.quiescent, sorted(entry.owners)) for name, entry in survey.entries.items()}
    assert classes == {
        "model.0.weight": (True, [0]),
        "model.0.bias": (True, [0, 1]),
        "model.1.weight": (True, []),
        "model.1.bias": (True, []),
        "model.1.running_mean": (False, []),
        "model.1.running_var": (False, []),
        "model.1.num_batches_tracked": (False, []),
        "optimizer.a.model.0.weight.momentum_buffer": (True, [0]),
        "optimizer.a.model.0.bias.momentum_buffer": (True, [0]),
        "optimizer.b.params.0.0": (True, [1]),
        "ckptd.static": (False, []),
    }


def test_describe_says_what_no_fence_protects(fake: Start, socket_path: Path) -> None:
    fake()
    with attach(Trainee({"model": nn.BatchNorm1d(3)}, print), socket_path) as run:
        text = run.describe()
    assert "model.running_mean" in text
    assert "run.fence()" in text and "model.weight" in text


def test_the_estimate_counts_meta_and_uninitialized_models() -> None:
    with torch.device("meta"):
        model = nn.Linear(1000, 1000)
    survey = Survey(Attached.sort({"model": model, "lazy": nn.LazyLinear(3)}), tentative=True)
    assert estimated_bytes(survey)[0] > 4_000_000


def test_the_first_step_without_resume_is_fine_only_on_a_fresh_start(fake: Start, socket_path: Path) -> None:
    daemon = fake()
    trainee = plain()
    with attach(trainee, socket_path, max_lag=1) as run:
        trainee.step(0)
        run.step()
        run.save(timeout_s=20)
        run.close(park=True)
    fake(memory=daemon.memory, generation=2)
    with attach(trainee, socket_path) as run:
        with pytest.raises(errors.InvalidRequest, match=r"run.resume\(\)"):
            run.step()
        assert run.resume().step == 1
        trainee.step(1)
        run.step()
        with pytest.raises(errors.InvalidRequest, match="too late"):
            run.resume()


def test_place_comes_from_arguments_environment_and_defaults() -> None:
    nothing = Environment.read({})
    assert Place.find(nothing, None, None, None) == Place(0, 1, 1)
    torchrun = Environment.read({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "3"})
    assert Place.find(torchrun, None, None, None) == Place(3, 8, 4)
    assert Place.find(torchrun, 5, None, None) == Place(5, 8, 4)
    assert Place.find(Environment.read({"RANK": "1", "WORLD_SIZE": "2"}), None, None, None) == Place(1, 2, 2)
    with pytest.raises(errors.InvalidRequest, match="RANK"):
        Environment.read({"RANK": "one"})
    ours = Environment.read({"CKPTD_GENERATION": "7", "CKPTD_SOCKET": "/s", "XDG_RUNTIME_DIR": "/run/user/1"})
    assert (ours.generation, ours.socket, ours.runtime_dir) == (7, Path("/s"), Path("/run/user/1/ckptd"))


def test_the_hello_says_what_was_asked(
    fake: Start, socket_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CKPTD_GENERATION", "4")
    daemon = fake(generation=4, survives="rank deaths")
    with attach(plain(), socket_path, every=2, slots=4, parity=1) as run:
        assert (run.generation, run.node, run.survives, run.rank, run.world_size) == (
            4,
            "fake",
            "rank deaths",
            0,
            1,
        )
    hello = daemon.hellos[0]
    assert (hello.protocol, hello.every, hello.slots, hello.parity, hello.reconnect) == (1, 2, 4, 1, False)
