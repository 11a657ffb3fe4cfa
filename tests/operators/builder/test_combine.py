"""Mixtures: several operators with signed weights as one."""

import json

import pytest
import torch
from typer.testing import CliRunner

from operators.__main__ import app
from operators.builder.build import build_operator
from operators.builder.combine import WeightedOperator, combine
from operators.builder.concept import concept_from_text
from operators.builder.spec import BuildSpec
from operators.builder.verify import verify_operator
from operators.core.apply import Direction, Setting, prepare
from operators.core.artifact import from_bytes, to_bytes
from operators.core.errors import BuildError, IncompatibleOperatorError
from operators.model.loading import block_input, embed

TEXTS = {"bridge": "The Golden Gate Bridge", "wedding": "The wedding was beautiful and the bride"}
LATER = "The bride wore a golden dress in the bay."


@pytest.fixture
def part(tiny):
    """``part(name, weight=1.0, texts=None, **spec)``: one member, built on the tiny model ``family``."""

    def build(name, weight=1.0, *, texts=None, family="llama", **spec):
        loaded = tiny(family)
        concepts = tuple(concept_from_text(text, loaded) for text in texts or [TEXTS[name]])
        return WeightedOperator(name, build_operator(BuildSpec(concepts, **{"layer": 2, **spec}), loaded), weight)

    return build


def _directions(artifact, loaded, rule):
    """a_k before it is normalised, for 12 tokens."""
    x = block_input(loaded.model, embed(loaded.model, torch.arange(30, 42))).double()
    jacobian = artifact.jacobian()
    offset = torch.zeros(x.shape[1]) if artifact.offset is None else artifact.offset
    if rule == "substitute":
        return artifact.substitute_base + x @ jacobian[-1].T
    n = len(jacobian)
    return offset + torch.stack([jacobian[j % n] @ x[j] for j in range(len(x))]).cumsum(0)


@pytest.mark.parametrize("rule", ["cumulative", "substitute"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_a_mixture_pushes_along_the_weighted_sum_of_its_members(tiny, part, family, rule):
    loaded = tiny(family)
    parts = [part("bridge", 1.0, family=family, rank="full"), part("wedding", -0.5, family=family, rank="full")]
    if rule == "cumulative":
        # Blocks are laid end to end: only texts of one length meet position by position.
        ids = parts[0].artifact.header.concept_ids
        longer = loaded.tokenizer(TEXTS["wedding"])["input_ids"][: len(ids)]
        parts[1] = part("wedding", -0.5, family=family, rank="full", texts=[loaded.tokenizer.decode(longer)])
        assert len(parts[1].artifact.header.concept_ids) == len(ids)
    mixture = combine(parts, loaded)
    expected = sum(one.weight * _directions(one.artifact, loaded, rule) / one.artifact.anchor.norm() for one in parts)
    found = _directions(mixture, loaded, rule)
    cosine = torch.nn.functional.cosine_similarity(found, expected, dim=-1)
    torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=0, atol=1e-12)


def test_a_mixture_is_an_operator_like_any_other(tiny, part):
    loaded = tiny("llama")
    parts = [part("bridge", 1.0, rank=6), part("wedding", -0.5, texts=[TEXTS["wedding"], LATER], rank=9)]
    mixture = from_bytes(to_bytes(combine(parts, loaded)), source="x")
    assert verify_operator(mixture, loaded) <= 1e-12
    assert mixture.header.low_rank.rank == 9
    assert [text.text for text in mixture.header.texts] == [*TEXTS.values(), LATER]
    assert [(member.name, member.weight) for member in mixture.header.members] == [("bridge", 1.0), ("wedding", -0.5)]
    assert [member.digest for member in mixture.header.members] == [one.artifact.digest for one in parts]
    direction = Direction(prepare(mixture, torch.device("cpu")), Setting(0.5, "cumulative", 0.5))
    x = block_input(loaded.model, embed(loaded.model, torch.arange(5)))
    torch.testing.assert_close(direction.advance(x).norm(dim=-1), torch.ones(5))


def test_a_mixture_of_a_mixture_is_that_of_all_members(tiny, part):
    loaded = tiny("llama")
    bridge, wedding = part("bridge", rank="full"), part("wedding", rank="full")
    third = part("later", texts=[LATER], rank="full")
    inner = WeightedOperator("inner", combine([bridge, wedding], loaded), 1.0)
    outer = combine([inner, third], loaded)
    assert len(outer.header.texts) == 3
    assert verify_operator(outer, loaded) <= 1e-12


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a, b, _: [a], "a mixture of 1 operators; two or more are needed"),
        (lambda a, b, _: [a, b, a], "'bridge' is in the mixture 2 times; once is accepted"),
        (
            lambda a, b, _: [a, WeightedOperator(b.name, b.artifact, 0.0)],
            "weight of 'wedding' is 0.0; a finite number other",
        ),
        (lambda a, b, _: [a, WeightedOperator(b.name, b.artifact, float("inf"))], "weight of 'wedding' is inf"),
        (
            lambda a, b, part: [a, part("wedding", layer=1)],
            "'wedding' is residual at layer 1, 'bridge' is residual at layer 2; a mixture has one layer and profile",
        ),
        (lambda a, b, part: [a, part("wedding", profile="golden")], "'wedding' is golden at layer 2, 'bridge' is res"),
        (
            lambda a, b, _: [a, WeightedOperator("again", a.artifact, -1.0)],
            "weighted operators cancel: their sum has no direction",
        ),
    ],
)
def test_mixtures_that_make_no_sense_are_refused(tiny, part, change, words):
    with pytest.raises(BuildError, match=words):
        combine(change(part("bridge"), part("wedding"), part), tiny("llama"))


def test_a_member_of_another_model_is_refused(tiny, part):
    with pytest.raises(IncompatibleOperatorError, match="of 'tiny-llama' is"):
        combine([part("bridge"), part("wedding", family="qwen3")], tiny("llama"))


def test_the_command_stores_a_mixture_and_names_what_is_wrong(tiny_directory, tmp_path, monkeypatch):
    monkeypatch.setenv("STEER_STORE", str(tmp_path))
    monkeypatch.setenv("STEER_MODEL", str(tiny_directory("llama")))
    run = CliRunner()
    for name, text in TEXTS.items():
        assert run.invoke(app, ["build", name, "--text", text, "--layer", "2"]).exit_code == 0
    made = run.invoke(app, ["combine", "both", "bridge=1", "wedding=-0.5", "--json"])
    assert made.exit_code == 0, made.stderr
    assert [member["weight"] for member in json.loads(made.stdout)["members"]] == [1.0, -0.5]
    assert run.invoke(app, ["verify", "both"]).exit_code == 0
    wrong = run.invoke(app, ["combine", "other", "bridge=much", "wedding"])
    assert wrong.exit_code == 2
    assert "member 'bridge=much': OPERATOR=WEIGHT with a number as weight is accepted" in wrong.stderr
    assert "no operator 'harbour'" in run.invoke(app, ["combine", "other", "bridge", "harbour"]).stderr


def test_a_rank_of_zero_is_refused_and_not_taken_for_none(tiny, part):
    with pytest.raises(BuildError, match="rank is 0; 1 to 40"):
        combine([part("bridge"), part("wedding")], tiny("llama"), rank=0)
