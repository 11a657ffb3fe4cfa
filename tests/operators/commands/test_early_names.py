"""A name that the store does not take is refused before anything large is imported."""

import sys

import pytest
from typer.testing import CliRunner

from operators import __main__ as cli


@pytest.mark.parametrize(
    ("arguments", "large"),
    [
        (["build", "te a", "--text", "tea"], "operators.recipes.concept_entry"),
        (["build", "te a", "--text", "tea", "--plan"], "operators.recipes.concept_entry"),
        (["combine", "te a", "x=1", "y=1"], "operators.builder.combine"),
        (["contrast", "te a", "--positive", "a", "--negative", "b", "--layer", "1"], "operators.builder.guidance"),
        (["lens", "te a"], "operators.vectors.contrast"),
    ],
)
def test_a_bad_name_is_refused_first(monkeypatch, tmp_path, arguments, large):
    # None makes an import fail.
    monkeypatch.setitem(sys.modules, large, None)
    result = CliRunner().invoke(cli.app, [*arguments, "--store", str(tmp_path)], catch_exceptions=False)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "operator name 'te a' is not allowed" in result.stderr
