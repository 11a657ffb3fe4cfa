"""SECURITY.md tells the truth: its commands and its file are run, and its table is the server's."""

import re
import shlex
from pathlib import Path

from typer.testing import CliRunner

from steer_server.access.scopes import RPC_SCOPES, SCOPES
from steer_server.access.token_file import TokenEntry, read_tokens
from steer_server.command import app
from steer_server.config import ServerConfig, flag

PAGE = (Path(__file__).resolve().parents[3] / "SECURITY.md").read_text(encoding="utf-8")


def test_its_commands_make_tokens_and_its_last_one_is_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    *made, served = [shlex.split(line, comments=True) for line in PAGE.split("```sh\n")[1].split("```")[0].splitlines()]
    for command in made:
        result = CliRunner().invoke(app, command[1:], catch_exceptions=False)
        assert result.exit_code == 0, result.output
    entries = read_tokens(Path("tokens").read_bytes()).entries
    assert entries.keys() == {"notebooks", "deploys"}
    assert (entries["notebooks"].operators, entries["deploys"].scopes) == (("ocean", "tea"), ("admin",))
    flags = {flag(name) for name in ServerConfig.model_fields}
    assert {word for word in served if word.startswith("--")} <= flags
    assert {word for word in re.findall(r"`(--[a-z-]+)", PAGE) if word != "--renew"} <= flags


def test_its_file_is_one():
    [entry] = read_tokens(PAGE.split("```toml\n")[1].split("```")[0].encode()).entries.values()
    assert entry.model_fields_set == set(TokenEntry.model_fields)


def test_its_table_is_that_of_the_server():
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", PAGE, flags=re.MULTILINE))
    assert set(rows) == set(SCOPES)
    for path, scope in RPC_SCOPES.items():
        _, service, method = path.split("/")
        if service.startswith("steering."):
            name = "OperatorAdmin" if "OperatorAdmin" in service else method
            assert {key for key, row in rows.items() if f"`{name}`" in row} == {scope}, path
