"""Batches of texts against a loop that recomputes everything, one text at a time, in float64."""

import numpy as np
import pytest
import torch

from operators.builder.build import build_operator
from operators.builder.concept import concept_from_text
from operators.builder.spec import BuildSpec
from operators.core.apply import prepare
from operators.core.errors import SteeringError, TrialError
from operators.core.positions import Positions
from operators.evaluate.batch import TextJob
from operators.evaluate.directions import Constant, OperatorDirections, Push, constant
from operators.evaluate.sampling import GREEDY, PENALISED, SAMPLED, uniforms
from operators.evaluate.writing import write_texts
from operators.model.loading import block_input, decoder_layers, embed

LAYER, TOKENS = 2, 5
PROMPTS = ["The bay", "Here is a painting of the bridge in San Francisco", "My bride", "In the bay of"]


@pytest.fixture(scope="module")
def make_model(tiny):
    """``make_model(family)``: a tiny model with a head of its own; a tied one would repeat one token."""

    def make(family="llama"):
        loaded = tiny(family, fresh=True)
        head = torch.nn.Linear(loaded.hidden_size, 320, bias=False, dtype=loaded.dtype).requires_grad_(False)
        torch.nn.init.normal_(head.weight, std=0.3, generator=torch.Generator().manual_seed(3))
        loaded.model.set_output_embeddings(head)
        loaded.model.generation_config.eos_token_id = None
        return loaded

    return make


def _operator(loaded):
    concept = concept_from_text("The golden bridge", loaded)
    return prepare(build_operator(BuildSpec((concept,), layer=LAYER, rank=6), loaded), loaded.device)


def _pushes(loaded):
    generator = torch.Generator().manual_seed(1)
    unit = constant(torch.randn(loaded.hidden_size, generator=generator), "it")
    other = constant(torch.randn(loaded.hidden_size, generator=generator), "it").unit
    operator = _operator(loaded)
    return [
        Push(unit),
        Push(unit, Positions.parse("first")),
        Push(unit, Positions.parse("1..")),
        Push(unit, Positions.parse("..4")),
        Push(OperatorDirections(operator)),
        Push(OperatorDirections(operator, "substitute", blend=0.5)),
        Push(OperatorDirections(operator, blend=0.25, anchor=other, first=other), Positions.parse("generated:1..3")),
        Push(unit, Positions.parse("first"), "values"),
    ]


def _unit(vector):
    return vector / vector.norm()


def _direction(push, x):
    """d_k (T, d) of the equation, from the whole text's embeddings."""
    kind = push.directions
    if isinstance(kind, Constant):
        return kind.unit.expand(len(x), -1)
    operator, rows = kind.operator, []
    n = len(operator.factors)
    for k in range(len(x)):
        if kind.rule == "substitute":
            a = operator.base + operator.basis @ (operator.factors[-1] @ x[k])
        else:
            a = operator.basis @ sum(operator.factors[j % n] @ x[j] for j in range(k + 1))
            a = a if operator.offset is None else a + operator.offset
        d = _unit(a)
        if kind.blend:
            anchor = operator.unit_anchor if kind.anchor is None else kind.anchor
            d = _unit((1 - kind.blend) * d + kind.blend * anchor)
        rows.append(kind.first if k == 0 and kind.first is not None else d)
    return torch.stack(rows)


def _logits(loaded, ids, prompt_tokens, push=None, strength=0.0):
    """Logits (T, V) of one text, recomputed from nothing."""
    if push is None:
        return loaded.model(torch.tensor([ids])).logits[0]
    x = block_input(loaded.model, embed(loaded.model, torch.tensor(ids))).float()
    at = push.positions.among(0, len(ids), prompt_tokens=prompt_tokens)
    directions = _direction(push, x)

    def add(_module, args, kwargs):
        hidden = (args[0] if args else kwargs["hidden_states"]).clone()
        before = hidden[0, at].float()
        hidden[0, at] = (before + before.norm(dim=-1, keepdim=True) * strength / 2 * directions[at]).to(hidden.dtype)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    block = decoder_layers(loaded.model)[LAYER]
    if push.part == "stream":
        handle = block.register_forward_pre_hook(add, with_kwargs=True)
        try:
            return loaded.model(torch.tensor([ids])).logits[0]
        finally:
            handle.remove()
    # The values of a steered first token, put in the place of the plain ones for all that come after it.
    from transformers import DynamicCache

    caches = []
    for steered in (False, True):
        cache = DynamicCache(config=loaded.model.config)
        handles = [block.register_forward_pre_hook(add, with_kwargs=True)] if steered else []
        loaded.model(torch.tensor([ids[:1]]), past_key_values=cache)
        for handle in handles:
            handle.remove()
        caches.append(cache)
    for plain, steered in zip(caches[0].layers, caches[1].layers, strict=True):
        plain.values = steered.values
    return loaded.model(torch.tensor([ids[1:]]), past_key_values=caches[0]).logits[0]


def _penalised(logits, ids):
    logits = logits.clone()
    for token in set(ids):
        logits[token] = logits[token] / 1.2 if logits[token] > 0 else logits[token] * 1.2
    return logits


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
@torch.no_grad()
def test_batched_texts_are_those_of_a_loop_over_whole_texts(make_model, family):
    loaded = make_model(family)
    texts = PROMPTS if family == "llama" else PROMPTS[:2]
    prompts = [tuple(loaded.tokenizer(text)["input_ids"]) for text in texts]
    jobs = [
        TextJob(prompt, number, push, strength)
        for push, strength in zip([None, *_pushes(loaded)], [0.0, 0.9, 0.9, -0.7, 0.8, 0.9, 0.7, 0.8, 1.2], strict=True)
        for number, prompt in enumerate(prompts)
    ]
    for sampling in (GREEDY, PENALISED):
        written = write_texts(jobs, loaded, LAYER, sampling, uniforms(len(prompts), TOKENS, 0), tokens=TOKENS)
        for row, job in enumerate(jobs):
            n, ids = len(job.prompt), [*job.prompt, *written.ids[row].tolist()]
            q = _logits(loaded, ids, n, job.push, job.strength)[-TOKENS - 1 : -1]
            p = _logits(loaded, ids, n)[-TOKENS - 1 : -1].log_softmax(-1)
            for step in range(TOKENS):
                fed = ids[: n + step]
                logits = _penalised(q[step], fed) if sampling is PENALISED else q[step]
                assert written.ids[row, step] == logits.argmax(), (job.push, sampling)
            kl = (p.exp() * (p - q.log_softmax(-1))).sum(-1)
            assert np.allclose(written.kl[row], kl, atol=2e-4, rtol=1e-3)
            assert np.allclose(written.logprobs[row], p[range(TOKENS), ids[n:]], atol=2e-4)


def test_a_text_depends_neither_on_its_batch_nor_on_its_neighbours(make_model):
    loaded = make_model()
    prompts = [tuple(loaded.tokenizer(text)["input_ids"]) for text in PROMPTS]
    push = Push(OperatorDirections(_operator(loaded)))
    jobs = [TextJob(prompt, number, push, 0.8) for number, prompt in enumerate(prompts)]
    noise = uniforms(len(prompts), TOKENS, 0)
    together = write_texts(jobs, loaded, LAYER, SAMPLED, noise, tokens=TOKENS)
    for number, job in enumerate(jobs):
        alone = write_texts([job], loaded, LAYER, SAMPLED, noise, tokens=TOKENS)
        assert alone.ids[0].tolist() == together.ids[number].tolist()
        assert np.allclose(alone.kl[0], together.kl[number], atol=1e-5)


def test_sampling_follows_the_nucleus():
    from operators.evaluate.sampling import choose

    shares = torch.tensor([0.5, 0.3, 0.16, 0.04])
    logits = (shares.log() * SAMPLED.temperature).repeat(1000, 1)
    text = torch.zeros(1000, 1, dtype=torch.long)
    chosen = choose(logits, SAMPLED, text, torch.linspace(0, 0.999, 1000))
    # 0.5 + 0.3 < 0.95: the third belongs to the nucleus, the fourth does not.
    counts = torch.bincount(chosen, minlength=4) / 1000
    assert torch.allclose(counts, torch.tensor([0.5, 0.3, 0.16, 0.0]) / 0.96, atol=0.003)


def test_a_text_ends_with_its_end_token(make_model):
    loaded = make_model()
    prompts = [tuple(loaded.tokenizer(text)["input_ids"]) for text in PROMPTS]
    jobs = [TextJob(prompt, number) for number, prompt in enumerate(prompts)]
    noise = uniforms(len(prompts), TOKENS, 0)
    free = write_texts(jobs, loaded, LAYER, GREEDY, noise, tokens=TOKENS)
    end = int(free.ids[1, 2])
    loaded.model.generation_config.eos_token_id = [end]
    written = write_texts(jobs, loaded, LAYER, GREEDY, noise, tokens=TOKENS)
    for row, ids in enumerate(free.ids.tolist()):
        expected = ids.index(end) + 1 if end in ids else TOKENS
        assert written.lengths[row] == expected
        assert written.ids[row, :expected].tolist() == ids[:expected]


def test_what_the_plain_model_is_given_may_be_another_prompt(make_model):
    loaded = make_model()
    long, short = (tuple(loaded.tokenizer(text)["input_ids"]) for text in ("The golden bay. My bride", "My bride"))
    noise = uniforms(1, TOKENS, 0)
    written = write_texts([TextJob(long, 0, scored=short)], loaded, LAYER, GREEDY, noise, tokens=TOKENS)
    ids = list(written.ids[0])
    p, q = (
        loaded.model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        for prompt in (short, long)
    )
    assert np.allclose(written.kl[0], (p.exp() * (p - q)).sum(-1), atol=1e-4)
    assert np.allclose(written.logprobs[0], p[range(TOKENS), ids], atol=1e-4)


def test_a_prompt_of_one_token_is_refused(make_model):
    loaded = make_model()
    with pytest.raises(TrialError, match="has 1 tokens; two or more are needed"):
        write_texts([TextJob((5,), 0)], loaded, LAYER, GREEDY, uniforms(1, 2, 0), tokens=2)


def test_a_window_shorter_than_the_batch_is_refused(make_model):
    loaded = make_model("mistral")
    prompt = tuple(loaded.tokenizer(PROMPTS[1])["input_ids"])
    with pytest.raises(TrialError, match="takes at most"):
        write_texts([TextJob(prompt, 0)], loaded, LAYER, GREEDY, uniforms(1, 2, 0), tokens=2)


def test_a_push_that_moves_nothing_is_an_error(make_model):
    loaded = make_model()
    prompt = tuple(loaded.tokenizer("The bay")["input_ids"])
    nowhere = Push(Constant(torch.zeros(loaded.hidden_size)))
    with pytest.raises(SteeringError, match="did not move a hidden state"):
        write_texts([TextJob(prompt, 0, nowhere, 0.5)], loaded, LAYER, GREEDY, uniforms(1, 2, 0), tokens=2)
