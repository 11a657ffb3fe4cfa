"""`steer ab` with several arms and samples: what is sent, shown and printed."""

import io
import json

import grpc
import pytest
from rich.console import Console
from rich.text import Text
from steer_client import ArmDelta, OperatorUse, TextDelta, Words
from steer_client._cli.app import app
from steer_client._cli.arms import concept_words, read_arms
from steer_client._cli.marked_text import CONCEPT_STYLE, changed_spans, mark_words, read_words
from steer_client._cli.side_by_side import SideBySide
from typer.testing import CliRunner

TWO = ("--arm", "mild: golden-gate=0.2", "--arm", "strong: golden-gate=0.5@1 tea=0.2")


@pytest.fixture
def steer(fake, monkeypatch):
    monkeypatch.setenv("STEER_TARGET", fake.target)
    monkeypatch.setenv("COLUMNS", "100")
    return lambda *arguments: CliRunner().invoke(app, arguments)


def test_an_arm_is_a_name_and_operators_as_everywhere_else():
    assert read_arms(
        ["mild: ocean=0.2", "both things: ocean=0.4@0.5:first tea", "x:  word(hot air, storm*-0.5)=0.12"]
    ) == {
        "mild": (OperatorUse("ocean", 0.2),),
        "both things": (OperatorUse.parse("ocean=0.4@0.5:first"), OperatorUse("tea")),
        "x": (Words({"hot air": 1.0, "storm": -0.5}, 0.12),),
    }
    (words,) = read_arms(["x: word(tea):first"], kl=0.3, lens="other")["x"]
    assert (words.kl, words.name, str(words.positions)) == (0.3, "other", "first")


@pytest.mark.parametrize(
    "arm",
    [
        "ocean=0.2",
        ": ocean",
        "mild:",
        "mild: ",
        "ocean=0.4:first",
        "mild: ocean=loud",
        "mild: word(a, a)",
        "",
        "normal: a",
    ],
)
def test_what_is_no_arm_is_wrong_usage_and_named(steer, fake, arm):
    result = steer("ab", "hello", "--arm", arm)
    assert (result.exit_code, result.stdout, fake.requests) == (2, "", [])
    assert "--arm" in result.stderr


def test_arms_with_one_name_are_refused(steer, fake):
    same = steer("ab", "hello", "--arm", "a: x", "--arm", "a: y")
    taken = steer("ab", "hello", "--arm", "steered: x", "--operator", "y")
    assert [same.exit_code, taken.exit_code, fake.requests] == [2, 2, []]
    assert "two arms are named 'a'" in same.stderr


def test_options_of_all_operators_speak_of_arms_too(steer, fake):
    steer("ab", "hello", "--arm", "a: tea", "--kl", "0.5", "--rule", "substitute")
    (arm,) = fake.requests[0].arms
    assert (arm.operators[0].kl, arm.operators[0].rule) == (0.5, 2)
    assert steer("ab", "hello", "--arm", "a: tea=0.1", "--kl", "0.5").exit_code == 2


def test_every_arm_is_sent_the_one_of_operators_first(steer, fake):
    steer("ab", "hello", *TWO, "--operator", "tea=0.3", "--word", "cup=0.1", "--n", "2", "--seed", "7")
    (sent,) = fake.requests
    assert [arm.name for arm in sent.arms] == ["steered", "mild", "strong"]
    assert [len(arm.operators) for arm in sent.arms] == [2, 1, 2]
    assert (sent.n, sent.sampling.seed) == (2, 7)


def test_several_arms_are_one_object_or_one_line_each(steer):
    whole = json.loads(steer("ab", "hello", *TWO, "--json").stdout)
    lines = [json.loads(line) for line in steer("ab", "hello", *TWO, "--jsonl").stdout.splitlines()]
    assert whole == {"texts": lines}
    assert [line["arm"] for line in lines] == ["normal", "mild", "strong"]
    assert [line["text"] for line in lines] == ["one two", "one more", "one more"]
    assert (lines[1]["first_divergence"], lines[1]["kl"]["mean"], lines[1]["normal_perplexity"]) == (1, 0.5, 3)
    assert [len(line["receipts"]) for line in lines] == [0, 1, 2]


def test_one_arm_of_any_name_is_an_object_as_that_of_the_operators_is(steer):
    value = json.loads(steer("ab", "hello", *TWO[:2], "--json").stdout)
    assert set(value) == {"normal", "steered", "first_divergence", "kl", "perplexity"}


def test_samples_are_lines_of_their_own(steer):
    result = steer("ab", "hello", "--operator", "golden-gate", "--n", "2", "--jsonl")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(line["arm"], line["sample"], line["seed"]) for line in lines] == [
        *(("normal", 0, 7), ("steered", 0, 7)),
        *(("normal", 1, 8), ("steered", 1, 8)),
    ]


def test_a_failure_is_a_line_too_and_one_form_of_json_is_asked_for(steer, fake, make):
    fake.fault = make.fault(grpc.StatusCode.NOT_FOUND, "no operator", "UNKNOWN_OPERATOR")
    fake.events = []
    result = steer("ab", "hello", *TWO, "--jsonl")
    (line,) = result.stdout.splitlines()
    assert (result.exit_code, json.loads(line)["error"]["reason"]) == (1, "UNKNOWN_OPERATOR")
    assert steer("ab", "hello", *TWO, "--jsonl", "--json").exit_code == 2


def test_several_arms_are_shown_with_a_table_and_every_receipt(steer):
    shown = steer("ab", "hello", *TWO, "--n", "2").stdout
    rows = [line.split() for line in shown.splitlines()]
    assert ["normal", "0", "7", "–", "–", "–", "3", "3", "MAX_TOKENS"] in rows
    assert ["strong", "1", "8", "1", "0.5", "0.75", "9", "3", "MAX_TOKENS"] in rows
    assert "mild 1: golden-gate λ 0.2" in shown
    assert sum(line.startswith("strong 1: ✓") for line in shown.splitlines()) == 2
    assert "\x1b" not in shown


def columns(*, finished: bool, steered: list[tuple[str, int]], marked=()) -> SideBySide:
    shown = SideBySide(["steered"], marked=marked)
    for arm, texts in (("normal", [("a", 1), (" b", 2), (" c", 3)]), ("steered", steered)):
        for text, token in texts:
            shown.add(ArmDelta(arm, TextDelta(text, (token,))))
    if finished:
        shown.finish({})
    return shown


def spans(text: Text, style: str) -> list[tuple[int, int]]:
    return [(span.start, span.end) for span in text.spans if span.style == style]


@pytest.mark.parametrize(
    ("steered", "at"),
    [
        ([("a", 1), (" b", 2), (" c", 3)], []),
        ([("a", 1), (" b", 2), (" X", 9), (" Y", 8)], [(3, 5)]),
        ([("X", 9)], [(0, 1)]),
        # The same letters from other tokens differ: divergence is one of tokens.
        ([("a", 1), (" b", 7), (" c", 3)], [(1, 3)]),
        ([("a", 1), (" b", 2), (" c", 3), (" d", 4)], [(5, 7)]),
    ],
)
def test_the_first_token_that_differs_is_reversed(steered, at):
    assert spans(columns(finished=True, steered=steered).text("steered"), "reverse") == at


def test_words_that_differ_are_bold_once_the_texts_are_whole():
    steered = [("a", 1), (" X", 9), (" b", 2), (" c", 3)]
    assert spans(columns(finished=True, steered=steered).text("steered"), "bold magenta") == [(2, 3)]
    assert spans(columns(finished=False, steered=steered).text("steered"), "bold magenta") == [(1, 7)]
    assert columns(finished=True, steered=steered).text("normal").spans == []


def test_a_steered_text_that_is_merely_behind_is_not_marked_yet():
    behind = columns(finished=False, steered=[("a", 1), (" b", 2)])
    assert behind.divergence("steered") is None
    behind.finish({})
    assert behind.divergence("steered") == 2


@pytest.mark.parametrize(
    ("plain", "other", "changed"),
    [
        ("one two three", "one 2 three four", ["2", "four"]),
        ("one two", "one two", []),
        ("", "one two", ["one two"]),
        ("one two", "", []),
        ("海は青い", "空は青い", ["空"]),
    ],
)
def test_words_are_compared_in_every_script(plain, other, changed):
    assert [other[start:end] for start, end in changed_spans(plain, other)] == changed


def test_concept_words_are_marked_whole_and_in_any_case():
    text = Text("The SEA, seas and undersea; 海の水 (a.b)")
    mark_words(text, read_words(" sea, 海,, sea,a.b"))
    marked = [text.plain[start:end] for start, end in spans(text, CONCEPT_STYLE)]
    assert marked == ["SEA", "海", "a.b"]


def test_words_that_steer_are_marked_and_not_those_that_are_pushed_away():
    assert concept_words([OperatorUse("ocean", 0.2), Words({"tea": 1, "storm": -0.5}), OperatorUse("ocean", 0.4)]) == (
        "ocean",
        "tea",
    )


def printed(shown: SideBySide, width: int, **options) -> str:
    out = io.StringIO()
    Console(file=out, width=width, **options).print(shown)
    return out.getvalue()


def test_texts_stand_side_by_side_while_they_fit_else_below_each_other():
    shown = columns(finished=True, steered=[("sea", 9)], marked=["sea"])
    assert len(printed(shown, 80).splitlines()) == 3
    assert len(printed(shown, 50).splitlines()) == 6


def test_without_colours_a_terminal_still_shows_what_differs(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    shown = printed(columns(finished=True, steered=[("sea", 9)]), 80, force_terminal=True)
    assert "\x1b[1" in shown
    assert "\x1b[1;35" not in shown


def test_markup_in_names_and_texts_is_text():
    shown = SideBySide(["[red]x[/red]"])
    shown.add(ArmDelta("[red]x[/red]", TextDelta("[bold]y \x1b[31m", (1,))))
    shown.finish({})
    assert "[red]x[/red]" in printed(shown, 80)
    assert "[bold]y ␛[31m" in printed(shown, 80)
