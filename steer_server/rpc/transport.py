"""What gRPC itself allows: the options of the port, beneath every call."""

from __future__ import annotations

from steer_server.config import ServerConfig

_MAX_PENDING = 100_000
_HANDSHAKE_MS = 20_000
_YEAR_SECONDS = 365 * 24 * 3600


def channel_options(config: ServerConfig, *, max_connections: int, max_message_bytes: int) -> list[tuple[str, int]]:
    """gRPC's options of a server."""
    return [
        # Two servers on one port would share it silently; the second must fail.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", max_message_bytes),
        # A client that vanished without a word is noticed, and its work stops.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        # Clients may do the same, with or without a call: by default gRPC ends a connection that pings more than twice
        # in five minutes while nothing is sent, such as during one long unary call.
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        # Calls that have come in and are not yet taken by the event loop. gRPC would cancel some of those beyond a
        # thousand, and all that wait for half a minute, without a reason that a client could act on. They are few
        # enough, by the two limits below, and each is refused by name where it is one too many.
        ("grpc.server.max_pending_requests", _MAX_PENDING),
        ("grpc.server.max_pending_requests_hard_limit", _MAX_PENDING),
        ("grpc.server_max_unrequested_time_in_server", _YEAR_SECONDS),
        ("grpc.max_concurrent_streams", config.max_calls_per_connection),
        # Else gRPC also counts calls that have ended for the client and not yet for the server, and resets those that
        # the client then begins in their place.
        ("grpc.http.overload_protection", 0),
        ("grpc.max_allowed_incoming_connections", max_connections),
        ("grpc.server_handshake_timeout_ms", _HANDSHAKE_MS),
        ("grpc.max_connection_idle_ms", int(config.connection_idle * 1000)),
        ("grpc.max_connection_age_ms", int(config.connection_age * 1000)),
        # For the calls that run at that age. No text takes longer, and no other call needs to.
        ("grpc.max_connection_age_grace_ms", int(config.connection_age * 1000)),
    ]
