from ckptd.v1 import common_pb2 as _common_pb2
from ckptd.v1 import coordinator_pb2 as _coordinator_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class OrdersRequest(_message.Message):
    __slots__ = ("header",)
    HEADER_FIELD_NUMBER: _ClassVar[int]
    header: _common_pb2.Header
    def __init__(self, header: _Optional[_Union[_common_pb2.Header, _Mapping]] = ...) -> None: ...

class Order(_message.Message):
    __slots__ = ("generation", "stop", "start", "finish")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    generation: int
    stop: Stop
    start: Start
    finish: Finish
    def __init__(self, generation: _Optional[int] = ..., stop: _Optional[_Union[Stop, _Mapping]] = ..., start: _Optional[_Union[Start, _Mapping]] = ..., finish: _Optional[_Union[Finish, _Mapping]] = ...) -> None: ...

class Stop(_message.Message):
    __slots__ = ("grace_ms",)
    GRACE_MS_FIELD_NUMBER: _ClassVar[int]
    grace_ms: int
    def __init__(self, grace_ms: _Optional[int] = ...) -> None: ...

class Start(_message.Message):
    __slots__ = ("trainers",)
    TRAINERS_FIELD_NUMBER: _ClassVar[int]
    trainers: _containers.RepeatedCompositeFieldContainer[TrainerOrder]
    def __init__(self, trainers: _Optional[_Iterable[_Union[TrainerOrder, _Mapping]]] = ...) -> None: ...

class TrainerOrder(_message.Message):
    __slots__ = ("rank", "environment")
    class EnvironmentEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    RANK_FIELD_NUMBER: _ClassVar[int]
    ENVIRONMENT_FIELD_NUMBER: _ClassVar[int]
    rank: int
    environment: _containers.ScalarMap[str, str]
    def __init__(self, rank: _Optional[int] = ..., environment: _Optional[_Mapping[str, str]] = ...) -> None: ...

class Finish(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ConfirmRequest(_message.Message):
    __slots__ = ("header", "stopped", "trainers")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    STOPPED_FIELD_NUMBER: _ClassVar[int]
    TRAINERS_FIELD_NUMBER: _ClassVar[int]
    header: _common_pb2.Header
    stopped: bool
    trainers: _containers.RepeatedCompositeFieldContainer[LaunchedTrainer]
    def __init__(self, header: _Optional[_Union[_common_pb2.Header, _Mapping]] = ..., stopped: _Optional[bool] = ..., trainers: _Optional[_Iterable[_Union[LaunchedTrainer, _Mapping]]] = ...) -> None: ...

class LaunchedTrainer(_message.Message):
    __slots__ = ("rank", "pid", "exited", "status")
    RANK_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    EXITED_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    rank: int
    pid: int
    exited: bool
    status: int
    def __init__(self, rank: _Optional[int] = ..., pid: _Optional[int] = ..., exited: _Optional[bool] = ..., status: _Optional[int] = ...) -> None: ...

class ConfirmReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DaemonStatusRequest(_message.Message):
    __slots__ = ("header",)
    HEADER_FIELD_NUMBER: _ClassVar[int]
    header: _common_pb2.Header
    def __init__(self, header: _Optional[_Union[_common_pb2.Header, _Mapping]] = ...) -> None: ...

class DaemonStatusReply(_message.Message):
    __slots__ = ("protocol", "node", "pid", "embedded", "coordinator_connected", "jobs", "memory", "memory_limit_bytes", "memory_dir", "survives", "kernel", "cells_refused", "cells_damaged", "cells_healed", "scrubbed_bytes", "incarnation")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    EMBEDDED_FIELD_NUMBER: _ClassVar[int]
    COORDINATOR_CONNECTED_FIELD_NUMBER: _ClassVar[int]
    JOBS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    MEMORY_LIMIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_DIR_FIELD_NUMBER: _ClassVar[int]
    SURVIVES_FIELD_NUMBER: _ClassVar[int]
    KERNEL_FIELD_NUMBER: _ClassVar[int]
    CELLS_REFUSED_FIELD_NUMBER: _ClassVar[int]
    CELLS_DAMAGED_FIELD_NUMBER: _ClassVar[int]
    CELLS_HEALED_FIELD_NUMBER: _ClassVar[int]
    SCRUBBED_BYTES_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    node: str
    pid: int
    embedded: bool
    coordinator_connected: bool
    jobs: _containers.RepeatedCompositeFieldContainer[_coordinator_pb2.JobReport]
    memory: _containers.RepeatedCompositeFieldContainer[JobMemory]
    memory_limit_bytes: int
    memory_dir: str
    survives: str
    kernel: str
    cells_refused: int
    cells_damaged: int
    cells_healed: int
    scrubbed_bytes: int
    incarnation: int
    def __init__(self, protocol: _Optional[int] = ..., node: _Optional[str] = ..., pid: _Optional[int] = ..., embedded: _Optional[bool] = ..., coordinator_connected: _Optional[bool] = ..., jobs: _Optional[_Iterable[_Union[_coordinator_pb2.JobReport, _Mapping]]] = ..., memory: _Optional[_Iterable[_Union[JobMemory, _Mapping]]] = ..., memory_limit_bytes: _Optional[int] = ..., memory_dir: _Optional[str] = ..., survives: _Optional[str] = ..., kernel: _Optional[str] = ..., cells_refused: _Optional[int] = ..., cells_damaged: _Optional[int] = ..., cells_healed: _Optional[int] = ..., scrubbed_bytes: _Optional[int] = ..., incarnation: _Optional[int] = ...) -> None: ...

class JobMemory(_message.Message):
    __slots__ = ("job", "owner_uid", "arena_bytes", "parity_bytes", "images_held")
    JOB_FIELD_NUMBER: _ClassVar[int]
    OWNER_UID_FIELD_NUMBER: _ClassVar[int]
    ARENA_BYTES_FIELD_NUMBER: _ClassVar[int]
    PARITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    IMAGES_HELD_FIELD_NUMBER: _ClassVar[int]
    job: str
    owner_uid: int
    arena_bytes: int
    parity_bytes: int
    images_held: int
    def __init__(self, job: _Optional[str] = ..., owner_uid: _Optional[int] = ..., arena_bytes: _Optional[int] = ..., parity_bytes: _Optional[int] = ..., images_held: _Optional[int] = ...) -> None: ...

class ForgetRequest(_message.Message):
    __slots__ = ("header",)
    HEADER_FIELD_NUMBER: _ClassVar[int]
    header: _common_pb2.Header
    def __init__(self, header: _Optional[_Union[_common_pb2.Header, _Mapping]] = ...) -> None: ...

class ForgetReply(_message.Message):
    __slots__ = ("freed_bytes",)
    FREED_BYTES_FIELD_NUMBER: _ClassVar[int]
    freed_bytes: int
    def __init__(self, freed_bytes: _Optional[int] = ...) -> None: ...

class FactsRequest(_message.Message):
    __slots__ = ("header", "node", "report")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    header: _common_pb2.Header
    node: str
    report: _coordinator_pb2.JobReport
    def __init__(self, header: _Optional[_Union[_common_pb2.Header, _Mapping]] = ..., node: _Optional[str] = ..., report: _Optional[_Union[_coordinator_pb2.JobReport, _Mapping]] = ...) -> None: ...

class FactsReply(_message.Message):
    __slots__ = ("schedule",)
    SCHEDULE_FIELD_NUMBER: _ClassVar[int]
    schedule: _common_pb2.Schedule
    def __init__(self, schedule: _Optional[_Union[_common_pb2.Schedule, _Mapping]] = ...) -> None: ...
