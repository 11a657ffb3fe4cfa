"""Scores of a text's tokens, from the last hidden states of two requests and a matrix that makes logits of them."""

import pytest
import torch

from steer_server.engine.vllm.worker.scoring import KeptStates, score_states

VOCABULARY, WIDTH = 11, 6
HEAD = torch.randn(WIDTH, VOCABULARY, generator=torch.Generator().manual_seed(9))
IDS = (3, 0, 10, 7, 3)


def states(seed, length=5):
    return torch.randn(length, WIDTH, generator=torch.Generator().manual_seed(seed))


def kept(rows, first=4):
    found = KeptStates(first)
    found.add(rows, first)
    return found


def numbers(scores):
    """KL and the log-probabilities under the plain and the steered model, each of all tokens."""
    return [[getattr(each, name) for each in scores] for name in ("kl", "plain_logprob", "logprob")]


def logits_of(rows):
    return rows @ HEAD


def test_kl_and_log_probabilities_are_those_of_the_two_distributions():
    steered, plain = states(1), states(2)
    p, q = (torch.distributions.Categorical(logits=rows @ HEAD) for rows in (plain, steered))
    kl, plain_logprobs, logprobs = numbers(score_states(logits_of, kept(steered), kept(plain), IDS, 0))
    assert kl == pytest.approx(torch.distributions.kl_divergence(p, q).tolist(), rel=1e-4)
    assert plain_logprobs == pytest.approx(p.log_prob(torch.tensor(IDS)).tolist(), rel=1e-5)
    assert logprobs == pytest.approx(q.log_prob(torch.tensor(IDS)).tolist(), rel=1e-5)


def test_a_text_may_be_scored_in_pieces_and_more_than_once():
    steered, plain = kept(states(1)), kept(states(2))
    whole = score_states(logits_of, steered, plain, IDS, 0)
    pieces = [each for at in (0, 2, 4) for each in score_states(logits_of, steered, plain, IDS[at : at + 2], at)]
    for found, expected in zip(numbers(pieces), numbers(whole), strict=True):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_only_the_positions_asked_for_meet_the_vocabulary():
    rows = []

    def counted(some):
        rows.append(len(some))
        return logits_of(some)

    score_states(counted, kept(states(1)), kept(states(2)), IDS[1:3], 1)
    assert rows == [2, 2]


def test_a_state_that_was_not_kept_is_told():
    with pytest.raises(ValueError, match="2 tokens are to be scored; 1 and 2 states were kept"):
        score_states(logits_of, kept(states(1, 4)), kept(states(2)), IDS[3:], 3)


def test_a_rank_without_the_logits_has_no_scores():
    assert score_states(lambda _: None, kept(states(1)), kept(states(2)), IDS, 0) == []


def test_states_that_come_once_more_are_kept_once():
    rows = states(3, 8)
    found = KeptStates(2)
    for first, count in ((2, 3), (3, 3), (2, 1), (6, 2)):
        found.add(rows[first - 2 : first - 2 + count], first)
    assert torch.equal(torch.stack(found.states), rows[:6])


def test_states_that_follow_a_gap_are_not_taken_for_those_of_the_gap():
    found = kept(states(3, 2))
    found.add(states(4, 5), 7)
    with pytest.raises(ValueError, match="3 tokens are to be scored; 2 and 3 states were kept"):
        score_states(logits_of, found, kept(states(2)), IDS[:3], 0)
