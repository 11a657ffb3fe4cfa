"""Which version of an operator a request gets while the store changes, and what becomes of a store that is gone."""

import asyncio
import threading

import pytest

from operators.core.store import Store
from steer_server.errors import DigestNotServedError, StoreUnreadableError
from steer_server.registry import Registry
from steer_server.types import OperatorUse

_MAX_BYTES = 1 << 20


@pytest.fixture
def registry(tmp_path, artifact, model_info):
    Store(tmp_path).save("good", artifact)
    return lambda: Registry(Store(tmp_path), model_info, max_bytes=_MAX_BYTES, max_dose=1.0)


def test_a_store_that_became_a_file_is_an_error_and_the_old_operators_stay(tmp_path, artifact, model_info):
    directory = tmp_path / "store"
    Store(directory).save("good", artifact)
    made = Registry(Store(directory), model_info, max_bytes=_MAX_BYTES, max_dose=1.0)
    directory.rename(tmp_path / "elsewhere")
    directory.write_text("no directory")
    with pytest.raises(StoreUnreadableError, match="not a directory"):
        made.reload()
    assert made.plan((OperatorUse("good"),)).applications[0].artifact.digest == artifact.digest
    with pytest.raises(StoreUnreadableError):
        Registry(Store(directory), model_info, max_bytes=_MAX_BYTES, max_dose=1.0)


def test_a_store_that_is_gone_is_an_error_and_the_old_operators_stay(tmp_path, artifact, model_info):
    directory = tmp_path / "store"
    Store(directory).save("good", artifact)
    made = Registry(Store(directory), model_info, max_bytes=_MAX_BYTES, max_dose=1.0)
    directory.rename(tmp_path / "elsewhere")
    for _ in range(2):
        with pytest.raises(StoreUnreadableError, match=f"{directory} does not exist any more"):
            made.reload()
        assert made.plan((OperatorUse("good"),)).applications[0].artifact.digest == artifact.digest
    directory.mkdir()
    assert made.reload().removed == ("good",)


def test_a_store_that_goes_while_it_is_read_is_an_error_and_the_old_operators_stay(
    tmp_path, artifact, model_info, monkeypatch
):
    directory = tmp_path / "store"
    Store(directory).save("good", artifact)
    made = Registry(Store(directory), model_info, max_bytes=_MAX_BYTES, max_dose=1.0)
    names = Store.names

    def last_look(store):
        found = names(store)
        directory.rename(tmp_path / "elsewhere")
        return found

    monkeypatch.setattr(Store, "names", last_look)
    with pytest.raises(StoreUnreadableError, match="does not exist any more"):
        made.reload()
    assert made.entry("good").problem == ""


def test_a_store_that_is_not_there_yet_is_empty_until_it_is(tmp_path, artifact, model_info):
    made = Registry(Store(tmp_path / "store"), model_info, max_bytes=_MAX_BYTES, max_dose=1.0)
    assert made.reload().added == ()
    Store(tmp_path / "store").save("good", artifact)
    assert made.reload().added == ("good",)


def test_a_pinned_version_is_applied_or_refused_with_both_digests(registry, tmp_path, artifact, other_artifact):
    made = registry()
    pinned = OperatorUse("good", digest=artifact.digest)
    assert made.plan((pinned,)).applications[0].artifact.digest == artifact.digest
    Store(tmp_path).save("good", other_artifact, replace=True)
    made.reload()
    with pytest.raises(DigestNotServedError) as caught:
        made.plan((pinned,))
    assert (caught.value.name, caught.value.requested, caught.value.served) == (
        "good",
        artifact.digest,
        other_artifact.digest,
    )
    assert artifact.digest in str(caught.value)
    assert other_artifact.digest in str(caught.value)
    assert made.plan((OperatorUse("good"),)) is not None


def test_all_arms_of_a_request_have_the_versions_of_one_moment(registry, tmp_path, artifact, other_artifact):
    Store(tmp_path).save("twin", artifact)
    made = registry()
    groups = {f"arms[{index}]": (OperatorUse("good"), OperatorUse("twin")) for index in range(400)}
    stop, seen = threading.Event(), set()

    def swap():
        while not stop.is_set():
            for version in (other_artifact, artifact):
                for name in ("good", "twin"):
                    Store(tmp_path).save(name, version, replace=True)
                made.reload()

    async def ask():
        for _ in range(20):
            plans = await made.plan_beside(groups)
            digests = {use.artifact.digest for plan in plans for use in plan.applications}
            assert len(digests) == 1
            seen.update(digests)
            await asyncio.sleep(0.01)

    swapping = threading.Thread(target=swap)
    swapping.start()
    try:
        asyncio.run(ask())
    finally:
        stop.set()
        swapping.join()
    assert len(seen) == 2
