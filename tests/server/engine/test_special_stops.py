import copy

import pytest
from tokenizers import AddedToken

from steer_server.engine.hf.engine import HFEngine
from steer_server.engine.row_text import RowText
from steer_server.engine.special_stops import special_stops
from steer_server.engine.text import Detokenizer
from steer_server.errors import InvalidRequestError
from steer_server.types import DecodeJob, FinishReason, Row, SamplingParams


@pytest.fixture
def tokenizer(tiny_tokenizer):
    """The tiny tokenizer with a second special token, and one that is added and not special."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.backend_tokenizer.add_special_tokens([AddedToken("<|turn|>", special=True)])
    tokenizer.backend_tokenizer.add_tokens([AddedToken("<think>", special=False)])
    return tokenizer


def _row(tokenizer, *stops, **options):
    sampling = SamplingParams(stop_strings=stops, **options)
    return RowText(
        Detokenizer(tokenizer, tokenizer("The bay")["input_ids"], skip_special_tokens=sampling.skip_special_tokens),
        sampling,
        prompt_tokens=2,
        context_length=64,
        eos_ids=frozenset({0}),
        special_stops=special_stops(sampling, tokenizer),
    )


def _read(row, ids):
    """The text that is shown, the reason and the stop string of the ids up to where the text ends."""
    shown = ""
    for token in ids:
        piece, reason = row.push(token)
        shown += piece.text
        if reason is not None:
            return shown, reason, piece.stop_string
    return shown + row.flush(), None, ""


@pytest.mark.parametrize("stop", ["<|turn|>", "<end>"])
@pytest.mark.parametrize("stops", [(), ("bridge over",)])
@pytest.mark.parametrize("ignore_eos", [False, True])
def test_a_special_token_is_a_stop_string_and_no_text_is_lost(tokenizer, stop, stops, ignore_eos):
    ids = tokenizer(f" and the bridge{stop} goes on")["input_ids"]
    row = _row(tokenizer, *stops, stop, ignore_eos=ignore_eos)
    assert _read(row, ids) == (" and the bridge", FinishReason.STOP_STRING, stop)


@pytest.mark.parametrize("text", [" a <|tu", " a <think"])
def test_what_is_spelled_by_ordinary_tokens_and_what_is_added_but_not_special_is_found_in_the_text(tokenizer, text):
    stop = "<|turn|>" if "tu" in text else "<think>"
    plain = [token for part in stop for token in tokenizer(part)["input_ids"]]
    ids = [*tokenizer(" a ")["input_ids"], *plain, *tokenizer(" b")["input_ids"]]
    assert _read(_row(tokenizer, stop), ids) == (" a ", FinishReason.STOP_STRING, stop)
    added = tokenizer(" a <think> b")["input_ids"]
    assert _read(_row(tokenizer, "<think>"), added) == (" a ", FinishReason.STOP_STRING, "<think>")


def test_a_special_token_that_is_no_stop_string_changes_nothing(tokenizer):
    ids = tokenizer(" and the bridge<|turn|> goes on")["input_ids"]
    assert _read(_row(tokenizer, "bay"), ids) == (" and the bridge goes on", None, "")


@pytest.mark.parametrize("stop", ["<|turn|>\n", "x<|turn|>", "<|turn|><|turn|>", "<end><|turn|>"])
def test_a_special_token_beside_other_text_is_refused_by_name(tokenizer, stop):
    with pytest.raises(InvalidRequestError, match=r"sampling\.stop_strings\[1\]: has the special token '<.*' beside"):
        special_stops(SamplingParams(stop_strings=("bay", stop)), tokenizer)


@pytest.mark.parametrize("stop", ["<|turn|>", "<|turn|> goes", "bridge<|tu"])
def test_where_special_tokens_are_part_of_the_text_a_stop_string_may_have_them_beside_other_text(tokenizer, stop):
    text = " and the bridge<|turn|> goes on<end>"
    row = _row(tokenizer, stop, skip_special_tokens=False)
    assert _read(row, tokenizer(text)["input_ids"]) == (text[: text.index(stop)], FinishReason.STOP_STRING, stop)


def test_special_tokens_that_are_kept_are_in_the_text_with_the_one_that_ends_it(tokenizer):
    text = " and the bridge<|turn|> goes on<end>"
    row = _row(tokenizer, skip_special_tokens=False)
    assert _read(row, tokenizer(text)["input_ids"]) == (text, FinishReason.EOS, "")


def test_every_token_that_ends_a_text_is_one_that_may_not_be_chosen_before_the_least_length(tokenizer):
    [turn] = tokenizer("<|turn|>")["input_ids"]
    ends = {"stop_token_ids": (7, 8)}
    assert _row(tokenizer, "<|turn|>", "bay", **ends).ending_ids == {0, 7, 8, turn}
    assert _row(tokenizer, "bay", ignore_eos=True, **ends).ending_ids == {7, 8}


def test_a_stop_string_ends_nothing_before_the_least_length_and_may_begin_there(tokenizer):
    pieces = ["a", "b", "a", "b", "a", "b"]
    ids = [token for piece in pieces for token in tokenizer(piece)["input_ids"]]
    assert len(ids) == len(pieces)
    assert _read(_row(tokenizer, "ab"), ids) == ("", FinishReason.STOP_STRING, "ab")
    for least, shown in ((2, "ab"), (3, "ab"), (4, "abab")):
        assert _read(_row(tokenizer, "ab", min_tokens=least), ids) == (shown, FinishReason.STOP_STRING, "ab")
    assert _read(_row(tokenizer, "ab", min_tokens=6), ids) == ("ababab", None, "")


async def test_the_engine_refuses_it_before_the_request_waits(tiny):
    loaded = tiny("llama", dtype="float32")
    engine = HFEngine(loaded, max_queue=2)
    try:
        with pytest.raises(InvalidRequestError, match="beside other text"):
            engine.submit(DecodeJob.of((1, 2), SamplingParams(stop_strings=("<end>.",)), (Row(None),)))
        assert (engine.running, engine.waiting) == (0, 0)
    finally:
        await engine.close()


def test_without_stop_strings_the_tokens_of_a_tokenizer_are_not_gone_through():
    assert special_stops(SamplingParams(), None) == {}
