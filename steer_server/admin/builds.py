"""Builds as jobs: a few at once, some that wait, and the last that ended. A job goes on when its caller leaves."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import structlog

from operators.core.apply import Setting
from operators.core.errors import ArtifactError, SettingError
from steer_server.admin.build_process import BuildFailedError, BuildLimits, run_build, write_concept
from steer_server.admin.keeper import Keeper
from steer_server.admin.threads import FileThreads, until_done
from steer_server.admin.work_directory import work_directory
from steer_server.caller import CALLER
from steer_server.errors import (
    InvalidRequestError,
    QueueFullError,
    ShuttingDownError,
    SteerServerError,
    UnknownBuildError,
)
from steer_server.registry import OperatorEntry
from steer_server.types import BuildRequest, BuildState, ModelInfo, OperatorBuild

log = structlog.get_logger(__name__)

_REMEMBERED = 64
"""Jobs that have ended."""
_AGAIN = 30.0
"""Seconds: when to try again where too many wait."""
_EVERY = 0.2
"""Seconds between two reports to one watcher, at least."""
_LARGEST = 1 << 62


class _Job:
    """One build, and those who watch it."""

    def __init__(self, build: OperatorBuild) -> None:
        self.build = build
        self.entry: OperatorEntry | None = None
        self.task: asyncio.Task[None] | None = None
        self.changed = asyncio.Event()
        """Set by the next change, which puts another in its place."""

    def change(self, **fields: Any) -> None:
        self.build = replace(self.build, **fields)
        self.changed.set()
        self.changed = asyncio.Event()

    def hear(self, said: Mapping[str, Any]) -> None:
        if "line" in said:
            self.change(last_line=said["line"])
            return
        left = said["seconds_left"]
        self.change(
            stage=said["stage"][:200],
            done=_count(said["done"]),
            total=_count(said["total"]),
            time_left=left if isinstance(left, float | int) and 0 <= left < 1e9 else None,
        )


class Builds:
    """All of one server. Belongs to one event loop."""

    def __init__(
        self,
        keeper: Keeper,
        threads: FileThreads,
        model: ModelInfo,
        limits: BuildLimits,
        *,
        at_once: int,
        max_waiting: int,
    ) -> None:
        self._keeper, self._threads, self._model, self._limits = keeper, threads, model, limits
        self._places = asyncio.Semaphore(at_once)
        self._max_waiting = max_waiting
        self._jobs: dict[str, _Job] = {}
        self._is_closed = False

    async def submit(self, request: BuildRequest) -> OperatorBuild:
        """Begins a build, or lets it wait.

        Raises:
            InvalidRequestError: a value that no build accepts, of this model or of any.
            QueueFullError: too many wait.
            OperatorExistsError, OperatorChangedError, UnknownOperatorError: see :meth:`Keeper.check`.
        """
        self._check(request)
        await self._threads.ask(lambda: self._keeper.check(request.name, request.replace))
        if self._is_closed:
            raise ShuttingDownError
        waiting = sum(job.build.state == "waiting" for job in self._jobs.values())
        if waiting >= self._max_waiting:
            raise QueueFullError(f"{waiting} builds wait already, the most accepted", _AGAIN)
        caller = CALLER.get()
        who = caller.grant.token or caller.host
        build = OperatorBuild(secrets.token_hex(8), request.name, "waiting", caller=who, created=_now())
        job = self._jobs[build.id] = _Job(build)
        log.info("build submitted", build=build.id, operator=build.name, caller=who, calibrate=request.calibrate)
        job.task = asyncio.ensure_future(self._run(job, request))
        return build

    def all(self) -> tuple[tuple[OperatorBuild, OperatorEntry | None], ...]:
        """Those that the caller may see, by their beginning, each with what it built."""
        return tuple(
            (job.build, job.entry) for job in self._jobs.values() if CALLER.get().grant.may_use(job.build.name)
        )

    async def watch(self, build_id: str) -> AsyncGenerator[tuple[OperatorBuild, OperatorEntry | None], None]:
        """One as it is, and then whenever it has changed, up to its end. Raises :class:`UnknownBuildError`."""
        job = self._find(build_id)
        while True:
            changed, build = job.changed, job.build
            yield build, job.entry
            if build.has_ended:
                return
            await changed.wait()
            if not job.build.has_ended:
                await asyncio.sleep(_EVERY)

    async def cancel(self, build_id: str) -> tuple[OperatorBuild, OperatorEntry | None]:
        """Ends one, if it has not ended. Raises :class:`UnknownBuildError`."""
        job = self._find(build_id)
        await self._cancel(job)
        return job.build, job.entry

    async def close(self) -> None:
        """Ends all, and takes no more."""
        self._is_closed = True
        await asyncio.gather(*map(self._cancel, tuple(self._jobs.values())))

    def _check(self, request: BuildRequest) -> None:
        """What the model decides, and what makes a setting."""
        model = self._model
        for field, most in (("layer", model.num_layers), ("rank", model.hidden_size)):
            value = getattr(request, field)
            if value is not None and value > most:
                raise InvalidRequestError(field, f"is {value}; at most {most} is accepted for {model.model}")
        given = {name: getattr(request, name) for name in ("rule", "blend", "positions", "anchor", "first_token")}
        known = {name: value for name, value in given.items() if value is not None}
        try:
            Setting(**{"strength": request.strength or 0.0, "rule": "cumulative", "blend": 0.0, **known})
        except SettingError as error:
            raise InvalidRequestError(error.field, error.problem) from None

    async def _run(self, job: _Job, request: BuildRequest) -> None:
        try:
            async with self._places:
                job.change(state="running", started=_now())
                job.entry = await self._build(job, request)
            self._end(job, "succeeded")
        except asyncio.CancelledError:
            self._end(job, "cancelled")
        except (SteerServerError, ArtifactError, BuildFailedError) as error:
            self._end(job, "failed", str(error), type(error).__name__)
        except OSError as error:
            said = f"its process cannot be started: {error.strerror or error}"
            self._end(job, "failed", said, type(error).__name__)
        except Exception as error:
            log.exception("build broke", build=job.build.id, exc_info=error)
            self._end(job, "failed", f"unexpected {type(error).__name__} in the server", type(error).__name__)

    async def _build(self, job: _Job, request: BuildRequest) -> OperatorEntry:
        stack = ExitStack()
        try:
            work = await self._threads.to_its_end(lambda: self._begin(request, stack))
            path = await run_build(request, self._limits, work, job.hear)
            placing = self._threads.start(lambda: self._place(request, path))
            # What is cancelled here is stored all the same, or not at all.
            await until_done(placing)
            return placing.result()
        finally:
            await self._threads.to_its_end(stack.close)

    def _begin(self, request: BuildRequest, stack: ExitStack) -> Path:
        """The directory in which it works, which the end of ``stack`` removes."""
        with self._keeper.store_errors():
            work = stack.enter_context(work_directory(self._keeper.store.path))
            write_concept(request, work)
        return work

    def _place(self, request: BuildRequest, path: Path) -> OperatorEntry:
        if not path.exists():
            raise BuildFailedError("its process ended well and left no operator")
        with open(path, "r+b") as file:
            return self._keeper.place(file, request.name, request.replace)

    async def _cancel(self, job: _Job) -> None:
        if job.task is not None and not job.task.done():
            job.task.cancel()
            await asyncio.wait({job.task})
        if not job.build.has_ended:
            # It had not begun.
            self._end(job, "cancelled")

    def _end(self, job: _Job, state: BuildState, problem: str = "", error: str = "") -> None:
        job.change(state=state, problem=problem[:1024], ended=_now(), time_left=None)
        build = job.build
        say = log.warning if problem else log.info
        # What the builder said may repeat the texts: it is for whoever may watch the build, and the log has its kind.
        fields = {"error": error} if error else {}
        say("build ended", build=build.id, operator=build.name, caller=build.caller, state=state, **fields)
        ended = [each for each, other in self._jobs.items() if other.build.has_ended]
        for each in ended[: max(0, len(ended) - _REMEMBERED)]:
            del self._jobs[each]

    def _find(self, build_id: str) -> _Job:
        job = self._jobs.get(build_id)
        if job is None or not CALLER.get().grant.may_use(job.build.name):
            raise UnknownBuildError(build_id[:80])
        return job


def _count(value: object) -> int:
    return min(max(value, 0), _LARGEST) if isinstance(value, int) else 0


def _now() -> datetime:
    return datetime.now(UTC)
