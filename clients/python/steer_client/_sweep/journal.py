"""The file of a sweep: a line that says what was asked of whom, then one line per text, written whole."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from steer_client._errors import InvalidRequestError
from steer_client._sweep.plan import digest
from steer_client._sweep.rows import SweepRow, read_row

_KIND = "steer sweep"
# What the texts depend on beside the plan, as messages call it.
_WORDS = {
    "model_fingerprint": "model",
    "tokenizer_fingerprint": "tokenizer",
    "dtype": "dtype",
    "digests": "version of an operator",
}


def make_header(described: Mapping[str, Any], served: Mapping[str, Any]) -> dict[str, Any]:
    """`described`: the plan. `served`: the model's fingerprints, its dtype, and the digests of the operators."""
    return {"kind": _KIND, "version": 1, "plan_digest": digest(described), "plan": dict(described), **served}


class Journal:
    """Rows that were finished, and a file that new ones are added to; `rows` has what the file held."""

    def __init__(self, path: Path | None, header: Mapping[str, Any]) -> None:
        """Without a path nothing is kept. Raises InvalidRequestError for a file of another sweep, or of none."""
        self.rows: list[SweepRow] = []
        self._file: IO[bytes] | None = None
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Made if it is not there, and never emptied.
            self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b")
            _lock(self._file)
        except OSError as error:
            self.close()
            raise InvalidRequestError(f"out: cannot write {path}: {error.strerror or error}", field="out") from None
        try:
            self._continue(path, header)
        except BaseException:
            self.close()
            raise

    def _continue(self, path: Path, header: Mapping[str, Any]) -> None:
        assert self._file is not None  # noqa: S101 - opened above
        content = self._file.read()
        # A line without an end was cut off while it was written.
        whole = content[: content.rfind(b"\n") + 1]
        lines = whole.splitlines()
        if not lines and content and not content.startswith(b'{"kind": "' + _KIND.encode()):
            raise InvalidRequestError(f"out: {path} is no file of a sweep, and is left as it is", field="out")
        if lines:
            _check_header(path, lines[0], header)
        for number, line in enumerate(lines[1:], 2):
            try:
                self.rows.append(read_row(json.loads(line)))
            except (ValueError, TypeError, KeyError) as error:
                raise InvalidRequestError(f"out: {path}, line {number} is no row: {error}", field="out") from None
        self._file.seek(len(whole))
        self._file.truncate()
        if not lines:
            self._append([header])

    def add(self, rows: Iterable[SweepRow]) -> None:
        """Keeps finished rows."""
        new = list(rows)
        self.rows += new
        if self._file is not None:
            self._append([row.to_dict() for row in new])

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _append(self, entries: list[Any]) -> None:
        assert self._file is not None  # noqa: S101 - who calls has a file
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
        # Half of a pair of surrogates, which some tokenizers make, is no UTF-8.
        self._file.write(lines.encode("utf-8", "backslashreplace"))
        self._file.flush()


def _check_header(path: Path, line: bytes, wanted: Mapping[str, Any]) -> None:
    try:
        found = json.loads(line)
        if found["kind"] != _KIND or found["version"] != wanted["version"]:
            raise ValueError
        plan = found["plan"]
        parts = [name for name in wanted["plan"] if plan.get(name) != _as_json(wanted["plan"][name])]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise InvalidRequestError(f"out: {path} is no file of a sweep, and is left as it is", field="out") from None
    if parts or found.get("plan_digest") != wanted["plan_digest"]:
        raise InvalidRequestError(
            f"out: {path} is of a sweep with other {' and '.join(parts) or 'settings'}; name another file, or ask as "
            "was asked then",
            field="out",
        )
    for name in _WORDS:
        if found.get(name) != _as_json(wanted[name]):
            raise InvalidRequestError(
                f"out: {path} is of another {_WORDS[name]}: {_differences(found.get(name), wanted[name])}",
                field="out",
            )


def _differences(found: Any, wanted: Any) -> str:
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        names = [name for name in wanted if found.get(name) != wanted[name]]
        return "; ".join(f"{name}: {found.get(name)}, now {wanted[name]}" for name in names)
    return f"{found}, now {wanted}"


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _lock(file: IO[bytes]) -> None:
    """Refuses a file that another sweep writes, where the system can tell."""
    with suppress(ImportError):
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
