"""What new operators and vectors recommend where nobody says."""

from dataclasses import replace

import pytest
import torch

from operators.builder.build import build_operator
from operators.core.defaults import NEW_OPERATORS, is_default
from operators.core.vector_source import ImportedVector
from operators.recipes.concept_entry import ConceptEntry
from operators.recipes.tasks import build_spec
from operators.vectors.vector_operator import vector_operator

SOURCE = ImportedVector(norm=1.0, file_format="npz", file_digest="sha256:" + "0" * 64, tensor="v")


@pytest.mark.parametrize(("family", "strength"), [("gemma3", 0.1), ("qwen3", 0.3)])
def test_the_default_strength_is_that_measured_for_the_kind_of_model(tiny, family, strength):
    model = tiny(family)
    spec = build_spec(ConceptEntry(name="a", texts=("golden gate",), layer=2), model)
    built = build_operator(replace(spec, recommended=None), model).header.recommended
    vector = vector_operator(torch.ones(model.hidden_size), SOURCE, model, layer=2, about="a").header.recommended
    assert spec.recommended == built == NEW_OPERATORS.model_copy(update={"strength": strength})
    assert (vector.strength, vector.blend) == (strength, 1.0)
    assert is_default(built)
    assert is_default(vector)
