"""TLS of a client: the files it is told of, as gRPC's credentials."""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping
from typing import Final, TypeAlias

import grpc

from steer_client._errors import InvalidRequestError

PathLike: TypeAlias = "str | os.PathLike[str]"
_MAX_BYTES: Final = 1 << 20
_YES, _NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


def channel_credentials(tls: bool | None, files: Mapping[str, PathLike | None]) -> grpc.ChannelCredentials | None:
    """gRPC's credentials of the files ca, cert and key; None is plaintext.

    What is not given is taken from STEER_TLS, STEER_CA, STEER_CERT and STEER_KEY. `tls=None` is TLS where there is one
    of the files. Raises InvalidRequestError, whose `field` is the parameter, for files that are not as they must be.
    """
    named = [name for name, path in files.items() if path is not None]
    if tls is False and named:
        raise InvalidRequestError(f"{named[0]}: is for TLS, which tls=False excludes", field=named[0])
    if tls is None and not named:
        tls = _flag("STEER_TLS")
    paths = {
        name: path if path is not None else os.environ.get(f"STEER_{name.upper()}") or None
        for name, path in files.items()
    }
    if not (any(paths.values()) if tls is None else tls):
        return None
    for name, other in (("cert", "key"), ("key", "cert")):
        if paths[name] and not paths[other]:
            raise InvalidRequestError(f"{other}: a client's certificate needs both cert and key", field=other)
    contents = {name: _read(name, path) for name, path in paths.items() if path}
    _check(paths, contents)
    return grpc.ssl_channel_credentials(contents.get("ca"), contents.get("key"), contents.get("cert"))


def _flag(variable: str) -> bool | None:
    written = os.environ.get(variable, "").lower()
    if written not in ("", *_YES, *_NO):
        raise InvalidRequestError(f"{variable}: {written!r} is none of {', '.join((*_YES, *_NO))}", field="tls")
    return written in _YES if written else None


def _read(name: str, path: PathLike) -> bytes:
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise InvalidRequestError(f"{name}: cannot read {os.fspath(path)!r}: {error.strerror}", field=name) from None
    if len(content) > _MAX_BYTES:
        raise InvalidRequestError(f"{name}: {os.fspath(path)!r} is longer than {_MAX_BYTES} bytes", field=name)
    return content


def _check(paths: Mapping[str, PathLike | None], contents: Mapping[str, bytes]) -> None:
    """gRPC itself would take any bytes, and fail at the first call without saying why."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if "ca" in contents:
        try:
            context.load_verify_locations(cadata=contents["ca"].decode("ascii", "replace"))
        except ssl.SSLError:
            raise InvalidRequestError(f"ca: {paths['ca']!s} has no certificate in PEM", field="ca") from None
    if "key" in contents:
        if b"ENCRYPTED" in contents["key"]:
            problem = f"key: {paths['key']!s} asks for a passphrase, which gRPC cannot give"
            raise InvalidRequestError(problem, field="key")
        try:
            context.load_cert_chain(str(paths["cert"]), str(paths["key"]), password="")
        except (ssl.SSLError, OSError):
            problem = f"cert: {paths['cert']!s} and {paths['key']!s} are no certificate and its private key in PEM"
            raise InvalidRequestError(problem, field="cert") from None
