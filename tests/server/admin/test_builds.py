"""Operators that are built for clients: as jobs in processes of their own, which leave an operator or nothing."""

import asyncio
import os
import signal
import time
from pathlib import Path

import grpc
import psutil
import pytest
import structlog
from steer_client import OperatorUse
from steering.v1 import operator_admin_pb2 as pb
from steering.v1 import operator_admin_pb2_grpc
from steering.v1 import steering_pb2 as sp

from operators.core.artifact import to_bytes
from steer_server.admin import build_process
from steer_server.admin.work_directory import work_directory
from steer_server.types import BuildRequest
from tests.server.admin.conftest import SHORT

PENDING = (pb.BUILD_STATE_WAITING, pb.BUILD_STATE_RUNNING)


def request(name="bay", **fields):
    return pb.BuildOperatorRequest(name=name, **{"texts": ["the bay"], "layer": 2, "rank": 3, **fields})


@pytest.fixture
def stub_of():
    channels = []

    def make(served):
        channels.append(grpc.aio.insecure_channel(served.target))
        return operator_admin_pb2_grpc.OperatorAdminServiceStub(channels[-1])

    return make


@pytest.fixture
async def building(serve, tiny_directory):
    """A server whose builds load the tiny model from a directory."""
    return await serve(model=str(tiny_directory("llama")))


@pytest.fixture
def stub(building, stub_of):
    return stub_of(building)


async def watched(stub, build, until=lambda job: False):
    """The reports of a job, up to its end or to one that a test looks for."""
    seen = []
    call = stub.WatchBuild(pb.WatchBuildRequest(id=build.id))
    async for job in call:
        seen.append(job)
        if until(job):
            call.cancel()
            break
    return seen


async def code_of(call):
    """Status and words of a call that fails."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details()


def running_child():
    """The process of the one build that runs."""
    found = [each for each in psutil.Process().children(recursive=True) if "build" in each.cmdline()]
    return found[0] if found else None


async def test_a_build_ends_in_an_operator_that_is_in_service(building, stub, monkeypatch):
    plain = await building.plain()
    build = await stub.BuildOperator(request(texts=["the bay", 'a "bridge"\n[[x]] \\ \u2603'], strength=0.25))
    assert build.state in PENDING
    # Neither a watcher who leaves nor a clock that is set back changes anything.
    await watched(stub, build, lambda job: True)
    real = time.time
    with monkeypatch.context() as patched:
        patched.setattr(time, "time", lambda: real() - 1e6)
        reports = await watched(stub, build)
    last = reports[-1]
    assert last.state == pb.BUILD_STATE_SUCCEEDED, last
    assert (last.operator.name, last.operator.problem, last.operator.rank) == ("bay", "", 3)
    assert [last.operator.concept, last.operator.more_texts[0].text] == ["the bay", 'a "bridge"\n[[x]] \\ \u2603']
    assert last.operator.recommended_strength == 0.25
    assert last.caller == "ipv4:127.0.0.1"
    assert all(last.HasField(name) for name in ("created", "started", "ended"))
    counted = [job for job in reports if job.total]
    assert {job.stage for job in counted} == {"Jacobian products"}
    assert all(job.done <= job.total for job in counted)
    text = await building.client.generate("the bay", operators=[OperatorUse("bay", 0.5)], sampling=SHORT)
    assert text.receipts[0].digest == last.operator.digest == building.store.load("bay").digest
    assert sorted(building.files()) == ["bay.safetensors", "golden.safetensors"]
    assert await building.plain() == plain
    # Who comes late sees the end, and so does the list.
    assert await watched(stub, build) == [last]
    assert list((await stub.ListBuilds(pb.ListBuildsRequest())).builds) == [last]
    assert (await code_of(stub.BuildOperator(request())))[0] is grpc.StatusCode.ALREADY_EXISTS


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"name": "../x"}, "name"),
        ({"texts": []}, "texts"),
        ({"texts": [""]}, "texts"),
        ({"texts": ["x" * 4097]}, "texts"),
        ({"texts": ["x"] * 257}, "texts"),
        ({"texts": ["x" * 16000] * 100}, "texts"),
        ({"words": ["x"] * 257}, "words"),
        ({"layer": 0}, "layer"),
        ({"layer": 5}, "layer"),
        ({"rank": 0}, "rank"),
        ({"rank": 41}, "rank"),
        ({"exact": True}, "exact"),
        ({"tolerance": 0.1}, "tolerance"),
        ({"strength": float("nan")}, "strength"),
        ({"blend": 1.5}, "blend"),
        ({"positions": sp.Positions(start=4, end=4)}, "positions.end"),
        ({"rule": 9}, "rule"),
        ({"quick": True}, "quick"),
        ({"calibrate": True}, "words"),
        ({"calibrate": True, "words": ["x"], "blend": 0.5}, "blend"),
        ({"replace": "x"}, "replace"),
    ],
)
async def test_what_no_build_accepts_is_refused_by_its_field(served, stub_of, fields, field):
    code, words = await code_of(stub_of(served).BuildOperator(request(**fields)))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert words.startswith(f"{field}"), words
    assert list(served.files()) == ["golden.safetensors"]


@pytest.fixture
async def faked(serve, monkeypatch):
    """A server whose builds are :mod:`fake_builder`'s."""
    monkeypatch.setattr(build_process, "_BUILDER", (str(Path(__file__).with_name("fake_builder.py")),))
    return await serve(build_memory="256MiB")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("answers", "no such layer"),
        ("hogs", "there is not enough memory"),
        ("silent", "its process ended well and left no operator"),
        ("lies", "lies: not a whole safetensors file"),
        ("talks", 'its process ended with status 3: {"stage"'),
    ],
)
async def test_a_build_that_fails_says_why(faked, stub_of, name, problem):
    stub, plain = stub_of(faked), await faked.plain()
    with structlog.testing.capture_logs() as lines:
        reports = await watched(stub, await stub.BuildOperator(request(name)))
    # What the builder said may repeat the texts: those who may watch it are told, and the log is not.
    [line] = [line for line in lines if line["event"] == "build ended"]
    assert line["error"] in ("BuildFailedError", "ArtifactError")
    assert problem not in str(line)
    assert reports[-1].state == pb.BUILD_STATE_FAILED
    assert reports[-1].problem.startswith(problem)
    assert list(faked.files()) == ["golden.safetensors"]
    assert await faked.plain() == plain
    if name == "talks":
        assert (reports[-1].stage, reports[-1].done, reports[-1].total) == ("x" * 200, 0, 0)


@pytest.mark.parametrize("name", ["counts", "writes"])
@pytest.mark.parametrize("end", ["killed at its start", "killed", "cancelled", "stopped with the server", "too late"])
async def test_a_build_that_is_ended_leaves_nothing(serve, faked, stub_of, name, end):
    served = await serve(build_time=0.5) if end == "too late" else faked
    stub, plain = stub_of(served), await served.plain()
    build = await stub.BuildOperator(request(name))
    if end not in ("killed at its start", "too late"):
        wanted = {"counts": "counting", "writes": "writing"}[name]
        await watched(stub, build, lambda job: job.stage == wanted)
    while end != "too late" and (child := running_child()) is None:
        await asyncio.sleep(0.01)
    if end == "cancelled":
        last = await stub.CancelBuild(pb.CancelBuildRequest(id=build.id))
        assert await stub.CancelBuild(pb.CancelBuildRequest(id=build.id)) == last
    elif end == "stopped with the server":
        await served.server.admin.close()
        assert (await code_of(stub.BuildOperator(request())))[0] is grpc.StatusCode.UNAVAILABLE
    elif end != "too late":
        child.send_signal(signal.SIGKILL)
    last = (await watched(stub, build))[-1]
    expected = {
        "killed at its start": (pb.BUILD_STATE_FAILED, "its process was ended by SIGKILL"),
        "killed": (pb.BUILD_STATE_FAILED, "its process was ended by SIGKILL"),
        "too late": (pb.BUILD_STATE_FAILED, "it took longer than 0.5 s, the most accepted"),
    }
    assert (last.state, last.problem) == expected.get(end, (pb.BUILD_STATE_CANCELLED, ""))
    assert running_child() is None
    assert list(served.files()) == ["golden.safetensors"]
    assert await served.plain() == plain


async def test_a_build_has_the_bounds_that_it_is_given(faked, stub_of):
    stub = stub_of(faked)
    build = await stub.BuildOperator(request("counts"))
    await watched(stub, build, lambda job: job.stage == "counting")
    child = running_child()
    assert child.nice() == min(19, os.nice(0) + 10)
    assert child.rlimit(psutil.RLIMIT_DATA) == (256 << 20, 256 << 20)
    assert os.getpgid(child.pid) != os.getpgid(0)
    # What it is to build is in no list of processes, and nobody else may read it.
    assert "the bay" not in " ".join(child.cmdline())
    concept = Path(child.cmdline()[child.cmdline().index("--file") + 1])
    assert concept.stat().st_mode & 0o077 == 0


@pytest.fixture
def slow(monkeypatch, artifact):
    """Builds that take until a test says so, without a process."""
    go_on = asyncio.Event()

    async def run(request, limits, work, report):
        report({"stage": "slow", "done": 1, "total": 0, "seconds_left": None})
        await go_on.wait()
        raise build_process.BuildFailedError("it was slow")

    monkeypatch.setattr("steer_server.admin.builds.run_build", run)
    return go_on


async def test_builds_wait_for_their_turn_and_too_many_are_refused(serve, stub_of, slow):
    served = await serve(max_waiting_builds=2)
    stub = stub_of(served)
    builds = [await stub.BuildOperator(request(f"b{number}")) for number in range(2)]
    await watched(stub, builds[0], lambda job: job.stage == "slow")
    builds.append(await stub.BuildOperator(request("b2")))
    code, words = await code_of(stub.BuildOperator(request("b3")))
    assert (code, words[:19]) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "2 builds wait alrea")
    listed = (await stub.ListBuilds(pb.ListBuildsRequest())).builds
    assert [job.state for job in listed] == [pb.BUILD_STATE_RUNNING, *[pb.BUILD_STATE_WAITING] * 2]
    cancelled = await stub.CancelBuild(pb.CancelBuildRequest(id=builds[1].id))
    assert cancelled.state == pb.BUILD_STATE_CANCELLED
    slow.set()
    ends = [(await watched(stub, each))[-1] for each in builds]
    assert [job.problem for job in ends] == ["it was slow", "", "it was slow"]
    code, _ = await code_of(stub.CancelBuild(pb.CancelBuildRequest(id="x" * 60)))
    assert code is grpc.StatusCode.NOT_FOUND


async def test_the_last_builds_are_remembered_and_no_more(serve, stub_of, slow):
    served = await serve(max_waiting_builds=100)
    slow.set()
    stub = stub_of(served)
    ids = [(await stub.BuildOperator(request(f"b{number}"))).id for number in range(70)]
    await watched(stub, pb.OperatorBuild(id=ids[-1]))
    assert [job.id for job in (await stub.ListBuilds(pb.ListBuildsRequest())).builds] == ids[-64:]


async def test_work_that_a_killed_server_left_is_gone_after_the_next_start(serve, served):
    store = served.store.path
    with work_directory(store) as held:
        left = store / ".build-abandoned"
        (left / "work").mkdir(parents=True)
        await serve()
        assert not left.exists()
        assert held.exists()
    assert list(served.files()) == ["golden.safetensors"]


def test_a_text_is_data_whatever_is_in_it():
    import tomllib

    text = "".join(map(chr, (*range(256), 0x2028, 0xFFFF, 0x1F600))) + '"""\n[[concept]]\nname = "x"'
    asked = BuildRequest("a", (text, "b"), words=("x\n",), tolerance=1e-7, strength=-0.5, exact=False, layer=3)
    [read] = tomllib.loads(build_process.concept_file(asked))["concept"]
    assert read == {
        "name": "a",
        "texts": [text, "b"],
        "words": ["x\n"],
        "tolerance": 1e-7,
        "strength": -0.5,
        "layer": 3,
    }


def test_a_child_gets_nothing_that_was_told_to_the_server(monkeypatch):
    secrets = ("STEER_TOKENS", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "SSH_AUTH_SOCK")
    for name in secrets:
        monkeypatch.setenv(name, "secret")
    for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, f"/models/{name}")
    environment = build_process._environment(2)
    assert not environment.keys() & set(secrets)
    # It finds the model that the server found, wherever that has it.
    assert {name for name, value in environment.items() if value == f"/models/{name}"} == {
        "HF_HOME",
        "HF_HUB_CACHE",
        "HUGGINGFACE_HUB_CACHE",
        "XDG_CACHE_HOME",
    }
    assert environment["PATH"] == os.environ["PATH"]
    assert environment["OMP_NUM_THREADS"] == "2"
    assert os.environ["STEER_TOKENS"] == "secret"


async def test_an_operator_that_came_meanwhile_is_not_overwritten(
    serve, stub_of, artifact, other_artifact, monkeypatch
):
    served = await serve()

    async def run(request, limits, work, report):
        served.store.save("bay", artifact)
        path = work / "bay.safetensors"
        path.write_bytes(to_bytes(other_artifact))
        return path

    monkeypatch.setattr("steer_server.admin.builds.run_build", run)
    stub = stub_of(served)
    last = (await watched(stub, await stub.BuildOperator(request())))[-1]
    assert last.state == pb.BUILD_STATE_FAILED
    assert "is in the store already" in last.problem
    assert served.store.load("bay").digest == artifact.digest


async def test_whoever_watches_a_build_does_not_hold_up_the_end(serve, stub_of, slow):
    served = await serve(grace=60.0)
    stub = stub_of(served)
    build = await stub.BuildOperator(request())
    watching = asyncio.ensure_future(watched(stub, build))
    await watched(stub, build, lambda job: job.state == pb.BUILD_STATE_RUNNING)
    await asyncio.wait_for(served.server.stop(), 10)
    assert (await watching)[-1].state == pb.BUILD_STATE_CANCELLED
