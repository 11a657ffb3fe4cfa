"""The file of tokens: a table for each name, with the hash of its token and what it may do."""

from __future__ import annotations

import hmac
import re
import tomllib
from dataclasses import dataclass
from hashlib import sha256
from typing import Annotated, Any

from pydantic import AfterValidator, AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from steer_server.access.scopes import ADMIN, Scope

TOKEN = re.compile(r"steer_[A-Za-z0-9_-]{43}")
"""A token: 32 random bytes. Nothing else is even hashed, so that no password of a person can be one."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MAX_TOKENS = 1000
_MAX_SHOWN = 64
_SHOWN = ("scopes", "operators", "requests_per_minute", "tokens_per_minute", "queue_share", "expires")
"""Keys whose values an error may repeat: of others it might be a token that was put into the wrong place."""


class TokenFileError(ValueError):
    """The file cannot be used; says where and why, and never what a token is."""


def _check_hash(value: Any) -> Any:
    if isinstance(value, str) and TOKEN.fullmatch(value.strip()):
        raise ValueError("is a token; its SHA-256 belongs here (steer-server token makes both)")
    if not isinstance(value, str) or not re.fullmatch(r"[0-9a-f]{64}", value):
        raise ValueError("is no SHA-256; 64 digits of 0-9 and a-f are accepted")
    return value


def _unique(value: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(value)) < len(value):
        raise ValueError("has a value twice")
    return value


_Rate = Annotated[int, Field(ge=1, le=10**12)]


class TokenEntry(BaseModel):
    """One table of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    sha256: Annotated[str, BeforeValidator(_check_hash)]
    scopes: Annotated[tuple[Scope, ...], Field(min_length=1, strict=False), AfterValidator(_unique)]
    operators: Annotated[tuple[str, ...], Field(max_length=10_000, strict=False), AfterValidator(_unique)] | None = None
    requests_per_minute: _Rate | None = None
    tokens_per_minute: _Rate | None = None
    queue_share: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    expires: AwareDatetime | None = None


@dataclass(frozen=True)
class TokenTable:
    """The tokens of one reading of the file, by name."""

    entries: dict[str, TokenEntry]

    def name_of(self, token: str) -> str | None:
        """Whose it is; None where nobody's. Takes as long whichever it is, and however much of it is right."""
        if not TOKEN.fullmatch(token):
            return None
        given, found = sha256(token.encode()).hexdigest(), None
        for name, entry in self.entries.items():
            if hmac.compare_digest(entry.sha256, given):
                found = name
        return found


def read_tokens(data: bytes) -> TokenTable:
    """The table in a file. Raises :class:`TokenFileError`."""
    try:
        content = tomllib.loads(data.decode())
    except UnicodeDecodeError:
        raise TokenFileError("is not UTF-8") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise TokenFileError(f"is not TOML: {error}") from None
    if unknown := content.keys() - {"tokens"}:
        raise TokenFileError(f"has {_cut(min(unknown))}, which is not known; [tokens.NAME] is accepted")
    tables = content.get("tokens")
    if not isinstance(tables, dict) or not tables:
        raise TokenFileError("has no [tokens.NAME]: nobody could call (steer-server token adds one)")
    if len(tables) > MAX_TOKENS:
        raise TokenFileError(f"has {len(tables)} tokens; at most {MAX_TOKENS} are accepted")
    entries = {name: _entry(name, table) for name, table in tables.items()}
    owners: dict[str, str] = {}
    for name, entry in entries.items():
        if other := owners.get(entry.sha256):
            raise TokenFileError(f"has the same sha256 in [tokens.{other}] and [tokens.{name}]")
        owners[entry.sha256] = name
    return TokenTable(entries)


def _entry(name: str, table: Any) -> TokenEntry:
    if not NAME.fullmatch(name):
        accepted = "letters, digits, '.', '_' and '-', at most 64, the first a letter or digit"
        raise TokenFileError(f"has a token named {_cut(name)}; accepted: {accepted}")
    if not isinstance(table, dict):
        raise TokenFileError(f"tokens.{name}: is no table; [tokens.{name}] is accepted")
    try:
        entry = TokenEntry(**table)
    except ValidationError as error:
        # One of each key: of a list with a bad item, it also says that too few are left.
        first = {each["loc"][:1]: each for each in reversed(error.errors())}
        raise TokenFileError("; ".join(_problem(name, each) for each in reversed(first.values()))) from None
    if ADMIN in entry.scopes and entry.operators is not None:
        raise TokenFileError(
            f"tokens.{name}.operators: is given beside the scope {ADMIN!r}, whose calls are of the whole store; "
            "one of the two is accepted"
        )
    return entry


def _problem(name: str, error: Any) -> str:
    key = str(error["loc"][0]) if error["loc"] else ""
    where = ".".join(map(str, ("tokens", name, *error["loc"])))[: 4 * _MAX_SHOWN]
    if error["type"] == "extra_forbidden":
        return f"{where}: is not known; accepted: {', '.join(TokenEntry.model_fields)}"
    if error["type"] == "missing":
        return f"{where}: is missing"
    given = f" (is {_cut(error['input'])})" if key in _SHOWN else ""
    return f"{where}: {error['msg'].removeprefix('Value error, ')}{given}"


def _cut(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "…"
