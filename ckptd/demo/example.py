"""Where examples/gpt lies: beside the package in a checkout, inside it when installed."""

from __future__ import annotations

import hashlib
from pathlib import Path

import ckptd
from ckptd.errors import NotFound

PACKAGE_PARENT = Path(ckptd.__file__).resolve().parents[1]


def directory() -> Path:
    """The directory of train.py and control.py.

    Raises:
        NotFound: the installation is not complete.
    """
    candidates = [PACKAGE_PARENT / "ckptd" / "examples" / "gpt", PACKAGE_PARENT / "examples" / "gpt"]
    for candidate in candidates:
        if (candidate / "train.py").is_file():
            return candidate
    raise NotFound(
        "examples/gpt is not there",
        f"looked for train.py in {' and '.join(str(path) for path in candidates)}",
        "install ckptd again",
    )


def source_digest() -> str:
    """SHA-256 of all that decides what the control computes, except options and versions."""
    total = hashlib.sha256()
    for path in sorted(directory().glob("*.py")):
        if path.name != "train.py":  # only there to call ckptd
            total.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()
