"""The scrub: a slow walk over what is sealed and folded here, which finds flipped bits and repairs them.

Every cell is compared with the digest that was taken when it was sealed or folded.  A
wrong cell is an erased cell: it is rebuilt from the other members of the group, and
written in its place, where by its digest the same bytes lay before; so nobody who reads
or sends the slot meanwhile sees anything but the wrong bytes or the right ones.

What cannot be rebuilt stays sealed (or folded), is reported once, and is tried again in
every round.  Withdrawing the fact would protect nobody, since no byte is used without its
digest: a restore verifies the whole image and unseals it then, a decode leaves wrong cells
out, a fold verifies its base.  But it would cost: the good cells of this image and this
parity serve the decodes of others, who may be the very reason why too little is there now,
and come back.  Only a step that is not protected yet is given up, as its image is nowhere
else and older steps are there.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from ckptd.daemon.job import Job
from ckptd.daemon.settings import DaemonSettings
from ckptd.errors import CkptdError, CorruptImage, NotEnoughCells
from ckptd.image.digest import CELL_BYTES, DIGEST_BYTES, mismatches
from ckptd.memory.bulk import BLOCK_CELLS
from ckptd.memory.holding import Holding, Parity, node_digests
from ckptd.memory.rebuild import Rebuild
from ckptd.memory.yielding import yield_to_training
from ckptd.v1 import bulk_pb2, common_pb2

log = logging.getLogger("ckptd.scrub")

_PIECE_CELLS = 64  # looked at in one go, 4 MiB: a fraction of a millisecond of the interpreter
_PAUSE_S = 5.0  # between rounds, so that little memory is not read over and over
_GLANCE_S = 0.1  # how soon a suspicion is followed up in a pause

T = TypeVar("T")


@dataclass(frozen=True)
class _Part:
    """This node's image of one step, or one of its parity chunks.

    Args:
        seal: of the image; parity: whose chunk number `index` this is.  One of them is None.
        digests: of all cells, 16 bytes each.
    """

    job: Job
    holding: Holding
    seal: bulk_pb2.SealRecord | None
    parity: Parity | None
    index: int
    digests: bytes

    @property
    def name(self) -> tuple[str, tuple[int, int], int]:
        """The same for the same part of the same step, round after round."""
        return self.job.name, self.holding.key, -1 if self.parity is None else self.index

    @property
    def held(self) -> bool:
        """Whether these bytes are still those that were digested; true until the loop runs on."""
        holding = self.holding
        if self.job.memory.holdings.get(holding.key) is not holding:
            return False
        if self.parity is None:
            return holding.seals.get(holding.position) is self.seal
        return holding.folded and holding.parity is self.parity

    @property
    def cells(self) -> int:
        return len(self.digests) // DIGEST_BYTES

    def expected(self, first: int, count: int) -> bytes:
        return self.digests[first * DIGEST_BYTES : (first + count) * DIGEST_BYTES]

    def views(self, first: int, count: int) -> list[memoryview]:
        if self.parity is None:
            return self.holding.data_cells(first, count)
        return [self.parity.chunks[self.index][first * CELL_BYTES : (first + count) * CELL_BYTES]]

    def wrong(self, first: int, count: int) -> list[int]:
        """Those of `count` cells from `first` on that differ from their digests."""
        found: list[int] = []
        for view in self.views(first, count):
            here = len(view) // CELL_BYTES
            found += [first + cell for cell in mismatches(view, self.expected(first, here))]
            first += here
        return found

    def write(self, first: int, cells: memoryview) -> None:
        for view in self.views(first, len(cells) // CELL_BYTES):
            view[:] = cells[: len(view)]
            cells = cells[len(view) :]

    def __str__(self) -> str:
        what = "the image" if self.parity is None else f"parity {self.index}"
        return f"{what} of step {self.holding.step} of generation {self.holding.generation}"


class Scrub:
    """Walks the memory of all jobs of one node; lives on the event loop.

    Digesting and rebuilding happen in a thread of its own that yields to training; what
    was found there counts only if the same bytes are still held afterwards, and cells are
    written on the loop, where slots change hands.
    """

    def __init__(self, settings: DaemonSettings, jobs: Mapping[str, Job]) -> None:
        self._settings = settings
        self._jobs = jobs
        self._thread = ThreadPoolExecutor(
            1, thread_name_prefix="scrub", initializer=yield_to_training, initargs=(settings.bulk_nice,)
        )
        # Cells that are known to be wrong, by part: they are counted and reported once.
        self._damaged: dict[tuple[str, tuple[int, int], int], set[int]] = {}
        self.scrubbed_bytes = 0
        self.corrupt_cells = 0
        self.healed_cells = 0

    async def run(self) -> None:
        """Scrubs round after round, until cancelled."""
        while True:
            try:
                await self.round()
            except Exception:  # the task's top frame: a scrub that fails must not end the daemon
                log.exception("a round of the scrub failed")
            await self._pause()

    async def round(self) -> None:
        """Looks once at everything that is held now: what was suspected, then what will live longest."""
        parts = [part for holding, job in self._order() for part in _parts(job, holding)]
        names = {part.name for part in parts}
        self._damaged = {name: cells for name, cells in self._damaged.items() if name in names}
        for part in parts:
            await self._walk(part)

    def close(self) -> None:
        """Ends the thread once it has done what it is doing."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _order(self) -> list[tuple[Holding, Job]]:
        """All holdings: the newest protected ones (parked and paused jobs keep those), then newest steps."""

        def rank(pair: tuple[Holding, Job]) -> tuple[bool, int, int]:
            holding, job = pair
            known = job.schedule
            newest = known.has_watermark and holding.key == (job.generation, known.watermark)
            return (not newest, -holding.generation, -holding.step)

        return sorted(
            ((holding, job) for job in self._jobs.values() for holding in job.memory.holdings.values()),
            key=rank,
        )

    async def _pause(self) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + _PAUSE_S
        while loop.time() < end and not any(job.suspects for job in self._jobs.values()):
            await asyncio.sleep(_GLANCE_S)
        await self._suspected()

    async def _suspected(self) -> None:
        """Looks at steps in which somebody ran into damage, before anything else."""
        for job in list(self._jobs.values()):
            while job.suspects:
                holding = job.memory.holdings.get(job.suspects.pop())
                for part in _parts(job, holding) if holding is not None else []:
                    await self._walk(part, urgent=True)

    async def _walk(self, part: _Part, *, urgent: bool = False) -> None:
        loop = asyncio.get_running_loop()
        for first in range(0, part.cells, _PIECE_CELLS):
            if not urgent:
                await self._suspected()
            if not part.held:
                return
            count = min(_PIECE_CELLS, part.cells - first)
            began = loop.time()
            wrong = await self._off_loop(partial(part.wrong, first, count))
            self.scrubbed_bytes += count * CELL_BYTES
            if part.held:
                known = self._damaged.get(part.name, set())
                known -= set(range(first, first + count)) - set(wrong)  # a restore wrote it anew, say
                if wrong:
                    await self._repair(part, wrong)
            # What a repair reads elsewhere counts, too: at most one cell from every other member.
            cost = (count + len(wrong) * (len(part.holding.group) - 1)) * CELL_BYTES
            rate = self._settings.scrub_bytes_per_s
            await asyncio.sleep(max(0.0, began + cost / rate - loop.time()) if rate else 0.0)

    async def _repair(self, part: _Part, wrong: list[int]) -> None:
        known = self._damaged.setdefault(part.name, set())
        first_time = not known
        self.corrupt_cells += len(set(wrong) - known)
        known |= set(wrong)
        why: CkptdError | None = None
        for first, count in _runs(wrong):
            try:
                cells = await self._off_loop(self._rebuilding(part, first, count))
            except CkptdError as error:
                why = error
                continue
            if not part.held:
                return
            part.write(first, cells)
            known -= set(range(first, first + count))
            self.healed_cells += count
            log.warning("job %s: %s: %d damaged cells rebuilt", part.job.name, part, count)
        if not known:
            del self._damaged[part.name]
        if why is not None and part.held:
            self._not_healed(part, len(known), why, report=first_time)

    def _not_healed(self, part: _Part, cells: int, why: CkptdError, *, report: bool) -> None:
        if report:
            log.error("job %s: %s: %d damaged cells stay: %s", part.job.name, part, cells, why)
        if part.parity is None and part.holding.generation == part.job.generation:
            part.job.abort(part.holding.step)  # it refuses where others may count on the step

    def _rebuilding(self, part: _Part, first: int, count: int) -> Callable[[], memoryview]:
        """What rebuilds these cells from the other members; all state is read now, on the loop."""
        job, holding = part.job, part.holding
        there = {member.node: member.bulk_address for member in job.roster.members}
        rebuild = Rebuild(
            header=common_pb2.Header(
                job=job.name,
                generation=job.generation,
                timeout_ms=int(self._settings.bulk_timeout_s * 1000),
            ),
            sender=job.node,
            snapshot=holding.key,
            position=holding.position,
            group=list(holding.group),
            parity=holding.parity_count,
            sources=[
                (n, there[n]) for n in holding.group if n in there and n not in (job.node, holding.position)
            ],
            timeout_s=self._settings.bulk_timeout_s,
            seals=dict(holding.seals),
        )
        protected, expected = holding.protected_group, part.expected(first, count)

        def rebuilt() -> memoryview:
            if not protected:
                raise NotEnoughCells(f"{part} cannot be rebuilt", "it has no parity")
            rebuild.fetch_seals()
            if part.parity is None:
                cells = _data_cells(rebuild, first, count)
            else:
                cells = rebuild.parity_cells(part.index, first, count, expected)
            if mismatches(cells, expected):
                raise CorruptImage(f"{part} was rebuilt with other bytes than were sealed")
            return cells

        return rebuilt

    async def _off_loop(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def _parts(job: Job, holding: Holding) -> Iterator[_Part]:
    """What a holding has to look at: its image once sealed, its parity once folded."""
    seal = holding.seals.get(holding.position)
    if seal is not None:
        yield _Part(job, holding, seal, None, 0, node_digests(seal))
    if holding.parity is not None and holding.folded:
        for index, digests in enumerate(holding.parity.digests):
            yield _Part(job, holding, None, holding.parity, index, digests)


def _data_cells(rebuild: Rebuild, first: int, count: int) -> memoryview:
    """Cells first.. of the node's image, which may lie in two chunks and more."""
    per_chunk = rebuild.chunk_bytes // CELL_BYTES
    out = bytearray()
    while count:
        chunk, at = divmod(first, per_chunk)
        some = min(count, per_chunk - at)
        out += rebuild.cells(chunk, at, some)
        first, count = first + some, count - some
    return memoryview(out)


def _runs(cells: list[int]) -> Iterator[tuple[int, int]]:
    """(first, count): ascending cells cut into neighbours, as many as are rebuilt in one go."""
    begin = 0
    for end in range(1, len(cells) + 1):
        if end == len(cells) or cells[end] != cells[end - 1] + 1 or end - begin == BLOCK_CELLS:
            yield cells[begin], end - begin
            begin = end
