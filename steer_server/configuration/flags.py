"""The options of the command line: one for each field of the configuration, in the order of the fields."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import typer

from operators.core.capacity import format_bytes
from steer_server.config import ServerConfig, flag, shown
from steer_server.engine.vllm.options import read_engine_args

_Command = TypeVar("_Command", bound=Callable[..., object])
_FILE_HELP = "Settings, as TOML; STEER_CONFIG names one too. The environment and flags stand over it."


def with_settings(command: _Command) -> _Command:
    """Gives a command ``--config`` and the flags of all settings, beside its own: they arrive as keywords."""
    own = [
        each for each in inspect.signature(command, eval_str=True).parameters.values() if each.kind != each.VAR_KEYWORD
    ]
    first = inspect.Parameter(
        "config",
        inspect.Parameter.KEYWORD_ONLY,
        annotation=Path | None,
        default=typer.Option(None, "--config", metavar="FILE", help=_FILE_HELP, show_default=False),
    )
    fields = [_option(name) for name in ServerConfig.model_fields]
    command.__signature__ = inspect.Signature([*own, first, *fields])  # type: ignore[attr-defined]
    return command


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the flags that were given. Raises :class:`StartupError` for an unreadable option of vLLM."""
    values = {name: value for name, value in options.items() if value is not None and value != []}
    return {name: read_engine_args(value) if _is_mapping(name) else value for name, value in values.items()}


def default_text(name: str) -> str:
    """The default of a field with its unit, in words where the value does not say it."""
    default, said = ServerConfig.model_fields[name].get_default(call_default_factory=True), shown(name)
    if said.default or default in (None, (), {}):
        return said.default or "none"
    if isinstance(default, bool):
        return "yes" if default else "no"
    if said.unit == "bytes":
        return format_bytes(default)
    return f"{default:g} {said.unit}".rstrip() if isinstance(default, int | float) else str(default)


def _option(name: str) -> inspect.Parameter:
    kind = _kind(name)
    many = get_origin(kind) in (tuple, dict)
    # As text: what is accepted is said in one place, by the configuration, for flags, environment and file alike.
    annotation = bool | None if kind is bool else list[str] | None if many else str | None
    option = typer.Option(
        None,
        # Off too: a flag beats what a file or the environment turns on.
        f"{flag(name)}/--no-{flag(name)[2:]}" if kind is bool else flag(name),
        help=" ".join((ServerConfig.model_fields[name].description or "").split()),
        metavar=None if kind is bool else _placeholder(name, kind),
        show_default=default_text(name),
    )
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=option)


def _kind(name: str) -> Any:
    """The type of a field, without the None that stands for its default."""
    annotation = ServerConfig.model_fields[name].annotation
    if get_origin(annotation) in (Union, types.UnionType):
        return next(each for each in get_args(annotation) if each is not type(None))
    return annotation


def _placeholder(name: str, kind: Any) -> str:
    said = shown(name)
    if said.metavar:
        return said.metavar
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    if said.unit.isalpha():
        return said.unit.upper()
    return {int: "N", float: "X", Path: "PATH"}.get(kind, "TEXT")


def _is_mapping(name: str) -> bool:
    return get_origin(_kind(name)) is dict
