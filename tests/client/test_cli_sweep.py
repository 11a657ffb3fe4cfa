"""`steer sweep`: what is read from the command line, sent, shown and judged."""

import json

import pytest
from steer_client import OperatorUse, Words
from steer_client._cli.app import app
from steer_client._cli.dose_chart import axis
from steer_client._cli.expectations import judge, read_expectation
from steer_client._cli.sweep_options import read_operator, read_words_use
from steer_client._sweep.statistics import ArmSummary, Estimate
from steering.v1 import comparison_pb2
from steering.v1 import operators_pb2 as ops
from steering.v1 import steering_pb2 as sp
from typer.testing import CliRunner

OCEAN = ("--operator", "ocean=0.2,0.4")


@pytest.fixture
def steer(fake, monkeypatch, tmp_path):
    """Runs a sweep of two prompts; the fake's steered texts are "one more"."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("hello\n\ngood morning\n")
    for name in ("ocean", "tea", "lens"):
        fake.listed.operators.append(
            ops.Operator(name=name, digest="sha256:" + "1a2b3c4d" * 8, recommended_rule=sp.RULE_CUMULATIVE)
        )
    fake.model.max_arms = 16
    monkeypatch.setenv("STEER_TARGET", fake.target)
    return lambda *arguments: CliRunner().invoke(app, ("sweep", "--prompts", str(prompts), *arguments))


def compares(fake):
    return [each for each in fake.requests if isinstance(each, comparison_pb2.CompareRequest)]


@pytest.mark.parametrize(
    ("text", "key", "strengths"),
    [
        ("ocean=0.2", "ocean", [0.2]),
        ("ocean=0,-.5,1e-1", "ocean", [0.0, -0.5, 0.1]),
        ("ocean=0.2,0.4:first", "ocean:first", [0.2, 0.4]),
        ("ocean=0.2,0.4:first,anchor=contrast", "ocean:first,anchor=contrast", [0.2, 0.4]),
        ("ocean=0.2,0.4,anchor=contrast", "ocean,anchor=contrast", [0.2, 0.4]),
        ("ocean=0.2,0.4@0.5", OperatorUse("ocean", blend=0.5), [0.2, 0.4]),
    ],
)
def test_an_operator_has_several_strengths(text, key, strengths):
    assert read_operator(text) == (key, strengths)


@pytest.mark.parametrize(
    ("read", "text", "problem"),
    [
        (read_operator, "ocean=0.5,x", "the strength 'x' is no number; write NAME=λ,λ,λ"),
        (read_operator, "ocean=hot", "the strength 'hot' is no number; write NAME=λ,λ,λ"),
        (read_operator, "ocean=0.5,@0.2", "the strength '' is no number; write NAME=λ,λ,λ"),
        (read_operator, "ocean=0.5@much", "write NAME=λ,λ,λ"),
        (read_operator, "ocean=0.5,anchor=none", "write NAME=λ,λ,λ"),
        (read_operator, "ocean", "write NAME=λ,λ,λ"),
        (read_words_use, "tea=0.1,x:first", "the strength 'x' is no number; write WORD=λ,λ"),
    ],
)
def test_what_cannot_be_read_is_quoted_as_it_was_written(read, text, problem):
    with pytest.raises(ValueError, match="cannot read") as caught:
        read(text)
    assert str(caught.value).startswith(f"cannot read {text!r}: {problem}")
    with pytest.raises(ValueError, match="cannot read the positions 'nowhere'"):
        read(f"{text.partition('=')[0]}=0.5:nowhere")


def test_words_have_several_strengths():
    assert read_words_use("hot air, storm*-0.5=0.1,0.2") == (Words({"hot air": 1, "storm": -0.5}), [0.1, 0.2])
    assert read_operator("ocean=0.2", rule="substitute")[0] == OperatorUse("ocean", rule="substitute")


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--operator", "ocean"),
        ("--operator", "ocean=loud"),
        ("--operator", "ocean=0.2,0.2"),
        ("--operator", "ocean=0.2:last"),
        ("--word", "coffee"),
        (*OCEAN, "--seeds", "2"),
        (*OCEAN, "--expect", "useful_hits"),
        (*OCEAN, "--expect", "speed>=1"),
        (*OCEAN, "--expect", "kl_mean>=nan"),
        (*OCEAN, "--expect", "useful_hits>=0.5"),
        (*OCEAN, "--expect", "ocean=0.3:kl_mean<=1"),
        (*OCEAN, "--prompts", "/nowhere/at/all"),
    ],
)
def test_wrong_usage_is_exit_status_2_and_asks_nothing(steer, fake, arguments):
    result = steer(*arguments)
    assert (result.exit_code, result.stdout, fake.requests) == (2, "", [])


def test_every_operator_word_and_seed_is_sent(steer, fake):
    drawn = ("--seeds", "2", "--temperature", "1", "--max-tokens", "9")
    result = steer(*OCEAN, "--operator", "tea=0.1", *drawn, "--control")
    assert result.exit_code == 0, result.stderr
    sent = [use for each in compares(fake) for arm in each.arms for use in arm.operators]
    asked = {(use.name, use.strength) for use in sent}
    assert asked == {*(("ocean", each) for each in (0.0, 0.2, 0.4)), ("tea", 0.0), ("tea", 0.1)}
    assert {each.sampling.seed for each in compares(fake)} == {0, 1}


def test_a_word_is_sent_as_the_lens_takes_it(steer, fake):
    steer("--word", "cup=0.3:first")
    (arm,) = compares(fake)[0].arms
    (use,) = arm.operators
    assert (use.name, use.strength, [word.text for word in use.words]) == ("lens", 0.3, ["cup"])


def test_a_table_and_a_chart_are_shown_and_files_written(steer, tmp_path):
    html, csv = tmp_path / "run.html", tmp_path / "run.csv"
    result = steer(*OCEAN, "--words", "more", "--html", str(html), "--csv", str(csv))
    assert result.exit_code == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["ocean", "0.2", "●", "1.00", "(0.34–1.00)"] in [
        [cell if "●" not in cell else "●" for cell in row] for row in rows
    ]
    assert "<table" in html.read_text()
    assert len(csv.read_text().splitlines()) == 7
    assert "\x1b" not in result.stdout


def test_a_file_that_cannot_be_written_is_named(steer):
    result = steer(*OCEAN, "--csv", "/nowhere/at/all.csv")
    assert result.exit_code == 1
    assert "/nowhere/at/all.csv" in result.stderr


@pytest.mark.parametrize(
    ("expect", "code", "arms"),
    [
        (["useful_hits>=0.5"], 0, ["ocean=0.2", "ocean=0.4"]),
        (["ocean=0.40: useful_hits >= 0.5"], 0, ["ocean=0.4"]),
        (["useful_hits.low>=0.5"], 1, []),
        (["kl_mean<=0.1"], 1, []),
        (["hits>=1", "kl_p95<=0.1"], 1, ["ocean=0.2", "ocean=0.4"]),
    ],
)
def test_expectations_set_the_exit_status(steer, expect, code, arms):
    options = [part for each in expect for part in ("--expect", each)]
    result = steer(*OCEAN, "--words", "more", *options, "--json")
    value = json.loads(result.stdout)
    assert result.exit_code == code
    assert value["expectations"][0] == {"expect": expect[0], "met": code == 0, "arms": arms}
    assert [each["operator"] for each in value["summaries"]] == ["normal", "ocean", "ocean"]
    assert len(value["rows"]) == 6
    shown = steer(*OCEAN, "--words", "more", *options)
    assert shown.exit_code == code
    assert ("✓ met" if code == 0 else "✗ not met") in shown.stdout


def test_a_sweep_goes_on_where_its_file_ends(steer, fake, tmp_path):
    out = ("--out", str(tmp_path / "run.jsonl"))
    assert steer(*OCEAN, *out).exit_code == 0
    sent = len(compares(fake))
    assert steer(*OCEAN, *out).exit_code == 0
    assert len(compares(fake)) == sent
    other = steer("--operator", "ocean=0.3", *out)
    assert other.exit_code == 1
    assert "other operators" in other.stderr


def test_a_control_that_is_not_the_plain_text_fails_and_is_shown(steer, fake, make):
    fake.response = make.response(token_ids=[11, 12, 14])
    result = steer(*OCEAN, "--control")
    assert result.exit_code == 1
    assert "not the plain ones" in result.stderr
    assert "ocean" in result.stdout


def summary(strength, useful, kl):
    share = None if useful is None else Estimate(useful, useful - 0.1, useful + 0.1)
    return ArmSummary("ocean", strength, 10, 10, share, share, Estimate(kl), Estimate(2 * kl), None)


def test_expectations_without_an_arm_must_hold_of_one_setting():
    both = [read_expectation("useful_hits>=0.5"), read_expectation("kl_mean<=1")]
    apart = [summary(0.2, 0.2, 0.5), summary(0.4, 0.8, 2.0)]
    assert [each.met for each in judge(both, apart)] == [False, False]
    assert [each.met for each in judge(both, [*apart, summary(0.3, 0.6, 0.9)])] == [True, True]
    assert judge(both, [*apart, summary(0.3, 0.6, 0.9)])[0].arms == ("ocean=0.3",)


def test_a_number_on_the_bound_decides_by_the_sign_and_the_control_never_counts():
    at = [summary(0.4, 0.5, 1.0)]
    signs = {">=": True, "<=": True, ">": False, "<": False}
    assert {sign: judge([read_expectation(f"hits{sign}0.5")], at)[0].met for sign in signs} == signs
    assert judge([read_expectation("hits>=0.5")], [summary(0.0, 0.9, 0.0)])[0].met is False
    assert judge([read_expectation("ocean=0:kl_mean<=0")], [summary(0.0, 0.9, 0.0)])[0].met is True


def test_what_was_not_measured_is_not_met():
    assert judge([read_expectation("hits<=1")], [summary(0.4, None, 1.0)])[0].met is False
    assert judge([read_expectation("kl_mean.high<=9")], [summary(0.4, 0.5, 1.0)])[0].met is False


@pytest.mark.parametrize(
    ("estimate", "drawn"),
    [
        (Estimate(0.5, 0.25, 0.75), "··├─●─┤··"),
        (Estimate(0.0), "●········"),
        (Estimate(1.0, 0.5, 1.0), "····├───●"),
        (Estimate(2.0), "········●"),
        (None, "·········"),
        (Estimate(float("nan")), "·········"),
    ],
)
def test_a_chart_has_the_value_within_its_interval(estimate, drawn):
    assert axis(estimate, 1.0, 9) == drawn
    assert axis(Estimate(0.0), 0.0, 3) == "●··"
