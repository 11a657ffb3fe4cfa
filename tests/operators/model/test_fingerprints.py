"""A model's fingerprint depends on every number of its weights and on its settings, and on nothing else."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from operators.core.model_fingerprint import needs_renewal
from operators.model.earlier_fingerprint import earlier_fingerprint
from operators.model.fingerprints import model_fingerprint
from operators.model.loading import load_model
from operators.model.weights_digest import weights_digest


def _copy(directory, tmp_path, name="model"):
    return shutil.copytree(directory, tmp_path / name)


def _change(directory, change):
    """Writes a checkpoint with its tensors, by name, changed in place."""
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    return load_model(str(directory)).fingerprint


def test_every_model_has_its_own_fingerprint(tiny):
    assert len({tiny(family).fingerprint for family in ("llama", "qwen3", "gemma3")}) == 3


def test_any_number_of_any_parameter_changes_the_fingerprint(tiny):
    model = tiny("llama", fresh=True).model
    seen, changes = {model_fingerprint(model)}, 0
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        flat = parameter.view(-1)
        for index in {0, len(flat) - 1, int(torch.randint(len(flat), (), generator=generator))}:
            # The smallest change that the dtype has.
            flat[index] = torch.nextafter(flat[index], torch.tensor(torch.inf, dtype=flat.dtype))
            seen.add(model_fingerprint(model))
            changes += 1
    assert len(seen) == 1 + changes


def test_zeroed_heads_and_neurons_change_what_a_sample_did_not_see(tiny):
    model = tiny("llama", fresh=True).model
    before, sampled = model_fingerprint(model), earlier_fingerprint(model)
    for layer in model.model.layers:
        # Column 0 is what a stride of the width reads.
        layer.mlp.down_proj.weight[:, 1::2] = 0.0
        layer.self_attn.o_proj.weight[:, 11] = 0.0
    assert model_fingerprint(model) != before
    assert needs_renewal(sampled)
    assert not needs_renewal(before)


def test_a_zero_with_another_sign_is_another_number(tiny):
    model = tiny("llama", fresh=True).model
    model.lm_head.weight[3, 3] = 0.0
    plus = weights_digest(model)
    model.lm_head.weight[3, 3] = -0.0
    assert weights_digest(model) != plus


def test_rows_that_change_places_change_the_fingerprint(tiny):
    model = tiny("llama", fresh=True).model
    before = model_fingerprint(model)
    rows = model.model.embed_tokens.weight
    rows[[5, 6]] = rows[[6, 5]]
    assert model_fingerprint(model) != before


def test_a_buffer_that_a_checkpoint_holds_counts(tiny):
    model = tiny("llama", fresh=True).model
    before = model_fingerprint(model)
    model.model.register_buffer("scale", torch.ones(3))
    held = model_fingerprint(model)
    model.model.scale[2] = 2.0
    assert len({before, held, model_fingerprint(model)}) == 3


def test_a_dtype_that_holds_every_number_leaves_the_fingerprint(tiny):
    model = tiny("llama", "sdpa", "float32", fresh=True).model
    assert model_fingerprint(model) == model_fingerprint(model.double())
    rounded = model_fingerprint(model.bfloat16())
    assert rounded != tiny("llama").fingerprint
    assert rounded == model_fingerprint(model.float()) == model_fingerprint(model.double())


@pytest.mark.parametrize("blocks", [1, 7, 100])
def test_large_tensors_are_hashed_in_parts(tiny, blocks, monkeypatch):
    model = tiny("llama", fresh=True).model
    whole = weights_digest(model)
    monkeypatch.setattr("operators.model.weights_digest._BLOCK", blocks * 40)
    parts = weights_digest(model)
    model.lm_head.weight[-1, -1] += 1.0
    assert len({whole, parts, weights_digest(model)}) == 3


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("rope_parameters", {"rope_type": "default", "rope_theta": 777.0}),
        ("rope_parameters", {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}),
        ("rms_norm_eps", 1e-3),
        ("num_attention_heads", 2),
        ("hidden_act", "gelu"),
        ("attention_multiplier", 0.5),
        ("max_position_embeddings", 128),
    ],
)
def test_equal_weights_under_another_setting_of_the_forward_pass_have_another_fingerprint(tiny, setting, value):
    found = set()
    for dtype in ("float64", "float32"):
        model = tiny("llama", "sdpa", dtype, fresh=True).model
        assert model_fingerprint(model) == tiny("llama").fingerprint
        assert getattr(model.config, setting, None) != value
        setattr(model.config, setting, value)
        found.add(model_fingerprint(model))
    assert len(found) == 1
    assert tiny("llama").fingerprint not in found


def test_a_setting_that_leaves_the_map_as_it_is_leaves_the_fingerprint_too(tiny):
    model = tiny("llama", fresh=True).model
    model.config.use_cache = not model.config.use_cache
    model.config.transformers_version = "1.2.3"
    model.config.attention_dropout = 0.5
    model.config.pad_token_id = 5
    model.config._name_or_path = "elsewhere"
    assert model_fingerprint(model) == tiny("llama").fingerprint


def test_a_fingerprint_is_that_of_the_map_and_not_of_the_object(tiny):
    assert tiny("llama", fresh=True).fingerprint == tiny("llama").fingerprint


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_a_saved_model_comes_back_with_the_same_fingerprint(tiny, family, tiny_directory, dtype):
    assert load_model(str(tiny_directory(family)), dtype=dtype).fingerprint == tiny(family).fingerprint


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_a_saved_tokenizer_comes_back_with_the_same_fingerprint(tiny, family, tiny_directory):
    loaded = load_model(str(tiny_directory(family)))
    assert loaded.tokenizer_fingerprint == tiny(family).tokenizer_fingerprint


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
def test_a_checkpoint_in_any_dtype_has_the_fingerprint_of_its_numbers(tiny, tiny_directory, tmp_path, stored):
    directory = _copy(tiny_directory("llama"), tmp_path)
    model = tiny("llama", "sdpa", "float64", fresh=True).model
    # float64 that float32 does not hold.
    model.lm_head.weight += 1e-12
    model.to(stored).save_pretrained(directory)
    found = {load_model(str(directory), dtype=dtype).fingerprint for dtype in ("float32", "bfloat16", "float64")}
    assert found == {model_fingerprint(model)}
    assert found != {tiny("llama").fingerprint}


def test_a_checkpoint_of_several_dtypes_has_the_fingerprint_of_its_numbers(tiny_directory, tmp_path):
    directory = _copy(tiny_directory("llama"), tmp_path)

    def halve(weights):
        for name in list(weights)[::2]:
            weights[name] = weights[name].half()

    _change(directory, halve)
    found = {load_model(str(directory), dtype=dtype).fingerprint for dtype in ("float32", "bfloat16", "float64")}
    assert len(found) == 1


@pytest.mark.parametrize("kept_as", ["shards", "pickle", "pickled shards"])
def test_a_checkpoint_has_one_fingerprint_however_it_is_cut(tiny, tiny_directory, tmp_path, kept_as):
    directory = _copy(tiny_directory("qwen3"), tmp_path)
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    if kept_as == "shards":
        AutoModelForCausalLM.from_pretrained(tiny_directory("qwen3"), dtype="float32").save_pretrained(
            directory, max_shard_size="20KB"
        )
        assert len(list(directory.glob("model-*.safetensors"))) > 2
    elif kept_as == "pickle":
        torch.save(weights, directory / "pytorch_model.bin")
    else:
        names = sorted(weights)
        parts = {"a.bin": names[::2], "b.bin": names[1::2]}
        for part, held in parts.items():
            torch.save({name: weights[name] for name in held}, directory / part)
        index = {"metadata": {}, "weight_map": {name: part for part, held in parts.items() for name in held}}
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for dtype in ("float32", "bfloat16"):
        assert load_model(str(directory), dtype=dtype).fingerprint == tiny("qwen3").fingerprint


def test_a_tied_head_that_is_stored_too_changes_nothing(tiny, tiny_directory, tmp_path):
    directory = _copy(tiny_directory("gemma3"), tmp_path)
    assert tiny("gemma3").model.config.tie_word_embeddings
    found = _change(
        directory, lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"].clone()})
    )
    assert found == tiny("gemma3").fingerprint


@pytest.mark.parametrize("seed", range(4))
def test_one_number_anywhere_in_a_checkpoint_changes_its_fingerprint(tiny, tiny_directory, tmp_path, seed):
    directory = _copy(tiny_directory("llama"), tmp_path)
    generator = torch.Generator().manual_seed(seed)

    def change(weights):
        name = sorted(weights)[int(torch.randint(len(weights), (), generator=generator))]
        flat = weights[name].view(-1).view(torch.int32)
        flat[int(torch.randint(len(flat), (), generator=generator))] ^= 1

    assert _change(directory, change) != tiny("llama").fingerprint


def test_an_adapter_that_is_merged_changes_the_fingerprint(tiny):
    model = tiny("llama", fresh=True).model
    before = model_fingerprint(model)
    low = torch.full((model.config.hidden_size, 1), 1e-4, dtype=torch.float64)
    weight = model.model.layers[2].self_attn.o_proj.weight
    weight += low @ torch.ones(1, weight.shape[1], dtype=torch.float64)
    assert model_fingerprint(model) != before


@pytest.mark.model
def test_the_default_model_has_one_fingerprint_in_every_dtype(smollm):
    assert smollm("float64").fingerprint == smollm("float32").fingerprint == smollm("bfloat16").fingerprint
