"""The clients' methods that change a server's store; see `_methods`, which they are a part of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from os import PathLike
from typing import TypeVar

from steer_client import _admin_calls as calls
from steer_client._admin import BuildOperatorRequest, OperatorBuild, operator_file
from steer_client._aio_streams import AsyncBuildStream
from steer_client._calls import Streaming, Unary
from steer_client._defaults import CLIENT_TIMEOUT, Timeout
from steer_client._dual_method import method, stream_method
from steer_client._errors import BuildFailedError, SteerError
from steer_client._positions import Positions
from steer_client._requests import Anchor, FirstToken, Rule
from steer_client._store import OperatorInfo
from steer_client._streams import StartedCall
from steer_client._sync_streams import BuildStream

Item = TypeVar("Item")
Result = TypeVar("Result")

#: Of an upload: each goes on where the one before it was interrupted.
_ATTEMPTS = 3


class AdminMethods(ABC):
    """For servers that were started with --operator-admin. One server at a time: see `reload_operators`."""

    target: str

    @method
    async def upload_operator(
        self,
        path: str | PathLike[str],
        *,
        name: str | None = None,
        replace: str = "",
        progress: Callable[[int, int], object] | None = None,
        timeout: Timeout = None,
    ) -> OperatorInfo:
        """Stores an operator's file at the server and takes it into service, whole and verified or not at all.

        `name` is by default the file's own. `replace` says what it may replace: nothing, the operator of a digest, or
        "any". `progress` is called with the bytes that were sent, and those of the file. What was interrupted goes on
        where it stopped, also when the same file is uploaded again within an hour. `timeout` is of each attempt.

        Raises OperatorExistsError where the name is taken, OperatorChangedError where it has another digest than the
        one to replace, and StoreFullError.
        """
        file = operator_file(path, name, progress)
        for left in reversed(range(_ATTEMPTS)):
            offset = await self._held(file.upload_id, timeout)
            try:
                return await self._answer(calls.upload(file, offset, replace, self.target), timeout)
            except SteerError as error:
                if not calls.was_interrupted(error) or left == 0:
                    raise
        raise AssertionError("the last attempt returns or raises")

    async def _held(self, upload_id: str, timeout: Timeout) -> int:
        try:
            return await self._answer(calls.get_upload(upload_id), timeout)
        except SteerError as error:
            if error.reason == calls.NOTHING_HELD:
                return 0
            raise

    @method
    async def load_operator(self, name: str, *, timeout: Timeout = CLIENT_TIMEOUT) -> OperatorInfo:
        """Takes an operator of the server's store into service: one that was unloaded, or whose file came or changed.

        Raises UnknownOperatorError, and OperatorUnusableError where its file cannot be used.
        """
        return await self._answer(calls.load(name, self.target), timeout)

    @method
    async def unload_operator(self, name: str, *, timeout: Timeout = CLIENT_TIMEOUT) -> OperatorInfo:
        """Takes an operator out of service and keeps its file; so it stays, after a restart too, until it is loaded.

        Requests under way keep it to their end. Raises UnknownOperatorError.
        """
        return await self._answer(calls.unload(name, self.target), timeout)

    @method
    async def delete_operator(self, name: str, digest: str, *, timeout: Timeout = CLIENT_TIMEOUT) -> None:
        """Removes an operator from the server's store, if it has this `digest`; "any" is every one.

        Requests under way keep it to their end. Raises UnknownOperatorError and OperatorChangedError.
        """
        return await self._answer(calls.delete(name, digest, self.target), timeout)

    @method
    async def build_operator(
        self,
        name: str,
        texts: Sequence[str],
        *,
        words: Sequence[str] = (),
        layer: int | None = None,
        rank: int | None = None,
        exact: bool = False,
        tolerance: float | None = None,
        strength: float | None = None,
        rule: Rule | None = None,
        blend: float | None = None,
        positions: Positions | None = None,
        anchor: Anchor | None = None,
        first_token: FirstToken | None = None,
        calibrate: bool = False,
        quick: bool = False,
        replace: str = "",
        timeout: Timeout = CLIENT_TIMEOUT,
    ) -> OperatorBuild:
        """Begins a build of an operator at the server, from texts, and returns at once.

        The job goes on when this client leaves; `watch_build` and `wait_for_build` follow it. What is None is as
        `steer-operators build` has it. `calibrate` finds setting and layer by trial, for which `words` show the concept
        in a text; `quick` with fewer of each. `exact` and `tolerance` take the place of a `rank`; `replace` is that of
        `upload_operator`.
        """
        given = (name, texts, words, layer, rank, exact, tolerance, strength, rule, blend, positions, anchor)
        request = BuildOperatorRequest(*given, first_token, calibrate, quick, replace)
        return await self._answer(calls.build(request, self.target), timeout)

    @stream_method(BuildStream, AsyncBuildStream)
    def watch_build(
        self, build: OperatorBuild | str, *, timeout: Timeout = None
    ) -> StartedCall[OperatorBuild, OperatorBuild]:
        """A build, or the one of an id, as it is and then whenever something of it has changed, up to its end."""
        return self._start(calls.watch(_id_of(build)), timeout)

    @method
    async def wait_for_build(self, build: OperatorBuild | str, *, timeout: Timeout = None) -> OperatorInfo:
        """What was built, once it is in service. Raises BuildFailedError where the build failed or was cancelled."""
        ended = await self._read_to_end(self._start(calls.watch(_id_of(build)), timeout))
        if ended.operator is None:
            raise BuildFailedError(f"build of {ended.name!r} {ended.state}: {ended.problem or 'ended'}", build=ended)
        return ended.operator

    @method
    async def cancel_build(self, build: OperatorBuild | str, *, timeout: Timeout = CLIENT_TIMEOUT) -> OperatorBuild:
        """Ends a build, and returns it as it ended; one that had ended before stays as it is."""
        return await self._answer(calls.cancel(_id_of(build)), timeout)

    @method
    async def builds(self, *, timeout: Timeout = CLIENT_TIMEOUT) -> tuple[OperatorBuild, ...]:
        """The builds that wait and run at the server, and the last that ended, by their beginning."""
        return await self._answer(calls.builds(), timeout)

    @abstractmethod
    def _start(self, call: Streaming[Item, Result], timeout: Timeout) -> StartedCall[Item, Result]:
        """A stream that is about to be read."""

    @abstractmethod
    async def _read_to_end(self, call: StartedCall[Item, Result]) -> Result:
        """Reads a stream to its end and returns its result. Raises a SteerError."""

    @abstractmethod
    async def _answer(self, call: Unary[Result], timeout: Timeout) -> Result:
        """Sends one request and decodes its answer. Raises a SteerError."""


def _id_of(build: OperatorBuild | str) -> str:
    return build.id if isinstance(build, OperatorBuild) else build
