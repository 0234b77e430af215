from ckptd.v1 import bulk_pb2 as _bulk_pb2
from ckptd.v1 import common_pb2 as _common_pb2
from ckptd.v1 import coordinator_pb2 as _coordinator_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class JobRecord(_message.Message):
    __slots__ = ("job", "owner_uid", "spec", "roster", "stop_through", "started_generation", "confirmed_stopped", "trainers")
    JOB_FIELD_NUMBER: _ClassVar[int]
    OWNER_UID_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    ROSTER_FIELD_NUMBER: _ClassVar[int]
    STOP_THROUGH_FIELD_NUMBER: _ClassVar[int]
    STARTED_GENERATION_FIELD_NUMBER: _ClassVar[int]
    CONFIRMED_STOPPED_FIELD_NUMBER: _ClassVar[int]
    TRAINERS_FIELD_NUMBER: _ClassVar[int]
    job: str
    owner_uid: int
    spec: _coordinator_pb2.JobSpec
    roster: _common_pb2.Roster
    stop_through: int
    started_generation: int
    confirmed_stopped: int
    trainers: _containers.RepeatedCompositeFieldContainer[_coordinator_pb2.Trainer]
    def __init__(self, job: _Optional[str] = ..., owner_uid: _Optional[int] = ..., spec: _Optional[_Union[_coordinator_pb2.JobSpec, _Mapping]] = ..., roster: _Optional[_Union[_common_pb2.Roster, _Mapping]] = ..., stop_through: _Optional[int] = ..., started_generation: _Optional[int] = ..., confirmed_stopped: _Optional[int] = ..., trainers: _Optional[_Iterable[_Union[_coordinator_pb2.Trainer, _Mapping]]] = ...) -> None: ...

class HoldingRecord(_message.Message):
    __slots__ = ("job", "generation", "step", "group", "position", "parity", "images", "seals", "folded", "parity_slot", "chunk_bytes", "parity_digests")
    JOB_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    PARITY_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    SEALS_FIELD_NUMBER: _ClassVar[int]
    FOLDED_FIELD_NUMBER: _ClassVar[int]
    PARITY_SLOT_FIELD_NUMBER: _ClassVar[int]
    CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    PARITY_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    job: str
    generation: int
    step: int
    group: _containers.RepeatedScalarFieldContainer[str]
    position: str
    parity: int
    images: _containers.RepeatedCompositeFieldContainer[ImagePlace]
    seals: _containers.RepeatedCompositeFieldContainer[_bulk_pb2.SealRecord]
    folded: bool
    parity_slot: int
    chunk_bytes: int
    parity_digests: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, job: _Optional[str] = ..., generation: _Optional[int] = ..., step: _Optional[int] = ..., group: _Optional[_Iterable[str]] = ..., position: _Optional[str] = ..., parity: _Optional[int] = ..., images: _Optional[_Iterable[_Union[ImagePlace, _Mapping]]] = ..., seals: _Optional[_Iterable[_Union[_bulk_pb2.SealRecord, _Mapping]]] = ..., folded: _Optional[bool] = ..., parity_slot: _Optional[int] = ..., chunk_bytes: _Optional[int] = ..., parity_digests: _Optional[_Iterable[bytes]] = ...) -> None: ...

class ImagePlace(_message.Message):
    __slots__ = ("rank", "plan_hash", "slot", "image_bytes")
    RANK_FIELD_NUMBER: _ClassVar[int]
    PLAN_HASH_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    IMAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    rank: int
    plan_hash: bytes
    slot: int
    image_bytes: int
    def __init__(self, rank: _Optional[int] = ..., plan_hash: _Optional[bytes] = ..., slot: _Optional[int] = ..., image_bytes: _Optional[int] = ...) -> None: ...
