"""A token with a list of operators: it may use those, and learns nothing of others."""

from contextlib import contextmanager

import pytest

from operators.core.store import Store
from steer_server.access.grant import Grant
from steer_server.caller import CALLER, Caller
from steer_server.errors import PermissionDeniedError, UnknownOperatorError
from steer_server.registry import Registry
from steer_server.types import OperatorUse, WeightedWord


@pytest.fixture
def registry(tmp_path, artifact, model_info):
    for name in ("ocean", "tea"):
        Store(tmp_path).save(name, artifact)
    return Registry(Store(tmp_path), model_info, max_bytes=1 << 20, max_dose=1.0)


@contextmanager
def calling(*names):
    token = CALLER.set(Caller(grant=Grant("notebooks", operators=frozenset(names))))
    try:
        yield
    finally:
        CALLER.reset(token)


def planned(registry, use):
    return registry.plan_beside({"operators": (use,)})


async def test_a_token_uses_and_sees_what_it_may(registry):
    with calling("ocean"):
        assert [entry.name for entry in registry.entries()] == ["ocean"]
        assert registry.entry("ocean").name == "ocean"
        [plan] = await planned(registry, OperatorUse("ocean", strength=0.4))
        assert [use.name for use in plan.applications] == ["ocean"]
    assert [entry.name for entry in registry.entries()] == ["ocean", "tea"]


async def test_whether_there_is_another_operator_is_not_said(registry):
    with calling("ocean"):
        words = set()
        for name in ("tea", "none"):
            with pytest.raises(PermissionDeniedError) as caught:
                registry.entry(name)
            words.add(str(caught.value).replace(name, "NAME"))
            with pytest.raises(PermissionDeniedError) as caught:
                await planned(registry, OperatorUse(name, strength=0.4))
            words.add(str(caught.value).replace(name, "NAME"))
        assert words == {"token 'notebooks' may not use operator 'NAME'; it may use: ocean"}


async def test_words_need_their_lens_in_the_list(registry):
    words = OperatorUse("", words=(WeightedWord("sea"),), strength=0.1)
    with calling("ocean"), pytest.raises(PermissionDeniedError, match="'lens'"):
        await planned(registry, words)
    with calling("lens"), pytest.raises(UnknownOperatorError, match="there are: none"):
        await planned(registry, words)


async def test_an_empty_list_leaves_the_plain_model(registry):
    with calling():
        assert registry.entries() == ()
        assert await registry.plan_beside({"operators": ()}) == (None,)
        with pytest.raises(PermissionDeniedError, match="it may use: none"):
            registry.entry("ocean")
