"""What the operator of a server lets a request ask for."""

import pytest

from steer_server.caps import Caps
from steer_server.errors import InvalidRequestError
from steer_server.types import SamplingParams


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
