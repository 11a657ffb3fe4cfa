"""One configuration of a file, the environment and flags, in this order: the later beats the earlier."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from steer_server.config import ServerConfig, flag
from steer_server.configuration.secrets import masked
from steer_server.configuration.sources import FILE_VARIABLE, Found, add_environment, add_file

DEFAULT = "default"
"""The origin of a value that nobody gave."""
_MAX_SHOWN = 80
"""Characters of a value in an error."""


@dataclass(frozen=True)
class Settings:
    """What :func:`read_settings` found.

    ``origins``: of each value that was given, by field, or by ``field.key`` for the keys of a mapping: ``FILE:LINE``,
    ``env NAME`` or ``flag --NAME``. ``warnings``: what looks like a setting and is none.
    """

    config: ServerConfig
    origins: Mapping[str, str]
    warnings: tuple[str, ...]


class SettingsError(Exception):
    """Settings that are not accepted: all of them, one problem each."""

    def __init__(self, problems: tuple[str, ...]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


def read_settings(flags: Mapping[str, Any] | None = None, file: Path | None = None) -> Settings:
    """The settings of ``file``, or else of the one that STEER_CONFIG names; of the environment; and of ``flags``.

    Args:
        flags: values by the names of fields.

    Raises:
        SettingsError: names each key, the value, where it stands and what is accepted.
    """
    found = Found()
    path = file or (Path(named) if (named := os.environ.get(FILE_VARIABLE)) else None)
    if path is not None:
        add_file(found, path)
    add_environment(found)
    for name, value in (flags or {}).items():
        found.add(name, value, f"flag {flag(name)}")
    config = None
    try:
        config = ServerConfig(**found.values)
    except ValidationError as error:
        found.problems += _problems(error, found)
    if config is None or found.problems:
        raise SettingsError(tuple(found.problems))
    return Settings(config, found.origins, tuple(found.warnings))


def _problems(error: ValidationError, found: Found) -> list[str]:
    problems = []
    for item in error.errors(include_url=False):
        name = ".".join(map(str, item["loc"]))
        origin = found.origins.get(name) or found.origins.get(str(item["loc"][0]), DEFAULT)
        said = item["msg"].removeprefix("Value error, ")
        if item["type"] != "value_error":
            # Those of our own name the value themselves.
            said = f"{said}, not {str(masked(item['input'], name))[:_MAX_SHOWN]!r}"
        problems.append(f"{name}: {said} ({origin})")
    return problems
