"""Chats from the command line."""

import pytest
from steer_client._cli.app import app
from steering.v1 import text_pb2
from typer.testing import CliRunner


@pytest.fixture
def steer(fake, monkeypatch):
    """Runs the command against the scripted server; stdout and stderr are kept apart."""
    monkeypatch.setenv("STEER_TARGET", fake.target)
    monkeypatch.setenv("COLUMNS", "100")
    runner = CliRunner()
    return lambda *arguments: runner.invoke(app, arguments)


def test_an_answer_is_begun_and_the_template_told(steer, fake):
    options = ("--template-option", "enable_thinking=false", "--template-option", "budget=12")
    steer("generate", "hi", "--chat", "--assistant", "Well, ", *options, "--template-option", "effort=low")
    (sent,) = fake.requests
    assert sent.prompt.chat == text_pb2.Chat(
        messages=[
            text_pb2.ChatMessage(role="user", content="hi"),
            text_pb2.ChatMessage(role="assistant", content="Well, "),
        ],
        continue_final_message=True,
        template_options=[
            text_pb2.TemplateOption(name="enable_thinking", boolean=False),
            text_pb2.TemplateOption(name="budget", number=12),
            text_pb2.TemplateOption(name="effort", text="low"),
        ],
    )
