"""Makes the golden checkpoints: real training state, captured and stored in every way there is.  Run once.

    python tests/golden/make.py             makes those that are not there

    distributed/    two ranks of an FSDP2 job (gloo), images as the daemon writes them
    consolidated/   `ckptd.save` of the same kind of state by one process
    packed/         the same, compressed; with a pin
    files/          another tool's files, kept verbatim
    lines/          the start of a line, as a rollback leaves it
    *.json          what they hold, as the live tensors had it: {NAME: [WIDTH, SHAPE, base64 of the bits]}

What lies here is never made anew: old bytes must stay readable.  A new form gets a directory of its own.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import string
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import ckptd
from ckptd.client import embedded
from ckptd.image.manifest import Manifest
from ckptd.integrations.fsspec_store import CkptdFileSystem
from ckptd.storage import catalog, compression, marks
from ckptd.storage.lines import Start
from ckptd.storage.local_store import LocalStore

HERE = Path(__file__).parent
STEPS = 3


class Net(nn.Module):
    """Uneven shards (7 rows over 2 ranks), an empty one (1 row), tied weights, bf16, buffers."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 7)
        self.block = nn.Sequential(nn.Linear(7, 7, bias=False), nn.Tanh(), nn.Linear(7, 7, bias=False))
        self.block[2].weight = self.block[0].weight
        self.norm = nn.BatchNorm1d(7)  # each rank's running statistics are its own
        self.head = nn.Linear(7, 1)
        self.low = nn.Linear(3, 5, dtype=torch.bfloat16)
        self.register_buffer("scale", torch.tensor(0.1, dtype=torch.float64))
        self.register_buffer("nothing", torch.zeros(0, 3, dtype=torch.int32))
        self.register_buffer("flags", torch.tensor([True, False, True]))
        self.register_buffer("ragged", torch.arange(2 + rank))  # of another shape on each rank
        self.register_buffer("odd", torch.tensor([float("nan"), float("-inf"), -0.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(self.norm(self.block(self.embed(x))))
        return y + self.low(x[:, :3].bfloat16()).float().sum() * 1e-2


def trained(rank: int, *, sharded: bool) -> dict[str, Any]:
    """A model after some steps, with its optimizer and scheduler."""
    torch.manual_seed(1)
    model = Net(rank)
    if sharded:
        fully_shard(model.block)
        fully_shard(model.low)
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(10 * step + rank)
        optimizer.zero_grad()
        torch.autograd.backward(model(torch.randn(4, 5, generator=generator)).pow(2).mean())
        optimizer.step()
        scheduler.step()
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler}


def bits(state: dict[str, Any]) -> dict[str, Any]:
    """Every tensor whole, by torch's own gathering: width, shape, bits."""
    model, optimizer = state["model"], state["optimizer"]
    # Other names of tied parameters are names, too.
    found = {f"model.{name}": tensor for name, tensor in model.state_dict(keep_vars=True).items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            found[f"optimizer.model.{name}.{key}"] = value
    written = {}
    for name, tensor in found.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        data = whole.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        written[name] = [whole.element_size(), list(whole.shape), base64.b64encode(data).decode()]
    return written


def rank_main(out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    state = trained(rank, sharded=True)
    (out / f"rank-{rank}.json").write_text(json.dumps(bits(state)))
    with ckptd.attach("golden", max_lag=1, **state) as run:
        run.resume()
        run.step()
        dist.barrier()
        run.save(wait="durable")
        dist.barrier()
    for daemon in embedded._started:
        daemon.kill()
        daemon.wait()
    dist.destroy_process_group()


def distributed() -> None:
    with tempfile.TemporaryDirectory() as directory, tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        root = Path(directory)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        environment = {
            **os.environ, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "CKPTD_STORE": str(root / "store"), "XDG_RUNTIME_DIR": directory,
            "CKPTD_MEMORY_DIR": f"{memory}/m",
        }  # fmt: skip
        ranks = [
            subprocess.Popen(
                [sys.executable, __file__, directory],
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(2)
        ]
        assert [process.wait(100) for process in ranks] == [0, 0]
        (stored,) = (root / "store" / "golden").iterdir()
        shutil.copytree(stored, HERE / "distributed")
        first, second = (json.loads((root / f"rank-{rank}.json").read_text()) for rank in range(2))
    other = {name: held for name, held in second.items() if held != first[name]}
    write("distributed-rank-0.json", first)
    write("distributed-rank-1.json", other)  # what differs from rank 0


def consolidated() -> None:
    state = trained(0, sharded=False)
    write("consolidated.json", bits(state))
    # Long enough for a second block; listed in the test.
    more = {"epoch": 4, "seen": (1, 2.5, None), "long": (torch.arange(53504) % 251).to(torch.uint8)}
    ckptd.save(str(HERE / "consolidated"), {**state, **more}, step=3, job="golden")


def packed() -> None:
    """Groups of width 4 and 1; and a last one of 64 bytes, which no compression shortens: width 0."""

    def save(url: str, fill: int, text: int) -> Manifest:
        torch.manual_seed(1)
        state = {
            **trained(0, sharded=False),
            "wide": (torch.arange(300_000) % 977).float(),  # listed in the test, with the next
            "long": (torch.arange(1_000_000 + fill) % 251).to(torch.uint8),
            "text": (string.ascii_letters + string.digits)[:text],
        }
        return ckptd.save(url, state, step=3, job="golden", compress=True)

    with tempfile.TemporaryDirectory() as directory:
        sizes = [save(f"{directory}/{text}", 0, text).objects[0].nbytes for text in range(62)]
    # The longest text that does not take another unit of 64 bytes: few zeros are left behind it.
    text = max(text for text in range(62) if sizes[text] == sizes[0])
    fill = (64 - sizes[text]) % compression.GROUP_BYTES
    made = save(str(HERE / "packed"), fill, text)
    assert made.objects[0].nbytes % compression.GROUP_BYTES == 64
    marks.pin(LocalStore(HERE / "packed"), "kept for ever", now=1_800_000_000)


def files() -> None:
    with tempfile.TemporaryDirectory() as directory:
        fs = CkptdFileSystem(store=directory)
        fs.pipe_file("golden/step-7/__0_0.distcp", bytes(i % 253 for i in range(70_000)))
        fs.pipe_file("golden/step-7/.metadata.tmp", b"no pickle, but kept like one")
        fs.mv("golden/step-7/.metadata.tmp", "golden/step-7/.metadata")
        (stored,) = Path(directory, "golden").iterdir()
        shutil.copytree(stored, HERE / "files")


def lines() -> None:
    start = Start(3, (2, 900), "loss spike at 1200", 1_800_000_000)
    LocalStore(HERE / "lines").put_if_absent(catalog.start_name(3), start.write("golden"))


def write(name: str, held: dict[str, Any]) -> None:
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in held.items()]
    (HERE / name).write_text("{" + ",\n".join(lines) + "}\n")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        rank_main(Path(sys.argv[1]))
    else:
        for make in (distributed, consolidated, packed, files, lines):
            if not (HERE / make.__name__).exists():
                make()
