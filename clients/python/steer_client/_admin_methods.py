"""The clients' methods that change a server's store; see `_methods`, which they are a part of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from os import PathLike
from typing import TypeVar

from steer_client import _admin_calls as calls
from steer_client._admin import operator_file
from steer_client._calls import Unary
from steer_client._defaults import CLIENT_TIMEOUT, Timeout
from steer_client._dual_method import method
from steer_client._errors import ServerUnavailableError, SteerError
from steer_client._store import OperatorInfo

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
        timeout: Timeout = CLIENT_TIMEOUT,
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
                interrupted = isinstance(error, ServerUnavailableError) or error.reason in calls.INTERRUPTED
                if not interrupted or left == 0:
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

    @abstractmethod
    async def _answer(self, call: Unary[Result], timeout: Timeout) -> Result:
        """Sends one request and decodes its answer. Raises a SteerError."""
