"""Rows of an evaluation in a file of JSON lines: what was done stays done, whenever the run is interrupted."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from operators.core.errors import TrialError

ROWS = "rows.jsonl"
_MAX_BYTES = 1 << 30
Row = dict[str, Any]


class Journal:
    """The rows of a folder by what they are of. Filled by :func:`open_journal` and :meth:`add`."""

    def __init__(self, rows: list[Row], file: BinaryIO | None) -> None:
        self._file = file
        self.rows: dict[str, Row] = {row_key(row["of"]): row for row in rows}

    def get(self, of: Mapping[str, Any]) -> Row | None:
        """The row of ``of``, or None where that has not been done."""
        return self.rows.get(row_key(of))

    def add(self, of: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        """Writes one row, and sees that it is in the file."""
        row = {"of": dict(of), **values}
        self.rows[row_key(of)] = row
        if self._file is not None:
            self._file.write((json.dumps(row, allow_nan=False, separators=(",", ":")) + "\n").encode())
            self._file.flush()


def row_key(of: Mapping[str, Any]) -> str:
    """What tells rows apart: everything that their values depend on."""
    return json.dumps(of, sort_keys=True)


@contextmanager
def open_journal(folder: Path) -> Iterator[Journal]:
    """The journal of ``folder``, which is made where it does not exist, locked against another run.

    A last line that is not whole, left by a run that was killed, is removed.

    Raises:
        TrialError: the folder cannot be used, another run uses it, or a line is no row.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / ROWS
        with path.open("a+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise TrialError(f"{folder}: another evaluation is writing there") from error
            rows, end = _read(file, path)
            file.truncate(end)
            file.seek(end)
            yield Journal(rows, file)
    except OSError as error:
        raise TrialError(f"{folder}: cannot be used for rows: {error.strerror}") from error


def read_journal(folder: Path) -> Journal:
    """The rows of a folder, to be read only. Raises :class:`TrialError` where there are none."""
    path = folder / ROWS
    try:
        with path.open("rb") as file:
            rows, _ = _read(file, path)
    except OSError as error:
        raise TrialError(f"{path}: cannot be read: {error.strerror}") from error
    return Journal(rows, None)


def _read(file: BinaryIO, path: Path) -> tuple[list[Row], int]:
    """The rows, and where the last whole line ends."""
    file.seek(0, 2)
    if file.tell() > _MAX_BYTES:
        raise TrialError(f"{path}: is {file.tell()} bytes; at most {_MAX_BYTES} are accepted")
    file.seek(0)
    rows: list[Row] = []
    end = 0
    for number, line in enumerate(file, 1):
        if not line.endswith(b"\n"):
            break
        end += len(line)
        try:
            row = json.loads(line)
        except ValueError as error:
            raise TrialError(f"{path}: line {number} is not JSON") from error
        if not isinstance(row, dict) or not isinstance(row.get("of"), dict):
            raise TrialError(f"{path}: line {number} is no row of an evaluation")
        rows.append(row)
    return rows, end
