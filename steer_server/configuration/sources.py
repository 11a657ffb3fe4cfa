"""The three places that settings are read from, each with what is wrong there; nothing is checked against bounds."""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsConfigDict

from steer_server.config import PREFIX, ServerConfig, variable

FILE_VARIABLE = "STEER_CONFIG"
"""Names the file where the flag does not."""
OTHER_VARIABLES = frozenset(
    {
        *(FILE_VARIABLE, "STEER_TARGET", "STEER_HTTP", "STEER_PROTOS"),
        *("STEER_TOKEN", "STEER_TOKEN_FILE", "STEER_TLS", "STEER_CA", "STEER_CERT", "STEER_KEY"),
    }
)
"""Of the file, of the SDK, of the command ``steer`` and of the examples."""
_NEAR = 0.8
_OF_KUBERNETES = re.compile(
    r"STEER_(.*_)?(SERVICE_(HOST|PORT(_.*)?)|PORT_\d+_(TCP|UDP)(_.*)?)=.*|[^=]*_PORT=(tcp|udp)://.*"
)
"""What Kubernetes sets for services whose names begin with "steer", unless ``enableServiceLinks`` is false."""


class _WithVariables(ServerConfig, BaseSettings):
    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True)


@dataclass
class Found:
    """Values by the names of fields, and where each was found: of a mapping's keys as ``field.key``."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def add(self, name: str, value: Any, origin: str) -> None:
        """Puts a value over what there is; the keys of a mapping stand over one another one by one."""
        before = self.values.get(name)
        if isinstance(value, Mapping):
            self.values[name] = {**(before if isinstance(before, Mapping) else {}), **value}
            self.origins |= {f"{name}.{key}": origin for key in value}
        else:
            self.values[name] = value
            self.origins[name] = origin


def add_file(found: Found, path: Path) -> None:
    """Adds what a TOML file holds: the names of fields as keys."""
    try:
        text = path.read_text(encoding="utf-8")
        content = tomllib.loads(text)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        found.problems.append(f"{path}: cannot be read: {reason} (--config, or {FILE_VARIABLE}, names the file)")
        return
    for key, value in content.items():
        if key not in ServerConfig.model_fields:
            near = _nearest(key.replace("-", "_").lower(), ServerConfig.model_fields)
            found.problems.append(f"{_place(path, text, key)}: unknown key {key!r}{near}")
        elif isinstance(value, dict):
            for inner, each in value.items():
                found.add(key, {inner: each}, _place(path, text, key, inner))
        else:
            found.add(key, value, _place(path, text, key))


def add_environment(found: Found) -> None:
    """Adds the variables ``STEER_NAME`` of all fields. An empty one counts as unset."""
    source = EnvSettingsSource(_WithVariables)
    for name, each in ServerConfig.model_fields.items():
        value, _, is_complex = source.get_field_value(each, name)
        if value is None:
            continue
        try:
            found.add(name, source.prepare_field_value(name, each, value, is_complex), f"env {variable(name)}")
        except ValueError:
            form = '{"max_model_len": 4096}' if name == "engine_args" else '["one", "two"]'
            found.problems.append(f"{name}: {variable(name)} is not JSON; such as {form} is accepted")
    known = {variable(name) for name in ServerConfig.model_fields} | OTHER_VARIABLES
    for name, value in sorted(os.environ.items()):
        is_ours = name.startswith(PREFIX) and bool(value) and not _OF_KUBERNETES.fullmatch(f"{name}={value}")
        if is_ours and name not in known:
            near = _nearest(name, known)
            (found.problems if near else found.warnings).append(f"{name} in the environment is no setting{near}")


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=_NEAR if name.startswith(PREFIX) else 0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _place(path: Path, text: str, *keys: str) -> str:
    """``FILE:LINE`` of a key in a table, by the first line that looks like it: TOML's parser does not tell."""
    lines, found = text.splitlines(), None
    for key in keys:
        looks = re.compile(rf"""[\s\[]*(?:[\w"'. -]*\.\s*)?["']?{re.escape(key)}["']?\s*[\].=]""")
        # A key of an inline table stands on the table's own line.
        found = next((number for number in range(found or 0, len(lines)) if looks.match(lines[number])), found)
    return str(path) if found is None else f"{path}:{found + 1}"
