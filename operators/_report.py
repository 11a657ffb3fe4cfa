"""What the ``steer-operators`` command says: JSON for programs, lines for people, a progress bar on a terminal.

Names and texts that come out of files are escaped, so that an operator cannot write to somebody's terminal.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from operators.errors import OperatorError

if TYPE_CHECKING:
    from operators.artifact import OperatorArtifact

COMMAND = "steer-operators"


def log_to_stderr() -> None:
    """Sends log lines to stderr: stdout carries the answer only."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)


def tell(answer: Mapping[str, Any], lines: Iterable[str], *, as_json: bool) -> None:
    """Prints the answer on stdout: one JSON document, or ``lines``."""
    if as_json:
        print(json.dumps(answer, indent=2, allow_nan=False))
    else:
        for line in lines:
            print(printable(line))


def tell_error(error: OperatorError, *, as_json: bool) -> None:
    """Prints what went wrong: an object on stdout, or one line on stderr."""
    if as_json:
        print(json.dumps({"error": problem(error)}))
    else:
        print(f"{COMMAND}: {printable(str(error))}", file=sys.stderr)


def problem(error: OperatorError) -> dict[str, str]:
    """An error as JSON shows it."""
    return {"type": type(error).__name__, "message": str(error)}


def printable(text: str) -> str:
    """``text`` on one line, with what would move a cursor or turn writing round escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def described(name: str, path: Path, artifact: OperatorArtifact) -> dict[str, Any]:
    """An operator as JSON shows it: its header, and what the header does not say."""
    return {
        "name": name,
        "digest": artifact.digest,
        "path": str(path),
        "bytes": path.stat().st_size,
        "affine": artifact.offset is not None,
        **artifact.header.model_dump(mode="json"),
    }


def operator_lines(operator: Mapping[str, Any], **more: object) -> list[str]:
    """One operator for a person. ``operator`` is what :func:`described` gives; ``more`` goes last."""
    recommended = operator["recommended"]
    tokens = operator.get("concept_tokens", operator["concept_ids"])
    fields: dict[str, object] = {
        "name": operator["name"],
        "digest": operator["digest"],
        "concept": repr(operator["concept"]),
        "tokens": f"{len(tokens)}: " + " ".join(repr(token) for token in tokens),
        "model": f"{operator['model']} ({operator['architecture']}, {operator['dtype']})",
        "profile": operator["profile"],
        "layer": f"{operator['layer']} of {operator['num_layers']}, "
        f"added to the input of block {operator['injection_layer']}",
        "reconstruction": f"{operator['reconstruction_error']:.2e} (|sum J x - y| / |y|)",
        "recommended": f"strength {recommended['strength']:g}, {recommended['rule']}, blend {recommended['blend']:g}",
        "file": f"{operator['path']} ({size(operator['bytes'])})",
        **more,
    }
    return columns([(f"{key}:", str(value)) for key, value in fields.items()])


def list_lines(operators: Iterable[Mapping[str, Any]]) -> list[str]:
    """One line per operator; a broken one says what is wrong with it."""
    rows = [
        (entry["name"], f"broken: {entry['problem']['message']}")
        if "problem" in entry
        else (
            entry["name"],
            f"{entry['profile']} {entry['layer']}/{entry['num_layers']}",
            str(entry["model"]),
            entry["digest"].removeprefix("sha256:")[:12],
            repr(entry["concept"]),
        )
        for entry in operators
    ]
    return columns(rows)


def columns(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Rows with their cells aligned; the last cell of a row is as long as it likes."""
    table = list(rows)
    widths: dict[int, int] = {}
    for row in table:
        for column, cell in enumerate(row[:-1]):
            widths[column] = max(widths.get(column, 0), len(cell))
    return [
        "  ".join([*(cell.ljust(widths[column]) for column, cell in enumerate(row[:-1])), row[-1]]) for row in table
    ]


def size(num_bytes: int) -> str:
    """12.3 MB, and so on."""
    amount = float(num_bytes)
    for unit in ("B", "kB", "MB"):
        if amount < 1000:
            return f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:.3g} GB"


@contextmanager
def jacobian_progress() -> Iterator[Callable[[int, int], None]]:
    """A progress bar with the time left, on stderr, where somebody watches."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(
        TextColumn("Jacobian rows"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
        transient=True,
    ) as bars:
        task = bars.add_task("", total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
