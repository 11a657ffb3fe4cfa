"""Decoding jobs: prompts in chunks, interruptions, scores, timings, and the check of the receipts."""

import math
import time
from dataclasses import replace

import pytest
import torch

from operators.builder.build import build_operator
from operators.builder.concept import concept_from_text
from operators.builder.spec import BuildSpec
from operators.core.defaults import PUBLISHED
from steer_server.engine.hf import decode as decode_module
from steer_server.errors import EngineFailedError, SteeringNotAppliedError
from steer_server.generate import CompletionBuilder
from steer_server.types import (
    Admitted,
    Completion,
    FinishReason,
    Row,
    RowFinished,
    SamplingParams,
    Timings,
    TokenEvent,
)


def test_a_model_whose_own_numbers_are_broken_is_an_engine_failure(tiny, decode):
    broken = tiny("llama", dtype="float32", fresh=True)
    broken.model.get_output_embeddings().weight[0, 0] = math.nan
    with pytest.raises(EngineFailedError, match="not finite"):
        decode(broken, None)


def test_a_row_alone_says_what_it_says_in_company(llama, artifact, other_artifact, plan_of, decode):
    plans = [plan_of((artifact, 0.8)), None, plan_of((other_artifact, 0.8))]
    together, _, _ = decode(llama, *plans)
    assert together == [decode(llama, plan)[0][0] for plan in plans]


def _rows_per_step(loaded, decoder):
    """The size of the batch in every forward pass, and the events."""
    sizes = []
    handle = loaded.model.register_forward_hook(lambda module, args, output: sizes.append(output.logits.shape[0]))
    try:
        return sizes, list(decoder.run())
    finally:
        handle.remove()


def _tokens(events, row=0):
    return [event for event in events if isinstance(event, TokenEvent) and event.row == row]


def test_scores_of_a_plain_row_say_that_it_is_plain_and_cost_no_row(llama, make_decoder):
    sizes, events = _rows_per_step(llama, make_decoder(llama, [Row(None, score=True)], logprobs=0))
    assert sizes == [1] * 6
    tokens = _tokens(events)
    assert len(tokens) == 6
    for event in tokens:
        assert event.score.kl == 0.0
        assert event.score.plain_logprob == event.logprob.logprob


def test_a_scored_comparison_has_a_plain_twin_for_each_steered_row_only(llama, artifact, plan_of, make_decoder):
    rows = [Row(None, score=True), Row(plan_of((artifact, 0.5)), score=True), Row(plan_of((artifact, 1.0)), score=True)]
    sizes, events = _rows_per_step(llama, make_decoder(llama, rows))
    # All that is plain is read once, and then has rows of its own: the plain one and two that follow.
    assert sizes == [3] + [5] * 5
    assert all(event.score.kl == 0.0 for event in _tokens(events))
    assert all(event.score.kl > 0.0 for row in (1, 2) for event in _tokens(events, row))


def test_a_row_that_asks_for_no_score_has_no_twin(llama, artifact, plan_of, make_decoder):
    sizes, events = _rows_per_step(llama, make_decoder(llama, [Row(None), Row(plan_of((artifact, 0.5)))]))
    assert sizes == [2] * 6
    assert all(event.score is None for row in (0, 1) for event in _tokens(events, row))


def test_scores_are_those_of_the_plain_model_on_the_steered_text(llama, artifact, plan_of, make_decoder, prompt_ids):
    plan, rows = plan_of((artifact, 1.0)), []
    handle = llama.model.register_forward_hook(lambda module, args, output: rows.append(output.logits[0, -1].clone()))
    try:
        events = list(make_decoder(llama, [Row(plan, score=True)]).run())
    finally:
        handle.remove()
    tokens = [event for event in events if isinstance(event, TokenEvent)]
    ids = [*prompt_ids, *(event.token_id for event in tokens)]
    with torch.no_grad():
        plain = llama.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    first = len(ids) - len(tokens)
    for place, event in enumerate(tokens):
        p = plain[first + place - 1]
        assert event.score.plain_logprob == pytest.approx(float(p[event.token_id]), abs=1e-3)
        q = rows[place].log_softmax(-1)
        assert event.score.kl == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-3)
        assert event.score.kl > 0


@pytest.mark.parametrize("reason", [FinishReason.CANCELLED, FinishReason.TIME_LIMIT])
@pytest.mark.parametrize("chunks", [0, 1, 2])
def test_a_row_that_is_interrupted_in_its_prompt_has_no_text_and_no_error(
    llama, artifact, plan_of, make_decoder, monkeypatch, reason, chunks
):
    monkeypatch.setattr(decode_module, "prefill_positions", lambda _: 4)
    plan = plan_of((artifact, 0.5))
    asked = iter([None] * chunks)
    rows = [Row(None, score=True), Row(plan, score=True)]
    decoder = make_decoder(llama, rows, check_interruption=lambda: next(asked, reason))
    assert len(decoder.job.prompt_ids) > 2 * chunks
    sizes, events = _rows_per_step(llama, decoder)
    assert len(sizes) == chunks
    assert [(event.row, event.reason, event.text) for event in events] == [(0, reason, ""), (1, reason, "")]
    # What was read of the prompt is not counted: no text came of it.
    assert events[1].receipts[0].prompt_tokens_steered == events[1].receipts[0].max_dose == 0
    gatherer = CompletionBuilder("r", len(decoder.job.prompt_ids), decoder.job.rows[-1].sampling, plan)
    (completion,) = gatherer.add(events[1])
    assert (completion.text, completion.token_ids, completion.finish_reason) == ("", (), reason)


def test_a_row_that_is_interrupted_right_after_its_prompt_has_no_text_and_empty_receipts(
    llama, artifact, plan_of, make_decoder
):
    plan = plan_of((artifact, 0.5))
    asked = iter([None])
    decoder = make_decoder(llama, [Row(plan)], check_interruption=lambda: next(asked, FinishReason.TIME_LIMIT))
    gatherer = CompletionBuilder("r", len(decoder.job.prompt_ids), decoder.job.rows[-1].sampling, plan)
    completion = _completion_of(gatherer, decoder.run())
    assert (completion.text, completion.token_ids) == ("", ())
    assert completion.receipts[0].prompt_tokens_steered == 0


@pytest.mark.parametrize("num_arms", [1, 3, 16])
def test_a_turn_of_a_prompt_is_bounded_in_rows_times_tokens(llama, artifact, plan_of, make_decoder, num_arms):
    rows = [Row(plan_of((artifact, 0.1 + place / 20))) for place in range(num_arms)]
    decoder = make_decoder(llama, rows, max_tokens=1, ids=(5,) * 300)
    fed = []
    handle = llama.model.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    try:
        turns = list(decoder.turns())
    finally:
        handle.remove()
    assert len(turns) == len(fed) == math.ceil(300 / (256 // num_arms))
    assert max(rows * tokens for rows, tokens in fed) <= 256
    assert sum(tokens for _, tokens in fed) == 300


def test_jobs_that_take_turns_say_what_each_says_alone(llama, artifact, other_artifact, plan_of, make_decoder):
    def decoders():
        yield make_decoder(llama, [Row(), Row(plan_of((artifact, 0.8)), score=True)], ids=(5,) * 300, max_tokens=5)
        yield make_decoder(llama, [Row(plan_of((other_artifact, 0.9)))], max_tokens=9)
        yield make_decoder(llama, [Row()], max_tokens=3, temperature=1.0, seed=3)

    alone = [list(decoder.run()) for decoder in decoders()]
    together = [[] for _ in alone]
    waiting = [(place, decoder.turns()) for place, decoder in enumerate(decoders())]
    while waiting:
        place, turns = waiting.pop(0)
        events = next(turns, None)
        assert not any(block._forward_pre_hooks for block in llama.model.model.layers)
        if events is not None:
            together[place] += events
            waiting.append((place, turns))
    assert together == alone


@pytest.mark.parametrize("chunk", [1, 2, 3, 5])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_prompt_read_in_chunks_gives_the_text_of_one_read_at_once(
    tiny, family, chunk, plan_of, decode, monkeypatch, prompt_ids
):
    loaded = tiny(family, dtype="float64")
    operator = build_operator(
        BuildSpec((concept_from_text("golden gate", loaded),), layer=2, recommended=PUBLISHED), loaded
    )
    plans = [None, plan_of((operator, 0.8)), plan_of((operator, -0.5), rule="substitute", blend=0.3)]
    ids, receipts, logits = decode(loaded, *plans, max_tokens=8)
    assert len(logits) == 8
    monkeypatch.setattr(decode_module, "prefill_positions", lambda _: 3 * chunk)
    chunked_ids, chunked_receipts, chunked_logits = decode(loaded, *plans, max_tokens=8)
    assert len(chunked_logits) == 7 + math.ceil(len(prompt_ids) / chunk)
    assert chunked_ids == ids
    for before, after in zip(logits[1:], chunked_logits[-7:], strict=True):
        torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
    for before, after in zip(receipts[1:], chunked_receipts[1:], strict=True):
        assert after[0].prompt_tokens_steered == before[0].prompt_tokens_steered == len(prompt_ids)
        assert after[0].mean_dose == pytest.approx(before[0].mean_dose, rel=1e-5)


@pytest.mark.parametrize("reason", [FinishReason.CANCELLED, FinishReason.TIME_LIMIT])
def test_an_interrupted_row_ends_with_its_receipts(llama, artifact, plan_of, reason, make_decoder):
    calls = iter([None, None, None, reason])
    events = list(make_decoder(llama, [Row(plan_of((artifact, 0.5)))], check_interruption=lambda: next(calls)).run())
    end = events[-1]
    assert end.reason is reason
    assert sum(isinstance(event, TokenEvent) for event in events) == 2
    assert end.receipts[0].generated_tokens_steered == 1


def _completion_of(gatherer, events):
    gathered = [item for event in events for item in gatherer.add(event)]
    return next(item for item in gathered if isinstance(item, Completion))


def test_an_interrupted_row_is_accepted_with_all_of_its_positions(llama, artifact, plan_of, make_decoder):
    plan = plan_of((artifact, 0.5))
    calls = iter([None, None, None, FinishReason.TIME_LIMIT])
    decoder = make_decoder(llama, [Row(plan)], check_interruption=lambda: next(calls))
    gatherer = CompletionBuilder("r", len(decoder.job.prompt_ids), decoder.job.rows[-1].sampling, plan)
    completion = _completion_of(gatherer, decoder.run())
    assert completion.finish_reason is FinishReason.TIME_LIMIT
    assert len(completion.token_ids) == 2


@pytest.mark.parametrize(
    "change",
    ["no receipts", "one position less", "one prompt token less", "a cached token too many", "another digest"],
)
def test_an_engine_that_forgets_its_plan_gives_no_text(llama, artifact, plan_of, change, make_decoder):
    plan = plan_of((artifact, 0.5))
    decoder = make_decoder(llama, [Row(plan)])
    *tokens, end = decoder.run()
    (receipt,) = end.receipts
    forged = {
        "no receipts": (),
        "one position less": (replace(receipt, generated_tokens_steered=receipt.generated_tokens_steered - 1),),
        "one prompt token less": (replace(receipt, prompt_tokens_steered=receipt.prompt_tokens_steered - 1),),
        "a cached token too many": (replace(receipt, prompt_tokens_cached=1),),
        "another digest": (replace(receipt, digest="sha256:" + "0" * 64),),
    }[change]
    gatherer = CompletionBuilder("r", len(decoder.job.prompt_ids), decoder.job.rows[-1].sampling, plan)
    with pytest.raises(SteeringNotAppliedError):
        _completion_of(gatherer, [*tokens, replace(end, receipts=forged)])


def test_prompt_tokens_that_came_steered_from_the_cache_are_not_missed(llama, artifact, plan_of, make_decoder):
    plan = plan_of((artifact, 0.5))
    decoder = make_decoder(llama, [Row(plan)])
    *tokens, end = decoder.run()
    (receipt,) = end.receipts
    cached = replace(receipt, prompt_tokens_steered=receipt.prompt_tokens_steered - 2, prompt_tokens_cached=2)
    gatherer = CompletionBuilder("r", len(decoder.job.prompt_ids), decoder.job.rows[-1].sampling, plan)
    completion = _completion_of(gatherer, [*tokens, replace(end, receipts=(cached,))])
    assert completion.receipts == (cached,)


def test_a_stop_string_ends_one_row_and_leaves_the_others(llama, decode, make_decoder):
    ids, _, _ = decode(llama, None, max_tokens=8)
    text = llama.tokenizer.decode(ids[0])
    place = next(place for place in range(3, len(text)) if text[place : place + 2].isalpha())
    stop = text[place : place + 2]
    events = list(make_decoder(llama, [Row(None), Row(None)], max_tokens=8, stop_strings=(stop,)).run())
    ends = [event for event in events if isinstance(event, RowFinished)]
    assert [end.reason for end in ends] == [FinishReason.STOP_STRING] * 2
    shown = "".join(event.text for event in events if event.row == 0)
    assert shown == text[: text.index(stop)]


def test_timings_are_those_of_the_engine_and_not_of_a_slow_reader():
    def completion(pause):
        gatherer = CompletionBuilder("r", 3, SamplingParams(), None, 100.0)
        events = [
            Admitted(at=100.5),
            TokenEvent(0, 7, "a", at=101.0),
            TokenEvent(0, 8, "b", at=101.25),
            RowFinished(0, FinishReason.MAX_TOKENS, "", "", (), at=101.5),
        ]
        for event in events:
            time.sleep(pause)
            gathered = gatherer.add(event)
        return gathered[-1]

    assert completion(0.0).timings == completion(0.05).timings == Timings(0.5, 1.0, 1.5)


def test_every_event_says_when_it_happened(llama, make_decoder):
    began = time.monotonic()
    times = []
    for event in make_decoder(llama, [Row(None)], max_tokens=3).run():
        time.sleep(0.02)
        assert event.at < time.monotonic() - 0.015
        times.append(event.at)
    assert len(times) == 4
    assert times == sorted(times)
    assert began <= times[0]


def test_an_event_is_the_same_whenever_it_happened():
    assert Admitted(at=1.0) == Admitted(at=2.0)
    assert TokenEvent(0, 1, "a", at=1.0) == TokenEvent(0, 1, "a", at=2.0)
