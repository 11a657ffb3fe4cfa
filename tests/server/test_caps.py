"""What the operator of a server lets a request ask for."""

from types import SimpleNamespace

import pytest
from steering.v1 import generation_pb2 as pb

from steer_server.caps import Caps
from steer_server.config import ServerConfig
from steer_server.errors import InvalidRequestError
from steer_server.rpc.services import GenerationService
from steer_server.types import RequestLimits, Row, SamplingParams


def _sampling(**fields):
    return SamplingParams(seed=1, **fields)


def _admit(caps, sampling, texts):
    caps.reserve_tokens([Row(sampling=sampling)] * texts)
    return caps.apply(sampling)


def test_without_caps_nothing_is_changed():
    sampling = _sampling(max_tokens=10**6)
    assert _admit(Caps(), sampling, 17) is sampling


@pytest.mark.parametrize(
    ("caps", "texts", "fields", "field", "figures"),
    [
        (Caps(max_tokens=100), 1, {"max_tokens": 101}, "sampling.max_tokens", ("101", "100")),
        (Caps(max_total_tokens=100), 3, {"max_tokens": 34}, "sampling.max_tokens", ("34", "3 texts 102", "100")),
        (Caps(max_time=2.5), 1, {"time_limit": 3.0}, "sampling.time_limit", ("3 s", "2.5 s")),
    ],
)
def test_more_than_a_cap_is_refused_with_both_figures(caps, texts, fields, field, figures):
    with pytest.raises(InvalidRequestError) as caught:
        _admit(caps, _sampling(**fields), texts)
    assert caught.value.field == field
    assert all(figure in str(caught.value) for figure in figures)


def test_what_is_within_the_caps_is_as_it_was_and_without_a_time_limit_the_servers_holds():
    caps = Caps(max_tokens=100, max_total_tokens=300, max_time=2.5)
    assert _admit(caps, _sampling(max_tokens=100, time_limit=2.5), 3).time_limit == 2.5
    assert _admit(caps, _sampling(max_tokens=100), 3) == _sampling(max_tokens=100, time_limit=2.5)


def test_the_tokens_of_arms_with_a_sampling_of_their_own_and_of_every_prompt_count():
    rows = [Row(sampling=_sampling(max_tokens=10)), Row(None, False, _sampling(max_tokens=20), "arms[0].sampling")]
    Caps(max_total_tokens=90).reserve_tokens(rows, num_prompts=3)
    with pytest.raises(InvalidRequestError, match=r"is 10/20 tokens, in 6 texts 90; this server accepts 89"):
        Caps(max_total_tokens=89).reserve_tokens(rows, num_prompts=3)
    with pytest.raises(
        InvalidRequestError, match=r"^arms\[0\]\.sampling\.max_tokens: is 20 tokens; this server accepts 19"
    ):
        Caps(max_tokens=19).reserve_tokens(rows)


async def test_clients_are_told_the_caps(model_info):
    config = ServerConfig(max_tokens=7, max_total_tokens=21, max_time=2.5)
    engine = SimpleNamespace(model=model_info)
    service = GenerationService(engine, None, None, config, RequestLimits(*range(1, 10)))
    limits = (await service.GetModelInfo(pb.GetModelInfoRequest(), None)).limits
    assert (limits.max_tokens, limits.max_total_tokens, limits.max_time.ToTimedelta().total_seconds()) == (7, 21, 2.5)
    service = GenerationService(engine, None, None, ServerConfig(), RequestLimits(*range(1, 10)))
    limits = (await service.GetModelInfo(pb.GetModelInfoRequest(), None)).limits
    assert not any(limits.HasField(name) for name in ("max_tokens", "max_total_tokens", "max_time"))
