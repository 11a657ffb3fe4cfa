import math
from dataclasses import replace

import pytest
import torch

from steer_server.errors import EngineFailedError, SteeringNotAppliedError
from steer_server.generate import Gatherer
from steer_server.types import (
    Completion,
    FinishReason,
    Row,
    RowFinished,
    TokenEvent,
)

_LAYER = 2
_PROMPT = "the golden bridge in the bay"


def test_a_model_whose_own_numbers_are_broken_is_an_engine_failure(tiny, decode):
    broken = tiny("llama", dtype="float32", fresh=True)
    broken.model.get_output_embeddings().weight[0, 0] = math.nan
    with pytest.raises(EngineFailedError, match="not finite"):
        decode(broken, None)


def test_a_row_alone_says_what_it_says_in_company(llama, artifact, other_artifact, plan_of, decode):
    plans = [plan_of((artifact, 0.8)), None, plan_of((other_artifact, 0.8))]
    together, _, _ = decode(llama, *plans)
    assert together == [decode(llama, plan)[0][0] for plan in plans]


def test_scores_of_a_plain_row_say_that_it_is_plain(llama, decoder):
    events = list(decoder(llama, [Row(None, score=True)], logprobs=0).run())
    tokens = [event for event in events if isinstance(event, TokenEvent)]
    assert len(tokens) == 6
    for event in tokens:
        assert event.score.kl == pytest.approx(0.0, abs=1e-6)
        assert event.score.plain_logprob == pytest.approx(event.logprob.logprob, abs=1e-5)


def test_scores_are_those_of_the_plain_model_on_the_steered_text(llama, artifact, plan_of, decoder):
    plan, rows = plan_of((artifact, 1.0)), []
    handle = llama.model.register_forward_hook(lambda module, args, output: rows.append(output.logits[0, -1].clone()))
    try:
        events = list(decoder(llama, [Row(plan, score=True)]).run())
    finally:
        handle.remove()
    tokens = [event for event in events if isinstance(event, TokenEvent)]
    ids = [*llama.tokenizer(_PROMPT)["input_ids"], *(event.token_id for event in tokens)]
    with torch.no_grad():
        plain = llama.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    first = len(ids) - len(tokens)
    for place, event in enumerate(tokens):
        p = plain[first + place - 1]
        assert event.score.plain_logprob == pytest.approx(float(p[event.token_id]), abs=1e-3)
        q = rows[place].log_softmax(-1)
        assert event.score.kl == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-3)
        assert event.score.kl > 0


def test_a_row_that_is_interrupted_at_once_has_no_text_and_a_steered_prompt(llama, artifact, plan_of, decoder):
    plan = plan_of((artifact, 0.5))
    decoder = decoder(llama, [Row(plan)], interrupted=lambda: FinishReason.TIME_LIMIT)
    gatherer = Gatherer("r", len(decoder.job.prompt_ids), decoder.job.sampling, plan)
    completion = _completion_of(gatherer, decoder.run())
    assert (completion.text, completion.token_ids) == ("", ())
    assert completion.receipts[0].prompt_tokens_steered == len(decoder.job.prompt_ids)


@pytest.mark.parametrize("reason", [FinishReason.CANCELLED, FinishReason.TIME_LIMIT])
def test_an_interrupted_row_ends_with_its_receipts(llama, artifact, plan_of, reason, decoder):
    calls = iter([None, None, reason])
    events = list(decoder(llama, [Row(plan_of((artifact, 0.5)))], interrupted=lambda: next(calls)).run())
    end = events[-1]
    assert end.reason is reason
    assert sum(isinstance(event, TokenEvent) for event in events) == 2
    assert end.receipts[0].generated_tokens_steered == 1


def _completion_of(gatherer, events):
    gathered = [item for event in events for item in gatherer.add(event)]
    return next(item for item in gathered if isinstance(item, Completion))


def test_an_interrupted_row_is_accepted_with_all_of_its_positions(llama, artifact, plan_of, decoder):
    plan = plan_of((artifact, 0.5))
    calls = iter([None, None, FinishReason.TIME_LIMIT])
    decoder = decoder(llama, [Row(plan)], interrupted=lambda: next(calls))
    gatherer = Gatherer("r", len(decoder.job.prompt_ids), decoder.job.sampling, plan)
    completion = _completion_of(gatherer, decoder.run())
    assert completion.reason is FinishReason.TIME_LIMIT
    assert len(completion.token_ids) == 2


@pytest.mark.parametrize("change", ["no receipts", "one position less", "one prompt token less", "another digest"])
def test_an_engine_that_forgets_its_plan_gives_no_text(llama, artifact, plan_of, change, decoder):
    plan = plan_of((artifact, 0.5))
    decoder = decoder(llama, [Row(plan)])
    *tokens, end = decoder.run()
    (receipt,) = end.receipts
    forged = {
        "no receipts": (),
        "one position less": (replace(receipt, generated_tokens_steered=receipt.generated_tokens_steered - 1),),
        "one prompt token less": (replace(receipt, prompt_tokens_steered=receipt.prompt_tokens_steered - 1),),
        "another digest": (replace(receipt, digest="sha256:" + "0" * 64),),
    }[change]
    gatherer = Gatherer("r", len(decoder.job.prompt_ids), decoder.job.sampling, plan)
    with pytest.raises(SteeringNotAppliedError):
        _completion_of(gatherer, [*tokens, replace(end, receipts=forged)])


def test_a_stop_string_ends_one_row_and_leaves_the_others(llama, decode, decoder):
    ids, _, _ = decode(llama, None, max_tokens=8)
    text = llama.tokenizer.decode(ids[0])
    place = next(place for place in range(3, len(text)) if text[place : place + 2].isalpha())
    stop = text[place : place + 2]
    events = list(decoder(llama, [Row(None), Row(None)], max_tokens=8, stop_strings=(stop,)).run())
    ends = [event for event in events if isinstance(event, RowFinished)]
    assert [end.reason for end in ends] == [FinishReason.STOP_STRING] * 2
    shown = "".join(event.text for event in events if event.row == 0)
    assert shown == text[: text.index(stop)]
