"""Tables that an installed package brings: they reach the command line by an entry point, or are refused by name."""

import sys

import pytest
import torch
from transformers import CohereConfig, CohereForCausalLM
from typer.testing import CliRunner

from operators import __main__ as cli
from operators.core.errors import UnsupportedModelError
from operators.core.store import Store
from operators.maps.detach import families, family_of

TABLE = """
from operators.maps.detach import Attention, Family, GatedMLP, layer_norm, projected_values

COHERE = Family(
    name="my-cohere",
    causal_lm="transformers.models.cohere.modeling_cohere.CohereForCausalLM",
    forwards={"CohereLayerNorm": layer_norm(eps="variance_epsilon")},
    mlps={"CohereMLP": GatedMLP("act_fn", gate="gate_proj")},
    attentions={"CohereAttention": Attention(projected_values, output="o_proj")},
    containers=frozenset({"CohereModel", "CohereDecoderLayer", "CohereRotaryEmbedding"}),
)
"""
AGAIN = """
from dataclasses import replace
from operators.maps.detach import families

LLAMA = [replace(family, name="mine") for family in families.__globals__["BUILT_IN"][:1]]
"""
ELSEWHERE = TABLE.replace("CohereMLP", "CohereGoneMLP")


@pytest.fixture
def install(tmp_path, monkeypatch):
    """``install(source, "cohere = my_tables:COHERE")``: what an installer leaves behind, on this process's path."""
    lookup = sys.modules["operators.maps.detach.families"]
    monkeypatch.setattr(lookup, "_registered", ())

    def put(source, *entries):
        (tmp_path / "my_tables.py").write_text(source)
        described = tmp_path / "my_tables-1.0.dist-info"
        described.mkdir()
        (described / "METADATA").write_text("Metadata-Version: 2.1\nName: my-tables\nVersion: 1.0\n")
        (described / "entry_points.txt").write_text("\n".join(["[steer_operators.families]", *entries]))
        monkeypatch.syspath_prepend(str(tmp_path))
        lookup._installed.cache_clear()

    yield put
    lookup._installed.cache_clear()
    sys.modules.pop("my_tables", None)


def _cohere(tokenizer):
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return CohereForCausalLM(
            CohereConfig(
                vocab_size=len(tokenizer),
                hidden_size=40,
                intermediate_size=56,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=64,
                eos_token_id=0,
                bos_token_id=0,
            )
        ).eval()


def test_the_command_line_builds_on_a_model_whose_table_was_installed(install, tiny_tokenizer, tmp_path, monkeypatch):
    model, store = tmp_path / "model", tmp_path / "store"
    _cohere(tiny_tokenizer).save_pretrained(model)
    tiny_tokenizer.save_pretrained(model)
    monkeypatch.setenv("STEER_STORE", str(store))
    build = ["build", "golden", "--text", "The golden gate", "--model", str(model), "--layer", "2", "--rank", "full"]
    install("", "# nothing yet")
    refused = CliRunner().invoke(cli.app, build)
    assert refused.exit_code != 0
    assert "CohereForCausalLM has no detach table" in refused.output
    (tmp_path / "my_tables-1.0.dist-info" / "entry_points.txt").write_text(
        "[steer_operators.families]\ncohere = my_tables:COHERE\n"
    )
    (tmp_path / "my_tables.py").write_text(TABLE)
    sys.modules["operators.maps.detach.families"]._installed.cache_clear()
    done = CliRunner().invoke(cli.app, build, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert Store(store).load("golden").header.architecture == "CohereForCausalLM"


@pytest.mark.parametrize(
    ("source", "entry", "words"),
    [
        ("TABLE = 3", "x = my_tables:TABLE", "is int; a Family, or an iterable of them, is accepted"),
        ("TABLES = ['llama']", "x = my_tables:TABLES", "is str; a Family"),
        (
            "import not_there",
            "x = my_tables:TABLE",
            r"cannot be loaded \(ModuleNotFoundError: No module named 'not_there'",
        ),
        (AGAIN, "x = my_tables:LLAMA", "brings a detach table for .*LlamaForCausalLM, which has one already"),
    ],
)
def test_what_is_no_table_is_refused_by_the_name_of_its_package(install, source, entry, words):
    install(source, entry)
    with pytest.raises(UnsupportedModelError, match=f"entry point 'x' .* of the package 'my-tables'.*{words}"):
        families()


def test_a_table_that_names_a_class_that_is_not_there_is_refused_when_it_is_needed(install, tiny, tiny_tokenizer):
    install(ELSEWHERE, "cohere = my_tables:COHERE")
    assert family_of(tiny("llama").model).name == "llama"
    words = r"'my-cohere' table names the class CohereGoneMLP of .*modeling_cohere"
    with pytest.raises(UnsupportedModelError, match=words):
        family_of(_cohere(tiny_tokenizer))
