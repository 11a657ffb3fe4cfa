"""Operators that come over the wire: whole, verified and at once, or not at all."""

import asyncio
import errno
import hashlib
import os

import grpc
import pytest
from steer_client import (
    InvalidRequestError,
    OperatorChangedError,
    OperatorExistsError,
    OperatorUse,
    ServerBusyError,
    ServerError,
    SteerError,
    StoreFullError,
    UnknownOperatorError,
)
from steer_client import _admin as asked
from steering.v1 import operator_admin_pb2 as pb
from steering.v1 import operator_admin_pb2_grpc

from operators.core.artifact import to_bytes
from tests.server.admin.conftest import SHORT

ID = "an upload"


def start_of(data, name="dress", upload_id=ID, **fields):
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    known = {"upload_id": upload_id, "name": name, "size_bytes": len(data), "file_digest": digest}
    return pb.UploadOperatorRequest(start=pb.UploadStart(**known | fields))


def chunk(data):
    return pb.UploadOperatorRequest(chunk=data)


@pytest.fixture
async def stub(served):
    async with grpc.aio.insecure_channel(served.target) as channel:
        yield operator_admin_pb2_grpc.OperatorAdminServiceStub(channel)


async def refused(call):
    """Status and reason of a call that fails."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details()


async def held_of(stub, upload_id=ID):
    """Bytes of an unfinished upload; None where there is none."""
    call = stub.GetUpload(pb.GetUploadRequest(upload_id=upload_id))
    code = await call.code()
    assert code in (grpc.StatusCode.OK, grpc.StatusCode.NOT_FOUND)
    return (await call).received_bytes if code is grpc.StatusCode.OK else None


async def test_an_uploaded_operator_is_in_the_store_and_in_service_at_once(served, other_artifact, file_of):
    plain, seen = await served.plain(), []
    info = await served.client.upload_operator(file_of(other_artifact), progress=lambda *sent: seen.append(sent))
    size = len(to_bytes(other_artifact))
    assert (info.name, info.digest, info.problem) == ("dress", other_artifact.digest, None)
    assert seen[-1] == (size, size)
    assert served.store.load("dress").digest == other_artifact.digest
    text = await served.client.generate("the bay", operators=[OperatorUse("dress", 0.5)], sampling=SHORT)
    assert text.receipts[0].digest == other_artifact.digest
    assert await served.plain() == plain
    assert set(served.files()) == {"golden.safetensors", "dress.safetensors"}


async def test_without_the_option_there_is_no_such_service(serve, other_artifact, file_of):
    served = await serve(operator_admin=False)
    for call in (
        served.client.upload_operator(file_of(other_artifact)),
        served.client.load_operator("golden"),
        served.client.unload_operator("golden"),
        served.client.delete_operator("golden", "any"),
    ):
        with pytest.raises(ServerError) as caught:
            await call
        assert caught.value.code is grpc.StatusCode.UNIMPLEMENTED
    assert await served.names() == {"golden": True}


async def test_an_upload_that_broke_off_goes_on_where_it_stopped(served, stub, other_artifact, file_of):
    path = file_of(other_artifact)
    data = path.read_bytes()
    file = asked.operator_file(path, None, None)
    begun = start_of(data, upload_id=file.upload_id)
    call = stub.UploadOperator()
    await call.write(begun)
    await call.write(chunk(data[:1000]))
    while await held_of(stub, file.upload_id) != 1000:
        await asyncio.sleep(0.01)
    # Not cancelled: the server cannot know that nobody is at its other end.
    sent = []
    info = await served.client.upload_operator(path, progress=lambda done, _: sent.append(done))
    assert info.digest == other_artifact.digest
    assert sent[0] == min(1000 + asked.CHUNK, len(data))
    assert await held_of(stub, file.upload_id) is None
    await call.write(chunk(data[1000:]))
    assert (await refused(call))[1] == "this upload ended in the meantime"


@pytest.mark.parametrize(
    ("fields", "chunks", "field"),
    [
        ({}, ["damaged"], "start.file_digest"),
        ({"file_digest": "sha256:" + "0" * 64}, ["all"], "start.file_digest"),
        ({}, ["all", "more"], "chunk"),
        ({}, ["nothing"], "chunk"),
        ({"name": "../x"}, ["all"], "start.name"),
        ({"replace": "this one"}, ["all"], "start.replace"),
        ({"size_bytes": 0}, [], "start.size_bytes"),
        ({"size_bytes": 5 << 30}, [], "start.size_bytes"),
        ({"upload_id": ""}, [], "start.upload_id"),
        ({"file_digest": "abc"}, [], "start.file_digest"),
    ],
)
async def test_what_is_not_as_announced_is_refused_and_leaves_nothing(
    served, stub, other_artifact, fields, chunks, field
):
    data, plain = to_bytes(other_artifact), await served.plain()
    before = served.files()
    parts = {"all": data, "damaged": data[:-1] + bytes([data[-1] ^ 1]), "more": b"x", "nothing": b""}
    code, details = await refused(
        stub.UploadOperator(iter([start_of(data, **fields), *(chunk(parts[name]) for name in chunks)]))
    )
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert details.startswith(f"{field}:")
    assert served.files() == before
    assert await held_of(stub) is None
    assert await served.plain() == plain


@pytest.mark.parametrize("data", [b"x" * 100, b"PK\x03\x04" + bytes(100), b"\x80\x04" + bytes(100)])
async def test_a_file_that_is_no_operator_never_appears(served, stub, data):
    before = served.files()
    code, details = await refused(stub.UploadOperator(iter([start_of(data), chunk(data)])))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert details.startswith("chunk: is of no operator for this server: dress: ")
    assert served.files() == before


async def test_an_operator_of_another_model_is_refused(served, artifact, remake, file_of):
    other = remake(artifact, model_fingerprint=f"weights-sha256:{'1' * 64}")
    with pytest.raises(InvalidRequestError, match="this server has"):
        await served.client.upload_operator(file_of(other))
    assert await served.names() == {"golden": True}


async def test_messages_out_of_order_are_refused(served, stub, other_artifact):
    data = to_bytes(other_artifact)
    for messages in ([], [chunk(data)], [start_of(data), start_of(data)], [start_of(data), pb.UploadOperatorRequest()]):
        code, _ = await refused(stub.UploadOperator(iter(messages)))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert list(served.files()) == ["golden.safetensors"]


async def test_a_name_is_replaced_only_where_the_request_says_so(served, artifact, other_artifact, file_of):
    path = file_of(other_artifact, "golden")
    with pytest.raises(OperatorExistsError) as taken:
        await served.client.upload_operator(path)
    assert taken.value.metadata == {"found": artifact.digest}
    with pytest.raises(OperatorChangedError) as changed:
        await served.client.upload_operator(path, replace=other_artifact.digest)
    assert changed.value.metadata == {"expected": other_artifact.digest, "found": artifact.digest}
    with pytest.raises(UnknownOperatorError):
        await served.client.upload_operator(path, name="dress", replace=artifact.digest)
    assert served.store.load("golden").digest == artifact.digest
    assert (await served.client.upload_operator(path, replace=artifact.digest)).digest == other_artifact.digest
    assert (
        await served.client.upload_operator(file_of(artifact), name="golden", replace="any")
    ).digest == artifact.digest


async def test_of_two_uploads_of_one_name_at_once_one_is_refused(served, stub, other_artifact, low_artifact):
    """Both have sent all but their last byte before either is finished."""
    calls = {}
    for each in (other_artifact, low_artifact):
        data = to_bytes(each)
        call = calls[each.digest] = stub.UploadOperator()
        await call.write(start_of(data, upload_id=each.digest[:40]))
        await call.write(chunk(data[:-1]))
    for each in (other_artifact, low_artifact):
        await calls[each.digest].write(chunk(to_bytes(each)[-1:]))
        await calls[each.digest].done_writing()
    answers = await asyncio.gather(*calls.values(), return_exceptions=True)
    won = [answer.operator.digest for answer in answers if isinstance(answer, pb.UploadOperatorResponse)]
    lost = [answer.code() for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
    assert lost == [grpc.StatusCode.ALREADY_EXISTS]
    assert won == [served.store.load("dress").digest] == [(await served.client.operator("dress")).digest]
    assert set(served.files()) == {"golden.safetensors", "dress.safetensors"}


async def test_unfinished_uploads_are_bounded_in_number_and_bytes(serve, other_artifact):
    data = to_bytes(other_artifact)
    served = await serve(max_uploads=2, max_upload_bytes=2 * len(data) - 1)
    async with grpc.aio.insecure_channel(served.target) as channel:
        stub = operator_admin_pb2_grpc.OperatorAdminServiceStub(channel)
        assert (await refused(stub.UploadOperator(iter([start_of(data), chunk(data[:9])]))))[0] is (
            grpc.StatusCode.FAILED_PRECONDITION
        )
        code, details = await refused(stub.UploadOperator(iter([start_of(data, upload_id="other")])))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "STEER_MAX_UPLOAD_BYTES" in details
        small = pb.UploadOperatorRequest(start=start_of(data, upload_id="small").start)
        small.start.size_bytes = 100
        await refused(stub.UploadOperator(iter([small])))
        code, details = await refused(stub.UploadOperator(iter([start_of(data, upload_id="third")])))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "2 uploads are unfinished" in details
        assert await held_of(stub) == 9
        code, details = await refused(stub.UploadOperator(iter([start_of(data, offset=4), chunk(data[4:])])))
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert "9 bytes of this upload are held" in details
        code, details = await refused(stub.UploadOperator(iter([start_of(data, name="x", offset=9)])))
        assert details.startswith("start.upload_id:")
        assert (await stub.UploadOperator(iter([start_of(data, offset=9), chunk(data[9:])]))).operator.name == "dress"


async def test_what_nobody_goes_on_with_is_removed(serve, other_artifact):
    served, data = await serve(upload_age=0.1), to_bytes(other_artifact)
    async with grpc.aio.insecure_channel(served.target) as channel:
        stub = operator_admin_pb2_grpc.OperatorAdminServiceStub(channel)
        await refused(stub.UploadOperator(iter([start_of(data), chunk(data[:9])])))
        assert len(served.files()) == 2
        while await held_of(stub) is not None:
            await asyncio.sleep(0.02)
    assert list(served.files()) == ["golden.safetensors"]


async def test_an_upload_that_stops_coming_ends_by_name(serve, other_artifact):
    served, data = await serve(client_patience=0.2), to_bytes(other_artifact)
    async with grpc.aio.insecure_channel(served.target) as channel:
        call = operator_admin_pb2_grpc.OperatorAdminServiceStub(channel).UploadOperator()
        await call.write(start_of(data))
        await call.write(chunk(data[:9]))
        assert (await refused(call))[0] is grpc.StatusCode.DEADLINE_EXCEEDED
        stub = operator_admin_pb2_grpc.OperatorAdminServiceStub(channel)
        assert await held_of(stub) == 9


async def test_what_a_killed_server_left_is_gone_after_the_next_start(serve, served):
    (served.store.path / ".dress.0123456789abcdef.tmp").write_bytes(b"half of it")
    await serve()
    assert list(served.files()) == ["golden.safetensors"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
async def test_a_disk_that_is_full_leaves_nothing_and_says_so(served, other_artifact, file_of, monkeypatch, number):
    plain, before = await served.plain(), served.files()

    def full(descriptor):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(SteerError) as caught:
            await served.client.upload_operator(file_of(other_artifact))
    assert caught.value.reason == ("STORE_UNWRITABLE" if number == errno.EIO else "STORE_FULL")
    assert isinstance(caught.value, StoreFullError) == (number != errno.EIO)
    assert served.files() == before
    assert await served.plain() == plain
    assert (await served.client.upload_operator(file_of(other_artifact))).digest == other_artifact.digest


async def test_too_many_at_once_are_told_when_to_come_back(serve, other_artifact, file_of):
    served, data = await serve(max_uploads=1), to_bytes(other_artifact)
    async with grpc.aio.insecure_channel(served.target) as channel:
        stub = operator_admin_pb2_grpc.OperatorAdminServiceStub(channel)
        await refused(stub.UploadOperator(iter([start_of(data), chunk(data[:9])])))
    with pytest.raises(ServerBusyError) as caught:
        await served.client.upload_operator(file_of(other_artifact))
    assert caught.value.retry_after == 10.0


async def test_what_would_be_too_much_in_service_is_refused_before_it_is_sent(serve, other_artifact):
    served = await serve(max_served_bytes=1)
    data = to_bytes(other_artifact)
    async with grpc.aio.insecure_channel(served.target) as channel:
        call = operator_admin_pb2_grpc.OperatorAdminServiceStub(channel).UploadOperator()
        await call.write(start_of(data))
        # Of the file itself nothing was sent.
        assert await asyncio.wait_for(call.code(), 10) is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "STEER_MAX_SERVED_BYTES" in await call.details()
    # What makes room is done all the same.
    await served.client.delete_operator("golden", "any")
    assert served.files() == {}
