"""How each variant saves: one class per peer, and ckptd's own, all behind `Saver`."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from snapshot_figures import JOB, VARIANTS
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse
from torch.optim import Optimizer

_DEADLINE_S = 60.0
_POLL_S = 0.003
_QUIET_S = 5.0  # after this time no snapshot is under way any more
# ckptd compares its first three snapshots with the live tensors; other libraries start processes.
WARMUP = {"nothing": 2, "torch.save": 1, "dcp.save": 1, "ckptd": 4}
WARMUP_DEFAULT = 2


class Saver(Protocol):
    """What the training loop calls, on the training thread; what it waits for is blocked time."""

    # (step, CLOCK_MONOTONIC) of every snapshot that is finished on this rank.
    finished: list[tuple[int, float]]
    every_step: bool  # a new snapshot may begin before the last one is finished
    cut: bool  # whether the last call of `save` began a snapshot; ckptd leaves out steps that are not due

    def fence(self) -> None:
        """Before the optimizer changes anything."""

    def release(self) -> None:
        """After the optimizer's step."""

    def save(self, step: int) -> None:
        """At the cut."""

    def blocked_s(self, outside: float) -> float:
        """Seconds blocked since the last call, where `outside` was measured around the calls."""

    def idle(self) -> bool:
        """Whether nothing is under way on this rank."""

    def remove(self, step: int) -> None:
        """Deletes a finished snapshot."""

    def report(self) -> dict[str, Any]:
        """What only this variant can tell."""

    def close(self) -> None:
        """Ends threads and processes."""


class Nothing:
    """Saves nothing; the base of the others."""

    every_step = False
    cut = True

    def __init__(self, model: nn.Module, optimizer: Optimizer, directory: Path) -> None:
        self.model, self.optimizer, self.directory = model, optimizer, directory
        self.finished: list[tuple[int, float]] = []

    def fence(self) -> None: ...

    def release(self) -> None: ...

    def save(self, step: int) -> None:
        self.finished.append((step, time.monotonic()))

    def blocked_s(self, outside: float) -> float:
        return outside

    def idle(self) -> bool:
        return True

    def remove(self, step: int) -> None: ...

    def report(self) -> dict[str, Any]:
        return {}

    def close(self) -> None: ...

    def state(self) -> dict[str, Any]:
        """This rank's state under keys that the other rank has not: nothing is deduplicated."""
        return {
            f"model{dist.get_rank()}": self.model.state_dict(),
            f"optimizer{dist.get_rank()}": self.optimizer.state_dict(),
        }

    def path(self, step: int) -> Path:
        return self.directory / f"step{step}"


class TorchSave(Nothing):
    """A file per rank."""

    def save(self, step: int) -> None:
        self.path(step).mkdir(exist_ok=True)
        torch.save(self.state(), self.path(step) / f"rank{dist.get_rank()}.pt")
        super().save(step)


class DcpSave(Nothing):
    """The synchronous save of torch.distributed.checkpoint."""

    def save(self, step: int) -> None:
        dcp.save(self.state(), checkpoint_id=self.path(step))
        super().save(step)


class _Background(Nothing):
    """A save that ends behind the training thread's back."""

    _future: Future[Any] | None = None

    def _follow(self, step: int, future: Future[Any]) -> None:
        self._future = future
        future.add_done_callback(lambda _: self.finished.append((step, time.monotonic())))

    def idle(self) -> bool:
        if self._future is not None and self._future.done():
            self._future.result()  # a save that failed ends the benchmark of this variant
            self._future = None
        return self._future is None

    def close(self) -> None:
        if self._future is not None:
            self._future.result(_DEADLINE_S)


class DcpAsync(_Background):
    """`dcp.async_save`; with shared memory, staged by a thread, which the fence waits for."""

    def __init__(self, *common: Any, process: bool, shared: bool) -> None:
        super().__init__(*common)
        self._type = AsyncCheckpointerType.PROCESS if process else AsyncCheckpointerType.THREAD
        # Its collectives run beside the loop's own: they need a group of their own.
        self._group = dist.new_group(backend="gloo")
        options = StagingOptions(
            use_pinned_memory=False,
            use_shared_memory=True,
            use_async_staging=True,
            use_non_blocking_copy=False,
        )
        self._stager = DefaultStager(options) if shared else None
        self._staging: Future[None] | None = None

    def save(self, step: int) -> None:
        response = dcp.async_save(
            self.state(),
            checkpoint_id=self.path(step),
            process_group=self._group,
            async_checkpointer_type=self._type,
            async_stager=self._stager,
        )
        if isinstance(response, AsyncSaveResponse):
            self._staging = response.staging_completion
            response = response.upload_completion
        self._follow(step, response)

    def fence(self) -> None:
        if self._staging is not None:
            self._staging.result(_DEADLINE_S)
            self._staging = None

    def close(self) -> None:
        super().close()
        if self._stager is not None:
            self._stager.close()


class TorchCheckpointing(_Background):
    """`torch_checkpointing`: asynchronous staging into shared memory, written by a process; `lock()`."""

    def __init__(self, *common: Any) -> None:
        super().__init__(*common)
        from torch_checkpointing import CheckpointManager

        self._manager = CheckpointManager(CheckpointManager.Config.with_async_save())
        self._lock: Any = None

    def save(self, step: int) -> None:
        future = self._manager.save(str(self.path(step)), self.state())
        assert future is not None
        self._follow(step, future)

    def fence(self) -> None:
        self._lock = self._manager.lock()
        self._lock.__enter__()

    def release(self) -> None:
        self._lock.__exit__(None, None, None)

    def close(self) -> None:
        super().close()
        self._manager.close()


class Ckptd(Nothing):
    """ckptd: finished means protected, known to this rank."""

    every_step = True

    def __init__(self, *common: Any) -> None:
        super().__init__(*common)
        import ckptd

        self.run = ckptd.attach(JOB, model=self.model, optimizer=self.optimizer, every=1)
        assert self.run.resume().step == 0
        self._blocked_before = self.run.statistics().blocked_s
        self._moved_at = time.monotonic()
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._watch_watermark, daemon=True)
        self._watch.start()

    def save(self, step: int) -> None:
        self.run.step()
        # Not in statistics(): they would count what is finished only.
        self.cut = self.run._protection.last_captured == self.run.statistics().step

    def blocked_s(self, outside: float) -> float:
        total = self.run.statistics().blocked_s
        since, self._blocked_before = total - self._blocked_before, total
        return since

    def idle(self) -> bool:
        """Whether the newest step is protected; a step that was dropped never is."""
        quiet = time.monotonic() - self._moved_at > _QUIET_S
        return quiet or self.run.statistics().lag_steps == 0

    def report(self) -> dict[str, Any]:
        statistics = self.run.statistics()
        return {
            "captured": statistics.captured,
            "dropped": dict(statistics.dropped),
            "protected_step": statistics.protected_step,
            "copied_bytes": statistics.copied_bytes,
            "voided": statistics.voided,
            "audits": statistics.audits,
            "replans": statistics.replans,
            "survives": self.run.survives,
        }

    def close(self) -> None:
        self._over.set()
        self._watch.join()
        self.run.close()

    def _watch_watermark(self) -> None:
        # statistics() would take the run's lock from the training thread; the view is only read.
        view, known = self.run._link.view, 0
        while not self._over.wait(_POLL_S):
            watermark = view.watermark
            if watermark > known:
                known = watermark
                self._moved_at = time.monotonic()
                self.finished.append((known, self._moved_at))


SAVERS: dict[str, Callable[[nn.Module, Optimizer, Path], Saver]] = {
    "nothing": Nothing,
    "torch.save": TorchSave,
    "dcp.save": DcpSave,
    "dcp.async-thread": lambda *common: DcpAsync(*common, process=False, shared=False),
    "dcp.async-process": lambda *common: DcpAsync(*common, process=True, shared=False),
    "dcp.async-process-shm": lambda *common: DcpAsync(*common, process=True, shared=True),
    "torch_checkpointing": TorchCheckpointing,
    "ckptd": Ckptd,
}
assert tuple(SAVERS) == VARIANTS


def pids_of_daemons() -> list[int]:
    """Coordinator and daemons, which the benchmark names in the environment."""
    return [int(pid) for pid in os.environ.get("BENCH_DAEMONS", "").split(",") if pid]
