"""The client finds words as the builder's calibration does, and knows where they stand."""

import math
import random

import pytest
from steer_client._matching import WordFinder, repeats
from steer_client._sweep.statistics import percentile, wilson

from operators.core.statistics import percentile as builders_percentile
from operators.tune.metrics import WordList
from operators.tune.metrics import repeats as builders_repeats

WORDS = ["sea", "ocean wave", "海", "바다", "Straße", "café", "ทะเล", "c++"]
TEXTS = [
    "the sea", "the seaside", "SEA!", "ocean\n wave", "oceanwave", "ocean waves", "東海道", "the海sea", "바다를 보다",
    "우바다", "STRASSE", "cafe\u0301", "cafés", "ชอบทะเลมาก", "c++", "c+++", "", "seasea sea",
    "\u1107\u1161\u1103\u1161",
]  # fmt: skip


@pytest.mark.parametrize("word", WORDS)
def test_a_word_is_found_where_the_builder_finds_it(word):
    finder, builders = WordFinder([word]), WordList([word])
    for text in TEXTS:
        assert bool(finder.found(text)) == builders.matches(text) == bool(finder.spans(text)), text


def test_words_are_marked_where_they_stand_once():
    text = "The SEA, a cafe\u0301 in the STRASSE by the sea"
    marked = [text[start:end] for start, end in WordFinder(["sea", "café", "straße", "the sea"]).spans(text)]
    assert marked == ["The SEA", "cafe\u0301", "STRASSE", "the sea"]


def test_repetitions_and_percentiles_are_the_builders():
    chance = random.Random(3)
    for _ in range(200):
        ids = [chance.randrange(3) for _ in range(chance.randrange(20))]
        assert repeats(ids) == builders_repeats(ids)
        values = [chance.random() for _ in range(1 + chance.randrange(9))]
        assert percentile(values, 0.95) == builders_percentile(values, 0.95)


def test_wilsons_interval_is_the_published_one():
    # Solved by hand: |p - share| = z sqrt(p (1 - p) / n) at both ends.
    for share, n in ((0.0, 10), (0.5, 10), (0.7, 40), (1.0, 3)):
        low, high = wilson(share, n)
        for end in (low, high):
            assert abs(end - share) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / n), abs=1e-6)
        assert low <= share <= high
