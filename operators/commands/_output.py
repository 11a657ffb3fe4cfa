"""What the ``steer-operators`` command says: JSON for programs, lines for people, a progress bar on a terminal.

Names and texts that come out of files are escaped, so that an operator cannot write to somebody's terminal.
"""

from __future__ import annotations

import functools
import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from operators.core.errors import ConceptFileError, OperatorError
from operators.core.progress import progress_bars

if TYPE_CHECKING:
    from operators.core.artifact import OperatorArtifact

COMMAND = "steer-operators"


def log_to_stderr() -> None:
    """Sends log lines to stderr: stdout carries the answer only."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)


@contextmanager
def reporting(as_json: bool) -> Iterator[None]:
    """Around a command: what a user can cause is told, and the exit status is 1."""
    log_to_stderr()
    try:
        try:
            yield
        except (MemoryError, RuntimeError):
            # Imported here: only torch knows its own lack of memory, and help does without torch.
            from operators.core.capacity import memory_errors_as_build_errors

            with memory_errors_as_build_errors():
                raise
    except OperatorError as error:
        tell_error(error, as_json=as_json)
        raise typer.Exit(1) from error


def tell(answer: Mapping[str, Any], lines: Iterable[str], *, as_json: bool) -> None:
    """Prints the answer on stdout: one JSON document, or ``lines``."""
    if as_json:
        print(json.dumps(answer, indent=2, allow_nan=False))
    else:
        for line in lines:
            print(printable(line))


def tell_error(error: OperatorError, *, as_json: bool) -> None:
    """Prints what went wrong: an object on stdout, or a line on stderr for each problem."""
    if as_json:
        print(json.dumps({"error": problem(error)}))
    else:
        for line in error.problems if isinstance(error, ConceptFileError) else (str(error),):
            print(f"{COMMAND}: {printable(line)}", file=sys.stderr)


def problem(error: OperatorError) -> dict[str, str]:
    """An error as JSON shows it."""
    return {"type": type(error).__name__, "message": str(error)}


def printable(text: str) -> str:
    """``text`` on one line, with what would move a cursor or turn writing round escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def described(name: str, path: Path, artifact: OperatorArtifact) -> dict[str, Any]:
    """An operator as JSON shows it: its header, and what the header does not say."""
    point = artifact.header.calibrated_point
    return {
        "name": name,
        "digest": artifact.digest,
        "path": str(path),
        "bytes": path.stat().st_size,
        "affine": artifact.offset is not None,
        "calibrated": None if point is None else point.model_dump(mode="json"),
        **artifact.header.model_dump(mode="json"),
    }


def setting(recommended: Mapping[str, Any]) -> str:
    """A recommendation on one line."""
    return f"strength {recommended['strength']:g}, {recommended['rule']}, blend {recommended['blend']:g}"


def nothing_found(recommended: Mapping[str, Any]) -> str:
    """What became of a calibration that chose no setting."""
    from operators.core.header import Recommended

    default = Recommended().model_dump(mode="json")
    kept = "the default" if recommended == default else "what was recommended"
    return f"nothing within the bounds was found, and {kept} is kept"


def operator_lines(operator: Mapping[str, Any], **further: object) -> list[str]:
    """One operator for a person. ``operator`` is what :func:`described` gives; ``further`` goes last."""
    tokens = operator.get("concept_tokens", operator["concept_ids"])
    more = [repr(text["text"]) for text in operator["more_texts"]]
    fields: dict[str, object] = {
        "name": operator["name"],
        "digest": operator["digest"],
        "concept": repr(operator["concept"]),
        "tokens": f"{len(tokens)}: " + " ".join(repr(token) for token in tokens),
        **({"more texts": "; ".join(more)} if more else {}),
        **({"words": ", ".join(map(repr, operator["words"]))} if operator["words"] else {}),
        "model": f"{operator['model']} ({operator['architecture']}, {operator['model_dtype']})",
        "profile": operator["profile"],
        "layer": f"{operator['layer']} of {operator['num_layers']}, "
        f"added to the input of block {operator['injection_layer']}",
        "reconstruction": f"{operator['reconstruction_error']:.2e} (|sum J x - y| / |y|)",
        "rank": _rank(operator),
        "recommended": setting(operator["recommended"]),
        **({"calibration": _calibration(operator)} if operator["calibration"] else {}),
        "file": f"{operator['path']} ({size(operator['bytes'])})",
        **further,
    }
    return columns([(f"{key}:", str(value)) for key, value in fields.items()])


def _rank(operator: Mapping[str, Any]) -> str:
    found, d = operator["low_rank"], operator["hidden_size"]
    if found is None:
        return f"full ({d})"
    residuals = found["residuals"]
    return f"{found['rank']} of {d}, residual {min(residuals):.2g} to {max(residuals):.2g} per position"


def _calibration(operator: Mapping[str, Any]) -> str:
    found = operator["calibration"]
    words = ", ".join(map(repr, found["words"]))
    return (
        f"{_calibrated(operator)}; {found['prompts']} prompts x {found['tokens']} tokens, words {words} "
        f"({found['plain_hit_rate']:.0%} of the plain texts), budget p95 KL {found['kl_budget']:g}"
    )


def _calibrated(operator: Mapping[str, Any]) -> str:
    """What the calibration measured at the recommended setting, or why it says nothing about that."""
    point = operator["calibrated"]
    if point is not None:
        return f"{point['hit_rate']:.0%} hits at p95 KL {point['kl_p95']:.2g}"
    if operator["calibration"]["chosen"] is None:
        return nothing_found(operator["recommended"])
    return "the recommended setting is another than the one that was found"


def _list_row(entry: Mapping[str, Any]) -> tuple[str, ...]:
    if "problem" in entry:
        return (entry["name"], f"broken: {entry['problem']['message']}")
    more = len(entry["more_texts"])
    return (
        entry["name"],
        f"{entry['profile']}: layer {entry['layer']} of {entry['num_layers']}, pushes block {entry['injection_layer']}",
        f"rank {entry['low_rank']['rank'] if entry['low_rank'] else 'full'}",
        str(entry["model"]),
        entry["digest"].removeprefix("sha256:")[:12],
        repr(entry["concept"])
        + (f" and {more} more" if more else "")
        + (
            f" ({'' if entry['calibrated'] else 'not '}calibrated: {_calibrated(entry)})"
            if entry["calibration"]
            else ""
        ),
    )


def list_lines(operators: Iterable[Mapping[str, Any]]) -> list[str]:
    """One line per operator; a broken one says what is wrong with it."""
    return columns(map(_list_row, operators))


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
def product_progress() -> Iterator[Callable[[int, int], None]]:
    """A progress bar of the columns of one build."""
    with progress_bars() as tell:
        yield functools.partial(tell, "Jacobian products")
