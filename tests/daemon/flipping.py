"""Bit flips: a cluster whose daemons scrub at full speed, and a wire that damages what it carries."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cluster import Cluster

from ckptd.daemon.node import Node
from ckptd.daemon.settings import DaemonSettings
from ckptd.erasure import Code
from ckptd.image.digest import CELL_BYTES
from ckptd.memory.bulk import BulkServer
from ckptd.memory.holding import Holding
from ckptd.v1 import bulk_pb2

SHORT_S = 1.0  # of bulk peers: a header that claims to be longer than it is ends with it
_PREFIX = struct.Struct("<I")


@dataclass
class Flip:
    """One bit to damage in the next frame of this kind, and what became of it."""

    body: str  # of the BulkHeader: "seal", "offer", "terms", ...
    region: str  # "length", "header" or "payload"
    rng: random.Random
    done: threading.Event = field(default_factory=threading.Event)
    # The connection that carried it was ended by one of its two ends.
    ended: threading.Event = field(default_factory=threading.Event)


class Wire:
    """Stands before one bulk server, forwards frames in both directions, and damages what it is told to."""

    def __init__(self, target: str, flips: list[Flip], lock: threading.Lock) -> None:
        self._target = target
        self._flips = flips
        self._lock = lock  # of `flips`, which several wires share
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        for sock in [self._listener, *self._open]:
            _end(sock)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            host, _, port = self._target.rpartition(":")
            try:
                far = socket.create_connection((host, int(port)), timeout=10)
            except OSError:
                near.close()
                continue
            for sock in (near, far):
                sock.settimeout(None)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._open.append(sock)
            carried: list[Flip] = []
            for pair in ((near, far), (far, near)):
                threading.Thread(target=self._forward, args=(*pair, carried), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket, carried: list[Flip]) -> None:
        with contextlib.suppress(OSError, EOFError):
            while True:
                prefix = _exactly(source, _PREFIX.size)
                header = _exactly(source, _PREFIX.unpack(prefix)[0])
                frame = bulk_pb2.BulkHeader.FromString(header[:-8])
                payload = _exactly(source, frame.payload_bytes)
                parts = {"length": prefix, "header": header, "payload": payload}
                flip = self._take(frame.WhichOneof("body") or "", parts)
                if flip is not None:
                    part = parts[flip.region]
                    bit = flip.rng.randrange(8 * len(part))
                    part[bit // 8] ^= 1 << bit % 8
                    carried.append(flip)
                    flip.done.set()
                sink.sendall(b"".join(parts.values()))
        _end(source)
        _end(sink)
        for flip in carried:
            flip.ended.set()

    def _take(self, body: str, parts: dict[str, bytearray]) -> Flip | None:
        with self._lock:
            for flip in self._flips:
                if flip.body == body and parts[flip.region]:
                    self._flips.remove(flip)
                    return flip
        return None


def _exactly(sock: socket.socket, count: int) -> bytearray:
    data = bytearray(count)
    view = memoryview(data)
    while view:
        got = sock.recv_into(view)
        if not got:
            raise EOFError
        view = view[got:]
    return data


def _end(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()


class FlipCluster(Cluster):
    """A cluster with a wire before every bulk server; `flips` are damaged in the order they come."""

    def __init__(
        self,
        root: Path,
        count: int,
        parity: int,
        slots: int = 3,
        ranks_per_node: int = 1,
        *,
        wired: bool = False,
        timeout_s: float = 5.0,
    ) -> None:
        self.flips: list[Flip] = []
        self._flips_lock = threading.Lock()
        self._wired = wired
        self._timeout_s = timeout_s
        self.wires: dict[str, Wire] = {}
        super().__init__(root, count, parity, ranks_per_node=ranks_per_node, slots=slots)

    def add(self, name: str) -> Node:
        directory = self.root / name
        directory.mkdir(parents=True, exist_ok=True)
        settings = DaemonSettings(
            node=name,
            memory_dir=directory,
            coordinator="127.0.0.1:1",
            bulk_timeout_s=self._timeout_s,
            bulk_nice=0,
            scrub_bytes_per_s=0,  # of `Scrub.round`: as fast as it goes
        )
        node = Node(settings, self.pool)
        server = BulkServer("127.0.0.1:0", node.protection.handle, settings.bulk_timeout_s, 0)
        node.bulk_address = server.address
        if self._wired:
            self.wires[name] = Wire(server.address, self.flips, self._flips_lock)
            node.bulk_address = self.wires[name].address
        self.nodes[name], self.servers[name] = node, server
        return node

    def kill(self, name: str) -> None:
        super().kill(name)
        if name in self.wires:
            self.wires.pop(name).close()

    def holding(self, name: str, generation: int, step: int) -> Holding:
        return self.job(name).memory.holdings[generation, step]


def encoded(holding: Holding, holdings: Mapping[str, Holding]) -> list[bytes]:
    """The parity that a node must hold, from everybody's images and the code itself."""
    geometry, cells = holding.geometry, holding.chunk_bytes // CELL_BYTES
    out = []
    for p in range(geometry.parity):
        stripe = geometry.parity_stripe(holding.index, p)
        data = []
        for symbol in range(geometry.data_chunks):
            node, chunk = geometry.data_source(stripe, symbol)
            data.append(b"".join(holdings[holding.group[node]].data_cells(chunk * cells, cells)))
        parity = [bytearray(len(data[0])) for _ in range(geometry.parity)]
        Code(geometry.data_chunks, geometry.parity).encode(data, parity)
        out.append(bytes(parity[p]))
    return out


def column(holding: Holding, stripe: int, cell: int) -> memoryview:
    """The cell that this holding's node has of one column of one stripe."""
    geometry = holding.geometry
    symbol = geometry.symbol_on(holding.index, stripe)
    if symbol < geometry.data_chunks:
        (view,) = holding.data_cells(symbol * holding.chunk_bytes // CELL_BYTES + cell, 1)
        return view
    assert holding.parity is not None
    chunk = holding.parity.chunks[symbol - geometry.data_chunks]
    return chunk[cell * CELL_BYTES : (cell + 1) * CELL_BYTES]
