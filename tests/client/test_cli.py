import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2
from steer_client._cli.app import app
from steer_client._cli.formatting import escape_controls, format_number, short_digest
from steering.v1 import generation_pb2 as pb
from steering.v1 import operators_pb2 as ops
from steering.v1 import steering_pb2 as sp
from steering.v1 import text_pb2
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]
C = grpc.StatusCode


@pytest.fixture
def steer(fake, monkeypatch):
    """Runs the command against the scripted server; stdout and stderr are kept apart."""
    monkeypatch.setenv("STEER_TARGET", fake.target)
    monkeypatch.setenv("COLUMNS", "100")
    runner = CliRunner()
    return lambda *arguments: runner.invoke(app, arguments)


def read(result) -> dict:
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(result.stdout, parse_constant=refuse)


GENERATION_KEYS = {
    "text",
    "token_ids",
    "finish_reason",
    "usage",
    "receipts",
    "request_id",
    "sample",
    "seed",
    "stop_string",
    "timings",
}


def test_generate_as_json_has_its_exact_shape(steer, fake, make):
    fake.response = make.response(operators=("golden-gate",))
    result = steer("generate", "hello", "--operator", "golden-gate", "--json")
    assert result.exit_code == 0
    assert result.stderr == ""
    value = read(result)
    assert set(value) == GENERATION_KEYS
    assert value["text"] == "one two"
    assert value["token_ids"] == [11, 12, 13]
    assert value["finish_reason"] == "MAX_TOKENS"
    assert value["usage"] == {"prompt_tokens": 6, "completion_tokens": 3}
    assert value["stop_string"] is None
    assert value["timings"] == {"queued": 1e-6, "time_to_first_token": 0.25, "total": 1.5}
    (receipt,) = value["receipts"]
    assert receipt["operator"] == "golden-gate"
    assert receipt["rule"] == "cumulative"
    assert receipt["defaulted"] == ["strength", "rule", "blend", "positions", "anchor", "first_token"]
    assert receipt["positions"] == {"part": "all", "start": 0, "end": None}
    assert receipt["prompt_tokens_cached"] == 0


def test_logprobs_are_in_the_json_when_they_were_asked_for(steer, fake):
    value = read(steer("generate", "hello", "--logprobs", "0", "--json"))
    assert set(value) == GENERATION_KEYS | {"logprobs"}
    assert fake.requests[0].sampling.HasField("logprobs")


def test_ab_as_json_has_its_exact_shape(steer):
    result = steer("ab", "hello", "--operator", "golden-gate", "--json")
    assert result.exit_code == 0
    assert result.stderr == ""
    value = read(result)
    assert set(value) == {"normal", "steered", "first_divergence", "kl", "perplexity"}
    assert set(value["normal"]) == set(value["steered"]) == GENERATION_KEYS
    assert value["first_divergence"] == 1
    assert value["kl"] == {"mean": 0.5, "p95": 0.75, "per_token": [0.25, 0.75, 0.5]}
    assert value["perplexity"] == {"normal": 3, "steered": 9}


def test_ab_without_scores_says_null(steer, fake):
    value = read(steer("ab", "hello", "--operator", "golden-gate", "--no-score", "--json"))
    assert value["kl"] is None
    assert value["perplexity"] is None
    assert not fake.requests[0].score


def test_what_json_cannot_say_is_null(steer, fake, make):
    steered = make.response("one more", operators=("golden-gate",))
    fake.events = make.comparison(make.response(), {"steered": steered}, mean=float("nan"))
    value = read(steer("ab", "hello", "--operator", "golden-gate", "--json"))
    assert value["kl"] == {"mean": None, "p95": 0.75, "per_token": [0.25, 0.75, 0.5]}


def test_every_option_reaches_the_server(steer, fake, make):
    uses = [
        sp.OperatorUse(name="a", strength=-0.5, rule=sp.RULE_SUBSTITUTE),
        sp.OperatorUse(name="b", strength=0.25, blend=1.0, rule=sp.RULE_SUBSTITUTE),
        sp.OperatorUse(
            name="c",
            strength=0.5,
            rule=sp.RULE_SUBSTITUTE,
            positions=sp.Positions(part=sp.Positions.PART_ALL, start=0, end=8),
        ),
    ]
    fake.response = make.response(operators=uses)
    result = steer(
        *("generate", "hello", "--operator", "a=-0.5", "--operator", "b=0.25@1", "--rule", "substitute"),
        *("--operator", "c=0.5:..8"),
        *("--max-tokens", "9", "--temperature", "0.7", "--top-p", "0.9", "--top-k", "5", "--min-p", "0.1"),
        *("--repetition-penalty", "1.2", "--seed", "0", "--stop", "x", "--stop", "\n", "--ignore-eos"),
        *("--time-limit", "1.5", "--chat", "--presence-penalty", "0.5", "--frequency-penalty", "-0.25"),
        *("--logit-bias", "42=-5", "--logit-bias", "7=1e1", "--min-tokens", "3", "--keep-special-tokens"),
    )
    assert result.exit_code == 0, result.stderr
    (sent,) = fake.requests
    assert sent.prompt.chat.messages[0] == text_pb2.ChatMessage(role="user", content="hello")
    assert list(sent.operators) == uses
    expected = text_pb2.SamplingParams(
        temperature=0.7,
        top_p=0.9,
        top_k=5,
        min_p=0.1,
        repetition_penalty=1.2,
        seed=0,
        max_tokens=9,
        stop_strings=["x", "\n"],
        ignore_eos=True,
        presence_penalty=0.5,
        frequency_penalty=-0.25,
        logit_bias=[text_pb2.TokenBias(token_id=42, bias=-5), text_pb2.TokenBias(token_id=7, bias=10)],
        min_tokens=3,
        skip_special_tokens=False,
    )
    expected.time_limit.FromMilliseconds(1500)
    assert sent.sampling == expected


def test_options_that_are_not_given_are_not_sent(steer, fake):
    steer("generate", "hello")
    assert fake.requests == [
        pb.GenerateRequest(prompt=text_pb2.Prompt(text="hello"), sampling=text_pb2.SamplingParams())
    ]


def test_down_a_pipe_goes_the_text_alone(steer, fake, make):
    fake.response = make.response(operators=("golden-gate",))
    result = steer("generate", "hello", "--operator", "golden-gate")
    assert result.stdout == "one two\n"
    assert "MAX_TOKENS · 6 prompt + 3 generated tokens · 1.50 s · 2.0 tok/s" in result.stderr
    assert (
        "✓ golden-gate sha256:1a2b3c4d… layer 20, strength 0.55, blend 0, cumulative (recommended): "
        "6 prompt + 2 generated tokens steered, measured λ mean 0.55, max 0.55 of 0.55, direction checked at 1 token: "
        "cosine ≥ 0.9999"
    ) in result.stderr


def test_a_dose_that_was_rounded_up_is_not_shown_above_its_bound(steer, fake, make):
    fake.response = make.response(receipts=[make.receipt(mean_dose=0.2755, max_dose=0.2769)])
    shown = steer("generate", "hello", "--operator", "golden-gate").stderr
    assert "measured λ mean 0.55, max 0.55 of 0.55, direction checked" in shown


def test_cached_prompt_tokens_are_part_of_the_proof_where_there_are_some(steer, fake, make):
    cached = make.receipt(prompt_tokens_steered=1, prompt_tokens_cached=5)
    fake.response = make.response(receipts=[cached])
    shown = steer("generate", "hello", "--operator", "golden-gate")
    assert "1 prompt + 2 generated tokens steered, 5 prompt tokens cached, measured λ mean 0.55" in shown.stderr
    (receipt,) = read(steer("generate", "hello", "--operator", "golden-gate", "--json"))["receipts"]
    assert (receipt["prompt_tokens_steered"], receipt["prompt_tokens_cached"]) == (1, 5)
    fake.response = make.response(operators=("golden-gate",))
    assert "cached" not in steer("generate", "hello", "--operator", "golden-gate").stderr


def test_an_unproven_text_never_goes_down_a_pipe(steer):
    result = steer("generate", "hello", "--operator", "golden-gate")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("steer: the text is not steered as asked")


def test_ab_prints_both_texts_and_how_far_they_part(steer):
    result = steer("ab", "hello", "--operator", "golden-gate")
    assert result.exit_code == 0
    for part in (
        "one two",
        "one more",
        "first divergence at token 1",
        "KL(plain‖steered) mean 0.5, p95 0.75",
        "normal 3, steered 9",
        "✓ golden-gate",
    ):
        assert part in result.stdout


@pytest.mark.parametrize("command", [("generate",), ("ab", "--operator", "golden-gate")])
def test_a_failed_request_is_one_line_and_exit_status_1(steer, fake, make, command):
    fake.fault = make.fault(C.NOT_FOUND, "no operator\nof that name", "UNKNOWN_OPERATOR")
    fake.events = []
    result = steer(command[0], "hello", *command[1:])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == "steer: no operator of that name\n"


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_text_that_the_servers_stop_cut_short_is_shown_and_no_success(steer, fake, make, options):
    cut = make.response("one", finish_reason=text_pb2.FINISH_REASON_CANCELLED)
    fake.events = make.events(cut)
    result = steer("generate", "hello", *options)
    assert "one" in result.stdout
    assert result.exit_code == 1
    steered = make.response("one more", operators=("golden-gate",))
    fake.events = make.comparison(cut, {"steered": steered})
    assert steer("ab", "hello", "--operator", "golden-gate", *options).exit_code == 1


def test_a_failed_request_as_json_is_an_object_on_stdout(steer, fake, make):
    fake.fault = make.fault(
        C.INVALID_ARGUMENT, "top_p must be in (0, 1]", "INVALID_REQUEST", field_name="sampling.top_p"
    )
    result = steer("generate", "hello", "--top-p", "7", "--json")
    assert result.exit_code == 1
    assert read(result) == {
        "error": {
            "code": "INVALID_ARGUMENT",
            "reason": "INVALID_REQUEST",
            "message": "top_p must be in (0, 1]",
            "metadata": {},
            "field": "sampling.top_p",
        }
    }


def test_a_busy_server_tells_scripts_when_to_come_back(steer, fake, make):
    fake.fault = make.fault(C.RESOURCE_EXHAUSTED, "full", "QUEUE_FULL", retry_after=2.0)
    error = read(steer("ab", "hello", "--operator", "a", "--json"))["error"]
    assert (error["reason"], error["retry_after"]) == ("QUEUE_FULL", 2)


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate",),
        ("generate", "hello", "--operator", "a=strong"),
        ("generate", "hello", "--rule", "other"),
        ("generate", "hello", "--no-such-option"),
        ("generate", "hello", "--rule", "substitute"),
        ("generate", "hello", "--word", "tea", "--rule", "substitute"),
        ("generate", "hello", "--operator", "a", "--lens", "other"),
        ("generate", "hello", "--word", "tea=0.1", "--kl", "0.5"),
        ("generate", "hello", "--logit-bias", "42"),
        ("generate", "hello", "--assistant", "Well"),
        ("generate", "hello", "--template-option", "a=1"),
        ("generate", "hello", "--chat", "--template-option", "a"),
        ("generate", "hello", "--logit-bias", "tea=5"),
        ("ab", "hello"),
        ("nothing",),
    ],
)
def test_wrong_usage_is_exit_status_2_and_asks_nothing(steer, fake, arguments):
    result = steer(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert fake.requests == []


def test_nobody_at_the_target_is_exit_status_1(steer):
    result = steer("health", "--target", "127.0.0.1:1")
    assert result.exit_code == 1
    assert "127.0.0.1:1" in result.stderr
    assert "is steer-server running there?" in result.stderr


def test_health_is_an_exit_status(steer, fake):
    assert steer("health").exit_code == 0
    fake.health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    result = steer("health")
    assert (result.exit_code, result.stdout) == (1, "not serving\n"), "of a server without the other probes"


@pytest.mark.parametrize(
    ("live", "started", "said"),
    [
        ("SERVING", "NOT_SERVING", "not serving: it is loading its model\n"),
        ("SERVING", "SERVING", "not serving: it is stopping\n"),
        ("NOT_SERVING", "NOT_SERVING", "not serving: its engine can decode nothing any more\n"),
    ],
)
def test_health_says_why_it_is_not_serving(steer, fake, live, started, said):
    for name, state in {"": "NOT_SERVING", "live": live, "started": started}.items():
        fake.health.set(name, health_pb2.HealthCheckResponse.ServingStatus.Value(state))
    result = steer("health")
    assert (result.exit_code, result.stdout) == (1, said)


def test_operators_are_listed_with_the_problems_of_the_broken(steer, fake):
    fake.listed = ops.ListOperatorsResponse(
        operators=[
            ops.Operator(name="golden-gate", concept="Golden Gate Bridge", recommended_rule=1, digest="sha256:00"),
            ops.Operator(name="broken", problem="the file is cut short"),
        ]
    )
    result = steer("operators", "--reload")
    assert result.exit_code == 0
    assert "golden-gate" in result.stdout
    assert "✗ broken: the file is cut short" in result.stdout
    assert "reloaded: added new; unusable broken" in result.stderr
    value = read(steer("operators", "--json"))
    assert [each["name"] for each in value["operators"]] == ["golden-gate", "broken"]
    assert value["operators"][1]["problem"] == "the file is cut short"
    assert read(steer("operators", "--reload", "--json"))["reload"]["added"] == ["new"]


def test_info_and_tokenize_have_both_forms(steer):
    assert "tiny" in steer("info").stdout
    assert read(steer("info", "--json"))["num_layers"] == 4
    assert "' b'" in steer("tokenize", "a b").stdout
    assert read(steer("tokenize", "a b", "--json")) == {"token_ids": [1, 2], "tokens": ["a", " b"]}


def test_a_timeout_is_a_failed_request(steer, fake):
    fake.hang_after = 1
    result = steer("generate", "hello", "--timeout", "0.2")
    assert result.exit_code == 1
    assert "within 0.2 s" in result.stderr


def test_ctrl_c_is_exit_status_130_and_cancels_the_request(fake):
    fake.hang_after = 2
    environment = os.environ | {
        "STEER_TARGET": fake.target,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "clients/python"), str(ROOT / "protos")]),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "steer_client", "generate", "hello"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 30
    while not fake.requests and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err) == (130, "", "")
    assert fake.left.wait(5)


def test_a_text_cannot_command_the_terminal():
    assert escape_controls("a\x1b[31mb\n\tc\x9b") == "a␛[31mb\n\tc�"


def test_numbers_and_digests_are_short():
    assert [format_number(value) for value in (0.27123, 1, 12345.678, None)] == ["0.271", "1", "12346", "–"]
    assert short_digest("sha256:" + "ab" * 32) == "sha256:abababab…"
    assert short_digest("odd") == "odd"


@pytest.mark.parametrize("command", [command.name or command.callback.__name__ for command in app.registered_commands])
def test_every_commands_help_has_an_example_with_options_that_it_takes(steer, command):
    shown = steer(command, "--help").stdout
    (example,) = [line.strip() for line in shown.splitlines() if line.strip().startswith(f"steer {command} ")]
    options = shlex.split(example)[2:]
    assert all(option in shown.replace(example, "") for option in options if option.startswith("--"))
