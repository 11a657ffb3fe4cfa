"""Low-rank operators and operators of several texts, from the builder to the steering equation."""

import math

import pytest
import torch

from operators.builder import spec as build_spec
from operators.builder.build import build_operator
from operators.builder.concept import Concept, concept_from_text
from operators.builder.memory import MemoryEstimate, estimate_exact, estimate_sketch, range_dtype, rows_within
from operators.builder.spec import BuildSpec
from operators.builder.verify import verify_operator
from operators.core.apply import Direction, Setting, prepare
from operators.core.artifact import from_bytes, make_artifact, to_bytes
from operators.core.capacity import parse_bytes
from operators.core.errors import BuildError, ReconstructionError
from operators.maps import sketch as sketching
from operators.maps.jacobian import detached_jacobian
from operators.maps.sketch import TOLERANCE_PROBES, num_products
from operators.model.loading import block_input, embed

SOME_FAMILIES = ["llama", "qwen2", "gemma3", "gpt2"]
TEXTS = ["The Golden Gate Bridge", "Here is a painting of the bridge, and here is a painting of the bay."]


def _concepts(loaded, texts=TEXTS[:1]):
    return tuple(concept_from_text(text, loaded) for text in texts)


@pytest.mark.parametrize("family", SOME_FAMILIES)
@pytest.mark.parametrize("profile", ["golden", "residual"])
@pytest.mark.parametrize("size", [{"rank": 1}, {"rank": 7}, {"tolerance": 0.4}])
def test_an_operator_of_any_rank_is_exact_at_its_concept_and_survives_its_file(tiny, family, profile, size):
    loaded = tiny(family)
    artifact = build_operator(BuildSpec(_concepts(loaded), profile, layer=2, **size), loaded)
    read = from_bytes(to_bytes(artifact), source="x")
    assert verify_operator(read, loaded) <= 1e-12
    assert read.digest == artifact.digest
    assert read.factors.shape[1] == read.basis.shape[1] == read.header.low_rank.rank
    x = block_input(loaded.model, embed(loaded.model, torch.tensor(read.header.concept_ids)))
    y = torch.einsum("nij,nj->i", read.jacobian(), x) + (0 if read.offset is None else read.offset)
    torch.testing.assert_close(y, read.anchor, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", ["cumulative", "substitute"])
@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_a_low_rank_operator_steers_as_the_dense_one_that_it_stands_for(tiny, family, rule):
    loaded = tiny(family)
    low = build_operator(BuildSpec(_concepts(loaded), layer=2, rank=5), loaded)
    header = low.header.model_copy(update={"low_rank": None})
    dense = make_artifact(header, low.jacobian(), low.anchor, low.substitute_base, low.offset, neutral=low.neutral)
    x = block_input(loaded.model, embed(loaded.model, torch.arange(20)))
    pieces = []
    for artifact in (low, dense):
        direction = Direction(prepare(artifact, torch.device("cpu")), Setting(0.5, rule, 0.25))
        pieces.append(torch.cat([direction.advance(part) for part in x.split([7, 1, 12])]))
    torch.testing.assert_close(*pieces, rtol=1e-4, atol=1e-5)


def test_a_tolerance_gives_the_smallest_rank_that_keeps_it(tiny):
    loaded = tiny("llama")
    (concept,) = _concepts(loaded)
    exact = detached_jacobian(loaded.model, concept.ids, layer=2, profile="residual").jacobian
    artifact = build_operator(BuildSpec((concept,), layer=2, tolerance=0.3), loaded)
    found = float((artifact.jacobian() - exact).norm() / exact.norm())
    assert 0.2 < found <= 0.3
    smaller = build_operator(BuildSpec((concept,), layer=2, rank=artifact.header.low_rank.rank - 1), loaded)
    assert float((smaller.jacobian() - exact).norm() / exact.norm()) > 0.3 * 0.95


def test_a_tolerance_that_only_the_exact_operator_keeps_gives_the_exact_operator(tiny):
    loaded = tiny("llama")
    assert build_operator(BuildSpec(_concepts(loaded), layer=2, tolerance=1e-6), loaded).basis is None


@pytest.mark.parametrize("rank", ["full", 9])
@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_several_texts_give_the_right_aligned_mean_of_their_maps(tiny, family, rank):
    loaded = tiny(family)
    concepts = _concepts(loaded, TEXTS)
    artifact = build_operator(BuildSpec(concepts, layer=2, rank=rank), loaded)
    maps = [detached_jacobian(loaded.model, concept.ids, layer=2, profile="residual") for concept in concepts]
    n = max(len(concept.ids) for concept in concepts)
    mean = torch.zeros(n, loaded.hidden_size, loaded.hidden_size, dtype=torch.float64)
    for one in maps:
        mean[n - len(one.x) :] += one.jacobian / len(maps)
    basis = torch.eye(loaded.hidden_size, dtype=torch.float64) if artifact.basis is None else artifact.basis
    torch.testing.assert_close(artifact.jacobian(), basis @ (basis.T @ mean), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(artifact.anchor, sum(one.y for one in maps) / len(maps), rtol=1e-12, atol=1e-12)
    last = sum(one.jacobian[-1] @ one.x[-1] for one in maps) / len(maps)
    base = artifact.anchor - basis @ (basis.T @ last)
    torch.testing.assert_close(artifact.substitute_base, base, rtol=1e-10, atol=1e-12)
    assert verify_operator(artifact, loaded) <= 1e-12
    assert [text.text for text in artifact.header.texts] == TEXTS


def test_the_order_of_texts_does_not_change_the_operator(tiny):
    loaded = tiny("llama")
    forwards = build_operator(BuildSpec(_concepts(loaded, TEXTS), layer=2, rank="full"), loaded)
    backwards = build_operator(BuildSpec(_concepts(loaded, TEXTS[::-1]), layer=2, rank="full"), loaded)
    torch.testing.assert_close(forwards.jacobian(), backwards.jacobian(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["factors", "basis", "anchor", "substitute_base", "neutral"])
def test_wrong_numbers_in_any_tensor_of_a_low_rank_operator_are_refused(tiny, name):
    loaded = tiny("llama")
    good = build_operator(BuildSpec(_concepts(loaded, TEXTS), layer=2, rank=6), loaded)
    tensors = {
        "factors": good.factors,
        "basis": good.basis,
        "anchor": good.anchor,
        "substitute_base": good.substitute_base,
        "neutral": good.neutral,
    }
    tensors[name] = tensors[name] * 1.001
    with pytest.raises(ReconstructionError, match="is off by"):
        verify_operator(make_artifact(good.header, **tensors), loaded)


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ({"rank": 0}, r"rank is 0; 1 to 40 \(the hidden size of tiny-llama\) or 'full' are accepted"),
        ({"rank": 41}, r"rank is 41; 1 to 40"),
        ({"tolerance": 0.0}, "tolerance is 0; a number between 0 and 1 is accepted"),
        ({"tolerance": 1.0}, "tolerance is 1; a number between 0 and 1"),
        ({"tolerance": float("nan")}, "tolerance is nan; a number between 0 and 1"),
        ({"rank": 3, "tolerance": 0.1}, "rank 3 and tolerance 0.1 were both given; one is accepted"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(tiny, size, words):
    loaded = tiny("llama")
    with pytest.raises(BuildError, match=words):
        build_operator(BuildSpec((Concept("x", (1, 2)),), **size), loaded)


@pytest.mark.parametrize("size", [{"rank": 8}, {"rank": "full"}, {"tolerance": 0.4}])
def test_little_memory_gives_the_same_operator_in_more_passes(tiny, size):
    loaded = tiny("llama")
    concepts = _concepts(loaded, TEXTS)
    n = max(len(concept.ids) for concept in concepts)
    need = estimate_exact(loaded, n, 2) if size.get("rank") == "full" else estimate_sketch(loaded, n, 2, 104)
    plenty = build_operator(BuildSpec(concepts, layer=2, **size), loaded)
    little = build_operator(BuildSpec(concepts, layer=2, **size), loaded, max_memory=need.fixed + 3 * need.per_row)
    torch.testing.assert_close(little.jacobian(), plenty.jacobian(), rtol=1e-9, atol=1e-11)


def test_the_arrays_that_are_alive_at_once_are_counted(tiny, monkeypatch):
    loaded, n, d, size = tiny("llama", dtype="float32"), 3, 40, 4
    # The tape of two blocks: attention weights of four heads, the inner layer, two norms' scales.
    tape = 2 * n * (4 * n + 56 + 2) * size
    assert estimate_exact(loaded, n, 2).fixed == _resident(tape + 3 * n * d * d * size)
    # C^(1/2) is made from the whole table of 320 tokens, in float64, before the smallest of sketches begins.
    assert estimate_sketch(loaded, n, 2, 1).fixed == _resident(tape + 8 * (5 * d * d + 320 * d))
    # A large one meets it when it is there: in float64, and as narrow as what it weighs.
    large = tape + 5 * 1000 * n * d * size + 2 * 8 * d * d
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert range_dtype(loaded) is None
    assert estimate_sketch(loaded, n, 2, 1000).fixed == _resident(large)
    # And with it the largest weight, rounded.
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert range_dtype(loaded) == torch.bfloat16
    assert estimate_sketch(loaded, n, 2, 1000).fixed == _resident(large + 2 * 56 * d)
    assert range_dtype(tiny("llama")) is None  # in float64
    # Of a long text, recording the attention weights of a block takes more than all that follows.
    long = 4000
    tape = 2 * long * (4 * long + 56 + 2) * size
    assert estimate_sketch(loaded, long, 2, 1).fixed == _resident(tape + 5 * 4 * long * long * size)


def _resident(in_use):
    return (48 << 20) + math.ceil(1.1 * in_use)


def test_too_little_memory_says_what_is_needed(tiny):
    loaded = tiny("llama")
    words = r"the operator of 2 tokens of tiny-llama at layer 2 needs about .* MiB of memory .*; 10 bytes may be used"
    with pytest.raises(BuildError, match=words):
        build_operator(BuildSpec((Concept("x", (1, 2)),), rank=4), loaded, max_memory=10)


def test_a_pass_has_as_many_rows_as_fit():
    assert rows_within(1000, MemoryEstimate(100, 300), 8, "it") == 3
    assert rows_within(10_000, MemoryEstimate(100, 300), 8, "it") == 8


@pytest.mark.parametrize(("text", "size"), [("8GiB", 8 << 30), ("1.5 kb", 1536), ("7", 7), ("2M", 2 << 20)])
def test_sizes_are_read_as_people_write_them(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1 potato", "0", "nan"])
def test_a_text_that_is_no_size_is_refused(text):
    with pytest.raises(BuildError, match="a size such as 8GiB or 500MB is accepted"):
        parse_bytes(text)


@pytest.mark.parametrize("size", [{"rank": "full"}, {"rank": 5}])
def test_a_concept_longer_than_what_its_layer_can_see_is_refused(tiny, size):
    # The tiny Gemma's first layer has a window of 3.
    words = r"the first 4 of the 7 tokens of 'x' do not reach layer 1 .*; concepts of at most 3 tokens, or a later"
    with pytest.raises(BuildError, match=words):
        build_operator(BuildSpec((Concept("x", tuple(range(1, 8))),), layer=1, **size), tiny("gemma3"))
    build_operator(BuildSpec((Concept("x", (1, 2, 3)),), layer=1, **size), tiny("gemma3"))


@pytest.mark.parametrize("change", ["another basis", "a basis that is not orthonormal"])
def test_another_subspace_with_consistent_numbers_is_refused(tiny, change):
    loaded = tiny("llama")
    good = build_operator(BuildSpec(_concepts(loaded, TEXTS), layer=2, rank=6), loaded)
    dense = build_operator(BuildSpec(_concepts(loaded, TEXTS), layer=2, rank="full"), loaded)
    basis = torch.linalg.qr(torch.randn(40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).Q
    basis = basis if change == "another basis" else 2 * good.basis
    last = basis @ (basis.T @ (dense.anchor - dense.substitute_base))
    wrong = make_artifact(
        good.header, basis.T @ dense.factors, good.anchor, good.anchor - last, basis=basis, neutral=good.neutral
    )
    with pytest.raises(ReconstructionError, match=r"tensor 'basis' (misses y - c|is not orthonormal)"):
        verify_operator(wrong, loaded)


def test_a_search_for_a_tolerance_stays_within_the_memory_too(tiny, monkeypatch):
    loaded = tiny("llama")
    monkeypatch.setattr(sketching, "FIRST_RANK", 4)
    monkeypatch.setattr(build_spec, "FIRST_RANK", 4)
    need = estimate_sketch(
        loaded, len(_concepts(loaded)[0].ids), 2, num_products(4, 40, power_iterations=0, probes=TOLERANCE_PROBES)
    )
    spec = BuildSpec(_concepts(loaded), layer=2, tolerance=1e-9)
    with pytest.raises(BuildError, match=r"needs about .* of memory"):
        build_operator(spec, loaded, max_memory=need.fixed + need.per_row)
