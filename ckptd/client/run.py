"""The public face: `attach` and the `Run` it returns.

run = ckptd.attach("llama", model=model, optimizer=optimizer)
report = run.resume()
for step in range(report.step, steps):
    loss = train_step()
    run.step(loss=loss)
run.close()
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Literal

import torch
from torch.optim import Optimizer

from ckptd import errors
from ckptd.client import optimizers as optim
from ckptd.client import resuming
from ckptd.client.attached import Attached
from ckptd.client.copier import Copier
from ckptd.client.describe import describe
from ckptd.client.embedded import find_daemon
from ckptd.client.ending import Ending
from ckptd.client.estimate import reserve
from ckptd.client.link import Link, Terms
from ckptd.client.protection import Bounds, Protection
from ckptd.client.report import ResumeReport, Statistics
from ckptd.client.settings import Environment, Place
from ckptd.client.settling import make_durable, settle
from ckptd.client.state import Survey
from ckptd.failpoints import failpoint
from ckptd.image import check_name
from ckptd.storage import marks
from ckptd.storage.store import open_store

log = logging.getLogger("ckptd")


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
        copier = Copier()
        self._protection = Protection(attached, link, copier, bounds, audit=audit, eager=eager)
        self._ending = Ending(self._protection, copier, link, bounds.timeout_s)
        self._eager = eager
        self._step = 0
        self._resumed = False
        self._lag_checked = True  # before the first step there is nothing to wait for
        self._blocked_s = 0.0
        # Hooks of optimizers that step inside backward run on autograd's threads.
        self._lock = threading.RLock()
        self._hooks = []
        if not eager:
            for index, optimizer in enumerate(attached.optimizers.values()):
                self._hooks.append(optimizer.register_step_pre_hook(self._hook_of(index)))

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
            report = resuming.resume(self._link, self._attached, timeout_s)
            self._begin(report.step)
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
                resuming.check_fresh(self._link, self._bounds.timeout_s)
                self._begin(0)
            self._protection.capture.fence_all()
            self._wait_for_lag()
            self._step += 1
            self._protection.complete(self._step, loss)
            self._lag_checked = False
            if self._eager:
                self._wait_for_lag()
        failpoint("trainer.stepped")

    def fence(self) -> None:
        """Call before anything changes parameters or optimizer state without a torch optimizer's step()."""
        with self._blocked():
            if self._ending.armed:
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
            protected = wait == "protected"
            settle(self._protection, self._link, self._step, protected=protected, deadline=deadline)
            url = make_durable(self._link, self._step, deadline) if wait == "durable" else None
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
            outcomes = protection.outcomes
            if self._ending.armed:
                outcomes.collect()
            return Statistics(
                step=self._step,
                captured=outcomes.captured,
                dropped=dict(outcomes.dropped),
                voided=outcomes.voided,
                audits=protection.capture.audits,
                protected_step=view.watermark,
                lag_steps=view.lag(self._step),
                blocked_s=self._blocked_s,
                lag_wait_s=protection.lag_wait_s,
                copied_bytes=protection.capture.copied_bytes,
                replans=protection.room.replans,
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
        with self._lock:
            if self._ending.armed:
                for hook in self._hooks:
                    hook.remove()
                self._ending.close(park=park)

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self._ending.fail(error)

    def _hook_of(self, index: int) -> Any:
        def before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            if self._ending.armed:
                with self._blocked():
                    self._protection.capture.fence(index)
                    self._wait_for_lag()

        return before_step

    def _wait_for_lag(self) -> None:
        """Before optimizer step s + 1, once: waits while too many steps would be unprotected after it."""
        if not self._lag_checked:
            self._lag_checked = True
            self._protection.wait_for_lag(self._step + 1)

    def _begin(self, step: int) -> None:
        self._step = step
        self._link.view.floor = step
        self._resumed = True

    def _check_usable(self) -> None:
        if not self._ending.armed:
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
