"""The command line of the server: its options, its log, and how its process ends."""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import structlog
import typer

from operators.core.number_options import decimal_numbers
from operators.core.version import __version__
from steer_server.access.new_token import add_token, renew_token
from steer_server.checks.finding import Finding
from steer_server.config import ServerConfig
from steer_server.configuration.flags import given, with_settings
from steer_server.configuration.read import Settings, SettingsError, read_settings
from steer_server.configuration.show import as_json, as_toml
from steer_server.errors import EngineDiedError, StartupError
from steer_server.log_relay import drain_output, relay_output
from steer_server.serving import run

_drain: Callable[[], object] = sys.stdout.flush
"""Hands on what has been printed; :func:`serve` puts the relays in its place."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
@with_settings
def serve(
    context: typer.Context,
    *,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
    check: Annotated[
        bool,
        typer.Option("--check", help="Say what a start would meet, a line for each thing looked at, and stop."),
    ] = False,
    **flags: Any,
) -> None:
    """Serve steered text generation. Every flag is also a key of the file, and STEER_NAME in the environment."""
    if version:
        print(f"steer-server {__version__}")
        raise typer.Exit
    context.obj = flags
    if context.invoked_subcommand is not None:
        return
    if check:
        raise typer.Exit(_check(flags))
    has_colors = sys.stderr is not None and sys.stderr.isatty()
    global _drain
    _drain = partial(drain_output, relay_output())
    atexit.register(_drain)
    settings = _read(flags)
    _configure_logging(settings.config, has_colors=has_colors)
    for warning in settings.warnings:
        structlog.get_logger("steer_server").warning(warning)
    try:
        asyncio.run(_run_and_leave(settings.config))
    except StartupError as error:
        _fail(str(error), code=1)


@app.command("config")
@with_settings
def show_config(
    context: typer.Context,
    *,
    as_object: Annotated[bool, typer.Option("--json", help="Print an object: name, value, unit, origin.")] = False,
    **flags: Any,
) -> None:
    """Print the effective settings, as a file that --config takes, and where each came from; secrets as ***."""
    settings = _read({**context.obj, **{name: value for name, value in flags.items() if value is not None}})
    for warning in settings.warnings:
        print(f"steer-server: {warning}", file=sys.stderr)
    print(as_json(settings) if as_object else as_toml(settings), end="")


@app.command("token")
@decimal_numbers
def make_token(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="What logs and metrics call it.", show_default=False)],
    scopes: Annotated[
        str | None, typer.Option(metavar="SCOPE,…", help="Of generate, read and admin.", show_default="generate,read")
    ] = None,
    operators: Annotated[
        str | None,
        typer.Option(metavar="NAME,…", help='It may use and see these alone; "lens" for words.', show_default="all"),
    ] = None,
    requests_per_minute: Annotated[int | None, typer.Option(metavar="N", show_default="no limit")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(metavar="N", show_default="no limit")] = None,
    queue_share: Annotated[float | None, typer.Option(metavar="X", show_default="everybody's")] = None,
    expires: Annotated[
        datetime | None, typer.Option(metavar="DATE", formats=["%Y-%m-%d", "%Y-%m-%dT%H:%M:%SZ"], help="In UTC.")
    ] = None,
    renew: Annotated[bool, typer.Option("--renew", help="Give an entry that there is another token.")] = False,
    tokens: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File of tokens.", show_default="that of the settings")
    ] = None,
) -> None:
    """Add a token to the file of tokens, as a hash, and print it: this once."""
    settings: dict[str, Any] = {
        "scopes": tuple((scopes or "generate,read").split(",")),
        "operators": None if operators is None else tuple(each for each in operators.split(",") if each),
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "queue_share": queue_share,
        "expires": None if expires is None else expires.replace(tzinfo=UTC),
    }
    if settings["expires"] is not None and settings["expires"] <= datetime.now(UTC):
        _refuse(f"--expires {settings['expires']:%Y-%m-%dT%H:%M:%SZ} is past", code=2)
    path = tokens or _read(context.obj).config.tokens
    if path is None:
        _refuse("no file of tokens is named (--tokens FILE, or STEER_TOKENS)", code=2)
    if renew and any(value is not None for key, value in settings.items() if key != "scopes" or scopes):
        _refuse("--renew changes nothing but the token; edit the file for the rest", code=2)
    try:
        token = renew_token(path, name) if renew else add_token(path, name, settings)
    except StartupError as error:
        _refuse(str(error), code=1)
    print(f"[tokens.{name}] of {path} has this token, which is kept nowhere:", file=sys.stderr)
    print(token)


def _refuse(message: str, *, code: int) -> NoReturn:
    """Ends a command that has begun nothing."""
    print(f"steer-server: {message}", file=sys.stderr)
    raise typer.Exit(code)


def _check(flags: dict[str, Any]) -> int:
    """Prints what all checks find. Returns the exit status: 0 without a problem, else 1; of settings, 2."""
    try:
        settings = _read_all(flags)
    except (SettingsError, StartupError) as error:
        for problem in getattr(error, "problems", (str(error),)):
            print(Finding("problem", "settings", problem))
        return 2
    # Imported late: --help and a mistyped option should not wait for torch.
    from steer_server.checks.run import run_checks

    logging.disable()
    kinds = set()
    for finding in (*(Finding("note", "settings", each) for each in settings.warnings), *run_checks(settings.config)):
        print(finding, flush=True)
        kinds.add(finding.kind)
    return int("problem" in kinds)


def _read(flags: dict[str, Any]) -> Settings:
    """The settings; where they are not accepted, the process ends with one line that names all that is wrong."""
    try:
        return _read_all(flags)
    except SettingsError as error:
        _fail(str(error), code=2)
    except StartupError as error:
        _fail(str(error), code=1)


def _read_all(flags: dict[str, Any]) -> Settings:
    return read_settings(given({name: value for name, value in flags.items() if name != "config"}), flags["config"])


async def _run_and_leave(config: ServerConfig) -> None:
    try:
        await run(config)
    except asyncio.CancelledError:
        # Ctrl-C. The thread in which vLLM loads a model cannot be stopped; vLLM's processes end when this one does.
        _fail("interrupted", code=130)
    except StartupError as error:
        _fail(str(error), code=1)
    except EngineDiedError as error:
        _fail(str(error), code=3)
    # From here, within the event loop: leaving it waits for threads, and the interpreter's end aborts the process where
    # one of them is in a forward pass. None has state to save.
    _leave(0)


def _configure_logging(config: ServerConfig, *, has_colors: bool) -> None:
    renderer = (
        structlog.processors.JSONRenderer()
        if config.log_format == "json"
        else structlog.dev.ConsoleRenderer(colors=has_colors)
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            renderer,
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
    )
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("operators").setLevel(logging.INFO)


def _fail(message: str, *, code: int) -> NoReturn:
    print(f"steer-server: {message}", file=sys.stderr)
    _leave(code)


def _leave(code: int) -> NoReturn:
    """Ends the process now, whatever its threads do, with what has been printed handed on."""
    _drain()
    os._exit(code)
