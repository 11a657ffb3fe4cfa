"""One run of the server: loads a model and a store, and serves them over gRPC, and HTTP where that is asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import structlog

from steer_server.access.setup import open_access
from steer_server.allocator import return_freed_memory, settle
from steer_server.checks.ports import addresses, check_port
from steer_server.choices import device_of, dtype_of, store_of
from steer_server.config import ServerConfig
from steer_server.early.holding import answered, early_ports
from steer_server.engines import ENGINES
from steer_server.errors import StartupError, StoreUnreadableError
from steer_server.parallel import others_work_on_one_core

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
    from operators.model.unembedding import find_unembedding
    from steer_server.admin.operator_admin import OperatorAdmin
    from steer_server.registry import Registry
    from steer_server.rpc.operator_admin import ADMIN_SERVICE
    from steer_server.rpc.server import SERVICES, SteerServer
    from steer_server.words import WordDirections

    log = structlog.get_logger("steer_server")
    access = open_access(config)
    device = device_of(config)
    dtype = dtype_of(config, device)
    store = store_of(config)
    for option, address in addresses(config).items():
        check_port(address, option)
    trace = _traces(config)
    ports = early_ports(config, (*SERVICES, ADMIN_SERVICE) if config.operator_admin else SERVICES)
    engine = None
    try:
        with answered(ports):
            log.info("loading", model=config.model, engine=config.engine, dtype=dtype, device=device)
            engine, files = await ENGINES[config.engine](config, dtype, device)
            others_work_on_one_core()
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
        server = SteerServer(engine, registry, config, _doors(config), access, tracing, admin)
        settle()
        port = await server.start()
        usable = sum(not entry.problem for entry in registry.entries())
        host = config.listen.rpartition(":")[0]
        http = {"http": f"{config.http_host}:{config.http_port}"} if config.http_port else {}
        log.info("serving", listen=f"{host}:{port}", **http, **_guards(config), operators=usable, store=str(store.path))
        returning = asyncio.ensure_future(return_freed_memory())
        try:
            await server.serve_until_signalled()
        finally:
            returning.cancel()
    except (OperatorError, StoreUnreadableError) as error:
        raise StartupError(str(error)) from error
    finally:
        if engine is not None:
            await engine.close()


def _doors(config: ServerConfig) -> Sequence[Door]:
    if not config.http_port:
        return ()
    from steer_server.http.door import HttpDoor

    return (HttpDoor(config.http_host, config.http_port, config.http_names),)


def _guards(config: ServerConfig) -> dict[str, str]:
    """What asks callers who they are, for the log."""
    tls = "off" if config.tls_cert is None else "on" if config.tls_client_ca is None else "mutual"
    admin = {"admin": config.admin_listen} if config.admin_listen else {}
    return {"tls": tls, "tokens": "off" if config.tokens is None else "on", **admin}


def _traces(config: ServerConfig) -> Callable[[str], Tracing]:
    """Begins to trace. Raises :class:`StartupError` before there is a model, where that is not possible."""
    from steer_server.tracing.base import NO_TRACING
    from steer_server.tracing.export import choose_tracing

    return choose_tracing() if config.traces else lambda _model: NO_TRACING
