"""What varies from step to step: the image's last tensor, `__ckptd.variable`.

A fixed head of 256 bytes (little-endian), then the encoded objects, then zeros:

    0    8  magic "ckptdvar"
    8    4  version, 1
    12   4  rank
    16   4  world size
    20   4  length of the job's name
    24   8  generation
    32   8  step
    40   8  length of the objects
    48 128  job, ASCII, filled up with zeros
    176  80 zeros

All unused bytes are zeros, so that equal states have equal images.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

import numpy as np

from ckptd.errors import InvalidRequest
from ckptd.image.header import corrupt
from ckptd.image.names import check_name
from ckptd.image.plan import VARIABLE_HEAD_BYTES, ImagePlan

_MAGIC: Final = b"ckptdvar"
_VERSION: Final = 1
_HEAD: Final = struct.Struct("<8sIIIIQQQ128s")
_LEAST_CAPACITY: Final = 32 << 10
_CAPACITY_UNIT: Final = 4096


class Outgrown(Exception):
    """The objects no longer fit the plan: build a new one, and count it.

    Attributes:
        needed: bytes that the encoded objects take.
        capacity: bytes that the plan reserved.
    """

    def __init__(self, needed: int, capacity: int) -> None:
        super().__init__(f"the objects take {needed} bytes, the plan reserved {capacity}")
        self.needed = needed
        self.capacity = capacity


@dataclass(frozen=True, slots=True)
class Variable:
    """Where an image belongs, and the rank's encoded objects (`ckptd.image.objects`)."""

    job: str
    generation: int
    step: int  # completed optimizer steps
    rank: int
    world_size: int
    objects: bytes


def roomy_capacity(nbytes: int) -> int:
    """Returns a capacity in bytes for objects that take `nbytes` now and may grow by half."""
    return max(_LEAST_CAPACITY, -(-nbytes * 3 // 2 // _CAPACITY_UNIT) * _CAPACITY_UNIT)


def write_variable(plan: ImagePlan, image: memoryview, variable: Variable) -> None:
    """Writes `variable` into `image`, and zeros behind it up to the image's end.

    Raises:
        Outgrown: the objects are longer than `plan.objects_capacity`; `image` is untouched.
        InvalidRequest: the job's name cannot be used.
        ValueError: a number is out of range, or `image` is not `plan.image_bytes` long.
    """
    plan.check_length(image)
    needed = len(variable.objects)
    if needed > plan.objects_capacity:
        raise Outgrown(needed, plan.objects_capacity)
    job = check_name("job", variable.job).encode("ascii")
    if not 0 <= variable.rank < variable.world_size:
        raise ValueError(f"rank {variable.rank} of {variable.world_size} ranks")
    try:
        head = _HEAD.pack(
            _MAGIC,
            _VERSION,
            variable.rank,
            variable.world_size,
            len(job),
            variable.generation,
            variable.step,
            needed,
            job,
        )
    except struct.error as error:
        raise ValueError(f"a number of {variable!r} is out of range: {error}") from error
    end = plan.objects_offset + needed
    image[plan.variable_offset : plan.objects_offset] = head.ljust(VARIABLE_HEAD_BYTES, b"\0")
    image[plan.objects_offset : end] = variable.objects
    # Always the whole tail: what an earlier, killed writer left here is not known.
    np.frombuffer(image, np.uint8)[end:] = 0


def read_variable(plan: ImagePlan, image: memoryview) -> Variable:
    """Returns what `write_variable` wrote, after checking all of it.

    Raises:
        CorruptImage: see `read_tail`.
        ValueError: `image` is not `plan.image_bytes` long.
    """
    plan.check_length(image)
    return read_tail(plan, image[plan.variable_offset :])


def read_tail(plan: ImagePlan, tail: memoryview) -> Variable:
    """Returns the same from the variable tensor's bytes alone, which are the image's last.

    Raises:
        CorruptImage: the head is not one, a length is beyond its bound, or the unused
            bytes are not zeros.
        ValueError: they are not as many as the plan says.
    """
    if len(tail) != plan.image_bytes - plan.variable_offset:
        raise ValueError(f"{len(tail)} bytes, expected {plan.image_bytes - plan.variable_offset}")
    head = bytes(tail[:VARIABLE_HEAD_BYTES])
    magic, version, rank, world_size, job_bytes, generation, step, length, job = _HEAD.unpack_from(head)
    if magic != _MAGIC or version != _VERSION:
        raise corrupt(f"its last tensor begins with {magic!r} {version}, expected {_MAGIC!r} {_VERSION}")
    if length > plan.objects_capacity:
        raise corrupt(f"its objects claim {length} bytes, the plan reserved {plan.objects_capacity}")
    if job_bytes > len(job):
        raise corrupt(f"its job's name claims {job_bytes} bytes, expected at most {len(job)}")
    if rank >= world_size:
        raise corrupt(f"it claims rank {rank} of {world_size} ranks")
    name = job[:job_bytes]
    if head != head[: _HEAD.size - len(job)] + name.ljust(len(head) - _HEAD.size + len(job), b"\0"):
        raise corrupt("the unused bytes of its head are not zeros")
    try:
        job_name = check_name("job", name.decode("ascii"))
    except UnicodeDecodeError as error:
        raise corrupt(f"the job's name cannot be read: {error}") from error
    except InvalidRequest as error:
        raise corrupt(f"the job's name cannot be read: {error.why}") from error
    end = VARIABLE_HEAD_BYTES + length
    if np.frombuffer(tail, np.uint8)[end:].any():
        raise corrupt(f"bytes behind its objects, from byte {plan.variable_offset + end} on, are not zeros")
    return Variable(job_name, generation, step, rank, world_size, bytes(tail[VARIABLE_HEAD_BYTES:end]))
