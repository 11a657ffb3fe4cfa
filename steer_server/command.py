"""The command line of the server: loads a model and a store, and serves them over gRPC."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from pathlib import Path
from typing import Annotated

import structlog
import typer
from pydantic import ValidationError

from operators import __version__
from steer_server.config import ServerConfig
from steer_server.errors import StartupError, StoreUnreadableError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def serve(
    model: Annotated[
        str | None, typer.Option(help="Built-in name, Hugging Face id or local directory.", show_default="smollm2-135m")
    ] = None,
    engine: Annotated[str | None, typer.Option(help="hf.", show_default="hf")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32 or bfloat16.", show_default="float32 on CPU, bfloat16 on CUDA"),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.", show_default="cuda where there is one")] = None,
    store: Annotated[
        Path | None, typer.Option(help="Directory of operators.", show_default="the user's data directory")
    ] = None,
    listen: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Port 0 takes a free one.", show_default="127.0.0.1:50051")
    ] = None,
    metrics_host: Annotated[str | None, typer.Option(show_default="127.0.0.1")] = None,
    metrics_port: Annotated[int | None, typer.Option(help="Prometheus over HTTP; 0 is off.", show_default="0")] = None,
    max_queue: Annotated[int | None, typer.Option(help="Requests that may wait.", show_default="32")] = None,
    max_dose: Annotated[
        float | None,
        typer.Option(help="Most that the doses |strength|/2 of a request add up to at a layer.", show_default="1"),
    ] = None,
    grace: Annotated[
        float | None, typer.Option(help="Seconds for running requests when stopped.", show_default="10")
    ] = None,
    log_format: Annotated[str | None, typer.Option(help="console or json.", show_default="console")] = None,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    """Serve steered text generation. Every option is also read from the environment as STEER_NAME."""
    given = {name: value for name, value in locals().items() if value is not None and name != "version"}
    if version:
        print(f"steer-server {__version__}")
        return
    try:
        config = ServerConfig(**given)
        _configure_logging(config)
        asyncio.run(_run(config))
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        _fail(problems, code=2)
    except StartupError as error:
        _fail(str(error), code=1)


async def _run(config: ServerConfig) -> None:
    # Imported late: --help and a mistyped option should not wait for torch.
    from operators.errors import OperatorError
    from operators.models import load_model
    from operators.store import default_store
    from steer_server.engine.hf import HFEngine
    from steer_server.registry import Registry
    from steer_server.rpc.server import SteerServer

    log = structlog.get_logger("steer_server")
    device = config.device or _default_device()
    dtype = config.dtype or ("float32" if device == "cpu" else "bfloat16")
    directory = config.store or default_store()
    _check_free(config.listen)
    try:
        log.info("loading", model=config.model, dtype=dtype, device=device)
        engine = HFEngine(load_model(config.model, dtype=dtype, device=device), max_queue=config.max_queue)
        registry = Registry(directory, engine.model, max_bytes=config.max_artifact_bytes, max_dose=config.max_dose)
    except (OperatorError, StoreUnreadableError) as error:
        raise StartupError(str(error)) from error
    for entry in registry.entries():
        if entry.problem:
            log.warning("operator cannot be used", operator=entry.name, problem=entry.problem)
    server = SteerServer(engine, registry, config)
    try:
        port = await server.start()
        usable = sum(not entry.problem for entry in registry.entries())
        host = config.listen.rpartition(":")[0]
        log.info("serving", listen=f"{host}:{port}", operators=usable, store=str(directory))
        await server.serve_until_signalled()
    finally:
        await engine.close()


def _check_free(listen: str) -> None:
    """Says before the model is loaded that a port is taken; binding it for good comes after."""
    host, _, port = listen.rpartition(":")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            # As the server will: a port whose last connections are still closing is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise StartupError(f"cannot listen on {listen}: {reason} (--listen HOST:0 takes a free port)") from error


def _default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _configure_logging(config: ServerConfig) -> None:
    renderer = (
        structlog.processors.JSONRenderer()
        if config.log_format == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
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


def _fail(message: str, *, code: int) -> None:
    print(f"steer-server: {message}", file=sys.stderr)
    # The decoding thread holds no state worth saving, and a start that failed must end at once.
    sys.stderr.flush()
    os._exit(code)
