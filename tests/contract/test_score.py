"""KL and perplexity of a comparison, against the plain model run over the finished text."""

from __future__ import annotations

import pytest
import torch

from steer_server.types import Admitted, DecodeJob, Prompt, Row, RowFinished, SamplingParams

pytestmark = pytest.mark.model

PROMPT = "Here is a painting of the"


async def scored(engine, rows, tokens=16):
    ids, scores = [[] for _ in rows], [[] for _ in rows]
    async for event in engine.submit(
        DecodeJob.of(await engine.encode(Prompt(text=PROMPT)), SamplingParams(max_tokens=tokens), tuple(rows))
    ):
        if isinstance(event, RowFinished):
            scores[event.row].extend(event.scores)
        elif not isinstance(event, Admitted):
            ids[event.row].append(event.token_id)
            scores[event.row].extend([] if event.score is None else [event.score])
    assert [len(row) for row in scores] == [len(row) for row in ids]
    return ids, scores


def plain_logprobs(loaded, ids):
    prompt = loaded.tokenizer(PROMPT)["input_ids"]
    with torch.no_grad():
        logits = loaded.model(torch.tensor([[*prompt, *ids]])).logits[0]
    return logits[len(prompt) - 1 : -1].float().log_softmax(-1)


async def test_the_plain_log_probability_of_each_token_is_that_of_one_pass_over_the_text(
    smollm, engine, operator_of, steered_row
):
    steered = steered_row(operator_of("The Golden Gate Bridge in San", "golden", 21), 0.55)
    ids, scores = await scored(engine, [Row(score=True), Row(steered.plan, score=True)])
    for row in range(2):
        expected = plain_logprobs(smollm(), ids[row])[torch.arange(len(ids[row])), ids[row]]
        found = torch.tensor([score.plain_logprob for score in scores[row]])
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)


async def test_kl_is_zero_for_a_plain_arm_and_positive_for_a_steered_one(smollm, engine, operator_of, steered_row):
    operator = operator_of("The Golden Gate Bridge in San", "golden", 21)
    silent, loud = steered_row(operator, 0.0), steered_row(operator, 0.55)
    _, scores = await scored(engine, [Row(score=True), Row(silent.plan, score=True), Row(loud.plan, score=True)])
    assert max(score.kl for score in scores[0]) == 0.0
    assert max(score.kl for score in scores[1]) < 1e-6
    assert min(score.kl for score in scores[2]) > 1e-4


async def test_kl_is_that_of_the_steered_and_the_plain_distribution_at_each_position(
    smollm, engine, operator_of, steered_row
):
    artifact = operator_of("The Golden Gate Bridge in San", "residual", 21)
    row = steered_row(artifact, 0.5, blend=1.0)
    ids, scores = await scored(engine, [Row(score=True), Row(row.plan, score=True)], tokens=8)
    loaded = smollm()
    unit = artifact.anchor / artifact.anchor.norm()

    def push(_module, args):
        return (args[0] + 0.25 * args[0].norm(dim=-1, keepdim=True) * unit, *args[1:])

    handle = loaded.model.model.layers[21].register_forward_pre_hook(push)
    steered = plain_logprobs(loaded, ids[1])
    handle.remove()
    plain = plain_logprobs(loaded, ids[1])
    expected = (plain.exp() * (plain - steered)).sum(-1)
    torch.testing.assert_close(torch.tensor([score.kl for score in scores[1]]), expected, atol=1e-3, rtol=1e-3)
