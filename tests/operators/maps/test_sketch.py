"""The sketch against dense linear algebra: the Jacobian written out, its SVD, and scipy's."""

from dataclasses import dataclass

import pytest
import torch
from scipy.sparse.linalg import LinearOperator, svds

from operators.maps.jacobian import detached_jacobian, relative_error
from operators.maps.replay import Replay
from operators.maps.sketch import OVERSAMPLE, POWER_ITERATIONS, PROBES, LowRankMap, embedding_root, num_products, sketch
from operators.model.loading import LoadedModel

IDS = (277, 12, 290, 65, 278, 69, 317)
# d = 40, 48, 32 and 40; the last is affine.
SOME_FAMILIES = ["llama", "gemma3", "qwen3", "gpt2"]
KINDS = ["white", "weighted"]


@dataclass(frozen=True)
class Case:
    replay: Replay
    dense: torch.Tensor
    root: torch.Tensor | None

    @property
    def weighted(self) -> torch.Tensor:
        """J C^{1/2}, (n, d, d); J itself where the test vectors are white."""
        return self.dense if self.root is None else self.dense @ self.root

    def sketch(self, rank: int, seed: int = 0, power_iterations: int = POWER_ITERATIONS) -> LowRankMap:
        return sketch(self.replay, rank, root=self.root, seed=seed, power_iterations=power_iterations)


def _case(loaded: LoadedModel, kind: str, ids: tuple[int, ...] = IDS, layer: int = 2) -> Case:
    root = embedding_root(loaded.model.get_input_embeddings().weight) if kind == "weighted" else None
    dense = detached_jacobian(loaded.model, ids, layer=layer, profile="residual").jacobian
    return Case(Replay(loaded.model, ids, layer=layer, profile="residual"), dense.double(), root)


@pytest.fixture
def make_case(tiny):
    return lambda family, kind="white", ids=IDS: _case(tiny(family), kind, ids)


def _wide(blocks: torch.Tensor) -> torch.Tensor:
    """[J_0 ... J_{n-1}], (d, n d)."""
    return blocks.transpose(0, 1).flatten(1)


def _error(case: Case, found: LowRankMap) -> tuple[float, float]:
    """Of the sketch, and the least of any matrix of that rank (Eckart and Young), in the norm that it was made for."""
    left = case.dense - found.basis.double() @ found.factors.double()
    left = left if case.root is None else left @ case.root
    sigma = torch.linalg.svdvals(_wide(case.weighted))
    return float(left.norm()), float(sigma[found.basis.shape[1] :].norm())


@pytest.mark.parametrize("rank", [2, 8, 20])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_the_error_is_at_most_a_fifth_above_the_least_possible(make_case, family, kind, rank):
    case = make_case(family, kind)
    found = case.sketch(rank)
    error, least = _error(case, found)
    assert 0 < least <= error * (1 + 1e-12)
    assert error <= 1.2 * least
    assert torch.allclose(found.basis.T @ found.basis, torch.eye(rank, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_a_weighted_sketch_is_better_than_a_white_one_where_it_counts(make_case, family):
    weighted = make_case(family, "weighted")
    white = sketch(weighted.replay, 8, root=None)
    assert _error(weighted, weighted.sketch(8))[0] < _error(weighted, white)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_the_full_rank_leaves_no_residual(make_case, family, kind):
    case = make_case(family, kind)
    found = case.sketch(case.replay.shape[1])
    assert relative_error(found.basis @ found.factors, case.dense) <= 1e-12
    assert max(found.residuals) <= 1e-12


@pytest.mark.parametrize("rank", [1, 5, 16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_the_stated_residual_is_the_true_one_within_a_fifth(make_case, family, kind, rank):
    case = make_case(family, kind)
    found = case.sketch(rank)
    left = (case.dense - found.basis @ found.factors).flatten(1).norm(dim=1)
    true = left / case.dense.flatten(1).norm(dim=1)
    assert len(found.residuals) == len(IDS)
    for stated, residual in zip(found.residuals, true.tolist(), strict=True):
        assert stated == pytest.approx(residual, rel=0.2)


@pytest.mark.parametrize("rank", [1, 2, 7])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_at_the_concept_any_rank_is_exact(make_case, family, kind, rank):
    case = make_case(family, kind)
    found = case.sketch(rank)
    value = found.basis @ torch.einsum("nrd,nd->r", found.factors, case.replay.x) + case.replay.offset
    assert relative_error(value, case.replay.y) <= 1e-12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_singular_values_that_have_converged_are_those_of_scipy(make_case, family, kind):
    case, rank, iterations = make_case(family, kind), 8, 16
    found = case.sketch(rank, power_iterations=iterations).singular_values
    n, d = case.replay.shape
    root = torch.eye(d, dtype=torch.float64) if case.root is None else case.root
    operator = LinearOperator(
        shape=(d, n * d),
        dtype="float64",
        matvec=lambda v: case.replay.jvp(torch.from_numpy(v).view(1, n, d) @ root.T)[0].numpy(),
        rmatvec=lambda u: (case.replay.vjp(torch.from_numpy(u).view(1, d)) @ root).flatten().numpy(),
    )
    values = svds(operator, k=rank, tol=1e-12, rng=0, return_singular_vectors=False)
    expected = torch.tensor(sorted(values, reverse=True))
    # A sketch of l columns and q power iterations misses sigma_k by about (sigma_{l+1}/sigma_k)^{4q}.
    columns = rank + OVERSAMPLE
    assert len(found) == columns
    beyond = torch.linalg.svdvals(_wide(case.weighted))[columns - 1]
    converged = (beyond / expected) ** (4 * iterations) <= 1e-7
    assert int(converged.sum()) >= 2
    assert torch.allclose(found[:rank][converged], expected[converged], rtol=1e-6, atol=0)


@pytest.mark.parametrize(("family", "ids"), [("llama", IDS), ("llama", IDS[:1]), ("llama", IDS * 5), ("gemma3", IDS)])
def test_the_cost_depends_on_the_rank_alone(make_case, family, ids):
    case = make_case(family, ids=ids)
    for rank, power_iterations in ((1, 1), (8, 1), (8, 3)):
        before = case.replay.products
        case.sketch(rank, power_iterations=power_iterations)
        columns = rank + OVERSAMPLE
        expected = num_products(rank, case.replay.shape[1], power_iterations=power_iterations)
        assert case.replay.products - before == expected == columns * (1 + 2 * power_iterations) + PROBES


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_one_sketch_and_another_seed_another(make_case, kind):
    case = make_case("llama", kind)
    first, again, other = case.sketch(5), case.sketch(5), case.sketch(5, seed=1)
    assert torch.equal(first.basis, again.basis)
    assert torch.equal(first.factors, again.factors)
    assert first.residuals == again.residuals
    assert not torch.equal(first.factors, other.factors)


@pytest.mark.parametrize("rank", [0, -1, 41])
def test_a_rank_outside_the_width_is_refused(make_case, rank):
    with pytest.raises(ValueError, match=f"rank is {rank}; 1 to 40 are accepted"):
        make_case("llama").sketch(rank)


def test_the_root_squared_is_the_second_moment_of_the_table(tiny):
    table = tiny("llama").model.get_input_embeddings().weight
    root = embedding_root(table)
    moment = torch.einsum("vi,vj->ij", table, table) / len(table)
    assert relative_error(root @ root.T, moment / moment.diagonal().mean()) <= 1e-12
    assert torch.equal(root, root.tril())
    # Fewer rows than columns: the moment is singular, and has no factor of Cholesky's.
    few = table[:5]
    root = embedding_root(few)
    moment = torch.einsum("vi,vj->ij", few, few) / 5
    assert relative_error(root @ root.T, moment / moment.diagonal().mean()) <= 1e-7
    # In float32 the sums are float32's.
    single = embedding_root(table.float())
    assert relative_error(single @ single.T, embedding_root(table) @ embedding_root(table).T) <= 1e-6


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_a_range_found_in_bfloat16_is_as_good_and_its_certificate_is_of_products_in_float32(tiny, family):
    loaded = tiny(family, dtype="float32")
    case = _case(loaded, "weighted")
    rounded = sketch(case.replay, 8, root=case.root, rounded_to=torch.bfloat16)
    exact = case.sketch(8)
    assert not torch.equal(rounded.basis, exact.basis)
    error, least = _error(case, rounded)
    assert error <= 1.2 * least
    # The factors are U^T J of the map in float32, and the residual is what they leave.
    torch.testing.assert_close(
        rounded.factors.double(), torch.einsum("dr,nde->nre", rounded.basis.double(), case.dense), rtol=0, atol=2e-5
    )
    left = (case.dense - rounded.basis.double() @ rounded.factors.double()).norm() / case.dense.norm()
    assert rounded.residual == pytest.approx(float(left), rel=0.3)
    # Outside of the sketch nothing is rounded any more.
    assert torch.equal(case.sketch(8).factors, exact.factors)


@pytest.mark.model
@pytest.mark.parametrize("kind", KINDS)
def test_the_default_model_is_sketched_as_well(smollm, kind):
    loaded = smollm("float32")
    ids = tuple(loaded.tokenizer("The Golden Gate Bridge in San")["input_ids"])
    case = _case(loaded, kind, ids, layer=6)
    found = case.sketch(64)
    error, least = _error(case, found)
    assert error <= 1.2 * least
    value = found.basis @ torch.einsum("nrd,nd->r", found.factors, case.replay.x)
    assert relative_error(value, case.replay.y) <= 5e-6
    left = (case.dense - found.basis.double() @ found.factors.double()).flatten(1).norm(dim=1)
    true = left / case.dense.flatten(1).norm(dim=1)
    assert found.residuals == pytest.approx(true.tolist(), rel=0.2)
