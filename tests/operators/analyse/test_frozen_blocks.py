"""The maps of blocks and of their parts, and singular values, against what they must be."""

import contextlib

import pytest
import torch

from operators.analyse import spectra
from operators.analyse.frozen_blocks import TARGETS, FrozenBlocks, ordinary_product
from operators.analyse.layers import layer_matrices, settled_layer
from operators.analyse.threads import one_thread
from operators.core.errors import AnalysisError
from operators.maps.jacobian import detached_jacobian, ordinary_jacobian, relative_error
from operators.maps.replay import Replay
from operators.model.loading import decoder_layers
from tests.odd_models import odd_model

# Longer than the sliding window of the tiny Gemma.
IDS = (277, 12, 290, 65, 278)


def _close(found, expected):
    """Up to rounding; a map may be zero where a sliding window ends."""
    return float((found - expected).norm()) <= 1e-12 * max(1.0, float(expected.norm()))


def test_a_block_is_the_identity_plus_its_attention_plus_its_mlp(tiny, family):
    loaded = tiny(family)
    unit = torch.eye(loaded.hidden_size, dtype=torch.float64)
    for matrices in layer_matrices(FrozenBlocks(loaded.model, IDS)):
        for place, identity in (("last", unit), ("first", torch.zeros_like(unit))):
            parts = matrices["single", "attention", place] + matrices["single", "mlp", place]
            assert _close(identity + parts, matrices["single", "block", place])


def test_the_cumulative_maps_are_those_of_the_exact_jacobian(tiny, family):
    loaded = tiny(family)
    for layer, matrices in enumerate(layer_matrices(FrozenBlocks(loaded.model, IDS)), start=1):
        exact = detached_jacobian(loaded.model, IDS, layer=layer, profile="residual").jacobian
        assert _close(matrices["cumulative", "block", "last"], exact[-1])
        assert _close(matrices["cumulative", "block", "first"], exact[0])


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_single_layer_maps_compose_to_the_cumulative_one(tiny, family):
    loaded = tiny(family)
    frozen = FrozenBlocks(loaded.model, IDS)
    num_layers, n, d = frozen.shape
    unit = torch.eye(n * d, dtype=torch.float64)
    # The whole map of each block, over all positions, from the columns of the identity.
    whole = [frozen.jvp(layer, unit.view(-1, n, d), range(n)).block.reshape(-1, n * d).T for layer in (1, 2, 3)]
    product = whole[2] @ whole[1] @ whole[0]
    exact = detached_jacobian(loaded.model, IDS, layer=3, profile="residual").jacobian
    assert relative_error(product[-d:].view(d, n, d).transpose(0, 1), exact) <= 1e-12
    assert num_layers >= 3


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_positions_that_are_zero_need_not_be_computed(tiny, family):
    frozen = FrozenBlocks(tiny(family).model, IDS)
    _, n, d = frozen.shape
    columns = torch.randn(3, 2, d, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    spread = torch.zeros(3, n, d, dtype=torch.float64)
    spread[:, [0, n - 1]] = columns
    cut, whole = frozen.jvp(2, columns, [0, n - 1]), frozen.jvp(2, spread, range(n))
    for target in TARGETS:
        assert relative_error(cut.last(target), whole.last(target)) <= 1e-13


def test_outputs_at_the_last_position_alone_are_those_of_all(tiny, family):
    frozen = FrozenBlocks(tiny(family).model, IDS)
    tangents = torch.randn(4, 2, frozen.shape[2], dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    places = [len(IDS) - 3, len(IDS) - 1]
    last, whole = frozen.jvp(2, tangents, places, last_only=True), frozen.jvp(2, tangents, places)
    for target in TARGETS:
        assert relative_error(last.last(target), whole.last(target)) <= 1e-13


def test_one_thread_computes_and_the_others_come_back():
    before = torch.get_num_threads()
    with contextlib.suppress(KeyError), one_thread():
        assert torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == before


def test_the_recorded_parts_add_up_to_the_models_own_stream(tiny, family):
    loaded = tiny(family)
    frozen = FrozenBlocks(loaded.model, IDS)
    with torch.no_grad():
        own = loaded.model.get_decoder()(input_ids=torch.tensor([IDS]), output_hidden_states=True).hidden_states
    assert relative_error(frozen.stream(0), own[0][0]) <= 1e-14
    for layer in range(1, frozen.shape[0]):
        assert relative_error(frozen.stream(layer), own[layer][0]) <= 1e-5
        state = frozen.states[layer - 1]
        total = frozen.stream(layer - 1)[-1] + state.attention[0] + state.mlp[0]
        assert relative_error(total, frozen.stream(layer)[-1]) <= 1e-13


def test_one_token_has_one_map_for_first_and_last(tiny):
    for matrices in layer_matrices(FrozenBlocks(tiny("llama").model, (9,))):
        for target in TARGETS:
            for scope in ("single", "cumulative"):
                assert torch.equal(matrices[scope, target, "first"], matrices[scope, target, "last"])


def test_a_block_whose_parts_do_not_add_up_is_refused(tiny):
    model = tiny("llama", fresh=True).model
    decoder_layers(model)[1].register_forward_hook(lambda _module, _args, output: 2 * output)
    with pytest.raises(AnalysisError, match="block 2 is not its input plus its attention plus its MLP"):
        FrozenBlocks(model, IDS)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "qwen3_moe"])
def test_one_product_is_the_sum_over_the_ordinary_jacobian(tiny, family, attention):
    model = tiny(family, attention).model
    summed = ordinary_jacobian(model, IDS, layer=3, profile="golden").reconstruction
    # transformers' own norms compute in float32.
    assert relative_error(ordinary_product(model, IDS, layer=3, profile="golden"), summed) <= 1e-5


def _matrix(sigmas, d=24, seed=3):
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=generator)).Q for _ in range(2))
    values = torch.zeros(d, dtype=torch.float64)
    values[: len(sigmas)] = torch.tensor(sigmas, dtype=torch.float64)
    return left * values @ right.T, left, right


@pytest.mark.parametrize("find", [spectra.full_spectrum, lambda matrix: spectra.leading_triplets(matrix, 2)])
@pytest.mark.parametrize(
    ("sigmas", "stable_rank"), [([7.0], 1.0), ([2.0] * 24, 24.0), ([2.0, 1.0, 1.0], 1.5), ([10.0, 5.0], 1.25)]
)
def test_stable_ranks_are_those_of_known_matrices(find, sigmas, stable_rank):
    assert find(_matrix(sigmas)[0]).stable_rank == pytest.approx(stable_rank, rel=1e-9)


def test_a_map_that_is_zero_has_no_stable_rank():
    for found in (spectra.full_spectrum(torch.zeros(5, 5)), spectra.leading_triplets(torch.zeros(5, 5), 2)):
        assert found.stable_rank is None
        assert float(found.values[0]) == 0


def test_the_leading_triplets_are_those_of_the_matrix():
    sigmas = [0.9**k for k in range(200)]
    matrix, left, right = _matrix(sigmas, d=200)
    found = spectra.leading_triplets(matrix, 3)
    assert found.values.tolist() == pytest.approx(sigmas[:3], rel=1e-9)
    for k in range(3):
        assert abs(float(found.left[k] @ left[:, k])) == pytest.approx(1, abs=1e-6)
        assert abs(float(found.right[k] @ right[:, k])) == pytest.approx(1, abs=1e-6)
        # Of one pair, both signs or none.
        assert relative_error(matrix @ found.right[k], found.values[k] * found.left[k]) <= 1e-5


def test_the_largest_singular_value_of_a_flat_spectrum_is_accurate():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.eye(300, dtype=torch.float64) + 0.01 * torch.randn(
        300, 300, dtype=torch.float64, generator=generator
    )
    top = float(torch.linalg.matrix_norm(matrix, 2))
    assert 0.99 * top <= float(spectra.leading_triplets(matrix, 1).values[0]) <= top * (1 + 1e-12)


def test_the_sign_of_a_pair_is_that_of_the_embedding():
    matrix, _, _ = _matrix([3.0, 1.0])
    for x in (torch.ones(24, dtype=torch.float64), -torch.ones(24, dtype=torch.float64)):
        found = spectra.full_spectrum(matrix).facing(x)
        assert (found.right @ x >= 0).all()
        assert relative_error((found.left.T * found.values) @ found.right, matrix) <= 1e-12


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_sketch_finds_what_the_exact_spectrum_has(tiny, family):
    model = tiny(family).model
    exact = [
        spectra.full_spectrum(matrix) for matrix in detached_jacobian(model, IDS, layer=4, profile="golden").jacobian
    ]
    found = spectra.sketched_spectra(Replay(model, IDS, layer=4, profile="golden"), 2)
    assert len(found) == len(IDS)
    for sketch, whole in zip(found, exact, strict=True):
        assert 0.98 * whole.values[0] <= sketch.values[0] <= whole.values[0] * (1 + 1e-9)
        assert sketch.stable_rank == pytest.approx(whole.stable_rank, rel=0.1)
        assert abs(float(sketch.left[0] @ whole.left[0])) > 0.95


@pytest.mark.parametrize(
    ("ranks", "layer"),
    [([3, 2, 1, 1], 3), ([1, 1, 1], 1), ([1, 2, 1], 3), ([1, 1, 2], None), ([None, 1], 2), ([1, None], None)],
)
def test_an_answer_has_settled_from_the_layer_after_which_it_never_leaves_the_top(ranks, layer):
    assert settled_layer(ranks) == layer


@pytest.mark.parametrize("name", ["granite", "glm4", "gpt_oss", "deepseek_v3", "gpt_neox"])
def test_parts_are_told_apart_however_a_block_adds_them(name):
    model = odd_model(name)
    blocks = FrozenBlocks(model, (77, 12, 90, 65))
    for layer, state in enumerate(blocks.states, start=1):
        parts = blocks.stream(layer - 1)[-1] + state.attention[0] + state.mlp[0]
        assert relative_error(parts, state.block[0, -1]) <= 1e-12
    product = ordinary_product(model, (77, 12, 90), layer=3, profile="residual")
    summed = ordinary_jacobian(model, (77, 12, 90), layer=3, profile="residual").reconstruction
    assert relative_error(product, summed) <= 1e-5
