"""Measures of texts against plain loops, intervals on values that are known, and what makes a hit useful."""

import itertools
import math

import numpy as np
import pytest

from operators.core.errors import TrialError
from operators.evaluate.intervals import estimate
from operators.evaluate.journal import Journal, open_journal, read_journal
from operators.evaluate.measures import flags, is_useful, text_values
from operators.evaluate.summary import Summary
from operators.evaluate.writing import Written


def written(texts, tokens=8):
    ids = np.zeros((len(texts), tokens), dtype=np.int64)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = text
    values = np.random.default_rng(0).random((2, len(texts), tokens)).astype(np.float32)
    return Written(ids, np.array([len(text) for text in texts]), values[0], -values[1])


def brute(text):
    pairs = list(itertools.pairwise(text))
    runs = [tuple(text[i : i + 4]) for i in range(len(text) - 3)]
    return len(set(pairs)) / len(pairs) if pairs else 1.0, len(set(runs)) < len(runs)


TEXTS = [
    [1, 2, 3, 4, 1, 2, 3, 4],
    [5],
    [7, 7, 7, 7, 7],
    [0, 0],
    [1, 2, 1, 2, 1],
    [9, 8, 7, 6, 5, 4, 3, 2],
    [1, 2, 3, 4],
]


@pytest.mark.parametrize("tokens", [1, 3, 5, 8])
def test_measures_are_those_of_a_loop(tokens):
    texts = written(TEXTS)
    values = text_values(texts, slice(None), tokens)
    for row, text in enumerate(TEXTS):
        short = text[:tokens]
        distinct, loops = brute(short)
        assert values["distinct"][row] == pytest.approx(distinct, abs=5e-4)
        assert flags(values["loops"])[row] == loops
        assert values["nll"][row] == pytest.approx(-texts.logprobs[row, : len(short)].mean(), abs=6e-4)
    kl = np.concatenate([texts.kl[row, : len(text[:tokens])] for row, text in enumerate(TEXTS)])
    assert values["kl_p95"] == pytest.approx(np.quantile(kl, 0.95), rel=1e-3)
    assert values["kl_mean"] == pytest.approx(kl.mean(), rel=1e-3)


def test_a_useful_hit_is_a_hit_that_is_worth_reading():
    plain = {"nll": [1.0, 3.0], "distinct": [1.0, 0.8]}
    # A hit, no hit, a loop, a surprise of more than twice the perplexity, too few different pairs.
    values = {
        "hits": "10111",
        "loops": "00100",
        "nll": [2.0, 2.0, 2.0, 2.0 + math.log(2.1), 2.0],
        "distinct": [0.9, 0.9, 0.9, 0.9, 0.6],
    }
    assert is_useful(values, plain).tolist() == [1, 0, 0, 0, 0]
    assert is_useful(values, plain, away=True).tolist() == [0, 1, 0, 0, 0]


def test_intervals_tell_prompts_from_concepts():
    generator = np.random.default_rng(1)
    # Concepts differ, prompts do not.
    values = np.repeat([[0.0], [1.0], [0.0], [1.0]], 50, axis=1)
    found = estimate(values)
    assert found.mean == 0.5
    assert found.prompts == pytest.approx((0.5, 0.5))
    assert found.both[0] == 0.0
    assert found.both[1] == pytest.approx(1.0)
    # Independent texts: the interval of a proportion.
    found = estimate((generator.random((1, 400)) < 0.3).astype(float))
    low, high = found.prompts
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(0.3 * 0.7 / 400), rel=0.15)
    assert low < found.mean < high


def test_a_journal_drops_a_line_that_is_not_whole_and_refuses_another_run(tmp_path):
    with open_journal(tmp_path) as journal:
        journal.add({"kind": "trial", "n": 1}, {"kl": 0.5})
        with pytest.raises(TrialError, match="another evaluation is writing there"), open_journal(tmp_path):
            pass
    path = tmp_path / "rows.jsonl"
    path.write_bytes(path.read_bytes() + b'{"of": {"ki')
    with open_journal(tmp_path) as journal:
        assert journal.get({"n": 1, "kind": "trial"})["kl"] == 0.5
        journal.add({"kind": "trial", "n": 2}, {"kl": 1.0})
    assert len(read_journal(tmp_path).rows) == 2
    path.write_bytes(b"[]\n")
    with pytest.raises(TrialError, match="line 1 is no row"):
        read_journal(tmp_path)
    path.write_bytes(b"{\n")
    with pytest.raises(TrialError, match="line 1 is not JSON"):
        read_journal(tmp_path)


def _row(form, hits, *, concept="a", strength=0.5, digest="f", variant=0, budget="p95 KL 1"):
    values = {
        "nll": [1.0] * len(hits),
        "distinct": [1.0] * len(hits),
        "loops": "0" * len(hits),
        "kl_p95": 1.0,
        "kl_mean": 0.2,
        "words": {concept: {"hits": hits, "named": hits}},
    }
    of = {
        "kind": "texts",
        "run": "r",
        "form": form,
        "form_digest": digest,
        "variant": variant,
        "subject": concept,
        "concepts": "c",
        "regime": "greedy",
        "strength": strength,
        "budget": budget,
    }
    return {"of": of, "reached": True, "lengths": {"24": values}, "shown": []}


def test_figures_are_of_the_rows_of_this_run_and_paired_by_prompt():
    run = {
        "digest": "r",
        "forms": ["contrast-anchor", "other", "band"],
        "form_digests": {"contrast-anchor": "f", "other": "f", "band": "f"},
        "concept_digests": ["c"],
        "vectors": {},
    }
    rows = [
        _row("plain", "0000", budget=None),
        _row("contrast-anchor", "1100"),
        # A strength that a longer search has replaced, and a form as it was before.
        _row("other", "0000", strength=0.1),
        _row("other", "0000", strength=0.2, digest="old"),
        _row("other", "1110", strength=0.4),
        _row("band", "1000", variant=0),
        _row("band", "0000", variant=1),
    ]
    summary = Summary(Journal(rows, None), run)
    other = summary.figures("other", "greedy", "p95 KL 1", 24, ["a"])
    assert other.hits.mean == 0.75
    assert other.useful.mean == 0.75
    assert other.difference.mean == 0.25
    assert other.strength == (0.4, 0.4)
    assert other.band is None
    assert other.perplexity_ratio == 1.0
    band = summary.figures("band", "greedy", "p95 KL 1", 24, ["a"])
    assert band.hits.mean == 0.125
    assert band.band == (0.0, 0.25)
    assert summary.figures("other", "greedy", "p95 KL 1", 24, ["b"]) is None
    with pytest.raises(TrialError, match="no texts of this run"):
        Summary(Journal(rows, None), run | {"digest": "another"})
