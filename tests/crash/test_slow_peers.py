"""Protection far slower than training: steps are dropped for the whole job, and training waits for none."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import slow_worker
from test_all_is_lost import Life, places

from ckptd.client.protection import BUSY

STEPS = 150
SLOTS = 3


class Slow(Life):
    worker: ClassVar[str] = slow_worker.__file__
    # A snapshot's parity takes about three seconds; a step some milliseconds.
    settings: ClassVar[Mapping[str, str]] = {"CKPTD_FLUSH_EVERY": "0", "CKPTD_BULK_BYTES_PER_S": "500000"}


async def story(tmp_path: Path) -> None:
    async with places(tmp_path) as (children, memory):
        life = Slow("slow", 2, tmp_path / "store", children, memory)
        await life.start(STEPS, seed=3)
        first, second = await life.told()
        await life.end()
    print(f"{STEPS} steps, {first['captured']} captured, {sum(first['dropped'].values())} dropped")
    for told in (first, second):
        assert told["lag_wait_s"] == 0.0, "nobody asked to wait"
        given_up = sum(count for why, count in told["dropped"].items() if why != BUSY)
        # A step that some rank gave up may have been captured by this one before.
        assert STEPS <= told["captured"] + told["dropped"][BUSY] + given_up <= STEPS + given_up
        assert told["dropped"][BUSY] > STEPS // 2
    # A slot is reused when its step is protected, not before: what is captured is what protection allows.
    assert first["captured"] <= len(first["protected"]) + SLOTS
    totals = [sum(told["dropped"].values()) for told in (first, second)]
    # A step is dropped on every rank, or on none; of the last ones this rank may not have heard yet.
    assert abs(totals[0] - totals[1]) <= SLOTS


def test_steps_are_dropped_job_wide_and_counted_where_peers_are_slow(tmp_path: Path) -> None:
    asyncio.run(asyncio.wait_for(story(tmp_path), 110))
