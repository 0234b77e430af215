"""The public face: `attach` and the `Run` it returns.

run = ckptd.attach("llama", model=model, optimizer=optimizer)
report = run.resume()
for step in range(report.step, steps):
    loss = train_step()
    run.step(loss=loss)
run.close()
"""

from __future__ import annotations

import atexit
import logging
import mmap
import os
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Literal

import torch
from torch.optim import Optimizer

from ckptd import errors
from ckptd.client import optimizers as optim
from ckptd.client import stored
from ckptd.client.attached import Attached
from ckptd.client.capture import Origin
from ckptd.client.connection import error_of
from ckptd.client.copier import Copier
from ckptd.client.describe import describe
from ckptd.client.embedded import find_daemon
from ckptd.client.estimate import reserve
from ckptd.client.link import Link, Terms
from ckptd.client.protection import Bounds, Protection
from ckptd.client.report import ResumeReport, Skipped, Statistics
from ckptd.client.restore import restore, verify
from ckptd.client.settings import Environment, Place
from ckptd.client.state import Survey
from ckptd.failpoints import failpoint
from ckptd.image import check_name
from ckptd.storage import marks
from ckptd.storage.store import open_store
from ckptd.v1 import local_pb2

log = logging.getLogger("ckptd")

_LEAVE_S = 5.0
_REASON_CHARACTERS = 100
_runs: weakref.WeakSet[Run] = weakref.WeakSet()


def attach(
    job: str,
    *,
    model: object = None,
    optimizer: object = None,
    scheduler: object = None,
    data: object = None,
    every: int = 1,
    max_lag: int | None = None,
    max_lag_wait_s: float = 10.0,
    capture: Literal["lazy", "eager"] = "lazy",
    slots: int | None = None,
    parity: int | None = None,
    audit: int = 1000,
    rank: int | None = None,
    world_size: int | None = None,
    local_world_size: int | None = None,
    socket: str | os.PathLike[str] | None = None,
    timeout_s: float = 60.0,
    **objects: object,
) -> Run:
    """Returns a run: this rank's state, kept by the node's daemon from now on.

    Nothing is captured yet, and no optimizer is stepped or changed.  With no daemon
    running, an embedded one is started, which survives the deaths of ranks.

    Args:
        job: names the job on this node; 1 to 128 of `A-Za-z0-9._-`.
        model, optimizer, scheduler, data, objects: modules, torch optimizers, and
            objects with state_dict and load_state_dict, each alone or in a list or dict.
            Parameters, persistent buffers, optimizer state and settings, and the random
            states of torch, CUDA, numpy and `random` are kept.
        every: capture every so many completed steps.
        max_lag: at most so many completed steps may be unprotected: training waits for
            protection before it goes further, but not longer than `max_lag_wait_s`
            (seconds).  None: training never waits, and due steps may be dropped.
        capture: "lazy" copies parameters and optimizer state behind the next forward and
            backward; "eager" copies all in run.step(), for optimizers that are no
            torch.optim.Optimizer, CUDA graphs and manual updates (or call run.fence()).
        slots: images in memory per rank; default 3 with `max_lag`, else 2.
        parity: nodes of a group that may vanish, where no coordinator decides it.
        audit: the first three snapshots and every so manieth are compared with the live
            tensors at the fence; 0: none.
        rank, world_size, local_world_size: default: RANK, WORLD_SIZE and LOCAL_WORLD_SIZE,
            else torch.distributed's, else 0 of 1.
        socket: the daemon's socket; default: CKPTD_SOCKET, else the system daemon's, else
            the embedded daemon's.
        timeout_s: how long the daemon may take to answer, seconds.

    Raises:
        InvalidRequest: an argument is wrong, or something attached has no state_dict.
        UnsafeObject: something in the state has no safe form; the message names its path.
        UnsupportedOptimizer: an optimizer cannot be kept.
        NoSpace: the state does not fit the memory, with the numbers.
        Unreachable, ProtocolMismatch: no daemon, or one of another version.
        RankTaken, StaleGeneration: another trainer holds this rank, or has replaced it.
    """
    check_name("job", job)
    _check_numbers(every=every, slots=slots, max_lag=max_lag, audit=audit, capture=capture)
    given = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "data": data, **objects}
    attached = Attached.sort(given)
    for name, each in attached.optimizers.items():
        optim.check_supported(name, each)
    environment = Environment.read()
    place = Place.find(environment, rank, world_size, local_world_size)
    survey = Survey(attached, tentative=True)
    terms = Terms(
        job=job,
        rank=place.rank,
        world_size=place.world_size,
        local_world_size=place.local_world_size,
        every=every,
        slots=slots or (2 if max_lag is None else 3),
        parity=parity or 0,
        generation=environment.generation,
        timeout_s=timeout_s,
    )
    link = Link(find_daemon(socket, environment, timeout_s), terms)
    link.attach()
    try:
        reserve(link, survey)
    except errors.CkptdError:
        link.close(park=None)
        raise
    bounds = Bounds(max_lag, max_lag_wait_s, timeout_s)
    run = Run(attached, link, bounds, audit=audit, eager=capture == "eager")
    if link.welcome.embedded and place.rank == 0:
        sys.stderr.write(f"ckptd: embedded daemon at {link.endpoint}: {link.welcome.survives}\n")
    log.info("job %s, generation %d, %s", job, link.generation, describe(survey, set()))
    return run


class Run:
    """One rank's training run.  Made by `attach`; may be used as a context manager.

    All methods are to be called by the trainer; the fences call themselves.
    """

    def __init__(self, attached: Attached, link: Link, bounds: Bounds, *, audit: int, eager: bool) -> None:
        self._attached = attached
        self._link = link
        self._bounds = bounds
        self._copier = Copier()
        self._protection = Protection(attached, link, self._copier, bounds, audit=audit, eager=eager)
        self._eager = eager
        self._step = 0
        self._resumed = False
        self._lag_checked = True  # before the first step there is nothing to wait for
        self._blocked_s = 0.0
        # Hooks of optimizers that step inside backward run on autograd's threads.
        self._lock = threading.RLock()
        self._armed = True
        self._hooks = []
        if not eager:
            for index, optimizer in enumerate(attached.optimizers.values()):
                self._hooks.append(optimizer.register_step_pre_hook(self._hook_of(index)))
        _runs.add(self)

    @property
    def rank(self) -> int:
        return self._link.terms.rank

    @property
    def world_size(self) -> int:
        return self._link.terms.world_size

    @property
    def generation(self) -> int:
        """The job's membership epoch; a trainer of an older one must end."""
        return self._link.generation

    @property
    def node(self) -> str:
        return self._link.welcome.node

    @property
    def survives(self) -> str:
        """One sentence: which failures this installation survives."""
        return self._link.welcome.survives

    @property
    def should_stop(self) -> bool:
        """Whether a node of the job is about to end (preempted, drained): a good moment to save and leave.

        Exit code 75 (`ckptd.PREEMPTED`) tells launchers that this was no failure.
        """
        with self._lock:
            self._link.drain()
            return bool(self._link.view.schedule.stopping)

    def resume(self, timeout_s: float = 600.0) -> ResumeReport:
        """Loads the newest recoverable state, and says where training continues.

        From memory where there is something; otherwise from the newest whole checkpoint in the store,
        into the layout that the job has now.  On a fresh start, reports step 0 and touches nothing.

        Args:
            timeout_s: how long the job's recovery may take, seconds.

        Raises:
            StateMismatch: the stored state does not fit what is attached; nothing was changed.
            CorruptImage, CorruptCheckpoint: the stored bytes are damaged.
            DeadlineExceeded, Unreachable, StaleGeneration: no answer from the daemon.
        """
        with self._blocked():
            self._check_usable()
            if self._step:
                raise errors.InvalidRequest(
                    "it is too late to resume", f"{self._step} steps are done", "call resume() first"
                )
            located, fd = self._locate(timeout_s)
            if fd is None and (kept := self._stored()).url:
                return self._resume_stored(kept)
            if fd is not None:
                self._load(located, fd)
            self._begin(located.step)
            skipped = tuple(Skipped(s.generation, s.step, s.why) for s in located.skipped)
            generation = located.generation if located.step else self.generation
            report = ResumeReport(
                located.step, located.rung or "none", located.verified, generation, skipped=skipped
            )
            log.info("resumed at step %d (%s)", report.step, report.rung)
            return report

    def step(self, loss: float | torch.Tensor | None = None) -> None:
        """Marks the cut: an optimizer step is complete, with all that follows it (scheduler, EMA, clamps).

        Takes under 5 ms for 3,000 tensors, unless `max_lag` makes it wait; waits for no device.

        Args:
            loss: a float or a tensor of one element.  One that is not finite stops capturing
                on the whole job until `accept()`; the last good state stays protected.

        Raises:
            StaleGeneration: a newer generation exists; this process must end.
            NoSpace: at the first step, where the size was not known before.
        """
        with self._blocked():
            self._check_usable()
            if not self._resumed:
                self._begin_unasked()
            self._protection.capture.fence_all()
            self._wait_for_lag()
            self._step += 1
            self._protection.complete(self._step, _scalar(loss))
            self._lag_checked = False
            if self._eager:
                self._wait_for_lag()
        failpoint("trainer.stepped")

    def fence(self) -> None:
        """Call before anything changes parameters or optimizer state without a torch optimizer's step()."""
        with self._blocked():
            if self._armed:
                self._protection.capture.fence_all()
                self._wait_for_lag()

    def save(
        self,
        name: str | None = None,
        wait: Literal["protected", "sealed", "durable"] = "protected",
        timeout_s: float = 60.0,
    ) -> str | None:
        """Returns when the newest completed step is safe.

        "sealed": its bytes are in the daemon's memory.  "protected": other nodes can rebuild them.
        "durable": protected, and a checkpoint in the store; every rank of the job must ask, and gets its URL.

        Args:
            name: why the checkpoint is kept: it is pinned, so that no prune removes it.  "durable" only.
            timeout_s: how long it may take, seconds.

        Raises:
            InvalidRequest: this step was not captured.
            NoSpace, CorruptImage, NotFound: it could not be written, or not pinned; the message says why.
            DeadlineExceeded, Unreachable, StaleGeneration: it did not get there.
        """
        if wait not in ("protected", "sealed", "durable"):
            raise errors.InvalidRequest(
                f"wait={wait!r} is unknown", next='use "protected", "sealed" or "durable"'
            )
        if name is not None and wait != "durable":
            log.info("the name %r is not kept: a snapshot is found by its step", name)
        deadline = time.monotonic() + timeout_s
        with self._blocked():
            self._check_usable()
            self._protection.settle(self._step, protected=wait == "protected", deadline=deadline)
            url = self._flush(deadline) if wait == "durable" else None
        if url and name and self.rank == 0:
            marks.pin(open_store(url), name, time.time())
        return url

    def accept(self) -> None:
        """Accepts the state after a loss that was not finite: capturing goes on with the next due step."""
        with self._lock:
            self._check_usable()
            self._protection.accept()

    def statistics(self) -> Statistics:
        """Returns what happened so far."""
        with self._lock:
            protection, view = self._protection, self._link.view
            if self._armed:
                protection.collect()
            return Statistics(
                step=self._step,
                captured=protection.captured,
                dropped=dict(protection.dropped),
                voided=protection.voided,
                audits=protection.capture.audits,
                protected_step=view.watermark,
                lag_steps=view.lag(self._step),
                blocked_s=self._blocked_s,
                lag_wait_s=protection.lag_wait_s,
                copied_bytes=protection.capture.copied_bytes,
                replans=protection.replans,
                reconnects=self._link.reconnects,
                detached=self._link.detached,
                volatile=tuple(sorted(protection.capture.moved)),
            )

    def describe(self) -> str:
        """Returns which tensors are copied when, as text for people."""
        with self._lock:
            return describe(Survey(self._attached, tentative=True), set(self._protection.capture.moved))

    def close(self, *, park: bool = False) -> None:
        """Ends the run: the snapshot under way is finished, the hooks are removed, the memory is given back.

        Args:
            park: keep the memory, so that a later run may resume from it.
        """
        self._end(park)

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._end(park=False)
        else:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """This process ends because of an error: the job hears of it before the interpreter is done.

        What it captured stays, and may be resumed from.
        """
        if self._armed:
            self._leave()
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:_REASON_CHARACTERS]
            self._link.tell(local_pb2.TrainerMessage(failing=local_pb2.Failing(reason=reason)), _LEAVE_S)
            self._link.flush(_LEAVE_S)
            self._link.close(park=None)

    def _end(self, park: bool) -> None:
        with self._lock:
            if not self._armed:
                return
            self._armed = False
            for hook in self._hooks:
                hook.remove()
            self._protection.close(time.monotonic() + self._bounds.timeout_s)
            self._copier.close(self._bounds.timeout_s)
            self._link.close(park=None if self._link.fatal is not None else park)

    def _hook_of(self, index: int) -> Any:
        def before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            if self._armed:
                with self._blocked():
                    self._protection.capture.fence(index)
                    self._wait_for_lag()

        return before_step

    def _wait_for_lag(self) -> None:
        """Before optimizer step s + 1, once: waits while too many steps would be unprotected after it."""
        if not self._lag_checked:
            self._lag_checked = True
            self._protection.wait_for_lag(self._step + 1)

    def _locate(self, timeout_s: float) -> tuple[local_pb2.Located, int | None]:
        message = local_pb2.TrainerMessage(locate=local_pb2.Locate())
        arrival = self._link.request(message, "located", timeout_s)
        return arrival.message.located, arrival.fd

    def _flush(self, deadline: float) -> str:
        message = local_pb2.TrainerMessage(flush=local_pb2.Flush(step=self._step))
        arrival = self._link.request(message, "flushed", max(0.0, deadline - time.monotonic()))
        flushed = arrival.message.flushed
        if not flushed.url:
            raise error_of(local_pb2.Failure(error=flushed.error))
        return flushed.url

    def _load(self, located: local_pb2.Located, fd: int) -> None:
        begin = located.slot * located.slot_bytes
        end = begin + located.image_bytes
        try:
            if os.fstat(fd).st_size < end:
                raise errors.CorruptImage(
                    "the arena is shorter than the daemon says", f"{end:,} bytes expected"
                )
            # Private: nothing that happens here can change the image.
            private = mmap.mmap(fd, end, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        finally:
            os.close(fd)
        private.madvise(mmap.MADV_DONTFORK)
        origin = Origin(self._link.terms.job, self.rank, self.world_size)
        image = memoryview(private)[begin:end]
        verify(image, located.digest)
        restore(image, Survey(self._attached), origin, located.step)

    def _stored(self) -> stored.Newest:
        """The checkpoint in the node's store that this job would go on from."""
        store = self._link.welcome.store
        return stored.newest(store, self._link.terms.job) if store else stored.Newest("", ())

    def _resume_stored(self, kept: stored.Newest) -> ResumeReport:
        store, job = self._link.welcome.store, self._link.terms.job
        report = stored.resume(store, job, kept, self._attached, self.rank, self.world_size)
        resumed = local_pb2.Resumed(generation=report.generation, step=report.step)
        self._link.tell(local_pb2.TrainerMessage(resumed=resumed))
        self._begin(report.step)
        log.info("resumed at step %d from %s", report.step, store)
        return report

    def _begin(self, step: int) -> None:
        self._step = step
        self._link.view.floor = step
        self._resumed = True

    def _begin_unasked(self) -> None:
        """The first step without resume(): fine on a fresh start only."""
        located, fd = self._locate(self._bounds.timeout_s)
        if fd is not None:
            os.close(fd)
        kept = "" if fd is not None else self._stored().url
        if fd is not None or kept:
            raise errors.InvalidRequest(
                f"job {self._link.terms.job} has a state to resume from, {kept or f'step {located.step}'}",
                "this run would leave it behind",
                "call run.resume() before the first step, or choose another job name",
            )
        self._begin(0)

    def _check_usable(self) -> None:
        if not self._armed:
            raise errors.InvalidRequest("this run is over", "it was closed, or this is a forked child")
        if self._link.fatal is not None:
            raise self._link.fatal

    @contextmanager
    def _blocked(self) -> Iterator[None]:
        """Holds the lock, and counts the time as blocked."""
        began = time.perf_counter()
        with self._lock:
            try:
                yield
            finally:
                self._blocked_s += time.perf_counter() - began

    def _leave(self) -> None:
        """The process ends without close(): finishes the snapshot under way; the daemon keeps the memory."""
        if self._armed:
            self._armed = False
            self._protection.capture.finish(time.monotonic() + _LEAVE_S)
            self._copier.close(_LEAVE_S)

    def _disarm(self) -> None:
        """In a forked child: the hooks do nothing, and the socket is the parent's alone."""
        self._armed = False
        self._link.disarm()


def _scalar(loss: float | torch.Tensor | None) -> float | torch.Tensor | None:
    if isinstance(loss, torch.Tensor) and loss.numel() != 1:
        raise errors.InvalidRequest(
            f"a loss is one number, found shape {list(loss.shape)}", next="pass loss.mean()"
        )
    return loss


def _check_numbers(*, every: int, slots: int | None, max_lag: int | None, audit: int, capture: str) -> None:
    wrong = [
        (every < 1, f"every={every} must be at least 1"),
        (slots is not None and slots < 2, f"slots={slots} must be at least 2"),
        (max_lag is not None and max_lag < every, f"max_lag={max_lag} must be at least every={every}"),
        (audit < 0, f"audit={audit} must be at least 0"),
        (capture not in ("lazy", "eager"), f'capture={capture!r} must be "lazy" or "eager"'),
    ]
    for is_wrong, what in wrong:
        if is_wrong:
            raise errors.InvalidRequest(what)


def _disarm_all() -> None:
    for run in list(_runs):
        run._disarm()


def _end_all() -> None:
    """At the interpreter's end: no thread of ours may be inside torch when it goes."""
    for run in list(_runs):
        run._leave()


def _fail_all(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What nobody caught ends the process: every run says so, then the error is shown as always."""
    for run in list(_runs):
        run._fail(error)
    _shown_by(kind, error, trace)


_shown_by = sys.excepthook
sys.excepthook = _fail_all
os.register_at_fork(after_in_child=_disarm_all)
atexit.register(_end_all)
