import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig

from steer_server.engine.hf.sampling import Sampler
from steer_server.types import SamplingParams, TokenBias

_CPU = torch.device("cpu")
_VOCABULARY = 12
_SETTINGS = [
    {"temperature": 0.7},
    {"temperature": 1.0},
    {"temperature": 2.5},
    {"temperature": 1.0, "top_p": 0.6},
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 1.3, "top_k": 4},
    {"temperature": 0.8, "top_k": 7, "top_p": 0.9, "repetition_penalty": 1.4},
]


def _logits(seed, size=_VOCABULARY):
    return 2.0 * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def _choose(logits, sequence=(0,), **params):
    return Sampler(SamplingParams(**params), _CPU).choose(torch.tensor(sequence), logits)


def _draws(count, logits, **params):
    sampler = Sampler(SamplingParams(**params), _CPU)
    return [sampler.choose(torch.tensor([0]), logits) for _ in range(count)]


@given(seed=st.integers(0, 10_000))
def test_greedy_is_the_likeliest_token(seed):
    logits = _logits(seed)
    assert _choose(logits) == int(logits.argmax())


@given(seed=st.integers(0, 2**64 - 1))
def test_the_same_seed_draws_the_same_tokens(seed):
    logits = _logits(1)
    params = {"temperature": 1.5, "seed": seed}
    assert _draws(8, logits, **params) == _draws(8, logits, **params)


def test_different_seeds_draw_different_tokens():
    logits = torch.zeros(1000)
    assert _draws(8, logits, temperature=1.0, seed=1) != _draws(8, logits, temperature=1.0, seed=2)


def test_two_rows_with_one_seed_draw_the_same_whatever_the_other_row_draws():
    logits = torch.zeros(1000)
    params = SamplingParams(temperature=1.0, seed=5)
    first, second = Sampler(params, _CPU), Sampler(params, _CPU)
    pairs = [(first.choose(torch.tensor([0]), logits), second.choose(torch.tensor([0]), logits)) for _ in range(20)]
    assert all(a == b for a, b in pairs)
    assert len({a for a, _ in pairs}) > 10


@given(seed=st.integers(0, 10_000), temperature=st.floats(0.1, 10.0))
def test_the_likeliest_one_token_is_greedy_at_any_temperature(seed, temperature):
    logits = _logits(seed)
    assert _choose(logits, temperature=temperature, top_k=1, seed=seed) == int(logits.argmax())


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-38, 1e-45, 1e-300, 5e-324])
def test_a_temperature_close_to_zero_is_greedy(temperature):
    logits = _logits(3)
    assert _draws(5, logits, temperature=temperature, seed=1) == [int(logits.argmax())] * 5


@pytest.mark.parametrize("temperature", [1e6, 1e38, 1e300])
def test_an_enormous_temperature_draws_evenly(temperature):
    assert len(set(_draws(300, _logits(3), temperature=temperature, seed=1))) == _VOCABULARY


@pytest.fixture
def drawn_from(monkeypatch):
    """The distributions from which tokens were drawn, in their order."""
    seen = []
    draw = torch.multinomial

    def spy(probabilities, *args, **kwargs):
        seen.append(probabilities.clone())
        return draw(probabilities, *args, **kwargs)

    monkeypatch.setattr(torch, "multinomial", spy)
    return seen


def test_min_p_is_applied_before_top_p(drawn_from):
    # min-p keeps what has at least .25 of the likeliest's .5: three tokens, of which two have .8 of what is left. The
    # other way round, top-p keeps three, and min-p all of them.
    _choose(torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05]).log(), temperature=1.0, top_p=0.8, min_p=0.25)
    assert drawn_from[-1].tolist() == pytest.approx([5 / 7, 2 / 7, 0.0, 0.0, 0.0])


def test_min_p_is_applied_before_top_k(drawn_from):
    _choose(torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05]).log(), temperature=1.0, top_k=4, top_p=0.95, min_p=0.11)
    assert drawn_from[-1].tolist() == pytest.approx([10 / 19, 4 / 19, 3 / 19, 2 / 19, 0.0])


@pytest.mark.vllm
@pytest.mark.parametrize("penalties", [(1.0, 0.0, 0.0), (1.3, 0.7, -1.1), (1.0, 2.0, 0.3), (0.7, -2.0, 2.0)], ids=str)
def test_biases_penalties_and_the_least_length_come_in_the_order_of_vllm(drawn_from, penalties):
    """With its own functions, in the order of its sampler."""
    from vllm.v1.sample.logits_processor.builtin import LogitBiasLogitsProcessor, MinTokensLogitsProcessor
    from vllm.v1.sample.ops.penalties import apply_all_penalties

    def at(tokens):
        return (torch.zeros(len(tokens), dtype=torch.int32), torch.tensor(tokens, dtype=torch.int32))

    repetition, frequency, presence = penalties
    prompt, generated, biases = [1, 2, 2, 3], [3, 4, 4, 4, 5], {2: 3.0, 4: -2.5, 7: 8.0}
    least, bias = (kind.__new__(kind) for kind in (MinTokensLogitsProcessor, LogitBiasLogitsProcessor))
    least.min_toks, least.logits_slice, least.neg_inf_tensor = {0: None}, at([7, 9]), torch.tensor(-torch.inf)
    least.restore_logits_slice = at([])
    bias.biases, bias.logits_slice, bias.bias_tensor = biases, at([*biases]), torch.tensor([*biases.values()])
    params = SamplingParams(
        temperature=1.0,
        repetition_penalty=repetition,
        frequency_penalty=frequency,
        presence_penalty=presence,
        logit_bias=tuple(TokenBias(*each) for each in biases.items()),
        min_tokens=6,
    )
    for seed in range(20):
        wanted = bias.apply(least.apply(_logits(seed)[None]))
        values = (torch.tensor([value]) for value in (presence, frequency, repetition))
        wanted = apply_all_penalties(wanted, torch.tensor([prompt]), *values, [generated])
        sampler = Sampler(params, _CPU, prompt_tokens=len(prompt), ending_ids={7, 9})
        sampler.choose(torch.tensor(prompt + generated), _logits(seed))
        torch.testing.assert_close(drawn_from[-1], wanted[0].softmax(-1))


def test_after_the_least_length_what_ends_a_text_may_be_chosen():
    sampler = Sampler(SamplingParams(min_tokens=2), _CPU, prompt_tokens=1, ending_ids=[1])
    logits = torch.tensor([0.0, 5.0, 1.0])
    assert [sampler.choose(torch.tensor([0] * size), logits) for size in (1, 2, 3)] == [2, 2, 1]


def _vllm_probabilities(params, logits):
    """What vLLM 0.32 draws from: its own processors, in the order of its sampler."""
    from vllm.v1.sample.logits_processor.builtin import MinPLogitsProcessor
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch

    logits = logits[None] / params["temperature"]
    min_p = MinPLogitsProcessor.__new__(MinPLogitsProcessor)
    min_p.min_p_count, min_p.min_p = 1, torch.tensor([[params["min_p"]]])
    logits = min_p.apply(logits)
    top_k, top_p = torch.tensor([params.get("top_k") or logits.shape[1]]), torch.tensor([params["top_p"]])
    return apply_top_k_top_p_pytorch(logits, top_k, top_p)[0].softmax(-1)


@pytest.mark.vllm
@pytest.mark.parametrize("top_k", [0, 7])
@pytest.mark.parametrize(("top_p", "min_p"), [(0.5, 0.1), (0.8, 0.25), (0.95, 0.05), (0.3, 0.5), (1.0, 0.2)])
def test_the_distribution_is_that_of_vllm(drawn_from, top_k, top_p, min_p):
    params = {"temperature": 0.8, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    for seed in range(40):
        logits = _logits(seed)
        _choose(logits, **params)
        torch.testing.assert_close(drawn_from[-1], _vllm_probabilities(params, logits))


def _transformers_probabilities(llama, params, sequence, logits):
    """What ``generate`` of transformers would draw from."""
    config = GenerationConfig(do_sample=True, **{"top_k": 0, **params})
    config._eos_token_tensor = None
    processors = llama.model._get_logits_processor(
        generation_config=config,
        input_ids_seq_length=len(sequence),
        encoder_input_ids=None,
        prefix_allowed_tokens_fn=None,
        logits_processor=[],
        device="cpu",
    )
    return processors(torch.tensor([sequence]), logits[None])[0].softmax(-1)


@pytest.mark.parametrize("params", _SETTINGS, ids=str)
def test_the_distribution_is_that_of_transformers(llama, params, drawn_from):
    sequence = [3, 5, 3, 8]
    for seed in range(5):
        logits = _logits(seed)
        _choose(logits, sequence, **params)
        expected = _transformers_probabilities(llama, params, sequence, logits)
        assert torch.equal(drawn_from[-1], expected)


@pytest.mark.parametrize("params", _SETTINGS, ids=str)
def test_the_draws_follow_the_distribution(llama, params):
    logits, count = _logits(2), 3000
    expected = _transformers_probabilities(llama, params, [0], logits)
    draws = torch.tensor(_draws(count, logits, **params, seed=11))
    found = torch.bincount(draws, minlength=_VOCABULARY) / count
    assert not bool(((found > 0) & (expected == 0)).any())
    # Total variation of 3000 draws over 12 tokens: 0.05 is more than four standard deviations away.
    assert float((found - expected).abs().sum() / 2) < 0.05


def test_a_repetition_penalty_makes_room_for_another_token():
    logits = torch.tensor([2.0, 1.5, -1.0])
    assert _choose(logits, (0,)) == 0
    assert _choose(logits, (0,), repetition_penalty=1.5) == 1
    assert _choose(logits, (1,), repetition_penalty=1.5) == 0


def test_a_repetition_penalty_below_one_repeats():
    assert _choose(torch.tensor([1.0, 1.5, -1.0]), (0,), repetition_penalty=0.5) == 0


def test_choosing_leaves_the_logits_alone():
    logits = _logits(4)
    before = logits.clone()
    params = {"temperature": 0.5, "top_k": 3, "top_p": 0.5, "min_p": 0.1, "repetition_penalty": 2.0}
    params |= {"frequency_penalty": 1.0, "presence_penalty": 1.0, "logit_bias": (TokenBias(1, 5.0),), "min_tokens": 4}
    Sampler(SamplingParams(**params), _CPU, ending_ids=[3]).choose(torch.tensor([1, 2]), logits)
    assert torch.equal(logits, before)
