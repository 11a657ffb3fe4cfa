"""Consoles and table layouts that several views share."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

_PIPE_WIDTH = 1000


def wide_console() -> Console:
    """Stdout, as wide as the terminal; wider than any line where stdout is not a terminal."""
    console = Console(highlight=False)
    # Down a pipe nothing is cut short to fit a screen that is not there.
    return console if console.is_terminal else Console(highlight=False, width=_PIPE_WIDTH)


def field_table() -> Table:
    """A table of two columns without a head: the name of a field, its value."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    return table
