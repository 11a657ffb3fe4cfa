"""Why vLLM did not start: carried from the process in which it failed to the one that tells the user.

vLLM itself says only that another process failed and that the reason stands further up in the log.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ParamSpec, TypeVar

_VARIABLE = "STEERING_START_PROBLEM"
"""Names the file, in the environment that vLLM's processes inherit."""
_MAX_CHARACTERS = 2000
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


@contextmanager
def problem_file() -> Iterator[Path]:
    """Around the start of vLLM: a file that holds the first problem that one of its processes reported, if any did."""
    with tempfile.TemporaryDirectory(prefix="steer-server-") as directory:
        path = Path(directory) / "problem"
        os.environ[_VARIABLE] = str(path)
        try:
            yield path
        finally:
            del os.environ[_VARIABLE]


def read_problem(path: Path) -> str:
    """What was reported, on one line; empty where nothing was."""
    with suppress(OSError):
        return " ".join(path.read_text(encoding="utf-8").split())
    return ""


def report_problem(error: BaseException) -> None:
    """Reports why this process fails; nothing where another one has reported already: what follows is its fault."""
    path = os.environ.get(_VARIABLE)
    if path:
        text = str(error) or type(error).__name__
        # The server may be gone, and its file with it.
        with suppress(OSError), open(path, "x", encoding="utf-8") as file:
            file.write(text[:_MAX_CHARACTERS])


def reports_problems(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """A function of vLLM's start whose errors are reported before they are passed on."""

    @functools.wraps(function)
    def reporting(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            report_problem(error)
            raise

    return reporting
