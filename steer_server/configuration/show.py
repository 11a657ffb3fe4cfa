"""The effective settings, for people and programs: each value with its unit and where it came from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steer_server.config import ServerConfig, shown
from steer_server.configuration.flags import default_text
from steer_server.configuration.read import DEFAULT, Settings
from steer_server.configuration.secrets import masked


@dataclass(frozen=True)
class _Line:
    keys: tuple[str, ...]
    value: Any
    """With secrets masked."""
    is_masked: bool
    unit: str
    origin: str
    default: str
    """In words, where no value is set."""


def as_toml(settings: Settings) -> str:
    """A file that ``--config`` takes: one line for each setting, with unit and origin as a comment.

    Settings without a value, and those with a secret, are comments as a whole.
    """
    rows = []
    for line in _lines(settings):
        key = ".".join(part if re.fullmatch(r"[\w-]+", part, re.ASCII) else json.dumps(part) for part in line.keys)
        value = line.default if line.value is None else _toml(line.value)
        hidden = "# " if line.is_masked or line.value is None else ""
        rows.append((f"{hidden}{key} = {value}", " · ".join(filter(None, (line.unit, line.origin)))))
    width = min(60, max(len(left) for left, _ in rows))
    return "".join(f"{left:<{width}}  # {right}\n" for left, right in rows)


def as_json(settings: Settings) -> str:
    """An object: name -> value, unit and origin; the value is null where none is set."""
    content = {
        ".".join(line.keys): {"value": line.value, "unit": line.unit, "origin": line.origin}
        | ({"default": line.default} if line.value is None else {})
        for line in _lines(settings)
    }
    return json.dumps(content, ensure_ascii=False, indent=2) + "\n"


def _lines(settings: Settings) -> Iterator[_Line]:
    for name in ServerConfig.model_fields:
        value = getattr(settings.config, name)
        each: dict[tuple[str, ...], Any] = {(name,): value}
        if isinstance(value, Mapping) and value:
            each = {(name, str(key)): item for key, item in value.items()}
        for keys, item in each.items():
            plain, said = _plain(item), masked(_plain(item) if not isinstance(item, Path) else item, keys[-1])
            origin = settings.origins.get(".".join(keys), DEFAULT)
            yield _Line(keys, _plain(said), _plain(said) != plain, shown(name).unit, origin, default_text(name))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    # Strings, numbers and truth are written alike in JSON and TOML.
    return json.dumps(value, ensure_ascii=False)
