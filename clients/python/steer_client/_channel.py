"""Where the servers are, and the gRPC channel to them."""

from __future__ import annotations

import ipaddress
import json
import os
import re
from collections.abc import Callable
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2_grpc
from steering.v1 import generation_pb2_grpc, operator_admin_pb2_grpc, operators_pb2_grpc

from steer_client._defaults import DEFAULT_TARGET
from steer_client._errors import InvalidRequestError
from steer_client._trace_context import trace_metadata

_HOST_AND_PORT: Final = re.compile(r"(\[[0-9a-fA-F:.%]+\]|[^\s:/]+):[0-9]{1,5}")
# Names that gRPC resolves by other rules: unix:PATH, dns:///NAME, ...
_NAME_SCHEME: Final = re.compile(r"(unix|unix-abstract|vsock|dns|ipv4|ipv6|xds):.")
# Those that may stand for several servers and bring no load balancing rules of their own, as xds does.
_MANY_SCHEME: Final = re.compile(r"(dns|ipv4|ipv6):")

# Log-probabilities make an answer longer than the 4 MiB that gRPC accepts by default.
_ANY_LENGTH: Final = ("grpc.max_receive_message_length", -1)
# A proxy named by http_proxy is asked for this machine too unless no_proxy says otherwise, and cannot reach it.
_NO_PROXY: Final = ("grpc.enable_http_proxy", 0)
# gRPC does not retry a request longer than this, by default 256 KiB. Here: the 16 MiB that a server accepts at most,
# and 1 MiB for headers.
_RETRIED_LENGTH: Final = ("grpc.per_rpc_retry_buffer_size", 17 << 20)
# Requests go to the servers in turn, skipping those whose health service says that they do not serve. A request that
# fails before the server began to answer, because it stops or is gone, is sent to the next server, once: a request
# that crashes servers must not go round all of them.
_ROUND_ROBIN: Final = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "healthCheckConfig": {"serviceName": ""},
    "methodConfig": [
        {
            "name": [{}],
            "retryPolicy": {
                "maxAttempts": 2,
                "initialBackoff": "0.1s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
}


class Stubs:
    """The contract's services over one channel, sync or async."""

    def __init__(
        self, channel: grpc.Channel | grpc.aio.Channel, metadata: Callable[[], tuple[tuple[str, str], ...]]
    ) -> None:
        """`metadata` is asked before each call for what is sent beside it."""
        self._metadata = metadata
        self._services: dict[str, Any] = {
            "generation": generation_pb2_grpc.GenerationServiceStub(channel),
            "operators": operators_pb2_grpc.OperatorServiceStub(channel),
            "admin": operator_admin_pb2_grpc.OperatorAdminServiceStub(channel),
            "health": health_pb2_grpc.HealthStub(channel),
        }

    def method(self, service: str, method: str) -> Any:
        """The callable that sends a request to `method`, a name in the contract, as a part of the active trace.

        Where the client's own metadata name a trace, of that one. It takes the request and `timeout`, in seconds.
        """
        send, trace = getattr(self._services[service], method), trace_metadata()

        def call(request: Any, *, timeout: float | None) -> Any:
            given = self._metadata()
            names = {name for name, _ in given}
            traced = () if names.intersection(name for name, _ in trace) else trace
            return send(request, timeout=timeout, metadata=(*given, *traced))

        return call


def target_or_default(target: str | None) -> str:
    """`target` if given, else STEER_TARGET, else this machine. Raises InvalidRequestError if it has no port."""
    found = target or os.environ.get("STEER_TARGET") or DEFAULT_TARGET
    # Without a port gRPC would silently use 443.
    if not (_HOST_AND_PORT.fullmatch(found) or _NAME_SCHEME.match(found)):
        raise InvalidRequestError(
            f"target: {found!r} is not HOST:PORT, such as {DEFAULT_TARGET} or [::1]:50051, nor several servers, such "
            "as ipv4:10.0.0.1:50051,10.0.0.2:50051 or dns:///steer:50051",
            field="target",
        )
    return found


def is_local(target: str) -> bool:
    """Whether the target is on this machine, all of it."""
    scheme, colon, rest = target.partition(":")
    if colon and scheme in ("unix", "unix-abstract"):
        return True
    addresses, authority = target, ""
    if _MANY_SCHEME.match(target):
        # dns://AUTHORITY/NAME: the authority is who is asked for the name's addresses.
        authority, _, name = rest.removeprefix("//").partition("/")
        authority, addresses = (authority, name) if rest.startswith("//") else ("", rest)
    hosts = {each.strip().rpartition(":")[0].strip("[]").lower() for each in addresses.split(",")}
    # What "localhost" is for another name server, it alone knows; and a vsock may lead to another virtual machine.
    return all((host == "localhost" and not authority) or _is_loopback(host) for host in hosts)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_many(target: str) -> bool:
    """Whether the target may stand for several servers: dns:///NAME:PORT, ipv4:HOST:PORT,HOST:PORT, or ipv6:."""
    return _MANY_SCHEME.match(target) is not None


def channel_options(target: str, server_name: str | None = None) -> tuple[tuple[str, Any], ...]:
    """gRPC's options for a channel to the target; several servers get requests in turn.

    `server_name` is what their certificates are checked against, in place of the target's host.
    """
    named = (("grpc.default_authority", server_name),) if server_name else ()
    common = (_ANY_LENGTH, *((_NO_PROXY,) if is_local(target) else ()), *named)
    if not is_many(target):
        return common
    return (*common, _RETRIED_LENGTH, ("grpc.service_config", json.dumps(_ROUND_ROBIN)))
