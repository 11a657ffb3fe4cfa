"""The commands of docs/EXPERIMENTS.md, up to the server that would answer."""

import re
import shlex
from pathlib import Path

import pytest
from steer_client._cli.app import app
from typer.testing import CliRunner

PAGE = Path(__file__).parents[2] / "docs" / "EXPERIMENTS.md"
COMMANDS = re.findall(r"^\$ steer (.*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_is_right_usage(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(Path(__file__).parents[2] / "examples")
    result = CliRunner().invoke(app, [*shlex.split(command), "--target", "127.0.0.1:1", "--no-retry"])
    assert result.exit_code == 1
    assert "is steer-server running there?" in result.stderr


def test_the_page_shows_every_command_for_experiments():
    assert {command.split()[0] for command in COMMANDS} == {"ab", "score", "sweep", "vote"}
