"""`ckptd ls`, `show`, `verify`, `pin`, `unpin`, `prune`, `rollback`: the checkpoints of a store."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from ckptd.cli import live_memory, local
from ckptd.cli.checkpoint_lists import list_job, list_jobs
from ckptd.cli.keys import fields, named, when
from ckptd.cli.progress import Progress, size
from ckptd.errors import CorruptCheckpoint, InvalidRequest, Unreachable
from ckptd.storage import catalog, marks, place, repair, retention, rollback
from ckptd.storage.reading import Checkpoint, open_checkpoint
from ckptd.storage.store import Store, open_store
from ckptd.storage.transfer import Damage
from ckptd.v1 import daemon_pb2

_WANTED: Final = re.compile(r"[A-Za-z0-9._-]+(/(step-[0-9]+(\.g[0-9]+)?|latest))?")

JobName = Annotated[str, typer.Argument(metavar="JOB", help="The job's name.")]
What = Annotated[
    str,
    typer.Argument(metavar="WHAT", help="JOB (its newest), JOB/step-N, JOB/step-N.gG, or a path or URL."),
]
StoreUrl = Annotated[
    str | None, typer.Option("--store", help="The store, a path or any fsspec URL; by default CKPTD_STORE.")
]
DaemonAddress = Annotated[
    str | None, typer.Option(help="host:port of a daemon that may hold the job; the local one by default.")
]
DaemonSocket = Annotated[Path | None, typer.Option(help="UNIX socket of that daemon.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


def register(app: typer.Typer) -> None:
    """Adds the commands to `ckptd`."""
    app.command("ls", epilog="Example: ckptd ls llama --store s3://bucket/checkpoints")(ls)
    app.command("show", epilog="Example: ckptd show llama/step-1000 --tensors")(show)
    app.command("verify", epilog="Example: ckptd verify llama/step-1000 --repair")(verify)
    app.command("pin", epilog='Example: ckptd pin llama/step-1000 --reason "paper, table 2"')(pin)
    app.command("unpin", epilog="Example: ckptd unpin llama/step-1000")(unpin)
    app.command("prune", epilog="Example: ckptd prune llama --keep last=3,hourly=24,daily=7 --dry-run")(prune)
    app.command("rollback", epilog='Example: ckptd rollback llama --to 900 --reason "loss spike at 940"')(
        roll_back
    )


def ls(
    job: Annotated[str | None, typer.Argument(metavar="[JOB]", help="One job; all of them without.")] = None,
    store: StoreUrl = None,
    as_json: Json = False,
) -> None:
    """List the jobs of a store, or draw the lines of one job's checkpoints, the newest on top."""
    url = store or place.store_url()
    if job is None:
        list_jobs(url, as_json)
    else:
        list_job(url, job, as_json)


def show(
    what: What,
    store: StoreUrl = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List the tensors too.")] = False,
    as_json: Json = False,
) -> None:
    """Show one checkpoint: where it comes from, its files, its layout, its tensors."""
    with _open(what, store) as checkpoint:
        manifest = checkpoint.manifest
        names = checkpoint.store.list()
        pinned = marks.pin_of(checkpoint.store) if marks.PIN in names else None
        held, _ = marks.leases(names, time.time())
        parent = manifest.parent
        body: dict[str, Any] = {
            "schema": "ckptd.show/1",
            "url": checkpoint.store.url,
            "job": manifest.job,
            "step": manifest.step,
            "generation": manifest.generation,
            "parent": parent and {"step": parent[1], "generation": parent[0]},
            "written": when(checkpoint.store.modified("manifest.json")),
            "form": manifest.form,
            "world_size": manifest.world_size,
            "mesh": dict(manifest.mesh),
            "layout": manifest.layout and manifest.layout.name,
            "files": len(manifest.objects),
            "bytes": sum(stored.nbytes for stored in manifest.objects),
            "tensors": len(manifest.tensors),
            "pinned": pinned and pinned.reason,
            "readers": len(held),
        }
        listed = [
            {"name": t.name, "dtype": t.dtype, "shape": list(t.shape), "differs": t.differs}
            for t in manifest.tensors
        ]
    if as_json:
        _json(body | ({"listed": listed} if tensors else {}))
        return
    for key, value in list(body.items())[1:]:
        if key == "parent":
            value = "none" if parent is None else f"step {parent[1]}.g{parent[0]}"
        shown = size(value) if key == "bytes" else "none" if value in (None, {}) else value
        typer.echo(f"{key:12}{shown}")
    for one in listed if tensors else ():
        note = "  (differs between ranks)" if one["differs"] else ""
        typer.echo(f"  {one['name']}  {one['dtype']} {one['shape']}{note}")


def verify(
    what: What,
    store: StoreUrl = None,
    mend: Annotated[
        bool,
        typer.Option("--repair", help="Rebuild what a replica or a daemon's memory still has, and write it."),
    ] = False,
    address: DaemonAddress = None,
    socket: DaemonSocket = None,
    as_json: Json = False,
) -> None:
    """Read every byte of a checkpoint and compare it with its digest.  Exit code 3: something is damaged.

    With --repair, damaged blocks are rebuilt from replicas in the other files, and from the memory of the
    job's daemons while they hold this step.  What nothing has any more is listed by file, rank, bytes and
    tensors; `ckptd.open(URL).salvage()` gives the tensors that verify.
    """
    with _open(what, store) as checkpoint, marks.leased(checkpoint.store):
        url, nbytes = checkpoint.store.url, sum(o.nbytes for o in checkpoint.manifest.objects)
        damage = _verified(checkpoint, "verify")
        made = _planned(checkpoint, damage, address, socket)
        left = made.lost
        if mend and damage:
            repair.execute(checkpoint, made)
            again = _verified(checkpoint, "verify again")
            left = repair.plan(checkpoint, again).lost if again else ()
    bad = bool(left) if mend else bool(damage)
    if as_json:
        _json(
            {
                "schema": "ckptd.verify/1",
                "url": url,
                "bytes": nbytes,
                "damaged": [_damage(found) for found in damage],
                "repaired": {"blocks": made.blocks, "tables": made.tables} if mend else None,
                "repairable": {"blocks": made.blocks, "tables": made.tables},
                "lost": [_lost(each) for each in left],
            }
        )
    else:
        for each in left:
            typer.echo(
                f"lost: {each.object} (rank {each.rank}) bytes {each.begin:,} to {each.end:,}: "
                f"{', '.join(each.tensors) or 'no tensor'}"
            )
        back = f"{made.blocks} blocks and {made.tables} tables of digests"
        if not damage:
            typer.echo(f"{url}: {size(nbytes)} verified, nothing is damaged")
        elif mend:
            typer.echo(f"{url}: {len(damage)} places damaged, {back} repaired")
        else:
            typer.echo(f"{url}: {len(damage)} places damaged; {back} can be repaired: --repair does it")
    if bad:
        raise typer.Exit(CorruptCheckpoint.exit_code)


def _planned(
    checkpoint: Checkpoint, damage: Sequence[Damage], address: str | None, socket: Path | None
) -> repair.Repair:
    """The repair, with what daemons hold of this step; who was named has to answer."""
    if not damage:
        return repair.plan(checkpoint, damage)
    target = None
    try:
        target = local.address_of(address, socket)
    except Unreachable:
        if address or socket:
            raise
    manifest = checkpoint.manifest
    with live_memory.holding(target, manifest.job, (manifest.generation, manifest.step)) as memory:
        return repair.plan(checkpoint, damage, memory)


def pin(
    what: What,
    reason: Annotated[str, typer.Option("--reason", help="Why it is kept; shown by ls.")],
    store: StoreUrl = None,
    as_json: Json = False,
) -> None:
    """Keep a checkpoint from every prune."""
    inside = _directory(what, store)
    marks.pin(inside, reason, time.time())
    _said(as_json, f"{inside.url} is pinned", "ckptd.pin/1", url=inside.url, pinned=reason)


def unpin(what: What, store: StoreUrl = None, as_json: Json = False) -> None:
    """Let prune decide on a checkpoint again."""
    inside = _directory(what, store)
    there = marks.unpin(inside)
    text = f"{inside.url} is not pinned any more" if there else f"{inside.url} was not pinned"
    _said(as_json, text, "ckptd.unpin/1", url=inside.url, was_pinned=there)


def prune(
    job: JobName,
    keep: Annotated[
        str,
        typer.Option(
            "--keep", help="Of every line: last=N newest, and the newest of N hourly, daily, weekly, monthly."
        ),
    ],
    store: StoreUrl = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and remove nothing.")] = False,
    grace_s: Annotated[
        float,
        typer.Option("--grace-s", min=0, help="A directory without manifest is garbage after this time."),
    ] = retention.GRACE_S,
    as_json: Json = False,
) -> None:
    """Remove checkpoints that a policy does not keep, counted per line (UTC hours, days, weeks, months).

    Never removed: the newest one that verifies (it is read whole first), damaged ones that are newer, pinned
    ones, and those that are being read.
    """
    url = store or place.store_url()
    policy = retention.Policy.parse(keep)
    with Progress("verify the newest") as verifying:
        made = retention.plan(url, job, policy, time.time(), grace_s=grace_s, progress=verifying)
    done = retention.Done()
    if not dry_run:
        with Progress("remove") as removing:
            done = retention.execute(made, time.time, removing.say)
    if as_json:
        _json(
            {
                "schema": "ckptd.prune/1",
                "store": url,
                "job": job,
                "dry_run": dry_run,
                "keep": [{**fields(kept.key), "why": list(kept.why)} for kept in made.keep],
                "remove": [fields(key) for key in made.remove],
                "garbage": [{**fields(each.key), "why": each.why} for each in made.garbage],
                "removed": [fields(key) for key in done.removed],
                "collected": [fields(key) for key in done.collected],
                "spared": [{**fields(each.key), "why": list(each.why)} for each in done.spared],
            }
        )
        return
    for kept in made.keep:
        typer.echo(f"keep    {named(kept.key):20} {', '.join(kept.why)}")
    for key in reversed(made.remove):
        typer.echo(f"remove  {named(key)}")
    for each in made.garbage:
        typer.echo(f"garbage {named(each.key):20} {each.why}")
    for spared in done.spared:
        typer.echo(f"spared  {named(spared.key):20} {', '.join(spared.why)}")
    if dry_run:
        typer.echo(f"{len(made.remove)} checkpoints would be removed (dry run)")
    else:
        typer.echo(f"{len(done.removed)} checkpoints removed, {len(done.collected)} leftovers collected")


def roll_back(
    job: JobName,
    to: Annotated[str, typer.Option("--to", metavar="STEP", help="A stored step: N, or N.gG.")],
    reason: Annotated[str, typer.Option("--reason", help="Why; kept with the new line.")],
    store: StoreUrl = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and change nothing.")] = False,
    address: DaemonAddress = None,
    socket: DaemonSocket = None,
    as_json: Json = False,
) -> None:
    """Go back to a stored step: the next run resumes there, on a line of its own.  Nothing is removed."""
    found = re.fullmatch(r"([0-9]{1,15})(?:\.g([0-9]{1,15}))?", to)
    if found is None:
        raise InvalidRequest(f"--to {to!a} is no step", "expected N or N.gG", f"ckptd ls {job} shows them")
    generation = None if found[2] is None else int(found[2])
    url = store or place.store_url()
    made = rollback.plan(url, job, int(found[1]), reason, time.time(), generation=generation)
    asked = _check_not_in_memory(job, address, socket)
    if not dry_run:
        rollback.execute(made)
    start = made.start
    if as_json:
        _json(
            {
                "schema": "ckptd.rollback/1",
                "store": url,
                "job": job,
                "dry_run": dry_run,
                "generation": start.generation,
                "to": fields(start.parent),
                "reason": start.reason,
                "left": [fields(key) for key in made.left],
                "daemon_asked": asked,
            }
        )
        return
    does = "would begin" if dry_run else "begins"
    typer.echo(f"{job}: generation {start.generation} {does} at {named(start.parent)}: {start.reason}")
    typer.echo(f"{len(made.left)} newer checkpoints of the line are left, and stay")
    if not asked:
        typer.echo(
            f"no daemon was asked here: if a node still holds {job} in memory, `ckptd forget {job}` there"
            " first, since memory goes before storage",
            err=True,
        )


def _check_not_in_memory(job: str, address: str | None, socket: Path | None) -> bool:
    """Returns whether there was a daemon to ask.

    Raises:
        InvalidRequest: it holds the job.
    """
    try:
        with local.daemon(local.address_of(address, socket)) as stub:
            reply = stub.Status(
                daemon_pb2.DaemonStatusRequest(header=local.header()), timeout=local.TIMEOUT_S
            )
    except Unreachable:
        if address or socket:
            raise
        return False
    for held in reply.jobs:
        if held.job == job:
            alive = len(held.trainers) > 0
            raise InvalidRequest(
                f"job {job} is {'running' if alive else 'parked'} on node {reply.node}",
                "what is in memory goes before what is stored, so it would not go back",
                f"{'end its trainers, then ' if alive else ''}ckptd forget {job} on every node that holds it",
            )
    return True


def _directory(what: str, store: str | None) -> Store:
    """The directory of the checkpoint that an argument names.

    Raises:
        NotFound: there is none.
    """
    text = what.removeprefix(place.SCHEME)
    named = what.startswith(place.SCHEME) or (
        _WANTED.fullmatch(text) is not None and not Path(what, "manifest.json").exists()
    )
    if not named:
        return open_store(what)
    full = place.SCHEME + (text if "/" in text else f"{text}/latest")
    wanted = place.parse(full, {"CKPTD_STORE": store or place.store_url()})
    assert isinstance(wanted, place.Wanted)
    return catalog.find(wanted)


def _open(what: str, store: str | None) -> Checkpoint:
    return open_checkpoint(_directory(what, store).url)


def _verified(checkpoint: Checkpoint, what: str) -> list[Any]:
    with Progress(what) as progress:
        return checkpoint.verify(progress)


def _said(as_json: bool, text: str, schema: str, **body: Any) -> None:
    if as_json:
        _json({"schema": schema, **body})
    else:
        typer.echo(text)


def _json(body: dict[str, Any]) -> None:
    typer.echo(json.dumps(body))


def _damage(found: Any) -> dict[str, Any]:
    return {
        "object": found.object,
        "begin": found.begin,
        "end": found.end,
        "tensors": list(found.tensors),
        "why": found.why,
    }


def _lost(each: repair.Lost) -> dict[str, Any]:
    return {**_damage(each), "rank": each.rank}
