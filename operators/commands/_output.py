"""What every ``steer-operators`` command prints: one answer on stdout, as JSON or as lines, and errors.

Names and texts that come out of files are escaped, so that an operator cannot write to somebody's terminal.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import typer

from operators.core.errors import ConceptFileError, OperatorError

COMMAND = "steer-operators"


def log_to_stderr() -> None:
    """Sends log lines to stderr: stdout carries the answer only."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)


class _WrongUsageError(Exception):
    """What is wrong with the command line itself."""

    def __init__(self, error: OperatorError) -> None:
        super().__init__(str(error))
        self.error = error


@contextmanager
def wrong_usage() -> Iterator[None]:
    """Around what looks at nothing but what the user has written: an error is one of usage, whose exit status is 2."""
    try:
        yield
    except OperatorError as error:
        raise _WrongUsageError(error) from error


@contextmanager
def exit_on_error(as_json: bool) -> Iterator[None]:
    """Around a command: errors that a user can cause are printed, and the exit status is 1; 2 for wrong usage."""
    log_to_stderr()
    try:
        try:
            yield
        except (MemoryError, RuntimeError):
            # Imports torch: only torch knows its own out-of-memory errors.
            from operators.core.capacity import memory_errors_as_build_errors

            with memory_errors_as_build_errors():
                raise
    except _WrongUsageError as wrong:
        print_error(wrong.error, as_json=as_json)
        raise typer.Exit(2) from wrong
    except OperatorError as error:
        print_error(error, as_json=as_json)
        raise typer.Exit(1) from error


def print_answer(answer: Mapping[str, Any], lines: Iterable[str], *, as_json: bool) -> None:
    """Prints the answer on stdout: one JSON document, or ``lines``."""
    if as_json:
        print(json.dumps(answer, indent=2, allow_nan=False))
    else:
        for line in lines:
            print(printable(line))


def print_warnings(warnings: Iterable[str], *, name: str = "") -> None:
    """Prints warnings on stderr, a line each; JSON has them too, so that both kinds of reader get them."""
    for warning in warnings:
        about = f"{name}: {warning}" if name else warning
        print(f"{COMMAND}: warning: {printable(about)}", file=sys.stderr)


def print_error(error: OperatorError, *, as_json: bool) -> None:
    """Prints an error: an object on stdout, or a line on stderr for each of its problems."""
    if as_json:
        print(json.dumps({"error": error_json(error)}))
    else:
        for line in error.problems if isinstance(error, ConceptFileError) else (str(error),):
            print(f"{COMMAND}: {printable(line)}", file=sys.stderr)


def error_json(error: OperatorError) -> dict[str, str]:
    """An error as JSON shows it."""
    return {"type": type(error).__name__, "message": str(error)}


def printable(text: str) -> str:
    """``text`` on one line, with characters that move a cursor or change the direction of writing escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def align(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Lines with the cells of the rows in columns; the last cell of a row has any length."""
    table = list(rows)
    widths: dict[int, int] = {}
    for row in table:
        for column, cell in enumerate(row[:-1]):
            widths[column] = max(widths.get(column, 0), len(cell))
    return [
        "  ".join([*(cell.ljust(widths[column]) for column, cell in enumerate(row[:-1])), row[-1]]) for row in table
    ]


def model_line(operator: Mapping[str, Any]) -> str:
    """The model that it was built on, and how that was computed then."""
    attention = f", attention {operator['attention']}" if operator["attention"] else ""
    return f"{operator['model']} ({operator['architecture']}, {operator['model_dtype']}{attention})"
