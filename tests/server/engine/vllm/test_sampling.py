"""A request's sampling in vLLM's words; what vLLM would refuse or replace is refused by name. Without vLLM."""

import pytest

from steer_server.engine.vllm.sampling import check_sampling, vllm_sampling
from steer_server.errors import InvalidRequestError
from steer_server.types import SamplingParams, TokenBias


def _check(vocab_size=100, max_logprobs=20, **sampling):
    check_sampling(SamplingParams(**sampling), vocab_size=vocab_size, max_logprobs=max_logprobs)


def _refused(**given):
    with pytest.raises(InvalidRequestError) as caught:
        _check(**given)
    return caught.value


def test_everything_that_chooses_tokens_is_handed_on():
    chosen = {"temperature": 0.7, "top_p": 0.9, "top_k": 12, "min_p": 0.1, "repetition_penalty": 1.3, "seed": 5}
    chosen |= {"presence_penalty": -2.0, "frequency_penalty": 0.5}
    found = vllm_sampling(SamplingParams(**chosen, stop_token_ids=(3, 4)))
    assert {name: found[name] for name in chosen} == chosen
    assert (found["stop_token_ids"], found["ignore_eos"], found["logit_bias"]) == ([3, 4], True, None)
    biases = TokenBias(3, -100.0), TokenBias(7, 0.5)
    assert vllm_sampling(SamplingParams(logit_bias=biases))["logit_bias"] == {3: -100.0, 7: 0.5}


def test_what_is_barred_before_the_least_length_is_told_as_what_vllm_stops_at():
    assert vllm_sampling(SamplingParams(min_tokens=2, stop_token_ids=(9,)), {9, 2, 5})["stop_token_ids"] == [2, 5, 9]
    assert vllm_sampling(SamplingParams(stop_token_ids=(9,)), {9, 2, 5})["stop_token_ids"] == [9]


def test_more_than_vllm_can_bar_is_refused():
    ends = {"stop_token_ids": tuple(range(64)), "stop_strings": tuple(f"stop {n}" for n in range(63))}
    _check(min_tokens=1, **ends)
    most = {**ends, "stop_strings": (*ends["stop_strings"], "one more")}
    _check(**most)
    error = _refused(min_tokens=1, **most)
    assert error.field == "sampling.min_tokens"
    assert "is 1, beside 129 stop strings, stop tokens and ends of sequence; this engine (vllm)" in str(error)


@pytest.mark.parametrize(
    ("seed", "told"),
    [(0, 0), (2**63 - 1, 2**63 - 1), (2**63, -(2**63)), (2**63 + 7, -(2**63) + 7), (2**64 - 2, -2), (2**64 - 1, -2)],
)
def test_a_seed_is_told_as_the_int64_of_its_bits_and_never_as_the_one_that_means_none(seed, told):
    found = vllm_sampling(SamplingParams(seed=seed))["seed"]
    assert found == told
    assert -(2**63) <= found < 2**63
    assert found != -1


@pytest.mark.parametrize("temperature", [0.0, 0.01, 1.0, 2.0])
def test_a_temperature_that_vllm_takes_as_it_is_is_accepted(temperature):
    _check(temperature=temperature)


@pytest.mark.parametrize("temperature", [1e-30, 0.0099, 2.0001, 1e6])
def test_a_temperature_that_vllm_would_replace_or_refuse_is_refused(temperature):
    error = _refused(temperature=temperature)
    assert error.field == "sampling.temperature"
    assert f"is {temperature}; this engine (vllm) accepts 0 (greedy) and 0.01 to 2" in str(error)


@pytest.mark.parametrize(("options", "most"), [({"max_logprobs": 5}, 5), ({"max_logprobs": -1, "vocab_size": 7}, 7)])
def test_more_logprobs_than_the_engine_gives_are_refused(options, most):
    _check(logprobs=most, **options)
    _check(**options)
    error = _refused(logprobs=most + 1, **options)
    assert error.field == "sampling.logprobs"
    assert f"is {most + 1}; this engine (vllm) accepts 0 to {most}" in str(error)


def test_more_logprobs_than_there_are_tokens_are_refused():
    assert _refused(logprobs=8, vocab_size=7).field == "sampling.logprobs"


def test_no_logprobs_are_asked_of_an_engine_that_gives_none():
    _check(max_logprobs=0)
    _check(max_logprobs=0, logprobs=0)


def test_a_stop_token_that_is_no_token_is_refused_by_its_place():
    assert _refused(stop_token_ids=(3, 100)).field == "sampling.stop_token_ids[1]"
    assert _refused(logit_bias=(TokenBias(3, 1.0), TokenBias(100, 1.0))).field == "sampling.logit_bias[1].token_id"


@pytest.mark.parametrize(
    "sampling",
    [
        {"top_k": 2**31 - 1},
        {"top_p": 1e-6},
        {"min_p": 1.0},
        {"repetition_penalty": 0.01},
        {"repetition_penalty": 100.0},
        {"max_tokens": 2**31 - 1},
        {"seed": 2**63},
        {"seed": 2**64 - 1},
        {"presence_penalty": -2.0, "frequency_penalty": 2.0},
        {"logit_bias": tuple(TokenBias(token, (-1) ** token * 100.0) for token in range(100))},
        {"temperature": 0.01},
        {"temperature": 2.0, "logprobs": 20},
    ],
)
def test_vllm_takes_the_ends_of_what_is_accepted_and_replaces_nothing(sampling):
    vllm = pytest.importorskip("vllm")
    given = {"temperature": 1.0, **sampling}
    _check(**given)
    params = vllm_sampling(SamplingParams(**given))
    params |= {name: given[name] for name in ("max_tokens", "logprobs") if name in given}
    made = vllm.SamplingParams(**params)
    assert {name: getattr(made, name) for name in params} == params


def test_vllm_replaces_a_temperature_below_those_ends_and_refuses_one_above():
    vllm = pytest.importorskip("vllm")
    assert vllm.SamplingParams(temperature=0.0099).temperature == 0.01
    with pytest.raises(vllm.exceptions.VLLMValidationError, match="temperature"):
        vllm.SamplingParams(temperature=2.0001)
