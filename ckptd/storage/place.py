"""Names and URLs become places here, and only here.

    ckptd://JOB/step-N        step N of JOB in the configured store, its newest generation
    ckptd://JOB/step-N.gG     the same, of generation G
    ckptd://JOB/latest        the newest step that has a manifest
    anything else             a path or an fsspec URL of a checkpoint's own directory

The store is `CKPTD_STORE`, any fsspec URL; by default a folder of the user's state directory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ckptd.errors import InvalidRequest
from ckptd.image.names import check_name

SCHEME: Final = "ckptd://"
_DIRECTORY: Final = re.compile(r"step-([0-9]{8,15})\.g([0-9]{5,15})")
_WANTED: Final = re.compile(r"step-([0-9]{1,15})(?:\.g([0-9]{1,15}))?")


@dataclass(frozen=True, slots=True)
class Wanted:
    """A checkpoint by its job and step, in a store."""

    store: str  # URL or path of the store
    job: str
    step: int | None  # None: the newest
    generation: int | None = None  # None: the newest that has this step


def store_url(environ: Mapping[str, str] | None = None) -> str:
    """Returns the configured store's URL or path; the one place that reads `CKPTD_STORE`."""
    environ = os.environ if environ is None else environ
    if environ.get("CKPTD_STORE"):
        return environ["CKPTD_STORE"]
    state = environ.get("XDG_STATE_HOME") or str(Path("~/.local/state").expanduser())
    return str(Path(state) / "ckptd" / "checkpoints")


def parse(url: str, environ: Mapping[str, str] | None = None) -> Wanted | str:
    """Returns what `url` asks for in the configured store, or `url` itself if it is a directory's.

    Raises:
        InvalidRequest: the URL names no checkpoint.
    """
    if not url.startswith(SCHEME):
        if not url:
            raise InvalidRequest("this checkpoint's URL is empty", next="pass a path or ckptd://JOB/step-N")
        return url
    parts = url.removeprefix(SCHEME).rstrip("/").split("/")
    found = _WANTED.fullmatch(parts[1]) if len(parts) == 2 else None
    if found is None and parts[1:] != ["latest"]:
        raise InvalidRequest(
            f"the URL {ascii(url)[:200]} names no checkpoint",
            "expected ckptd://JOB/step-N, ckptd://JOB/step-N.gG or ckptd://JOB/latest",
            "ckptd ls JOB shows what there is",
        )
    job = check_name("job", parts[0])
    step = None if found is None else int(found[1])
    generation = None if found is None or found[2] is None else int(found[2])
    return Wanted(store_url(environ), job, step, generation)


def directory_name(step: int, generation: int) -> str:
    """Returns the name of a checkpoint's directory: names in order are steps in order."""
    return f"step-{step:08}.g{generation:05}"


def parse_directory(name: str) -> tuple[int, int] | None:
    """Returns step and generation of a directory that `directory_name` named; None for any other."""
    found = _DIRECTORY.fullmatch(name)
    if found is None or name != directory_name(int(found[1]), int(found[2])):
        return None
    return int(found[1]), int(found[2])


def object_name(rank: int) -> str:
    """Returns the file name of a rank's image, or of a part of the consolidated form."""
    return f"rank-{rank:05}.safetensors"


def join(base: str, *names: str) -> str:
    """Returns the place of `names` below `base`, a path or URL that the user gave.

    Raises:
        InvalidRequest: a name has separators, or is "." or "..".
    """
    return "/".join([base.rstrip("/") or "/", *(check_name("file", name) for name in names)])
