"""A chat of a request: what of it is refused, by its place."""

import math

import pytest
from steering.v1 import text_pb2

from steer_server.errors import InvalidRequestError
from steer_server.rpc import codec


@pytest.mark.parametrize(
    ("chat", "field"),
    [
        ({"continue_final_message": True}, "continue_final_message"),
        ({"template_options": [text_pb2.TemplateOption(name="a")]}, "template_options[0]"),
        ({"template_options": [text_pb2.TemplateOption(boolean=True)]}, "template_options[0].name"),
        ({"template_options": [text_pb2.TemplateOption(name="a", number=math.nan)]}, "template_options[0].number"),
        ({"template_options": [text_pb2.TemplateOption(name="a", text="x" * 1025)]}, "template_options[0].text"),
        ({"template_options": [text_pb2.TemplateOption(name="a", boolean=True)] * 2}, "template_options[1].name"),
        ({"template_options": [text_pb2.TemplateOption(name="a", boolean=True)] * 17}, "template_options"),
    ],
)
def test_a_chat_that_is_not_accepted_is_refused_by_its_place(chat, field):
    turns = [text_pb2.ChatMessage(role="assistant"), text_pb2.ChatMessage(role="user", content="hi")]
    with pytest.raises(InvalidRequestError) as caught:
        codec.prompt(text_pb2.Prompt(chat=text_pb2.Chat(messages=turns, **chat)))
    assert caught.value.field == f"prompt.chat.{field}"
