"""Who is let in, with what, and what the audit log says of it."""

from datetime import UTC, datetime
from hashlib import sha256

import pytest
import structlog

from steer_server.access.control import OTHERS, AccessControl
from steer_server.access.scopes import RPC_SCOPES, SCOPES
from steer_server.access.token_file import MAX_TOKENS, read_tokens
from steer_server.access.watched import Watched
from steer_server.errors import (
    InvalidRequestError,
    PermissionDeniedError,
    RateLimitedError,
    UnauthenticatedError,
)

TOKEN = "steer_" + "A-_9" * 10 + "xyz"
GENERATE = "/steering.v1.GenerationService/Generate"
MODEL = "/steering.v1.GenerationService/GetModelInfo"
RELOAD = "/steering.v1.OperatorService/ReloadOperators"


def table(scopes=SCOPES, name="notebooks", token=TOKEN, more=""):
    listed = ", ".join(f'"{scope}"' for scope in scopes)
    return f'[tokens.{name}]\nsha256 = "{sha256(token.encode()).hexdigest()}"\nscopes = [{listed}]\n{more}\n'


class Clock:
    def __init__(self):
        self.seconds = 0.0
        self.date = datetime(2030, 1, 1, tzinfo=UTC)

    def __call__(self):
        return self.seconds

    def now(self):
        return self.date


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def control(tmp_path, clock):
    """``control(text)``: over a file of that content; ``.file`` is what watches it."""

    def make(text, **settings):
        path = tmp_path / "tokens.toml"
        path.write_text(text)
        made = AccessControl(Watched("tokens", [path], read_tokens), clock=clock, now=clock.now, **settings)
        made.path = path
        return made

    return make


@pytest.fixture
def lines():
    with structlog.testing.capture_logs() as found:
        yield found


def enter(access, method=GENERATE, *headers, **options):
    with access.admitted(method, headers or (f"Bearer {TOKEN}",), "ipv4:10.0.0.1:5", **options) as grant:
        return grant


def test_without_tokens_everybody_may_do_everything():
    access = AccessControl()
    for method in RPC_SCOPES:
        with access.admitted(method, [], "") as grant:
            assert (grant.token, grant.operators) == ("", None)


def test_a_method_that_is_in_no_table_is_refused_to_everybody(control):
    for access in (AccessControl(), control(table())):
        with pytest.raises(PermissionDeniedError, match="is in no scope"):
            enter(access, "/steering.v1.GenerationService/New")


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "bEaReR "])
def test_the_scheme_may_be_in_any_case(control, scheme):
    assert enter(control(table()), GENERATE, f"{scheme} {TOKEN}").token == "notebooks"


@pytest.mark.parametrize(
    "value",
    [
        "",
        "Bearer",
        f"Bearer{TOKEN}",
        TOKEN,
        f"Basic {TOKEN}",
        f" Bearer {TOKEN}",
        f"Bearer {TOKEN} ",
        f"Bearer\t{TOKEN}",
        f"Bearer {TOKEN}\n",
        f"Bearer {TOKEN[:-1]} z",
        f"Bearer {TOKEN}, Bearer {TOKEN}",
        f"Bearer {TOKEN[:-1]}Z",
        f"Bearer {TOKEN}é",
        "Bearer ünicode",
        b"Bearer \xff\xfe\x00",
        "Bearer " + "a" * (1 << 20),
    ],
)
def test_whatever_is_no_token_of_ours_meets_the_same_words(control, value):
    with pytest.raises(UnauthenticatedError) as caught:
        enter(control(table()), GENERATE, value)
    assert str(caught.value) == "the token is not accepted"
    assert caught.value.cause == "unknown token"


def test_no_header_and_two_are_refused_by_name(control):
    access = control(table())
    with pytest.raises(UnauthenticatedError, match="a token is needed"), access.admitted(GENERATE, [], ""):
        pass
    with pytest.raises(UnauthenticatedError, match="there 2 times"):
        enter(access, GENERATE, f"Bearer {TOKEN}", f"Bearer {TOKEN}")


def test_a_token_ends_when_it_expires_and_a_clock_set_back_does_not_bring_it_back(control, clock):
    access = control(table(more="expires = 2030-01-01T00:00:10Z"))
    enter(access)
    clock.date = datetime(2030, 1, 1, 0, 0, 10, tzinfo=UTC)
    with pytest.raises(UnauthenticatedError, match="expired at 2030-01-01T00:00:10"):
        enter(access)
    clock.date = datetime(2029, 1, 1, tzinfo=UTC)
    with pytest.raises(UnauthenticatedError, match="expired"):
        enter(access)


def test_a_minute_has_so_many_calls_whatever_the_date_says(control, clock):
    access = control(table(more="requests_per_minute = 2"))
    enter(access), enter(access)
    clock.date = datetime(2040, 1, 1, tzinfo=UTC)
    with pytest.raises(RateLimitedError, match="may call 2 times a minute") as caught:
        enter(access)
    assert caught.value.retry_after == pytest.approx(30.0)
    clock.seconds += 29.9
    with pytest.raises(RateLimitedError):
        enter(access)
    clock.seconds += 0.2
    enter(access)
    clock.seconds += 1e6
    enter(access), enter(access)
    with pytest.raises(RateLimitedError):
        enter(access)


def test_what_was_reserved_and_not_used_is_given_back(control, clock):
    access = control(table(more="tokens_per_minute = 100"))
    charge = enter(access).charge
    charge.reserve(80, "sampling.max_tokens")
    other = enter(access).charge
    with pytest.raises(RateLimitedError) as caught:
        other.reserve(30, "sampling.max_tokens")
    assert caught.value.retry_after == pytest.approx(6.0)
    charge.use(10), charge.settle()
    other.reserve(90, "sampling.max_tokens")
    other.use(90), other.settle()
    # Of what was used nothing comes back but by time.
    with pytest.raises(RateLimitedError):
        enter(access).charge.reserve(1, "sampling.max_tokens")
    clock.seconds += 60
    enter(access).charge.reserve(100, "sampling.max_tokens")


def test_more_than_a_minute_ever_has_is_no_matter_of_waiting(control):
    charge = enter(control(table(more="tokens_per_minute = 100"))).charge
    with pytest.raises(InvalidRequestError, match="asks for 101 tokens") as caught:
        charge.reserve(101, "sampling.max_tokens")
    assert caught.value.field == "sampling.max_tokens"


def test_a_token_that_is_renewed_has_no_new_minute(control):
    access = control(table(more="requests_per_minute = 1"))
    enter(access)
    new = TOKEN[:-1] + "0"
    access.path.write_text(table(token=new, more="requests_per_minute = 1"))
    access._tokens.look(), access._tokens.look()
    with pytest.raises(UnauthenticatedError):
        enter(access)
    with pytest.raises(RateLimitedError):
        enter(access, GENERATE, f"Bearer {new}")


def test_a_file_that_is_broken_while_the_server_runs_changes_nothing(control, lines):
    access = control(table())
    access.path.write_text("[tokens")
    access._tokens.look(), access._tokens.look()
    enter(access)
    assert "is not TOML" in access._tokens.problem
    assert [line["log_level"] for line in lines if line.get("file") == "tokens"] == ["error"]


def test_admin_calls_are_served_by_their_listener_alone(control):
    access = control(table(), has_admin_listener=True)
    with pytest.raises(PermissionDeniedError, match="by the admin listener, and not by this one"):
        enter(access, RELOAD)
    # Where what is served is nothing that those learn who have no token.
    with pytest.raises(UnauthenticatedError, match="a token is needed"), access.admitted(RELOAD, [], "peer"):
        pass
    with pytest.raises(PermissionDeniedError, match="by the main listener"):
        enter(access, MODEL, by_admin_listener=True)
    enter(access, RELOAD, by_admin_listener=True)
    for method, scope in RPC_SCOPES.items():
        if not method.startswith("/steering."):
            enter(access, method), enter(access, method, by_admin_listener=True)
        assert (scope == "open") == method.startswith("/grpc.health.")


def test_every_admin_call_and_every_refusal_has_a_line_without_a_token(control, lines):
    access = control(table(["admin"]))
    enter(access, RELOAD)
    with pytest.raises(ZeroDivisionError), access.admitted(RELOAD, [f"Bearer {TOKEN}"], "ipv4:10.0.0.1:5"):
        raise ZeroDivisionError
    with pytest.raises(PermissionDeniedError):
        enter(access, MODEL)
    with pytest.raises(UnauthenticatedError):
        enter(access, RELOAD, f"Bearer {TOKEN[:-1]}0")
    said = [{**line} for line in lines if line["event"] == "audit"]
    peer = {"peer": "ipv4:10.0.0.1:5", "event": "audit"}
    assert said == [
        {"action": "called", "method": RELOAD, "token": "notebooks", "outcome": "OK", "log_level": "info", **peer},
        {
            "action": "called",
            "method": RELOAD,
            "token": "notebooks",
            "outcome": "ZeroDivisionError",
            "log_level": "info",
            **peer,
        },
        {"action": "refused", "method": MODEL, "token": "notebooks", "cause": "scope", "log_level": "warning", **peer},
        {"action": "refused", "method": RELOAD, "token": "", "cause": "unknown token", "log_level": "warning", **peer},
    ]
    assert TOKEN[6:-1] not in str(lines)


def test_a_flood_of_refusals_fills_no_disk_and_hides_no_admin_call(control, lines, clock):
    access = control(table())
    for _ in range(5000):
        with pytest.raises(UnauthenticatedError):
            enter(access, RELOAD, "Bearer x")
    enter(access, RELOAD)
    assert [line["action"] for line in lines] == ["refused"] * 60 + ["called"]
    assert access.refusals == {"unknown token": 5000}
    clock.seconds += 1.1
    with pytest.raises(UnauthenticatedError):
        enter(access, RELOAD, "Bearer x")
    assert lines[-1]["left_out"] == 4940


def test_names_are_counted_up_to_a_bound(control):
    tokens = [f"steer_{number:043d}" for number in range(MAX_TOKENS)]
    access = control("".join(table(name=f"t{number}", token=token) for number, token in enumerate(tokens)))
    for token in tokens:
        enter(access, MODEL, f"Bearer {token}")
    assert len(access.calls) == 101
    assert access.calls[OTHERS] == MAX_TOKENS - 100


def test_a_clock_that_is_set_back_between_calls_brings_no_token_back(control, clock):
    access = control(table(more="expires = 2030-01-01T00:00:10Z"))
    clock.date = datetime(2030, 1, 1, 0, 0, 11, tzinfo=UTC)
    access.look_at_clock()
    clock.date = datetime(2030, 1, 1, tzinfo=UTC)
    with pytest.raises(UnauthenticatedError, match="expired"):
        enter(access)
