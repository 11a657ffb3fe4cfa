import errno
import json
import logging
import os
import re
import resource
import string
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from operators.core.capacity import format_bytes
from operators.core.errors import ModelError
from operators.model import gguf_conversion
from operators.model import obtain as obtaining
from operators.model.loading import load_model
from operators.model.obtain import obtain

HEADS, SIZE = 2, 32
Q8 = gguf.GGMLQuantizationType.Q8_0


def _leftovers(cache):
    return list((cache / "models").iterdir())


def _llama() -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(11)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=320,
                hidden_size=HEADS * SIZE,
                intermediate_size=96,
                num_hidden_layers=2,
                num_attention_heads=HEADS,
                num_key_value_heads=HEADS,
                max_position_embeddings=64,
                rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
                tie_word_embeddings=False,
            )
        )
    return model.eval()


_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"self_attn.{short}_proj": f"attn_{short}" for short in "qkv"},
    "self_attn.o_proj": "attn_output",
    **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
}


def _gguf_name(name: str) -> str:
    if name.startswith("model.layers."):
        _, _, block, rest = name.split(".", 3)
        return f"blk.{block}.{_NAMES[rest.removesuffix('.weight')]}.weight"
    return f"{_NAMES[name.removesuffix('.weight')]}.weight"


def _write(path, tokenizer, *, architecture="llama", without=(), tensors=(), **settings):
    """A quantised GGUF file of ``_llama()``; returns the weights that it stands for."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in {"context_length": 64, "embedding_length": HEADS * SIZE, "block_count": 2}.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(5000.0)
    writer.add_rope_dimension_count(SIZE)
    writer.add_vocab_size(320)
    spelled = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(spelled["vocab"], key=spelled["vocab"].get))
    writer.add_token_merges([" ".join(merge) for merge in spelled["merges"]])
    writer.add_token_types([3] + [1] * 319)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    for key, value in settings.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}[type(value)]
        add(key.replace("__", "."), value)
    weights = {}
    for name, tensor in _llama().state_dict().items():
        array = tensor.numpy()
        stored = array
        if "q_proj" in name or "k_proj" in name:
            # llama.cpp pairs neighbours where transformers pairs halves.
            stored = array.reshape(HEADS, 2, SIZE // 2, -1).swapaxes(1, 2).reshape(array.shape)
        if array.ndim == 2:
            blocks = gguf.quants.quantize(stored, Q8)
            weights[name] = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(array, Q8), Q8).copy())
        else:
            weights[name] = tensor
        if name not in without:
            if array.ndim == 2:
                writer.add_tensor(_gguf_name(name), blocks, raw_dtype=Q8)
            else:
                writer.add_tensor(_gguf_name(name), stored)
    for name in tensors:
        writer.add_tensor(name, np.ones(SIZE // 2, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def test_a_quantised_file_loads_with_the_weights_that_its_blocks_stand_for(empty_cache, tiny_tokenizer, tmp_path):
    weights = _write(tmp_path / "Tiny Llama.Q8_0.gguf", tiny_tokenizer)
    loaded = load_model(str(tmp_path / "Tiny Llama.Q8_0.gguf"), dtype="float32")
    found = loaded.model.state_dict()
    assert found.keys() == weights.keys()
    for name, expected in weights.items():
        assert torch.equal(found[name], expected), name
        assert found[name].ndim == 1 or not torch.equal(expected, _llama().state_dict()[name])
    assert loaded.model.config.rope_parameters["rope_theta"] == 5000.0
    (made,) = _leftovers(empty_cache)
    assert made.name.startswith("tiny-llama.q8_0-")


def test_a_converted_file_is_not_converted_again_and_another_content_is(
    empty_cache, tiny_tokenizer, tmp_path, monkeypatch
):
    path = tmp_path / "a.gguf"
    _write(path, tiny_tokenizer)
    first = obtain(str(path))
    with monkeypatch.context() as patch:
        patch.setattr(obtaining, "convert_gguf", None)
        assert obtain(str(path)) == first
    _write(path, tiny_tokenizer, general__name="another")
    assert obtain(str(path)) not in (first, path)
    assert len(_leftovers(empty_cache)) == 2


def test_a_directory_with_one_file_and_no_safetensors_stands_for_the_file(empty_cache, tiny_tokenizer, tmp_path):
    (tmp_path / "d").mkdir()
    _write(tmp_path / "d" / "a.gguf", tiny_tokenizer)
    assert obtain(str(tmp_path / "d")) == obtain(str(tmp_path / "d" / "a.gguf"))


def test_a_directory_with_safetensors_is_loaded_from_them(tiny_directory, tmp_path):
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "model.gguf").touch()
    assert obtain(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(("says", "adds"), [(True, True), (False, False), (None, False)])
def test_the_tokenizer_begins_texts_with_bos_where_the_file_says_so(says, adds, empty_cache, tiny_tokenizer, tmp_path):
    settings = {} if says is None else {"tokenizer__ggml__add_bos_token": says}
    _write(tmp_path / "a.gguf", tiny_tokenizer, **settings)
    loaded = load_model(str(tmp_path / "a.gguf"), dtype="float32")
    plain = tiny_tokenizer("Golden Gate")["input_ids"]
    expected = [0, *plain] if adds else plain
    assert loaded.tokenizer("Golden Gate")["input_ids"] == expected
    # Also for who reads the file without transformers.
    saved = Tokenizer.from_file(str(obtain(str(tmp_path / "a.gguf")) / "tokenizer.json"))
    assert saved.encode("Golden Gate").ids == expected


def _word_tokenizer(*, merged):
    """Of four words; without its merges it spells them."""
    vocabulary = {token: place for place, token in enumerate(["<unk>", "Ġ", *string.ascii_lowercase])}
    merges = []
    for word in ("mountain", "weather", "kitchen", "journey"):
        for end in range(2, len(word) + 1):
            merges.append((word[: end - 1], word[end - 1]))
            vocabulary.setdefault(word[:end], len(vocabulary))
    model = Tokenizer(models.BPE(vocabulary, merges if merged else [], unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return PreTrainedTokenizerFast(tokenizer_object=model)


def test_a_tokenizer_that_spells_the_words_of_its_vocabulary_is_refused():
    gguf_conversion.check_tokenizer("whole.gguf", _word_tokenizer(merged=True))
    with pytest.raises(ModelError, match=r"spelled.gguf: the tokenizer that transformers .* finds 0 of \d+ words"):
        gguf_conversion.check_tokenizer("spelled.gguf", _word_tokenizer(merged=False))


def test_what_an_earlier_version_converted_is_looked_at_once_and_made_again_where_it_spells(
    empty_cache, tiny_tokenizer, tmp_path, monkeypatch
):
    _write(tmp_path / "a.gguf", tiny_tokenizer)
    source = str(tmp_path / "a.gguf")
    directory = obtain(source)
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    # As an earlier version left it: without the mark, and with a tokenizer that spells.
    (mark,) = [path for path in directory.iterdir() if "checked" in path.name]
    mark.unlink()
    _word_tokenizer(merged=False).save_pretrained(directory)
    assert obtain(source) == directory
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    assert _leftovers(empty_cache) == [directory]
    # One that finds its words stays, and is looked at once.
    mark.unlink()
    monkeypatch.setattr(obtaining, "convert_gguf", lambda *_: pytest.fail("it was converted again"))
    obtain(source)
    assert mark.exists()
    monkeypatch.setattr(gguf_conversion, "check_tokenizer", lambda *_: pytest.fail("it was looked at again"))
    obtain(source)


def test_a_sentencepiece_tokenizer_adds_bos_unless_the_file_says_otherwise():
    assert gguf_conversion.adds_bos({"tokenizer.ggml.model": "llama"})
    assert not gguf_conversion.adds_bos({"tokenizer.ggml.model": "llama", "tokenizer.ggml.add_bos_token": False})


def test_a_conversion_is_logged_and_draws_no_bar_where_nobody_watches(
    empty_cache, tiny_tokenizer, tmp_path, caplog, capfd
):
    _write(tmp_path / "a.gguf", tiny_tokenizer)
    capfd.readouterr()
    with caplog.at_level(logging.INFO, "operators.model"):
        obtain(str(tmp_path / "a.gguf"))
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("operators.model.")]
    assert lines == ["converting a.gguf to safetensors (about a minute)", "converting its tokenizer"]
    assert "%" not in capfd.readouterr().err


def test_a_file_whose_numbers_do_not_fit_is_refused_before_they_are_read(
    empty_cache, tiny_tokenizer, tmp_path, monkeypatch
):
    numbers = sum(weights.numel() for weights in _write(tmp_path / "a.gguf", tiny_tokenizer).values())
    monkeypatch.setattr(gguf_conversion, "free_memory", lambda _device: 4 * numbers - 1)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("read"))
    size = re.escape(format_bytes(4 * numbers))
    words = rf"a\.gguf takes {size} of memory where it is de-quantised, to float32; .* may be"
    with pytest.raises(ModelError, match=words):
        obtain(str(tmp_path / "a.gguf"))
    assert not _leftovers(empty_cache)


def test_a_disk_that_fills_up_during_a_conversion_is_told_and_nothing_is_left(empty_cache, tiny_tokenizer, tmp_path):
    _write(tmp_path / "a.gguf", tiny_tokenizer)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(ModelError, match=rf"{empty_cache}/models cannot be written to: .*File too large"):
            obtain(str(tmp_path / "a.gguf"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not _leftovers(empty_cache)


def _no_cache(monkeypatch, tmp_path):
    (tmp_path / "cache").touch()
    return tmp_path / "a.gguf", rf"model '.*': {tmp_path}/cache(/models)?: (Not a directory|File exists)"


def _no_space(monkeypatch, tmp_path):
    def full(*_args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(obtaining, "convert_gguf", full)
    return tmp_path / "a.gguf", r"model '.*a\.gguf': No space left on device"


def _no_space_for_a_tokenizer(monkeypatch, tmp_path):
    def full(*_args, **_kwargs):
        # As tokenizers raises it.
        raise Exception(os.strerror(errno.ENOSPC))

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", full)
    return tmp_path / "a.gguf", rf"{tmp_path}/cache/models cannot be written to: No space left on device"


def _no_listing(monkeypatch, tmp_path):
    def refuse(directory):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(directory))

    monkeypatch.setattr(Path, "iterdir", refuse)
    return tmp_path, rf"model '{tmp_path}': {tmp_path}: Permission denied"


@pytest.mark.parametrize("arrange", [_no_cache, _no_space, _no_space_for_a_tokenizer, _no_listing])
@pytest.mark.usefixtures("empty_cache")
def test_what_the_file_system_refuses_is_told_in_one_line(arrange, tiny_tokenizer, tmp_path, monkeypatch):
    _write(tmp_path / "a.gguf", tiny_tokenizer)
    name, words = arrange(monkeypatch, tmp_path)
    with pytest.raises(ModelError, match=words):
        obtain(str(name))


def _missing(directory, _tokenizer):
    return directory / "nowhere.gguf", r"'.*nowhere\.gguf': there is no such file \(accepted: 'smollm2-135m'"


def _hub_like(_directory, _tokenizer):
    return "org/model.gguf", r"'org/model\.gguf': there is no such file"


def _text(directory, _tokenizer):
    (directory / "a.gguf").write_text("version https://git-lfs")
    return directory / "a.gguf", r"a\.gguf is no GGUF file: it begins with b'vers', not b'GGUF'"


def _other_file(directory, _tokenizer):
    (directory / "pytorch.pt").write_bytes(b"PK\3\4....")
    return directory / "pytorch.pt", r"pytorch\.pt is no GGUF file"


def _empty(directory, _tokenizer):
    (directory / "a.gguf").touch()
    return directory / "a.gguf", r"a\.gguf is no GGUF file: it begins with b''"


def _two(directory, _tokenizer):
    (directory / "two").mkdir()
    for name in "ba":
        (directory / "two" / f"{name}.gguf").touch()
    return directory / "two", r"two': the directory has 2 GGUF files \(a\.gguf, b\.gguf\); name one of them"


def _unreadable_architecture(directory, tokenizer):
    _write(directory / "a.gguf", tokenizer, architecture="plamo2")
    return directory / "a.gguf", r"a\.gguf cannot be converted; its architecture is 'plamo2', .*gemma3.*llama.*plamo2"


def _truncated(directory, tokenizer):
    _write(directory / "a.gguf", tokenizer)
    data = (directory / "a.gguf").read_bytes()
    (directory / "a.gguf").write_bytes(data[: len(data) // 2])
    return directory / "a.gguf", r"a\.gguf cannot be converted"


def _cut_in_the_header(directory, tokenizer):
    _write(directory / "a.gguf", tokenizer)
    (directory / "a.gguf").write_bytes((directory / "a.gguf").read_bytes()[:100])
    return directory / "a.gguf", r"a\.gguf cannot be converted"


def _incomplete(directory, tokenizer):
    _write(directory / "a.gguf", tokenizer, without=["model.layers.1.mlp.up_proj.weight"])
    return directory / "a.gguf", r"a\.gguf lacks 1 weights of LlamaForCausalLM: model\.layers\.1\.mlp\.up_proj\.weight"


def _one_of_several(directory, tokenizer):
    _write(directory / "a.gguf", tokenizer, split__count=3)
    return directory / "a.gguf", r"a\.gguf is one of 3 parts"


def _frequencies(directory, tokenizer):
    _write(directory / "a.gguf", tokenizer, tensors=["rope_freqs.weight"])
    return directory / "a.gguf", r"scales its rotary positions \(rope_freqs\.weight\)"


def _scaling(directory, tokenizer):
    _write(directory / "a.gguf", tokenizer, llama__rope__scaling__type="yarn")
    return directory / "a.gguf", r"scales its rotary positions \(llama\.rope\.scaling\.type = 'yarn'\)"


@pytest.mark.parametrize(
    "damage",
    [
        *(_missing, _hub_like, _text, _other_file, _empty, _two, _unreadable_architecture),
        *(_truncated, _cut_in_the_header, _incomplete, _one_of_several, _frequencies, _scaling),
    ],
)
def test_a_file_that_cannot_be_converted_is_refused_by_name_and_leaves_nothing(
    damage, empty_cache, tiny_tokenizer, tmp_path
):
    (tmp_path / "files").mkdir()
    name, message = damage(tmp_path / "files", tiny_tokenizer)
    with pytest.raises(ModelError, match=message) as refusal:
        load_model(str(name), dtype="float32")
    assert "\n" not in str(refusal.value)
    assert not (empty_cache / "models").exists() or not _leftovers(empty_cache)
