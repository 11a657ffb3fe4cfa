"""What the operator of a server lets a request ask for."""

from types import SimpleNamespace

import pytest
from steering.v1 import generation_pb2 as pb

from steer_server.caps import Caps
from steer_server.config import ServerConfig
from steer_server.errors import InvalidRequestError
from steer_server.rpc.services import GenerationService
from steer_server.types import RequestLimits, SamplingParams


def _sampling(**fields):
    return SamplingParams(seed=1, **fields)


def test_without_caps_nothing_is_changed():
    sampling = _sampling(max_tokens=10**6)
    assert Caps().apply(sampling, num_texts=17) is sampling


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
        caps.apply(_sampling(**fields), num_texts=texts)
    assert caught.value.field == field
    assert all(figure in str(caught.value) for figure in figures)


def test_what_is_within_the_caps_is_as_it_was_and_without_a_time_limit_the_servers_holds():
    caps = Caps(max_tokens=100, max_total_tokens=300, max_time=2.5)
    assert caps.apply(_sampling(max_tokens=100, time_limit=2.5), num_texts=3).time_limit == 2.5
    assert caps.apply(_sampling(max_tokens=100), num_texts=3) == _sampling(max_tokens=100, time_limit=2.5)


async def test_clients_are_told_the_caps(model_info):
    config = ServerConfig(max_tokens=7, max_total_tokens=21, max_time=2.5)
    engine = SimpleNamespace(model=model_info)
    service = GenerationService(engine, None, None, config, RequestLimits(*range(1, 10)))
    limits = (await service.GetModelInfo(pb.GetModelInfoRequest(), None)).limits
    assert (limits.max_tokens, limits.max_total_tokens, limits.max_time.ToTimedelta().total_seconds()) == (7, 21, 2.5)
    service = GenerationService(engine, None, None, ServerConfig(), RequestLimits(*range(1, 10)))
    limits = (await service.GetModelInfo(pb.GetModelInfoRequest(), None)).limits
    assert not any(limits.HasField(name) for name in ("max_tokens", "max_total_tokens", "max_time"))
