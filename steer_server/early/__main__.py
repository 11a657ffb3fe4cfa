"""The process: ``python -m steer_server.early JSON``. Prints "open" when it listens, or what it cannot listen on."""

from __future__ import annotations

import asyncio
import ctypes
import json
import signal
import sys
from collections.abc import Callable
from functools import partial
from inspect import isawaitable
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from steer_server.access.certificates import Certificates, read_certificates
from steer_server.early.ports import OPEN, EarlyPorts
from steer_server.errors import LoadingError
from steer_server.lifecycle import Lifecycle
from steer_server.rpc.status import status_of
from steer_server.small_http import Answer, SmallHttp

_OPTIONS = (
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", 4096),
    ("grpc.max_concurrent_streams", 64),
    ("grpc.max_allowed_incoming_connections", 1024),
    ("grpc.max_connection_age_ms", 60_000),
    ("grpc.server_handshake_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
)
_LAST_WRITES = 0.1
"""Seconds for what has been answered to leave the socket."""
_PR_SET_PDEATHSIG = 1
_LOADING = LoadingError()
_PAGE = b"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="refresh" content="2">
<title>Steering, side by side</title>
<style>
:root { color-scheme: light dark; }
body { font: 16px system-ui, sans-serif; margin: 20vh auto; max-width: 30em; padding: 0 1em; }
</style>
<p>The server is loading its model. This page opens by itself when it is ready.</p>
</html>
"""


class _Refuse(grpc.GenericRpcHandler):
    """Refuses every call but those of the health service, before its message is read."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        async def refuse(_requests: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            await context.abort_with_status(status_of(_LOADING))

        return None if _is_health(handler_call_details.method) else grpc.stream_stream_rpc_method_handler(refuse)


def _is_health(method: str) -> bool:
    return method.startswith(f"/{health.SERVICE_NAME}/")


async def serve(ports: EarlyPorts) -> list[Callable[[], object]]:
    """Listens on all ports, and returns what closes each. Raises :class:`OSError` where one is taken."""
    lifecycle, closers = Lifecycle(), list[Callable[[], object]]()
    files = [Path(file).read_bytes() for file in ports.certificates]
    certificates = read_certificates(*files) if files else None
    if ports.grpc:
        server = grpc.aio.server(options=_OPTIONS)
        states = health.aio.HealthServicer()
        for name in ports.services:
            held = lifecycle.holds(name)
            await states.set(name, getattr(health_pb2.HealthCheckResponse, "SERVING" if held else "NOT_SERVING"))
        health_pb2_grpc.add_HealthServicer_to_server(states, server)
        server.add_generic_rpc_handlers((_Refuse(),))
        for address in ports.grpc:
            try:
                if certificates is not None:
                    server.add_secure_port(address, _credentials(certificates))
                else:
                    server.add_insecure_port(address)
            except RuntimeError as error:
                raise OSError(f"cannot listen on {address}: the port is in use") from error
        await server.start()
        closers.append(partial(server.stop, _LAST_WRITES))
    for address, is_door in ports.http:
        body = json.dumps({"error": {"message": str(_LOADING), "type": "server_error", "code": "LOADING"}}).encode()
        paths = {"/": _loading_page} if is_door else {}
        answers = SmallHttp(lifecycle, paths, other=("503 Service Unavailable", "application/json", body))
        host, _, port = address.rpartition(":")
        context = certificates.context if is_door and certificates is not None else None
        try:
            await answers.start(host.strip("[]"), int(port), context)
        except OSError as error:
            raise OSError(f"cannot listen on {address}: {error.strerror}") from error
        closers.append(answers.close)
    return closers


async def _loading_page(_accept: str) -> Answer:
    return "503 Service Unavailable", "text/html; charset=utf-8", _PAGE


def _credentials(files: Certificates) -> grpc.ServerCredentials:
    return grpc.ssl_server_credentials(
        [(files.key, files.certificate)],
        root_certificates=files.client_authority,
        require_client_auth=files.client_authority is not None,
    )


async def _main(ports: EarlyPorts) -> None:
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    try:
        closers = await serve(ports)
    except OSError as error:
        print(" ".join(str(error).split()), flush=True)
        sys.exit(1)
    print(OPEN, flush=True)
    await stopped.wait()
    await asyncio.gather(*(ending for close in closers if isawaitable(ending := close())))


if __name__ == "__main__":
    # It ends with the server, however that ends; and Ctrl-C is the server's business.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asyncio.run(_main(EarlyPorts.from_json(sys.argv[1])))
