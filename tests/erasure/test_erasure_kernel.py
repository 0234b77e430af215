"""Both kernels compute the field's own products, and the choice between them is checked and logged."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from ckptd.erasure import galois, kernel_numpy
from ckptd.erasure import kernel as kernel_module
from ckptd.erasure.buffers import Span
from ckptd.erasure.galois import Bytes
from ckptd.erasure.kernel import SYSTEM_LIBRARY, Kernel, best_kernel, find_fault, library_paths, select
from ckptd.erasure.kernel_isal import IsalKernel
from ckptd.erasure.kernel_numpy import NumpyKernel, NumpyProduct

LENGTHS = [1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 127, 128, 129, 255, 1000, 65537]


def spans(rows: Sequence[Bytes]) -> list[Span]:
    return [Span.of(row) for row in rows]


@pytest.mark.parametrize("length", LENGTHS)
def test_products_at_every_length(kernel: Kernel, length: int) -> None:
    random = np.random.default_rng(length)
    for rows, columns in ((1, 4), (2, 4), (6, 2), (9, 3)):
        # Zeros and ones among the coefficients, which kernels may treat apart.
        matrix = random.choice(np.array([0, 1, 2, 77, 255], dtype=np.uint8), (rows, columns))
        sources = random.integers(0, 256, (columns, length), dtype=np.uint8)
        right = galois.dot(matrix, sources)
        product = kernel.product(matrix)
        outputs = random.integers(0, 256, (rows, length), dtype=np.uint8)
        product.write(spans(sources), spans(outputs))
        assert np.array_equal(outputs, right)
        before = outputs.copy()
        product.fold(columns - 1, Span.of(sources[-1]), spans(outputs))
        folded = galois.dot(matrix[:, -1:], sources[-1:])
        assert np.array_equal(outputs, before ^ folded)


def test_kernels_pass_the_self_test(kernel: Kernel) -> None:
    assert find_fault(kernel) is None


def test_long_buffers_go_in_pieces(isal_path: str) -> None:
    kernel = IsalKernel(isal_path, span_bytes=100)
    assert find_fault(kernel) is None
    random = np.random.default_rng(1)
    matrix = random.integers(0, 256, (2, 3), dtype=np.uint8)
    for length in (99, 100, 101, 257, 300):
        sources = random.integers(0, 256, (3, length), dtype=np.uint8)
        outputs = np.zeros((2, length), dtype=np.uint8)
        kernel.product(matrix).write(spans(sources), spans(outputs))
        assert np.array_equal(outputs, galois.dot(matrix, sources))


def test_numpy_blocks_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_numpy, "BLOCK_BYTES", 13)
    assert find_fault(NumpyKernel()) is None


def test_pyeclibs_library_is_found_first() -> None:
    paths = list(library_paths())
    assert paths[-1] == SYSTEM_LIBRARY
    assert Path(paths[0]).name.startswith("libisal") and "pyeclib.libs" in paths[0]


def test_without_pyeclib_the_systems_library_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_module.importlib.util, "find_spec", lambda name: None)
    assert list(library_paths()) == [SYSTEM_LIBRARY]


def test_isal_is_chosen_and_logged(isal_path: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ckptd.erasure")
    assert select(["/nowhere/libisal.so.2", isal_path]).name == f"ISA-L ({isal_path})"
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert isal_path in caplog.text
    assert best_kernel() is best_kernel()


def test_numpy_is_the_last_resort_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    # libc loads, but has not the functions.
    assert select(["/nowhere/libisal.so.2", "libc.so.6"]).name == "numpy"
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "/nowhere/libisal.so.2" in caplog.text and "ec_init_tables" in caplog.text
    assert "Next: install pyeclib" in caplog.text


class FlipsOneBit(NumpyProduct):
    """Wrong in the last byte of long writes only."""

    def write(self, sources: Sequence[Span], outputs: Sequence[Span]) -> None:
        super().write(sources, outputs)
        if outputs[0].array.size > 128:
            outputs[-1].array[-1] ^= 1


class FoldsByWriting(NumpyProduct):
    """Correct on zeroed outputs, wrong on all others."""

    def fold(self, column: int, source: Span, outputs: Sequence[Span]) -> None:
        for output in outputs:
            output.array[:] = 0
        super().fold(column, source, outputs)


class WritesBeyond(NumpyProduct):
    """The right bytes, and one more after them."""

    def write(self, sources: Sequence[Span], outputs: Sequence[Span]) -> None:
        super().write(sources, outputs)
        whole = outputs[0].array.base
        assert isinstance(whole, np.ndarray)
        whole.flat[whole.size - 1] ^= 1


class BrokenKernel(NumpyKernel):
    def __init__(self, product: type[NumpyProduct]) -> None:
        self.made = product

    def product(self, matrix: Bytes) -> NumpyProduct:
        return self.made(matrix)


@pytest.mark.parametrize(
    ("broken", "fault"),
    [
        (FlipsOneBit, "write of a 1 x 1 matrix on 129 bytes gave wrong bytes"),
        (FoldsByWriting, "fold of a 1 x 5 matrix on 1 bytes gave wrong bytes"),
        (WritesBeyond, "write of a 1 x 1 matrix on 1 bytes wrote outside of its buffers"),
    ],
)
def test_the_self_test_finds(broken: type[NumpyProduct], fault: str) -> None:
    assert find_fault(BrokenKernel(broken)) == fault


def test_a_library_that_computes_wrong_bytes_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kernel_module, "IsalKernel", lambda path: BrokenKernel(FlipsOneBit))
    assert type(select(["libisal.so.2"])) is NumpyKernel
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]
    assert "computes wrong bytes and is not used" in caplog.text


def test_the_code_drags_in_nothing() -> None:
    """A trainer imports the code; pyeclib, torch, grpc and reedsolo have no place there."""
    program = (
        "import sys; from ckptd.erasure import Code; import ckptd.erasure.groups, ckptd.erasure.stripe; "
        "Code(4, 2); print(sorted({'pyeclib', 'torch', 'grpc', 'reedsolo'} & set(sys.modules)))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert ran.stdout.strip() == "[]"
