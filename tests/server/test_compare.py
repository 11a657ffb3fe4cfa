import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from operators.core.statistics import percentile
from steer_server.compare import check_size, compare, compare_completions, first_divergence, perplexity
from steer_server.errors import InvalidRequestError
from steer_server.types import (
    Arm,
    ArmSampling,
    CompareRequest,
    Completion,
    FinishReason,
    OperatorUse,
    Prompt,
    SamplingParams,
    Score,
    Timings,
    Usage,
)

_IDS = st.lists(st.integers(0, 2), max_size=6)
_VALUES = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30)
_USE = (OperatorUse("golden"),)


def _completion(ids, scores=()):
    return Completion(
        "r",
        "",
        tuple(ids),
        FinishReason.MAX_TOKENS,
        "",
        Usage(1, len(ids)),
        Timings(0.0, 0.0, 0.0),
        (),
        (),
        0,
        tuple(scores),
    )


def _request(*arms):
    return CompareRequest("r", Prompt(text="x"), SamplingParams(), tuple(arms))


@given(a=_IDS, b=_IDS)
def test_texts_diverge_where_their_common_beginning_ends(a, b):
    place = first_divergence(a, b)
    if place is None:
        assert a == b
    else:
        assert a[:place] == b[:place]
        assert a[place : place + 1] != b[place : place + 1]


@pytest.mark.parametrize(
    ("a", "b", "place"),
    [((1, 2), (1, 2), None), ((), (), None), ((1, 2), (1, 3), 1), ((1,), (1, 2), 1), ((), (5,), 0)],
)
def test_a_text_that_begins_another_diverges_at_its_end(a, b, place):
    assert first_divergence(a, b) == first_divergence(b, a) == place


@given(values=_VALUES, share=st.floats(0.0, 1.0))
def test_percentiles_are_those_of_numpy(values, share):
    assert percentile(values, share) == pytest.approx(float(np.quantile(values, share)), rel=1e-9, abs=1e-9)


@given(logprobs=st.lists(st.floats(-20.0, 0.0), min_size=1, max_size=30))
def test_perplexity_is_the_inverse_of_the_mean_probability_of_a_token(logprobs):
    found = perplexity([Score(0.0, value, 0.0) for value in logprobs])
    assert found == pytest.approx(math.prod(math.exp(value) for value in logprobs) ** (-1 / len(logprobs)), rel=1e-6)


def test_a_fair_coin_has_perplexity_two():
    assert perplexity([Score(0.0, math.log(0.5), 0.0)] * 5) == pytest.approx(2.0)


@pytest.mark.parametrize("logprob", [-1e4, -1e300, -math.inf])
def test_a_text_that_is_impossible_to_the_model_has_an_infinite_perplexity(logprob):
    assert perplexity([Score(0.0, logprob, 0.0)] * 3) == math.inf
    found = compare_completions(_completion([1]), _completion([1], [Score(0.0, logprob, 0.0)]), "loud")
    assert found.steered_perplexity == math.inf


def test_the_largest_perplexity_is_still_a_number():
    assert perplexity([Score(0.0, -690.0, 0.0)]) == pytest.approx(math.exp(690.0))


def test_what_was_not_scored_has_no_perplexity():
    assert perplexity([]) is None


def test_two_texts_are_held_against_each_other():
    normal = _completion([1, 2, 3], [Score(0.0, math.log(0.5), 0.0)] * 3)
    steered = _completion([1, 9, 3], [Score(kl, math.log(0.25), 0.0) for kl in (0.0, 3.0, 1.5)])
    found = compare_completions(normal, steered, "loud")
    assert found.arm == "loud"
    assert found.first_divergence == 1
    assert found.kl_per_token == (0.0, 3.0, 1.5)
    assert found.kl_mean == pytest.approx(1.5)
    assert found.kl_p95 == pytest.approx(float(np.quantile([0.0, 3.0, 1.5], 0.95)))
    assert found.normal_perplexity == pytest.approx(2.0)
    assert found.steered_perplexity == pytest.approx(4.0)


def test_what_was_not_scored_has_no_divergence_measure():
    found = compare_completions(_completion([1]), _completion([1]), "loud")
    assert found.first_divergence is None
    assert found.kl_per_token == ()
    assert found.kl_mean is found.kl_p95 is found.normal_perplexity is found.steered_perplexity is None


@pytest.mark.parametrize(
    ("arms", "field"),
    [
        ((Arm("", _USE),), "arms[0].name"),
        ((Arm("normal", _USE),), "arms[0].name"),
        ((Arm("a", _USE), Arm("normal", _USE)), "arms[1].name"),
        ((Arm("a", _USE), Arm("b", _USE), Arm("b", _USE)), "arms[1].name"),
        ((Arm("a", _USE), Arm("b", ())), "arms[1].operators"),
        ((Arm("a", (), ArmSampling(time_limit=1.0)),), "arms[0].sampling.time_limit"),
        ((Arm("a", (), ArmSampling(top_p=0.0)),), "arms[0].sampling.top_p"),
    ],
)
def test_arms_need_names_of_their_own_and_operators_or_a_sampling(arms, field):
    with pytest.raises(InvalidRequestError) as caught:
        _request(*arms)
    assert caught.value.field == field


async def test_more_arms_than_are_accepted_are_refused_before_any_work():
    request = _request(*(Arm(f"arm-{place}", _USE) for place in range(3)))
    with pytest.raises(InvalidRequestError, match="3 arms; at most 2") as caught:
        await anext(compare(None, None, request, max_arms=2))
    assert caught.value.field == "arms"


def test_without_the_plain_arm_another_is_needed_and_the_plain_one_may_be_alone():
    assert _request().arms == ()
    with pytest.raises(InvalidRequestError, match="arms: is empty; without the plain arm"):
        CompareRequest("r", Prompt(text="x"), SamplingParams(), (), normal=False)


@pytest.mark.parametrize(
    ("arms", "n", "normal", "problem"),
    [
        (2, 1, True, None),
        (3, 1, False, None),
        (4, 1, False, "arms: has 4 arms; at most 3 are accepted"),
        (0, 3, True, None),
        (1, 1, True, None),
        (1, 2, True, "n: is 2, which makes 4 texts of a prompt; at most 3 are accepted"),
        (0, 4, True, "n: is 4, which makes 4 texts of a prompt; at most 3 are accepted"),
    ],
)
def test_every_sample_of_every_arm_counts_as_a_text(arms, n, normal, problem):
    named = tuple(Arm(f"arm-{place}", _USE) for place in range(arms))
    request = CompareRequest("r", Prompt(text="x"), SamplingParams(), named, n=n, normal=normal)
    if problem is None:
        check_size(request, 2)
        return
    with pytest.raises(InvalidRequestError) as caught:
        check_size(request, 2)
    assert str(caught.value) == problem


def test_a_sample_has_the_seed_behind_the_one_before():
    seeds = [SamplingParams(seed=2**64 - 2).of_sample(number).seed for number in range(4)]
    assert seeds == [2**64 - 2, 2**64 - 1, 0, 1]


def test_an_arm_has_all_of_its_own_sampling_and_the_seed_of_the_request_where_it_names_none():
    whole = SamplingParams(temperature=0.5, seed=7, max_tokens=3, time_limit=2.0)
    assert ArmSampling(top_k=4).within(whole) == SamplingParams(top_k=4, seed=7)
    assert ArmSampling(seed=0).within(whole).seed == 0


def test_a_text_without_a_plain_one_beside_it_is_scored_and_has_no_divergence():
    found = compare_completions(None, _completion([1], [Score(0.5, math.log(0.25), 0.0)]), "loud")
    assert found.first_divergence is found.normal_perplexity is None
    assert (found.kl_mean, found.steered_perplexity) == (0.5, pytest.approx(4.0))
