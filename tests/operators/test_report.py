"""What the command says to people: bars, lists, sizes."""

import contextlib
import os
import sys

import pytest

from operators import _report as report
from operators import store
from operators.artifact import make_artifact
from operators.batch import Task
from operators.build import BuildSpec
from operators.commands import _batch
from operators.concept import Concept
from operators.header import Calibration, CalibrationPoint, LowRank, Recommended

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
    with report.product_progress() as progress:
        progress(1, 2)
    assert capfd.readouterr().err == ""
    with _terminal(monkeypatch) as drawn, report.product_progress() as progress:
        progress(64, 576)
    assert "Jacobian products" in drawn[0]
    assert "64/576" in drawn[0]


@pytest.mark.parametrize(
    ("number", "words"), [(0, "0 B"), (999, "999 B"), (7_970_000, "7.97 MB"), (12_500_000_000, "12.5 GB")]
)
def test_sizes_are_told_in_the_unit_that_fits(number, words):
    assert report.size(number) == words


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="there are no terminals here")
def test_the_bars_of_a_batch_are_drawn_beside_lines_that_go_where_they_belong(capfd, monkeypatch):
    tasks = [
        Task(name, BuildSpec((Concept("x", (1,)),)), None, fixed=False, replace=False) for name in ("first", "second")
    ]
    with _terminal(monkeypatch) as drawn, _batch._progress(tasks) as watch:
        watch(tasks[0], 3, 7)
        print("first  built")
        watch(tasks[1], 5, 9)
    assert capfd.readouterr().out == "first  built\n"
    for expected in ("operators", "second", "5/9", "1/2"):
        assert expected in drawn[0]
    assert "built" not in drawn[0]


def _described(artifact, tmp_path):
    return report.described("a", store.save(tmp_path, "a", artifact), artifact)


def test_a_list_says_layer_block_rank_further_texts_and_calibration(make_operator, tmp_path):
    low = LowRank(rank=2, residuals=(0.1, 0.2, 0.3), weighting="embedding", oversample=12, power_iterations=1, seed=0)
    full = make_operator(profile="golden", injection_layer=1, recommended=FOUND, calibration=CALIBRATION,
                         more_texts=({"text": "more", "ids": (1, 2)}, {"text": "text", "ids": (3,)}))  # fmt: skip
    header = make_operator().header.model_copy(update={"low_rank": low})
    factors, basis = full.factors[:, :2], full.factors[0, :, :2]
    reduced = make_artifact(header, factors, full.anchor, full.substitute_base, basis=basis)
    rows = [_described(full, tmp_path / "full"), _described(reduced, tmp_path / "reduced")]
    one, other = report.list_lines(rows)
    assert "  golden: layer 2 of 4, pushes block 1    rank full  " in one
    assert one.endswith("'a concept' and 2 more (calibrated: 40% hits at p95 KL 0.9)")
    assert "  residual: layer 2 of 4, pushes block 2  rank 2     " in other
    assert other.endswith("'a concept'")


def test_an_operator_is_shown_with_its_words_texts_and_calibration(make_operator, tmp_path):
    artifact = make_operator(words=("gate",), recommended=FOUND, calibration=CALIBRATION,
                             more_texts=({"text": "more\x1b", "ids": (1, 2)},))  # fmt: skip
    lines = dict(line.split(":", 1) for line in report.operator_lines(_described(artifact, tmp_path)))
    assert lines["words"].strip() == "'gate'"
    assert lines["more texts"].strip() == r"'more\x1b'"
    assert lines["calibration"].strip() == (
        "40% hits at p95 KL 0.9; 20 prompts x 28 tokens, words 'gate', 'bay' (5% of the plain texts), budget p95 KL 1"
    )
    plain = dict(line.split(":", 1) for line in report.operator_lines(_described(make_operator(), tmp_path / "b")))
    assert plain.keys() & {"words", "more texts", "calibration"} == set()


def test_a_recommendation_that_was_not_measured_is_not_given_figures(make_operator, tmp_path):
    (line,) = report.list_lines([_described(make_operator(calibration=CALIBRATION), tmp_path)])
    assert line.endswith("(calibrated: the recommended setting is not among the 1 measured)")
