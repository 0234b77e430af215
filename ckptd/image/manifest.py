"""The manifest: what a checkpoint holds and where, as JSON.  No manifest, no checkpoint.

One object, ASCII, without white space, in the order below; `docs/format.md` has the table.

    {"ckptd.manifest":1,"job":..,"generation":..,"step":..,"parent":[GENERATION,STEP] or null,
     "form":"distributed", "consolidated" or "files","world_size":..,
     "mesh":[[AXIS,SIZE],...],"layout":{"name":..,"text":..,"parameters":{..}} or null,
     "objects":[[NAME,BYTES,ROOT,RANK],...],      (a compressed one: [.., ENCODING,PACKED_BYTES,FRAMES_ROOT])
     "classes":[{"arrays":[..],"boxes":n,"dims":d,"covers":c,"offsets":[COLUMN x d],"sizes":..,"strides":..,
                 "place":COLUMN,"array":COLUMN,"start":COLUMN,"cover":COLUMN},...],
     "tensors":[{"name":..,"dtype":..,"shape":[..],"tiles":CLASS,"differs":true},...],
     "fingerprints":{NAME:HEX,...} or null,"digest":HEX}

A tensor without "tiles" lies as the layout says.  Tensors with the same tiles share a class; an array's name
in it is `*SUFFIX` (the tensor's own name, and a suffix) or `=NAME`.  COLUMN is that of `ckptd.image.columns`.
The digest is the xxh3_128 of all bytes before `,"digest"`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from xxhash import xxh3_128_hexdigest

from ckptd.errors import CorruptCheckpoint
from ckptd.image.fields import Fields, MalformedField
from ckptd.image.names import check_name, check_tensor_name
from ckptd.image.plan import DTYPE_BITS, MAX_IMAGE_BYTES
from ckptd.image.tile_classes import MAX_DIMS, TileClass, read_classes, write_class
from ckptd.layout.tiles import Tiles

MANIFEST_NAME: Final = "manifest.json"
VERSION: Final = 1
MAX_MANIFEST_BYTES: Final = 64 << 20
MAX_COMMAS: Final = 4_000_000  # so many values, about; counted before the JSON decoder runs
MAX_NESTED: Final = 500_000  # lists and objects, likewise: each costs the decoder ten times a number
MAX_OBJECTS: Final = 250_000
MAX_TENSORS: Final = 250_000
MAX_TEXT: Final = 1 << 20  # characters of a layout
ENCODING: Final = "zstd-planes/1"  # of a compressed file; `ckptd.storage.compression`
_PACKED_KEYS: Final = ("name", "bytes", "root", "rank", "encoding", "packed_bytes", "frames_root")
_NUMBER: Final = 1 << 52
_TAIL: Final = b',"digest":"%b"}\n'
_TAIL_BYTES: Final = len(_TAIL) - 2 + 32


@dataclass(frozen=True, slots=True)
class Packed:
    """How a compressed file lies in its store (`ckptd.storage.compression`)."""

    nbytes: int  # of all frames: the length of the file
    root: bytes  # xxh3_128 of the table of frames, 16 bytes


@dataclass(frozen=True, slots=True)
class StoredObject:
    """A file of the checkpoint, in the manifest's own directory."""

    name: str
    nbytes: int  # uncompressed
    root: bytes  # xxh3_128 of its digests, 16 bytes
    rank: int  # whose image it is; the number of the part in the consolidated form
    packed: Packed | None = None  # None: it lies as it is

    @property
    def file_bytes(self) -> int:
        """Length of the file in the store."""
        return self.nbytes if self.packed is None else self.packed.nbytes


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A logical tensor."""

    name: str
    dtype: str  # safetensors' code
    shape: tuple[int, ...]
    tiles: int | None = None  # index of its class; None: by the layout
    differs: bool = False  # its covers are not equal: each rank kept its own


@dataclass(frozen=True, slots=True)
class StoredLayout:
    """The layout in which the state was stored, as it was written."""

    name: str
    text: str
    parameters: Mapping[str, int]


@dataclass(frozen=True)
class Manifest:
    """Everything there is to know of a checkpoint without opening its files.

    Invariant: names may be used in paths; every tile lies inside its tensor's shape and points to an object
    that exists; the tiles of one cover fill the tensor exactly.
    """

    job: str
    generation: int
    step: int
    form: str  # "distributed", "consolidated", or "files": another tool's, kept as they are, without tensors
    world_size: int
    objects: tuple[StoredObject, ...]
    tensors: tuple[StoredTensor, ...]
    classes: tuple[TileClass, ...] = ()
    parent: tuple[int, int] | None = None  # generation, step
    mesh: tuple[tuple[str, int], ...] = ()  # axes and sizes, the fastest first
    layout: StoredLayout | None = None
    fingerprints: Mapping[str, int] | None = None
    by_name: Mapping[str, StoredTensor] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_name", {tensor.name: tensor for tensor in self.tensors})

    def tiles(self, name: str) -> Tiles | None:
        """Returns where a tensor lies: places are indices of `objects`.  None: as the layout says.

        Raises:
            KeyError: no such tensor.
        """
        tensor = self.by_name[name]
        return None if tensor.tiles is None else self.classes[tensor.tiles].of(name, tensor.shape)

    def write(self) -> bytes:
        """Returns the manifest's bytes.

        Raises:
            ValueError: they are longer than a reader accepts.
        """
        layout = self.layout and {
            "name": self.layout.name,
            "text": self.layout.text,
            "parameters": dict(self.layout.parameters),
        }
        prints = self.fingerprints
        whole = {
            "ckptd.manifest": VERSION,
            "job": self.job,
            "generation": self.generation,
            "step": self.step,
            "parent": self.parent,
            "form": self.form,
            "world_size": self.world_size,
            "mesh": self.mesh,
            "layout": layout,
            "objects": [_object_json(o) for o in self.objects],
            "classes": [write_class(c) for c in self.classes],
            "tensors": [_tensor_json(t) for t in self.tensors],
            "fingerprints": None if prints is None else {name: f"{n:016x}" for name, n in prints.items()},
        }
        text = json.dumps(whole, separators=(",", ":"), allow_nan=False).encode("ascii")[:-1]
        if (
            len(text) + _TAIL_BYTES > MAX_MANIFEST_BYTES
            or text.count(b",") > MAX_COMMAS
            or text.count(b"[") + text.count(b"{") > MAX_NESTED
        ):
            raise ValueError(f"the manifest takes {len(text):,} bytes, more than is read")
        return text + _TAIL % xxh3_128_hexdigest(text).encode("ascii")

    @classmethod
    def read(cls, data: bytes) -> Manifest:
        """Returns the manifest that `write` wrote, after checking all of it.

        Raises:
            CorruptCheckpoint: these are not such bytes, or of another version, or beyond a limit.
        """
        try:
            return _manifest(Fields(_decode(data), "the manifest"))
        except MalformedField as error:
            raise CorruptCheckpoint(
                "this manifest cannot be used", str(error), "use another checkpoint of this job"
            ) from error


def _object_json(stored: StoredObject) -> list[Any]:
    plain = [stored.name, stored.nbytes, stored.root.hex(), stored.rank]
    packed = stored.packed
    return plain if packed is None else [*plain, ENCODING, packed.nbytes, packed.root.hex()]


def _tensor_json(tensor: StoredTensor) -> dict[str, Any]:
    found: dict[str, Any] = {"name": tensor.name, "dtype": tensor.dtype, "shape": tensor.shape}
    if tensor.tiles is not None:
        found["tiles"] = tensor.tiles
    if tensor.differs:
        found["differs"] = True
    return found


def _decode(data: bytes) -> dict[str, Any]:
    """Returns the JSON object, after the checks that need no decoder: length, digest, number of values."""
    if len(data) > MAX_MANIFEST_BYTES:
        raise MalformedField(f"it has {len(data)} bytes, at most {MAX_MANIFEST_BYTES} are read")
    text, tail = data[:-_TAIL_BYTES], data[-_TAIL_BYTES:]
    if text.count(b",") > MAX_COMMAS:
        raise MalformedField(f"it holds more than {MAX_COMMAS} values")
    if text.count(b"[") + text.count(b"{") > MAX_NESTED:
        raise MalformedField(f"it holds more than {MAX_NESTED} lists and objects")
    try:
        whole = json.loads(
            data.decode("ascii"), object_pairs_hook=_pairs, parse_constant=_no_number, parse_float=_no_number
        )
    except (ValueError, RecursionError) as error:
        raise MalformedField(f"its JSON cannot be read: {error}") from error
    if type(whole) is not dict or "ckptd.manifest" not in whole:
        raise MalformedField('it is no manifest of ckptd\'s: expected {"ckptd.manifest":1,...}')
    version = whole.pop("ckptd.manifest")
    if type(version) is not int or version != VERSION:
        raise MalformedField(
            f"it is of version {ascii(version)[:40]}, this ckptd reads version {VERSION}; a newer ckptd may"
        )
    if tail != _TAIL % xxh3_128_hexdigest(text).encode("ascii"):
        raise MalformedField("its bytes do not match the digest at its end")
    del whole["digest"]
    return whole


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise MalformedField(f"the key {ascii(twice)[:80]} is given twice")
    return found


def _no_number(text: str) -> Any:
    raise MalformedField(f"found {text[:40]}, only whole numbers are used")


def _manifest(given: Fields) -> Manifest:
    job = given.name("job", check_name)
    generation, step = given.number("generation", _NUMBER), given.number("step", _NUMBER)
    parent = given.optional("parent", lambda f, key: f.pair_of_numbers(key, _NUMBER))
    form = given.one_of("form", ("distributed", "consolidated", "files"))
    world_size = given.number("world_size", MAX_OBJECTS, least=1)
    mesh = tuple(_axis(item) for item in given.items("mesh", MAX_DIMS))
    layout = given.optional("layout", lambda f, key: _layout(f.inner(key)))
    objects = _objects(given, world_size if form == "distributed" else MAX_OBJECTS)
    classes = read_classes(given.items("classes", MAX_TENSORS), len(objects))
    tensors = _tensors(given, classes, layout is not None)
    fingerprints = given.optional("fingerprints", lambda f, key: f.hex_numbers(key, MAX_TENSORS))
    given.done()
    if form == "files" and (tensors or classes or layout):
        raise MalformedField("it describes tensors, and its form is files")
    if fingerprints is not None and not fingerprints.keys() <= {tensor.name for tensor in tensors}:
        raise MalformedField("it has a fingerprint of a tensor that it does not have")
    return Manifest(
        job, generation, step, form, world_size, objects, tensors, classes, parent, mesh, layout, fingerprints
    )


def _axis(item: object) -> tuple[str, int]:
    axis = Fields.of_list(item, "an axis of the mesh", ("axis", "size"))
    return axis.text("axis", 64), axis.number("size", MAX_OBJECTS, least=1)


def _layout(given: Fields) -> StoredLayout:
    name, text = given.text("name", 128), given.text("text", MAX_TEXT)
    parameters = given.inner("parameters").all_numbers(_NUMBER)
    given.done()
    return StoredLayout(name, text, parameters)


def _objects(given: Fields, ranks: int) -> tuple[StoredObject, ...]:
    objects = []
    for item in given.items("objects", MAX_OBJECTS):
        compressed = isinstance(item, list) and len(item) == len(_PACKED_KEYS)
        one = Fields.of_list(item, "an object", _PACKED_KEYS if compressed else _PACKED_KEYS[:4])
        objects.append(
            StoredObject(
                one.name("name", check_name),
                one.number("bytes", MAX_IMAGE_BYTES),
                one.hex_bytes("root", 16),
                one.number("rank", ranks - 1),
                _packed(one) if compressed else None,
            )
        )
    for what in ("name", "rank"):
        if len({getattr(o, what) for o in objects}) != len(objects):
            raise MalformedField(f"two of its objects have the same {what}")
    if any(o.name == MANIFEST_NAME or o.name.endswith((".digests", ".frames")) for o in objects):
        raise MalformedField("one of its objects has a name that is reserved")
    return tuple(objects)


def _packed(one: Fields) -> Packed:
    one.one_of("encoding", (ENCODING,))
    return Packed(one.number("packed_bytes", MAX_IMAGE_BYTES), one.hex_bytes("frames_root", 16))


def _tensors(given: Fields, classes: tuple[TileClass, ...], by_layout: bool) -> tuple[StoredTensor, ...]:
    tensors: list[StoredTensor] = []
    names: set[str] = set()
    fitted: set[tuple[int, tuple[int, ...]]] = set()
    for item in given.items("tensors", MAX_TENSORS):
        one = Fields(item, "a tensor")
        name = one.name("name", lambda _, text: check_tensor_name(text))
        one.what = f"the tensor {name!a}"
        dtype = one.text("dtype", 16)
        if DTYPE_BITS.get(dtype, 1) % 8:
            raise MalformedField(f"{one.what} has the dtype {dtype!a}, which ckptd does not know")
        shape = one.shape("shape", MAX_DIMS, MAX_IMAGE_BYTES)
        tiles = one.number("tiles", len(classes) - 1) if one.has("tiles") else None
        differs = one.has("differs") and one.one_of("differs", (True,))
        one.done()
        if tiles is None and not by_layout:
            raise MalformedField(f"{one.what} has no tiles, and there is no layout")
        if tiles is not None and (tiles, shape) not in fitted:
            classes[tiles].check(one.what, shape)
            fitted.add((tiles, shape))
        if name in names:
            raise MalformedField(f"{one.what} is given twice")
        names.add(name)
        tensors.append(StoredTensor(name, dtype, shape, tiles, bool(differs)))
    return tuple(tensors)
