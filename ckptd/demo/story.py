"""The demo from beginning to end: start, strike, watch the job come back, compare with the control."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from ckptd.demo import example, figures
from ckptd.demo.blows import Killer
from ckptd.demo.board import Board, NodeView
from ckptd.demo.children import Children, tail
from ckptd.demo.cluster import JOB, Cluster, base_environment, trainer_environment
from ckptd.demo.control import Control, control
from ckptd.demo.history import History
from ckptd.demo.options import DemoFailed, DemoOptions, ResolvedOptions
from ckptd.demo.picture import Picture
from ckptd.demo.result import DemoResult
from ckptd.demo.scratch import Scratch, scratch
from ckptd.demo.strikes import STRIKES, Scene, Struck
from ckptd.demo.watch import Watcher
from ckptd.errors import CkptdError

# The job takes its first step, or its next one, within this time on a busy machine.
STALL_S = 90.0
END_S = 30.0
JOB_S = 240.0


def run(options: DemoOptions) -> DemoResult:
    """Runs the demo; see `ckptd.demo.run`."""
    resolved = options.resolved()
    with scratch(resolved) as places:
        try:
            result = asyncio.run(_interruptible(resolved, places))
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None  # SIGTERM and SIGHUP
        except CkptdError as error:
            raise type(error)(error.what, error.why, _advice(error, places)) from error
        places.keep_logs = not result.identical
        return result


def _advice(error: CkptdError, places: Scratch) -> str:
    """Where the logs are, and the end of the one that tells most."""
    advice = error.next or f"read the logs in {places.logs}"
    log = error.log if isinstance(error, DemoFailed) else None
    return f"{advice}; {log.name} ends\n{tail(log)}" if log else advice


async def _interruptible(options: ResolvedOptions, places: Scratch) -> DemoResult:
    """SIGTERM and SIGHUP end the demo like Ctrl-C: every process is ended first."""
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    try:
        return await _demo(options, places)
    except BaseExceptionGroup as failures:
        raise _first_cause(failures) from None


async def _demo(options: ResolvedOptions, places: Scratch) -> DemoResult:
    names = [f"node{index}" for index in range(options.nodes + options.spares)]
    board = Board(History(options.nodes), options.steps, {name: NodeView() for name in names})
    title = f"ckptd demo --kill {options.kill} --seed {options.seed}"
    async with Children(places.logs, places.root) as children, _shown(Picture(board, title)):
        children.guard_directory(places.memory)
        if options.fork_server:
            children.preload(example.directory() / "loop.py", trainer_environment(places))
        struck = await _job(options, places, children, board)
        reference = await control(options, places, children, board)
    return _result(options, places, board, struck, reference)


async def _job(options: ResolvedOptions, places: Scratch, children: Children, board: Board) -> Struck | None:
    """The job with its cluster, from the start to the end; returns the strike that counts."""
    board.tell("starting", f"starting one coordinator and {len(board.nodes)} daemons")
    async with asyncio.TaskGroup() as tasks:
        cluster = Cluster(options, places, children, board, tasks)
        watcher = Watcher(JOB, cluster.coordinator_channel, board)
        watches = [
            tasks.create_task(task) for task in (watcher.timeline(), watcher.status(), _gets_on(board))
        ]
        await cluster.start()
        board.tell("submitted", f"{len(board.nodes)} daemons serve; the job is submitted")
        killer = Killer(children, base_environment(places))
        struck = await STRIKES[options.kill](Scene(options, board, cluster, killer))
        await _finished(board, cluster)
        for watch in watches:
            watch.cancel()
        killer.close()
        await cluster.close()
    return struck


async def _gets_on(board: Board) -> None:
    """Fails when nothing was completed for too long."""
    history = board.history
    while history.finished() is None:
        await board.until(
            _differs(lambda: (history.generations(), history.reached())),
            STALL_S,
            f"a step after step {history.reached()}",
        )


def _differs(value: Callable[[], object]) -> Callable[[], bool]:
    """Whether `value()` is another one than at this moment."""
    before = value()
    return lambda: value() != before


async def _finished(board: Board, cluster: Cluster) -> None:
    await board.until(lambda: board.history.finished() is not None, JOB_S, "the job's end")
    async with asyncio.timeout(END_S):
        await cluster.trainers_ended()
    board.tell("job-finished", f"the job has finished: {board.steps} steps")


@asynccontextmanager
async def _shown(picture: Picture) -> AsyncIterator[None]:
    """Shows the picture for as long as the body runs."""
    task = asyncio.create_task(picture.show())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


def _result(
    options: ResolvedOptions, places: Scratch, board: Board, struck: Struck | None, reference: Control
) -> DemoResult:
    history = board.history
    final, step_s = history.finished(), history.step_s()
    assert final is not None
    assert step_s is not None
    back = figures.recovery(board.events, history, struck.at_s, struck.generation) if struck else None
    assert (back is None) == (struck is None)
    known = {rank: {step: (loss,) for step, loss in told.items()} for rank, told in reference.losses.items()}
    different = figures.differences(final, reference.digests, history.losses(), known)
    if different:
        different.append(f"read the logs in {places.logs}")
    return DemoResult(
        kill=options.kill,
        nodes=options.nodes,
        parity=options.parity,
        seed=options.seed,
        steps=options.steps,
        recovery=back,
        step_s=step_s,
        capture=history.capture_totals(),
        final_digest=figures.combined_digest(final),
        control_digest=figures.combined_digest(reference.digests),
        different=tuple(different),
        timeline=tuple(figures.timeline(board.events, struck.at_s if struck else None)),
        startup=history.startup(back.generation) if back else {},
    )


def _first_cause(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first of the errors that is not just somebody's cancellation."""
    for error in failures.exceptions:
        return _first_cause(error) if isinstance(error, BaseExceptionGroup) else error
    raise AssertionError("an exception group is never empty")
