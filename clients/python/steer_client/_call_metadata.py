"""What is sent with every call: the token, and metadata for whatever stands between client and server.

Both may be secrets: none of their values is in a message or a `repr`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

from steer_client._errors import InvalidRequestError

Token: TypeAlias = str | Callable[[], str]

AUTHORIZATION: Final = "authorization"
# As RFC 6750 has it.
_TOKEN: Final = re.compile(r"[A-Za-z0-9._~+/-]+=*")
_KEY: Final = re.compile(r"[0-9a-z_.-]+")
_VALUE: Final = re.compile(r"[!-~](?:[ -~]*[!-~])?")
_OF_GRPC: Final = frozenset({"connection", "content-type", "host", "te", "user-agent"})
# gRPC takes 8 KiB of headers, its own among them.
_MAX_TOKEN, _MAX_METADATA = 4096, 2048


@dataclass(frozen=True, slots=True, repr=False)
class CallMetadata:
    """The token's source, and the pairs that stay the same."""

    #: Asked before each call, so that a renewed token is used at once; None: there is no token.
    token: Callable[[], str] | None
    pairs: tuple[tuple[str, str], ...]

    @property
    def has_credentials(self) -> bool:
        """Whether it must not be read on the way."""
        return self.token is not None or any(key == AUTHORIZATION for key, _ in self.pairs)

    def of_call(self) -> tuple[tuple[str, str], ...]:
        """As gRPC takes it. Raises InvalidRequestError where there is no token any more."""
        if self.token is None:
            return self.pairs
        return ((AUTHORIZATION, f"Bearer {self.token()}"), *self.pairs)


def call_metadata(
    token: Token | None, token_file: str | os.PathLike[str] | None, metadata: Mapping[str, str] | None
) -> CallMetadata:
    """Where neither is given, the token is that of STEER_TOKEN, or of the file STEER_TOKEN_FILE.

    Raises InvalidRequestError, whose `field` is the parameter.
    """
    pairs = _checked_pairs(metadata or {})
    source, name = _token_source(token, token_file)
    if source is not None and any(key == AUTHORIZATION for key, _ in pairs):
        raise InvalidRequestError(f"metadata: {AUTHORIZATION!r} is the header of {name}; give one", field="metadata")
    return CallMetadata(source, pairs)


def _token_source(
    token: Token | None, token_file: str | os.PathLike[str] | None
) -> tuple[Callable[[], str] | None, str]:
    """The source, and where it was named."""
    names = ("token", "token_file")
    if token is None and token_file is None:
        token, token_file = os.environ.get("STEER_TOKEN") or None, os.environ.get("STEER_TOKEN_FILE") or None
        names = ("STEER_TOKEN", "STEER_TOKEN_FILE")
    if token is not None and token_file is not None:
        raise InvalidRequestError(f"{names[0]}: give it or {names[1]}, not both", field="token")
    if token_file is not None:
        path = os.fspath(token_file)
        _from_file(path)
        return lambda: _from_file(path), names[1]
    if callable(token):
        given = token
        return lambda: _checked_token("token", given()), names[0]
    if token is not None:
        text = _checked_token(names[0], token)
        return lambda: text, names[0]
    return None, ""


def _from_file(path: str) -> str:
    # Read for each call: that takes some microseconds, and a file that was replaced is noticed whatever its times say.
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            text = file.read(_MAX_TOKEN + 3)
    except OSError as error:
        raise InvalidRequestError(f"token_file: cannot read {path!r}: {error.strerror}", field="token_file") from None
    return _checked_token(f"token_file: {path!r}", text.strip(), field="token_file")


def _checked_token(name: str, token: object, field: str = "token") -> str:
    if not isinstance(token, str):
        raise InvalidRequestError(f"{name}: is a {type(token).__name__}, and must be a text", field=field)
    if not token:
        raise InvalidRequestError(f"{name}: is empty", field=field)
    if len(token) > _MAX_TOKEN:
        raise InvalidRequestError(f"{name}: has more than {_MAX_TOKEN} characters", field=field)
    if not _TOKEN.fullmatch(token):
        problem = "has a character that no token has; it is letters, digits and -._~+/ alone, without 'Bearer'"
        raise InvalidRequestError(f"{name}: {problem}", field=field)
    return token


def _checked_pairs(metadata: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    pairs: list[tuple[str, str]] = []
    for name, value in metadata.items():
        key = name.lower() if isinstance(name, str) else ""
        if not _KEY.fullmatch(key) or key in _OF_GRPC or key.startswith("grpc-") or key.endswith("-bin"):
            problem = "is no key; it is letters, digits and -_. alone, none of gRPC's own, and does not end with -bin"
            raise InvalidRequestError(f"metadata: {name!r} {problem}", field="metadata")
        if key in dict(pairs):
            raise InvalidRequestError(f"metadata: {key!r} is given twice", field="metadata")
        if not isinstance(value, str) or not _VALUE.fullmatch(value):
            problem = "must be printable ASCII, with no space at either end"
            raise InvalidRequestError(f"metadata: the value of {key!r} {problem}", field="metadata")
        pairs.append((key, value))
    if (size := sum(len(key) + len(value) for key, value in pairs)) > _MAX_METADATA:
        raise InvalidRequestError(f"metadata: {size} characters; at most {_MAX_METADATA} are sent", field="metadata")
    return tuple(pairs)
