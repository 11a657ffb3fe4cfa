import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer_server.engine.row_text import RowText
from steer_server.engine.text import Detokenizer, StopStrings
from steer_server.types import FinishReason, SamplingParams

# Two, three and four bytes, letters with a mark of their own, and the replacement character as an honest one.
_TEXTS = st.text(alphabet="ab é東🌉\u0301\ufffd\n", max_size=12)
_SMALL = st.text(alphabet="ab", min_size=1, max_size=4)


def _run(tokenizer, prompt, ids):
    detokenizer = Detokenizer(tokenizer, prompt)
    pieces = [detokenizer.push(token) for token in ids]
    return pieces, detokenizer.flush()


def _decode(tokenizer, ids):
    return tokenizer.backend_tokenizer.decode(list(ids), skip_special_tokens=True)


def _ids(tokenizer, text):
    return tokenizer(text)["input_ids"]


@given(data=st.data())
def test_the_pieces_of_any_ids_after_any_prompt_make_the_tokenizers_own_text(tiny_tokenizer, data):
    tokens = st.lists(st.integers(0, len(tiny_tokenizer) - 1), max_size=24)
    prompt, ids = data.draw(tokens), data.draw(tokens)
    pieces, rest = _run(tiny_tokenizer, prompt, ids)
    assert "".join(pieces) + rest == _decode(tiny_tokenizer, ids)


@given(prompt=_TEXTS, text=_TEXTS)
def test_a_text_of_wide_characters_comes_back_whole(tiny_tokenizer, prompt, text):
    pieces, rest = _run(tiny_tokenizer, _ids(tiny_tokenizer, prompt), _ids(tiny_tokenizer, text))
    assert "".join(pieces) + rest == text


@given(text=st.text(alphabet="aé東🌉", min_size=1, max_size=12))
def test_no_piece_holds_half_a_character(tiny_tokenizer, text):
    ids = _ids(tiny_tokenizer, text)
    for cut in range(len(ids) + 1):
        pieces, rest = _run(tiny_tokenizer, _ids(tiny_tokenizer, "the bridge "), ids[:cut])
        shown = "".join(pieces)
        assert "\ufffd" not in shown
        assert text.startswith(shown)
        assert set(rest) <= {"\ufffd"}


def test_half_a_character_at_the_end_is_flushed_as_unreadable(tiny_tokenizer):
    first, *_ = _ids(tiny_tokenizer, "東")
    pieces, rest = _run(tiny_tokenizer, _ids(tiny_tokenizer, "to "), [first])
    assert pieces == [""]
    assert rest == "\ufffd"


@pytest.mark.parametrize("end", ["\ufffd", "\ufffd" * 40, "東"], ids=["unreadable", "long unreadable", "half"])
def test_a_prompt_that_ends_unreadably_is_not_repeated(tiny_tokenizer, end):
    prompt = _ids(tiny_tokenizer, "a secret prompt " + end)
    if end == "東":
        prompt = prompt[:-1]
    pieces, rest = _run(tiny_tokenizer, prompt, _ids(tiny_tokenizer, "bridge"))
    assert "".join(pieces) + rest == "bridge"


@given(data=st.data(), prompt=_TEXTS, times=st.integers(1, 90), cut=st.integers(0, 3))
def test_any_ids_after_a_long_prompt_that_may_end_within_a_character_are_the_tokenizers_text(
    tiny_tokenizer, data, prompt, times, cut
):
    ids = data.draw(st.lists(st.integers(0, len(tiny_tokenizer) - 1), max_size=12))
    before = _ids(tiny_tokenizer, prompt) * times
    pieces, rest = _run(tiny_tokenizer, before[: len(before) - cut], ids)
    assert "".join(pieces) + rest == _decode(tiny_tokenizer, ids)


def test_special_tokens_leave_no_text(tiny_tokenizer):
    end = tiny_tokenizer.eos_token_id
    pieces, rest = _run(tiny_tokenizer, [end], [end, *_ids(tiny_tokenizer, "bay"), end])
    assert "".join(pieces) + rest == "bay"


def _naive(text, stops):
    """Character by character: the first moment at which some stop string is complete."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end - len(stop)], stop
    return text, ""


def _cut(text, cuts):
    places = sorted({min(cut, len(text)) for cut in cuts})
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


@given(
    text=st.text(alphabet="ab", max_size=16),
    stops=st.lists(_SMALL, max_size=3),
    cuts=st.lists(st.integers(0, 16), max_size=8),
)
def test_the_text_before_a_stop_string_does_not_depend_on_the_cuts(text, stops, cuts):
    holder = StopStrings(stops)
    shown = ""
    found = ""
    for part in _cut(text, cuts):
        piece = holder.push(part)
        shown += piece.text
        if piece.stop_string:
            found = piece.stop_string
            break
    else:
        shown += holder.flush()
    assert (shown, found) == _naive(text, stops)


@given(
    text=st.text(alphabet="ab", max_size=16),
    rest=st.text(alphabet="ab", max_size=8),
    stops=st.lists(_SMALL, min_size=1, max_size=3),
    cuts=st.lists(st.integers(0, 16), max_size=8),
)
def test_nothing_is_shown_that_a_stop_string_could_still_take_back_and_nothing_else_is_held(text, rest, stops, cuts):
    holder = StopStrings(stops)
    shown = ""
    for part in _cut(text, cuts):
        piece = holder.push(part)
        shown += piece.text
        if piece.stop_string:
            return
    assert _naive(text + rest, stops)[0].startswith(shown)
    held = text[len(shown) :]
    assert not held or any(stop.startswith(held) and stop != held for stop in stops)


@given(data=st.data(), alphabet=st.sampled_from(["a", "ab", "abc"]))
def test_long_stop_strings_that_repeat_themselves_are_found_where_they_are(data, alphabet):
    stops = data.draw(st.lists(st.text(alphabet=alphabet, min_size=1, max_size=20), max_size=4))
    parts = st.sampled_from([stop[:size] for stop in stops for size in range(1, len(stop) + 1)] or ["a"])
    text = "".join(data.draw(st.lists(parts | st.text(alphabet=alphabet, max_size=2), max_size=12)))
    holder, shown = StopStrings(stops), ""
    for character in text:
        piece = holder.push(character)
        shown += piece.text
        if piece.stop_string:
            assert (shown, piece.stop_string) == _naive(text, stops)
            return
    assert (shown + holder.flush(), "") == _naive(text, stops)


@given(
    text=st.text(alphabet="ab", max_size=20),
    barred=st.integers(0, 20),
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=6), max_size=3),
)
def test_one_that_is_passed_over_ends_nothing_and_may_be_the_beginning_of_the_next(text, barred, stops):
    holder, shown = StopStrings(stops), ""
    ends = [(end, stop) for end in range(barred + 1, len(text) + 1) for stop in stops if text[:end].endswith(stop)]
    for place, character in enumerate(text, start=1):
        piece = holder.push(character, may_end=place > barred)
        shown += piece.text
        if piece.stop_string:
            end, stop = min(ends, key=lambda found: (found[0], -len(found[1])))
            assert (place, piece.stop_string, shown) == (end, stop, text[: end - len(stop)])
            return
    assert (ends, shown + holder.flush()) == ([], text)


@pytest.mark.parametrize(
    "stops",
    [
        ["a" * (1023 - n) + "b" * (n + 1) for n in range(64)],
        [("ab" * 512)[n:] + "c" for n in range(64)],
        [f"{'a' * 1020}{n:02}" for n in range(64)],
        ["a" * 1023 + "b"] + [f"b{n:02}{'a' * 1020}" for n in range(63)],
    ],
    ids=["almost one letter", "almost two letters", "but for the last", "one that holds text for all"],
)
def test_many_long_stop_strings_that_almost_match_cost_little(stops):
    holder, tokens = StopStrings(stops), ["aaaa", "abab", "aaaac"]
    began, longest = time.process_time(), 0.0
    for number in range(3000):
        before = time.process_time()
        assert not holder.push(tokens[number % 37 == 0] if number % 500 else tokens[2]).stop_string
        longest = max(longest, time.process_time() - before)
    # 30 ms a token where each looks at all that is held.
    assert (time.process_time() - began) / 3000 < 0.003
    assert longest < 0.03


def test_a_stop_string_in_pieces_is_found():
    holder = StopStrings(["\n\nQ:"])
    assert [holder.push(part).text for part in ("yes", ".\n", "\n", "Q")] == ["yes", ".", "", ""]
    piece = holder.push(": what")
    assert (piece.text, piece.stop_string) == ("", "\n\nQ:")
    assert holder.flush() == ""


def test_the_text_held_back_for_a_stop_string_that_never_came_is_flushed_once():
    holder = StopStrings(["stop"])
    assert holder.push("it st").text == "it "
    assert holder.flush() == "st"
    assert holder.flush() == ""


def test_of_two_stop_strings_that_end_together_the_longer_wins():
    piece = StopStrings(["c", "bc"]).push("abc")
    assert (piece.text, piece.stop_string) == ("a", "bc")


def test_half_a_character_at_the_end_ends_no_text_by_a_stop_string(tiny_tokenizer):
    ids = _ids(tiny_tokenizer, "a🌉")[:-1]
    text = RowText(
        Detokenizer(tiny_tokenizer, ()),
        SamplingParams(max_tokens=len(ids), stop_strings=("a\ufffd",)),
        prompt_tokens=0,
        context_length=64,
        eos_ids=frozenset(),
    )
    pieces = [text.push(token) for token in ids]
    assert pieces[-1][1] is FinishReason.MAX_TOKENS
    assert "".join(piece.text for piece, _ in pieces) + text.flush() == _decode(tiny_tokenizer, ids)
