"""Decoders of text inside of models that read images too: loaded alone, they are the model of text that they are."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AyaVisionConfig

from operators.builder.build import build_operator
from operators.builder.concept import concept_from_text
from operators.builder.spec import BuildSpec
from operators.core.errors import ModelError
from operators.maps.detach import family_of
from operators.model.loading import load_model, recognise
from operators.model.unembedding import find_unembedding
from tests.odd_models import odd_config
from tests.operators.model.whole_models import HOLDERS, whole_model

IDS = torch.arange(20)[None] + 30


@pytest.fixture
def saved(tiny_tokenizer, tmp_path):
    """``saved(text)``: a whole model with such a decoder in it, and its directory."""

    def save(text):
        model = whole_model(text, odd_config(text, vocab_size=len(tiny_tokenizer)))
        model.save_pretrained(tmp_path)
        tiny_tokenizer.save_pretrained(tmp_path)
        return model, tmp_path

    return save


@pytest.mark.parametrize("text", HOLDERS)
def test_it_computes_from_text_what_the_whole_model_does_and_has_a_table(saved, text, caplog):
    whole, directory = saved(text)
    caplog.clear()
    loaded = load_model(str(directory), attention="eager", check=family_of)
    assert family_of(loaded.model).name == text
    with torch.inference_mode():
        assert torch.equal(loaded.model(IDS).logits, whole(IDS).logits)
    assert "UNEXPECTED" not in caplog.text
    # Operators belong to the model of text alone too.
    alone = AutoModelForCausalLM.from_config(odd_config(text, vocab_size=len(loaded.tokenizer)))
    alone.load_state_dict(loaded.model.state_dict())
    alone.set_attn_implementation("eager")
    assert recognise("alone", alone, loaded.tokenizer).fingerprint == loaded.fingerprint
    found = find_unembedding(str(directory))
    assert (found.vocabulary, found.tied) == (len(loaded.tokenizer), text == "gemma3")
    assert torch.equal(found.rows([5, 60]), whole.get_output_embeddings().weight[[5, 60]])


def test_its_tensors_may_be_named_as_any_version_of_transformers_does(saved):
    _, directory = saved("ministral3")
    fingerprint = load_model(str(directory)).fingerprint
    file = directory / "model.safetensors"
    tensors = load_file(file)
    renamed = {name.replace("language_model.model.", "model.language_model."): each for name, each in tensors.items()}
    renamed = {name.replace("language_model.lm_head.", "lm_head."): each for name, each in renamed.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, file, metadata={"format": "pt"})
    assert load_model(str(directory)).fingerprint == fingerprint
    assert find_unembedding(str(directory)).tensor == "lm_head.weight"


def test_an_operator_is_built_on_it(saved):
    loaded = load_model(str(saved("gemma3")[1]), dtype="float64", check=family_of)
    artifact = build_operator(BuildSpec((concept_from_text("The golden gate", loaded),), layer=3), loaded)
    assert artifact.header.architecture == "Gemma3ForCausalLM"
    assert artifact.header.reconstruction_error <= 1e-12


@pytest.mark.parametrize("kind", ["aya_vision", "clip"])
def test_another_kind_is_refused_by_its_configuration_with_those_accepted(saved, tmp_path, monkeypatch, kind):
    _, directory = saved("llama")
    config = AyaVisionConfig().to_dict() if kind == "aya_vision" else {"model_type": "clip"}
    (directory / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_a, **_k: pytest.fail("read"))
    words = (
        rf"model '.*': its configuration is of the kind '{kind}', which is no decoder of text; .* gemma3, .*mistral3"
    )
    with pytest.raises(ModelError, match=words):
        load_model(str(directory))
