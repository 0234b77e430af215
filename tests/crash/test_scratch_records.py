"""What a daemon was writing when it died does not pile up: its memory is not given back otherwise."""

from __future__ import annotations

from pathlib import Path

from ckptd.daemon.adopt import adopt
from ckptd.memory import records
from ckptd.v1 import common_pb2, memory_pb2


def test_a_half_written_record_is_cleared_away_and_whole_ones_stay(tmp_path: Path) -> None:
    directory = records.job_directory(tmp_path, "job")
    directory.mkdir(parents=True)
    roster = common_pb2.Roster(
        generation=1, parity=1, members=[common_pb2.Member(node=name, ranks=[0]) for name in "ab"]
    )
    records.write_record(directory / "job.record", memory_pb2.JobRecord(job="job", roster=roster))
    holding = memory_pb2.HoldingRecord(
        job="job", generation=1, step=5, group=["a", "b"], position="a", parity=1
    )
    records.write_record(records.holding_path(directory, 1, 5), holding)
    # As the failpoint daemon.record-written leaves it.
    half = records.holding_path(directory, 1, 6)
    half = half.with_name(half.name + ".tmp")
    half.write_bytes(b"half")
    assert records.scratch_paths(directory) == [half]
    jobs = adopt(tmp_path, "a", lambda: None)
    assert set(jobs["job"].memory.holdings) == {(1, 5)}
    assert not half.exists()
