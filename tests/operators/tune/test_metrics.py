"""Searching for strengths, figures of texts, and files of prompts."""

import itertools
import math
import tomllib
from importlib import resources

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from operators.core.errors import TrialError
from operators.core.statistics import bootstrap_interval, percentile
from operators.tune.continuations import Continuation
from operators.tune.metrics import WordList, compute_metrics, repeats
from operators.tune.prompts import calibration_prompts, neutral_prompts, read_prompts
from operators.tune.strength_search import CLOSE, MAX_STRENGTH, MIN_STRENGTH, next_strength


def _search(kl, budget, limit=40):
    tried = []
    while (strength := next_strength(tried, budget)) is not None:
        assert MIN_STRENGTH <= strength <= MAX_STRENGTH
        assert strength not in [s for s, _ in tried]
        tried.append((strength, kl(strength)))
        assert len(tried) < limit
    return tried


@settings(max_examples=200)
@given(scale=st.floats(0.05, 500), power=st.floats(1.0, 4.0), budget=st.floats(0.1, 8))
def test_a_growing_kl_is_brought_close_to_the_budget_in_a_few_steps(scale, power, budget):
    tried = _search(lambda strength: scale * strength**power, budget)
    if scale * MAX_STRENGTH**power < CLOSE * budget:
        assert tried[-1][0] == MAX_STRENGTH
    elif scale * MIN_STRENGTH**power > budget:
        assert tried[-1][0] == MIN_STRENGTH
    else:
        assert CLOSE * budget <= tried[-1][1] <= budget
    assert len(tried) <= 9


@settings(max_examples=200)
@given(steps=st.lists(st.floats(0, 20), min_size=1, max_size=12), budget=st.floats(0.1, 8))
def test_a_kl_that_jumps_is_searched_to_an_end(steps, budget):
    _search(lambda strength: steps[int(strength * 7) % len(steps)], budget, limit=200)


def test_the_search_begins_where_it_is_told():
    assert next_strength([], 1.0, 0.123) == 0.123


@pytest.mark.parametrize(
    ("text", "hit"),
    [
        ("over the Golden  Gate", True),
        ("the golden\ngate.", True),
        ("BRIDGE!", True),
        ("the bridge's end", True),
        ("bridges", False),
        ("abridge", False),
        ("golden gates", False),
        ("gate golden", False),
        ("", False),
    ],
)
def test_words_are_found_whole_and_in_any_case(text, hit):
    assert WordList(("golden gate", "bridge")).matches(text) is hit


@pytest.mark.parametrize(
    ("word", "text", "hit"),
    [
        ("金门大桥", "我们走过金门大桥看海。", True),
        ("東京", "昨日は東京へ行った", True),
        ("한국", "저는 한국에서 왔어요", True),
        ("국", "저는 한국에서 왔어요", False),
        ("ꦗꦮ", "ꦮꦺꦴꦁꦗꦮꦱꦸꦏ", True),
        ("カフェ", "あのカフェで", True),
        ("กาแฟ", "ฉันดื่มกาแฟทุกเช้า", True),
        ("金门大桥", "我们走过金门", False),
        ("London", "我爱London。", True),
        ("London", "我爱Londons。", False),
        ("東京 tower", "新東京 tower", True),
        ("東京 tower", "新東京 towers", False),
        ("caf\u00e9", "the cafe\u0301 is", True),
        ("cafe\u0301", "the caf\u00e9 is", True),
        ("cafe", "the cafe\u0301 is", False),
        ("straße", "DIE STRASSE", True),
        ("мост", "через Мост.", True),
        ("мост", "мосты", False),
    ],
)
def test_words_of_any_script_and_normal_form_are_counted(word, text, hit):
    assert WordList((word,)).matches(text) is hit


def test_a_word_is_no_pattern():
    assert WordList(("c++",)).matches("in C++ it")
    assert not WordList(("b.g",)).matches("big")


@pytest.mark.parametrize("words", [(), ("bridge", " ")])
def test_no_words_and_blank_ones_are_refused(words):
    with pytest.raises(TrialError, match=r"no words|word ' ' is blank"):
        WordList(words)


def test_figures_are_those_of_their_definitions(tiny):
    loaded = tiny("llama")
    words = [tuple(loaded.tokenizer(text)["input_ids"]) for text in ("the bridge", "bay bay bay bay")]
    texts = [
        Continuation(ids, tuple(0.1 * k for k in range(len(ids))), tuple(-float(k) for k in range(len(ids))))
        for ids in words
    ]
    found = compute_metrics(texts, WordList(("bridge",)), loaded)
    logprobs = [value for text in texts for value in text.logprobs]
    kl = [value for text in texts for value in text.kl]
    pairs = [list(itertools.pairwise(ids)) for ids in words]
    assert found.hit_rate == 0.5
    assert found.perplexity == pytest.approx(math.exp(-sum(logprobs) / len(logprobs)))
    assert found.kl_p95 == pytest.approx(float(torch.tensor(kl).quantile(0.95)))
    assert found.distinct_2 == sum(len(set(each)) for each in pairs) / sum(map(len, pairs)) < 1


def test_a_percentile_of_one_value_is_that_value():
    assert percentile([3.0], 0.95) == 3.0


def test_shipped_prompts_and_concepts_keep_apart():
    concepts = tomllib.loads((resources.files("operators") / "data" / "concepts.toml").read_text())["concept"]
    assert len({concept["name"] for concept in concepts}) == len(concepts) >= 8
    assert len(set(neutral_prompts())) == 50
    assert not set(neutral_prompts()) & set(calibration_prompts())
    for concept in concepts:
        words = WordList(concept["words"])
        assert [prompt for prompt in (*neutral_prompts(), *calibration_prompts()) if words.matches(prompt)] == []
        assert all(words.matches(text) for text in concept.get("texts") or [concept["text"]]), concept["name"]


def test_a_file_of_prompts_has_one_per_line(tmp_path):
    file = tmp_path / "prompts"
    file.write_text("# heading\n\nThe bay\n  My dress \n")
    assert read_prompts(file) == ("The bay", "My dress")


@pytest.mark.parametrize(
    ("content", "message"), [(None, "No such file"), (b"#\n\n", "there are none"), (b"\xff", "UTF-8")]
)
def test_a_file_without_prompts_is_refused(tmp_path, content, message):
    file = tmp_path / "prompts"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(TrialError, match=message):
        read_prompts(file)


@pytest.mark.parametrize(
    ("ids", "repeated"),
    [((), False), ((1, 2, 3, 4, 1, 2, 3), False), ((1, 2, 3, 4, 1, 2, 3, 4), True), ((7,) * 5, True)],
)
def test_a_text_loops_where_four_tokens_come_twice(ids, repeated):
    assert repeats(ids) is repeated


def test_an_interval_holds_the_mean_and_shrinks_with_more_texts():
    few, many = [0.0, 1.0] * 5, [0.0, 1.0] * 50
    (low, high), (narrow_low, narrow_high) = bootstrap_interval(few), bootstrap_interval(many)
    assert low < narrow_low < 0.5 < narrow_high < high
    assert bootstrap_interval(few) == (low, high)
    assert bootstrap_interval([1.0] * 4) == (1.0, 1.0)
