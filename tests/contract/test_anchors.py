"""Each anchor, and the anchor at the first token, against the loop that recomputes everything, on every engine."""

from __future__ import annotations

import pytest

from steer_server.types import SamplingParams

pytestmark = pytest.mark.model

PROMPT = "Here is a painting of the"
TOKENS = 8
SAMPLING = SamplingParams(max_tokens=TOKENS)
CASES = [
    ("cumulative", 1.0, "all", 0.5, "contrast", "operator"),
    ("cumulative", 1.0, "first", 1.2, "contrast", "operator"),
    ("cumulative", 0.5, "all", 0.5, "contrast", "operator"),
    ("cumulative", 0.0, "all", 0.5, "contrast", "anchor"),
    ("cumulative", 0.25, "all", 0.5, "concept", "anchor"),
    ("substitute", 0.0, "prompt", 0.8, "contrast", "anchor"),
]


@pytest.mark.parametrize(("rule", "blend", "positions", "strength", "anchor", "first_token"), CASES)
async def test_the_ids_are_those_of_the_loop_and_the_receipt_names_the_anchor(
    rule, blend, positions, strength, anchor, first_token, smollm, engine, operator_of, decode, steered_row, recompute
):
    loaded, artifact = smollm(), operator_of("The Golden Gate Bridge in San", "golden", 21)
    prompt_ids, how = loaded.tokenizer(PROMPT)["input_ids"], (anchor, first_token)
    row = steered_row(artifact, strength, rule, blend, positions=positions, how=how)
    [(ids, end)] = await decode(engine, PROMPT, SAMPLING, row)
    assert [ids] == recompute(loaded.model, artifact, prompt_ids, [strength], TOKENS, rule, blend, positions, how)
    (receipt,) = end.receipts
    assert (receipt.anchor, receipt.first_token) == how
    assert receipt.mean_dose == pytest.approx(strength / 2, rel=1e-4)
