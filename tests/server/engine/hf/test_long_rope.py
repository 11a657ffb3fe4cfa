"""Phi-3's longrope: other rotary factors for sequences of more than 32 tokens."""

import pytest
import torch
from transformers import Phi3Config, Phi3ForCausalLM

from operators.core.errors import ModelError
from operators.model.loading import recognise
from operators.tune.continuations import ContinuationRequest, decode_continuations
from steer_server.engine.hf import decode as decode_module
from steer_server.engine.hf.engine import HFEngine
from steer_server.errors import InvalidRequestError
from steer_server.types import DecodeJob, Row, SamplingParams, TokenEvent

_ORIGINAL = 32


@pytest.fixture(scope="module")
def phi3(tiny_tokenizer):
    config = Phi3Config(
        vocab_size=320,
        hidden_size=40,
        intermediate_size=56,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        original_max_position_embeddings=_ORIGINAL,
        sliding_window=None,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=None,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "original_max_position_embeddings": _ORIGINAL,
            "short_factor": [1.0, 1.1, 1.3, 1.5, 2.0],
            "long_factor": [2.0, 3.0, 5.0, 8.0, 9.0],
        },
    )
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = Phi3ForCausalLM(config).eval().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=1.5 / parameter.shape[1] ** 0.5)
    model.generation_config.eos_token_id = None
    return recognise("tiny-longrope", model, tiny_tokenizer)


def _ids(length):
    return tuple(1 + (7 * index) % 300 for index in range(length))


def _generated(loaded, prompt, tokens):
    ids = torch.tensor([prompt])
    found = loaded.model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    return found[0, len(prompt) :].tolist()


async def _decoded(job):
    return [event.token_id async for event in job if isinstance(event, TokenEvent)]


def _job(prompt, tokens):
    return DecodeJob.of(prompt, SamplingParams(max_tokens=tokens, ignore_eos=True), (Row(None),))


@pytest.mark.parametrize("chunk", [7, 1000])
async def test_a_text_has_the_factors_that_generate_gives_it(phi3, monkeypatch, chunk):
    monkeypatch.setattr(decode_module, "prefill_positions", lambda _: chunk)
    cases = [(20, 13), (32, 1), (33, 20), (50, 20)]
    engine = HFEngine(phi3, max_queue=8)
    try:
        # All at once, so that steps of short and long texts take turns.
        jobs = [engine.submit(_job(_ids(length), tokens)) for length, tokens in cases]
        found = [await _decoded(job) for job in jobs]
    finally:
        await engine.close()
    assert found == [_generated(phi3, _ids(length), tokens) for length, tokens in cases]


@pytest.mark.parametrize(
    ("length", "tokens", "accepted"),
    [(20, 14, "1 to 13, or a prompt of more than 32 tokens"), (32, 2, "1 to 1, or a prompt of more than 32 tokens")],
)
async def test_a_text_that_could_cross_to_other_factors_is_refused_with_what_is_accepted(
    phi3, length, tokens, accepted
):
    engine = HFEngine(phi3, max_queue=2)
    try:
        with pytest.raises(InvalidRequestError, match=rf"sampling.max_tokens: is {tokens} .*\(longrope\).*{accepted}"):
            engine.submit(_job(_ids(length), tokens))
    finally:
        await engine.close()


def test_trials_of_texts_that_cross_are_refused_too(phi3):
    with pytest.raises(ModelError, match=r"grow from 30 to 39 tokens: .*\(longrope\)"):
        decode_continuations([ContinuationRequest(_ids(30))], phi3, tokens=10)
    with pytest.raises(ModelError, match="grow from 20 to 49"):
        decode_continuations([ContinuationRequest(_ids(20)), ContinuationRequest(_ids(40))], phi3, tokens=10)
    found = decode_continuations([ContinuationRequest(_ids(40))], phi3, tokens=10)
    assert list(found[0].ids) == _generated(phi3, _ids(40), 10)


async def test_a_text_that_may_be_shorter_ends_before_the_factors_change(phi3):
    engine = HFEngine(phi3, max_queue=2)
    try:
        for prompt, most in ((20, _ORIGINAL + 1 - 20), (_ORIGINAL + 1, 90)):
            job = DecodeJob.of(_ids(prompt), SamplingParams(max_tokens=90, fit_max_tokens=True), (Row(),))
            assert engine.fit(job).rows[0].sampling.max_tokens == most
            engine.check(engine.fit(job))
    finally:
        await engine.close()
