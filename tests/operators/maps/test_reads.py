"""What an operator reads, against matrices written out and products taken one by one."""

import pytest
import torch

from operators.builder.build import build_operator
from operators.builder.concept import concept_from_text
from operators.builder.spec import BuildSpec
from operators.maps.jacobian import detached_jacobian
from operators.maps.reads import concept_terms, read_direction, term_sizes
from operators.model.loading import block_input, embed

N, D, R = 4, 6, 3


def _random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("low_rank", [False, True])
def test_w_says_how_far_each_embedding_moves_the_result_along_y(low_rank):
    factors = _random(N, R if low_rank else D, D)
    basis = torch.linalg.qr(_random(D, R, seed=1)).Q if low_rank else None
    y, table = _random(D, seed=2), _random(9, D, seed=3)
    last = basis @ factors[-1] if low_rank else factors[-1]
    expected = [float((last @ x) @ y) / float(y @ y) ** 0.5 for x in table]
    assert (table @ read_direction(factors, basis, y)).tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("m", [1, 3, N])
def test_the_terms_of_a_text_are_those_of_the_last_blocks(low_rank, m):
    factors = _random(N, R if low_rank else D, D)
    basis = torch.linalg.qr(_random(D, R, seed=1)).Q if low_rank else None
    x = _random(m, D, seed=4)
    whole = factors if basis is None else torch.stack([basis @ block for block in factors])
    expected = torch.stack([whole[N - m + k] @ x[k] for k in range(m)])
    torch.testing.assert_close(concept_terms(factors, basis, x), expected, rtol=1e-12, atol=1e-12)


def test_sizes_are_norm_cosine_and_share_and_a_term_of_zero_has_cosine_0():
    found = term_sizes(torch.tensor([[3.0, 4.0], [0.0, 0.0], [-2.0, 0.0]]), torch.tensor([2.0, 0.0]))
    assert [(one.norm, one.cosine, one.share) for one in found] == [
        (5.0, pytest.approx(0.6), pytest.approx(1.5)),
        (0.0, 0.0, 0.0),
        (2.0, -1.0, -1.0),
    ]


def test_a_y_of_zero_has_no_direction():
    with pytest.raises(ZeroDivisionError, match="y is zero"):
        read_direction(_random(N, D, D), None, torch.zeros(D))


def test_the_shares_of_one_text_and_of_c_add_up_to_1(tiny, family):
    loaded = tiny(family)
    ids = concept_from_text("The Golden Gate", loaded).ids
    exact = detached_jacobian(loaded.model, ids, layer=2, profile="residual")
    sizes = term_sizes(concept_terms(exact.jacobian, None, exact.x), exact.y)
    offset = float(exact.y @ exact.offset / (exact.y @ exact.y))
    assert sum(size.share for size in sizes) + offset == pytest.approx(1.0, abs=1e-12)


def test_an_operator_of_low_rank_gives_its_own_text_back(tiny):
    loaded = tiny("llama", dtype="float32")
    concept = concept_from_text("The Golden Gate", loaded)
    operator = build_operator(BuildSpec((concept,), layer=2, rank=5), loaded)
    x = block_input(loaded.model, embed(loaded.model, torch.tensor(concept.ids)))
    sizes = term_sizes(concept_terms(operator.factors, operator.basis, x), operator.anchor)
    assert sum(size.share for size in sizes) == pytest.approx(1.0, abs=1e-5)
