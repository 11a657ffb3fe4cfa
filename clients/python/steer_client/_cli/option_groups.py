"""Groups of options that several commands share, each as one parameter.

typer reads a command's options from its signature, so a group is a dataclass whose fields are options, and
`expand_groups` gives typer a signature with the group's fields in its place.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, cast, get_type_hints

from steer_client._cli.number_options import decimal_numbers


def expand_groups(command: Callable[..., None]) -> Callable[..., None]:
    """The same command, taking the fields of each dataclass parameter as parameters of its own, in their order."""
    hints = get_type_hints(command, include_extras=True)
    groups = {name: hint for name, hint in hints.items() if isinstance(hint, type) and dataclasses.is_dataclass(hint)}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name in groups:
            parameters += _fields_as_parameters(groups[parameter.name])
        else:
            parameters.append(parameter.replace(annotation=hints[parameter.name], kind=parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def expanded(**options: Any) -> None:
        for name, group in groups.items():
            options[name] = group(**{field.name: options.pop(field.name) for field in dataclasses.fields(group)})
        command(**options)

    expanded.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    cast("Any", expanded).__signature__ = inspect.Signature(parameters)
    return decimal_numbers(expanded)


def _fields_as_parameters(group: type[Any]) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in dataclasses.fields(group)
    ]
