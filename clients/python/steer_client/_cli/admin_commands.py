"""`steer admin`: what changes the server's store."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

import steer_client
from steer_client._cli import json_output
from steer_client._cli import options as o
from steer_client._cli.connection import connect
from steer_client._cli.connection_options import ConnectionOptions
from steer_client._cli.operator_details import show_operator
from steer_client._cli.option_groups import expand_groups

admin = typer.Typer(
    no_args_is_help=True,
    help="Change the operators of a server that was started with --operator-admin.",
    pretty_exceptions_enable=False,
)
_NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Name of the operator.")]
_BuildArgument = Annotated[str, typer.Argument(metavar="ID", help="The build, as `steer admin builds` has it.")]
_ReplaceOption = Annotated[
    str,
    typer.Option(
        metavar="DIGEST|any",
        help="What it may replace: the operator of that digest, or whatever has the name.",
        show_default="nothing",
    ),
]


@admin.command()
@expand_groups
def upload(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="A file of `steer-operators`.")],
    *,
    name: Annotated[str | None, typer.Option(help="What it is to be called.", show_default="the file's name")] = None,
    replace: _ReplaceOption = "",
    connection: ConnectionOptions,
    as_json: o.JsonOption = False,
) -> None:
    """Send an operator to the server, which takes it into service. What broke off goes on where it stopped.

    steer admin upload store/ocean.safetensors
    """
    with connect(connection, as_json=as_json) as client, _bar("sent") as show:
        info = client.upload_operator(path, name=name, replace=replace, progress=lambda *sent: show("sent", *sent))
    _print_operator(info, as_json=as_json)


@admin.command()
@expand_groups
def load(name: _NameArgument, *, connection: ConnectionOptions, as_json: o.JsonOption = False) -> None:
    """Take an operator of the server's store into service: one that was unloaded, or whose file came or changed.

    steer admin load ocean
    """
    with connect(connection, as_json=as_json) as client:
        _print_operator(client.load_operator(name), as_json=as_json)


@admin.command()
@expand_groups
def unload(name: _NameArgument, *, connection: ConnectionOptions, as_json: o.JsonOption = False) -> None:
    """Take an operator out of service, and keep its file. It stays so until it is loaded.

    steer admin unload ocean
    """
    with connect(connection, as_json=as_json) as client:
        info = client.unload_operator(name)
        if as_json:
            json_output.print_json(json_output.fields(info))
        else:
            print(f"{name} is out of service; its file is kept")


@admin.command()
@expand_groups
def delete(
    name: _NameArgument,
    digest: Annotated[str, typer.Argument(metavar="DIGEST|any", help="That of what is to be deleted.")],
    *,
    connection: ConnectionOptions,
    as_json: o.JsonOption = False,
) -> None:
    """Remove an operator from the server's store, if it is the one that is meant.

    steer admin delete ocean any
    """
    with connect(connection, as_json=as_json) as client:
        client.delete_operator(name, digest)
        if as_json:
            json_output.print_json({"deleted": name})
        else:
            print(f"{name} is deleted")


@admin.command()
@expand_groups
def build(
    name: _NameArgument,
    *,
    text: Annotated[list[str], typer.Option(help="The concept; several texts become one operator.")],
    words: Annotated[
        str | None,
        typer.Option(help='What shows the concept in a text: "golden gate,bridge".', show_default=False),
    ] = None,
    layer: Annotated[int | None, typer.Option(help="Target layer.", show_default="two thirds of the depth")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the operator.", show_default="64")] = None,
    strength: Annotated[
        float | None,
        typer.Option(help="Recommended strength.", show_default="the builder's"),
    ] = None,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="Find the setting by trial; needs --words.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="With --calibrate: a first impression.")] = False,
    replace: _ReplaceOption = "",
    detach: Annotated[bool, typer.Option("--detach", help="Do not wait for the end.")] = False,
    connection: ConnectionOptions,
    as_json: o.JsonOption = False,
) -> None:
    """Build an operator at the server, and wait for it. Ctrl-C ends the waiting and not the build.

    steer admin build tea --text "A cup of tea" --text "We drank our tea" --words "tea,kettle" --calibrate --quick
    """
    listed = [word.strip() for word in words.split(",")] if words else []
    with connect(connection, as_json=as_json) as client:
        job = client.build_operator(
            name,
            text,
            words=listed,
            layer=layer,
            rank=rank,
            strength=strength,
            calibrate=calibrate,
            quick=quick,
            replace=replace,
        )
        if not as_json:
            print(f"build {job.id}", file=sys.stderr)
        _show_build(job if detach else _follow(client, job.id), as_json=as_json)


@admin.command()
@expand_groups
def watch(build_id: _BuildArgument, *, connection: ConnectionOptions, as_json: o.JsonOption = False) -> None:
    """Follow a build to its end.

    steer admin watch 4f1c0a2b9d3e5f67
    """
    with connect(connection, as_json=as_json) as client:
        _show_build(_follow(client, build_id), as_json=as_json)


@admin.command()
@expand_groups
def cancel(build_id: _BuildArgument, *, connection: ConnectionOptions, as_json: o.JsonOption = False) -> None:
    """End a build.

    steer admin cancel 4f1c0a2b9d3e5f67
    """
    with connect(connection, as_json=as_json) as client:
        job = client.cancel_build(build_id)
        if as_json:
            json_output.print_json(json_output.fields(job))
        else:
            print(_line(job))


@admin.command()
@expand_groups
def builds(*, connection: ConnectionOptions, as_json: o.JsonOption = False) -> None:
    """List the builds that wait and run, and the last that ended.

    steer admin builds --json
    """
    with connect(connection, as_json=as_json) as client:
        jobs = client.builds()
        if as_json:
            json_output.print_json({"builds": jobs})
            return
        for job in jobs:
            print(_line(job))


def _follow(client: steer_client.SteerClient, build_id: str) -> steer_client.OperatorBuild:
    with _bar("waiting") as show, client.watch_build(build_id) as reports:
        for job in reports:
            show(job.stage or job.state, job.done, job.total, job.time_left)
        return reports.result


def _show_build(job: steer_client.OperatorBuild, *, as_json: bool) -> None:
    if as_json:
        json_output.print_json(json_output.fields(job))
    elif job.operator is not None:
        show_operator(job.operator)
    else:
        print(_line(job))
    if job.state in ("failed", "cancelled"):
        raise typer.Exit(1)


def _print_operator(info: steer_client.OperatorInfo, *, as_json: bool) -> None:
    if as_json:
        json_output.print_json(json_output.fields(info))
    else:
        show_operator(info)


def _line(job: steer_client.OperatorBuild) -> str:
    left = "" if job.time_left is None else f", {job.time_left:.0f} s left"
    counted = f" {job.done}/{job.total}" if job.total else ""
    running = f": {job.stage}{counted}{left}" if job.state == "running" and job.stage else ""
    problem = " ".join(f": {job.problem}".split()) if job.problem else ""
    return f"{job.id}  {job.state:<9}  {job.name}{running}{problem}"


@contextmanager
def _bar(what: str) -> Iterator[Callable[..., None]]:
    """Gives a function that takes a stage, what is done of it, how much there is, and the seconds left as it is told.

    On a terminal alone, on stderr.
    """
    if not sys.stderr.isatty():
        yield lambda *_: None
        return
    from rich import progress
    from rich.console import Console

    what_is_done = progress.TextColumn("{task.description}", markup=False)
    left_of_it = progress.TextColumn("{task.fields[left]}")
    columns = (what_is_done, progress.BarColumn(), progress.MofNCompleteColumn(), left_of_it)
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None, left="")

        def show(stage: str, done: int, total: int, seconds: float | None = None) -> None:
            left = "" if seconds is None else f"{seconds:.0f} s left"
            bar.update(task, description=stage, completed=done, total=total or None, left=left)

        yield show
