"""Streams shown as their pieces arrive, then summarized."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console
from rich.live import Live
from rich.text import Text

import steer_client
from steer_client._cli.formatting import escape_controls
from steer_client._cli.side_by_side import SideBySide
from steer_client._cli.summaries import comparison_lines, generation_line, receipt_line, steering_title
from steer_client._defaults import STEERED

if TYPE_CHECKING:
    from steer_client._sync_streams import SyncStream

Result = TypeVar("Result")


def read_to_end(stream: SyncStream[Any, Result]) -> Result:
    """The stream's result, with nothing shown."""
    for _ in stream:
        pass
    return stream.result


def show_generation(stream: steer_client.GenerationStream) -> None:
    """The text on stdout, the summary on stderr."""
    if sys.stdout.isatty():
        _type_out(stream)
    else:
        # A reader of the pipe takes the text for the result, so it is printed only after its receipts are checked.
        print(read_to_end(stream).text, flush=True)
    result = stream.result
    console = Console(stderr=True, highlight=False)
    for line in (generation_line(result), *map(receipt_line, result.receipts)):
        _print_line(console, Text(line, style="dim"))


def show_comparison(stream: steer_client.ComparisonStream, *, scored: bool) -> None:
    """Both texts side by side, on a terminal as they arrive, elsewhere when they are finished.

    What arrived before a deadline or Ctrl-C is shown too, marked as cut.
    """
    console = Console(highlight=False)
    texts = SideBySide(STEERED, live=True)
    try:
        if console.is_terminal:
            with Live(texts, console=console, transient=True, refresh_per_second=12):
                _read_pieces(stream, texts)
        else:
            _read_pieces(stream, texts)
    except (steer_client.DeadlineExceededError, KeyboardInterrupt):
        if cut := texts.cut():
            # A reader of the pipe takes stdout for the result, and this is none.
            (console if console.is_terminal else Console(stderr=True, highlight=False)).print(cut)
        raise
    result = stream.result
    arm = result.steered[STEERED]
    console.print(texts.finished(steering_title(arm.generation.receipts)))
    lines = [
        *comparison_lines(arm, scored=scored),
        f"normal: {generation_line(result.normal)}",
        f"steered: {generation_line(arm.generation)}",
        *map(receipt_line, arm.generation.receipts),
    ]
    for line in lines:
        _print_line(console, Text(line))


def _read_pieces(stream: steer_client.ComparisonStream, texts: SideBySide) -> None:
    for piece in stream:
        texts.add(piece)


def _print_line(console: Console, line: Text) -> None:
    # Off a terminal a line is not wrapped, so that it can be searched for.
    console.print(line, soft_wrap=not console.is_terminal)


def _type_out(stream: steer_client.GenerationStream) -> None:
    last = ""
    try:
        for delta in stream:
            piece = escape_controls(delta.text)
            sys.stdout.write(piece)
            sys.stdout.flush()
            last = piece or last
    finally:
        # What follows, an error too, starts on a line of its own.
        if last and not last.endswith("\n"):
            print(flush=True)
