"""How fast the erasure code is on one core, against copying the same bytes.

Rates are in GB/s of data: the bytes of the k data symbols, whatever is made of them;
`update` counts the one symbol that it folds.

Examples:
  python tools/bench/erasure.py
  python tools/bench/erasure.py --data-mib 16 --repeat 3
"""

from __future__ import annotations

import argparse
import functools
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from measure import emit, machine, say, summary
from numpy.typing import NDArray
from pyeclib.ec_iface import ECDriver
from reedsolo import RSCodec

from ckptd.erasure import Code

SHAPES = [(4, 2), (6, 2)]
SEED = 8
Bytes = NDArray[np.uint8]


class Bench:
    """Measures one thing after the other, interleaved by repetition."""

    def __init__(self, repeat: int) -> None:
        self._repeat = repeat
        self.actions: dict[str, tuple[int, Callable[[], object]]] = {}

    def add(self, name: str, nbytes: int, action: Callable[[], object]) -> None:
        self.actions[name] = nbytes, action

    def run(self) -> dict[str, list[float]]:
        """Rates in GB/s by name, one per repetition; the first round only warms up."""
        rates: dict[str, list[float]] = {name: [] for name in self.actions}
        for _ in range(self._repeat + 1):
            for name, (nbytes, action) in self.actions.items():
                began = time.perf_counter()
                action()
                rates[name].append(nbytes / (time.perf_counter() - began) / 1e9)
        return {name: values[1:] for name, values in rates.items()}


def build(bench: Bench, data_bytes: int, reedsolo_bytes: int) -> None:
    """Adds all that is measured."""
    random = np.random.default_rng(SEED)
    whole = random.integers(0, 256, data_bytes, dtype=np.uint8)
    target = np.zeros_like(whole)
    bench.add("memcpy", data_bytes, lambda: np.copyto(target, whole))
    half = data_bytes // 2
    bench.add(
        "xor numpy", half, lambda: np.bitwise_xor(whole[:half], whole[half : 2 * half], out=target[:half])
    )
    for k, m in SHAPES:
        _add_ckptd(bench, whole, k, m)
        _add_pyeclib(bench, whole, k, m)
    codec = RSCodec(SHAPES[0][1], nsize=sum(SHAPES[0]))
    small = whole[:reedsolo_bytes].tobytes()
    bench.add(f"reedsolo encode {SHAPES[0][0]}+{SHAPES[0][1]}", len(small), lambda: codec.encode(small))


def _add_ckptd(bench: Bench, whole: Bytes, k: int, m: int) -> None:
    code, size = Code(k, m), whole.size // k
    data = list(whole[: k * size].reshape(k, size))
    parity = list(np.zeros((m, size), np.uint8))
    code.encode(data, parity)
    symbols = dict(enumerate([*data, *parity]))
    out = list(np.zeros((2, size), np.uint8))
    scratch = [row.copy() for row in parity]
    name = f"{k}+{m}"
    encoded = list(np.zeros((m, size), np.uint8))
    bench.add(f"ckptd encode {name}", k * size, lambda: code.encode(data, encoded))
    for lost in (1, 2):
        present = {symbol: row for symbol, row in symbols.items() if symbol >= lost}
        missing = dict(enumerate(out[:lost]))
        code.decode(present, missing)
        assert all(np.array_equal(missing[symbol], data[symbol]) for symbol in missing)
        bench.add(
            f"ckptd decode {lost} of {name}",
            k * size,
            functools.partial(code.decode, present, missing),
        )
    bench.add(f"ckptd update {name}", size, lambda: code.update(1, data[1], scratch))


def _add_pyeclib(bench: Bench, whole: Bytes, k: int, m: int) -> None:
    """pyeclib's own interface: bytes in, framed fragments out, copied on the way."""
    driver = ECDriver(k=k, m=m, ec_type="isa_l_rs_cauchy")
    data = whole.tobytes()
    fragments = driver.encode(data)
    left = fragments[2:]
    assert driver.decode(left) == data
    bench.add(f"pyeclib encode {k}+{m}", len(data), lambda: driver.encode(data))
    bench.add(f"pyeclib decode 2 of {k}+{m}", len(data), lambda: driver.decode(left))


def ratios(rates: dict[str, list[float]]) -> dict[str, Any]:
    """Of medians: ckptd's rate divided by that of memcpy, by shape of the code."""

    def to_memcpy(name: str) -> float:
        return float(np.median(rates[name]) / np.median(rates["memcpy"]))

    shapes = [f"{k}+{m}" for k, m in SHAPES]
    return {
        "encode_to_memcpy": {shape: to_memcpy(f"ckptd encode {shape}") for shape in shapes},
        "decode_one_to_memcpy": {shape: to_memcpy(f"ckptd decode 1 of {shape}") for shape in shapes},
        "decode_two_to_memcpy": {shape: to_memcpy(f"ckptd decode 2 of {shape}") for shape in shapes},
        "update_to_memcpy": {shape: to_memcpy(f"ckptd update {shape}") for shape in shapes},
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-mib", type=float, default=256, help="of the k data symbols together, MiB")
    parser.add_argument("--reedsolo-kib", type=int, default=64, help="reedsolo is pure Python, KiB")
    parser.add_argument("--repeat", type=int, default=15)
    options = parser.parse_args()
    core = min(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    bench = Bench(options.repeat)
    say(f"one core ({core}), {options.data_mib:g} MiB of data, {options.repeat} repetitions")
    build(bench, int(options.data_mib * (1 << 20)), options.reedsolo_kib << 10)
    rates = bench.run()
    for name, values in rates.items():
        say(f"{name:24} {np.median(values):9.3f} GB/s")
    emit(
        {
            "benchmark": "erasure",
            "machine": machine(),
            "kernel": Code(*SHAPES[0]).kernel.name,
            "data_bytes": int(options.data_mib * (1 << 20)),
            "gb_per_s": {name: summary(values) for name, values in rates.items()},
            "ratios": ratios(rates),
        }
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
