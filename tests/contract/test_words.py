"""Words through both engines: the same vector, the same ids as the equation written out, and no trace of many words."""

from __future__ import annotations

import asyncio
import functools
from functools import partial

import pytest
import torch

from operators.core.positions import Positions
from operators.core.store import Store
from operators.model.loading import decoder_layers
from operators.model.unembedding import find_unembedding
from steer_server.compare import compare
from steer_server.generate import generate
from steer_server.registry import Registry
from steer_server.types import (
    Arm,
    Compared,
    CompareRequest,
    GenerationRequest,
    OperatorUse,
    Prompt,
    SamplingParams,
    WeightedWord,
)
from steer_server.words import WordDirections

pytestmark = pytest.mark.model
PROMPT = "Yesterday my sister and I went to"
TOKENS = 12
LAYER = 21
# Some by one token and its variants, one by several, one pushed away from.
USES = {
    "first": ((("coffee", 1.0),), 1.6, "first"),
    "mixture": ((("ocean", 1.0), ("hot air balloon", -0.5)), 0.7, "1.."),
    "away": ((("London", 1.0),), -0.6, "all"),
}


@pytest.fixture(scope="session")
def lens(smollm, make_random_lens):
    return make_random_lens(smollm(), layer=LAYER, injection_layer=LAYER)


@pytest.fixture
def registry(engine, lens, tmp_path):
    """Each engine with a reader of its own."""
    Store(tmp_path).save("lens", lens)
    words = WordDirections(partial(find_unembedding, "smollm2-135m"), engine.tokenizer)
    return Registry(Store(tmp_path), engine.model, max_bytes=1 << 30, max_dose=1.0, words=words)


def use_of(words, strength, positions):
    weighted = tuple(WeightedWord(*word) for word in words)
    return OperatorUse("", strength, positions=Positions.parse(positions), words=weighted)


async def completion(engine, registry, use, tokens=TOKENS):
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)
    request = GenerationRequest("r", Prompt(text=PROMPT), sampling, (use,))
    return [event async for event in generate(engine, registry, request)][-1]


@pytest.fixture(scope="module")
def written_out(smollm, lens):
    """``written_out(words, strength, positions)``: the ids by the equations and the model's own head."""
    loaded = smollm()
    head = loaded.model.lm_head.weight.double()

    def direction(text):
        spelled = {text, text.lower(), text[0].upper() + text[1:]}
        each = [loaded.tokenizer(space + form)["input_ids"] for form in spelled for space in ("", " ")]
        ids = {ids[0] for ids in each if len(ids) == 1} or set(loaded.tokenizer(" " + text)["input_ids"])
        v = lens.lens.pull.double() @ (head[sorted(ids)].mean(0) - head.mean(0))
        return v / v.norm()

    @functools.cache
    def run(words, strength, positions):
        v = sum(weight * direction(text) for text, weight in words)
        v = (v / v.norm()).float()
        ids = loaded.tokenizer(PROMPT)["input_ids"]
        prompt_tokens = len(ids)
        first, last = {"first": (0, 1), "1..": (1, None), "all": (0, None)}[positions]

        def push(_module, args):
            hidden = args[0].clone()
            at = hidden[0, first:last]
            hidden[0, first:last] = at + strength / 2 * at.norm(dim=-1, keepdim=True) * v
            return (hidden, *args[1:])

        for _ in range(TOKENS):
            handle = decoder_layers(loaded.model)[LAYER].register_forward_pre_hook(push)
            with torch.no_grad():
                logits = loaded.model(torch.tensor([ids]), use_cache=False, logits_to_keep=1).logits[0, -1]
            handle.remove()
            ids = [*ids, int(logits.argmax())]
        return tuple(ids[prompt_tokens:])

    return run


@pytest.mark.parametrize("name", USES)
async def test_a_word_steers_as_its_equation_says(engine, registry, written_out, lens, name):
    words, strength, positions = USES[name]
    found = await completion(engine, registry, use_of(words, strength, positions))
    plain = await completion(engine, registry, use_of(words, 0.0, positions))
    assert found.token_ids == written_out(words, strength, positions) != plain.token_ids
    (receipt,) = found.receipts
    assert [(word.text, word.weight) for word in receipt.words] == list(words)
    assert (receipt.operator, receipt.lens_digest, receipt.layer) == ("lens", lens.digest, LAYER)
    assert receipt.max_dose == pytest.approx(abs(strength) / 2, rel=1e-4)


async def test_words_of_one_comparison_share_its_batch_and_each_has_its_receipt(engine, registry):
    arms = tuple(Arm(name, (use_of(*use),)) for name, use in USES.items())
    sampling = SamplingParams(max_tokens=8, ignore_eos=True)
    request = CompareRequest("r", Prompt(text=PROMPT), sampling, arms)
    events = [event async for event in compare(engine, registry, request, max_arms=4)]
    assert isinstance(events[-1], Compared)
    ends = {event.arm: event.event for event in events[:-1] if hasattr(event.event, "receipts")}
    digests = {name: end.receipts[0].digest for name, end in ends.items() if end.receipts}
    assert set(digests) == set(USES)
    assert len(set(digests.values())) == len(USES)
    alone = await completion(engine, registry, use_of(*USES["mixture"]), tokens=8)
    assert alone.token_ids == ends["mixture"].token_ids
    assert alone.receipts[0].digest == digests["mixture"]


@pytest.mark.vllm
async def test_many_words_at_once_leave_no_more_than_are_kept(vllm_engine, lens, tmp_path, monkeypatch):
    engine = await vllm_engine()
    Store(tmp_path).save("lens", lens)
    words = WordDirections(partial(find_unembedding, "smollm2-135m"), engine.tokenizer, max_kept=4)
    registry = Registry(Store(tmp_path), engine.model, max_bytes=1 << 30, max_dose=1.0, words=words)
    monkeypatch.setattr(engine._operator_cache, "_max_kept", 4)
    texts = ["river", "music", "winter", "garden", "horse", "school", "money", "window", "doctor", "island"]
    uses = [use_of(((text, 1.0),), 0.9, "all") for text in texts]
    together = await asyncio.gather(*(completion(engine, registry, use, tokens=6) for use in uses))
    assert len({found.receipts[0].digest for found in together}) == len(texts)
    # All ten were held, so all ten stayed; the next one evicts what is too many.
    await completion(engine, registry, use_of((("candle", 1.0),), 0.9, "all"), tokens=6)
    assert (len(engine._operator_cache._sizes), len(words)) == (4, 4)
    alone = [await completion(engine, registry, use, tokens=6) for use in uses]
    assert [found.token_ids for found in alone] == [found.token_ids for found in together]
    assert (len(engine._operator_cache._sizes), len(words)) == (4, 4)
    held = await engine._client.call("steering_state")
    assert [state["operators"] for state in held] == [4]
    assert await engine.num_held_requests() == 0
