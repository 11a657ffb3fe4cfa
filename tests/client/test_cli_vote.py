"""`steer vote`: blind until the end, resumable, and what it comes to."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from steer_client._cli.app import app
from steer_client._cli.tally import sign_test, tally
from steer_client._cli.vote_file import Answer, VoteFile
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]
ONE = ("--operator", "golden-gate=0.4")
# The arms' names, operators and strengths, and the fake's receipts and times.
HINTS = ("golden", "steered", "normal", "mild", "0.4", "λ", "KL", "✓", "MAX_TOKENS", " s ·", "\x1b")
PROMPTS = [f"prompt {number}" for number in range(12)]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


@pytest.fixture
def steer(fake, monkeypatch, prompts):
    monkeypatch.setenv("STEER_TARGET", fake.target)
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments, answers=()):
        said = "".join(f"{answer}\n" for answer in answers)
        return CliRunner().invoke(app, ("vote", "--prompts", str(prompts), *arguments), input=said)

    return run


def test_every_answer_counts_for_the_arm_that_was_shown_there(steer):
    result = steer(*ONE, "--json", answers=["1"] * 12)
    value = json.loads(result.stdout)
    assert value["finished"]
    assert value["arms"] == ["steered", "normal"]
    assert all(vote["winner"] == vote["shown"][0] for vote in value["votes"])
    texts = {"steered": "one more", "normal": "one two"}
    assert all(vote["texts"] == [texts[name] for name in vote["shown"]] for vote in value["votes"])
    assert value["wins"]["steered"] == [vote["shown"][0] for vote in value["votes"]].count("steered")
    assert sum(value["wins"].values()) == 12


def test_the_order_is_drawn_anew_for_every_vote(tmp_path):
    orders = {
        tuple(VoteFile(tmp_path / str(number), "plan").is_swapped(each) for each in PROMPTS) for number in range(5)
    }
    assert len(orders) > 1
    assert VoteFile(tmp_path / "0", "plan").is_swapped("a") == VoteFile(tmp_path / "0", "plan").is_swapped("a")


def test_nothing_tells_the_arm_before_the_end(steer, tmp_path):
    out = tmp_path / "vote.jsonl"
    result = steer("--arm", "mild: golden-gate=0.4", "--out", str(out), answers=["1", "2", "tie", "skip", "quit"])
    assert result.exit_code == 0, result.stderr
    assert "4 of 12" in result.stdout
    seen = result.output + out.read_text()
    assert [hint for hint in HINTS if hint in seen] == []


def test_a_vote_goes_on_where_its_file_ends_and_closes_once(steer, fake, tmp_path):
    out = tmp_path / "vote.jsonl"
    ask = (*ONE, "--out", str(out), "--json")
    begun = steer(*ask, answers=["1", "tie", "q"])
    assert json.loads(begun.stdout) == {"finished": False, "answered": 2, "prompts": 12}
    with out.open("ab") as file:
        file.write(b'{"prompt_id": "2", "te')
    ended = json.loads(steer(*ask, answers=["2"] * 10).stdout)
    assert [vote["vote"] for vote in ended["votes"]] == ["1", "tie", *["2"] * 10]
    sent = len(fake.requests)
    assert json.loads(steer(*ask).stdout) == ended
    assert not [each for each in fake.requests[sent:] if hasattr(each, "arms")]
    assert json.loads(out.read_text().splitlines()[-1])["result"]["wins"] == ended["wins"]


def test_a_vote_can_be_closed_early(steer, tmp_path):
    out = ("--out", str(tmp_path / "vote.jsonl"))
    steer(*ONE, *out, answers=["1"])
    closed = json.loads(steer(*ONE, *out, "--close", "--json").stdout)
    assert (closed["finished"], len(closed["votes"]), closed["prompts"]) == (True, 1, 12)


def test_without_a_file_quitting_counts_what_was_answered(steer):
    result = steer(*ONE, answers=["tie", "skip", "nonsense", "Q"])
    assert "ties: 1 (0 of the same text), skipped: 1, of 12 prompts" in result.stdout
    assert "nothing was decided" in result.stdout
    assert "cannot read 'nonsense'" in result.stderr


def test_texts_that_are_the_same_are_ties_and_nobody_is_asked(steer, fake, make):
    fake.response = make.response("one more")
    value = json.loads(steer(*ONE, "--json").stdout)
    assert (value["ties"], value["same"], value["p"], value["interval"]) == (12, 12, None, None)


@pytest.mark.parametrize("change", [("--operator", "tea=0.1"), ("--seed", "3"), ("--question", "Which is wetter?")])
def test_a_file_of_another_vote_is_refused(steer, tmp_path, change):
    out = ("--out", str(tmp_path / "vote.jsonl"))
    steer(*ONE, *out, answers=["1"])
    kept = (tmp_path / "vote.jsonl").read_bytes()
    result = steer(*ONE, *change, *out, "--json", answers=["1"])
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"]["field"] == "out"
    assert (tmp_path / "vote.jsonl").read_bytes() == kept


def test_a_file_that_is_no_vote_is_left_as_it_is(steer, prompts):
    result = steer(*ONE, "--out", str(prompts), answers=["1"])
    assert (result.exit_code, prompts.read_text()) == (1, "\n".join(PROMPTS))


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--arm", "a: x", "--arm", "b: y", *ONE),
        (*ONE, "--close"),
        (*ONE, "--prompts", "/nowhere/at/all"),
        (*ONE, "--arm", "ocean"),
    ],
)
def test_wrong_usage_is_exit_status_2_and_asks_nothing(steer, fake, arguments):
    result = steer(*arguments)
    assert (result.exit_code, result.stdout, fake.requests) == (2, "", [])


def test_two_arms_are_held_against_each_other_without_the_plain_text(steer, fake):
    steer("--arm", "a: x=0.1", "--arm", "b: y=0.1", answers=["1"])
    compared = next(each for each in fake.requests if hasattr(each, "arms"))
    assert ([arm.name for arm in compared.arms], compared.normal, compared.score) == (["a", "b"], False, False)


@pytest.mark.parametrize(
    ("wins", "losses", "p"),
    [(0, 0, None), (5, 5, 1.0), (1, 0, 1.0), (10, 0, 2 / 1024), (2, 8, 2 * 56 / 1024), (8, 2, 2 * 56 / 1024)],
)
def test_the_sign_test_is_exact(wins, losses, p):
    found = sign_test(wins, losses)
    assert found == p or math.isclose(found, p)


def test_the_share_has_wilsons_interval():
    answers = [Answer(str(number), ("x", "y"), "1" if number < 8 else "2") for number in range(10)]
    value = tally(("a", "b"), answers, lambda prompt_id: False, 10)
    assert (value["wins"], value["share"]) == ({"a": 8, "b": 2}, 0.8)
    # Newcombe 1998, the score method.
    assert value["interval"] == pytest.approx([0.4902, 0.9433], abs=1e-4)


def test_ctrl_c_keeps_what_was_answered(fake, prompts, tmp_path):
    out = tmp_path / "vote.jsonl"
    command = [sys.executable, "-m", "steer_client", "vote", "--prompts", str(prompts), *ONE, "--out", str(out)]
    environment = os.environ | {
        "STEER_TARGET": fake.target,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "clients/python"), str(ROOT / "protos")]),
    }
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdin.write(b"1\n")
    process.stdin.flush()
    seen = b""
    while seen.count(b"better?") < 2:
        seen += process.stderr.read(1)
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=10)
    assert (process.returncode, b"Traceback" in rest) == (130, False)
    assert len(out.read_text().splitlines()) == 2
