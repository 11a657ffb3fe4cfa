"""A new token: its hash goes into the file, and the token itself to whoever asked for it, once."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from steer_server.access.token_file import NAME, TokenFileError, read_tokens
from steer_server.errors import StartupError

_BYTES = 32
_MODE = 0o640
"""What is kept of the mode that a file had: nobody else may read or write it."""


def add_token(path: Path, name: str, settings: Mapping[str, Any]) -> str:
    """Adds ``[tokens.NAME]`` to a file, which is made where there is none, and returns the token.

    ``settings``: the keys of the entry but for its hash; None is left out. The file is replaced in one step, and what
    was in it stays as it was written. Raises :class:`StartupError` where the file, before or after, cannot be used.
    """
    token, digest = _make()
    lines = [f"[tokens.{name if '.' not in name else json.dumps(name)}]", f'sha256 = "{digest}"']
    lines += [f"{key} = {_toml(value)}" for key, value in settings.items() if value is not None]

    def change(text: str) -> str:
        if text and name in read_tokens(text.encode()).entries:
            raise TokenFileError(f"has [tokens.{name}] already (--renew gives it a new token)")
        return (text.rstrip("\n") + "\n\n" if text.strip() else "") + "\n".join(lines) + "\n"

    if not NAME.fullmatch(name):
        raise StartupError(f"a token may not be named {name!r}; letters, digits, '.', '_' and '-', at most 64")
    _change(path, change)
    return token


def renew_token(path: Path, name: str) -> str:
    """Gives an entry another token, which is returned; the old one ends. Raises as :func:`add_token` does."""
    token, digest = _make()

    def change(text: str) -> str:
        entry = read_tokens(text.encode()).entries.get(name)
        if entry is None:
            raise TokenFileError(f"has no [tokens.{name}]")
        # No other entry has the same hash, nor has anything else 64 such digits.
        return text.replace(entry.sha256, digest)

    _change(path, change)
    return token


def _make() -> tuple[str, str]:
    token = f"steer_{secrets.token_urlsafe(_BYTES)}"
    return token, sha256(token.encode()).hexdigest()


def _toml(value: Any) -> str:
    if isinstance(value, datetime):
        return value.isoformat()
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)


def _change(path: Path, change: Callable[[str], str]) -> None:
    try:
        # Where it is a link, the file that it leads to.
        path = path.resolve()
        with _alone_in(path.parent):
            text = path.read_text() if path.exists() else ""
            changed = change(text).encode()
            read_tokens(changed)
            _replace(path, changed)
    except (TokenFileError, UnicodeDecodeError) as error:
        raise StartupError(f"tokens {path} {error}") from None
    except OSError as error:
        raise StartupError(f"tokens {path} cannot be changed: {error.strerror}") from error


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Others that add a token to a file of this folder wait."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _replace(path: Path, content: bytes) -> None:
    # Made with mode 0600. Whoever owned the file and could read it still does: a server that runs as another user, or
    # reads it through its group, would go on with the old one, and a token that was renewed would end nowhere.
    descriptor, made = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            before = path.stat()
            try:
                os.chown(made, before.st_uid, before.st_gid)
            except PermissionError:
                found = f"{before.st_uid}:{before.st_gid}"
                raise TokenFileError(
                    f"belongs to {found}, which only that user or root can keep it; change it as one"
                ) from None
            os.chmod(made, stat.S_IMODE(before.st_mode) & _MODE | 0o600)
        Path(made).replace(path)
    except BaseException:
        Path(made).unlink(missing_ok=True)
        raise
