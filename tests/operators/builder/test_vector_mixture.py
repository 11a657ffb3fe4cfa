"""Mixtures of vectors, and what cannot be mixed with them."""

import pytest
import torch

from operators.builder.build import build_operator
from operators.builder.combine import WeightedOperator, combine
from operators.builder.concept import concept_from_text
from operators.builder.spec import BuildSpec
from operators.builder.stored import differences
from operators.builder.verify import verify_operator
from operators.core.apply import recommended_setting
from operators.core.errors import BuildError, IncompatibleOperatorError, SettingError
from operators.model.unembedding import loaded_unembedding
from operators.model.words import word_operator


@pytest.fixture
def loaded(tiny):
    return tiny("llama", dtype="float32")


def test_unit_vectors_are_added_with_their_weights(loaded, make_rank_0):
    first, second = (make_rank_0(loaded=loaded, seed=seed) for seed in (1, 2))
    mixed = combine([WeightedOperator("a", first, 2.0), WeightedOperator("b", second, -0.5)], loaded)
    units = [artifact.anchor.double() / artifact.anchor.double().norm() for artifact in (first, second)]
    scale = (first.anchor.double().norm() + second.anchor.double().norm()) / 2
    torch.testing.assert_close(mixed.anchor, (scale * (2 * units[0] - 0.5 * units[1])).float())
    header = mixed.header
    assert (header.vector.method, header.layer, header.recommended.blend) == ("mixture", 2, 1.0)
    assert header.vector.norm == pytest.approx(float(mixed.anchor.double().norm()))
    assert [(member.name, member.digest, member.weight) for member in header.members] == [
        ("a", first.digest, 2.0),
        ("b", second.digest, -0.5),
    ]
    assert header.concept == "+2 happy, not sad; -0.5 happy, not sad"


def test_a_mixture_of_words_without_a_strength_is_no_silent_push_of_0(loaded, make_random_lens):
    lens, rows = make_random_lens(loaded), loaded_unembedding(loaded.model)
    words = [word_operator(lens, {word: 1.0}, rows, loaded.tokenizer) for word in ("bridge", "the")]
    mixed = combine([WeightedOperator(name, word, 1.0) for name, word in zip("ab", words, strict=True)], loaded)
    with pytest.raises(SettingError, match="the lens recommends none"):
        recommended_setting(mixed.header)


def test_a_vector_and_a_map_are_not_mixed(loaded, make_rank_0):
    vector = WeightedOperator("v", make_rank_0(loaded=loaded), 1.0)
    operator = build_operator(BuildSpec((concept_from_text("golden", loaded),), layer=2, rank=2), loaded)
    for members in ((vector, WeightedOperator("m", operator, 1.0)), (WeightedOperator("m", operator, 1.0), vector)):
        with pytest.raises(BuildError, match="one is a vector, which has no map to mix"):
            combine(members, loaded)


def test_what_is_refused_of_maps_is_refused_of_vectors(loaded, make_rank_0, tiny):
    first, second = (make_rank_0(loaded=loaded, seed=seed) for seed in (1, 2))
    one, other = WeightedOperator("a", first, 1.0), WeightedOperator("b", second, 1.0)
    with pytest.raises(BuildError, match="cancel"):
        combine([one, WeightedOperator("b", first, -1.0)], loaded)
    with pytest.raises(BuildError, match="at layer 3"):
        combine([one, WeightedOperator("b", make_rank_0(loaded=loaded, layer=3, injection_layer=3), 1.0)], loaded)
    with pytest.raises(BuildError, match="rank is 3; a mixture of vectors is a vector"):
        combine([one, other], loaded, rank=3)
    with pytest.raises(IncompatibleOperatorError):
        combine([one, WeightedOperator("b", make_rank_0(40), 1.0)], loaded)


def test_no_text_of_a_vector_can_be_computed_anew(loaded, make_rank_0):
    with pytest.raises(BuildError, match="a vector has no map"):
        verify_operator(make_rank_0(loaded=loaded), loaded)


def test_a_vector_in_the_store_is_no_build_of_a_text(loaded, make_rank_0):
    spec = BuildSpec((concept_from_text("golden", loaded),), layer=2, rank="full")
    assert "its texts are others" in differences(make_rank_0(loaded=loaded).header, spec, loaded)
