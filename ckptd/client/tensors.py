"""What a tensor is to an image: its dtype code, its local bytes, its place in storage.

A DTensor is its local shard plus a `Form` that says which part of what it is.
"""

from __future__ import annotations

import sys
from typing import Any, Final, NamedTuple

import torch

from ckptd.errors import StateMismatch, UnsafeObject
from ckptd.image import TensorSpec

DTYPE_CODES: Final[dict[torch.dtype, str]] = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.int64: "I64",
    torch.uint64: "U64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
}
DTYPES: Final[dict[str, torch.dtype]] = {code: dtype for dtype, code in DTYPE_CODES.items()}

StorageKey = tuple[object, ...]


class Form(NamedTuple):
    """Which part of a distributed tensor a rank holds; plain values, comparable and encodable."""

    shape: tuple[int, ...]  # global
    stride: tuple[int, ...]  # global
    placements: tuple[tuple[Any, ...], ...]  # ("shard", dim), ("replicate",), ("strided", dim, split_factor)
    mesh_shape: tuple[int, ...]
    mesh_dims: tuple[str, ...]
    coordinate: tuple[int, ...]


def is_tensor(value: object) -> bool:
    """Whether `value` is a tensor; faster than isinstance, whose metaclass is slow for tensors."""
    kind = type(value)
    return kind is torch.Tensor or kind is torch.nn.Parameter or issubclass(kind, torch.Tensor)


def is_dtensor(tensor: torch.Tensor) -> bool:
    """Whether `tensor` is a DTensor; imports nothing, since none can exist before its module is imported."""
    if type(tensor) is torch.Tensor or type(tensor) is torch.nn.Parameter:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the bytes this rank holds: a DTensor's local shard, otherwise the tensor itself."""
    return tensor._local_tensor if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def plain(path: str, tensor: torch.Tensor, *, meta: bool = False) -> torch.Tensor:
    """Returns a detached view of the local bytes of `tensor`, which follows its changes in place.

    Args:
        meta: whether a tensor without bytes is fine, since only its size is asked for.

    Raises:
        UnsafeObject: these bytes have no safe form; the message names `path`.
    """
    local = local_of(tensor)
    kind = type(local)
    why = ""
    if torch.nn.parameter.is_lazy(local):
        why = "it is not initialized; run one forward pass first"
    elif kind is not torch.Tensor and kind is not torch.nn.Parameter and hasattr(kind, "__tensor_flatten__"):
        why = f"the tensor subclass {kind.__name__} is more than its bytes"
    elif local.layout is not torch.strided:
        why = f"its layout is {local.layout}, only strided tensors have a place in an image"
    elif local.is_quantized or local.dtype not in DTYPE_CODES:
        why = f"safetensors has no code for {local.dtype}"
    elif local.device.type == "meta" and not meta:
        why = "it has no bytes (device meta); materialize the model first"
    if why:
        raise UnsafeObject(f"{path} cannot be kept", why, "leave it out of the attached state, or convert it")
    return local.detach()


def spec_of(name: str, tensor: torch.Tensor) -> TensorSpec:
    """Returns the image's entry for a local tensor."""
    return TensorSpec(name, DTYPE_CODES[tensor.dtype], tuple(tensor.shape))


def storage_key(tensor: torch.Tensor) -> StorageKey | None:
    """Returns what two names of one storage have in common, or None for a tensor without bytes.

    Only views of the same geometry are one; partially overlapping ones are kept each
    by itself, which costs memory and is right: both are restored to the cut's bytes.
    """
    if not tensor.numel():
        return None
    flags = tensor.is_conj(), tensor.is_neg()
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), *flags)


def form_of(path: str, tensor: torch.Tensor) -> Form | None:
    """Returns the form of a DTensor, or None for any other tensor.

    Raises:
        UnsafeObject: it is a partial sum, which is no state.
    """
    if not is_dtensor(tensor):
        return None
    spec = tensor._spec  # type: ignore[attr-defined]
    mesh = spec.mesh
    return Form(
        tuple(tensor.shape),
        tuple(tensor.stride()),
        tuple(_placement(path, placement) for placement in spec.placements),
        tuple(mesh.mesh.shape),
        tuple(mesh.mesh_dim_names or ()),
        tuple(mesh.get_coordinate() or ()),
    )


def with_form(path: str, local: torch.Tensor, form: Form | None, like: torch.Tensor) -> torch.Tensor:
    """Returns `local` as the tensor that `form` describes, on the mesh of `like`.

    Raises:
        StateMismatch: `like` is on no mesh, or on another one.
    """
    if form is None:
        return local
    if not is_dtensor(like):
        raise StateMismatch(f"{path} was distributed", "its parameter is not", "shard the model as it was")
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    def placement(kind: str, dim: int = 0, factor: int = 1) -> Shard | Replicate | _StridedShard:
        if kind == "replicate":
            return Replicate()
        return Shard(dim) if kind == "shard" else _StridedShard(dim, split_factor=factor)

    spec = like._spec  # type: ignore[attr-defined]
    return DTensor.from_local(
        local,
        spec.mesh,
        [placement(*each) for each in form.placements],
        run_check=False,
        shape=torch.Size(form.shape),
        stride=form.stride,
    )


def writable(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a view without repeated elements: an expanded dim is cut to one of its equal slices."""
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def same_bytes(kept: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    """Returns a 0-dim bool tensor on the live tensor's device: whether all bytes are equal.

    Args:
        kept: contiguous, of the same dtype and shape; may be on another device.
    """
    other = kept.to(live.device, non_blocking=True)
    bytes_of = [
        t.reshape(-1).view(torch.uint8) for t in (other, live.contiguous().resolve_conj().resolve_neg())
    ]
    return (bytes_of[0] == bytes_of[1]).all()


def _placement(path: str, placement: Any) -> tuple[Any, ...]:
    # _StridedShard is no subclass of Shard, and its name is private: go by the attributes.
    if placement.is_replicate():
        return ("replicate",)
    if hasattr(placement, "split_factor"):
        return ("strided", placement.dim, placement.split_factor)
    if placement.is_shard():
        return ("shard", placement.dim)
    raise UnsafeObject(f"{path} cannot be kept", f"its placement {placement} is no finished value")
