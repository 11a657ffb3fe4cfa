"""The page of all settings is that of this version, and the command line has a flag for each."""

import json
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from steer_server.command import app
from steer_server.config import ServerConfig, flag

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tools"))
from options_table import PAGE, with_table


def _run(*arguments):
    return CliRunner().invoke(app, arguments, catch_exceptions=False, color=False)


def test_the_table_of_the_page_is_made_from_the_fields():
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_table(page), "python tools/options_table.py writes the table anew"
    assert page.count("| `--") == len(ServerConfig.model_fields)


def test_the_examples_of_the_page_are_settings():
    page = PAGE.read_text(encoding="utf-8")
    example = page.split("```toml\n")[1].split("```")[0]
    assert ServerConfig(**tomllib.loads(example)).operator_memory == 2 << 30
    printed = _run("config", "--max-time", "30").stdout
    # The width of the columns apart.
    lines = {" ".join(line.split()) for line in printed.splitlines()}
    assert {"max_time = 30.0 # seconds · flag --max-time", "max_arms = 16 # arms · default"} <= lines


@pytest.mark.parametrize("command", [("--help",), ("config", "--help")])
def test_every_setting_is_a_flag(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    printed = _run(*command).stdout
    assert [name for name in ServerConfig.model_fields if flag(name) not in printed] == []


def test_flags_may_stand_before_and_after_the_word_config():
    printed = json.loads(_run("--max-queue", "3", "--max-arms", "4", "config", "--max-arms", "5", "--json").stdout)
    assert (printed["max_queue"]["value"], printed["max_arms"]["value"]) == (3, 5)
