"""What a row depends on is in its run's digest: rows of another are not taken for one's own."""

from dataclasses import replace

import pytest

from operators.evaluate import run
from operators.evaluate.material import Material
from operators.evaluate.protocol import Protocol
from operators.evaluate.sampling import SAMPLINGS


@pytest.fixture
def digest(tiny):
    material = Material(tiny("llama"), 2)
    return lambda held_out="b": run.run_digest(material, Protocol(("a",), (held_out,)))


def test_the_same_run_has_the_same_digest_and_other_prompts_another(digest):
    assert digest() == digest()
    assert digest("c") != digest()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("neutral_texts", lambda: ("Another sentence.",)),
        ("SAMPLINGS", tuple(replace(sampling, temperature=0.7) for sampling in SAMPLINGS)),
    ],
)
def test_neutral_texts_and_samplings_count(digest, monkeypatch, name, value):
    before = digest()
    monkeypatch.setattr(run, name, value)
    assert digest() != before
