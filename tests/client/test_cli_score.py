"""`steer score`: what is sent, shown and printed."""

import json

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from steer_client._cli.app import app
from steer_client._cli.score_view import kl_bar
from steering.v1 import comparison_pb2, score_pb2, text_pb2
from typer.testing import CliRunner

PIECES = (" old", "\x1b[31m", " bridge")


def scored(make, request):
    """The truth about a text of three tokens, whose arms take tokens and words as the report asks."""

    def tokens(report):
        for place, piece in enumerate(PIECES):
            token = comparison_pb2.TokenComparison(
                token_id=place, token=piece, logprob=-1.5 - place, normal_logprob=-1.0, kl=0.25 * place
            )
            token.words.extend(comparison_pb2.WordMass(word=word, normal=0.125, arm=0.5) for word in report.words)
            if report.top:
                token.gained.add(token_id=9, token=" sea", logprob=-0.5)
                token.lost.add(token_id=8, token=" land", logprob=-0.75)
            if report.doses and place < 2:
                token.dose = 0.2
            yield token

    def arm(name, operators):
        receipts = make.response(operators=operators).receipts
        read = tokens(request.report)
        return score_pb2.ArmScore(arm=name, tokens=read, kl_mean=0.25, kl_p95=0.5, perplexity=4.5, receipts=receipts)

    return score_pb2.ScoreResponse(
        request_id="r1",
        prompt_token_ids=range(6),
        token_ids=range(3),
        arms=[arm("normal", ()), *(arm(each.name, each.operators) for each in request.arms)],
        timings=text_pb2.Timings(queued=Duration(nanos=1000), total=Duration(seconds=1)),
    )


@pytest.fixture
def steer(fake, make, monkeypatch):
    fake.scored = lambda request: scored(make, request)
    monkeypatch.setenv("STEER_TARGET", fake.target)
    return lambda *arguments, **options: CliRunner().invoke(app, ("score", *arguments), **options)


def test_every_option_reaches_the_server(steer, fake):
    options = ("--words", "sea, wave", "--top", "5", "--doses", "--time-limit", "2.5", "--prompt", "Here is the")
    result = steer(" old bridge", *options, "--operator", "golden-gate=0.4", "--arm", "tea: tea=0.1")
    assert result.exit_code == 0, result.stderr
    (sent,) = fake.requests
    assert (sent.text, sent.prompt.text) == (" old bridge", "Here is the")
    assert (list(sent.report.words), sent.report.top, sent.report.doses) == (["sea", "wave"], 5, True)
    assert [arm.name for arm in sent.arms] == ["steered", "tea"]
    assert sent.time_limit.ToMilliseconds() == 2500


def test_the_text_may_come_from_a_file_or_stdin(steer, fake, tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b" old\r\nbridge\n")
    assert steer("--file", str(path)).exit_code == 0
    assert steer("--file", "-", input=b" of stdin").exit_code == 0
    assert [sent.text for sent in fake.requests] == [" old\r\nbridge\n", " of stdin"]
    assert not fake.requests[0].HasField("prompt")


def test_a_chat_is_sent_as_one(steer, fake):
    steer("Hi", "--prompt", "hello", "--chat")
    assert fake.requests[0].prompt.chat.messages[0].content == "hello"


@pytest.mark.parametrize(
    "arguments",
    [(), ("text", "--file", "x"), ("text", "--chat"), ("--file", "/nowhere/at/all"), ("text", "--arm", "ocean")],
)
def test_wrong_usage_is_exit_status_2_and_asks_nothing(steer, fake, arguments):
    result = steer(*arguments)
    assert (result.exit_code, result.stdout, fake.requests) == (2, "", [])


def test_a_file_that_is_no_text_is_named(steer, tmp_path, monkeypatch):
    # By a short name, which no line of the box around the message is too short for.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    result = steer("--file", "bytes")
    assert result.exit_code == 2
    assert "bytes" in result.stderr


def test_json_has_every_arm_the_plain_one_first(steer):
    value = json.loads(steer(" old bridge", "--operator", "golden-gate", "--words", "sea", "--json").stdout)
    assert set(value) == {"request_id", "prompt_token_ids", "token_ids", "arms", "timings"}
    assert [arm["arm"] for arm in value["arms"]] == ["normal", "steered"]
    token = value["arms"][1]["tokens"][2]
    assert (token["token"], token["logprob"], token["kl"]) == (" bridge", -3.5, 0.5)
    assert token["words"] == [{"word": "sea", "normal": 0.125, "arm": 0.5}]
    assert value["arms"][1]["receipts"][0]["operator"] == "golden-gate"


def test_tokens_stand_in_a_table_for_each_arm(steer):
    report = ("--words", "sea", "--top", "5", "--doses")
    result = steer(" old bridge", "--operator", "golden-gate", "--arm", "[red]tea: tea=0.1", *report)
    lines = result.stdout.splitlines()
    rows = [line.split() for line in lines]
    bridge = ["'", "bridge'", "-3.500", "-1.000", "-2.500", "0.500", "█" * 12, "0.12", "→", "0.5", "–"]
    assert rows.count([*bridge, "+'", "sea'", "-'", "land'"]) == 2
    assert "[red]tea: tea λ 0.1" in lines
    assert ["normal", "4.5", "–", "–"] in rows
    assert ["[red]tea", "4.5", "0.25", "0.5"] in rows
    assert sum("✓" in line for line in lines) == 2
    assert "\x1b" not in result.stdout


def test_without_arms_the_plain_model_reads_the_text(steer):
    rows = [line.split() for line in steer(" old bridge", "--words", "sea").stdout.splitlines()]
    assert ["token", "log", "p", "p(sea)"] in rows
    assert ["'", "old'", "-1.500", "0.125"] in rows
    assert ["normal", "4.5", "–", "–"] in rows


def test_a_failure_is_one_line_and_exit_status_1(steer, fake, make):
    fake.fault = make.fault(grpc.StatusCode.NOT_FOUND, "no operator", "GONE")
    result = steer("text", "--json")
    assert (result.exit_code, json.loads(result.stdout)["error"]["reason"]) == (1, "GONE")


@pytest.mark.parametrize(
    ("value", "most", "bar", "style"),
    [(0, 1, "", "green"), (0.5, 1, "█" * 6, "yellow"), (1, 1, "█" * 12, "red"), (0, 0, "", "green")],
)
def test_a_bar_is_the_share_of_the_largest_kl(value, most, bar, style):
    drawn = kl_bar(value, most)
    assert (drawn.plain, drawn.style) == (bar, style)
