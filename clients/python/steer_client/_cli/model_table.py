"""The server's model, a line for each field."""

from __future__ import annotations

import dataclasses

from rich.text import Text

import steer_client
from steer_client._cli.console import field_table, wide_console
from steer_client._cli.formatting import escape_controls


def show_model(info: steer_client.ModelInfo) -> None:
    """Prints the model, its limits and its engine."""
    table = field_table()
    for field in dataclasses.fields(info):
        table.add_row(field.name.replace("_", " "), Text(escape_controls(_format_value(getattr(info, field.name)))))
    wide_console().print(table)


def _format_value(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "–"
    return str(value) or "–"
