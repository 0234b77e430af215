"""Every test that takes `kernel` runs on ISA-L and on numpy."""

from __future__ import annotations

import pytest

from ckptd.erasure.kernel import Kernel, library_paths
from ckptd.erasure.kernel_isal import IsalKernel
from ckptd.erasure.kernel_numpy import NumpyKernel


@pytest.fixture(scope="session")
def isal_path() -> str:
    """The first library that loads.  One that computes wrong bytes fails the tests: it is not skipped."""
    for path in library_paths():
        try:
            IsalKernel(path)
        except OSError:
            continue
        return path
    pytest.skip("no ISA-L on this machine: neither pyeclib's nor the system's")


@pytest.fixture(scope="session", params=["isal", "numpy"])
def kernel(request: pytest.FixtureRequest) -> Kernel:
    if request.param == "numpy":
        return NumpyKernel()
    return IsalKernel(request.getfixturevalue("isal_path"))
