"""Options of a command that are numbers: in decimal digits, and in nothing else that Python reads as one."""

from __future__ import annotations

import copy
import inspect
import types
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import typer
from typer.models import ParameterInfo

from steer_client._numbers import read_decimal, read_whole

_Command = TypeVar("_Command", bound=Callable[..., object])
_KINDS: dict[type, tuple[Callable[[str], float], str]] = {int: (read_whole, "integer"), float: (read_decimal, "float")}


def decimal_numbers(command: _Command) -> _Command:
    """The command, of whose options those that are numbers are read by the rule of this package."""
    signature = inspect.signature(command, eval_str=True)
    parameters = [each.replace(annotation=_annotation(each.annotation)) for each in signature.parameters.values()]
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    # typer takes the signature's parameters, and the types of these.
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    return command


def _annotation(annotation: Any) -> Any:
    if get_origin(annotation) is not Annotated:
        return annotation
    hint, *metadata = get_args(annotation)
    kind = _number(hint)
    found = next((each for each in metadata if isinstance(each, ParameterInfo)), None)
    if kind is None or found is None or found.parser is not None:
        return annotation
    info = copy.copy(found)
    info.parser = partial(_read, kind, found.min, found.max)
    info.metavar = found.metavar or _KINDS[kind][1].upper()
    return Annotated[(hint, *(info if each is found else each for each in metadata))]


def _number(hint: Any) -> type | None:
    """The type of what is one number, or none."""
    if get_origin(hint) in (Union, types.UnionType):
        [*kinds] = (each for each in get_args(hint) if each is not type(None))
        hint = kinds[0] if len(kinds) == 1 else None
    return hint if hint in _KINDS else None


def _read(kind: type, least: float | None, most: float | None, text: Any) -> float:
    read, name = _KINDS[kind]
    if not isinstance(text, str):
        # A default.
        return kind(text)  # type: ignore[no-any-return]
    try:
        value = read(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a valid {name}") from None
    if (least is not None and value < least) or (most is not None and value > most):
        raise typer.BadParameter(f"{text} is not in the range {least} to {most}")
    return value
