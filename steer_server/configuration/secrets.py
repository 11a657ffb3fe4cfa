"""What must not be printed: values that are credentials by their name, and passwords within addresses."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MASK = "***"
_WORDS = frozenset(
    {
        *("token", "secret", "password", "passwd", "passphrase", "credential", "credentials", "authorization"),
        *("key", "keys", "apikey", "auth", "bearer", "cookie", "pat"),
    }
)
"""A name that has one of these as a word is that of a secret: ``hf_token``, not ``max_tokens`` or ``tokenizer``."""
_USER = re.compile(r"(?<=://)([^/@\s:]*):[^/@\s]*@")
_QUERY = re.compile(r"([?&][\w.-]*(?:token|key|sig|signature|password|secret|credential)=)[^&\s#]+", re.IGNORECASE)

_ASSIGNED = re.compile(r"([\w.-]+)(\s*[=:]\s*)([^\s,'\"\]}]+)")
"""NAME=VALUE or NAME: VALUE within a text, such as an option of vLLM."""


def masked(value: Any, name: str = "") -> Any:
    """The value of the setting ``name`` with what is secret in it as :data:`MASK`; the path of a secret is none."""
    if isinstance(value, Mapping):
        return {key: masked(each, str(key)) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(masked(each, name) for each in value)
    if value is None or isinstance(value, bool | Path):
        return value
    if is_secret(name.rpartition(".")[2]):
        return MASK
    if isinstance(value, int | float):
        return value
    return _ASSIGNED.sub(_masked_assignment, _QUERY.sub(rf"\1{MASK}", _USER.sub(rf"\1:{MASK}@", str(value))))


def _masked_assignment(found: re.Match[str]) -> str:
    return f"{found[1]}{found[2]}{MASK}" if is_secret(found[1]) else found[0]


def is_secret(name: str) -> bool:
    """Whether values under this name are credentials."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    return not _WORDS.isdisjoint(re.split(r"[^a-z0-9]+", words))
