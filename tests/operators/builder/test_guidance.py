"""Texts and strengths that will hardly do what their user wants, and tokenizers that put a token behind a text."""

import pytest
import torch

from operators.builder.concept import Concept
from operators.builder.guidance import BFLOAT16_RESOLUTION, strength_warnings, text_warnings
from steer_server.config import ServerConfig


@pytest.mark.parametrize(
    ("text", "ids", "said"),
    [
        ("chess", (0, 5, 6, 7), "is one word"),
        (" chess ", (5,), "is one word"),
        ("a b", (0, 5, 6), "has 2 tokens"),
        ("She moved her queen and said", (0, 5, 6, 7, 8), None),
        ("a b c", (5, 6, 7), None),
        ("金门大桥横跨", (5, 6, 7, 8), None),
        ("东京", (5, 6), "has 2 tokens"),
    ],
)
def test_a_word_alone_is_told_and_a_sentence_is_not(text, ids, said):
    found = text_warnings([Concept(text, ids)], special_ids=[0])
    assert len(found) == (said is not None)
    if said:
        assert said in found[0]
        assert repr(text) in found[0]


def test_each_text_is_told_of():
    assert len(text_warnings([Concept("a", (1,)), Concept("a b c d", (1, 2, 3, 4)), Concept("b", (2,))], [])) == 2


@pytest.mark.parametrize(("strength", "warns"), [(2.0, False), (-2.0, False), (2.01, True), (-5.0, True)])
def test_a_strength_that_a_server_refuses_is_told_with_its_bound(strength, warns):
    # The bound is the server's own, which the builder does not import.
    assert (abs(strength) / 2 > ServerConfig.model_fields["max_dose"].default) is warns
    found = strength_warnings(strength)
    assert len(found) == warns
    if warns:
        assert "--max-dose" in found[0]
        assert f"{strength:g}" in found[0]


@pytest.mark.parametrize(("strength", "said"), [(0.0, "leaves every text as it is"), (0.007, "bfloat16"), (0.01, None)])
def test_a_strength_that_does_nothing_is_told(strength, said):
    found = strength_warnings(strength)
    assert len(found) == (said is not None)
    assert said is None or said in found[0]
    assert torch.finfo(torch.bfloat16).eps == BFLOAT16_RESOLUTION
