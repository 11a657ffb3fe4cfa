"""The service that changes the store, registered only where the server was started with --operator-admin."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, TypeAlias

import grpc
from steering.v1 import operator_admin_pb2 as pb
from steering.v1 import operator_admin_pb2_grpc

from steer_server.admin.operator_admin import OperatorAdmin
from steer_server.errors import InvalidRequestError, RequestIncompleteError
from steer_server.registry import OperatorEntry
from steer_server.rpc import admin_codec as codec
from steer_server.rpc.call_record import current_call
from steer_server.rpc.operator_codec import operator

ADMIN_SERVICE = pb.DESCRIPTOR.services_by_name["OperatorAdminService"].full_name
_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class OperatorAdminService(operator_admin_pb2_grpc.OperatorAdminServiceServicer):
    """See ``steering.v1.OperatorAdminService``."""

    def __init__(self, admin: OperatorAdmin, *, patience: float) -> None:
        """``patience``: seconds for each message of a request that is a stream."""
        self._admin, self._patience = admin, patience

    async def UploadOperator(
        self, requests: AsyncIterator[pb.UploadOperatorRequest], context: _Context
    ) -> pb.UploadOperatorResponse:
        """A file in pieces."""
        messages = self._in_time(requests)
        first = await anext(messages, pb.UploadOperatorRequest())
        if first.WhichOneof("part") != "start":
            raise InvalidRequestError("start", "is missing; the first message has it, and the others a chunk each")
        start = codec.upload_start(first.start)
        _note(start.name)
        return pb.UploadOperatorResponse(operator=_told(await self._admin.uploads.receive(start, _chunks(messages))))

    async def GetUpload(self, request: pb.GetUploadRequest, context: _Context) -> pb.GetUploadResponse:
        """How far one has come."""
        received, size = self._admin.uploads.find(request.upload_id)
        return pb.GetUploadResponse(received_bytes=received, size_bytes=size)

    async def LoadOperator(self, request: pb.LoadOperatorRequest, context: _Context) -> pb.LoadOperatorResponse:
        """Into service."""
        _note(request.name)
        entry = await self._admin.threads.ask(lambda: self._admin.keeper.load(request.name))
        return pb.LoadOperatorResponse(operator=_told(entry))

    async def UnloadOperator(self, request: pb.UnloadOperatorRequest, context: _Context) -> pb.UnloadOperatorResponse:
        """Out of service."""
        _note(request.name)
        entry = await self._admin.threads.ask(lambda: self._admin.keeper.unload(request.name))
        return pb.UnloadOperatorResponse(operator=_told(entry))

    async def DeleteOperator(self, request: pb.DeleteOperatorRequest, context: _Context) -> pb.DeleteOperatorResponse:
        """Out of the store."""
        _note(request.name, request.digest)
        await self._admin.threads.ask(lambda: self._admin.keeper.delete(request.name, request.digest))
        return pb.DeleteOperatorResponse()

    async def BuildOperator(self, request: pb.BuildOperatorRequest, context: _Context) -> pb.OperatorBuild:
        """Begins a job."""
        asked = codec.build_request(request)
        _note(asked.name)
        return codec.build(await self._admin.builds.submit(asked))

    async def WatchBuild(self, request: pb.WatchBuildRequest, context: _Context) -> AsyncIterator[pb.OperatorBuild]:
        """A job up to its end."""
        async with aclosing(self._admin.builds.watch(request.id)) as changes:
            async for job, entry in changes:
                yield codec.build(job, entry)

    async def CancelBuild(self, request: pb.CancelBuildRequest, context: _Context) -> pb.OperatorBuild:
        """Ends a job."""
        job, entry = await self._admin.builds.cancel(request.id)
        _note(job.name)
        return codec.build(job, entry)

    async def ListBuilds(self, request: pb.ListBuildsRequest, context: _Context) -> pb.ListBuildsResponse:
        """All jobs."""
        return pb.ListBuildsResponse(builds=[codec.build(job, entry) for job, entry in self._admin.builds.all()])

    async def _in_time(
        self, requests: AsyncIterator[pb.UploadOperatorRequest]
    ) -> AsyncIterator[pb.UploadOperatorRequest]:
        """The messages. Raises :class:`RequestIncompleteError` where the next one does not come."""
        while True:
            try:
                async with asyncio.timeout(self._patience):
                    message = await anext(requests)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise RequestIncompleteError(self._patience) from None
            yield message


async def _chunks(messages: AsyncIterator[pb.UploadOperatorRequest]) -> AsyncIterator[bytes]:
    async for message in messages:
        if message.WhichOneof("part") != "chunk":
            raise InvalidRequestError("chunk", "is missing; every message behind the first has one")
        yield message.chunk


def _told(entry: OperatorEntry) -> Any:
    _note(entry.name, "" if entry.artifact is None else entry.artifact.digest)
    return operator(entry)


def _note(name: str, digest: str = "") -> None:
    """For the line of the log."""
    current_call().operators[name[:64]] = digest[:80]
