from ckptd.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class BulkHeader(_message.Message):
    __slots__ = ("header", "protocol", "sender", "payload_bytes", "seal", "contribution", "fetch", "cells", "refused", "accepted", "offer", "terms", "decode")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    SENDER_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    SEAL_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTION_FIELD_NUMBER: _ClassVar[int]
    FETCH_FIELD_NUMBER: _ClassVar[int]
    CELLS_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    OFFER_FIELD_NUMBER: _ClassVar[int]
    TERMS_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    header: _common_pb2.Header
    protocol: int
    sender: str
    payload_bytes: int
    seal: Seal
    contribution: Contribution
    fetch: Fetch
    cells: Cells
    refused: Refused
    accepted: Accepted
    offer: Offer
    terms: Terms
    decode: Decode
    def __init__(self, header: _Optional[_Union[_common_pb2.Header, _Mapping]] = ..., protocol: _Optional[int] = ..., sender: _Optional[str] = ..., payload_bytes: _Optional[int] = ..., seal: _Optional[_Union[Seal, _Mapping]] = ..., contribution: _Optional[_Union[Contribution, _Mapping]] = ..., fetch: _Optional[_Union[Fetch, _Mapping]] = ..., cells: _Optional[_Union[Cells, _Mapping]] = ..., refused: _Optional[_Union[Refused, _Mapping]] = ..., accepted: _Optional[_Union[Accepted, _Mapping]] = ..., offer: _Optional[_Union[Offer, _Mapping]] = ..., terms: _Optional[_Union[Terms, _Mapping]] = ..., decode: _Optional[_Union[Decode, _Mapping]] = ...) -> None: ...

class Seal(_message.Message):
    __slots__ = ("step",)
    STEP_FIELD_NUMBER: _ClassVar[int]
    step: int
    def __init__(self, step: _Optional[int] = ...) -> None: ...

class SealRecord(_message.Message):
    __slots__ = ("job", "generation", "step", "node", "ranks", "cell_bytes")
    JOB_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    CELL_BYTES_FIELD_NUMBER: _ClassVar[int]
    job: str
    generation: int
    step: int
    node: str
    ranks: _containers.RepeatedCompositeFieldContainer[RankSeal]
    cell_bytes: int
    def __init__(self, job: _Optional[str] = ..., generation: _Optional[int] = ..., step: _Optional[int] = ..., node: _Optional[str] = ..., ranks: _Optional[_Iterable[_Union[RankSeal, _Mapping]]] = ..., cell_bytes: _Optional[int] = ...) -> None: ...

class RankSeal(_message.Message):
    __slots__ = ("rank", "image_bytes", "plan_hash", "cell_digests")
    RANK_FIELD_NUMBER: _ClassVar[int]
    IMAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    PLAN_HASH_FIELD_NUMBER: _ClassVar[int]
    CELL_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    rank: int
    image_bytes: int
    plan_hash: bytes
    cell_digests: bytes
    def __init__(self, rank: _Optional[int] = ..., image_bytes: _Optional[int] = ..., plan_hash: _Optional[bytes] = ..., cell_digests: _Optional[bytes] = ...) -> None: ...

class Offer(_message.Message):
    __slots__ = ("step", "stripe", "chunk", "chunk_bytes")
    STEP_FIELD_NUMBER: _ClassVar[int]
    STRIPE_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    step: int
    stripe: int
    chunk: int
    chunk_bytes: int
    def __init__(self, step: _Optional[int] = ..., stripe: _Optional[int] = ..., chunk: _Optional[int] = ..., chunk_bytes: _Optional[int] = ...) -> None: ...

class Terms(_message.Message):
    __slots__ = ("wanted", "has_base", "base_step", "map_digest", "first")
    WANTED_FIELD_NUMBER: _ClassVar[int]
    HAS_BASE_FIELD_NUMBER: _ClassVar[int]
    BASE_STEP_FIELD_NUMBER: _ClassVar[int]
    MAP_DIGEST_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    wanted: bool
    has_base: bool
    base_step: int
    map_digest: bytes
    first: int
    def __init__(self, wanted: _Optional[bool] = ..., has_base: _Optional[bool] = ..., base_step: _Optional[int] = ..., map_digest: _Optional[bytes] = ..., first: _Optional[int] = ...) -> None: ...

class Contribution(_message.Message):
    __slots__ = ("first", "final", "delta", "digests", "given_up")
    FIRST_FIELD_NUMBER: _ClassVar[int]
    FINAL_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    GIVEN_UP_FIELD_NUMBER: _ClassVar[int]
    first: int
    final: bool
    delta: bool
    digests: bytes
    given_up: bool
    def __init__(self, first: _Optional[int] = ..., final: _Optional[bool] = ..., delta: _Optional[bool] = ..., digests: _Optional[bytes] = ..., given_up: _Optional[bool] = ...) -> None: ...

class Accepted(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Fetch(_message.Message):
    __slots__ = ("snapshot_generation", "step", "position", "parity", "index", "first_cell", "cells", "chunk_bytes", "seal_record")
    SNAPSHOT_GENERATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    PARITY_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    FIRST_CELL_FIELD_NUMBER: _ClassVar[int]
    CELLS_FIELD_NUMBER: _ClassVar[int]
    CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    SEAL_RECORD_FIELD_NUMBER: _ClassVar[int]
    snapshot_generation: int
    step: int
    position: str
    parity: bool
    index: int
    first_cell: int
    cells: int
    chunk_bytes: int
    seal_record: bool
    def __init__(self, snapshot_generation: _Optional[int] = ..., step: _Optional[int] = ..., position: _Optional[str] = ..., parity: _Optional[bool] = ..., index: _Optional[int] = ..., first_cell: _Optional[int] = ..., cells: _Optional[int] = ..., chunk_bytes: _Optional[int] = ..., seal_record: _Optional[bool] = ...) -> None: ...

class Cells(_message.Message):
    __slots__ = ("digests",)
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    digests: bytes
    def __init__(self, digests: _Optional[bytes] = ...) -> None: ...

class Refused(_message.Message):
    __slots__ = ("error",)
    ERROR_FIELD_NUMBER: _ClassVar[int]
    error: _common_pb2.Error
    def __init__(self, error: _Optional[_Union[_common_pb2.Error, _Mapping]] = ...) -> None: ...

class Decode(_message.Message):
    __slots__ = ("snapshot_generation", "step", "lost", "chunk", "first_cell", "cells", "chunk_bytes", "survivors")
    SNAPSHOT_GENERATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    LOST_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    FIRST_CELL_FIELD_NUMBER: _ClassVar[int]
    CELLS_FIELD_NUMBER: _ClassVar[int]
    CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    SURVIVORS_FIELD_NUMBER: _ClassVar[int]
    snapshot_generation: int
    step: int
    lost: str
    chunk: int
    first_cell: int
    cells: int
    chunk_bytes: int
    survivors: _containers.RepeatedCompositeFieldContainer[Survivor]
    def __init__(self, snapshot_generation: _Optional[int] = ..., step: _Optional[int] = ..., lost: _Optional[str] = ..., chunk: _Optional[int] = ..., first_cell: _Optional[int] = ..., cells: _Optional[int] = ..., chunk_bytes: _Optional[int] = ..., survivors: _Optional[_Iterable[_Union[Survivor, _Mapping]]] = ...) -> None: ...

class Survivor(_message.Message):
    __slots__ = ("position", "bulk_address")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    BULK_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    position: str
    bulk_address: str
    def __init__(self, position: _Optional[str] = ..., bulk_address: _Optional[str] = ...) -> None: ...
