"""What no store would take is refused before anything large is imported, as wrong usage."""

import sys

import pytest
from typer.testing import CliRunner

from operators import __main__ as cli

PLAN = (["build", "te a", "--text", "tea", "--plan"], "operators.recipes.concept_entry")
BUILDERS = [
    (["build", "te a", "--text", "tea"], "operators.recipes.concept_entry"),
    (["combine", "te a", "x=1", "y=1"], "operators.builder.combine"),
    (["contrast", "te a", "--positive", "a", "--negative", "b", "--layer", "1"], "operators.builder.guidance"),
    (["lens", "te a"], "operators.vectors.contrast"),
]


@pytest.fixture
def run(monkeypatch, tmp_path):
    def invoke(arguments, large):
        # None makes an import fail.
        monkeypatch.setitem(sys.modules, large, None)
        return CliRunner().invoke(cli.app, [*arguments, "--store", str(tmp_path)], catch_exceptions=False)

    return invoke


@pytest.mark.parametrize(("arguments", "large"), [*BUILDERS, PLAN])
def test_a_bad_name_is_refused_first(run, arguments, large):
    result = run(arguments, large)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "operator name 'te a' is not allowed" in result.stderr


@pytest.mark.parametrize(("arguments", "large"), BUILDERS)
def test_a_time_of_the_build_that_is_none_is_refused_before_there_is_work(run, monkeypatch, arguments, large):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    result = run([each.replace("te a", "tea") for each in arguments], large)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "SOURCE_DATE_EPOCH is 'yesterday'; whole seconds since 1970 are accepted" in result.stderr


def test_a_file_of_concepts_is_not_begun_with_a_time_that_is_none(run, monkeypatch, tmp_path):
    concepts = tmp_path / "concepts.toml"
    concepts.write_text('[tea]\ntext = "tea"\n')
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1.5")
    result = run(["build", "--file", str(concepts)], "operators.model.loading")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "SOURCE_DATE_EPOCH is '1.5'" in result.stderr
