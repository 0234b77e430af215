"""`ckptd ls`: jobs, and the lines of one job."""

from __future__ import annotations

import json
import time
from typing import Any

import typer

from ckptd.cli.drawing import draw
from ckptd.cli.keys import fields, named, when
from ckptd.errors import CkptdError, InvalidRequest, NotFound
from ckptd.image.manifest import MANIFEST_NAME
from ckptd.image.names import check_name
from ckptd.storage import catalog, marks
from ckptd.storage.lines import Key, Start
from ckptd.storage.store import open_store


def list_jobs(url: str, as_json: bool) -> None:
    """Prints the jobs that have something in a store."""
    found = []
    for name in open_store(url).list():
        try:
            known = catalog.survey(url, check_name("job", name))
        except InvalidRequest:
            continue  # no name of a job's
        except CkptdError as error:
            typer.echo(f"ckptd: {error}", err=True)  # a file, or what we may not read; the others count
            continue
        if known.heads or known.lines.starts:
            found.append((name, known))
    if as_json:
        jobs = [
            {
                "job": name,
                "checkpoints": len(known.heads),
                "lines": len(known.lines.lines),
                "newest": _key(known.lines.tip),
            }
            for name, known in found
        ]
        typer.echo(json.dumps({"schema": "ckptd.ls/1", "store": url, "jobs": jobs}))
        return
    for name, known in found:
        tip = known.lines.tip
        newest = "none" if tip is None else named(tip)
        counts = f"{len(known.heads)} checkpoints, {len(known.lines.lines)} lines"
        typer.echo(f"{name:24} {counts:28} newest {newest}")
    if not found:
        typer.echo(f"no checkpoints in {url}", err=True)


def list_job(url: str, job: str, as_json: bool) -> None:
    """Prints the lines of a job.

    Raises:
        NotFound: it has none here.
    """
    known = catalog.survey(url, job)
    if not known.heads and not known.lines.starts:
        raise NotFound(f"no checkpoint of job {job} in {url}", "", "ckptd ls shows the jobs")
    if as_json:
        typer.echo(json.dumps(_body(url, job, known)))
        return
    lines = known.lines
    typer.echo(f"{job}: {len(known.heads)} checkpoints, {len(lines.lines)} lines, in {url}")
    begun = lines.lines[0] if lines.lines and lines.lines[0].head is None else None
    if begun is not None and begun.start is not None:
        typer.echo(
            f"> generation {begun.start.generation} goes on from {_place(begun.parent)}{_why(begun.start)}"
        )
    rows = draw(lines.parents, lines.newest, lambda key: _mark(known, key))
    width = max((len(text) for text, _ in rows), default=0)
    for text, key in rows:
        typer.echo(text if key is None else f"{text:{width}}  {_row(known, key)}")
    for generation, why in known.unreadable.items():
        typer.echo(f"ckptd: the start of generation {generation}: {why}", err=True)


def _mark(known: catalog.Survey, key: Key) -> str:
    if known.heads[key] is None:
        return "x"
    return "*" if key in known.lines.newest else "o"


def _row(known: catalog.Survey, key: Key) -> str:
    head = known.heads[key]
    notes = []
    if head is None:
        notes.append("its manifest cannot be read")
    pinned, readers = _marks(known, key)
    if pinned is not None:
        notes.append(f"pinned: {pinned}")
    if readers:
        notes.append("being read")
    start = known.lines.abandoned.get(key)
    if start is not None and key in known.lines.heads:
        notes.append(f"left by generation {start.generation}{_why(start)}")
    ranks = "" if head is None else f"{head.world_size} rank{'s' * (head.world_size != 1)}"
    return f"{named(key):20} {when(_time(known, key))}  {ranks:10} {'; '.join(notes)}".rstrip()


def _body(url: str, job: str, known: catalog.Survey) -> dict[str, Any]:
    lines = known.lines
    line_of = {key: number for number, line in enumerate(lines.lines) for key in line.own}
    checkpoints = []
    for key in sorted(known.heads, key=lambda key: (key[1], key[0]), reverse=True):
        head, (pinned, readers) = known.heads[key], _marks(known, key)
        checkpoints.append(
            {
                "step": key[1],
                "generation": key[0],
                "parent": _key(lines.parents[key]),
                "line": line_of[key],
                "written_s": _time(known, key),
                "form": head and head.form,
                "world_size": head and head.world_size,
                "pinned": pinned,
                "being_read": readers,
                "left_by": lines.abandoned[key].generation if key in lines.abandoned else None,
            }
        )
    drawn = [
        {
            "head": _key(line.head),
            "goes_on_from": _key(line.parent),
            "newest": line.newest,
            "rollback": line.start
            and {
                "generation": line.start.generation,
                "reason": line.start.reason,
                "time_s": line.start.time_s,
            },
        }
        for line in lines.lines
    ]
    return {
        "schema": "ckptd.ls/1",
        "store": url,
        "job": job,
        "newest": _key(lines.tip),
        "checkpoints": checkpoints,
        "lines": drawn,
    }


def _marks(known: catalog.Survey, key: Key) -> tuple[str | None, bool]:
    names = known.found[key].names
    pinned = None
    if marks.PIN in names:
        pinned = marks.pin_of(known.store.inside(catalog.entry_of(key).directory)).reason
    return pinned, bool(marks.leases(names, time.time())[0])


def _time(known: catalog.Survey, key: Key) -> float:
    return known.store.inside(catalog.entry_of(key).directory).modified(MANIFEST_NAME)


def _place(key: Key | None) -> str:
    return "nothing" if key is None else named(key)


def _why(start: Start) -> str:
    return f" ({start.reason})"


def _key(key: Key | None) -> dict[str, int] | None:
    return None if key is None else fields(key)
