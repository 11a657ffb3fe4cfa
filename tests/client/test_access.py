"""Who is calling: the token and metadata of every call, and where they must not go."""

import logging
import os
import pprint
import traceback

import grpc
import pytest
import typer
from steer_client import (
    AsyncSteerClient,
    InsecureTokenError,
    InvalidRequestError,
    OperatorUse,
    PermissionDeniedError,
    SteerClient,
    UnauthenticatedError,
)
from steer_client._channel import is_local
from steer_client._cli.app import app
from typer.testing import CliRunner

C = grpc.StatusCode
TOKEN, RENEWED = "steer_" + "x1-_" * 10 + "abc", "steer_" + "y2-_" * 10 + "abc"
ELSEWHERE = ["10.0.0.1:50051", "steer:50051", "dns:///steer:50051", "ipv4:127.0.0.1:1,10.0.0.1:1"]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in [name for name in os.environ if name.startswith("STEER_")]:
        monkeypatch.delenv(name)


def sent(fake):
    return [each.get("authorization") for each in fake.metadata]


def test_every_way_to_ask_sends_the_token_of_the_environment(fake, any_call, monkeypatch):
    fake.token = TOKEN
    with pytest.raises(UnauthenticatedError, match="the token is not known"):
        any_call(fake.target)
    monkeypatch.setenv("STEER_TOKEN", TOKEN)
    any_call(fake.target)
    assert sent(fake) == [None, f"Bearer {TOKEN}"]


async def test_every_method_sends_the_token_and_the_metadata_with_each_of_its_requests(fake, tmp_path):
    fake.token = TOKEN
    fake.listed.operators.add(name="tea", digest="sha256:" + "1a2b3c4d" * 8, recommended_rule="RULE_CUMULATIVE")
    fake.model.max_arms = 8
    given = {"token": TOKEN, "metadata": {"X-Tenant": "lab 7"}}
    out = tmp_path / "sweep.jsonl"
    with SteerClient(fake.target, **given) as client:
        assert client.model_info()
        assert client.operator("tea")
        assert client.reload_operators()
        client.sweep(["x", "y"], operators={"tea": 0.1}, out=out, targets=[fake.target])
        client.compare_many(["x"], operators="tea=0.1")
    async with AsyncSteerClient(fake.target, **given) as client:
        await client.sweep(["x"], operators={"tea": 0.1})
        [_ async for _ in client.compare_stream("x", operators="tea=0.1")]
    assert len(fake.metadata) == 12
    assert {each.get("x-tenant") for each in fake.metadata} == {"lab 7"}
    assert TOKEN not in out.read_text(encoding="utf-8")


async def test_a_call_that_belongs_to_a_trace_has_its_token_too(fake, monkeypatch):
    monkeypatch.setattr("steer_client._channel.trace_metadata", lambda: (("traceparent", "00-1-2-01"),))
    with SteerClient(fake.target, token=TOKEN) as client:
        client.tokenize("x")
        list(client.stream("x"))
    async with AsyncSteerClient(fake.target, token=TOKEN) as client:
        await client.tokenize("x")
    assert sent(fake) == [f"Bearer {TOKEN}"] * 3
    assert [each["traceparent"] for each in fake.metadata] == ["00-1-2-01"] * 3


def test_a_function_is_asked_for_the_token_before_each_attempt(fake, make):
    tokens = iter([TOKEN, RENEWED, RENEWED])
    fake.refusals = [make.fault(C.RESOURCE_EXHAUSTED, "60 requests per minute", "RATE_LIMITED", retry_after=0.05)]
    with SteerClient(fake.target, token=lambda: next(tokens)) as client:
        assert client.generate("x").text == "one two"
        with client.stream("x") as stream:
            assert len(list(stream)) > 0
    assert sent(fake) == [f"Bearer {token}" for token in (TOKEN, RENEWED, RENEWED)]
    with SteerClient(fake.target, token=lambda: b"steer_x") as client:
        with pytest.raises(InvalidRequestError, match="token: is a bytes, and must be a text"):
            client.generate("x")
        with pytest.raises(InvalidRequestError, match="token: is a bytes, and must be a text"):
            client.stream("x")


async def test_a_token_file_is_read_again_when_it_changed(fake, tmp_path, monkeypatch):
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    client, async_client = SteerClient(fake.target, token_file=file), AsyncSteerClient(fake.target, token_file=file)
    client.tokenize("x")
    before = file.stat()
    # Of the same length and with the same times, as a quick rewrite may have.
    file.write_text(f"{RENEWED}\n")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    client.tokenize("x")
    await async_client.tokenize("x")
    assert sent(fake) == [f"Bearer {TOKEN}", f"Bearer {RENEWED}", f"Bearer {RENEWED}"]
    file.unlink()
    with pytest.raises(InvalidRequestError, match=r"^token_file: cannot read '.*/token': No such file"):
        client.tokenize("x")
    file.write_text("")
    with pytest.raises(InvalidRequestError, match=r"^token_file: '.*/token': is empty"):
        await async_client.tokenize("x")
    client.close()
    await async_client.close()
    file.write_text(TOKEN)
    monkeypatch.setenv("STEER_TOKEN_FILE", str(file))
    with SteerClient(fake.target) as client:
        client.tokenize("x")
    assert sent(fake)[-1] == f"Bearer {TOKEN}"


def test_what_is_given_stands_before_the_environment(fake, monkeypatch, tmp_path):
    monkeypatch.setenv("STEER_TOKEN", RENEWED)
    (file := tmp_path / "token").write_text(TOKEN)
    for given in ({"token": TOKEN}, {"token_file": file}):
        with SteerClient(fake.target, **given) as client:
            client.tokenize("x")
    assert sent(fake) == [f"Bearer {TOKEN}"] * 2
    monkeypatch.setenv("STEER_TOKEN_FILE", str(file))
    with pytest.raises(InvalidRequestError, match="STEER_TOKEN: give it or STEER_TOKEN_FILE, not both"):
        SteerClient(fake.target)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"token": TOKEN, "token_file": "x"}, "^token: give it or token_file, not both"),
        ({"token": ""}, "^token: is empty"),
        ({"token": f"Bearer {TOKEN}"}, "without 'Bearer'"),
        ({"token": f"{TOKEN}\n"}, "has a character that no token has"),
        ({"token": TOKEN * 100}, "^token: has more than 4096 characters"),
        ({"token_file": "/dev/zero"}, "^token_file: '/dev/zero': has more than"),
        ({"token_file": "/etc"}, "^token_file: cannot read '/etc': Is a directory"),
        ({"token": TOKEN, "metadata": {"Authorization": "Basic abc"}}, "^metadata: 'authorization' is the header of"),
        ({"metadata": {"x y": "1"}}, "^metadata: 'x y' is no key"),
        ({"metadata": {"grpc-timeout": "1S"}}, "^metadata: 'grpc-timeout' is no key"),
        ({"metadata": {"x-bin": "1"}}, "^metadata: 'x-bin' is no key"),
        ({"metadata": {"X": "1", "x": "2"}}, "^metadata: 'x' is given twice"),
        ({"metadata": {"x": f"{TOKEN}\r\nevil: 1"}}, "^metadata: the value of 'x' must be printable ASCII"),
        ({"metadata": {"x": f" {TOKEN}"}}, "^metadata: the value of 'x' must be printable ASCII"),
        ({"metadata": {"x": 1}}, "^metadata: the value of 'x' must be printable ASCII"),
        ({"metadata": {"x": TOKEN * 50}}, "^metadata: 2451 characters; at most 2048 are sent"),
    ],
)
def test_what_no_header_can_carry_is_refused_and_not_shown(given, match):
    with pytest.raises(InvalidRequestError, match=match) as caught:
        SteerClient("127.0.0.1:1", **given)
    assert TOKEN not in "".join(traceback.format_exception(caught.value))
    assert caught.value.field in given


@pytest.mark.parametrize("target", ELSEWHERE)
def test_a_token_goes_to_another_machine_over_tls_alone(target, fake):
    with pytest.raises(InsecureTokenError, match=f"^token: it would go to {target} in plaintext.*--insecure-token"):
        SteerClient(target, token=TOKEN)
    with pytest.raises(InsecureTokenError):
        SteerClient(target, metadata={"authorization": "Basic abc"})
    with SteerClient(fake.target, token=TOKEN) as client, pytest.raises(InsecureTokenError):
        client.sweep(["x"], operators={"tea": 0.1}, targets=[fake.target, target])
    for given in ({"tls": True}, {"insecure_token": True}, {"credentials": grpc.ssl_channel_credentials()}):
        SteerClient(target, token=TOKEN, **given).close()
    SteerClient(target, metadata={"x-tenant": "lab"}).close()
    assert not fake.requests


@pytest.mark.parametrize("kind", [UnauthenticatedError, PermissionDeniedError])
def test_a_refusal_of_the_caller_is_not_tried_again(fake, make, client, kind):
    fake.fault = make.fault(kind.default_code, "no", kind.default_reason, retry_after=0.05)
    with pytest.raises(kind):
        client.generate("x")
    with pytest.raises(kind):
        list(client.stream("x"))
    assert len(fake.requests) == 2


def test_who_sent_no_token_is_told_how(fake, make, client):
    give_one = r"; give one by token= or token_file= \(--token-file, STEER_TOKEN\)$"
    for reason, said in (("UNAUTHENTICATED", "^a token"), ("SOMETHING_NEW", "^a token"), ("", "proxy")):
        fake.fault = make.fault(C.UNAUTHENTICATED, "a token is needed", reason)
        with pytest.raises(UnauthenticatedError, match=f"{said}.*{give_one}"):
            client.generate("x")
        with SteerClient(fake.target, token=TOKEN) as known, pytest.raises(UnauthenticatedError) as caught:
            known.generate("x")
        assert "STEER_TOKEN" not in str(caught.value)


def test_a_token_is_in_nothing_that_is_shown_or_logged(fake, make, caplog):
    caplog.set_level(logging.DEBUG)
    fake.fault = make.fault(C.UNAUTHENTICATED, "the token is not known", "UNAUTHENTICATED")
    with SteerClient(fake.target, token=TOKEN, metadata={"x-key": RENEWED}) as client:
        with pytest.raises(UnauthenticatedError) as caught:
            client.generate("x", operators=[OperatorUse("tea")])
        stream = client.stream("x")
        shown = [
            repr(client),
            pprint.pformat(vars(client)),
            repr(client._access.metadata),
            repr(stream),
            pprint.pformat(vars(stream)),
            repr(caught.value),
            repr(caught.value.__cause__),
            "".join(traceback.format_exception(caught.value)),
            caplog.text,
        ]
    assert sent(fake)[0] == f"Bearer {TOKEN}"
    assert not [text for text in shown if TOKEN in text or RENEWED in text]


def test_the_command_sends_token_and_metadata_and_shows_neither(fake, tmp_path):
    (file := tmp_path / "token").write_text(TOKEN)
    fake.token = TOKEN

    def run(*options, command=("generate", "x")):
        return CliRunner().invoke(app, [*command, "--target", fake.target, *options])

    assert run("--token-file", str(file), "--metadata", "x-key=a=b").stdout == "one two\n"
    assert fake.metadata[-1]["x-key"] == "a=b"
    refused = run("--json")
    assert (refused.exit_code, refused.stderr) == (
        1,
        "steer: the token is not known; give one by token= or token_file= (--token-file, STEER_TOKEN)\n",
    )
    assert '"reason": "UNAUTHENTICATED"' in refused.stdout
    for options in (["--metadata", TOKEN], ["--metadata", "x=1", "--metadata", f"x={TOKEN}"]):
        result = run(*options)
        assert result.exit_code == 2
        assert TOKEN not in result.output
    for command in (("info",), ("operators",), ("tokenize", "x"), ("ab", "x", "-o", "tea"), ("score", "x")):
        asked = len(fake.requests)
        run("--token-file", str(file), command=command)
        assert sent(fake)[asked:] == [f"Bearer {TOKEN}"]


def test_the_command_sends_no_token_to_another_machine_in_plaintext(fake, monkeypatch):
    monkeypatch.setenv("STEER_TOKEN", TOKEN)
    monkeypatch.setattr("steer_client._access.is_local", lambda _: False)
    refused = CliRunner().invoke(app, ["info", "--target", fake.target])
    assert refused.exit_code == 2
    assert refused.stderr.startswith(f"steer: token: it would go to {fake.target} in plaintext")
    assert CliRunner().invoke(app, ["info", "--target", fake.target, "--insecure-token"]).exit_code == 0
    assert sent(fake) == [f"Bearer {TOKEN}"]


def test_every_command_takes_the_options_of_access_and_none_a_token_itself():
    commands = dict(typer.main.get_command(app).commands)
    commands |= commands.pop("admin").commands
    for name, command in commands.items():
        options = {option for parameter in command.params for option in parameter.opts}
        assert {
            *("--tls", "--ca", "--cert", "--key", "--server-name"),
            *("--token-file", "--metadata", "--insecure-token"),
        } <= options, name
        assert "--token" not in options


@pytest.mark.parametrize(
    ("target", "local"),
    [
        ("127.0.0.1:1", True),
        ("[::1]:1", True),
        ("dns:localhost:1", True),
        ("dns:///localhost:1", True),
        ("dns://10.0.0.53/127.0.0.1:1", True),
        ("dns://10.0.0.53/localhost:1", False),
        ("vsock:3:1", False),
        ("ipv4:127.0.0.1:1,127.0.0.2:1", True),
        ("unix:/run/steer", True),
        # Whom names are asked of is not who is called.
        ("dns://127.0.0.1:53/remote:1", False),
        ("dns://127.0.0.1:8600/remote", False),
        ("ipv4:127.0.0.1:1,10.0.0.1:1", False),
        ("remote:1", False),
    ],
)
def test_a_target_is_local_where_what_it_names_is(target, local):
    assert is_local(target) == local
