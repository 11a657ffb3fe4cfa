"""The command line of the server: its options, its log, and how its process ends."""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, NoReturn

import structlog
import typer
from pydantic import ValidationError

from operators.core.version import __version__
from steer_server.config import ServerConfig
from steer_server.engine.vllm.options import read_engine_args
from steer_server.errors import EngineDiedError, StartupError
from steer_server.log_relay import drain_output, relay_output
from steer_server.serving import run

_drain: Callable[[], object] = sys.stdout.flush
"""Hands on what has been printed; :func:`serve` puts the relays in its place."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def serve(
    model: Annotated[
        str | None, typer.Option(help="Built-in name, Hugging Face id or local directory.", show_default="smollm2-135m")
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(help="hf: transformers, in this process; vllm: continuous batching.", show_default="hf"),
    ] = None,
    engine_args: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE|FILE.yaml",
            help="An option of vLLM, such as max_model_len=4096 or tensor_parallel_size=2; may be given several times.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32 or bfloat16.", show_default="float32 on CPU, bfloat16 on CUDA"),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.", show_default="cuda where there is one")] = None,
    attention: Annotated[
        str | None,
        typer.Option(
            help="Of the engine hf: sdpa or eager.", show_default="sdpa, or eager where the model's own does more"
        ),
    ] = None,
    store: Annotated[
        Path | None, typer.Option(help="Directory of operators.", show_default="the user's data directory")
    ] = None,
    listen: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Port 0 takes a free one.", show_default="127.0.0.1:50051")
    ] = None,
    metrics_host: Annotated[str | None, typer.Option(show_default="127.0.0.1")] = None,
    metrics_port: Annotated[int | None, typer.Option(help="Prometheus over HTTP; 0 is off.", show_default="0")] = None,
    http_host: Annotated[str | None, typer.Option(show_default="127.0.0.1")] = None,
    http_port: Annotated[
        int | None, typer.Option(help="OpenAI's API and the contract as JSON, over HTTP; 0 is off.", show_default="0")
    ] = None,
    http_names: Annotated[
        list[str] | None,
        typer.Option(
            "--http-name",
            metavar="NAME",
            help="A name of this machine under which HTTP may be asked; may be given several times.",
            show_default=False,
        ),
    ] = None,
    max_queue: Annotated[int | None, typer.Option(help="Requests that may wait.", show_default="32")] = None,
    max_running: Annotated[
        int | None, typer.Option(help="Requests that engine hf decodes at once, in turns.", show_default="16")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens of a text.", show_default="the context")] = None,
    max_total_tokens: Annotated[
        int | None, typer.Option(help="Most tokens of all texts of a request.", show_default="none")
    ] = None,
    max_time: Annotated[
        float | None, typer.Option(help="Most seconds of a request, waiting included.", show_default="none")
    ] = None,
    max_calls: Annotated[
        int | None, typer.Option(help="Calls under way at once; more are refused at once.", show_default="1024")
    ] = None,
    max_connections: Annotated[int | None, typer.Option(help="Connections of clients.", show_default="1024")] = None,
    max_dose: Annotated[
        float | None,
        typer.Option(help="Most that |λ|/2 of a request's operators adds up to at a layer.", show_default="1"),
    ] = None,
    operator_admin: Annotated[
        bool | None,
        typer.Option(
            "--operator-admin", help="Let clients upload, build, load, unload and delete operators.", show_default="off"
        ),
    ] = None,
    operator_memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="For operators beside the model, such as 4GiB.", show_default="4GiB"),
    ] = None,
    decode_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="For what requests in progress take on engine hf.", show_default="half of what is free"
        ),
    ] = None,
    traces: Annotated[
        bool | None,
        typer.Option(
            "--traces/--no-traces",
            help="Send OpenTelemetry traces, as OTEL_EXPORTER_OTLP_ENDPOINT and others say.",
            show_default="off",
        ),
    ] = None,
    tokens: Annotated[
        Path | None, typer.Option(help="File of tokens and what each may do.", show_default="nobody needs one")
    ] = None,
    grace: Annotated[
        float | None, typer.Option(help="Seconds for running requests when stopped.", show_default="10")
    ] = None,
    log_format: Annotated[str | None, typer.Option(help="console or json.", show_default="console")] = None,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    """Serve steered text generation. Every option is also read from the environment as STEER_NAME."""
    options = {name: value for name, value in locals().items() if value is not None and name != "version"}
    if version:
        print(f"steer-server {__version__}")
        return
    has_colors = sys.stderr is not None and sys.stderr.isatty()
    global _drain
    _drain = partial(drain_output, relay_output())
    atexit.register(_drain)
    try:
        if engine_args is not None:
            options["engine_args"] = read_engine_args(engine_args)
        config = ServerConfig(**options)
        _configure_logging(config, has_colors=has_colors)
        asyncio.run(_run_and_leave(config))
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        _fail(problems, code=2)
    except StartupError as error:
        _fail(str(error), code=1)


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
