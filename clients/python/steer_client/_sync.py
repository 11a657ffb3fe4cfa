"""The blocking client."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self, TypeVar

import grpc

from steer_client._calls import Unary
from steer_client._channel import Stubs, channel_options
from steer_client._defaults import Timeout
from steer_client._dual_method import Blocking
from steer_client._methods import Methods
from steer_client._pool import ThreadPool
from steer_client._retry import Retries
from steer_client._streams import StartedCall
from steer_client._sync_streams import SyncStream
from steer_client._translate import translate_error

Item = TypeVar("Item")
Result = TypeVar("Result")


class SteerClient(Methods, Blocking):
    """A blocking client, for use from any number of threads; close it, or use it as a context manager.

    `target` is HOST:PORT, by default the environment's STEER_TARGET, else 127.0.0.1:50051. Several servers are
    ipv4:HOST:PORT,HOST:PORT or dns:///NAME:PORT: requests go to them in turn, skipping those that do not serve;
    a request that fails before a server began to answer goes to the next one, once. `timeout` is in seconds, for
    a whole call with its stream; None is no limit; every method has a `timeout` of its own. The channel is
    plaintext unless `credentials` are given.

    A call that a busy server refuses is sent again when the server says so, and one that reached no server twice more,
    soon; all within `timeout`, and not after the first piece of a stream. `retry=False` raises the error instead.

    Every method raises a SteerError: InvalidRequestError before anything is sent when a value does not fit
    the contract, SteeringNotAppliedError when an answer lacks the receipts of its operators, else the error that
    the server reports.
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _connect(self, credentials: grpc.ChannelCredentials | None) -> None:
        options = channel_options(self.target)
        if credentials is None:
            self._channel = grpc.insecure_channel(self.target, options=options)
        else:
            self._channel = grpc.secure_channel(self.target, credentials, options=options)
        self._open_stubs = Stubs(self._channel)

    def _pool(self) -> ThreadPool:
        return ThreadPool()

    def _stubs(self) -> Stubs:
        return self._open_stubs

    # The coroutines below never suspend, as `_dual_method` needs.

    async def _disconnect(self) -> None:
        self._channel.close()

    async def _answer(self, call: Unary[Result], timeout: Timeout) -> Result:
        seconds = self._seconds(timeout)
        send, retries = self._stubs().method(call.service, call.method), Retries(seconds, enabled=self._retry)
        while True:
            try:
                answer = send(call.request, timeout=retries.timeout)
            except grpc.RpcError as error:
                failure = translate_error(error, target=self.target, timeout=seconds)
                pause = retries.pause_after(failure)
                if pause is None:
                    raise failure from error
                time.sleep(pause)
                continue
            return call.decode(answer)

    async def _read_to_end(self, call: StartedCall[Item, Result]) -> Result:
        stream = SyncStream(call)
        for _ in stream:
            pass
        return stream.result
