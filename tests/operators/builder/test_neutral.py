"""The neutral mean of an operator: what it is, what it is checked against, and what a mixture makes of it."""

import json

import pytest
import torch
from typer.testing import CliRunner

from operators.__main__ import app
from operators.builder.build import build_operator
from operators.builder.combine import WeightedOperator, combine
from operators.builder.concept import concept_from_text
from operators.builder.neutral import (
    compute_neutral_mean,
    is_shipped,
    last_target,
    read_neutral_texts,
    tokenise_neutral,
)
from operators.builder.spec import BuildSpec
from operators.builder.stored import differences
from operators.builder.verify import verify_operator
from operators.core.apply import prepare
from operators.core.artifact import from_bytes, make_artifact, to_bytes
from operators.core.defaults import NEW_OPERATORS
from operators.core.errors import ArtifactError, BuildError, ReconstructionError
from operators.core.header import NeutralTexts
from operators.core.neutral_texts import neutral_texts
from operators.maps.replay import target_hidden_state
from operators.model.loading import decoder_layers, embed

TEXTS = ("the bay", "a wedding in the bay")


def _build(loaded, *texts, **spec):
    return build_operator(BuildSpec(tuple(concept_from_text(text, loaded) for text in texts), layer=2, **spec), loaded)


def _mean(loaded, texts, profile):
    rows = []
    for text in texts:
        ids = torch.tensor([loaded.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            rows.append(target_hidden_state(loaded.model, embed(loaded.model, ids), layer=2, profile=profile)[0])
    return torch.stack(rows).mean(0)


@pytest.mark.parametrize("profile", ["residual", "golden"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_neutral_mean_is_that_of_the_target_at_the_last_token_of_each_text(tiny, family, profile):
    loaded = tiny(family)
    shipped, own = _build(loaded, "golden gate", profile=profile), tokenise_neutral(loaded, TEXTS)
    other = _build(loaded, "golden gate", profile=profile, neutral=own)
    for artifact, texts in ((shipped, neutral_texts()), (other, TEXTS)):
        torch.testing.assert_close(artifact.neutral, _mean(loaded, texts, profile), rtol=1e-10, atol=1e-12)
        assert len(artifact.header.neutral.ids) == len(texts)
        contrast = artifact.anchor - artifact.neutral
        found = prepare(artifact, torch.device("cpu")).unit_contrast
        torch.testing.assert_close(found.double(), contrast / contrast.norm(), rtol=0, atol=1e-6)
    assert (is_shipped(shipped.header.neutral), is_shipped(other.header.neutral)) == (True, False)
    assert (shipped.header.recommended.anchor, verify_operator(other, loaded) < 1e-11) == ("contrast", True)
    assert from_bytes(to_bytes(other), source="x").digest == other.digest != shipped.digest


@pytest.mark.parametrize(("kind", "passes"), [("default", 2), ("longrope", 5)])
def test_neutral_texts_go_through_the_model_together_where_their_length_changes_no_factor(
    tiny, monkeypatch, kind, passes
):
    loaded, seen = tiny("llama", fresh=True), []
    monkeypatch.setattr("operators.builder.neutral.rope_changes", lambda _config: [kind] if kind != "default" else [])
    decoder_layers(loaded.model)[0].register_forward_hook(lambda *_: seen.append(1))
    # 16 go together.
    ids = tuple(tuple(range(20, 20 + 3 + number % 5)) for number in range(20))
    found = compute_neutral_mean(NeutralTexts(digest=f"sha256:{'0' * 64}", ids=ids), loaded, layer=2, profile="golden")
    assert len(seen) == passes
    alone = [last_target(each, loaded, layer=2, profile="golden") for each in ids]
    torch.testing.assert_close(found, torch.stack(alone).mean(0), rtol=1e-10, atol=1e-12)


def test_a_mean_of_other_texts_is_refused_by_verify_and_told_in_the_store(tiny):
    loaded = tiny("llama")
    good = _build(loaded, "golden gate")
    parts = (good.factors, good.anchor, good.substitute_base)
    other = good.header.model_copy(update={"neutral": tokenise_neutral(loaded, TEXTS)})
    with pytest.raises(ReconstructionError, match="tensor 'neutral' is off by"):
        verify_operator(make_artifact(other, *parts, basis=good.basis, neutral=good.neutral), loaded)
    spec = BuildSpec((concept_from_text("golden gate", loaded),), layer=2, rank=(good.header.low_rank and 64) or "full")
    assert any("neutral texts" in each for each in differences(other, spec, loaded))
    assert not any("neutral texts" in each for each in differences(good.header, spec, loaded))


def test_a_tensor_and_a_header_that_do_not_go_together_are_refused(make_operator):
    with_mean, without = make_operator(neutral=True), make_operator()
    for header, mean in ((with_mean.header, None), (without.header, with_mean.neutral)):
        with pytest.raises(ArtifactError, match="tensors missing"):
            make_artifact(header, without.factors, without.anchor, without.substitute_base, neutral=mean)
    with pytest.raises(ValueError, match="the contrast anchor is recommended"):
        make_operator(recommended=NEW_OPERATORS)


def test_the_contrast_of_a_mixture_is_the_weighted_sum_of_its_members_contrasts(tiny):
    loaded = tiny("llama")
    members = [
        WeightedOperator(name, _build(loaded, text), weight)
        for name, text, weight in (("gate", "golden gate", 1.0), ("dress", "a golden dress", -0.4))
    ]
    mixture = combine(members, loaded)
    norms = [member.artifact.anchor.norm() for member in members]
    scale = sum(norms) / len(norms)
    contrast = sum(
        scale * member.weight / norm * (member.artifact.anchor - member.artifact.neutral)
        for member, norm in zip(members, norms, strict=True)
    )
    torch.testing.assert_close(mixture.anchor - mixture.neutral, contrast, rtol=1e-10, atol=1e-12)
    assert verify_operator(mixture, loaded) < 1e-11
    other = _build(loaded, "bay", neutral=tokenise_neutral(loaded, TEXTS))
    with pytest.raises(BuildError, match="'gate' and 'bay' have different neutral texts"):
        combine([members[0], WeightedOperator("bay", other, 1.0)], loaded)


def test_a_concept_that_is_neutral_has_no_contrast(tiny):
    loaded = tiny("llama")
    with pytest.raises(BuildError, match="there is no contrast between them"):
        _build(loaded, TEXTS[0], neutral=tokenise_neutral(loaded, TEXTS[:1]))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "has 0, one per line; 1 to 256 are accepted"),
        (b"# nothing\n\n", "has 0, one per line"),
        (b"a\n" * 257, "has 257, one per line"),
        (b"\xff", "not UTF-8 text"),
        (b"a" * ((1 << 20) + 1), "at most 1048576 are read"),
    ],
)
def test_a_file_of_neutral_texts_that_cannot_be_used_is_named(tmp_path, content, says):
    path = tmp_path / "neutral.txt"
    path.write_bytes(content)
    with pytest.raises(BuildError, match=says):
        read_neutral_texts(path)


def test_build_takes_neutral_texts_of_a_file(tiny_directory, tmp_path, monkeypatch):
    monkeypatch.setenv("STEER_STORE", str(tmp_path / "store"))
    texts = tmp_path / "neutral.txt"
    texts.write_text("# mine\n" + "\n".join(TEXTS))
    given = ["--model", str(tiny_directory("llama")), "--neutral", str(texts), "--first-token", "anchor", "--json"]
    result = CliRunner().invoke(app, ["build", "a", "--text", "golden", *given])
    answer = json.loads(result.stdout)
    assert (result.exit_code, len(answer["neutral"]["ids"])) == (0, 2)
    assert (answer["recommended"]["anchor"], answer["recommended"]["first_token"]) == ("contrast", "anchor")
    shown = CliRunner().invoke(app, ["show", "a"]).stdout
    assert "mean of 2 texts" in shown
    assert "contrast anchor, anchor at the first token" in shown
    texts.write_text("")
    wrong = CliRunner().invoke(app, ["build", "b", "--text", "golden", *given])
    assert (wrong.exit_code, "has 0, one per line" in wrong.stdout) == (1, True)
