from ckptd.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TrainerMessage(_message.Message):
    __slots__ = ("header", "hello", "plan", "captured", "aborted", "progress", "accept", "locate", "goodbye", "reserve", "failing", "flush", "resumed")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    CAPTURED_FIELD_NUMBER: _ClassVar[int]
    ABORTED_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    ACCEPT_FIELD_NUMBER: _ClassVar[int]
    LOCATE_FIELD_NUMBER: _ClassVar[int]
    GOODBYE_FIELD_NUMBER: _ClassVar[int]
    RESERVE_FIELD_NUMBER: _ClassVar[int]
    FAILING_FIELD_NUMBER: _ClassVar[int]
    FLUSH_FIELD_NUMBER: _ClassVar[int]
    RESUMED_FIELD_NUMBER: _ClassVar[int]
    header: _common_pb2.Header
    hello: Hello
    plan: Plan
    captured: Captured
    aborted: Aborted
    progress: Progress
    accept: Accept
    locate: Locate
    goodbye: Goodbye
    reserve: Reserve
    failing: Failing
    flush: Flush
    resumed: Resumed
    def __init__(self, header: _Optional[_Union[_common_pb2.Header, _Mapping]] = ..., hello: _Optional[_Union[Hello, _Mapping]] = ..., plan: _Optional[_Union[Plan, _Mapping]] = ..., captured: _Optional[_Union[Captured, _Mapping]] = ..., aborted: _Optional[_Union[Aborted, _Mapping]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., accept: _Optional[_Union[Accept, _Mapping]] = ..., locate: _Optional[_Union[Locate, _Mapping]] = ..., goodbye: _Optional[_Union[Goodbye, _Mapping]] = ..., reserve: _Optional[_Union[Reserve, _Mapping]] = ..., failing: _Optional[_Union[Failing, _Mapping]] = ..., flush: _Optional[_Union[Flush, _Mapping]] = ..., resumed: _Optional[_Union[Resumed, _Mapping]] = ...) -> None: ...

class DaemonMessage(_message.Message):
    __slots__ = ("welcome", "arena_ready", "grants", "located", "failure", "reserved", "flushed")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    ARENA_READY_FIELD_NUMBER: _ClassVar[int]
    GRANTS_FIELD_NUMBER: _ClassVar[int]
    LOCATED_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    RESERVED_FIELD_NUMBER: _ClassVar[int]
    FLUSHED_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    arena_ready: ArenaReady
    grants: Grants
    located: Located
    failure: Failure
    reserved: Reserved
    flushed: Flushed
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., arena_ready: _Optional[_Union[ArenaReady, _Mapping]] = ..., grants: _Optional[_Union[Grants, _Mapping]] = ..., located: _Optional[_Union[Located, _Mapping]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ..., reserved: _Optional[_Union[Reserved, _Mapping]] = ..., flushed: _Optional[_Union[Flushed, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol", "rank", "world_size", "local_world_size", "every", "slots", "parity", "reconnect")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    LOCAL_WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    EVERY_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    PARITY_FIELD_NUMBER: _ClassVar[int]
    RECONNECT_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    rank: int
    world_size: int
    local_world_size: int
    every: int
    slots: int
    parity: int
    reconnect: bool
    def __init__(self, protocol: _Optional[int] = ..., rank: _Optional[int] = ..., world_size: _Optional[int] = ..., local_world_size: _Optional[int] = ..., every: _Optional[int] = ..., slots: _Optional[int] = ..., parity: _Optional[int] = ..., reconnect: _Optional[bool] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("protocol", "generation", "node", "embedded", "survives", "memory_limit_bytes", "store")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    EMBEDDED_FIELD_NUMBER: _ClassVar[int]
    SURVIVES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_LIMIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    STORE_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    generation: int
    node: str
    embedded: bool
    survives: str
    memory_limit_bytes: int
    store: str
    def __init__(self, protocol: _Optional[int] = ..., generation: _Optional[int] = ..., node: _Optional[str] = ..., embedded: _Optional[bool] = ..., survives: _Optional[str] = ..., memory_limit_bytes: _Optional[int] = ..., store: _Optional[str] = ...) -> None: ...

class Reserve(_message.Message):
    __slots__ = ("image_bytes",)
    IMAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    image_bytes: int
    def __init__(self, image_bytes: _Optional[int] = ...) -> None: ...

class Reserved(_message.Message):
    __slots__ = ("needed_bytes", "available_bytes")
    NEEDED_BYTES_FIELD_NUMBER: _ClassVar[int]
    AVAILABLE_BYTES_FIELD_NUMBER: _ClassVar[int]
    needed_bytes: int
    available_bytes: int
    def __init__(self, needed_bytes: _Optional[int] = ..., available_bytes: _Optional[int] = ...) -> None: ...

class Plan(_message.Message):
    __slots__ = ("plan_hash", "image_bytes")
    PLAN_HASH_FIELD_NUMBER: _ClassVar[int]
    IMAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    plan_hash: bytes
    image_bytes: int
    def __init__(self, plan_hash: _Optional[bytes] = ..., image_bytes: _Optional[int] = ...) -> None: ...

class ArenaReady(_message.Message):
    __slots__ = ("plan_hash", "slots", "slot_bytes")
    PLAN_HASH_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    SLOT_BYTES_FIELD_NUMBER: _ClassVar[int]
    plan_hash: bytes
    slots: int
    slot_bytes: int
    def __init__(self, plan_hash: _Optional[bytes] = ..., slots: _Optional[int] = ..., slot_bytes: _Optional[int] = ...) -> None: ...

class Grants(_message.Message):
    __slots__ = ("schedule", "grants")
    SCHEDULE_FIELD_NUMBER: _ClassVar[int]
    GRANTS_FIELD_NUMBER: _ClassVar[int]
    schedule: _common_pb2.Schedule
    grants: _containers.RepeatedCompositeFieldContainer[Grant]
    def __init__(self, schedule: _Optional[_Union[_common_pb2.Schedule, _Mapping]] = ..., grants: _Optional[_Iterable[_Union[Grant, _Mapping]]] = ...) -> None: ...

class Grant(_message.Message):
    __slots__ = ("step", "slot")
    STEP_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    step: int
    slot: int
    def __init__(self, step: _Optional[int] = ..., slot: _Optional[int] = ...) -> None: ...

class Captured(_message.Message):
    __slots__ = ("step", "slot", "plan_hash")
    STEP_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    PLAN_HASH_FIELD_NUMBER: _ClassVar[int]
    step: int
    slot: int
    plan_hash: bytes
    def __init__(self, step: _Optional[int] = ..., slot: _Optional[int] = ..., plan_hash: _Optional[bytes] = ...) -> None: ...

class Aborted(_message.Message):
    __slots__ = ("step", "reason", "not_finite")
    STEP_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    NOT_FINITE_FIELD_NUMBER: _ClassVar[int]
    step: int
    reason: str
    not_finite: bool
    def __init__(self, step: _Optional[int] = ..., reason: _Optional[str] = ..., not_finite: _Optional[bool] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("step",)
    STEP_FIELD_NUMBER: _ClassVar[int]
    step: int
    def __init__(self, step: _Optional[int] = ...) -> None: ...

class Accept(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Locate(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Located(_message.Message):
    __slots__ = ("step", "generation", "slot", "slot_bytes", "image_bytes", "rung", "verified", "skipped", "digest")
    STEP_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    SLOT_BYTES_FIELD_NUMBER: _ClassVar[int]
    IMAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    RUNG_FIELD_NUMBER: _ClassVar[int]
    VERIFIED_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    step: int
    generation: int
    slot: int
    slot_bytes: int
    image_bytes: int
    rung: str
    verified: bool
    skipped: _containers.RepeatedCompositeFieldContainer[Skipped]
    digest: bytes
    def __init__(self, step: _Optional[int] = ..., generation: _Optional[int] = ..., slot: _Optional[int] = ..., slot_bytes: _Optional[int] = ..., image_bytes: _Optional[int] = ..., rung: _Optional[str] = ..., verified: _Optional[bool] = ..., skipped: _Optional[_Iterable[_Union[Skipped, _Mapping]]] = ..., digest: _Optional[bytes] = ...) -> None: ...

class Skipped(_message.Message):
    __slots__ = ("generation", "step", "why")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    generation: int
    step: int
    why: str
    def __init__(self, generation: _Optional[int] = ..., step: _Optional[int] = ..., why: _Optional[str] = ...) -> None: ...

class Goodbye(_message.Message):
    __slots__ = ("park",)
    PARK_FIELD_NUMBER: _ClassVar[int]
    park: bool
    def __init__(self, park: _Optional[bool] = ...) -> None: ...

class Failing(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class Resumed(_message.Message):
    __slots__ = ("generation", "step")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    generation: int
    step: int
    def __init__(self, generation: _Optional[int] = ..., step: _Optional[int] = ...) -> None: ...

class Flush(_message.Message):
    __slots__ = ("step",)
    STEP_FIELD_NUMBER: _ClassVar[int]
    step: int
    def __init__(self, step: _Optional[int] = ...) -> None: ...

class Flushed(_message.Message):
    __slots__ = ("step", "url", "error")
    STEP_FIELD_NUMBER: _ClassVar[int]
    URL_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    step: int
    url: str
    error: _common_pb2.Error
    def __init__(self, step: _Optional[int] = ..., url: _Optional[str] = ..., error: _Optional[_Union[_common_pb2.Error, _Mapping]] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("error",)
    ERROR_FIELD_NUMBER: _ClassVar[int]
    error: _common_pb2.Error
    def __init__(self, error: _Optional[_Union[_common_pb2.Error, _Mapping]] = ...) -> None: ...
