"""Where a reader or a writer of DCP's works: what its interface asks of both."""

from __future__ import annotations

import os

from ckptd.errors import InvalidRequest
from ckptd.storage import place


class PlaceOf:
    """Has a URL, which `reset` may change."""

    def __init__(self, url: str | os.PathLike[str] | None) -> None:
        super().__init__()
        self._url = "" if url is None else os.fspath(url)

    @property
    def checkpoint_id(self) -> str:
        return self._url

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether it names a place for a checkpoint."""
        try:
            place.parse(os.fspath(checkpoint_id))
        except InvalidRequest:
            return False
        return True

    def _move(self, checkpoint_id: str | os.PathLike[str] | None) -> None:
        """Goes to `checkpoint_id`, where one is given."""
        if checkpoint_id is not None:
            self._url = os.fspath(checkpoint_id)
