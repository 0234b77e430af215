"""The beginning of a manifest: what a catalog needs of every checkpoint, in one small read.

A manifest's digest is at its end, so nothing here is verified: it tells where to look, and whoever reads a
checkpoint's tensors reads the whole manifest (`Manifest.read`), which is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from ckptd.errors import CorruptCheckpoint

HEAD_BYTES: Final = 1024  # holds the longest head
_HEAD: Final = re.compile(
    rb'\{"ckptd\.manifest":1,"job":"([A-Za-z0-9._-]{1,128})","generation":([0-9]{1,16}),"step":([0-9]{1,16}),'
    rb'"parent":(?:null|\[([0-9]{1,16}),([0-9]{1,16})\]),"form":"(distributed|consolidated|files)",'
    rb'"world_size":([0-9]{1,7}),'
)


@dataclass(frozen=True, slots=True)
class ManifestHead:
    """What a manifest says before its objects."""

    job: str
    generation: int
    step: int
    parent: tuple[int, int] | None  # generation, step
    form: str
    world_size: int

    @classmethod
    def read(cls, data: bytes) -> ManifestHead:
        """Returns the head of a manifest that begins with `data`.

        Raises:
            CorruptCheckpoint: no manifest of this version begins so.
        """
        found = _HEAD.match(data)
        if found is None:
            raise CorruptCheckpoint(
                "this manifest cannot be used",
                f"it begins with {data[:40]!r}",
                "use another checkpoint of this job",
            )
        job, generation, step, parent_generation, parent_step, form, world_size = found.groups()
        parent = None if parent_generation is None else (int(parent_generation), int(parent_step))
        return cls(
            job.decode("ascii"), int(generation), int(step), parent, form.decode("ascii"), int(world_size)
        )
