"""The command line of the server: loads a model and a store, and serves them over gRPC."""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import socket
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import structlog
import typer
from pydantic import ValidationError

from operators.core.version import __version__
from steer_server.config import ServerConfig
from steer_server.engine.vllm.options import read_engine_args
from steer_server.errors import EngineDiedError, StartupError, StoreUnreadableError
from steer_server.log_relay import drain_output, relay_output

if TYPE_CHECKING:
    from operators.core.header import DTypeName
    from operators.model.checkpoint_files import CheckpointFiles
    from steer_server.engine.base import Engine

    Started = tuple[Engine, CheckpointFiles | None]

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
        await _run(config)
    except StartupError as error:
        _fail(str(error), code=1)
    except EngineDiedError as error:
        _fail(str(error), code=3)
    # From here, within the event loop: leaving it waits for threads, and the interpreter's end aborts the process where
    # one of them is in a forward pass. None has state to save.
    _leave(0)


async def _run(config: ServerConfig) -> None:
    # Imported late: --help and a mistyped option should not wait for torch.
    from operators.core.errors import OperatorError
    from operators.core.store import Store
    from operators.model.unembedding import find_unembedding
    from steer_server.registry import Registry
    from steer_server.rpc.server import SteerServer
    from steer_server.words import WordDirections

    log = structlog.get_logger("steer_server")
    device = config.device or _default_device()
    dtype = config.dtype or ("float32" if device == "cpu" else "bfloat16")
    store = Store.default() if config.store is None else Store(config.store)
    if config.store is not None and not store.path.is_dir():
        # The default one is made by the first operator that is saved; another one is more likely mistyped.
        found = "is not a directory" if store.path.exists() else "does not exist"
        raise StartupError(f"store {store.path} {found} (--store, or STEER_STORE, names another; mkdir makes it)")
    _check_port(config.listen, "--listen")
    if config.metrics_port:
        _check_port(f"{config.metrics_host}:{config.metrics_port}", "--metrics-port")
    try:
        log.info("loading", model=config.model, engine=config.engine, dtype=dtype, device=device)
        engine, files = await ENGINES[config.engine](config, dtype, device)
    except OperatorError as error:
        raise StartupError(str(error)) from error
    try:
        registry = Registry(
            store,
            engine.model,
            max_bytes=config.max_artifact_bytes,
            max_dose=config.max_dose,
            words=WordDirections(partial(find_unembedding, config.model, files), engine.tokenizer),
        )
        for entry in registry.entries():
            if entry.problem:
                log.warning("operator cannot be used", operator=entry.name, problem=entry.problem)
        server = SteerServer(engine, registry, config)
        port = await server.start()
        usable = sum(not entry.problem for entry in registry.entries())
        host = config.listen.rpartition(":")[0]
        log.info("serving", listen=f"{host}:{port}", operators=usable, store=str(store.path))
        await server.serve_until_signalled()
    except StoreUnreadableError as error:
        raise StartupError(str(error)) from error
    finally:
        await engine.close()


async def _start_hf(config: ServerConfig, dtype: DTypeName, device: str) -> Started:
    from operators.model.loading import load_model
    from steer_server.engine.hf.engine import HFEngine
    from steer_server.engine.hf.self_test import check_steering

    if config.engine_args:
        raise StartupError("engine_args are options of vLLM; they go with --engine vllm")
    loaded = load_model(config.model, dtype=dtype, device=device, attention=config.attention)
    check_steering(loaded)
    engine = HFEngine(
        loaded,
        max_queue=config.max_queue,
        max_running=config.max_running,
        operator_memory=config.operator_memory,
        decode_memory=config.decode_memory,
    )
    return engine, loaded.files


async def _start_vllm(config: ServerConfig, dtype: DTypeName, _device: str) -> Started:
    if config.attention:
        raise StartupError(
            "attention goes with --engine hf; vLLM's is chosen with --engine-args attention_backend=NAME"
        )
    from operators.model.loading import load_model
    from steer_server.engine.vllm.limits import check_device

    try:
        from steer_server.engine.vllm.engine import VLLMEngine
        from steer_server.engine.vllm.engine_config import DEVICE
    except ImportError as error:
        raise StartupError(
            f"engine 'vllm' needs vLLM 0.32, which cannot be imported: {error} (see the README, or use --engine hf)"
        ) from error
    try:
        check_device(config.device, DEVICE)
    except ValueError as error:
        raise StartupError(str(error)) from error
    # On the CPU, whatever vLLM runs on: only for its fingerprints and one short prompt of the self-test.
    loaded = load_model(config.model, dtype=dtype, device="cpu")
    assert loaded.files is not None  # noqa: S101 - for the type checker; what was loaded by its name has files
    try:
        engine = await VLLMEngine.start(
            loaded,
            # Not its name, which may mean another file or version by now.
            str(loaded.files.directory),
            dtype=dtype,
            max_queue=config.max_queue,
            operator_memory=config.operator_memory if "operator_memory" in config.model_fields_set else None,
            engine_args=config.engine_args,
        )
        return engine, loaded.files
    except asyncio.CancelledError:
        # Ctrl-C. The thread in which vLLM loads a model cannot be stopped; vLLM's processes end when this one does.
        _fail("interrupted", code=130)


ENGINES: dict[str, Callable[[ServerConfig, DTypeName, str], Awaitable[Started]]] = {
    "hf": _start_hf,
    "vllm": _start_vllm,
}


def _check_port(listen: str, option: str) -> None:
    """Raises :class:`StartupError` for a port that is taken, before the model is loaded; it is not kept bound."""
    host, _, port = listen.rpartition(":")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            # As the server sets it: a port of which only closing connections are left counts as free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise StartupError(f"cannot listen on {listen}: {reason} ({option} takes another)") from error


def _default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


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
