"""The file of tokens: what is accepted, and that an error names the place and never a token."""

from datetime import UTC, datetime
from hashlib import sha256

import pytest

from steer_server.access.token_file import MAX_TOKENS, TokenFileError, read_tokens

TOKEN = "steer_" + "a" * 43
HASH = sha256(TOKEN.encode()).hexdigest()


def read(body: str, name: str = "notebooks"):
    return read_tokens(f"[tokens.{name}]\n{body}\n".encode())


def test_an_entry_has_what_is_written_in_it():
    table = read(
        f'sha256 = "{HASH}"\nscopes = ["generate", "read"]\noperators = ["ocean"]\nrequests_per_minute = 60\n'
        "tokens_per_minute = 20000\nqueue_share = 0.25\nexpires = 2027-01-01T00:00:00Z"
    )
    entry = table.entries["notebooks"]
    assert (entry.scopes, entry.operators) == (("generate", "read"), ("ocean",))
    assert (entry.requests_per_minute, entry.tokens_per_minute, entry.queue_share) == (60, 20000, 0.25)
    assert entry.expires == datetime(2027, 1, 1, tzinfo=UTC)
    assert table.name_of(TOKEN) == "notebooks"


@pytest.mark.parametrize(
    "token", ["", "steer_", TOKEN[:-1], TOKEN + "a", TOKEN[:-1] + "b", TOKEN + "\n", TOKEN.upper(), "é" * 49, HASH]
)
def test_what_is_not_the_token_is_nobodys(token):
    assert read(f'sha256 = "{HASH}"\nscopes = ["read"]').name_of(token) is None


GOOD = f'sha256 = "{HASH}"\nscopes = ["read"]\n'


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("", "tokens.notebooks.sha256: is missing"),
        (f'sha256 = "{HASH}"', "tokens.notebooks.scopes: is missing"),
        (f'sha256 = "{HASH[:-1]}"\nscopes = ["read"]', "is no SHA-256; 64 digits"),
        (f'sha256 = "{HASH.upper()}"\nscopes = ["read"]', "is no SHA-256"),
        (f'sha256 = "{HASH}"\nscopes = []', "tokens.notebooks.scopes"),
        (f'sha256 = "{HASH}"\nscopes = ["write"]', "'generate', 'read' or 'admin' (is 'write')"),
        (f'sha256 = "{HASH}"\nscopes = ["read", "read"]', "has a value twice"),
        (f'sha256 = "{HASH}"\nscopes = "read"', "tokens.notebooks.scopes"),
        (GOOD + "scope = 1", "tokens.notebooks.scope: is not known; accepted: sha256, scopes, operators"),
        (GOOD + "requests_per_minute = 0", "requests_per_minute: Input should be greater than or equal to 1 (is 0)"),
        (GOOD + "requests_per_minute = true", "requests_per_minute"),
        (GOOD + "tokens_per_minute = 1.5", "tokens_per_minute"),
        (GOOD + "queue_share = 0", "queue_share"),
        (GOOD + "queue_share = nan", "queue_share"),
        (GOOD + "queue_share = 1.5", "queue_share"),
        (GOOD + "expires = 2027-01-01", "expires"),
        (GOOD + "expires = 2027-01-01T00:00:00", "expires"),
        (GOOD + 'expires = "2027-01-01T00:00:00Z"', "expires"),
        (GOOD + "operators = [1]", "operators"),
        (f'sha256 = "{HASH}"\nscopes = ["admin"]\noperators = []', "is given beside the scope 'admin'"),
        (f'{GOOD}[tokens.other]\nsha256 = "{HASH}"\nscopes = ["read"]', "in [tokens.notebooks] and [tokens.other]"),
        (f"{GOOD}[limits]", "has 'limits', which is not known; [tokens.NAME] is accepted"),
    ],
)
def test_what_is_wrong_is_named(body, said):
    with pytest.raises(TokenFileError) as caught:
        read(body)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "body",
    [f'sha256 = "{TOKEN}"\nscopes = ["read"]', f'{GOOD}token = "{TOKEN}"', f'sha256 = [["{TOKEN}"]]\nscopes = []'],
)
def test_a_token_in_the_wrong_place_is_not_repeated(body):
    with pytest.raises(TokenFileError) as caught:
        read(body)
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "has no [tokens.NAME]"),
        (b"tokens = 3", "has no [tokens.NAME]"),
        (b"[tokens]\nx = 3", "tokens.x: is no table"),
        (b"[tokens", "is not TOML"),
        (b"\xff", "is not UTF-8"),
        (b"x = " + b"[" * 100_000, "is not TOML"),
        (b'[tokens."a b"]', "has a token named 'a b'; accepted: letters"),
        (b'[tokens."' + b"x" * 65 + b'"]', "has a token named"),
    ],
)
def test_what_is_no_table_of_tokens_is_refused(data, said):
    with pytest.raises(TokenFileError) as caught:
        read_tokens(data)
    assert said in str(caught.value)


def test_there_may_be_so_many_tokens():
    entry = 'sha256 = "{:064x}"\nscopes = ["read"]\n'
    tables = [f"[tokens.t{number}]\n{entry.format(number)}" for number in range(MAX_TOKENS + 1)]
    assert len(read_tokens("".join(tables[:-1]).encode()).entries) == MAX_TOKENS
    with pytest.raises(TokenFileError, match=f"has {MAX_TOKENS + 1} tokens; at most {MAX_TOKENS}"):
        read_tokens("".join(tables).encode())
