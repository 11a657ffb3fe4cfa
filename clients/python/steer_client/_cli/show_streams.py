"""Streams shown as their pieces arrive, then summarized."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console
from rich.live import Live
from rich.text import Text

import steer_client
from steer_client._cli.comparison_table import comparison_table
from steer_client._cli.console import wide_console
from steer_client._cli.formatting import escape_controls
from steer_client._cli.side_by_side import SideBySide
from steer_client._cli.summaries import comparison_lines, generation_line, receipt_line, steering_title

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


def show_comparison(
    stream: steer_client.ComparisonStream,
    arms: Sequence[str],
    *,
    scored: bool,
    n: int = 1,
    marked: Sequence[str] = (),
) -> None:
    """The texts side by side, on a terminal as they arrive, elsewhere when they are finished.

    What arrived before a deadline or Ctrl-C is shown too, marked as cut.
    """
    console = Console(highlight=False)
    texts = SideBySide(arms, n=n, marked=marked)
    try:
        if console.is_terminal:
            with Live(texts, console=console, transient=True, refresh_per_second=12):
                _read_pieces(stream, texts)
        else:
            _read_pieces(stream, texts)
    except (steer_client.DeadlineExceededError, KeyboardInterrupt):
        if texts.cut():
            # A reader of the pipe takes stdout for the result, and this is none.
            (console if console.is_terminal else Console(stderr=True, highlight=False)).print(texts)
        raise
    result = stream.result
    texts.finish({name: steering_title(arm.generation.receipts) for name, arm in result.steered.items()})
    console.print(texts)
    if len(result.steered) == 1 and n == 1:
        for line in _lines_of_one(result, scored=scored):
            _print_line(console, Text(line))
        return
    (console if console.is_terminal else wide_console()).print(comparison_table(result, scored=scored))
    for sample in result.samples:
        which = f" {sample.normal.sample}" if n > 1 else ""
        for name, arm in sample.steered.items():
            for receipt in arm.generation.receipts:
                _print_line(console, Text(f"{escape_controls(name)}{which}: {receipt_line(receipt)}"))


def _lines_of_one(result: steer_client.ABResult, *, scored: bool) -> list[str]:
    [(name, arm)] = result.steered.items()
    return [
        *comparison_lines(arm, scored=scored),
        f"normal: {generation_line(result.normal)}",
        f"{escape_controls(name)}: {generation_line(arm.generation)}",
        *map(receipt_line, arm.generation.receipts),
    ]


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
