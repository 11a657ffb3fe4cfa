"""What gRPC's account of a connection that failed says of TLS, and what to do about it."""

from __future__ import annotations

from typing import Final

# By what gRPC's text has, in small letters; the first that it has is the cause. Each goes on from the target's name.
_CAUSES: Final = (
    ("certificate has expired", "has a certificate that has expired: it must be renewed there"),
    ("certificate is not yet valid", "has a certificate that is not valid yet: compare the clocks of both machines"),
    (
        "hostname verification check failed",
        "has a certificate for another name: ask it by a name of its certificate, or give that by server_name= "
        "(--server-name)",
    ),
    (
        "certificate_verify_failed",
        "has a certificate of an authority that is not trusted here: give that authority's by ca= (--ca, STEER_CA)",
    ),
    (
        "wrong_version_number",
        "does not speak TLS: is this the right port? For a server without TLS leave out tls= and ca= (--tls, --ca), "
        "and STEER_TLS and STEER_CA",
    ),
)
_FAILED: Final = ("failed to connect to all", "connections to all backends failing")
_CLOSED: Final = ("socket closed", "connection reset", "broken pipe")


def problem_of_tls(text: str, target: str) -> str | None:
    """What is wrong, if gRPC's `text` says that TLS is, in one line."""
    lower = text.lower()
    if not lower.startswith(_FAILED):
        return None
    for sign, problem in _CAUSES:
        if sign in lower:
            return f"{target} {problem}"
    if "handshake failed" in lower:
        return f"TLS with {target} failed: {text.rsplit('SSL_ERROR_SSL: ', 1)[-1]}"
    return None


def todo_when_closed(text: str, *, has_tls: bool) -> str | None:
    """What may help where whoever answered closed the connection at once, as `text` says."""
    lower = text.lower()
    if not (lower.startswith(_FAILED) and any(sign in lower for sign in _CLOSED)):
        return None
    if has_tls:
        return (
            "it hung up during TLS; does it ask for a client's certificate? Give one of an authority that it trusts by "
            "cert= and key= (--cert, --key)"
        )
    return "it hung up at once; does it speak TLS? Then tls=True (--tls)"
