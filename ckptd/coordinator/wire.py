"""Between the wire's messages and the machine's values; nothing else knows both."""

from __future__ import annotations

from collections.abc import Iterable

from ckptd.coordinator import directives
from ckptd.coordinator.effects import Announce, Directive, JobDirective
from ckptd.coordinator.events import (
    JobFacts,
    NodeReport,
    Spec,
    TrainerFact,
    TrainerState,
    TransferFact,
    TransferState,
)
from ckptd.coordinator.state import Job, Node, State
from ckptd.errors import ProtocolMismatch
from ckptd.image.names import check_name
from ckptd.memory import schedule
from ckptd.memory.inventory import HoldingFact, Member, Roster, Snapshot
from ckptd.protocol import PROTOCOL
from ckptd.recovery.plan import TransferOrder
from ckptd.v1 import common_pb2, coordinator_pb2

_TRAINER_STATES = {
    coordinator_pb2.Trainer.ALIVE: TrainerState.ALIVE,
    coordinator_pb2.Trainer.DIED: TrainerState.DIED,
    coordinator_pb2.Trainer.FINISHED: TrainerState.FINISHED,
}
_TRANSFER_STATES = {
    coordinator_pb2.Transfer.RUNNING: TransferState.RUNNING,
    coordinator_pb2.Transfer.VERIFIED: TransferState.VERIFIED,
    coordinator_pb2.Transfer.FAILED: TransferState.FAILED,
}


def report_from(message: coordinator_pb2.NodeReport) -> NodeReport:
    """The report as the machine takes it.

    Raises:
        ProtocolMismatch: the daemon speaks another version.
        InvalidRequest: a name that cannot be one.
    """
    if message.protocol != PROTOCOL:
        raise ProtocolMismatch(
            f"the daemon of node {message.node!a} speaks protocol {message.protocol}",
            f"this coordinator speaks {PROTOCOL}",
            "run the same version of ckptd on all machines",
        )
    check_name("node", message.node)
    return NodeReport(
        node=message.node,
        incarnation=message.incarnation,
        sequence=message.sequence,
        domain=message.domain,
        control_address=message.control_address,
        bulk_address=message.bulk_address,
        rendezvous_host=message.rendezvous_host,
        rendezvous_port=message.rendezvous_port,
        jobs=tuple(_facts_from(message.node, job) for job in message.jobs),
    )


def _facts_from(node: str, message: coordinator_pb2.JobReport) -> JobFacts:
    check_name("job", message.job)
    transfer = message.transfer
    return JobFacts(
        job=message.job,
        spec=spec_from(message.spec) if message.spec.job else None,
        roster=roster_from(message.roster) if message.roster.generation else None,
        facts=schedule.facts_of(node, message),
        stopped_through=message.stopped_through,
        running_generation=message.running_generation,
        trainers=tuple(
            TrainerFact(t.rank, t.generation, _TRAINER_STATES[t.state], t.step, t.exit)
            for t in message.trainers
            if t.state in _TRAINER_STATES
        ),
        holdings=tuple(_holding_from(holding) for holding in message.holdings),
        transfer=TransferFact(
            transfer.generation,
            _TRANSFER_STATES[transfer.state],
            transfer.reason,
            transfer.bytes,
            transfer.rung,
        )
        if transfer.state in _TRANSFER_STATES
        else None,
        finished=message.finished,
    )


def _holding_from(message: coordinator_pb2.Holding) -> HoldingFact:
    return HoldingFact(
        generation=message.generation,
        step=message.step,
        group=tuple(message.group),
        position=message.position,
        ranks=tuple(message.ranks),
        parity=message.parity,
        sealed=message.sealed,
        folded=message.folded,
        node_bytes=message.node_bytes,
    )


def spec_from(message: coordinator_pb2.JobSpec) -> Spec:
    return Spec(
        job=message.job,
        nodes=message.nodes,
        ranks_per_node=message.ranks_per_node,
        parity=message.parity,
        every=message.every,
        slots=message.slots,
    )


def spec_message(spec: Spec) -> coordinator_pb2.JobSpec:
    return coordinator_pb2.JobSpec(
        job=spec.job,
        nodes=spec.nodes,
        ranks_per_node=spec.ranks_per_node,
        parity=spec.parity,
        every=spec.every,
        slots=spec.slots,
    )


def roster_from(message: common_pb2.Roster) -> Roster:
    return Roster(
        generation=message.generation,
        members=tuple(
            Member(m.node, m.domain, tuple(m.ranks), m.control_address, m.bulk_address)
            for m in message.members
        ),
        parity=message.parity,
        start=Snapshot(message.start.generation, message.start.step),
    )


def roster_message(roster: Roster) -> common_pb2.Roster:
    return common_pb2.Roster(
        generation=roster.generation,
        members=[
            common_pb2.Member(
                node=m.node,
                domain=m.domain,
                ranks=m.ranks,
                control_address=m.control_address,
                bulk_address=m.bulk_address,
            )
            for m in roster.members
        ],
        parity=roster.parity,
        start=common_pb2.Snapshot(generation=roster.start.generation, step=roster.start.step),
    )


def directive_message(directive: Directive) -> coordinator_pb2.Directive:
    return coordinator_pb2.Directive(
        sequence=directive.sequence, jobs=[_wish_message(wish) for wish in directive.jobs]
    )


def _wish_message(wish: JobDirective) -> coordinator_pb2.JobDirective:
    message = coordinator_pb2.JobDirective(
        job=wish.job,
        spec=spec_message(wish.spec),
        stop_through=wish.stop_through,
        finished=wish.finished,
        waiting_for=wish.waiting_for,
    )
    if wish.roster is not None:
        message.roster.CopyFrom(roster_message(wish.roster))
        if wish.transfer is not None:
            message.transfer.CopyFrom(_order_message(wish.transfer, wish.roster.generation))
    if wish.start is not None:
        message.start.CopyFrom(
            coordinator_pb2.StartOrder(
                generation=wish.start.generation,
                master_address=wish.start.master_host,
                master_port=wish.start.master_port,
            )
        )
    if wish.schedule is not None:
        message.schedule.CopyFrom(schedule.to_message(wish.schedule))
    return message


def _order_message(order: TransferOrder, generation: int) -> coordinator_pb2.TransferOrder:
    return coordinator_pb2.TransferOrder(
        generation=generation,
        positions=order.positions,
        sources=[
            coordinator_pb2.Source(node=s.node, bulk_address=s.bulk_address, position=s.position)
            for s in order.sources
        ],
        group=order.group,
        parity=order.parity,
    )


def event_message(event: Announce, sequence: int) -> coordinator_pb2.TimelineEvent:
    return coordinator_pb2.TimelineEvent(
        sequence=sequence,
        monotonic_s=event.at,
        job=event.job,
        generation=event.generation,
        name=event.name,
        text=event.text,
        step=event.step,
        nodes=event.nodes,
        rung=event.rung,
    )


def status_message(state: State, job: str) -> coordinator_pb2.StatusReply:
    """What the machine knows: of the job named, or of all jobs if `job` is empty."""
    jobs: Iterable[Job] = (known for name, known in sorted(state.jobs.items()) if job in ("", name))
    return coordinator_pb2.StatusReply(
        jobs=[_job_status(state, known) for known in jobs],
        nodes=[_node_status(state, node) for _, node in sorted(state.nodes.items())],
    )


def _job_status(state: State, job: Job) -> coordinator_pb2.JobStatus:
    steps: dict[int, int] = {}
    for name in job.members:
        node = state.nodes.get(name)
        facts = node.facts(job.spec.job) if node is not None else None
        if facts is not None and job.roster is not None and facts.generation == job.roster.generation:
            steps.update(facts.facts.completed)
    message = coordinator_pb2.JobStatus(
        spec=spec_message(job.spec),
        phase=job.phase,
        steps=[steps.get(rank, 0) for rank in job.spec.world],
        waiting_for=job.waiting_for,
    )
    if job.roster is not None:
        message.roster.CopyFrom(roster_message(job.roster))
    if job.schedule is not None:
        message.schedule.CopyFrom(schedule.to_message(job.schedule))
    return message


def _node_status(state: State, node: Node) -> coordinator_pb2.NodeStatus:
    return coordinator_pb2.NodeStatus(
        node=node.name,
        state=directives.status_of(state, node),
        domain=node.report.domain if node.report is not None else "",
        silent_s=state.now - node.heard,
        control_address=node.control_address,
    )
