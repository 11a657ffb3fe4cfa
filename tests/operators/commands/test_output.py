"""What the command says to people: bars, lists, sizes."""

import contextlib
import dataclasses
import functools
import io
import json
import os
import sys

import pytest
import torch
import typer
from rich.console import Console

from operators.builder.concept import Concept
from operators.builder.spec import BuildSpec
from operators.builder.stored import StoredOperator
from operators.commands import _describe, _file_progress, _output
from operators.core.artifact import make_artifact
from operators.core.header import Calibration, CalibrationPoint, LowRank, Recommended
from operators.core.progress import ProgressJson, ProgressLines, make_bars, progress_bars, shown_progress, working
from operators.core.store import Store
from operators.recipes.tasks import BuildTask

POINT = CalibrationPoint(layer=2, rule="substitute", blend=0.5, strength=0.3, texts=20, kl_p95=0.9, hit_rate=0.4,
                         perplexity_ratio=1.2, distinct_2=0.8)  # fmt: skip
CALIBRATION = Calibration(words=("gate", "bay"), kl_budget=1.0, max_perplexity_ratio=2.0, prompts=20, tokens=28,
                          plain_hit_rate=0.05, plain_perplexity=5.0, plain_distinct_2=0.9,
                          min_distinct_ratio=0.75, points=(POINT,), chosen=0)  # fmt: skip
FOUND = Recommended(strength=0.3, rule="substitute", blend=0.5)


@contextlib.contextmanager
def _terminal(monkeypatch):
    """stderr is a terminal; what was drawn on it comes as the list's one element, afterwards."""
    drawn = []
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w") as terminal, monkeypatch.context() as patch:
        patch.setenv("TERM", "xterm")
        patch.setattr(sys, "stderr", terminal)
        yield drawn
    pieces = b""
    # A terminal hands over what it has piece by piece, and ends with an error.
    with contextlib.suppress(OSError):
        while piece := os.read(ours, 4096):
            pieces += piece
    os.close(ours)
    drawn.append(pieces.decode())


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="there are no terminals here")
def test_the_progress_bar_is_drawn_on_a_terminal_and_only_there(capfd, monkeypatch):
    with progress_bars() as progress:
        progress("Jacobian products", 1, 2)
    assert capfd.readouterr().err == ""
    with _terminal(monkeypatch) as drawn, progress_bars() as progress:
        progress("Jacobian products", 64, 576)
    assert "Jacobian products" in drawn[0]
    assert "64/576" in drawn[0]


def test_a_time_left_is_told_of_batches_that_take_minutes():
    now = 0.0
    bars = make_bars(clock=lambda: now, disable=False, console=Console(file=io.StringIO()))
    task = bars.add_task("texts", total=100)
    for done in (10, 20, 30):
        now += 90.0
        bars.update(task, completed=done, total=100)
    # 20 texts in the 180 s between the first and the last batch.
    assert bars.tasks[0].time_remaining == pytest.approx(70 * 9, rel=0.01)
    assert bars.columns[-1].render(bars.tasks[0]).plain == "0:10:30"


def test_a_log_gets_a_line_with_the_time_left_every_ten_seconds(capfd):
    now = 100.0
    say = ProgressLines(clock=lambda: now)
    for step in range(1, 36):
        now += 3.0
        say("rows", 10 * step, 4000)
    lines = capfd.readouterr().err.splitlines()
    # 34 steps of 3 s are over since the first that was told of; a line comes with the first step after ten seconds.
    assert lines[:2] == ["rows: 40/4000, 0:19:48 left", "rows: 80/4000, 0:19:36 left"]
    assert len(lines) == 8
    now += 12.0
    say("texts", 7, 9)
    assert capfd.readouterr().err == "texts: 7/9\n"


def test_what_takes_less_than_ten_seconds_says_nothing_in_a_log(capfd):
    now = 0.0
    say = ProgressLines(clock=lambda: now)
    for done in range(1, 10):
        now += 1.0
        say("rows", done, 9)
    assert capfd.readouterr().err == ""


def test_no_time_left_is_told_from_the_pace_of_the_first_steps(capfd):
    now = 0.0
    say = ProgressJson(clock=lambda: now)
    for done in range(100):
        # The first ten steps are ten times as slow.
        now += 1.0 if done < 10 else 0.1
        say("rows", done, 100)
    told = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert {line["done"]: line["seconds_left"] for line in told if line["done"] <= 5} == {
        0: None, 1: None, 2: None, 3: None, 4: None, 5: pytest.approx(95),
    }  # fmt: skip
    now += 1.0
    say("texts", 1, 2)
    assert json.loads(capfd.readouterr().err)["seconds_left"] is None


@pytest.mark.parametrize("lines", [True, False])
def test_lines_are_for_logs_and_not_for_json(capfd, lines):
    with shown_progress(lines=lines, clock=iter([0.0, 11.0]).__next__) as progress:
        progress("rows", 1, 2)
    assert capfd.readouterr().err == ("rows: 1/2\n" if lines else "")


def test_a_log_of_a_batch_says_which_operator_it_is_at(capfd, monkeypatch):
    clock = iter([0.0, 11.0, 22.0]).__next__
    monkeypatch.setattr(_file_progress, "ProgressLines", functools.partial(ProgressLines, clock=clock))
    tasks = [BuildTask(name, BuildSpec((Concept("x", (1,)),)), None, replace=False) for name in ("a", "b")]
    with _file_progress.progress_by_turns(tasks, lines=True) as progress:
        progress(tasks[1], "Jacobian products", 3, 9)
        progress(tasks[1], "Jacobian products", 6, 9)
    assert capfd.readouterr().err.splitlines() == [
        "b (2 of 2): Jacobian products: 3/9",
        "b (2 of 2): Jacobian products: 6/9, 0:00:11 left",
    ]


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="there are no terminals here")
def test_waiting_is_shown_on_a_terminal_and_only_there(capfd, monkeypatch):
    with working("loading [a] model"):
        pass
    assert capfd.readouterr().err == ""
    with _terminal(monkeypatch) as drawn, working("loading [a] model"):
        pass
    assert "loading [a] model" in drawn[0]


@pytest.mark.parametrize(
    ("number", "words"), [(0, "0 B"), (999, "999 B"), (7_970_000, "7.97 MB"), (12_500_000_000, "12.5 GB")]
)
def test_sizes_are_told_in_the_unit_that_fits(number, words):
    assert _describe.file_size(number) == words


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="there are no terminals here")
def test_the_bars_of_a_batch_are_drawn_beside_lines_that_go_where_they_belong(capfd, monkeypatch, make_operator):
    spec = BuildSpec((Concept("x", (1,)),))
    there = BuildTask("there", spec, StoredOperator(make_operator().header, ""), replace=True)
    tasks = [
        there,
        BuildTask("first", spec, None, replace=False),
        # Nothing is built of it, and it takes its time all the same.
        dataclasses.replace(there, name="second", calibrate=True),
    ]
    with _terminal(monkeypatch) as drawn, _file_progress.progress_by_turns(tasks, lines=True) as progress:
        progress(tasks[1], "Jacobian products", 3, 7)
        print("first  built")
        progress(tasks[2], "texts written", 5, 9)
    assert capfd.readouterr().out == "first  built\n"
    for expected in ("operators", "second: texts written", "5/9", "1/2"):
        assert expected in drawn[0]
    assert "built" not in drawn[0]


def _described(artifact, tmp_path):
    store = Store(tmp_path)
    path = store.save("a", artifact)
    return _describe.operator_json("a", path, store.read_header("a"))


def test_a_list_says_layer_block_rank_further_texts_and_calibration(make_operator, tmp_path):
    low = LowRank(rank=2, residuals=(0.1, 0.2, 0.3), weighting="embedding", oversample=12, power_iterations=1, seed=0)
    full = make_operator(profile="golden", injection_layer=1, recommended=FOUND, calibration=CALIBRATION,
                         more_texts=({"text": "more", "ids": (1, 2)}, {"text": "text", "ids": (3,)}))  # fmt: skip
    header = make_operator().header.model_copy(update={"low_rank": low})
    factors, basis = full.factors[:, :2], full.factors[0, :, :2]
    reduced = make_artifact(header, factors, full.anchor, full.substitute_base, basis=basis, neutral=full.neutral)
    rows = [_described(full, tmp_path / "full"), _described(reduced, tmp_path / "reduced")]
    one, other = _describe.list_lines(rows)
    assert "  golden: layer 2 of 4, pushes block 1    rank full  " in one
    assert one.endswith("'a concept' and 2 more (calibrated: 40% hits at p95 KL 0.9)")
    assert "  residual: layer 2 of 4, pushes block 2  rank 2     " in other
    assert other.endswith("'a concept'")


def test_an_operator_is_shown_with_its_words_texts_and_calibration(make_operator, tmp_path):
    artifact = make_operator(words=("gate",), recommended=FOUND, calibration=CALIBRATION,
                             more_texts=({"text": "more\x1b", "ids": (1, 2)},))  # fmt: skip
    lines = dict(line.split(":", 1) for line in _describe.operator_lines(_described(artifact, tmp_path)))
    assert lines["words"].strip() == "'gate'"
    assert lines["more texts"].strip() == r"'more\x1b'"
    assert lines["calibration"].strip() == (
        "40% hits at p95 KL 0.9; 20 prompts x 28 tokens, words 'gate', 'bay' (5% of the plain texts), budget p95 KL 1"
    )
    plain = dict(line.split(":", 1) for line in _describe.operator_lines(_described(make_operator(), tmp_path / "b")))
    assert plain.keys() & {"words", "more texts", "calibration"} == set()


def test_an_operator_is_shown_with_its_tokens_and_one_of_an_earlier_version_with_their_ids(make_operator, tmp_path):
    for fields, key, told in (
        ({"concept_tokens": ("a", " con", "cept\x1b")}, "tokens", r"3: 'a' ' con' 'cept\x1b'"),
        ({}, "token ids", "3: 0 1 2"),
    ):
        described = _described(make_operator(**fields), tmp_path / key)
        lines = dict(line.split(":", 1) for line in _describe.operator_lines(described))
        assert lines[key].strip() == told


def test_a_header_has_a_text_for_every_token_or_for_none(make_operator):
    with pytest.raises(ValueError, match="2 concept_tokens for 3 concept_ids"):
        make_operator(concept_tokens=("a", "b"))


REJECTED = POINT.model_copy(update={"strength": 0.5, "rule": "cumulative", "blend": 0.0, "hit_rate": 0.1})
NOTHING = CALIBRATION.model_copy(update={"points": (POINT, REJECTED), "chosen": None})


@pytest.mark.parametrize(
    ("calibration", "words"),
    [
        (CALIBRATION, "the recommended setting is another than the one that was found"),
        # It was measured, and not chosen.
        (NOTHING.model_copy(update={"chosen": 0}), "the recommended setting is another than the one that was found"),
        (NOTHING, "nothing within the bounds was found, and the default is kept"),
    ],
)
def test_a_recommendation_that_no_calibration_chose_is_not_called_calibrated(
    make_operator, tmp_path, calibration, words
):
    artifact = make_operator(calibration=calibration)
    assert artifact.header.calibrated_point is None
    described = _described(artifact, tmp_path)
    assert described["calibrated"] is None
    (line,) = _describe.list_lines([described])
    assert line.endswith(f"(not calibrated: {words})")
    lines = dict(one.split(":", 1) for one in _describe.operator_lines(described))
    assert lines["calibration"].strip().startswith(f"{words}; 20 prompts")


def test_the_calibrated_point_is_the_chosen_one_at_the_operators_own_layer(make_operator, tmp_path):
    fields = {"recommended": FOUND, "calibration": CALIBRATION}
    artifact = make_operator(**fields)
    assert artifact.header.calibrated_point == POINT
    assert _described(artifact, tmp_path)["calibrated"] == POINT.model_dump()
    assert make_operator(**fields, layer=3, injection_layer=3).header.calibrated_point is None


def _torch_is_out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of")


def _the_allocator_is():
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 80 bytes. Error code 12")


def _python_is():
    raise MemoryError


@pytest.mark.parametrize(
    ("fail", "needed"),
    [(_torch_is_out_of_memory, ": 2.00 GiB more are needed"), (_the_allocator_is, ": 80 bytes more are needed"),
     (_python_is, "")],
)  # fmt: skip
def test_memory_that_runs_out_in_any_command_is_told_in_one_line(capsys, fail, needed):
    with pytest.raises(typer.Exit) as ended, _output.exit_on_error(as_json=False):
        fail()
    assert ended.value.exit_code == 1
    said = f"steer-operators: there is not enough memory{needed}; a lower rank, "
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(said)
    assert "--max-memory" in line


def test_another_error_of_the_same_kind_is_not_told_as_a_lack_of_memory():
    with pytest.raises(RuntimeError, match="size mismatch"), _output.exit_on_error(as_json=False):
        raise RuntimeError("size mismatch")
