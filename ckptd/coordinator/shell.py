"""Carries the machine's effects out, and feeds it: the one place where its state lives.

Everything here runs on one event loop, so the machine sees one event at a time.
Reports that arrive together are one event.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator

from ckptd.coordinator import machine
from ckptd.coordinator.effects import Announce, AskStore, Directive, Effect, Probe, Record, Send
from ckptd.coordinator.events import (
    Disconnected,
    Event,
    NodeReport,
    Probed,
    Reported,
    Spec,
    Stored,
    Submitted,
    Tick,
)
from ckptd.coordinator.journal import Journal
from ckptd.coordinator.probe import probe
from ckptd.coordinator.settings import CoordinatorSettings
from ckptd.coordinator.state import State
from ckptd.errors import CkptdError
from ckptd.memory.inventory import Snapshot
from ckptd.storage import catalog

log = logging.getLogger("ckptd.coordinator")


class Stream:
    """One daemon's stream: the newest directive waits in it, older ones are overwritten."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._directive: Directive | None = None
        self._changed = asyncio.Event()
        self._closed = False

    def put(self, directive: Directive) -> None:
        self._directive = directive
        self._changed.set()

    def close(self) -> None:
        """Ends the iteration; another stream of the same node took its place, or the shell ends."""
        self._closed = True
        self._changed.set()

    async def directives(self) -> AsyncIterator[Directive]:
        """The newest directive, each time there is a newer one."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            if self._closed:
                return
            directive, self._directive = self._directive, None
            if directive is not None:
                yield directive


class Timeline:
    """The newest events, numbered.  Numbers start at the wall clock's microseconds, so that
    they grow across restarts and a watcher that asks for more misses nothing."""

    def __init__(self, kept: int) -> None:
        self._events: deque[tuple[int, Announce]] = deque(maxlen=kept)
        self._last = time.time_ns() // 1000
        self._changed = asyncio.Event()

    def add(self, event: Announce) -> None:
        self._last += 1
        self._events.append((self._last, event))
        self._changed.set()
        self._changed = asyncio.Event()

    def after(self, sequence: int) -> Iterator[tuple[int, Announce]]:
        newer = []
        for number, event in reversed(self._events):
            if number <= sequence:
                break
            newer.append((number, event))
        return reversed(newer)

    async def follow(self, sequence: int) -> AsyncIterator[tuple[int, Announce]]:
        """Events after `sequence`, those to come included; a slow reader may miss some."""
        while True:
            changed = self._changed
            for number, event in self.after(sequence):
                sequence = number
                yield number, event
            await changed.wait()


class Shell:
    """The machine with its journal, streams, probes and timeline."""

    def __init__(self, settings: CoordinatorSettings, journal: Journal) -> None:
        self._settings = settings
        self._journal = journal
        self.state: State = machine.restore(journal.entries(), settings.timing())
        self.timeline = Timeline(settings.kept_events)
        self._streams: dict[str, Stream] = {}
        self._numbers = 0
        self._reports: list[tuple[int, NodeReport]] = []
        self._arrived = asyncio.Event()
        self._probes: set[asyncio.Task[None]] = set()
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        """Ticks and handles reports until it is cancelled.

        Raises:
            CkptdError: the journal refused an entry.  What was decided is not on stable
                storage, so nothing that follows from it may be done: the process must end.
        """
        tasks = [asyncio.create_task(self._tick()), asyncio.create_task(self._take_reports())]
        try:
            done, _ = await asyncio.wait([self._failure, *tasks], return_when=asyncio.FIRST_COMPLETED)
            for ended in done:
                ended.result()
        finally:
            for task in (*tasks, *self._probes):
                task.cancel()
            await asyncio.gather(*tasks, *self._probes, return_exceptions=True)

    def stop_streams(self) -> None:
        """Ends every open stream, so that the server can end."""
        for stream in self._streams.values():
            stream.close()

    def submit(self, spec: Spec, stored_generation: int = 0) -> bool:
        """Whether the job is new; once this returns, it is in the journal.

        Args:
            stored_generation: the greatest one among the checkpoints of this name.

        Raises:
            InvalidRequest: see machine.check_submission.
        """
        created = machine.check_submission(self.state, spec)
        if created:
            self._feed(Submitted(time.monotonic(), spec, stored_generation))
        return created

    def open_stream(self, node: str) -> Stream:
        """A new stream of this node; an older one ends."""
        if (old := self._streams.get(node)) is not None:
            log.warning("node %s opened a second stream; the first one ends", node)
            old.close()
        self._numbers += 1
        self._streams[node] = Stream(self._numbers)
        return self._streams[node]

    def report(self, stream: Stream, report: NodeReport) -> None:
        """Takes a report; it is handled together with all others that are here by then."""
        self._reports.append((stream.number, report))
        self._arrived.set()

    def close_stream(self, node: str, stream: Stream) -> None:
        """The stream ended, whoever ended it."""
        if self._streams.get(node) is stream:
            del self._streams[node]
        self._flush()
        self._feed(Disconnected(time.monotonic(), node, stream.number))

    async def _tick(self) -> None:
        while True:
            # What arrived while this process was held up counts before anybody's silence does.
            self._flush()
            self._feed(Tick(time.monotonic()))
            await asyncio.sleep(self._settings.tick_s)

    async def _take_reports(self) -> None:
        while True:
            await self._arrived.wait()
            self._flush()

    def _flush(self) -> None:
        self._arrived.clear()
        if self._reports:
            reports, self._reports = tuple(self._reports), []
            self._feed(Reported(time.monotonic(), reports))

    def _feed(self, event: Event) -> None:
        self.state, effects = machine.step(self.state, event)
        for effect in effects:
            self._carry_out(effect)

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case Record():
                try:
                    self._journal.append(effect.entry)
                except CkptdError as error:
                    if not self._failure.done():
                        self._failure.set_exception(error)
                    raise
            case Send():
                if (stream := self._streams.get(effect.node)) is not None:
                    stream.put(effect.directive)
            case Probe():
                task = asyncio.create_task(self._probe(effect))
                self._probes.add(task)
                task.add_done_callback(self._probes.discard)
            case AskStore():
                task = asyncio.create_task(self._ask_store(effect.job))
                self._probes.add(task)
                task.add_done_callback(self._probes.discard)
            case Announce():
                _log(effect)
                self.timeline.add(effect)

    async def _ask_store(self, job: str) -> None:
        try:
            entry, _ = await asyncio.to_thread(catalog.newest, self._settings.store_url(), job)
        except CkptdError as error:
            log.warning("job %s: its checkpoints cannot be looked at: %s", job, error)
            return
        if entry is not None:
            self._flush()
            self._feed(Stored(time.monotonic(), job, Snapshot(entry.generation, entry.step)))

    async def _probe(self, effect: Probe) -> None:
        answer = await probe(effect.address, self._settings.probe_timeout_s)
        self._flush()
        self._feed(Probed(time.monotonic(), effect.node, effect.number, answer))


def _log(event: Announce) -> None:
    level = logging.DEBUG if event.name == "protected" else logging.INFO
    about = [f"job {event.job}"] if event.job else []
    about += [f"generation {event.generation}"] if event.generation else []
    about += [f"step {event.step}"] if event.step else []
    about += [", ".join(event.nodes)] if event.nodes else []
    log.log(level, "%s (%s) %s", event.name, "; ".join(about), event.text)
