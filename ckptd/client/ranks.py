"""The ranks that save or resume together: a few bytes from everyone to everyone, and nothing pickled."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch

from ckptd.errors import CkptdError


class SaveFailed(CkptdError):
    """Another rank could not do its part of a save, or of a resume."""


class Ranks:
    """The ranks that save together; one alone where torch.distributed is not used."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self.rank, self.size = 0, 1
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized():
            self.rank, self.size = distributed.get_rank(group), distributed.get_world_size(group)
            self._device = torch.device("cuda" if distributed.get_backend(group) == "nccl" else "cpu")

    def gather(self, data: bytes) -> list[bytes]:
        """Returns every rank's bytes, in the order of ranks."""
        if self.size == 1:
            return [data]
        distributed = torch.distributed
        length = torch.tensor([len(data)], dtype=torch.int64, device=self._device)
        lengths = [torch.empty_like(length) for _ in range(self.size)]
        distributed.all_gather(lengths, length, group=self._group)
        sizes = [int(n) for n in lengths]
        mine = torch.zeros(max(1, *sizes), dtype=torch.uint8, device=self._device)
        if data:
            mine[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        all_of = [torch.empty_like(mine) for _ in range(self.size)]
        distributed.all_gather(all_of, mine, group=self._group)
        return [t[:n].cpu().numpy().tobytes() for t, n in zip(all_of, sizes, strict=True)]

    def together(self, do: Callable[[], Any], what: str = "save") -> Any:
        """Returns what `do` returns on this rank, if it raises on none.

        Raises:
            CkptdError: this rank's own.
            SaveFailed: another one's.
        """
        failure: CkptdError | None = None
        result: Any = None
        try:
            result = do()
        except CkptdError as error:
            failure = error
        told = "" if failure is None else str(failure) or type(failure).__name__
        everyone = [json.loads(text) for text in self.gather(json.dumps(told).encode("ascii"))]
        if failure is not None:
            raise failure
        failed = [rank for rank, text in enumerate(everyone) if text]
        if failed:
            raise SaveFailed(f"rank {failed[0]} could not {what}", everyone[failed[0]], f"{what} again")
        return result
