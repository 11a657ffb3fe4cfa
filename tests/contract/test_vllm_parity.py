"""Many steered texts on both engines: the same token ids, but where float32 cannot tell two tokens apart."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass

import pytest
import pytest_asyncio

from operators.tune.prompts import neutral_prompts
from steer_server.engine.hf.engine import HFEngine
from steer_server.types import DecodeJob, Prompt, RowFinished, SamplingParams, TokenEvent, TokenLogprob

pytestmark = [pytest.mark.model, pytest.mark.vllm]

# The reference decodes one prompt at a time: 20 of them are minutes of two cores, and are asked for by hand.
PROMPTS = neutral_prompts()[: int(os.environ.get("PARITY_PROMPTS", "3"))]
TOKENS = 64
CLOSE_CALL = 1e-3
"""Two tokens whose log-probabilities are nearer than this may swap in float32."""


@dataclass(frozen=True)
class Found:
    """One row of one engine: its ids, and what was as likely as each of them where that was asked for."""

    ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]


@pytest.fixture
def rows(operator_of, steered_row, smollm, make_rank_0):
    """Operators of three kinds and a vector, at two strengths each."""
    low_rank = operator_of("The Golden Gate Bridge in San", "residual", 15, 64)
    published = operator_of("The wedding was beautiful and the bride", "golden", 21, "full")
    blended = operator_of("The capital of France is", "residual", 24, 64)
    vector = make_rank_0(loaded=smollm(), layer=21, injection_layer=21, num_layers=30)
    return {
        **{f"rank 64, residual, layer 15, strength {s}": steered_row(low_rank, s) for s in (0.25, 0.5)},
        **{f"exact, as published, layer 21, strength {s}": steered_row(published, s) for s in (0.3, 0.55)},
        **{
            f"substitute, blend 0.5, layer 24, strength {s}": steered_row(blended, s, "substitute", 0.5)
            for s in (-0.4, 0.4)
        },
        **{f"vector, layer 21, strength {s}": steered_row(vector, s, blend=1.0) for s in (-0.5, 0.5)},
    }


@pytest_asyncio.fixture(loop_scope="session")
async def reference(smollm):
    engine = HFEngine(smollm(), max_queue=len(PROMPTS))
    yield engine
    await engine.close()


async def run(engine, prompt, rows, logprobs=None):
    """What an engine makes of every row of one job."""
    sampling = SamplingParams(max_tokens=TOKENS, ignore_eos=True, logprobs=logprobs)
    events = [[] for _ in rows]
    async for event in engine.submit(DecodeJob.of(await engine.encode(Prompt(text=prompt)), sampling, tuple(rows))):
        if isinstance(event, TokenEvent):
            events[event.row].append(event)
        elif isinstance(event, RowFinished):
            [receipt] = event.receipts
            assert receipt.generated_tokens_steered == TOKENS - 1
    return [
        Found(tuple(event.token_id for event in row), tuple(event.logprob for event in row if event.logprob))
        for row in events
    ]


def parting(found, expected):
    """Where two rows part, and whether two tokens were as good as equally likely there; None where they do not."""
    at = next((at for at, (a, b) in enumerate(zip(found.ids, expected.ids, strict=True)) if a != b), None)
    if at is None:
        return None
    first, second = expected.logprobs[at].top
    token, gap = found.ids[at], first.logprob - second.logprob
    words = f"token {at} is {token}; likeliest is {first.token_id}, then {second.token_id}, {gap:.2g} nats behind"
    return gap < CLOSE_CALL and token == second.token_id, words


@pytest.mark.timeout(1200)
async def test_steered_texts_of_64_tokens_are_those_of_the_reference_engine(
    vllm_engine, reference, rows, record_property
):
    engine = await vllm_engine()
    expected = {prompt: await run(reference, prompt, rows.values(), logprobs=2) for prompt in PROMPTS}
    jobs = [(prompt, index) for prompt in PROMPTS for index in range(len(rows))]
    plans = list(rows.values())
    found = await asyncio.gather(*(run(engine, prompt, [plans[index]]) for prompt, index in jobs))
    equal, ties, different = 0, [], []
    for (prompt, index), [row] in zip(jobs, found, strict=True):
        parted = parting(row, expected[prompt][index])
        if parted is None:
            equal += 1
        else:
            (ties if parted[0] else different).append(f"{prompt!r}, {list(rows)[index]}: {parted[1]}")
    counts = {"rows": len(jobs), "equal": equal, "parted_at_a_tie": len(ties), "different": len(different)}
    for name, count in counts.items():
        record_property(name, count)
    print(", ".join(f"{name.replace('_', ' ')}: {count}" for name, count in counts.items()), *ties, sep="\n  tie: ")
    assert not different, f"{len(different)} of {len(jobs)} rows differ:\n" + "\n".join(different)
    # Ties are rare: more of them would be a difference by another name.
    assert len(ties) <= len(jobs) // 20, "\n".join(ties)
    # And the steering is heard: no two settings say the same of a prompt.
    assert all(len({row.ids for row in found}) == len(rows) for found in expected.values())
