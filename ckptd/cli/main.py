"""`ckptd`: the command line.

Data goes to stdout, progress and logs to stderr.  Every command exits with the
code of the error it met (see ckptd/errors.py), 0 otherwise.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from ckptd.cli import checkpoints, local
from ckptd.cli import status as status_command
from ckptd.errors import CkptdError, InvalidRequest
from ckptd.v1 import daemon_pb2

app = typer.Typer(
    name="ckptd",
    help="Keeps long PyTorch training jobs alive: the newest state in memory, protected across nodes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log details.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


def _logging(verbose: bool) -> None:
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(asctime)s %(levelname).1s %(name)s: %(message)s",
    )
    for name in ("grpc", "asyncio"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _given(**flags: Any) -> dict[str, Any]:
    """The flags that were given; what was not is left to the environment and the defaults."""
    return {name: value for name, value in flags.items() if value is not None}


@app.command(
    epilog="Example: ckptd daemon --node n0 --listen 10.0.0.1:7600 --bulk 10.0.0.1:7601 --insecure"
    " --coordinator 10.0.0.9:7500"
)
def daemon(
    node: Annotated[str | None, typer.Option(help="This node's name; the host name by default.")] = None,
    domain: Annotated[str | None, typer.Option(help="Failure domain: rack, switch, power supply.")] = None,
    listen: Annotated[str | None, typer.Option(help="host:port of the gRPC service.")] = None,
    bulk: Annotated[str | None, typer.Option(help="host:port of the bulk plane.")] = None,
    socket: Annotated[Path | None, typer.Option(help="UNIX socket for trainers.")] = None,
    memory_dir: Annotated[Path | None, typer.Option(help="A directory on tmpfs for the arenas.")] = None,
    memory_limit_bytes: Annotated[
        int | None, typer.Option(help="Memory to take at most; by default 9/10 of what the tmpfs has free.")
    ] = None,
    coordinator: Annotated[
        str | None, typer.Option(help="host:port; without one this node serves alone.")
    ] = None,
    embedded: Annotated[bool | None, typer.Option("--embedded", hidden=True)] = None,
    idle_s: Annotated[float | None, typer.Option(hidden=True)] = None,
    park_s: Annotated[float | None, typer.Option(help="Free a job without trainers after this time.")] = None,
    insecure: Annotated[
        bool | None,
        typer.Option("--insecure", help="Listen beyond loopback without TLS: a trusted network only."),
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Serve this node: hold its ranks' state in memory and protect it together with the peers."""
    from ckptd.daemon.server import serve
    from ckptd.daemon.settings import DaemonSettings

    _logging(verbose)
    flags = _given(
        node=node,
        domain=domain,
        listen=listen,
        bulk=bulk,
        socket=socket,
        memory_dir=memory_dir,
        memory_limit_bytes=memory_limit_bytes,
        coordinator=coordinator,
        embedded=embedded,
        idle_s=idle_s,
        park_s=park_s,
        insecure=insecure,
    )
    if "memory_dir" in flags:
        flags["memory_dir"].mkdir(parents=True, exist_ok=True, mode=0o700)
    asyncio.run(serve(_settings(DaemonSettings, flags)))


@app.command(
    epilog="Example: ckptd coordinator --listen 10.0.0.9:7500 --insecure --journal /var/lib/ckptd/journal.db"
)
def coordinator(
    listen: Annotated[str | None, typer.Option(help="host:port of the gRPC service.")] = None,
    journal: Annotated[Path | None, typer.Option(help="The SQLite file of decisions.")] = None,
    insecure: Annotated[
        bool | None,
        typer.Option("--insecure", help="Listen beyond loopback without TLS: a trusted network only."),
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Watch the nodes of jobs, decide the way back after a failure, and give the launchers their orders."""
    from ckptd.coordinator.server import serve
    from ckptd.coordinator.settings import CoordinatorSettings

    _logging(verbose)
    flags = _given(listen=listen, journal=journal, insecure=insecure)
    asyncio.run(serve(_settings(CoordinatorSettings, flags)))


@app.command(epilog="Example: ckptd demo --kill two-nodes --json")
def demo(
    kill: Annotated[
        str, typer.Option(help="none, rank, node, node-silent, two-nodes, daemon or coordinator.")
    ] = "node",
    nodes: Annotated[int, typer.Option(help="Nodes that train.")] = 4,
    spares: Annotated[int | None, typer.Option(help="Nodes that stand by; 1, or 2 for two-nodes.")] = None,
    parity: Annotated[int | None, typer.Option(help="Nodes that may vanish; 1, or 2 for two-nodes.")] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 50,
    seed: Annotated[
        int | None, typer.Option(help="Decides what is struck, and when; random by default.")
    ] = None,
    control_cache: Annotated[
        Path | None, typer.Option(help="Keep the control's result here and use it again.")
    ] = None,
    fork_server: Annotated[
        bool,
        typer.Option(
            "--fork-server",
            help="Fork trainers from an interpreter with torch imported: no honest restart_s.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Train a GPT on four nodes, kill something without warning, and compare with an untouched run."""
    from ckptd.demo import DemoOptions, run

    options = DemoOptions(
        kill=kill,
        nodes=nodes,
        spares=spares,
        parity=parity,
        steps=steps,
        seed=seed,
        control_cache=control_cache,
        fork_server=fork_server,
    )
    result = run(options)
    typer.echo(result.to_json() if as_json else result.text())
    raise typer.Exit(result.exit_code)


@app.command(epilog="Example: ckptd status --json")
def status(
    address: Annotated[
        str | None, typer.Option(help="host:port of a daemon or coordinator; the local daemon by default.")
    ] = None,
    socket: Annotated[Path | None, typer.Option(help="UNIX socket of the daemon to ask.")] = None,
    as_json: Json = False,
) -> None:
    """Show the daemon of this node: its jobs, steps, memory, and what it survives."""
    status_command.show(address, socket, as_json)


@app.command(epilog="Example: ckptd forget llama")
def forget(
    job: Annotated[str, typer.Argument(help="The job whose memory on this node is freed.")],
    address: Annotated[
        str | None, typer.Option(help="host:port of a daemon; the local one by default.")
    ] = None,
    socket: Annotated[Path | None, typer.Option(help="UNIX socket of the daemon to ask.")] = None,
    as_json: Json = False,
) -> None:
    """Free a parked job's memory on this node.  Refused while its trainers run."""
    with local.daemon(local.address_of(address, socket)) as stub:
        reply = stub.Forget(daemon_pb2.ForgetRequest(header=local.header(job)), timeout=local.TIMEOUT_S)
    if as_json:
        typer.echo(json.dumps({"schema": "ckptd.forget/1", "job": job, "freed_bytes": reply.freed_bytes}))
    else:
        typer.echo(f"{job}: {reply.freed_bytes:,} bytes freed")


checkpoints.register(app)


def _settings(kind: Any, flags: dict[str, Any]) -> Any:
    """Settings from flags over environment over defaults; a wrong one is a sentence, not a traceback."""
    try:
        return kind(**flags)
    except ValidationError as error:
        first = error.errors()[0]
        field = "--" + "-".join(str(part) for part in first["loc"]).replace("_", "-")
        raise InvalidRequest(f"{field}: {first['msg']}", f"found {first.get('input')!r}") from error


def main() -> None:
    """The entry point of `ckptd`."""
    try:
        app()
    except CkptdError as error:
        typer.echo(f"ckptd: {error}", err=True)
        raise SystemExit(error.exit_code) from error


if __name__ == "__main__":
    main()
