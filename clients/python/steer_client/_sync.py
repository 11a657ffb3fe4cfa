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

Item = TypeVar("Item")
Result = TypeVar("Result")


class SteerClient(Methods, Blocking):
    """A blocking client, for use from any number of threads; close it, or use it as a context manager.

    `target` is HOST:PORT, by default the environment's STEER_TARGET, else 127.0.0.1:50051. Several servers are
    ipv4:HOST:PORT,HOST:PORT or dns:///NAME:PORT: requests go to them in turn, skipping those that do not serve;
    a request that fails before a server began to answer goes to the next one, once. `timeout` is in seconds, for
    a whole call with its stream; None is no limit; every method has a `timeout` of its own.

    The channel is plaintext, or TLS with `tls=True` or one of the files, in PEM: `ca` has the authorities to trust, by
    default gRPC's list of public ones, `cert` and `key` are the client's own. `server_name` is the name in the
    server's certificate where it is not the target's host; several servers by ipv4: need it. gRPC's own `credentials`
    may stand in place of these.

    `token` says who is calling: a text, or a function that is asked for it before each call; `token_file` is a file
    that has it, read before each call. `metadata` is sent with every call, for a proxy that asks for more. What is not
    given is taken from STEER_TLS, STEER_CA, STEER_CERT, STEER_KEY, and STEER_TOKEN or STEER_TOKEN_FILE. A token for
    another machine without TLS is an InsecureTokenError, unless `insecure_token=True` says that the network is private.

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

    def _connect(self) -> None:
        options, credentials = channel_options(self.target, self._access.server_name), self._access.credentials
        if credentials is None:
            self._channel = grpc.insecure_channel(self.target, options=options)
        else:
            self._channel = grpc.secure_channel(self.target, credentials, options=options)
        self._open_stubs = Stubs(self._channel, self._access.metadata.of_call)

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
                answer = send(call.sent, timeout=retries.timeout)
            except grpc.RpcError as error:
                failure = self._translate(error, timeout=seconds)
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
