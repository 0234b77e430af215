"""Names from outside become safe ones here, and only here.

Job and node names end up in paths, sockets and logs; tensor names end up in image
headers and messages.  Neither may carry separators, control characters or a
meaning of our own.
"""

from __future__ import annotations

import re

from ckptd.errors import InvalidRequest

RESERVED_PREFIX = "__ckptd"
MAX_TENSOR_NAME = 512  # characters

_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")
_METADATA = "__metadata__"  # the one key of a safetensors header that is not a tensor


def check_name(kind: str, name: str) -> str:
    """Returns `name` if it may name a job or a node, and therefore a file.

    Args:
        kind: what is named, for the message: "job", "node".

    Raises:
        InvalidRequest: the name is not 1 to 128 of `A-Za-z0-9._-`, or is "." or "..".
    """
    if _NAME.fullmatch(name) is None:
        why = f"found {_shown(name)}, expected 1 to 128 characters out of A-Z a-z 0-9 . _ -"
    elif name in {".", ".."}:
        why = f"{name!r} is a place in the file system"
    else:
        return name
    raise InvalidRequest(f"this {kind} name cannot be used", why, f"choose another {kind} name")


def check_tensor_name(name: str) -> str:
    """Returns `name` if it may name a tensor of an image.

    Raises:
        InvalidRequest: the name is empty, longer than 512 characters, not printable,
            `__metadata__`, or begins with `__ckptd`.
    """
    if not name:
        why = "it is empty"
    elif len(name) > MAX_TENSOR_NAME:
        why = f"it has {len(name)} characters, at most {MAX_TENSOR_NAME} are kept"
    elif not name.isprintable():
        why = "it holds characters that cannot be printed"
    elif name == _METADATA or name.startswith(RESERVED_PREFIX):
        why = f"{_METADATA} and names that begin with {RESERVED_PREFIX} are reserved"
    else:
        return name
    raise InvalidRequest(f"the tensor name {_shown(name)} cannot be used", why, "rename the tensor")


def _shown(name: str) -> str:
    return ascii(name) if len(name) <= 64 else f"{name[:64]!a}... ({len(name)} characters)"
