"""Holding the server's ports while its engine loads."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from steer_server.config import ServerConfig
from steer_server.early.ports import OPEN, EarlyPorts
from steer_server.errors import StartupError
from steer_server.lifecycle import LIVE, READY, STARTED

_SECONDS = 5.0
"""For the process to end."""


def early_ports(config: ServerConfig, services: tuple[str, ...]) -> EarlyPorts:
    """Those ports of a configuration that can be known before it is served: not port 0."""
    http = ((config.metrics_host, config.metrics_port, False), (config.http_host, config.http_port, True))
    rpc = (config.listen, config.admin_listen)
    files = (config.tls_cert, config.tls_key, config.tls_client_ca)
    return EarlyPorts(
        grpc=tuple(each for each in rpc if each is not None and not each.endswith(":0")),
        http=tuple((f"{host}:{port}", is_door) for host, port, is_door in http if port),
        services=("", LIVE, READY, STARTED, *services),
        certificates=tuple(str(file) for file in files if file is not None),
    )


@contextmanager
def answered(ports: EarlyPorts) -> Iterator[None]:
    """While the block runs, somebody answers on these ports that the server is not ready; at its end they are free.

    Raises:
        StartupError: one of them is taken.
    """
    if not (ports.grpc or ports.http):
        yield
        return
    command = [sys.executable, "-P", "-m", "steer_server.early", ports.to_json()]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    # Not asyncio's: it would start a thread, and vLLM forks.
    process = subprocess.Popen(  # noqa: S603
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None  # noqa: S101 - for the type checker
        said = process.stdout.readline().strip()
        if said != OPEN:
            raise StartupError(said or f"the process that answers while the model loads ended: {process.wait()}")
        yield
    finally:
        process.terminate()
        try:
            process.wait(_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
