"""Going back and on again, damage on the way, and the memory of a daemon that repairs: all of it real."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_durable import control, lose_memory, scheduled, together, train
from trainees import Trainee, assert_same, batch, plain, seed_all, state_of
from typer.testing import CliRunner

import ckptd
from ckptd import errors
from ckptd.cli.main import app
from ckptd.client.report import ResumeReport
from ckptd.client.run import Run
from ckptd.storage import catalog, marks, rollback
from ckptd.storage.local_store import LocalStore

FILE = "rank-00000.safetensors"


@pytest.fixture
def store(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CKPTD_STORE", str(tmp_path / "store"))
    return tmp_path / "store"


def life(first: int, durable: list[int]) -> tuple[ResumeReport, Trainee]:
    """One life of the job, on a node that knows nothing; it trains to each of these steps and saves it."""
    trainee = scheduled(5 if not first else 99)
    with ckptd.attach("life", max_lag=1, **trainee.objects) as run:
        report = run.resume()
        assert report.step == first
        saved(trainee, run, first, durable)
    lose_memory()
    return report, trainee


def saved(trainee: Trainee, run: Run, at: int, durable: list[int]) -> None:
    for step in durable:
        train(trainee, run, at, step)
        run.save(wait="durable")
        at = step


def ckptd_json(*arguments: str, code: int = 0) -> dict[str, Any]:
    ran = CliRunner().invoke(app, [*arguments, "--json"])
    assert ran.exit_code == code, (ran.output, ran.exception)
    body: dict[str, Any] = json.loads(ran.stdout)
    return body


def flip(store: Path, entry: catalog.Entry, where: int = -3) -> None:
    file = store / "life" / entry.directory / FILE
    data = bytearray(file.read_bytes())
    data[where] ^= 1
    file.write_bytes(data)


def test_after_a_rollback_both_lines_stay_and_resume_takes_the_new_one(store: Path) -> None:
    life(0, [2, 3, 5])
    done = ckptd_json("rollback", "life", "--to", "2", "--reason", "loss spike")
    assert [key["step"] for key in done["left"]] == [5, 3] and done["generation"] == 2
    report, trainee = life(2, [3, 4])
    assert (report.generation, report.rung, report.skipped) == (1, "storage", ())
    assert_same(control(4), state_of(trainee))
    assert [(e.generation, e.step) for e in catalog.entries(str(store), "life")] == [
        (1, 2), (1, 3), (3, 3), (3, 4), (1, 5),
    ]  # fmt: skip
    with ckptd.open(str(store / "life" / "step-00000003.g00003")) as checkpoint:
        assert checkpoint.manifest.parent == (1, 2)
    listed = ckptd_json("ls", "life")
    assert len(listed["lines"]) == 2 and listed["newest"] == {"step": 4, "generation": 3}
    report, _ = life(4, [])
    assert report.generation == 3, "not step 5 of the line that was left"


def test_what_was_trained_in_memory_after_a_rollback_still_belongs_to_its_line(store: Path) -> None:
    """A generation that stored nothing lies between: the next one's parent is what was gone back to."""
    life(0, [2, 3])
    ckptd_json("rollback", "life", "--to", "2", "--reason", "spike")
    trainee = scheduled(99)
    run = ckptd.attach("life", max_lag=1, **trainee.objects)
    assert run.resume().step == 2
    train(trainee, run, 2, 4)
    run.save()
    run.close(park=True)
    again = scheduled(98)
    with ckptd.attach("life", max_lag=1, **again.objects) as run:
        report = run.resume()
        assert (report.step, report.rung) == (4, "own-memory")
        saved(again, run, 4, [5])
        generation = run.generation
    with ckptd.open(str(store / "life" / catalog.Entry(5, generation).directory)) as checkpoint:
        assert checkpoint.manifest.parent == (1, 2), "not (1, 3), which was left"


def test_damaged_bytes_are_passed_over_where_the_file_looks_whole(
    store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    life(0, [1, 2, 3])
    flip(store, catalog.Entry(3, 1))
    flip(store, catalog.Entry(2, 1), 9000)
    report, trainee = life(1, [])
    assert [(each.generation, each.step) for each in report.skipped] == [(1, 3), (1, 2)]
    assert all(FILE in each.why for each in report.skipped)
    assert_same(control(1), state_of(trainee))
    said = [record.message for record in caplog.records if "passed over" in record.message]
    assert len(said) == 2 and "step 3.g1 of job life is passed over" in said[0]


def test_a_job_whose_checkpoints_are_all_damaged_does_not_start_from_nothing(store: Path) -> None:
    life(0, [1, 2])
    for step in (1, 2):
        flip(store, catalog.Entry(step, 1))
    trainee = scheduled(99)
    with (
        ckptd.attach("life", max_lag=1, **trainee.objects) as run,
        pytest.raises(
            errors.CorruptCheckpoint, match=r"none of the 2 .* ckptd verify life/step-2\.g1 --repair"
        ),
    ):
        run.resume()


def test_what_a_resume_reads_cannot_be_pruned_meanwhile(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    life(0, [1])
    seen = []
    from ckptd.client import stored

    original = stored._load

    def looking(found: stored.Newest, *rest: Any) -> Any:
        seen.extend(marks.leases(LocalStore(Path(found.url)).list(), 0)[0])
        return original(found, *rest)

    monkeypatch.setattr(stored, "_load", looking)
    life(1, [])
    assert len(seen) == 1
    assert marks.leases(LocalStore(store / "life" / "step-00000001.g00001").list(), 0)[0] == []


def test_blocks_come_back_from_a_daemons_memory(store: Path) -> None:
    trainee = scheduled(5)
    with ckptd.attach("life", max_lag=1, **trainee.objects) as run:
        run.resume()
        saved(trainee, run, 0, [2])
        file = store / "life" / "step-00000002.g00001" / FILE
        before = file.read_bytes()
        file.write_bytes(bytes(len(before)))
        assert ckptd_json("verify", "life", code=3)["lost"] == []
        mended = ckptd_json("verify", "life", "--repair")
        assert mended["repaired"]["blocks"] == -(-len(before) // 65536) and mended["lost"] == []
        assert file.read_bytes() == before
    lose_memory()
    flip(store, catalog.Entry(2, 1))
    assert len(ckptd_json("verify", "life", "--repair", code=3)["lost"]) == 1, "it was the only copy"


def test_shares_come_back_from_a_daemons_memory(store: Path) -> None:
    """Two ranks hold the same and write it once: no block of a file is a cell of an image."""

    def rank_of(rank: int) -> None:
        seed_all(5)
        model = torch.nn.Linear(300, 400)
        optimizer = torch.optim.AdamW(model.parameters())
        options = {"rank": rank, "world_size": 2, "local_world_size": 2, "max_lag": 1}
        run = ckptd.attach("life", **options, model=model, optimizer=optimizer)
        run.resume()
        for step in range(2):
            optimizer.zero_grad()
            model(batch(step, features=300)).pow(2).mean().backward()
            optimizer.step()
            run.step()
        assert run.save(wait="durable")
        run.close(park=True)

    ckptd.attach("first", **plain().objects).close()  # the daemon is this process's to end
    together([functools.partial(rank_of, rank) for rank in range(2)])
    stored = store / "life" / "step-00000002.g00001"
    files = [stored / f"rank-0000{rank}.safetensors" for rank in range(2)]
    before = [file.read_bytes() for file in files]
    assert sum(map(len, before)) < 1.5 * 3 * 4 * 400 * 301, "each has a share"
    last = [-(-len(data) // 65536) - 1 for data in before]
    damage = [{last[0] // 2, last[0]}, {0, 1, last[1]}]
    for file, data, blocks in zip(files, before, damage, strict=True):
        damaged = bytearray(data)
        for block in blocks:
            damaged[block * 65536 + 300] ^= 1
        file.write_bytes(damaged)
    assert ckptd_json("verify", "life", "--repair")["repaired"]["blocks"] == 5
    assert [file.read_bytes() for file in files] == before
    files[1].unlink()
    assert ckptd_json("verify", "life", "--repair")["lost"] == []
    assert [file.read_bytes() for file in files] == before
    lose_memory()
    files[1].unlink()
    (lost,) = ckptd_json("verify", "life", "--repair", code=3)["lost"]
    assert (lost["object"], lost["begin"], lost["end"]) == (files[1].name, 0, len(before[1]))


def test_memory_from_before_a_rollback_is_not_resumed_from(store: Path) -> None:
    trainee = scheduled(5)
    run = ckptd.attach("life", max_lag=1, **trainee.objects)
    run.resume()
    saved(trainee, run, 0, [2])
    train(trainee, run, 2, 4)
    run.save()
    run.close(park=True)
    made = rollback.plan(str(store), "life", 2, "loss spike", 0.0)
    rollback.execute(made)  # on a machine that knows nothing of this node's memory
    revived = scheduled(99)
    with ckptd.attach("life", max_lag=1, **revived.objects) as run:
        report = run.resume()
        assert (report.step, report.rung) == (2, "storage")
        assert run.generation > made.start.generation
        assert_same(control(2), state_of(revived))
        train(revived, run, 2, 3)
        run.save()
        run.close(park=True)
    again = scheduled(98)
    with ckptd.attach("life", max_lag=1, **again.objects) as run:
        assert (run.resume().step, run.generation) == (3, made.start.generation + 2), "memory of the new line"
