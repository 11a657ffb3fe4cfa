"""What forms are made of, against the modules that the product steers with."""

import pytest
import torch

from operators.builder.concept import concept_from_text
from operators.core.neutral_texts import neutral_texts
from operators.core.positions import Positions
from operators.evaluate.concepts import EvalConcept, packaged_concepts
from operators.evaluate.form import CONTRAST, PREFIX, all_forms, choose_forms
from operators.evaluate.material import Material
from operators.evaluate.protocol import evaluation_prompts
from operators.lens.pulls import text_pulls
from operators.lens.word_pulls import WordPulls
from operators.tune.prompts import calibration_prompts, neutral_prompts
from operators.vectors.contrast import TextSet, mean_difference

LAYER = 2
CONCEPT = EvalConcept("bridge", ("The golden bridge", "A bridge in the bay"), ("bridge", "bay"), "bridge", fresh=True)


@pytest.fixture(scope="module")
def material(tiny):
    return Material(tiny("llama"), LAYER)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_lens_of_some_words_pulls_what_the_matrices_pull(tiny, family):
    loaded, texts = tiny(family), neutral_texts()[:2]
    cotangents = torch.randn(3, loaded.hidden_size, dtype=torch.float64)
    pulls = WordPulls(loaded, texts, LAYER)
    first, others, both, two = pulls.pull(
        cotangents.float(), [Positions.parse(where) for where in ("first", "1..", "all", "..2")]
    )
    found = [
        text_pulls(loaded.model, concept_from_text(text, loaded).ids, [LAYER], cotangents=cotangents)[0][LAYER]
        for text in texts
    ]
    expected_first, expected_others = (
        torch.stack([getattr(one, kind) for one in found]).mean(0).float() for kind in ("first", "others")
    )
    for value, expected in (
        (first, expected_first),
        (others, expected_others),
        (both, expected_first + expected_others),
    ):
        assert torch.allclose(value, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert not torch.allclose(two, first)
    assert not torch.allclose(two, both)


def test_the_contrast_anchor_is_the_mean_difference_of_last_tokens(material):
    sides = [TextSet(name, "", tuple(texts)) for name, texts in (("p", CONCEPT.texts), ("n", neutral_texts()))]
    expected = mean_difference(*sides, material.loaded, layer=LAYER).vector.float()
    assert torch.allclose(material.contrast_anchor(CONCEPT.texts), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", all_forms().values(), ids=lambda form: form.name)
def test_every_form_can_be_made_and_pushes_along_unit_vectors(material, form):
    if form.name == "imported":
        material.add_vectors({CONCEPT.name: (torch.ones(material.hidden_size), "sha256:1")})
    pushes = form.make(material, CONCEPT)
    assert (pushes == ()) == (form.name == PREFIX)
    x = torch.randn(3, 4, material.hidden_size)
    positions = torch.arange(4).expand(3, -1)
    for push in pushes:
        directions = push.directions.begin(3).advance(x, positions, torch.ones(3, 4, dtype=torch.bool))
        assert directions.shape == x.shape
        assert torch.allclose(directions.norm(dim=-1), torch.ones(3, 4), atol=1e-5)


def test_the_form_that_others_are_compared_with_is_never_left_out():
    assert [form.name for form in choose_forms(["lens-first"])] == [CONTRAST, "lens-first"]


def test_shipped_prompts_are_in_one_list_each():
    lists = [evaluation_prompts(), calibration_prompts(), neutral_prompts()]
    assert len(lists[0]) >= 120
    together = [prompt for prompts in lists for prompt in prompts]
    assert len(set(together)) == len(together)


def test_shipped_concepts_are_enough():
    concepts = packaged_concepts()
    assert len(concepts) >= 8
    assert sum(concept.fresh for concept in concepts) >= 4
    assert all(len(concept.texts) >= 3 for concept in concepts)
