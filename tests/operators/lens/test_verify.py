"""A stored lens held against its model."""

import dataclasses

import pytest

from operators.core.artifact import Lens, make_lens
from operators.core.errors import BuildError, IncompatibleOperatorError, ModelError, ReconstructionError
from operators.lens.build import check_unembedding, lens_artifact
from operators.lens.matrices import lens_matrices
from operators.lens.verify import verify_lens
from operators.model.unembedding import LoadedUnembedding, loaded_unembedding

TEXTS = ("The bridge is painted.", "Here is the bay.")


@pytest.fixture
def loaded(tiny):
    return tiny("gemma3", dtype="float32")


@pytest.fixture(params=["first", "others", "all"])
def lens(request, loaded):
    mean = loaded_unembedding(loaded.model).mean()
    return lens_artifact(lens_matrices(TEXTS, [2], loaded), request.param, 2, loaded, vocabulary_mean=mean)


def test_it_is_computed_anew(lens, loaded):
    assert verify_lens(lens, loaded, TEXTS, loaded_unembedding(loaded.model)) < 1e-5
    assert lens.header.lens.reconstruction_error < 1e-5


def test_other_numbers_texts_or_models_are_found(lens, loaded, tiny, make_rank_0):
    rows = loaded_unembedding(loaded.model)
    changed = make_lens(lens.header, dataclasses.replace(lens.lens, pull=lens.lens.pull.T.contiguous()))
    with pytest.raises(ReconstructionError, match="'pull' is off"):
        verify_lens(changed, loaded, TEXTS, rows)
    changed = make_lens(lens.header, Lens(lens.lens.pull, lens.lens.vocabulary_mean * 1.01))
    with pytest.raises(ReconstructionError, match="'vocabulary_mean' is off"):
        verify_lens(changed, loaded, TEXTS, rows)
    with pytest.raises(BuildError, match="2 other neutral texts than the 1"):
        verify_lens(lens, loaded, TEXTS[:1], rows)
    with pytest.raises(IncompatibleOperatorError, match="hidden size"):
        verify_lens(lens, tiny("llama", dtype="float32"), TEXTS, rows)
    with pytest.raises(BuildError, match="no lens"):
        verify_lens(make_rank_0(loaded=loaded), loaded, TEXTS, rows)


def test_an_unembedding_that_is_not_the_models_is_found(loaded):
    rows = loaded_unembedding(loaded.model)
    check_unembedding(rows, loaded)
    with pytest.raises(ModelError, match="not the one that the model computes with"):
        check_unembedding(LoadedUnembedding(rows.weight * 1.1, tied=False), loaded)
    with pytest.raises(ModelError, match=r"shape \(319, 48\)"):
        check_unembedding(LoadedUnembedding(rows.weight[1:], tied=False), loaded)
