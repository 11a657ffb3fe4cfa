import json
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import normalizers, processors
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from operators.core.errors import ModelError
from operators.model.loading import (
    DEFAULT_MODEL,
    decoder_layers,
    default_model,
    embed,
    load_model,
    tokenizer_fingerprint,
)


def test_a_tokenizer_that_adds_a_token_has_another_fingerprint(tiny_tokenizer):
    adding = PreTrainedTokenizerFast(
        tokenizer_object=type(tiny_tokenizer.backend_tokenizer).from_str(tiny_tokenizer.backend_tokenizer.to_str())
    )
    assert tokenizer_fingerprint(adding) == tokenizer_fingerprint(tiny_tokenizer)
    adding.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<end> $A", special_tokens=[("<end>", 0)]
    )
    assert tokenizer_fingerprint(adding) != tokenizer_fingerprint(tiny_tokenizer)


def test_a_tokenizer_that_cuts_other_texts_otherwise_has_the_same_ids_and_fingerprint(tiny_tokenizer):
    # An operator is of ids: it is right for whatever texts they are made of.
    other = PreTrainedTokenizerFast(
        tokenizer_object=type(tiny_tokenizer.backend_tokenizer).from_str(tiny_tokenizer.backend_tokenizer.to_str())
    )
    other.backend_tokenizer.normalizer = normalizers.NFKC()
    assert other("\ufb01sh")["input_ids"] != tiny_tokenizer("\ufb01sh")["input_ids"]
    assert other.get_vocab() == tiny_tokenizer.get_vocab()
    assert tokenizer_fingerprint(other) == tokenizer_fingerprint(tiny_tokenizer)


def test_a_tokenizer_with_a_new_word_has_another_fingerprint(tiny_tokenizer, tiny_directory):
    other = AutoTokenizer.from_pretrained(tiny_directory("llama"))
    assert tokenizer_fingerprint(other) == tokenizer_fingerprint(tiny_tokenizer)
    other.add_tokens(["neverseenbefore"])
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(tiny_tokenizer)


def test_a_loaded_model_knows_its_shape(tiny_directory):
    loaded = load_model(str(tiny_directory("gemma3")), dtype="float64")
    assert (loaded.num_layers, loaded.hidden_size, loaded.context_length) == (4, 48, 64)
    assert loaded.dtype == torch.float64
    assert loaded.device.type == "cpu"
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_embeddings_are_what_the_first_block_receives(tiny, family):
    model, ids = tiny(family).model, torch.tensor([[3, 1, 4]])
    seen = []
    hook = model.model.layers[0].register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    model(ids)
    hook.remove()
    assert torch.equal(embed(model, ids), seen[0])
    scaled = not torch.allclose(embed(model, ids), model.get_input_embeddings().weight[ids])
    assert scaled == (family == "gemma3")


@pytest.mark.parametrize("name", ["", "no-such-model", "nobody/nothing", "./nowhere", "/no/where", "a/b/c", "é"])
def test_an_unknown_model_is_refused_quickly_with_what_is_accepted(name):
    start = time.monotonic()
    with pytest.raises(ModelError) as refusal:
        load_model(name, dtype="float32")
    assert time.monotonic() - start < 10
    assert re.search(rf"model {name!r}(:| cannot be loaded:) ", str(refusal.value))
    assert "'smollm2-135m', 'gemma3-270m', a local directory or .gguf file, a Hugging Face id" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def _copy(directory, tmp_path):
    return shutil.copytree(directory, tmp_path / "model")


def _truncated_weights(directory):
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def _no_weights(directory):
    (directory / "model.safetensors").unlink()


def _no_tokenizer(directory):
    for path in directory.glob("tokenizer*"):
        path.unlink()


def _broken_config(directory):
    (directory / "config.json").write_text("{")


def _unknown_architecture(directory):
    (directory / "config.json").write_text('{"model_type": "perceptron"}')


def _own_code(directory):
    (directory / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}))
    (directory / "mine.py").write_text("raise SystemExit('code of the model was run')")


@pytest.mark.parametrize(
    "damage",
    [_truncated_weights, _no_weights, _no_tokenizer, _broken_config, _unknown_architecture, _own_code],
)
def test_a_damaged_model_is_refused_in_one_line(damage, tiny_directory, tmp_path):
    directory = _copy(tiny_directory("llama"), tmp_path)
    damage(directory)
    with pytest.raises(ModelError, match=rf"model '{directory}' cannot be loaded: .+") as refusal:
        load_model(str(directory), dtype="float32")
    assert "\n" not in str(refusal.value)


def _rewrite(directory, keep):
    """Writes the checkpoint with only those weights whose name satisfies ``keep``."""
    weights = load_file(directory / "model.safetensors")
    save_file({name: w for name, w in weights.items() if keep(name)}, directory / "model.safetensors", {"format": "pt"})


def _no_head(directory):
    _rewrite(directory, lambda name: "lm_head" not in name)


def _one_layer_less(directory):
    _rewrite(directory, lambda name: ".layers.1." not in name)


def _only_embeddings(directory):
    _rewrite(directory, lambda name: "embed_tokens" in name)


def _one_bias_of_a_norm(directory):
    _rewrite(directory, lambda name: name != "model.norm.weight")


def _wider_head(directory):
    weights = load_file(directory / "model.safetensors")
    weights["lm_head.weight"] = torch.zeros(weights["lm_head.weight"].shape[0] + 8, weights["lm_head.weight"].shape[1])
    save_file(weights, directory / "model.safetensors", {"format": "pt"})


def _unknown_quantisation(directory):
    weights = load_file(directory / "model.safetensors")
    packed = {name.replace(".weight", ".qweight") if "_proj" in name else name: w for name, w in weights.items()}
    save_file(packed, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "mine"}}))


@pytest.mark.parametrize(
    "damage", [_no_head, _one_layer_less, _only_embeddings, _one_bias_of_a_norm, _wider_head, _unknown_quantisation]
)
def test_no_parameter_is_ever_random(damage, tiny_directory, tmp_path):
    directory = _copy(tiny_directory("llama"), tmp_path)
    damage(directory)
    with pytest.raises(
        ModelError, match=rf"model '{directory}'.*(has no|has another shape|cannot be loaded)"
    ) as refusal:
        load_model(str(directory), dtype="float32")
    assert "\n" not in str(refusal.value)


def _retyped(directory, dtype, kept_as="model.safetensors"):
    weights = load_file(directory / "model.safetensors")
    weights["lm_head.weight"] = (16 * weights["lm_head.weight"]).to(dtype)
    if kept_as.endswith(".bin"):
        (directory / "model.safetensors").unlink()
        torch.save(weights, directory / kept_as)
    else:
        save_file(weights, directory / kept_as, {"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
@pytest.mark.parametrize("kept_as", ["model.safetensors", "pytorch_model.bin"])
def test_codes_of_a_quantisation_are_not_taken_for_numbers(dtype, kept_as, tiny_directory, tmp_path):
    directory = _copy(tiny_directory("llama"), tmp_path)
    _retyped(directory, dtype, kept_as)
    with pytest.raises(ModelError, match=r"has lm_head\.weight \(\w+\) and 0 more quantised weights"):
        load_model(str(directory), dtype="float32")


def _setting(name, value):
    def change(directory):
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**config, name: value}))

    return change


def _pointer(file):
    return lambda directory: (directory / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


@pytest.mark.parametrize(
    "damage",
    [
        _setting("num_hidden_layers", "x"),
        _setting("num_attention_heads", 0),
        _setting("transformers_weights", "../elsewhere.safetensors"),
        _pointer("model.safetensors"),
        _pointer("tokenizer.json"),
        _pointer("config.json"),
    ],
)
def test_whatever_transformers_raises_is_a_refusal_in_one_line(damage, tiny_directory, tmp_path):
    directory = _copy(tiny_directory("llama"), tmp_path)
    damage(directory)
    with pytest.raises(ModelError, match=r"cannot be loaded: .+") as refusal:
        load_model(str(directory), dtype="float32")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_model.bin"])
def test_the_weights_of_an_adapter_are_not_ignored(file, tiny_directory, tmp_path):
    directory = _copy(tiny_directory("llama"), tmp_path)
    (directory / file).write_bytes(b"")
    with pytest.raises(ModelError, match=rf"holds an adapter \({file}\), which is not applied"):
        load_model(str(directory), dtype="float32")


@pytest.mark.parametrize("with_base", [True, False])
def test_an_adapter_is_not_ignored(with_base, tiny_directory, tmp_path):
    directory = _copy(tiny_directory("llama"), tmp_path)
    if not with_base:
        (directory / "config.json").unlink()
        (directory / "model.safetensors").unlink()
    (directory / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x"}')
    with pytest.raises(ModelError, match=r"holds an adapter \(adapter_config.json\), which is not applied"):
        load_model(str(directory), dtype="float32")


def test_a_pointer_in_the_place_of_weights_is_refused_in_one_line(tiny_directory, tmp_path):
    directory = _copy(tiny_directory("llama"), tmp_path)
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ModelError, match=r"cannot be loaded: .+") as refusal:
        load_model(str(directory), dtype="float32")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("left", [None, '{"tokenizer_class": "LlamaTokenizer"}'])
def test_a_model_without_a_tokenizer_is_refused_before_its_weights_are_read(
    tiny_directory, tmp_path, monkeypatch, left
):
    directory = _copy(tiny_directory("llama"), tmp_path)
    for file in directory.glob("*token*"):
        file.unlink()
    if left is not None:
        # By the name of its class, transformers makes one that has no tokens.
        (directory / "tokenizer_config.json").write_text(left)
    monkeypatch.setattr("operators.model.loading._from_files", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(ModelError) as refusal:
        load_model(str(directory), dtype="float32")
    assert f"{directory} has no tokenizer; its files are needed beside the weights: tokenizer.json, or" in str(
        refusal.value
    )


def test_a_tokenizer_that_cannot_be_read_is_named(tiny_directory, tmp_path):
    directory = _copy(tiny_directory("llama"), tmp_path)
    (directory / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=rf"the tokenizer in {re.escape(str(directory))} cannot be read: .+"):
        load_model(str(directory), dtype="float32")


def test_code_that_comes_with_a_model_is_not_run_and_nobody_is_asked(tiny_directory, tmp_path, monkeypatch):
    directory = _copy(tiny_directory("llama"), tmp_path)
    _own_code(directory)
    questions = []
    monkeypatch.setattr("builtins.input", lambda question: questions.append(question) or "y")
    with pytest.raises(ModelError, match="contains custom code"):
        load_model(str(directory), dtype="float32")
    assert not questions


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_refused_before_the_model_is_looked_for():
    with pytest.raises(ModelError, match="device 'cuda': this machine has no CUDA device"):
        load_model("no-such-model", dtype="float32", device="cuda")


def test_a_model_without_a_list_of_layers_is_refused():
    class Other(nn.Module):
        def get_decoder(self):
            return nn.Linear(1, 1)

    with pytest.raises(ModelError, match="Other: its decoder Linear has none of layers, h"):
        decoder_layers(Other())


def test_the_default_model_is_what_the_environment_says(monkeypatch):
    monkeypatch.delenv("STEER_MODEL", raising=False)
    assert default_model() == DEFAULT_MODEL
    monkeypatch.setenv("STEER_MODEL", "some/model")
    assert default_model() == "some/model"
    monkeypatch.setenv("STEER_MODEL", "")
    assert default_model() == DEFAULT_MODEL


def test_the_module_names_the_place_of_every_model_it_is_asked_for():
    command = [sys.executable, "-m", "operators.model"]
    done = subprocess.run([*command, "some/model", "other/model"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "model some/model: some/model\nmodel other/model: other/model\n")
    done = subprocess.run([*command, "some/model", "./nowhere"], capture_output=True, text=True)
    assert (done.returncode, done.stderr.startswith("model './nowhere': there is no such directory or file")) == (
        1,
        True,
    )


@pytest.mark.parametrize(("meant", "name"), [("smollm2-135m", "smollm2-135M"), ("gemma3-270m", "gemma-3-270m")])
def test_a_name_close_to_a_built_in_one_gets_a_hint(meant, name):
    with pytest.raises(ModelError, match=rf"did you mean '{meant}'\?"):
        load_model(name, dtype="float32")


@pytest.mark.model
def test_the_default_model_has_its_published_shape(smollm):
    loaded = smollm("float32")
    assert (loaded.num_layers, loaded.hidden_size, loaded.context_length) == (30, 576, 8192)
    assert smollm("float64").fingerprint == loaded.fingerprint


def test_a_model_larger_than_the_memory_is_refused_before_it_is_read(tiny_directory, monkeypatch):
    directory = tiny_directory("llama")
    monkeypatch.setattr("operators.model.preflight.free_memory", lambda device: 1000)
    words = r"takes .* KiB of memory in float32; 1000 bytes may be used on cpu"
    with pytest.raises(ModelError, match=words):
        load_model(str(directory), dtype="float32")
