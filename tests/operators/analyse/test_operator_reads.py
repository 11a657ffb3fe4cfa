"""``show --reads``: the tokens that an operator reads, and what each token of its texts gives."""

import json

import pytest
import torch
from typer.testing import CliRunner

from operators.__main__ import app
from operators.analyse.operator_reads import read_operator
from operators.builder.build import build_operator
from operators.builder.concept import concept_from_text
from operators.builder.spec import BuildSpec
from operators.core.errors import IncompatibleOperatorError
from operators.core.store import Store
from operators.model.loading import block_input, embed

TEXTS = ("The Golden Gate Bridge", "Over the bay")


def _operator(loaded, rank):
    return build_operator(BuildSpec(tuple(concept_from_text(t, loaded) for t in TEXTS), layer=2, rank=rank), loaded)


@pytest.mark.parametrize("rank", ["full", 5])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_scores_and_terms_are_those_of_the_matrices_written_out(tiny, family, rank):
    loaded = tiny(family)
    operator = _operator(loaded, rank)
    found = read_operator(operator, loaded)
    jacobian, y = operator.jacobian().double(), operator.anchor.double()
    # As the first block receives them: Gemma multiplies its table.
    table = embed(loaded.model, torch.arange(len(loaded.tokenizer))).double()
    scores = {token: float((jacobian[-1] @ x) @ y / y.norm()) for token, x in enumerate(table)}
    ranked = sorted(scores, key=scores.__getitem__, reverse=True)
    assert [token.id for token in found.towards] == ranked[: len(found.towards)]
    assert [token.id for token in found.against] == ranked[::-1][: len(found.against)]
    for token in (*found.towards, *found.against):
        assert token.score == pytest.approx(scores[token.id], rel=1e-3)
    for text, terms in zip(operator.header.texts, found.texts, strict=True):
        assert [term.id for term in terms] == list(text.ids)
        x = block_input(loaded.model, embed(loaded.model, torch.tensor(text.ids))).double()
        first = len(jacobian) - len(text.ids)
        for k, term in enumerate(terms):
            expected = jacobian[first + k] @ x[k]
            assert term.norm == pytest.approx(float(expected.norm()), rel=1e-4)
            assert term.share == pytest.approx(float(expected @ y / (y @ y)), rel=1e-4, abs=1e-9)


def test_another_model_is_refused(tiny):
    with pytest.raises(IncompatibleOperatorError, match=r"hidden size|fingerprint|layers"):
        read_operator(_operator(tiny("llama"), "full"), tiny("gemma3"))


@pytest.fixture
def shelf(tmp_path, tiny_directory, monkeypatch):
    monkeypatch.setenv("STEER_STORE", str(tmp_path))
    monkeypatch.setenv("STEER_MODEL", str(tiny_directory("llama")))
    given = [argument for text in TEXTS for argument in ("--text", text)]
    assert CliRunner().invoke(app, ["build", "a", *given, "--layer", "2"]).exit_code == 0
    return tmp_path


def test_the_command_shows_them_as_json_and_as_lines(shelf):
    answer = json.loads(CliRunner().invoke(app, ["show", "a", "--reads", "--json"], catch_exceptions=False).stdout)
    assert answer["digest"] == Store(shelf).load("a").digest
    assert answer["concept_tokens"] == [term["text"] for term in answer["reads"]["texts"][0]]
    assert answer["digest_verified"] is True
    assert len(answer["reads"]["texts"]) == 2
    assert {"towards", "against", "texts"} == answer["reads"].keys()
    lines = CliRunner().invoke(app, ["show", "a", "--reads"]).stdout.splitlines()
    assert any(line.startswith("  towards the concept:") for line in lines)
    assert "  text 2" in lines
    shown = next(line for line in lines if line.startswith("tokens:"))
    assert shown.endswith(" ".join(map(repr, answer["concept_tokens"])))


def test_a_model_without_reads_is_refused_and_without_either_none_is_loaded(shelf, monkeypatch):
    monkeypatch.setattr("operators.model.loading.load_model", lambda *_a, **_k: pytest.fail("the model was loaded"))
    result = CliRunner().invoke(app, ["show", "a", "--model", "x"])
    assert (result.exit_code, "--model goes with --reads" in result.stderr) == (2, True)
    answer = json.loads(CliRunner().invoke(app, ["show", "a", "--json"]).stdout)
    assert "reads" not in answer
    # As the build wrote them into the header.
    told = next(
        line for line in CliRunner().invoke(app, ["show", "a"]).stdout.splitlines() if line.startswith("tokens:")
    )
    assert told.endswith(" ".join(map(repr, answer["concept_tokens"])))
