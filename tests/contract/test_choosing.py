"""Penalties, biases and a least length choose the tokens that a brute-force loop does, on every engine."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from steer_server.errors import InvalidRequestError
from steer_server.types import (
    DecodeJob,
    FinishReason,
    Prompt,
    Row,
    RowFinished,
    SamplingParams,
    TokenBias,
    TokenEvent,
)

pytestmark = pytest.mark.model

# Words of the prompt come back: a penalty that counted them would choose others.
_PROMPT = "The sea, the sea, the sea. I went to see the sea and the"
_GREEDY = SamplingParams(max_tokens=12)
_THE, _EOS, _SPECIAL = " the", "<|im_end|>", "<|endoftext|>"


async def _answer(engine, sampling, *rows):
    """Of each row: ids, text, end, and log-probabilities where they were asked for. ``sampling``: None: their own."""
    rows = [replace(row, sampling=sampling) for row in rows or (Row(),)] if sampling else rows
    found = [([], [], []) for _ in rows]
    ends = {}
    async for event in engine.submit(DecodeJob(await engine.encode(Prompt(text=_PROMPT)), tuple(rows))):
        if isinstance(event, TokenEvent):
            ids, texts, logprobs = found[event.row]
            ids.append(event.token_id)
            texts.append(event.text)
            logprobs.append(event.logprob)
        elif isinstance(event, RowFinished):
            found[event.row][1].append(event.text)
            ends[event.row] = event
    return [(ids, "".join(texts), ends[row], logprobs) for row, (ids, texts, logprobs) in enumerate(found)]


@pytest.fixture(scope="session")
def greedily(smollm):
    """``greedily(sampling)``: the ids, with everything computed again for every token, as the contract words it."""
    loaded = smollm()
    prompt = loaded.tokenizer(_PROMPT)["input_ids"]

    @functools.cache
    def run(sampling):
        ids, eos = list(prompt), loaded.model.generation_config.eos_token_id
        ends = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else (eos,))}
        for step in range(sampling.max_tokens):
            with torch.no_grad():
                logits = loaded.model(torch.tensor([ids]), use_cache=False, logits_to_keep=1).logits[0, -1].double()
            for each in sampling.logit_bias:
                logits[each.token_id] += each.bias
            for token in ends if step < sampling.min_tokens else ():
                logits[token] = -torch.inf
            for token in set(ids):
                factor = sampling.repetition_penalty
                logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
            for token in ids[len(prompt) :]:
                logits[token] -= sampling.frequency_penalty
            for token in set(ids[len(prompt) :]):
                logits[token] -= sampling.presence_penalty
            ids.append(int(logits.argmax()))
            if ids[-1] in ends:
                break
        return ids[len(prompt) :]

    return run


@pytest.fixture(scope="session")
def token_of(smollm):
    """``token_of(text)``: its id, of a text that is one token."""

    def find(text):
        [token] = smollm().tokenizer(text, add_special_tokens=False)["input_ids"]
        return token

    return find


_CHOSEN = {
    "plain": {},
    "presence": {"presence_penalty": 2.0},
    "frequency": {"frequency_penalty": 1.5},
    "together": {"presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.3},
    "rewarded": {"presence_penalty": -2.0, "frequency_penalty": -2.0},
    "biased": {"logit_bias": ((_THE, -100.0), (" sea", 3.5)), "repetition_penalty": 1.5},
    "barred": {"logit_bias": ((_EOS, 100.0), (_THE, 30.0)), "min_tokens": 5, "frequency_penalty": 2.0},
}


def _sampling(name, token_of):
    biases = tuple(TokenBias(token_of(text), bias) for text, bias in _CHOSEN[name].get("logit_bias", ()))
    return replace(_GREEDY, **(_CHOSEN[name] | {"logit_bias": biases}))


@pytest.mark.parametrize("name", _CHOSEN)
async def test_the_tokens_are_those_of_a_loop_that_computes_everything_again(engine, greedily, token_of, name):
    sampling = _sampling(name, token_of)
    [(ids, *_)] = await _answer(engine, sampling)
    assert ids == greedily(sampling)
    if name != "plain":
        assert ids != greedily(_GREEDY), "nothing was changed"


async def test_texts_that_are_decoded_together_are_chosen_each_by_its_own(engine, greedily, token_of):
    wanted = [_sampling(name, token_of) for name in _CHOSEN]
    answers = await _answer(engine, None, *(Row(sampling=sampling) for sampling in wanted))
    assert [ids for ids, *_ in answers] == [greedily(sampling) for sampling in wanted]


async def test_a_huge_bias_chooses_its_token(engine, token_of):
    sampling = replace(_GREEDY, max_tokens=4, logit_bias=(TokenBias(token_of(_THE), 100.0),))
    [(ids, text, end, _)] = await _answer(engine, sampling)
    assert (ids, text, end.reason) == ([token_of(_THE)] * 4, _THE * 4, FinishReason.MAX_TOKENS)


@pytest.mark.parametrize(
    ("token", "ends", "reason"),
    [
        (_EOS, {}, FinishReason.EOS),
        (_THE, {"stop_token_ids": _THE}, FinishReason.STOP_TOKEN),
        (_SPECIAL, {"stop_strings": (_SPECIAL,)}, FinishReason.STOP_STRING),
    ],
)
async def test_before_the_least_length_no_token_that_ends_the_text_is_chosen(engine, token_of, token, ends, reason):
    wished = token_of(token)
    if "stop_token_ids" in ends:
        ends = {"stop_token_ids": (wished,)}
    sampling = replace(_GREEDY, logit_bias=(TokenBias(wished, 100.0),), **ends)
    [(ids, _, end, _)] = await _answer(engine, sampling)
    assert (ids, end.reason) == ([wished], reason)
    [(ids, _, end, _)] = await _answer(engine, replace(sampling, min_tokens=5))
    assert (ids.index(wished), len(ids), end.reason) == (5, 6, reason)
    [(ids, _, end, _)] = await _answer(engine, replace(sampling, min_tokens=12))
    assert (wished in ids, len(ids), end.reason) == (False, 12, FinishReason.MAX_TOKENS)


async def test_before_the_least_length_a_stop_string_is_text_like_any_other(engine, token_of):
    sampling = replace(_GREEDY, logit_bias=(TokenBias(token_of(_THE), 100.0),), stop_strings=("e the",))
    [(ids, text, end, _)] = await _answer(engine, sampling)
    assert (len(ids), text, end.reason) == (2, " th", FinishReason.STOP_STRING)
    [(ids, text, end, _)] = await _answer(engine, replace(sampling, min_tokens=5))
    assert (len(ids), text, end.stop_string) == (6, " the the the the th", "e the")


async def test_an_end_that_is_ignored_is_no_end_to_be_kept_from(engine, token_of):
    eos = token_of(_EOS)
    sampling = replace(_GREEDY, logit_bias=(TokenBias(eos, 100.0),), max_tokens=4, min_tokens=3, ignore_eos=True)
    [(ids, *_)] = await _answer(engine, sampling)
    assert ids == [eos] * 4


@pytest.mark.vllm
async def test_a_least_length_beyond_the_context_ends_with_it(vllm_engine):
    # vLLM would refuse it, of the most tokens that it is told.
    engine, room = await vllm_engine(), 3
    prompt = (5,) * (engine.model.context_length - room)
    found = [0, None]
    sampling = SamplingParams(max_tokens=8, min_tokens=6)
    async for event in engine.submit(DecodeJob.of(prompt, sampling, (Row(),))):
        found[0] += isinstance(event, TokenEvent)
        found[1] = event
    assert (found[0], found[1].reason) == (room, FinishReason.CONTEXT_LIMIT)


async def test_log_probabilities_and_scores_are_those_of_the_model_itself(engine, smollm, token_of):
    sampling = replace(_sampling("biased", token_of), presence_penalty=2.0, min_tokens=12, logprobs=2)
    [(ids, _, _, found)] = await _answer(engine, sampling, Row(None, score=True))
    loaded = smollm()
    prompt = loaded.tokenizer(_PROMPT)["input_ids"]
    with torch.no_grad():
        logits = loaded.model(torch.tensor([[*prompt, *ids]]), use_cache=False).logits[0]
    own = logits[len(prompt) - 1 : -1].log_softmax(-1)
    for token, entry, row in zip(ids, found, own, strict=True):
        assert entry.logprob == pytest.approx(float(row[token]), abs=1e-3)
        assert [each.logprob for each in entry.top] == pytest.approx(row.topk(2).values.tolist(), abs=1e-3)


async def test_what_is_chosen_changes_no_receipt(engine, operator_of, steered_row, token_of):
    operator = operator_of("The Golden Gate Bridge in San", "golden", 21)
    sampling = replace(_sampling("together", token_of), min_tokens=12)
    rows = Row(None), steered_row(operator, 0.4)
    [plain, steered] = await _answer(engine, sampling, *rows)
    [receipt] = steered[2].receipts
    assert (len(steered[0]), plain[2].receipts) == (12, ())
    # The last token of a text is never fed.
    assert receipt.generated_tokens_steered == 11
    assert receipt.mean_dose == pytest.approx(0.2, rel=1e-3)


async def test_special_tokens_are_part_of_the_text_where_that_is_wished(engine, token_of):
    turn = token_of(_SPECIAL)
    sampling = replace(_GREEDY, max_tokens=2, logit_bias=(TokenBias(turn, 100.0),))
    [(_, text, _, _)] = await _answer(engine, sampling)
    assert text == ""
    kept = replace(sampling, skip_special_tokens=False)
    [(_, text, _, _)] = await _answer(engine, kept)
    assert text == "<|endoftext|><|endoftext|>"
    # A stop string may then have them beside other text.
    [(ids, text, end, _)] = await _answer(engine, replace(kept, stop_strings=("text|><",), max_tokens=3))
    assert (len(ids), text, end.stop_string) == (2, "<|endof", "text|><")


async def test_a_bias_for_what_is_no_token_is_refused_before_it_waits(engine):
    size = engine.model.vocab_size
    for wrong in (-1, size):
        sampling = SamplingParams(logit_bias=(TokenBias(0, 1.0), TokenBias(wrong, 1.0)))
        with pytest.raises(
            InvalidRequestError, match=rf"sampling\.logit_bias\[1\]\.token_id: is {wrong}; 0 to {size - 1}"
        ):
            engine.submit(DecodeJob.of((1, 2), sampling, (Row(),)))
    assert engine.running + engine.waiting == 0
