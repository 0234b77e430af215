"""The trainers' socket of a real daemon, spoken to in raw frames by friend and foe."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import struct
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from daemonkit import (
    DEADLINE_S,
    PLAN,
    Daemon,
    Frames,
    Stranger,
    Trainee,
    eventually,
    frame,
    header,
    hello,
    image_of,
    looped,
)

from ckptd.cli.main import main
from ckptd.daemon.node import Node
from ckptd.daemon.server import serve
from ckptd.daemon.settings import DaemonSettings
from ckptd.daemon.trainers import TrainerServer
from ckptd.errors import InvalidRequest
from ckptd.image.digest import CELL_BYTES
from ckptd.v1 import common_pb2, coordinator_pb2, daemon_pb2, local_pb2

IMAGE = 2 * CELL_BYTES + 17
LIMIT = 64 << 20
State = coordinator_pb2.Trainer


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    """One daemon for the whole file; every test has a job of its own."""
    daemon = Daemon("--memory-limit-bytes", str(LIMIT))
    yield daemon
    daemon.close()


@pytest.fixture
def job(request: pytest.FixtureRequest, daemon: Daemon) -> Iterator[str]:
    """A name of this test's own; whatever it left is forgotten afterwards."""
    name = request.node.name.replace("[", "-").replace("]", "")[:100]
    yield name
    Frames.close_all()
    found = daemon.job(name)
    if found is not None:
        ranks = [t for t in found.trainers if t.state == State.ALIVE]
        print(f"{name} still has {len(ranks)} living ranks")


def _ends_with(sock: Frames) -> common_pb2.Error:
    """The failure that the daemon says before it ends the connection."""
    error = None
    while (message := sock.receive()) is not None:
        if message.WhichOneof("body") == "failure":
            error = message.failure.error
    assert error is not None, "the daemon ended the connection without a word"
    return error


# Frames that are none


def test_another_protocol_is_refused_before_anything_is_written(daemon: Daemon, job: str) -> None:
    before = sorted(daemon.memory_dir.rglob("*"))
    for protocol in (0, 2, 1 << 31):
        link = Frames(daemon.socket)
        link.send(hello(job, protocol=protocol))
        error = _ends_with(link)
        link.close()
        assert error.code == common_pb2.ERROR_CODE_PROTOCOL
        assert f"protocol {protocol}" in error.what and "speaks 1" in error.why and error.next
    assert sorted(daemon.memory_dir.rglob("*")) == before
    assert daemon.job(job) is None


@pytest.mark.parametrize(
    ("what", "data"),
    [
        ("oversized", struct.pack("<I", (16 << 20) + 1)),
        ("huge", b"\xff\xff\xff\xff"),
        ("http", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
        ("no-protobuf", struct.pack("<I", 4) + b"\xff\xff\xff\xff"),
        ("empty", struct.pack("<I", 0)),
        ("no-hello", frame(local_pb2.TrainerMessage(header=header("a"), locate=local_pb2.Locate()))),
        ("no-body", frame(local_pb2.TrainerMessage(header=header("a")))),
    ],
)
def test_garbage_first_is_a_protocol_error(daemon: Daemon, what: str, data: bytes) -> None:
    link = Frames(daemon.socket)
    link.sock.sendall(data)
    link.sock.shutdown(socket.SHUT_WR)
    assert _ends_with(link).code == common_pb2.ERROR_CODE_PROTOCOL
    link.close()


@pytest.mark.parametrize("cut", [1, 4, 20])
def test_half_a_frame_and_a_close_end_quietly(daemon: Daemon, job: str, cut: int) -> None:
    link = Frames(daemon.socket)
    link.sock.sendall(frame(hello(job))[:cut])
    link.close()
    assert daemon.job(job) is None


def test_garbage_later_ends_that_trainer_and_no_other(daemon: Daemon, job: str) -> None:
    other = Trainee(daemon, job + ".other")
    other.plan(IMAGE)
    mine = Trainee(daemon, job)
    mine.sock.sendall(b"\xff\xff\xff\x7f")
    assert mine.failure().code == common_pb2.ERROR_CODE_PROTOCOL
    assert mine.receive() is None
    mine.close()
    other.capture(1)
    other.protected(1)
    other.leave()
    other.close()


@pytest.mark.parametrize(
    ("what", "fields"),
    [
        ("rank-beyond-world", {"rank": 2, "world": 2}),
        ("no-world", {"rank": 0, "world": 0}),
        ("endless-world", {"rank": 0, "world": (1 << 32) - 1}),
        ("endless-slots", {"slots": 1 << 31}),
        ("endless-parity", {"parity": 200}),
        ("other-nodes", {"rank": 0, "world": 4, "local_world_size": 2}),
        ("no-local-world", {"rank": 0, "world": 4, "local_world_size": 0}),
    ],
)
def test_numbers_that_no_job_has_change_nothing(
    daemon: Daemon, job: str, what: str, fields: dict[str, int]
) -> None:
    link = Frames(daemon.socket)
    link.send(hello(job, **fields))
    error = _ends_with(link)
    link.close()
    assert error.code == common_pb2.ERROR_CODE_INVALID and error.why
    assert daemon.job(job) is None
    assert not (daemon.memory_dir / "jobs" / job).exists()


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".", "..", "x\0y", "n" * 129, "a b"])
def test_a_job_name_that_is_a_path_is_refused(daemon: Daemon, name: str) -> None:
    before = sorted(daemon.memory_dir.rglob("*"))
    link = Frames(daemon.socket)
    link.send(hello(name))
    assert _ends_with(link).code == common_pb2.ERROR_CODE_INVALID
    link.close()
    assert sorted(daemon.memory_dir.rglob("*")) == before


@pytest.mark.parametrize(
    "body",
    [
        {"plan": local_pb2.Plan(plan_hash=b"short", image_bytes=1)},
        {"plan": local_pb2.Plan(plan_hash=PLAN, image_bytes=0)},
        {"captured": local_pb2.Captured(step=1, slot=0, plan_hash=PLAN)},
        {"captured": local_pb2.Captured(step=1, slot=1 << 31, plan_hash=PLAN)},
        {"hello": local_pb2.Hello(protocol=1)},
        {},
    ],
    ids=["plan-hash", "plan-bytes", "no-plan-yet", "no-such-slot", "hello-again", "nothing"],
)
def test_a_wrong_request_is_answered_and_the_trainer_goes_on(
    daemon: Daemon, job: str, body: dict[str, object]
) -> None:
    trainee = Trainee(daemon, job)
    trainee.tell(**body)
    assert trainee.failure().code == common_pb2.ERROR_CODE_INVALID
    trainee.plan(IMAGE)
    trainee.until(lambda g: g.grants, "it goes on")
    trainee.leave()
    trainee.close()


# The normal course


def test_steps_flow_until_the_watermark_moves_and_slots_come_round(daemon: Daemon, job: str) -> None:
    trainee = Trainee(daemon, job, slots=2)
    assert (trainee.generation, trainee.welcome.node, trainee.welcome.memory_limit_bytes) == (1, "x", LIMIT)
    assert "not node loss" in trainee.welcome.survives
    assert trainee.locate().step == 0
    trainee.plan(IMAGE)
    assert (trainee.slots, trainee.slot_bytes) == (2, 3 * CELL_BYTES)
    slots = []
    for step in range(1, 8):
        slots.append(trainee.capture(step))
        grants = trainee.protected(step)
        # The watermark's own slot is never granted.
        assert slots[-1] not in {grant.slot for grant in grants.grants}
    assert slots == [0, 1, 0, 1, 0, 1, 0]
    report = daemon.job(job)
    assert [(h.step, h.sealed, h.folded) for h in report.holdings] == [(7, True, True)]
    trainee.leave()
    trainee.close()


def test_a_slot_that_is_not_granted_is_not_taken(daemon: Daemon, job: str) -> None:
    trainee = Trainee(daemon, job)
    trainee.plan(IMAGE)
    grants = trainee.until(lambda g: len(g.grants) == 2, "two grants")
    first, second = grants.grants
    for step, slot, plan in [
        (first.step, second.slot, PLAN),
        (first.step + 100, first.slot, PLAN),
        (first.step, first.slot, b"q" * 16),
    ]:
        trainee.tell(captured=local_pb2.Captured(step=step, slot=slot, plan_hash=plan))
        assert "no grant" in trainee.failure().what
    assert not daemon.job(job).holdings
    trainee.leave()
    trainee.close()


def test_an_aborted_step_is_given_up_and_the_next_one_is_named(daemon: Daemon, job: str) -> None:
    trainee = Trainee(daemon, job, slots=2)
    trainee.plan(IMAGE)
    [grant] = trainee.until(lambda g: g.grants, "a grant").grants
    trainee.tell(aborted=local_pb2.Aborted(step=grant.step, reason="an audit failed"))
    later = trainee.until(lambda g: any(x.step > grant.step for x in g.grants), "a later step")
    assert grant.step in later.schedule.aborted and grant.step not in later.schedule.due
    kept = later.grants[0].step
    trainee.capture(kept)
    trainee.protected(kept)
    # What is protected cannot be given up any more.
    trainee.tell(aborted=local_pb2.Aborted(step=kept, reason="too late"))
    newer = trainee.until(lambda g: any(x.step > kept for x in g.grants), "a newer step").grants[0].step
    assert [h.step for h in daemon.job(job).holdings] == [kept]
    trainee.capture(newer)
    trainee.protected(newer)
    trainee.leave()
    trainee.close()


def test_a_loss_that_is_not_finite_holds_until_it_is_accepted(daemon: Daemon, job: str) -> None:
    trainee = Trainee(daemon, job)
    trainee.plan(IMAGE)
    trainee.capture(1)
    trainee.protected(1)
    trainee.tell(aborted=local_pb2.Aborted(step=2, reason="nan", not_finite=True))
    held = trainee.until(lambda g: g.schedule.held, "held")
    assert not held.grants and held.schedule.watermark == 1
    trainee.tell(accept=local_pb2.Accept())
    trainee.until(lambda g: not g.schedule.held and g.grants, "goes on")
    trainee.leave()
    trainee.close()


def test_a_state_that_outgrew_its_plan_gets_a_new_arena(daemon: Daemon, job: str) -> None:
    trainee = Trainee(daemon, job)
    trainee.plan(IMAGE)
    trainee.capture(1)
    trainee.protected(1)
    trainee.plan(2 * IMAGE, b"q" * 16)
    step = trainee.until(lambda g: g.grants, "grants in the new arena").grants[0].step
    trainee.capture(step)
    trainee.protected(step)
    arenas = lambda: [p.name.split(".")[1] for p in (daemon.memory_dir / "jobs" / job).glob("rank-*.arena")]  # noqa: E731
    eventually(lambda: arenas() == [(b"q" * 16).hex()], "the old arena is freed once nothing needs it")
    trainee.tell(plan=local_pb2.Plan(plan_hash=b"q" * 16, image_bytes=9 * IMAGE))
    assert trainee.failure().code == common_pb2.ERROR_CODE_INVALID  # the same plan with another size
    trainee.leave()
    trainee.close()


def test_a_trainer_that_asks_and_does_not_read_waits_for_itself(daemon: Daemon, job: str) -> None:
    """Its answers are bounded in the daemon, and others are served meanwhile."""
    greedy = Trainee(daemon, job)
    greedy.sock.settimeout(0.3)
    question = frame(
        local_pb2.TrainerMessage(header=header(job, 1), reserve=local_pb2.Reserve(image_bytes=1))
    )
    asked, blocked = 0, False
    while asked < 100_000 and not blocked:
        try:
            greedy.sock.sendall(question * 100)
            asked += 100
        except TimeoutError:
            blocked = True
    assert blocked, f"{asked} questions were taken from somebody who reads no answer"
    other = Trainee(daemon, job + ".other")
    other.plan(IMAGE)
    other.capture(1)
    other.protected(1)
    other.leave()
    other.close()
    greedy.close()
    eventually(lambda: daemon.status().pid, "the daemon is well")


# Ranks, processes, users


def test_a_second_living_trainer_of_a_rank_is_refused_and_the_first_goes_on(daemon: Daemon, job: str) -> None:
    first = Trainee(daemon, job)
    first.plan(IMAGE)
    second = Stranger(daemon, frame(hello(job)))
    error = second.answer.failure.error
    assert error.code == common_pb2.ERROR_CODE_RANK_TAKEN
    assert f"process {os.getpid()}" in error.what and error.next
    second.close()
    first.capture(1)
    first.protected(1)
    assert daemon.job(job).generation == 1
    first.leave()
    first.close()


def test_a_run_of_another_size_does_not_push_a_living_one_out(daemon: Daemon, job: str) -> None:
    """A second start with the same job name and more ranks, while the first still trains."""
    first = Trainee(daemon, job)
    first.plan(IMAGE)
    other = Stranger(daemon, frame(hello(job, rank=1, world=2)))
    assert other.answer.failure.error.code == common_pb2.ERROR_CODE_RANK_TAKEN
    other.close()
    first.capture(1)
    first.protected(1)
    assert daemon.job(job).generation == 1
    first.leave()
    first.close()


def test_a_death_is_seen_at_once_and_the_next_process_begins_a_new_generation(
    daemon: Daemon, job: str
) -> None:
    victim = Stranger(daemon, frame(hello(job)))
    assert victim.answer.welcome.generation == 1
    assert [(t.pid, t.state) for t in daemon.job(job).trainers] == [(victim.pid, State.ALIVE)]
    began = time.monotonic()
    victim.kill()
    eventually(lambda: daemon.job(job).trainers[0].state == State.DIED, "the death is noticed")
    took = time.monotonic() - began
    victim.close()
    print(f"noticed after {took * 1000:.0f} ms")
    successor = Trainee(daemon, job)
    assert successor.generation == 2 and successor.locate().step == 0
    successor.leave()
    successor.close()


def test_a_trainer_that_fails_is_out_before_its_process_is(daemon: Daemon, job: str) -> None:
    """The interpreter may take a second to end; nobody waits for that, and its rank is not given away."""
    failing = Trainee(daemon, job)
    failing.tell(failing=local_pb2.Failing(reason="RuntimeError: connection closed by peer"))
    trainer = eventually(
        lambda: next((t for t in daemon.job(job).trainers if t.state == State.DIED), None), "its end is told"
    )
    assert trainer.exit == "RuntimeError: connection closed by peer"
    again = Stranger(daemon, frame(hello(job)))  # the old process lives, and keeps its place
    assert again.answer.failure.error.code == common_pb2.ERROR_CODE_RANK_TAKEN
    again.close()
    failing.close()


def test_a_dying_trainer_is_waited_for() -> None:
    """The launcher's restart overlaps with the end of the old process."""
    daemon = Daemon(CKPTD_RANK_HANDOVER_S=str(DEADLINE_S))
    try:
        dying = Stranger(daemon, frame(hello("dying")))
        link = Frames(daemon.socket)
        link.send(hello("dying"))
        dying.kill()
        message = link.receive()
        assert message is not None and message.welcome.generation == 2
        dying.close()
        link.close()
    finally:
        daemon.close()


def test_a_job_belongs_to_the_user_who_first_attached_it(daemon: Daemon, job: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to act as another user")
    os.chmod(daemon.root, 0o755)  # noqa: PTH101
    mine = Trainee(daemon, job)
    mine.plan(IMAGE)
    mine.capture(1)
    mine.protected(1)
    mine.leave(park=True)
    mine.close()
    before = daemon.job(job)
    other = Stranger(daemon, frame(hello(job, slots=7)), uid=65534)
    error = other.answer.failure.error
    other.close()
    assert error.code in (common_pb2.ERROR_CODE_NOT_OWNER, common_pb2.ERROR_CODE_INVALID)
    assert "belongs to uid 0" in error.what and "uid 65534" in error.why
    after = daemon.job(job)
    assert (after.generation, after.spec.slots) == (before.generation, before.spec.slots)
    theirs = Stranger(daemon, frame(hello(job + ".theirs")), uid=65534)
    assert theirs.answer.WhichOneof("body") == "welcome"
    assert {m.job: m.owner_uid for m in daemon.status().memory}[job + ".theirs"] == 65534
    theirs.close()
    with daemon.stub() as stub:
        for name in (job, job + ".theirs"):
            eventually(lambda name=name: not _alive(daemon, name), "nobody is attached")
            stub.Forget(_forget(name), timeout=DEADLINE_S)


def _alive(daemon: Daemon, job: str) -> bool:
    return any(t.state == State.ALIVE for t in daemon.job(job).trainers)


def _forget(job: str) -> object:
    return daemon_pb2.ForgetRequest(header=header(job))


# Return


def _next_life(daemon: Daemon, job: str, **fields: int) -> Trainee:
    """This process dies as a trainer in the daemon's eyes by attaching again."""
    return Trainee(daemon, job, **fields)


def test_the_next_generation_finds_its_image(daemon: Daemon, job: str) -> None:
    first = Trainee(daemon, job)
    first.plan(IMAGE)
    for step in (1, 2):
        first.capture(step)
        first.protected(step)
    second = _next_life(daemon, job)
    assert second.generation == 2
    located = second.locate()
    assert (located.step, located.generation, located.rung, located.verified) == (2, 1, "own-memory", True)
    content = os.pread(second.fds[-1], located.image_bytes, located.slot * located.slot_bytes)
    assert content == image_of(0, 2, IMAGE)
    # The older trainer is told to end, and changes nothing more.
    assert first.failure().code == common_pb2.ERROR_CODE_STALE_GENERATION
    words: list[dict[str, object]] = [
        {"captured": local_pb2.Captured(step=3, slot=0, plan_hash=PLAN)},
        {"aborted": local_pb2.Aborted(step=2, reason="from the past")},
    ]
    # At once: the first of them ends the connection.
    first.sock.sendall(
        b"".join(frame(local_pb2.TrainerMessage(header=header(job, 1), **word)) for word in words)  # type: ignore[arg-type]
    )
    while (message := first.receive()) is not None:
        if message.WhichOneof("body") == "failure":
            assert message.failure.error.code == common_pb2.ERROR_CODE_STALE_GENERATION
    first.close()
    # What it holds is folded again as a step of the new generation.
    second.plan(IMAGE)
    second.capture(3)
    second.protected(3)
    assert daemon.job(job).generation == 2
    second.leave()
    second.close()


def test_an_image_that_changed_after_its_seal_is_found_and_never_loaded(daemon: Daemon, job: str) -> None:
    first = Trainee(daemon, job)
    first.plan(IMAGE)
    slot = first.capture(1)
    first.protected(1)
    os.pwrite(first.arena, b"\x00", slot * first.slot_bytes + CELL_BYTES + 3)
    second = _next_life(daemon, job)
    second.tell(locate=local_pb2.Locate())
    error = second.failure()
    assert "cannot start from step 1" in error.what
    assert "rank 0" in error.why and "1 of 3 cells differ, first cell 1" in error.why
    second.leave()
    second.close()
    first.close()


def test_a_trainer_that_only_lost_its_line_keeps_its_generation(daemon: Daemon, job: str) -> None:
    first = Trainee(daemon, job)
    first.plan(IMAGE)
    first.capture(1)
    first.protected(1)
    first.close()
    again = Trainee(daemon, job, reconnect=True, generation=1)
    assert again.generation == 1
    again.plan(IMAGE)
    again.capture(2)
    again.protected(2)
    assert not any(grant.step <= 2 for grant in again.grants.grants)
    again.leave()
    again.close()


def test_two_ranks_form_one_generation_and_are_sealed_together(daemon: Daemon, job: str) -> None:
    ranks = [Trainee(daemon, job, rank=rank, world=2) for rank in (0, 1)]
    assert [trainee.generation for trainee in ranks] == [1, 1]
    for trainee in ranks:
        trainee.plan(IMAGE)
    ranks[0].capture(1)
    eventually(
        lambda: [list(holding.sealed_ranks) for holding in daemon.job(job).holdings] == [[0]],
        "rank 0 is sealed",
    )
    assert not daemon.job(job).holdings[0].sealed and not daemon.job(job).has_watermark
    ranks[1].capture(1)
    for trainee in ranks:
        trainee.protected(1)
    for trainee in ranks:
        trainee.leave()
        trainee.close()
    eventually(lambda: daemon.job(job) is None, "freed after the last goodbye")


# Space, and its end


def test_what_does_not_fit_is_told_who_holds_what(daemon: Daemon, job: str) -> None:
    holder = Trainee(daemon, job + ".holder", slots=2)
    holder.plan(8 << 20)
    trainee = Trainee(daemon, job)
    trainee.tell(reserve=local_pb2.Reserve(image_bytes=1 << 20))
    reserved = trainee.expect("reserved").reserved
    assert reserved.needed_bytes == 3 * (1 << 20) + (16 << 20)
    others = sum(m.arena_bytes + m.parity_bytes for m in daemon.status().memory)
    # What other tests' trainers were promised counts, too: they live as long as this process.
    assert 0 < reserved.available_bytes <= LIMIT - others and others >= 2 * (8 << 20)
    for body in (
        {"reserve": local_pb2.Reserve(image_bytes=20 << 20)},
        {"plan": local_pb2.Plan(plan_hash=PLAN, image_bytes=20 << 20)},
        {"plan": local_pb2.Plan(plan_hash=PLAN, image_bytes=(1 << 64) - 1)},
    ):
        trainee.tell(**body)
        error = trainee.failure()
        assert error.code == common_pb2.ERROR_CODE_NO_SPACE
        assert f"of {LIMIT:,} bytes are free" in error.why
        assert f"{job}.holder holds {2 * (8 << 20):,}" in error.why and "forget" in error.next
    assert not list((daemon.memory_dir / "jobs" / job).glob("*.arena"))
    trainee.plan(1 << 20)  # what fits still goes
    for one in (trainee, holder):
        one.leave()
        one.close()
    eventually(lambda: daemon.job(job + ".holder") is None, "freed")


def test_two_jobs_share_a_daemon(daemon: Daemon, job: str) -> None:
    both = [Trainee(daemon, f"{job}.{name}") for name in "ab"]
    for trainee in both:
        trainee.plan(IMAGE)
    for step in (1, 2, 3):
        for trainee in both:
            trainee.capture(step, bytes([ord(trainee.job[-1])]) * IMAGE)
        for trainee in both:
            trainee.protected(step)
    both[0].leave()
    eventually(lambda: daemon.job(both[0].job) is None, "a is freed")
    both[1].capture(4)
    both[1].protected(4)
    both[1].leave()
    for trainee in both:
        trainee.close()


def test_goodbye_frees_the_memory_and_only_once(daemon: Daemon, job: str) -> None:
    """A second goodbye must not take the memory of a new job of the same name."""
    first = Trainee(daemon, job)
    first.plan(IMAGE)
    first.capture(1)
    first.protected(1)
    directory = daemon.memory_dir / "jobs" / job
    assert list(directory.glob("*.arena"))
    first.leave()
    eventually(lambda: daemon.job(job) is None and not directory.exists(), "freed")
    heir = Trainee(daemon, job)
    assert heir.generation == 1 and heir.locate().step == 0
    heir.plan(IMAGE)
    first.leave()
    first.tell(plan=local_pb2.Plan(plan_hash=PLAN, image_bytes=IMAGE))
    first.tell(aborted=local_pb2.Aborted(step=1))
    heir.capture(1)
    heir.protected(1)
    assert daemon.job(job) is not None and list(directory.glob("*.arena"))
    heir.leave()
    heir.close()
    first.close()


def test_a_parked_job_is_kept_and_lives_again(daemon: Daemon, job: str) -> None:
    first = Trainee(daemon, job)
    first.plan(IMAGE)
    first.capture(1)
    first.protected(1)
    first.leave(park=True)
    first.close()
    eventually(lambda: daemon.job(job).trainers[0].state == State.FINISHED, "parked")
    second = Trainee(daemon, job)
    located = second.locate()
    assert (second.generation, located.step) == (2, 1)
    second.plan(IMAGE)
    second.capture(2)  # steps are named again
    second.protected(2)
    second.leave()
    second.close()
    eventually(lambda: daemon.job(job) is None, "freed")


def test_a_run_with_another_number_of_ranks_is_told_what_to_do(daemon: Daemon, job: str) -> None:
    first = Trainee(daemon, job)
    first.plan(IMAGE)
    first.capture(1)
    first.protected(1)
    first.leave(park=True)
    first.close()
    eventually(lambda: not _alive(daemon, job), "parked")
    link = Frames(daemon.socket)
    link.send(hello(job, world=2))
    error = _ends_with(link)
    link.close()
    assert "of 1 ranks" in error.what and "this run has 2" in error.why and "forget" in error.next
    with daemon.stub() as stub:
        stub.Forget(_forget(job), timeout=DEADLINE_S)


def test_forget_refuses_while_ranks_live_and_frees_afterwards(
    daemon: Daemon, job: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def cli(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["ckptd", *arguments, "--socket", str(daemon.socket)])
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    trainee = Trainee(daemon, job)
    trainee.plan(IMAGE)
    assert cli("forget", job) == 2
    told = capsys.readouterr()
    assert "is running on node x" in told.err and "ranks 0" in told.err and told.out == ""
    trainee.leave(park=True)
    trainee.close()
    eventually(lambda: not _alive(daemon, job), "parked")
    assert cli("forget", job, "--json") == 0
    reply = json.loads(capsys.readouterr().out)
    assert reply == {"schema": "ckptd.forget/1", "job": job, "freed_bytes": 3 * 3 * CELL_BYTES}
    assert not (daemon.memory_dir / "jobs" / job).exists()
    assert cli("forget", job) == 5
    assert "has no job" in capsys.readouterr().err


# One daemon per memory, and per socket


@pytest.mark.parametrize("shared", ["memory", "socket"])
def test_a_second_daemon_is_refused_and_the_first_is_not_harmed(
    daemon: Daemon, tmp_path: Path, shared: str
) -> None:
    settings = DaemonSettings(
        node="y",
        socket=daemon.socket if shared == "socket" else tmp_path / "s",
        memory_dir=daemon.memory_dir if shared == "memory" else tmp_path / "m",
    )
    with pytest.raises(InvalidRequest, match="another daemon") as caught:
        asyncio.run(asyncio.wait_for(serve(settings), DEADLINE_S))
    assert caught.value.next
    assert daemon.status().node == "x"
    trainee = Trainee(daemon, "unharmed")
    trainee.leave()
    trainee.close()


# Under a coordinator: generations come from directives, not from trainers


@asynccontextmanager
async def _directed(root: Path) -> AsyncIterator[tuple[Node, Path]]:
    """A node of this process whose coordinator is away, with its trainers' socket."""
    directory = root / "m"
    directory.mkdir()
    path = Path(tempfile.mkdtemp(prefix="ckptd-t-")) / "s"
    pool = ThreadPoolExecutor(1)
    settings = DaemonSettings(node="n0", memory_dir=directory, coordinator="127.0.0.1:1", rank_handover_s=0.1)
    node = Node(settings, pool)
    server = TrainerServer(node, path, 0o600)
    serving = asyncio.create_task(server.serve())
    try:
        yield node, path
    finally:
        Frames.close_all()
        server.close()
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        node.close()
        pool.shutdown()
        shutil.rmtree(path.parent)


def _generation(node: Node, generation: int, step: int = 0, **wishes: object) -> None:
    member = common_pb2.Member(node="n0", ranks=[0], bulk_address="127.0.0.1:1")
    start = common_pb2.Snapshot(generation=generation - 1, step=step)
    roster = common_pb2.Roster(generation=generation, members=[member], start=start)
    spec = coordinator_pb2.JobSpec(job="job", nodes=1, ranks_per_node=1, every=1, slots=2)
    node.follow(coordinator_pb2.JobDirective(job="job", spec=spec, roster=roster, **wishes))  # type: ignore[arg-type]


async def _talk(path: Path, message: local_pb2.TrainerMessage) -> tuple[Frames, local_pb2.DaemonMessage]:
    """A new connection, its first frame, and the answer."""

    def talk() -> tuple[Frames, local_pb2.DaemonMessage]:
        link = Frames(path)
        link.send(message)
        answer = link.receive()
        assert answer is not None
        return link, answer

    return await asyncio.get_running_loop().run_in_executor(None, talk)


@looped
async def test_a_trainer_needs_the_generation_that_its_launcher_was_given(tmp_path: Path) -> None:
    async with _directed(tmp_path) as (node, path):
        _, answer = await _talk(path, hello("job", generation=1))
        assert answer.failure.error.code == common_pb2.ERROR_CODE_NOT_FOUND
        _generation(node, 3, stop_through=2)
        for generation, code, what in [
            (0, common_pb2.ERROR_CODE_INVALID, "no launcher that follows"),
            (2, common_pb2.ERROR_CODE_STALE_GENERATION, "at generation 3"),
        ]:
            _, answer = await _talk(path, hello("job", generation=generation))
            assert answer.failure.error.code == code and what in answer.failure.error.what
        _, answer = await _talk(path, hello("job", rank=1, world=2, local_world_size=1, generation=3))
        assert "does not belong on node n0" in answer.failure.error.what
        assert not node.jobs["job"].trainers
        _, answer = await _talk(path, hello("job", generation=3))
        assert answer.welcome.generation == 3 and node.jobs["job"].running_generation == 3


@looped
async def test_a_locate_that_waits_is_not_answered_with_another_generations_state(tmp_path: Path) -> None:
    async with _directed(tmp_path) as (node, path):
        _generation(node, 2, step=5)
        link, answer = await _talk(path, hello("job", generation=2))
        assert answer.welcome.generation == 2
        link.send(local_pb2.TrainerMessage(header=header("job", 2), locate=local_pb2.Locate()))
        await asyncio.sleep(0.05)  # it waits now; were it late, it would be refused all the same
        _generation(node, 3)

        def failure() -> common_pb2.Error:
            while (message := link.receive()) is not None:
                assert message.WhichOneof("body") != "located"
                if message.WhichOneof("body") == "failure":
                    return message.failure.error
            raise AssertionError("ended without a word")

        error = await asyncio.get_running_loop().run_in_executor(None, failure)
        assert error.code == common_pb2.ERROR_CODE_STALE_GENERATION


@looped
async def test_a_locate_that_is_never_verified_meets_its_deadline(tmp_path: Path) -> None:
    async with _directed(tmp_path) as (node, path):
        _generation(node, 2, step=5)
        link, _ = await _talk(path, hello("job", generation=2))
        short = common_pb2.Header(job="job", generation=2, timeout_ms=50)

        def failure() -> common_pb2.Error:
            link.send(local_pb2.TrainerMessage(header=short, locate=local_pb2.Locate()))
            while (message := link.receive()) is not None:
                if message.WhichOneof("body") == "failure":
                    return message.failure.error
            raise AssertionError("ended without a word")

        error = await asyncio.get_running_loop().run_in_executor(None, failure)
        assert error.code == common_pb2.ERROR_CODE_TIMEOUT and "0.05 s" in error.what
