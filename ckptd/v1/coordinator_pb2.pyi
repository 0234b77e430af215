from ckptd.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class JobSpec(_message.Message):
    __slots__ = ("job", "nodes", "ranks_per_node", "parity", "every", "slots")
    JOB_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    RANKS_PER_NODE_FIELD_NUMBER: _ClassVar[int]
    PARITY_FIELD_NUMBER: _ClassVar[int]
    EVERY_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    job: str
    nodes: int
    ranks_per_node: int
    parity: int
    every: int
    slots: int
    def __init__(self, job: _Optional[str] = ..., nodes: _Optional[int] = ..., ranks_per_node: _Optional[int] = ..., parity: _Optional[int] = ..., every: _Optional[int] = ..., slots: _Optional[int] = ...) -> None: ...

class SubmitRequest(_message.Message):
    __slots__ = ("header", "spec")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    header: _common_pb2.Header
    spec: JobSpec
    def __init__(self, header: _Optional[_Union[_common_pb2.Header, _Mapping]] = ..., spec: _Optional[_Union[JobSpec, _Mapping]] = ...) -> None: ...

class SubmitReply(_message.Message):
    __slots__ = ("created",)
    CREATED_FIELD_NUMBER: _ClassVar[int]
    created: bool
    def __init__(self, created: _Optional[bool] = ...) -> None: ...

class NodeReport(_message.Message):
    __slots__ = ("header", "protocol", "node", "incarnation", "sequence", "domain", "control_address", "bulk_address", "rendezvous_host", "rendezvous_port", "jobs")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    DOMAIN_FIELD_NUMBER: _ClassVar[int]
    CONTROL_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    BULK_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    RENDEZVOUS_HOST_FIELD_NUMBER: _ClassVar[int]
    RENDEZVOUS_PORT_FIELD_NUMBER: _ClassVar[int]
    JOBS_FIELD_NUMBER: _ClassVar[int]
    header: _common_pb2.Header
    protocol: int
    node: str
    incarnation: int
    sequence: int
    domain: str
    control_address: str
    bulk_address: str
    rendezvous_host: str
    rendezvous_port: int
    jobs: _containers.RepeatedCompositeFieldContainer[JobReport]
    def __init__(self, header: _Optional[_Union[_common_pb2.Header, _Mapping]] = ..., protocol: _Optional[int] = ..., node: _Optional[str] = ..., incarnation: _Optional[int] = ..., sequence: _Optional[int] = ..., domain: _Optional[str] = ..., control_address: _Optional[str] = ..., bulk_address: _Optional[str] = ..., rendezvous_host: _Optional[str] = ..., rendezvous_port: _Optional[int] = ..., jobs: _Optional[_Iterable[_Union[JobReport, _Mapping]]] = ...) -> None: ...

class JobReport(_message.Message):
    __slots__ = ("job", "generation", "roster", "stopped_through", "running_generation", "trainers", "holdings", "transfer", "watermark", "has_watermark", "held", "spec", "unreachable_peers", "finished", "aborted", "flush_every", "flush_over", "leaving")
    JOB_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    ROSTER_FIELD_NUMBER: _ClassVar[int]
    STOPPED_THROUGH_FIELD_NUMBER: _ClassVar[int]
    RUNNING_GENERATION_FIELD_NUMBER: _ClassVar[int]
    TRAINERS_FIELD_NUMBER: _ClassVar[int]
    HOLDINGS_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_FIELD_NUMBER: _ClassVar[int]
    WATERMARK_FIELD_NUMBER: _ClassVar[int]
    HAS_WATERMARK_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    UNREACHABLE_PEERS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    ABORTED_FIELD_NUMBER: _ClassVar[int]
    FLUSH_EVERY_FIELD_NUMBER: _ClassVar[int]
    FLUSH_OVER_FIELD_NUMBER: _ClassVar[int]
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    job: str
    generation: int
    roster: _common_pb2.Roster
    stopped_through: int
    running_generation: int
    trainers: _containers.RepeatedCompositeFieldContainer[Trainer]
    holdings: _containers.RepeatedCompositeFieldContainer[Holding]
    transfer: Transfer
    watermark: int
    has_watermark: bool
    held: bool
    spec: JobSpec
    unreachable_peers: _containers.RepeatedScalarFieldContainer[str]
    finished: bool
    aborted: _containers.RepeatedScalarFieldContainer[int]
    flush_every: int
    flush_over: int
    leaving: bool
    def __init__(self, job: _Optional[str] = ..., generation: _Optional[int] = ..., roster: _Optional[_Union[_common_pb2.Roster, _Mapping]] = ..., stopped_through: _Optional[int] = ..., running_generation: _Optional[int] = ..., trainers: _Optional[_Iterable[_Union[Trainer, _Mapping]]] = ..., holdings: _Optional[_Iterable[_Union[Holding, _Mapping]]] = ..., transfer: _Optional[_Union[Transfer, _Mapping]] = ..., watermark: _Optional[int] = ..., has_watermark: _Optional[bool] = ..., held: _Optional[bool] = ..., spec: _Optional[_Union[JobSpec, _Mapping]] = ..., unreachable_peers: _Optional[_Iterable[str]] = ..., finished: _Optional[bool] = ..., aborted: _Optional[_Iterable[int]] = ..., flush_every: _Optional[int] = ..., flush_over: _Optional[int] = ..., leaving: _Optional[bool] = ...) -> None: ...

class Trainer(_message.Message):
    __slots__ = ("rank", "generation", "pid", "state", "step", "ready", "exit")
    class State(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STATE_UNSPECIFIED: _ClassVar[Trainer.State]
        ALIVE: _ClassVar[Trainer.State]
        DIED: _ClassVar[Trainer.State]
        FINISHED: _ClassVar[Trainer.State]
    STATE_UNSPECIFIED: Trainer.State
    ALIVE: Trainer.State
    DIED: Trainer.State
    FINISHED: Trainer.State
    RANK_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    EXIT_FIELD_NUMBER: _ClassVar[int]
    rank: int
    generation: int
    pid: int
    state: Trainer.State
    step: int
    ready: bool
    exit: str
    def __init__(self, rank: _Optional[int] = ..., generation: _Optional[int] = ..., pid: _Optional[int] = ..., state: _Optional[_Union[Trainer.State, str]] = ..., step: _Optional[int] = ..., ready: _Optional[bool] = ..., exit: _Optional[str] = ...) -> None: ...

class Holding(_message.Message):
    __slots__ = ("generation", "step", "group", "sealed_ranks", "sealed", "folded", "node_bytes", "parity", "ranks", "position")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    SEALED_RANKS_FIELD_NUMBER: _ClassVar[int]
    SEALED_FIELD_NUMBER: _ClassVar[int]
    FOLDED_FIELD_NUMBER: _ClassVar[int]
    NODE_BYTES_FIELD_NUMBER: _ClassVar[int]
    PARITY_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    generation: int
    step: int
    group: _containers.RepeatedScalarFieldContainer[str]
    sealed_ranks: _containers.RepeatedScalarFieldContainer[int]
    sealed: bool
    folded: bool
    node_bytes: int
    parity: int
    ranks: _containers.RepeatedScalarFieldContainer[int]
    position: str
    def __init__(self, generation: _Optional[int] = ..., step: _Optional[int] = ..., group: _Optional[_Iterable[str]] = ..., sealed_ranks: _Optional[_Iterable[int]] = ..., sealed: _Optional[bool] = ..., folded: _Optional[bool] = ..., node_bytes: _Optional[int] = ..., parity: _Optional[int] = ..., ranks: _Optional[_Iterable[int]] = ..., position: _Optional[str] = ...) -> None: ...

class Transfer(_message.Message):
    __slots__ = ("generation", "state", "reason", "bytes", "rung", "seconds")
    class State(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STATE_UNSPECIFIED: _ClassVar[Transfer.State]
        RUNNING: _ClassVar[Transfer.State]
        VERIFIED: _ClassVar[Transfer.State]
        FAILED: _ClassVar[Transfer.State]
    STATE_UNSPECIFIED: Transfer.State
    RUNNING: Transfer.State
    VERIFIED: Transfer.State
    FAILED: Transfer.State
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    RUNG_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    generation: int
    state: Transfer.State
    reason: str
    bytes: int
    rung: str
    seconds: float
    def __init__(self, generation: _Optional[int] = ..., state: _Optional[_Union[Transfer.State, str]] = ..., reason: _Optional[str] = ..., bytes: _Optional[int] = ..., rung: _Optional[str] = ..., seconds: _Optional[float] = ...) -> None: ...

class Directive(_message.Message):
    __slots__ = ("sequence", "jobs")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    JOBS_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    jobs: _containers.RepeatedCompositeFieldContainer[JobDirective]
    def __init__(self, sequence: _Optional[int] = ..., jobs: _Optional[_Iterable[_Union[JobDirective, _Mapping]]] = ...) -> None: ...

class JobDirective(_message.Message):
    __slots__ = ("job", "spec", "roster", "stop_through", "transfer", "start", "schedule", "finished", "waiting_for")
    JOB_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    ROSTER_FIELD_NUMBER: _ClassVar[int]
    STOP_THROUGH_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    SCHEDULE_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    WAITING_FOR_FIELD_NUMBER: _ClassVar[int]
    job: str
    spec: JobSpec
    roster: _common_pb2.Roster
    stop_through: int
    transfer: TransferOrder
    start: StartOrder
    schedule: _common_pb2.Schedule
    finished: bool
    waiting_for: str
    def __init__(self, job: _Optional[str] = ..., spec: _Optional[_Union[JobSpec, _Mapping]] = ..., roster: _Optional[_Union[_common_pb2.Roster, _Mapping]] = ..., stop_through: _Optional[int] = ..., transfer: _Optional[_Union[TransferOrder, _Mapping]] = ..., start: _Optional[_Union[StartOrder, _Mapping]] = ..., schedule: _Optional[_Union[_common_pb2.Schedule, _Mapping]] = ..., finished: _Optional[bool] = ..., waiting_for: _Optional[str] = ...) -> None: ...

class TransferOrder(_message.Message):
    __slots__ = ("generation", "positions", "sources", "group", "parity")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    PARITY_FIELD_NUMBER: _ClassVar[int]
    generation: int
    positions: _containers.RepeatedScalarFieldContainer[str]
    sources: _containers.RepeatedCompositeFieldContainer[Source]
    group: _containers.RepeatedScalarFieldContainer[str]
    parity: int
    def __init__(self, generation: _Optional[int] = ..., positions: _Optional[_Iterable[str]] = ..., sources: _Optional[_Iterable[_Union[Source, _Mapping]]] = ..., group: _Optional[_Iterable[str]] = ..., parity: _Optional[int] = ...) -> None: ...

class Source(_message.Message):
    __slots__ = ("node", "bulk_address", "position")
    NODE_FIELD_NUMBER: _ClassVar[int]
    BULK_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    node: str
    bulk_address: str
    position: str
    def __init__(self, node: _Optional[str] = ..., bulk_address: _Optional[str] = ..., position: _Optional[str] = ...) -> None: ...

class StartOrder(_message.Message):
    __slots__ = ("generation", "master_address", "master_port")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    MASTER_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    MASTER_PORT_FIELD_NUMBER: _ClassVar[int]
    generation: int
    master_address: str
    master_port: int
    def __init__(self, generation: _Optional[int] = ..., master_address: _Optional[str] = ..., master_port: _Optional[int] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ("header",)
    HEADER_FIELD_NUMBER: _ClassVar[int]
    header: _common_pb2.Header
    def __init__(self, header: _Optional[_Union[_common_pb2.Header, _Mapping]] = ...) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("jobs", "nodes")
    JOBS_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    jobs: _containers.RepeatedCompositeFieldContainer[JobStatus]
    nodes: _containers.RepeatedCompositeFieldContainer[NodeStatus]
    def __init__(self, jobs: _Optional[_Iterable[_Union[JobStatus, _Mapping]]] = ..., nodes: _Optional[_Iterable[_Union[NodeStatus, _Mapping]]] = ...) -> None: ...

class JobStatus(_message.Message):
    __slots__ = ("spec", "phase", "roster", "schedule", "steps", "waiting_for")
    SPEC_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    ROSTER_FIELD_NUMBER: _ClassVar[int]
    SCHEDULE_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    WAITING_FOR_FIELD_NUMBER: _ClassVar[int]
    spec: JobSpec
    phase: str
    roster: _common_pb2.Roster
    schedule: _common_pb2.Schedule
    steps: _containers.RepeatedScalarFieldContainer[int]
    waiting_for: str
    def __init__(self, spec: _Optional[_Union[JobSpec, _Mapping]] = ..., phase: _Optional[str] = ..., roster: _Optional[_Union[_common_pb2.Roster, _Mapping]] = ..., schedule: _Optional[_Union[_common_pb2.Schedule, _Mapping]] = ..., steps: _Optional[_Iterable[int]] = ..., waiting_for: _Optional[str] = ...) -> None: ...

class NodeStatus(_message.Message):
    __slots__ = ("node", "state", "domain", "silent_s", "control_address")
    NODE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    DOMAIN_FIELD_NUMBER: _ClassVar[int]
    SILENT_S_FIELD_NUMBER: _ClassVar[int]
    CONTROL_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    node: str
    state: str
    domain: str
    silent_s: float
    control_address: str
    def __init__(self, node: _Optional[str] = ..., state: _Optional[str] = ..., domain: _Optional[str] = ..., silent_s: _Optional[float] = ..., control_address: _Optional[str] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("header", "after")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    header: _common_pb2.Header
    after: int
    def __init__(self, header: _Optional[_Union[_common_pb2.Header, _Mapping]] = ..., after: _Optional[int] = ...) -> None: ...

class TimelineEvent(_message.Message):
    __slots__ = ("sequence", "monotonic_s", "job", "generation", "name", "text", "step", "nodes", "rung")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    MONOTONIC_S_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    RUNG_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    monotonic_s: float
    job: str
    generation: int
    name: str
    text: str
    step: int
    nodes: _containers.RepeatedScalarFieldContainer[str]
    rung: str
    def __init__(self, sequence: _Optional[int] = ..., monotonic_s: _Optional[float] = ..., job: _Optional[str] = ..., generation: _Optional[int] = ..., name: _Optional[str] = ..., text: _Optional[str] = ..., step: _Optional[int] = ..., nodes: _Optional[_Iterable[str]] = ..., rung: _Optional[str] = ...) -> None: ...
