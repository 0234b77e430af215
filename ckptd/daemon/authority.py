"""Who says what is due where no coordinator does.

A node that serves alone is its own authority: it cuts generations, names steps, and
knows when they are as protected as they can be.  While a coordinator is away, the
lowest reachable daemon of the roster names steps, with the coordinator's own function.
"""

from __future__ import annotations

from collections.abc import Mapping

from ckptd.daemon.job import Job
from ckptd.errors import CorruptImage, StateMismatch
from ckptd.memory.schedule import Schedule, facts_of, next_schedule, to_message
from ckptd.v1 import common_pb2, coordinator_pb2


class Authority:
    """The schedule of one job, folded from the reports that came here."""

    def __init__(self) -> None:
        self._schedule: Schedule | None = None
        self._reports: dict[str, coordinator_pb2.JobReport] = {}

    def note(self, node: str, report: coordinator_pb2.JobReport) -> None:
        """Keeps the newest report of a member."""
        self._reports[node] = report

    def schedule(self, job: Job, away: Mapping[str, str] | None = None) -> common_pb2.Schedule:
        """The schedule that follows from what is known."""
        self.note(job.node, job.report())
        facts = [
            facts_of(node, report)
            for node, report in self._reports.items()
            if report.generation == job.generation
        ]
        self._schedule = next_schedule(
            self._schedule,
            generation=job.generation,
            start_step=job.roster.start.step,
            members=[member.node for member in job.roster.members],
            facts=facts,
            every=max(1, job.spec.every),
            slots=job.slots,
            away=away,
        )
        return to_message(self._schedule)


def lone_roster(job: Job, ranks: int, address: tuple[str, str]) -> common_pb2.Roster:
    """The next generation of a job that lives on this node alone, starting from its newest whole step.

    Raises:
        StateMismatch: the steps held here are of another number of ranks.
        CorruptImage: the job had a state, and nothing of it verifies any more.
    """
    control, bulk = address
    steps = [h for h in job.memory.holdings.values() if h.sealed]
    start = max(steps, key=lambda h: (h.step, h.generation), default=None)
    if start is not None and start.ranks != tuple(range(ranks)):
        raise StateMismatch(
            f"job {job.name} holds step {start.step} of {len(start.ranks)} ranks",
            f"this run has {ranks}, and memory is resumed in the layout that it was captured in",
            f"run with {len(start.ranks)} ranks; or 'ckptd forget {job.name}', and storage is resumed",
        )
    known = max(job.roster.start.step, job.schedule.watermark if job.schedule.has_watermark else 0)
    if start is None and known:
        raise CorruptImage(
            f"job {job.name} had a state of step {known}, and nothing of it is left that verifies",
            job.transfer.reason,
            f"'ckptd forget {job.name}' to start afresh",
        )
    member = common_pb2.Member(node=job.node, ranks=range(ranks), control_address=control, bulk_address=bulk)
    where = common_pb2.Snapshot(generation=start.generation, step=start.step) if start else None
    return common_pb2.Roster(
        generation=max(job.generation, job.stored_generation) + 1,
        members=[member],
        parity=job.spec.parity,
        start=where,
    )
