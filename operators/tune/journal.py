"""What a calibration has measured so far, in a file beside the store: one that was interrupted goes on from there.

One JSON object per line. The first names the calibration, by a digest of everything that its figures depend on; each
other one is a trial and its point. A line that is not whole, as a killed process leaves one, ends what is read.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from operators.core.errors import ArtifactError, StoreError
from operators.core.file_format import open_regular
from operators.core.header import CalibrationPoint

_MAX_BYTES = 16 << 20


def journal_key(**facts: Any) -> str:
    """The digest of everything that the figures of a calibration depend on: plain data, by name."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


class Journal:
    """The points measured so far, by trial. Without a path they are kept in memory alone."""

    def __init__(self, path: Path | None = None, key: str = "") -> None:
        """Reads what a calibration of the same ``key`` has left; what another one left is replaced.

        Raises :class:`StoreError` where the file cannot be written.
        """
        self._path, self._points = path, dict[str, CalibrationPoint]()
        if path is None:
            return
        self._points = _read(path, key)
        self.resumed = len(self._points)
        # Written anew, so that what follows a damaged line is whole again.
        self._write(
            [json.dumps({"calibration": key}), *(_line(trial, point) for trial, point in self._points.items())],
            os.O_TRUNC,
        )

    resumed = 0
    """How many points were there already."""

    @property
    def count(self) -> int:
        """How many points there are."""
        return len(self._points)

    def __contains__(self, trial: str) -> bool:
        return trial in self._points

    def point(self, trial: str) -> CalibrationPoint:
        """What was measured. Raises :class:`KeyError` where nothing was."""
        return self._points[trial]

    def add(self, trial: str, point: CalibrationPoint) -> None:
        """Keeps a point, and writes it down at once."""
        self._points[trial] = point
        self._write([_line(trial, point)], os.O_APPEND)

    def delete(self) -> None:
        """Removes the file, once the calibration is stored."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _write(self, lines: list[str], how: int) -> None:
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | how
            with os.fdopen(os.open(self._path, flags, 0o600), "w", encoding="utf-8") as file:
                file.write("".join(f"{line}\n" for line in lines))
        except OSError as error:
            raise StoreError(f"journal {self._path}: cannot be written: {error.strerror}") from error


def _line(trial: str, point: CalibrationPoint) -> str:
    return json.dumps({"trial": trial, "point": point.model_dump(mode="json")})


def _read(path: Path, key: str) -> dict[str, CalibrationPoint]:
    points: dict[str, CalibrationPoint] = {}
    try:
        with open_regular(path, _MAX_BYTES) as (file, num_bytes):
            first, *rest = file.read(num_bytes).decode().splitlines()
        if json.loads(first) != {"calibration": key}:
            return {}
        for line in rest:
            entry = json.loads(line)
            points[str(entry["trial"])] = CalibrationPoint.model_validate_json(json.dumps(entry["point"]), strict=True)
    except (ArtifactError, ValidationError, ValueError, KeyError, TypeError, RecursionError):
        # None, another's, or damaged: what was read before it is used.
        return points
    return points
