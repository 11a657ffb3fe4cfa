"""The command line of the server: its options, its log, and how its process ends."""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, NoReturn

import structlog
import typer

from operators.core.version import __version__
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
