"""One run of the server: loads a model and a store, and serves them over gRPC, and HTTP where that is asked for."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import structlog

from steer_server.access.setup import open_tokens
from steer_server.config import ServerConfig
from steer_server.engines import ENGINES
from steer_server.errors import StartupError, StoreUnreadableError

if TYPE_CHECKING:
    from steer_server.rpc.parts import Door
    from steer_server.tracing.base import Tracing


async def run(config: ServerConfig) -> None:
    """Serves until a signal comes.

    Raises:
        StartupError: something that was configured cannot be had.
        EngineDiedError: the engine can no longer decode anything.
    """
    # Imported late: --help and a mistyped option should not wait for torch.
    from operators.core.errors import OperatorError
    from operators.core.store import Store
    from operators.model.unembedding import find_unembedding
    from steer_server.admin.operator_admin import OperatorAdmin
    from steer_server.registry import Registry
    from steer_server.rpc.server import SteerServer
    from steer_server.words import WordDirections

    log = structlog.get_logger("steer_server")
    tokens = open_tokens(config)
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
    if config.http_port:
        _check_port(f"{config.http_host}:{config.http_port}", "--http-port")
    trace = _traces(config)
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
        # Not before the engine: its processes are forked, and this starts a thread.
        tracing = trace(engine.model.model)
        admin = OperatorAdmin(config, store, registry, engine.model) if config.operator_admin else None
        server = SteerServer(engine, registry, config, _doors(config), tokens, tracing, admin)
        port = await server.start()
        usable = sum(not entry.problem for entry in registry.entries())
        host = config.listen.rpartition(":")[0]
        http = {"http": f"{config.http_host}:{config.http_port}"} if config.http_port else {}
        log.info("serving", listen=f"{host}:{port}", **http, operators=usable, store=str(store.path))
        await server.serve_until_signalled()
    except StoreUnreadableError as error:
        raise StartupError(str(error)) from error
    finally:
        await engine.close()


def _doors(config: ServerConfig) -> Sequence[Door]:
    if not config.http_port:
        return ()
    from steer_server.http.door import HttpDoor

    return (HttpDoor(config.http_host, config.http_port, config.http_names),)


def _traces(config: ServerConfig) -> Callable[[str], Tracing]:
    """Begins to trace. Raises :class:`StartupError` before there is a model, where that is not possible."""
    from steer_server.tracing.base import NO_TRACING
    from steer_server.tracing.export import choose_tracing

    return choose_tracing() if config.traces else lambda _model: NO_TRACING


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
