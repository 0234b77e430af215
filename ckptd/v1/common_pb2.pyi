from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ErrorCode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ERROR_CODE_UNSPECIFIED: _ClassVar[ErrorCode]
    ERROR_CODE_INVALID: _ClassVar[ErrorCode]
    ERROR_CODE_PROTOCOL: _ClassVar[ErrorCode]
    ERROR_CODE_STALE_GENERATION: _ClassVar[ErrorCode]
    ERROR_CODE_RANK_TAKEN: _ClassVar[ErrorCode]
    ERROR_CODE_NO_SPACE: _ClassVar[ErrorCode]
    ERROR_CODE_NOT_OWNER: _ClassVar[ErrorCode]
    ERROR_CODE_NOT_FOUND: _ClassVar[ErrorCode]
    ERROR_CODE_TIMEOUT: _ClassVar[ErrorCode]
    ERROR_CODE_CORRUPT: _ClassVar[ErrorCode]
    ERROR_CODE_UNRECOVERABLE: _ClassVar[ErrorCode]
ERROR_CODE_UNSPECIFIED: ErrorCode
ERROR_CODE_INVALID: ErrorCode
ERROR_CODE_PROTOCOL: ErrorCode
ERROR_CODE_STALE_GENERATION: ErrorCode
ERROR_CODE_RANK_TAKEN: ErrorCode
ERROR_CODE_NO_SPACE: ErrorCode
ERROR_CODE_NOT_OWNER: ErrorCode
ERROR_CODE_NOT_FOUND: ErrorCode
ERROR_CODE_TIMEOUT: ErrorCode
ERROR_CODE_CORRUPT: ErrorCode
ERROR_CODE_UNRECOVERABLE: ErrorCode

class Header(_message.Message):
    __slots__ = ("job", "generation", "timeout_ms")
    JOB_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    job: str
    generation: int
    timeout_ms: int
    def __init__(self, job: _Optional[str] = ..., generation: _Optional[int] = ..., timeout_ms: _Optional[int] = ...) -> None: ...

class Error(_message.Message):
    __slots__ = ("code", "what", "why", "next")
    CODE_FIELD_NUMBER: _ClassVar[int]
    WHAT_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    NEXT_FIELD_NUMBER: _ClassVar[int]
    code: ErrorCode
    what: str
    why: str
    next: str
    def __init__(self, code: _Optional[_Union[ErrorCode, str]] = ..., what: _Optional[str] = ..., why: _Optional[str] = ..., next: _Optional[str] = ...) -> None: ...

class Member(_message.Message):
    __slots__ = ("node", "domain", "ranks", "control_address", "bulk_address")
    NODE_FIELD_NUMBER: _ClassVar[int]
    DOMAIN_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    CONTROL_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    BULK_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    node: str
    domain: str
    ranks: _containers.RepeatedScalarFieldContainer[int]
    control_address: str
    bulk_address: str
    def __init__(self, node: _Optional[str] = ..., domain: _Optional[str] = ..., ranks: _Optional[_Iterable[int]] = ..., control_address: _Optional[str] = ..., bulk_address: _Optional[str] = ...) -> None: ...

class Roster(_message.Message):
    __slots__ = ("generation", "members", "parity", "start")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    PARITY_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    generation: int
    members: _containers.RepeatedCompositeFieldContainer[Member]
    parity: int
    start: Snapshot
    def __init__(self, generation: _Optional[int] = ..., members: _Optional[_Iterable[_Union[Member, _Mapping]]] = ..., parity: _Optional[int] = ..., start: _Optional[_Union[Snapshot, _Mapping]] = ...) -> None: ...

class Snapshot(_message.Message):
    __slots__ = ("generation", "step")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    generation: int
    step: int
    def __init__(self, generation: _Optional[int] = ..., step: _Optional[int] = ...) -> None: ...

class Schedule(_message.Message):
    __slots__ = ("watermark", "has_watermark", "due", "held", "paused", "aborted", "generation", "flush", "stopping")
    WATERMARK_FIELD_NUMBER: _ClassVar[int]
    HAS_WATERMARK_FIELD_NUMBER: _ClassVar[int]
    DUE_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    PAUSED_FIELD_NUMBER: _ClassVar[int]
    ABORTED_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    FLUSH_FIELD_NUMBER: _ClassVar[int]
    STOPPING_FIELD_NUMBER: _ClassVar[int]
    watermark: int
    has_watermark: bool
    due: _containers.RepeatedScalarFieldContainer[int]
    held: bool
    paused: str
    aborted: _containers.RepeatedScalarFieldContainer[int]
    generation: int
    flush: int
    stopping: str
    def __init__(self, watermark: _Optional[int] = ..., has_watermark: _Optional[bool] = ..., due: _Optional[_Iterable[int]] = ..., held: _Optional[bool] = ..., paused: _Optional[str] = ..., aborted: _Optional[_Iterable[int]] = ..., generation: _Optional[int] = ..., flush: _Optional[int] = ..., stopping: _Optional[str] = ...) -> None: ...
