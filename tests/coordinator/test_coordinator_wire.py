"""The machine's values and the wire's messages say the same."""

from __future__ import annotations

import pytest

from ckptd.coordinator import wire
from ckptd.coordinator.effects import Directive, JobDirective, StartOrder
from ckptd.coordinator.events import Spec, TrainerFact, TrainerState, TransferFact, TransferState
from ckptd.errors import InvalidRequest, ProtocolMismatch
from ckptd.memory.inventory import HoldingFact, Member, Roster, Snapshot
from ckptd.memory.schedule import Schedule
from ckptd.recovery.ladder import Rung
from ckptd.recovery.plan import Source, TransferOrder
from ckptd.v1 import common_pb2, coordinator_pb2

SPEC = Spec("llama", 2, 2, 1, 5, 3)
ROSTER = Roster(7, (Member("n0", "r1", (0, 1), "n0:1", "n0:2"), Member("n4", "", (2, 3))), 1, Snapshot(6, 12))


def report() -> coordinator_pb2.NodeReport:
    return coordinator_pb2.NodeReport(
        protocol=wire.PROTOCOL,
        node="n0",
        incarnation=3,
        sequence=9,
        domain="r1",
        control_address="n0:1",
        bulk_address="n0:2",
        rendezvous_host="n0",
        rendezvous_port=7,
        jobs=[
            coordinator_pb2.JobReport(
                job="llama",
                generation=7,
                roster=wire.roster_message(ROSTER),
                spec=wire.spec_message(SPEC),
                stopped_through=6,
                running_generation=7,
                trainers=[
                    coordinator_pb2.Trainer(rank=0, generation=7, state=1, step=14, ready=True),
                    coordinator_pb2.Trainer(rank=1, generation=7, state=2, step=13, exit="signal 9"),
                    coordinator_pb2.Trainer(rank=1, generation=6, state=99),
                ],
                holdings=[
                    coordinator_pb2.Holding(
                        generation=7,
                        step=14,
                        group=["n0", "n4"],
                        position="n0",
                        ranks=[0, 1],
                        parity=1,
                        sealed=True,
                        folded=True,
                        node_bytes=100,
                    )
                ],
                transfer=coordinator_pb2.Transfer(
                    generation=7, state=3, reason="lost", bytes=5, rung="parity"
                ),
                watermark=13,
                has_watermark=True,
                aborted=[11],
            )
        ],
    )


def test_a_report_becomes_the_machines_facts() -> None:
    found = wire.report_from(report())
    assert (found.node, found.incarnation, found.sequence, found.rendezvous_port) == ("n0", 3, 9, 7)
    facts = found.job("llama")
    assert facts is not None and found.job("other") is None
    assert facts.spec == SPEC and facts.roster == ROSTER and facts.generation == 7
    assert facts.trainers == (
        TrainerFact(0, 7, TrainerState.ALIVE, 14),
        TrainerFact(1, 7, TrainerState.DIED, 13, "signal 9"),
    ), "a state of a newer version is not guessed"
    assert facts.holdings == (HoldingFact(7, 14, ("n0", "n4"), "n0", (0, 1), 1, True, True, 100),)
    assert facts.transfer == TransferFact(7, TransferState.FAILED, "lost", 5, "parity")
    assert facts.facts.watermark == 13 and facts.facts.aborted == {11} and not facts.facts.ready
    assert facts.facts.folded == facts.facts.begun == {14}


def test_a_report_of_a_standby_node_has_no_job_facts() -> None:
    message = coordinator_pb2.NodeReport(protocol=wire.PROTOCOL, node="n5", jobs=[{"job": "llama"}])
    facts = wire.report_from(message).job("llama")
    assert facts is not None
    assert (facts.spec, facts.roster, facts.transfer, facts.generation) == (None, None, None, 0)


def test_a_report_that_cannot_be_is_refused() -> None:
    message = report()
    message.protocol = wire.PROTOCOL + 1
    with pytest.raises(ProtocolMismatch, match="same version"):
        wire.report_from(message)
    message = report()
    message.jobs[0].job = "a/b"
    with pytest.raises(InvalidRequest):
        wire.report_from(message)


def test_rosters_and_specifications_come_back() -> None:
    assert wire.roster_from(wire.roster_message(ROSTER)) == ROSTER
    assert wire.spec_from(wire.spec_message(SPEC)) == SPEC


def test_a_directive_carries_every_wish() -> None:
    order = TransferOrder("n4", Rung.PARITY, ("n1",), (Source("n0", "n0:2", "n0"),), ("n0", "n1"), 1, 100)
    wish = JobDirective(
        "llama",
        SPEC,
        roster=ROSTER,
        stop_through=6,
        transfer=order,
        start=StartOrder(7, "n0", 7777),
        schedule=Schedule(7, 12, (13, 14)),
        finished=True,
        waiting_for="1 more node",
    )
    message = wire.directive_message(Directive(9, (wish,)))
    assert message.sequence == 9
    (job,) = message.jobs
    assert wire.roster_from(job.roster) == ROSTER and wire.spec_from(job.spec) == SPEC
    assert (job.stop_through, job.finished, job.waiting_for) == (6, True, "1 more node")
    assert job.transfer == coordinator_pb2.TransferOrder(
        generation=7,
        positions=["n1"],
        sources=[coordinator_pb2.Source(node="n0", bulk_address="n0:2", position="n0")],
        group=["n0", "n1"],
        parity=1,
    )
    assert job.start == coordinator_pb2.StartOrder(generation=7, master_address="n0", master_port=7777)
    assert job.schedule == common_pb2.Schedule(generation=7, watermark=12, has_watermark=True, due=[13, 14])


def test_what_is_not_wished_is_absent() -> None:
    (job,) = wire.directive_message(Directive(1, (JobDirective("llama", SPEC),))).jobs
    assert not any(job.HasField(name) for name in ("roster", "transfer", "start", "schedule"))
