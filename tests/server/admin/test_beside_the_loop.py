"""Nothing in the store is made, written or removed by the thread that answers everybody else."""

import asyncio
import sys
import threading

import grpc
import pytest
from steering.v1 import operator_admin_pb2 as pb
from steering.v1 import operator_admin_pb2_grpc

from operators.core.artifact import to_bytes
from steer_server.admin import build_process
from tests.server.admin.test_builds import request, watched
from tests.server.admin.test_uploads import chunk, held_of, start_of

_CHANGES = {"open", "os.remove", "os.mkdir", "os.rmdir", "os.rename", "os.link", "os.truncate", "os.chmod"}


@pytest.fixture
async def stub_to(served):
    async with grpc.aio.insecure_channel(served.target) as channel:
        yield operator_admin_pb2_grpc.OperatorAdminServiceStub(channel)


@pytest.fixture
def on_the_loop(served):
    """What was done in the store by the thread of the event loop: the tests' too, which keep to others here."""
    seen, loop, store, is_over = [], threading.get_ident(), str(served.store.path), threading.Event()

    def hook(event, arguments):
        # It stays to the end of the process.
        if is_over.is_set() or event not in _CHANGES or threading.get_ident() != loop:
            return
        seen.extend((event, each) for each in arguments if isinstance(each, str) and each.startswith(store))

    sys.addaudithook(hook)
    yield seen
    is_over.set()


async def test_no_file_of_the_store_is_touched_on_the_event_loop(
    served, stub_to, on_the_loop, other_artifact, monkeypatch
):
    async def run(asked, limits, work, report):
        if asked.name == "fails":
            raise build_process.BuildFailedError("it failed")
        path = work / "bay.safetensors"
        await asyncio.to_thread(path.write_bytes, to_bytes(other_artifact))
        return path

    monkeypatch.setattr("steer_server.admin.builds.run_build", run)
    data = to_bytes(other_artifact)
    for name, state in (("bay", pb.BUILD_STATE_SUCCEEDED), ("fails", pb.BUILD_STATE_FAILED)):
        assert (await watched(stub_to, await stub_to.BuildOperator(request(name))))[-1].state == state
    await stub_to.UploadOperator(iter([start_of(data), chunk(data)]))
    # One that is refused when it is whole, one that nothing more comes of, and one that is there when the server stops.
    refused = stub_to.UploadOperator(iter([start_of(b"x" * 9, name="bad", upload_id="bad"), chunk(b"x" * 9)]))
    assert await refused.code() is grpc.StatusCode.INVALID_ARGUMENT
    uploads = served.server.admin.uploads
    for name in ("left", "stops"):
        await stub_to.UploadOperator(iter([start_of(data, name=name, upload_id=name), chunk(data[:9])])).code()
        assert await held_of(stub_to, name) == 9
    uploads._expire(uploads._unfinished["left"])
    await uploads.close()
    files = await asyncio.to_thread(lambda: sorted(served.files()))
    assert files == ["bay.safetensors", "dress.safetensors", "golden.safetensors"]
    assert on_the_loop == []
