"""Whatever JSON comes, it is read or refused by name: nothing else is raised."""

import json
from contextlib import suppress
from types import SimpleNamespace

import pytest
from google.protobuf.descriptor import Descriptor
from google.protobuf.json_format import ParseDict
from hypothesis import given, settings
from hypothesis import strategies as st
from steering.v1 import comparison_pb2
from steering.v1 import generation_pb2 as pb

from steer_server.config import ServerConfig
from steer_server.errors import InvalidRequestError
from steer_server.http import messages
from steer_server.http.messages import read_message
from steer_server.http.openai.parameters import ChatParameters, CompletionParameters, read_parameters
from steer_server.http.openai.requests import asked_chat, asked_completion
from steer_server.http.refused import RefusedError

_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=5),
    st.sampled_from(
        ["NaN", "Infinity", "1s", "RULE_CUMULATIVE", "first", "ocean=0.4", "1e400", "m", "m+ocean", "text"]
    ),
)


def names_in(message: Descriptor) -> set[str]:
    """Those of the fields of a message and of the messages inside it, both ways."""
    found = set()
    for field in message.fields:
        found |= {field.name, field.camelcase_name}
        if field.message_type is not None:
            found |= names_in(field.message_type)
    return found


def values(names):
    """JSON whose members have these names, most of the time."""
    keys = st.one_of(st.sampled_from(sorted(names)), st.text(max_size=3))
    inside = st.recursive(
        _SCALARS,
        lambda each: st.one_of(st.lists(each, max_size=3), st.dictionaries(keys, each, max_size=5)),
        max_leaves=12,
    )
    return st.dictionaries(keys, inside, max_size=6)


@pytest.mark.parametrize("message", [pb.GenerateRequest, comparison_pb2.CompareRequest], ids=["Generate", "Compare"])
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_json_is_a_message_or_is_refused_by_name(message, data):
    value = data.draw(values(names_in(message.DESCRIPTOR)))
    with suppress(InvalidRequestError):
        read_message(message, value).SerializeToString()


PARTS = SimpleNamespace(config=ServerConfig(), model=SimpleNamespace(model="m", context_length=100))


@pytest.mark.parametrize(("kind", "asked"), [(CompletionParameters, asked_completion), (ChatParameters, asked_chat)])
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_json_is_parameters_or_is_refused_by_name(kind, asked, data):
    names = {
        *kind.model_fields,
        "role",
        "content",
        "type",
        "text",
        "operators",
        "name",
        "strength",
        "words",
        "positions",
    }
    valid = {"model": "m", "prompt": "x"} if kind is CompletionParameters else {"model": "m", "messages": []}
    body = valid | data.draw(values(names))
    with suppress(InvalidRequestError, RefusedError):
        asked(PARTS, read_parameters(kind, body)).message.SerializeToString()


def longest_text(value) -> int:
    if isinstance(value, dict | list):
        return max(map(longest_text, value.values() if isinstance(value, dict) else value), default=0)
    return len(value) if isinstance(value, str) else 0


def test_a_long_text_is_read_as_it_is_and_past_the_mapping_that_searches_it(monkeypatch):
    given = []

    def seen(value, message):
        given.append(longest_text(value))
        return ParseDict(value, message)

    monkeypatch.setattr(messages, "ParseDict", seen)
    text = "bay \u2603" * (40 << 10)
    prompts = [
        {"id": "a", "prompt": {"text": text}},
        {"id": text, "prompt": {"chat": {"messages": [{"content": text}]}}},
    ]
    for value in ({"prompts": prompts}, {"prompt": {"text": text}, "requestId": text}):
        whole = json.dumps(value)
        assert read_message(comparison_pb2.CompareRequest, value) == ParseDict(value, comparison_pb2.CompareRequest())
        assert json.dumps(value) == whole, "what was given stays as it is"
    assert max(given) < 100
    with pytest.raises(InvalidRequestError, match="oneof"):
        read_message(pb.GenerateRequest, {"prompt": {"text": text, "chat": {}}})
    with pytest.raises(InvalidRequestError, match="surrogates not allowed"):
        read_message(pb.GenerateRequest, {"prompt": {"text": text + "\ud800"}})
