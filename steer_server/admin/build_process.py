"""One build: ``steer-operators build`` in a process of its own, and what it says while it runs."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import string
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steer_server.admin.threads import until_done
from steer_server.types import BuildRequest

_MAX_LINE = 1 << 16
"""Bytes of a line that the process says."""
_MAX_ANSWER = 4 << 20
_MAX_SHOWN = 500
"""Characters of a line, or a problem, that are kept."""
_PLAIN = frozenset(string.ascii_letters + string.digits + " ,.'-")
_TERMINATE_SECONDS = 3.0
"""Between SIGTERM and SIGKILL."""
_SETTING = ("strength", "rule", "blend", "anchor", "first_token")

_BUILDER = ("-P", "-m", "operators")
"""``steer-operators`` as arguments of Python, which looks for modules in its own places alone."""
_SHARE_OF_WORK = 0.5
"""Of a process's memory: the rest is the model, and what torch is."""
_CONCEPT = "concept.toml"
_KEPT = re.compile(
    r"PATH|PYTHON\w*|VIRTUAL_ENV|LD_LIBRARY_PATH|HOME|USER|LOGNAME|LANG|LC_\w+|TZ|TMPDIR|XDG_CACHE_HOME|HF_HOME|HF_HUB_CACHE"
    r"|HUGGINGFACE_HUB_CACHE"
    r"|OMP_\w+|MKL_\w+|MALLOC_\w+|SSL_CERT_\w+"
)
"""Variables of the server's environment that a build gets."""

Report = Callable[[Mapping[str, Any]], None]
"""Called with a line of progress as :mod:`operators.core.progress` has them, or with {"line": ...}."""


class BuildFailedError(Exception):
    """A build that came to nothing; the message says why. Never on the wire: it is what its job tells."""


@dataclass(frozen=True)
class BuildLimits:
    """Filled from the configuration."""

    memory: int
    """Bytes that a process may take."""
    seconds: float
    threads: int
    model: str
    attention: str | None


def write_concept(request: BuildRequest, work: Path) -> None:
    """Writes what is to be built. In a file: what a process is called with, everybody on its machine may read.

    Raises :class:`OSError`.
    """
    (work / _CONCEPT).touch(mode=0o600)
    (work / _CONCEPT).write_text(concept_file(request), encoding="utf-8")


async def run_build(request: BuildRequest, limits: BuildLimits, work: Path, report: Report) -> Path:
    """Builds what was written in ``work``, and returns the operator's file there.

    Where it is cancelled, the process has ended when this does. Raises :class:`BuildFailedError`, and :class:`OSError`
    where there can be no process.
    """
    store = work / "store"
    arguments = [
        *_BUILDER,
        "build",
        "--file",
        str(work / _CONCEPT),
        "--store",
        str(store),
        "--model",
        limits.model,
        "--json",
    ]
    arguments += ["--device", "cpu", "--dtype", "float32", "--max-memory", str(int(_SHARE_OF_WORK * limits.memory))]
    arguments += ["--attention", limits.attention] if limits.attention else []
    arguments += ["--calibrate"] * request.calibrate + ["--quick"] * request.quick
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "steer_server.admin.build_child", str(os.getpid()), str(limits.memory)),
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=_environment(limits.threads),
        # A group of its own: signals to the server's do not reach it, and one to it reaches all of it.
        start_new_session=True,
        limit=_MAX_LINE,
    )
    assert process.stdout is not None and process.stderr is not None  # noqa: S101, PT018 - for the type checker
    try:
        async with asyncio.timeout(limits.seconds):
            answer, last = await asyncio.gather(_read_all(process.stdout), _follow(process.stderr, report))
            status = await process.wait()
    except TimeoutError:
        raise BuildFailedError(f"it took longer than {limits.seconds:g} s, the most accepted") from None
    finally:
        await until_done(asyncio.ensure_future(_end(process)))
    if status != 0:
        raise BuildFailedError(_problem(answer, last, status))
    return store / f"{request.name}.safetensors"


def concept_file(request: BuildRequest) -> str:
    """What is to be built, as a file of one concept."""
    values: dict[str, Any] = {"name": request.name, "texts": list(request.texts)}
    values["words"] = list(request.words) or None
    values["layer"], values["tolerance"] = request.layer, request.tolerance
    values["rank"] = "full" if request.exact else request.rank
    values |= {name: getattr(request, name) for name in _SETTING}
    values["positions"] = None if request.positions is None else str(request.positions)
    lines = [f"{name} = {_toml(value)}" for name, value in values.items() if value is not None]
    return "\n".join(["[[concept]]", *lines, ""])


def _toml(value: str | float | list[str]) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, str):
        # Every character that is not plain as its number: no text can end early.
        return '"' + "".join(each if each in _PLAIN else f"\\U{ord(each):08x}" for each in value) + '"'
    return repr(value)


def _environment(threads: int) -> dict[str, str]:
    """Of the server's own what a program needs to run and to find the model; secrets may be in all the others."""
    kept = {name: value for name, value in os.environ.items() if _KEPT.fullmatch(name)}
    few = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    return (
        kept
        | few
        | {"STEER_PROGRESS": "json", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
    )


async def _follow(stream: asyncio.StreamReader, report: Report) -> str:
    """Reports what is said, line by line; the last line that is no progress."""
    last = ""
    while True:
        try:
            line = await stream.readline()
        except ValueError:
            # Longer than a line may be: it was dropped.
            continue
        if not line:
            return last
        text = line.decode(errors="replace").strip()
        try:
            said = json.loads(text)
            report({"stage": str(said["stage"]), **{key: said.get(key) for key in ("done", "total", "seconds_left")}})
        except (ValueError, TypeError, KeyError):
            if text:
                last = "".join(each if each.isprintable() else " " for each in text)[:_MAX_SHOWN]
                report({"line": last})


async def _read_all(stream: asyncio.StreamReader) -> bytes:
    """As much as an answer has; what is more is dropped."""
    data = b""
    while piece := await stream.read(_MAX_LINE):
        data += piece[: _MAX_ANSWER - len(data)]
    return data


def _problem(answer: bytes, last: str, status: int) -> str:
    try:
        told = json.loads(answer)
        problem = told["error"] if "error" in told else told["operators"][0]["problem"]
        return str(problem["message"])[:_MAX_SHOWN]
    except (ValueError, TypeError, KeyError, IndexError):
        if status < 0:
            return f"its process was ended by {signal.Signals(-status).name}"
        return f"its process ended with status {status}: {last or 'it said nothing'}"


async def _end(process: asyncio.subprocess.Process) -> None:
    """Ends what is left of the process and its children."""
    for number, seconds in ((signal.SIGTERM, _TERMINATE_SECONDS), (signal.SIGKILL, 60.0)):
        if process.returncode is not None:
            return
        try:
            os.killpg(process.pid, number)
            async with asyncio.timeout(seconds):
                await process.wait()
        except (ProcessLookupError, TimeoutError):
            continue
