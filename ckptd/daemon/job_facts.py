"""What a node says of a job: the facts of its report, and the record that outlives the daemon."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptd.v1 import coordinator_pb2, memory_pb2

if TYPE_CHECKING:
    from ckptd.daemon.job import Job

State = coordinator_pb2.Trainer


def report_of(job: Job) -> coordinator_pb2.JobReport:
    """All facts of this job on this node."""
    return coordinator_pb2.JobReport(
        job=job.name,
        generation=job.generation,
        roster=job.roster,
        stopped_through=job.stopped_through,
        running_generation=job.running_generation,
        trainers=_trainer_facts(job),
        holdings=[holding.report() for holding in job.memory.holdings.values()],
        transfer=job.transfer,
        watermark=job.schedule.watermark,
        has_watermark=job.schedule.has_watermark,
        held=any(t.held for t in job.living()),
        spec=job.spec,
        unreachable_peers=sorted(job.unreachable),
        finished=_all_finished(job),
        aborted=sorted(job.aborted),
        flush_every=job.flush_every,
        flush_over=job.flush_over,
        leaving=job.leaving,
    )


def record_of(job: Job) -> memory_pb2.JobRecord:
    """What a restarted daemon needs to take the job up again."""
    return memory_pb2.JobRecord(
        job=job.name,
        owner_uid=job.owner_uid,
        spec=job.spec,
        roster=job.roster,
        stop_through=job.stop_through,
        started_generation=job.started_generation,
        confirmed_stopped=job.confirmed_stopped,
        trainers=_trainer_facts(job),
    )


def _all_finished(job: Job) -> bool:
    mine = [t for t in job.trainers.values() if t.generation == job.generation]
    return bool(mine) and bool(job.running_generation) and all(t.state == State.FINISHED for t in mine)


def _trainer_facts(job: Job) -> list[coordinator_pb2.Trainer]:
    return [
        coordinator_pb2.Trainer(
            rank=t.rank,
            generation=t.generation,
            pid=t.pid,
            state=State.DIED if t.failing and t.state == State.ALIVE else t.state,
            step=t.step,
            ready=job.ready(t),
            exit=t.exit,
        )
        for t in job.trainers.values()
    ]
