"""States for the tests of DCP, and how to compare them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def one_process() -> Iterator[None]:
    """DCP warns when it is used without process groups."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def state(seed: int) -> dict[str, Any]:
    """Views, no elements, no dims, all kinds of dtypes; nested; and plain values."""
    print(f"seed {seed}")
    generator = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    tensors = {
        "transposed": some(5, 7).t(),
        "strided": some(9, 12)[1:8:3, ::2],
        "expanded": some(1, 4).expand(3, 4),
        "scalar": some(),
        "empty": torch.empty(0, 3),
        "half": some(33, 5).bfloat16(),
        "conjugate": torch.randn(4, 3, dtype=torch.complex64, generator=generator).conj(),
        "flags": some(17) > 0,
        "tiny": some(6).to(torch.float8_e4m3fn),
        "large": some(300, 401),
    }
    moments = {name: {"exp_avg": some(3, 2), "step": torch.tensor(4.0)} for name in ("a.w", "b.w")}
    return {
        "model": tensors,
        "optim": {"state": moments, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99)}, {"lr": seed / 7}]},
        "scheduler": {"last_epoch": seed, "_last_lr": [0.1, float("inf")], "nested": {"seen": b"\0\1"}},
        "step": seed,
    }


def blank(tree: Any) -> Any:
    """A state of the same form with other values."""
    if isinstance(tree, dict):
        return {key: blank(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [blank(value) for value in tree]
    if isinstance(tree, torch.Tensor):
        return torch.ones(tree.shape, dtype=torch.float32).to(tree.dtype)
    return type(tree)()


def same(a: Any, b: Any) -> bool:
    """Whether values and types are equal, to the bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        raw = [t.resolve_conj().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)
    return bool(a == b)
