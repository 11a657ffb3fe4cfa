"""docs/ARCHITECTURES.md is run: its recipe, on the architecture that it names, and its checks."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import CohereConfig, CohereForCausalLM

from operators.core.errors import UnsupportedModelError
from operators.maps.detach import families, family_of, register

PAGE = (Path(__file__).parents[3] / "docs" / "ARCHITECTURES.md").read_text()
IDS = (277, 12, 290, 65, 278, 69, 317)


def _model(use_qk_norm: bool = False) -> CohereForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(8)
        model = CohereForCausalLM(
            CohereConfig(
                vocab_size=320,
                hidden_size=40,
                intermediate_size=56,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=64,
                use_qk_norm=use_qk_norm,
            )
        )
        for parameter in model.parameters():
            spread = {"std": 0.3, "mean": 1.0} if parameter.ndim == 1 else {"std": 1.5 / parameter.shape[-1] ** 0.5}
            torch.nn.init.normal_(parameter, **spread)
    return model.double().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def page():
    """Runs the page; what it refuses beforehand it must not refuse afterwards."""
    with pytest.raises(UnsupportedModelError, match=r"CohereForCausalLM has no detach table.*docs/ARCHITECTURES\.md"):
        family_of(_model())
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE):
        exec(compile(block, "ARCHITECTURES.md", "exec"), names)
    return names


@pytest.mark.parametrize("use_qk_norm", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_architecture_of_the_recipe_passes_the_checks_of_the_page(page, attention, use_qk_norm):
    model = _model(use_qk_norm)
    model.set_attn_implementation(attention)
    page["check"](model, IDS)


def test_the_checks_of_the_page_fail_where_a_module_is_forgotten(page):
    model = _model()
    model.model.layers[1].mlp = torch.nn.Sequential(model.model.layers[1].mlp, torch.nn.Tanh())
    with pytest.raises(UnsupportedModelError, match=r"'model\.layers\.1\.mlp' of class Sequential .*ARCHITECTURES\.md"):
        page["check"](model, IDS)


def test_a_recipe_is_about_twenty_five_lines():
    first, *_ = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
    assert first.count("\n") <= 25


def test_a_table_cannot_be_replaced(page):
    for family in families():
        with pytest.raises(ValueError, match=f"{family.model_class} has a detach table already"):
            register(replace(family, name="mine"))
    assert "mine" not in {family.name for family in families()}
