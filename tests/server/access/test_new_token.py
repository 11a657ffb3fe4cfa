"""``steer-server token``: a token is printed once, and its hash is in the file."""

import re
import stat
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256

import pytest
from typer.testing import CliRunner

from steer_server.access.new_token import add_token, renew_token
from steer_server.access.token_file import TOKEN, read_tokens
from steer_server.command import app
from steer_server.errors import StartupError

READ = {"scopes": ("read",)}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tokens.toml"


def run(*arguments):
    return CliRunner().invoke(app, ["token", *map(str, arguments)], catch_exceptions=False)


def test_a_token_is_printed_and_its_hash_alone_is_kept(path):
    result = run("notebooks", "--tokens", path, "--scopes", "generate,read", "--queue-share", "0.5")
    token = result.stdout.strip()
    assert TOKEN.fullmatch(token)
    text = path.read_text()
    assert token not in text
    assert sha256(token.encode()).hexdigest() in text
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    table = read_tokens(path.read_bytes())
    assert table.name_of(token) == "notebooks"
    assert table.entries["notebooks"].queue_share == 0.5


def test_the_file_is_that_of_the_settings(path, monkeypatch):
    assert "no file of tokens" in run("x").stderr
    monkeypatch.setenv("STEER_TOKENS", str(path))
    assert run("x").exit_code == 0
    assert "x" in read_tokens(path.read_bytes()).entries


def test_what_was_in_the_file_stays_as_it_was_written(path):
    add_token(path, "one", READ)
    before = "# mine\n" + path.read_text() + "# end\n"
    path.write_text(before)
    path.chmod(0o640)
    add_token(path, "two.b", {**READ, "operators": ("ocean", 'a"b')})
    assert path.read_text().startswith(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert read_tokens(path.read_bytes()).entries["two.b"].operators == ("ocean", 'a"b')
    assert [each.name for each in path.parent.iterdir()] == ["tokens.toml"]


def test_a_renewed_token_replaces_the_old_one_and_keeps_what_it_may(path):
    old = add_token(path, "one", {**READ, "requests_per_minute": 7})
    add_token(path, "two", READ)
    new = renew_token(path, "one")
    table = read_tokens(path.read_bytes())
    assert (table.name_of(old), table.name_of(new)) == (None, "one")
    assert table.entries["one"].requests_per_minute == 7
    assert len(table.entries) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["one"], "has [tokens.one] already (--renew"),
        (["none", "--renew"], "has no [tokens.none]"),
        (["one", "--renew", "--scopes", "read"], "--renew changes nothing but the token"),
        (["a b"], "may not be named 'a b'"),
        (["two", "--scopes", "write"], "'generate', 'read' or 'admin' (is 'write')\n"),
        (["two", "--scopes", "admin", "--operators", "ocean"], "is given beside the scope 'admin'"),
        (["two", "--queue-share", "2"], "queue_share"),
        (["two", "--expires", "2020-01-01"], "is past"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(path, arguments, said):
    add_token(path, "one", READ)
    before = path.read_text()
    result = run(*arguments, "--tokens", path)
    assert result.exit_code != 0
    assert said in result.stderr
    assert not re.search(r"steer_[\w-]{43}", result.output)
    assert path.read_text() == before


def test_a_link_stays_one_and_what_it_leads_to_changes(path, tmp_path):
    add_token(path, "one", READ)
    link = tmp_path / "link"
    link.symlink_to(path)
    add_token(link, "two", READ)
    assert link.is_symlink()
    assert read_tokens(path.read_bytes()).entries.keys() == {"one", "two"}


def test_a_broken_file_is_not_added_to(path):
    path.write_text("[tokens")
    with pytest.raises(StartupError, match="is not TOML"):
        add_token(path, "one", READ)
    assert path.read_text() == "[tokens"


def test_tokens_that_are_added_at_once_are_all_there(path):
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda number: add_token(path, f"t{number}", READ), range(12)))
    assert len(read_tokens(path.read_bytes()).entries) == 12


@pytest.mark.parametrize(("before", "after"), [(0o640, 0o640), (0o664, 0o640), (0o600, 0o600), (0o440, 0o640)])
def test_whoever_could_read_the_file_by_its_group_still_can_and_nobody_else(path, before, after):
    add_token(path, "one", READ)
    path.chmod(before)
    renew_token(path, "one")
    assert stat.S_IMODE(path.stat().st_mode) == after


def test_a_file_whose_owner_cannot_be_kept_is_left_as_it_is(path, monkeypatch):
    add_token(path, "one", READ)
    before = path.read_bytes()

    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr("os.chown", refuse)
    with pytest.raises(StartupError, match=r"belongs to \d+:\d+, which only that user or root can keep"):
        renew_token(path, "one")
    assert path.read_bytes() == before
    assert [each.name for each in path.parent.iterdir()] == [path.name]
