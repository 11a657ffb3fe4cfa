"""Streams shown as they come, then summed up."""

from __future__ import annotations

import sys
from typing import TypeVar

from rich.console import Console
from rich.live import Live
from rich.text import Text

from steer_client._calls import STEERED
from steer_client._cli import words
from steer_client._cli.columns import Columns
from steer_client._errors import DeadlineExceededError
from steer_client._sync import ComparisonStream, GenerationStream, SyncStream

Item = TypeVar("Item")
Result = TypeVar("Result")


def drain(stream: SyncStream[Item, Result]) -> Result:
    """The stream's result, with nothing shown."""
    for _ in stream:
        pass
    return stream.result


def text(stream: GenerationStream) -> None:
    """The text on stdout, the summary on stderr."""
    if sys.stdout.isatty():
        _type_out(stream)
    else:
        # What goes down a pipe is taken for the result, so it waits for the receipts.
        print(drain(stream).text, flush=True)
    result = stream.result
    console = Console(stderr=True, highlight=False)
    for line in (words.summary(result), *map(words.receipt, result.receipts)):
        _print(console, Text(line, style="dim"))


def columns(stream: ComparisonStream, *, scored: bool) -> None:
    """Both texts side by side; off a terminal only when they are finished.

    What has come before a deadline or Ctrl-C is shown too, marked as cut.
    """
    console = Console(highlight=False)
    shown = Columns(STEERED, live=True)
    try:
        if console.is_terminal:
            with Live(shown, console=console, transient=True, refresh_per_second=12):
                _read(stream, shown)
        else:
            _read(stream, shown)
    except (DeadlineExceededError, KeyboardInterrupt):
        if cut := shown.cut():
            # Down a pipe stdout is taken for the result, and this is none.
            (console if console.is_terminal else Console(stderr=True, highlight=False)).print(cut)
        raise
    result = stream.result
    arm = result.steered[STEERED]
    console.print(shown.finished())
    lines = [
        *words.comparison(arm, scored=scored),
        f"normal: {words.summary(result.normal)}",
        f"steered: {words.summary(arm.generation)}",
        *map(words.receipt, arm.generation.receipts),
    ]
    for line in lines:
        _print(console, Text(line))


def _read(stream: ComparisonStream, shown: Columns) -> None:
    for piece in stream:
        shown.add(piece)


def _print(console: Console, line: Text) -> None:
    # Off a terminal a line stays one line, for those who search it.
    console.print(line, soft_wrap=not console.is_terminal)


def _type_out(stream: GenerationStream) -> None:
    last = ""
    try:
        for delta in stream:
            piece = words.visible(delta.text)
            sys.stdout.write(piece)
            sys.stdout.flush()
            last = piece or last
    finally:
        # What follows, an error too, starts on a line of its own.
        if last and not last.endswith("\n"):
            print(flush=True)
