"""Operators that are taken out of service, into it, and out of the store, while requests use them."""

import asyncio
import threading
from contextlib import contextmanager
from functools import partial

import pytest
from steer_client import (
    InvalidRequestError,
    OperatorChangedError,
    OperatorUnusableError,
    OperatorUse,
    SamplingParams,
    SteerError,
    StoreFullError,
    UnknownOperatorError,
)

from operators.core.artifact import to_bytes
from operators.core.store import Store
from steer_server.access.grant import Grant
from steer_server.caller import CALLER, Caller
from steer_server.errors import PermissionDeniedError

LONG = SamplingParams(max_tokens=40, ignore_eos=True)


async def test_an_unloaded_operator_stays_out_of_service_until_it_is_loaded(serve, served, artifact):
    info = await served.client.unload_operator("golden")
    assert "unloaded" in info.problem
    with pytest.raises(OperatorUnusableError, match="unloaded"):
        await served.client.generate("x", operators=["golden"])
    assert (await served.client.reload_operators()).unusable == ("golden",)
    # Another server of the store, and this one after a restart.
    assert await (await serve()).names() == {"golden": False}
    assert served.store.load("golden").digest == artifact.digest
    assert (await served.client.load_operator("golden")).digest == artifact.digest
    assert (await served.client.generate("x", operators=["golden"], sampling=LONG)).receipts
    assert list(served.files()) == ["golden.safetensors"]


async def test_load_takes_in_one_new_file_and_leaves_the_others(served, other_artifact):
    served.store.save("dress", other_artifact)
    served.store.save("later", other_artifact)
    assert (await served.client.load_operator("dress")).digest == other_artifact.digest
    assert await served.names() == {"dress": True, "golden": True}


async def test_load_says_what_is_wrong_with_a_file(served):
    (served.store.path / "broken.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(OperatorUnusableError, match="broken"):
        await served.client.load_operator("broken")


async def test_delete_needs_the_digest_of_what_it_deletes(served, artifact, other_artifact):
    with pytest.raises(InvalidRequestError) as caught:
        await served.client.delete_operator("golden", "")
    assert caught.value.field == "digest"
    with pytest.raises(OperatorChangedError):
        await served.client.delete_operator("golden", other_artifact.digest)
    assert await served.names() == {"golden": True}
    await served.client.unload_operator("golden")
    await served.client.delete_operator("golden", artifact.digest)
    assert await served.names() == {}
    assert served.files() == {}
    (served.store.path / "broken.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(OperatorChangedError, match="damaged"):
        await served.client.delete_operator("broken", artifact.digest)
    await served.client.delete_operator("broken", "any")
    assert served.files() == {}


@pytest.mark.parametrize("name", ["missing", "../golden", "", "x" * 65])
async def test_a_name_that_is_not_there_is_told(served, name):
    before = served.files()
    for call in (
        served.client.load_operator(name),
        served.client.unload_operator(name),
        served.client.delete_operator(name, "any"),
    ):
        with pytest.raises(SteerError) as caught:
            await call
        assert type(caught.value) is (UnknownOperatorError if name == "missing" else InvalidRequestError)
    assert served.files() == before


@pytest.mark.parametrize("what", ["delete", "unload", "replace"])
async def test_a_request_ends_as_it_began_whatever_becomes_of_its_operator(
    served, artifact, other_artifact, file_of, what
):
    plain, use = await served.plain(), OperatorUse("golden", 0.5)
    alone = await served.client.generate("the bay", operators=[use], sampling=LONG)
    async with served.client.stream("the bay", operators=[use], sampling=LONG) as stream:
        events = aiter(stream)
        await anext(events)
        if what == "delete":
            await served.client.delete_operator("golden", artifact.digest)
        elif what == "unload":
            await served.client.unload_operator("golden")
        else:
            await served.client.upload_operator(file_of(other_artifact), name="golden", replace=artifact.digest)
        async for _ in events:
            pass
    assert stream.result.token_ids == alone.token_ids
    assert stream.result.receipts[0].digest == artifact.digest
    assert await served.plain() == plain


async def test_changes_at_once_leave_what_the_store_has(served, other_artifact, low_artifact):
    """Reloads, loads and unloads in threads, each of which replaces the snapshot."""
    served.store.save("a", other_artifact)
    served.store.save("b", low_artifact)
    calls = [
        call
        for _ in range(5)
        for call in (
            served.client.reload_operators(),
            served.client.load_operator("a"),
            served.client.unload_operator("b"),
            served.client.load_operator("golden"),
        )
    ]
    await asyncio.gather(*calls)
    assert await served.names() == {"a": True, "b": False, "golden": True}


async def test_a_token_for_some_operators_changes_those_alone(served):
    caller = CALLER.set(Caller(grant=Grant("tea", operators=frozenset({"tea"}))))
    try:
        for change in (
            partial(served.server.admin.keeper.check, "golden", ""),
            partial(served.server.admin.keeper.load, "golden"),
            partial(served.server.admin.keeper.unload, "golden"),
            partial(served.server.admin.keeper.delete, "golden", "any"),
        ):
            with pytest.raises(PermissionDeniedError):
                change()
    finally:
        CALLER.reset(caller)
    assert await served.names() == {"golden": True}


async def test_so_much_is_in_service_and_no_more(serve, artifact, other_artifact, file_of):
    size = len(to_bytes(artifact))
    served = await serve(max_served_bytes=size + len(to_bytes(other_artifact)) - 1)
    with pytest.raises(StoreFullError, match=f"operators in service take {size} bytes; with .*STEER_MAX_SERVED_BYTES"):
        await served.client.upload_operator(file_of(other_artifact))
    assert set(served.files()) == {"golden.safetensors"}
    served.store.save("dress", other_artifact)
    with pytest.raises(StoreFullError):
        await served.client.load_operator("dress")
    # One for another is no more than before.
    await served.client.load_operator("golden")
    await served.client.unload_operator("golden")
    assert (await served.client.load_operator("dress")).usable


async def test_what_is_of_another_model_is_refused_by_its_first_bytes(serve, artifact, remake, file_of, monkeypatch):
    other = remake(artifact, model="other", model_fingerprint="sha256:" + "0" * 64)
    served = await serve()

    def read(*_, **__):
        raise AssertionError("read to its end")

    monkeypatch.setattr("steer_server.registry.from_bytes", read)
    with pytest.raises(InvalidRequestError, match="built for model"):
        await served.client.upload_operator(file_of(other))


async def test_files_are_changed_beside_the_event_loop(served, other_artifact, file_of, monkeypatch):
    new_file, threads = Store.new_file, set()

    @contextmanager
    def seen(store, name):
        threads.add(threading.current_thread().name)
        with new_file(store, name) as file:
            yield file
        threads.add(threading.current_thread().name)

    monkeypatch.setattr(Store, "new_file", seen)
    await served.client.upload_operator(file_of(other_artifact))
    assert {name.split("_")[0] for name in threads} == {"store"}
