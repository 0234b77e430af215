"""`ckptd status`: what the daemon of this node holds and survives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer
from google.protobuf.json_format import MessageToDict
from rich.console import Console
from rich.table import Table

from ckptd.cli import local
from ckptd.v1 import coordinator_pb2, daemon_pb2

SCHEMA = "ckptd.status/1"


def show(address: str | None, socket: Path | None, as_json: bool) -> None:
    """Prints the status of the daemon at `address`, or behind `socket`, or of this machine."""
    target = local.address_of(address, socket)
    with local.daemon(target) as stub:
        reply = stub.Status(daemon_pb2.DaemonStatusRequest(header=local.header()), timeout=local.TIMEOUT_S)
    if as_json:
        body = MessageToDict(
            reply, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
        typer.echo(json.dumps({"schema": SCHEMA, **body}))
        return
    console = Console()
    mode = "embedded, " if reply.embedded else ""
    kernel = reply.kernel.split(" ")[0]
    console.print(f"node [bold]{reply.node}[/bold] ({mode}process {reply.pid}, code kernel {kernel})")
    console.print(f"survives: {reply.survives}")
    used = sum(memory.arena_bytes + memory.parity_bytes for memory in reply.memory)
    console.print(f"memory: {_mib(used)} of {_mib(reply.memory_limit_bytes)} at {reply.memory_dir}")
    if reply.cells_damaged or reply.cells_refused:
        console.print(
            f"damage: {reply.cells_damaged} cells in memory, {reply.cells_healed} of them healed;"
            f" {reply.cells_refused} cells refused on their way"
        )
    if not reply.jobs:
        console.print("no jobs")
        return
    memory_of = {memory.job: memory for memory in reply.memory}
    table = Table("job", "generation", "ranks", "step", "protected", "memory", "state")
    for job in reply.jobs:
        table.add_row(*_row(job, memory_of.get(job.job)))
    console.print(table)


def _row(job: coordinator_pb2.JobReport, memory: Any) -> list[str]:
    steps = [trainer.step for trainer in job.trainers]
    states = sorted({coordinator_pb2.Trainer.State.Name(t.state).lower() for t in job.trainers})
    return [
        job.job,
        str(job.generation),
        ",".join(str(trainer.rank) for trainer in job.trainers) or "-",
        str(min(steps)) if steps else "-",
        str(job.watermark) if job.has_watermark else "-",
        _mib(memory.arena_bytes + memory.parity_bytes) if memory else "-",
        "/".join(states) or "parked",
    ]


def _mib(nbytes: int) -> str:
    return f"{nbytes / (1 << 20):,.1f} MiB"
