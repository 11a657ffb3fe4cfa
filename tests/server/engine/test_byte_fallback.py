"""Text of tokenizers that spell unknown characters byte by byte, and that drop the space a text begins with."""

from dataclasses import dataclass, replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from steer_server.engine import text
from steer_server.engine.text import Detokenizer
from steer_server.types import Row

_WORDS = ["▁world", "▁hello", "▁", "a", "b", "é", "東", "wor"]
_VOCABULARY = ["<unk>", "<end>", *(f"<0x{byte:02X}>" for byte in range(256)), *_WORDS]
_IDS = {token: number for number, token in enumerate(_VOCABULARY)}
_ANY = st.lists(st.integers(0, len(_VOCABULARY) - 1), max_size=24)
# Line feeds, the bytes of an accent and of a Chinese character, and a word: where they meet, streams give up.
_AWKWARD = st.lists(
    st.sampled_from([_IDS[token] for token in ("<0x0A>", "<0xE2>", "<0x82>", "<0xAC>", "<0xC3>", "▁world", "a")]),
    max_size=12,
)


@dataclass
class _Fast:
    backend_tokenizer: Tokenizer


def _bpe():
    return models.BPE(vocab=_IDS, merges=[], unk_token="<unk>", byte_fallback=True)


def _unigram():
    return models.Unigram([(token, -1.0) for token in _VOCABULARY], unk_id=0, byte_fallback=True)


def _llama():
    """As Llama 2 has it: the first space of a text is the tokenizer's own, and decoding takes it away."""
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return decoders.Sequence(steps)


def _metaspace():
    return decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])


def _plain():
    return decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])


def _make(model, decoder):
    tokenizer = Tokenizer(model())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoder()
    tokenizer.add_special_tokens(["<end>"])
    return _Fast(tokenizer)


_KINDS = {
    f"{model.__name__.strip('_')}, {decoder.__name__.strip('_')}": _make(model, decoder)
    for model in (_bpe, _unigram)
    for decoder in (_llama, _metaspace, _plain)
}
_EACH = pytest.mark.parametrize("tokenizer", _KINDS.values(), ids=_KINDS)


def _ids(*tokens):
    return [_IDS[token] for token in tokens]


def _pieces(tokenizer, prompt, ids, make=Detokenizer):
    detokenizer = make(tokenizer, prompt)
    pieces = [detokenizer.push(token) for token in ids]
    return [*pieces, detokenizer.flush()]


def _decode(tokenizer, ids):
    return tokenizer.backend_tokenizer.decode(list(ids), skip_special_tokens=True)


@_EACH
@given(prompt=st.one_of(_ANY, _AWKWARD), ids=st.one_of(_ANY, _AWKWARD))
@example(prompt=[], ids=_ids("<0x0A>", "<0xE2>", "▁world"))
@example(prompt=_ids("▁hello"), ids=_ids("<0x0A>", "<0xE2>", "▁world"))
def test_any_ids_after_any_prompt_give_the_same_text_every_time(tokenizer, prompt, ids):
    pieces = _pieces(tokenizer, prompt, ids)
    assert pieces == _pieces(tokenizer, prompt, ids)
    for cut in range(len(ids)):
        # What has been shown is not taken back.
        assert _pieces(tokenizer, prompt, ids[:cut])[:-1] == pieces[:cut]


@_EACH
@given(prompt=st.lists(st.sampled_from(_ids("▁hello", "a", "b")), min_size=1, max_size=3), ids=_AWKWARD)
def test_words_after_bytes_that_are_no_text_are_all_there_and_in_order(tokenizer, prompt, ids):
    shown = "".join(_pieces(tokenizer, prompt, ids))
    assert shown.count("world") == ids.count(_IDS["▁world"])
    assert shown.count("a") == ids.count(_IDS["a"])
    letters = [{"▁world": "w", "a": "a"}.get(_VOCABULARY[token], "") for token in ids]
    assert [letter for letter in shown if letter in "wa"] == [letter for letter in letters if letter]


@_EACH
@given(words=st.lists(st.sampled_from(["▁world", "▁hello", "a", "é", "東"]), max_size=8))
def test_text_without_bytes_follows_the_prompt_as_the_tokenizer_spells_it(tokenizer, words):
    prompt, ids = _ids("▁hello", "a"), _ids(*words)
    whole, before = _decode(tokenizer, [*prompt, *ids]), _decode(tokenizer, prompt)
    assert whole.startswith(before)
    assert "".join(_pieces(tokenizer, prompt, ids)) == whole[len(before) :]


# Long prompts: only their end is decoded.

_UNITS = [
    ("<end>",),
    ("▁hello",),
    ("▁",),
    ("a",),
    ("東",),
    ("<0x0A>",),
    ("<0xC3>", "<0xA9>"),
    ("<0xE2>", "<0x82>", "<0xAC>"),
]
_HALVES = [(), (), ("<0xE2>",), ("<0xE2>", "<0x82>"), ("<0xC3>", "<0xC3>")]


class _Whole(Detokenizer):
    """Primed with all of the prompt."""

    def _last(self, prompt_ids):
        return list(prompt_ids)


@_EACH
@given(
    prompt=st.lists(st.sampled_from(_UNITS), min_size=1, max_size=4),
    times=st.integers(20, 60),
    half=st.sampled_from(_HALVES),
    ids=st.one_of(_ANY, _AWKWARD),
)
@example(prompt=[("a",), *[("<end>",)] * 99], times=1, half=(), ids=_ids("▁world"))
@example(prompt=[("a",), *[("<end>",)] * 70, ("▁",)], times=1, half=(), ids=_ids("▁world"))
@example(prompt=[("▁hello",), *[("<0xE2>", "<0x82>", "<0xAC>")] * 500], times=1, half=(), ids=_ids("<0xC3>", "<0xA9>"))
def test_text_after_a_long_prompt_is_what_it_is_where_all_of_the_prompt_is_read(tokenizer, prompt, times, half, ids):
    before = _ids(*(token for unit in prompt * times for token in unit), *half)
    assert _pieces(tokenizer, before, ids) == _pieces(tokenizer, before, ids, make=_Whole)


@_EACH
@pytest.mark.parametrize("unit", [*_UNITS, ("<0x82>",)], ids="".join)
def test_little_of_a_prompt_is_decoded_however_long_it_is_and_whatever_is_in_it(tokenizer, unit, monkeypatch):
    class Backend:
        """Counts the tokens that are decoded."""

        count = 0

        def decode(self, ids, **options):
            self.count += len(ids)
            return tokenizer.backend_tokenizer.decode(ids, **options)

    primed = []
    monkeypatch.setattr(text, "DecodeStream", lambda ids, **options: primed.append(len(ids)))
    backend = Backend()
    Detokenizer(_Fast(backend), _ids(*unit) * 100_000)
    assert backend.count < 100_000
    assert primed[0] <= 4096
    if unit == ("▁hello",):
        assert (backend.count, primed) == (2 * 64, [64])


@_EACH
def test_a_line_feed_and_half_a_character_before_a_word_give_up_nothing(tokenizer):
    *_, rest = pieces = _pieces(tokenizer, _ids("▁hello"), _ids("<0x0A>", "<0xE2>", "▁world"))
    assert rest == ""
    assert "".join(pieces).endswith("world")
    assert "\ufffd" in "".join(pieces)


@_EACH
def test_a_character_of_three_bytes_is_shown_when_it_is_whole(tokenizer):
    pieces = _pieces(tokenizer, _ids("▁hello"), _ids("<0xE2>", "<0x82>", "<0xAC>", "a"))
    assert pieces == ["", "", "€", "a", ""]


@pytest.mark.parametrize("kind", ["bpe, llama", "unigram, llama", "bpe, metaspace"])
def test_the_first_word_keeps_its_space_after_a_prompt(kind):
    tokenizer = _KINDS[kind]
    assert _decode(tokenizer, _ids("▁world")) == "world"
    assert _pieces(tokenizer, _ids("▁hello"), _ids("▁world")) == [" world", ""]


def test_the_engine_primes_its_text_with_the_prompt(llama, make_decoder):
    # Every token is a word with its space, so the first one has it, unless the prompt is forgotten.
    words = Tokenizer(models.BPE(vocab={f"▁w{number}": number for number in range(320)}, merges=[]))
    words.decoder = _llama()
    decoder = make_decoder(replace(llama, tokenizer=PreTrainedTokenizerFast(tokenizer_object=words)), [Row(None)])
    *tokens, end = decoder.run()
    assert "".join(event.text for event in [*tokens, end]) == "".join(f" w{event.token_id}" for event in tokens)
