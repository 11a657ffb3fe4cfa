"""Settings and their bounds."""

import pytest
from pydantic import ValidationError

from steer_server.config import ServerConfig, shown
from steer_server.errors import InvalidRequestError
from steer_server.types import SamplingParams


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "much"])
def test_a_limit_of_the_dose_is_a_positive_number(value):
    assert ServerConfig(max_dose="1.5").max_dose == 1.5
    with pytest.raises(ValidationError) as caught:
        ServerConfig(max_dose=value)
    assert [error["loc"] for error in caught.value.errors()] == [("max_dose",)]


@pytest.mark.parametrize(
    ("given", "size"),
    [("4GiB", 4 << 30), ("1.5g", 3 << 29), ("500 MB", 500 << 20), ("1048576", 1 << 20), (1 << 31, 1 << 31)],
)
def test_memory_for_operators_is_a_size(given, size):
    assert ServerConfig().operator_memory == 4 << 30
    assert ServerConfig(operator_memory=given).operator_memory == size


@pytest.mark.parametrize(
    ("given", "why"), [("4", "greater than or equal to 1048576"), ("much", "such as 8GiB"), ("-1g", "such as 8GiB")]
)
def test_memory_for_operators_that_is_no_size_is_refused_by_name(given, why):
    with pytest.raises(ValidationError, match=why) as caught:
        ServerConfig(operator_memory=given)
    assert [error["loc"] for error in caught.value.errors()] == [("operator_memory",)]


def test_the_engine_is_one_of_two():
    assert ServerConfig().engine == "hf"
    assert ServerConfig(engine="vllm").engine == "vllm"
    with pytest.raises(ValidationError, match="'hf' or 'vllm'") as caught:
        ServerConfig(engine="embedded")
    assert [error["loc"] for error in caught.value.errors()] == [("engine",)]


def test_every_setting_says_what_it_is_and_what_stands_for_none():
    for name, field in ServerConfig.model_fields.items():
        assert field.description, name
        assert field.get_default(call_default_factory=True) is not None or shown(name).default, name


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "localhost:50051", "[::]:50051", "[::1]:1", "0.0.0.0:65535"])
def test_an_address_is_a_host_and_a_port(listen):
    assert ServerConfig(listen=listen).listen == listen


@pytest.mark.parametrize(
    "listen",
    [
        "127.0.0.1",
        "127.0.0.1:",
        ":50051",
        "::1:50051",
        "a b:1",
        "host:port",
        "host:123456",
        "host:99999",
        "99999",
        "host:٣",
    ],
)
def test_an_address_without_host_or_port_is_refused_by_name(listen):
    with pytest.raises(ValidationError) as caught:
        ServerConfig(listen=listen)
    assert [error["loc"] for error in caught.value.errors()] == [("listen",)]
    assert f"is {listen!r}; HOST:PORT such as 127.0.0.1:50051" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "most", "more"),
    [
        ("stop_strings", ("x",) * 64, ("x",) * 65),
        ("stop_strings", ("x" * 1024,), ("x" * 1025,)),
        ("stop_strings", ("東" * 1024,), ("ok", "東" * 1025)),
        ("stop_strings", ("x",), ("x", "")),
        ("stop_token_ids", (1,) * 64, (1,) * 65),
    ],
)
def test_more_to_stop_at_than_is_accepted_is_refused_by_name(name, most, more):
    assert getattr(SamplingParams(**{name: most}), name) == most
    with pytest.raises(InvalidRequestError, match="at most 64") as caught:
        SamplingParams(**{name: more})
    assert caught.value.field == f"sampling.{name}"
    assert len(str(caught.value)) < 300
