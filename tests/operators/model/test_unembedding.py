"""Rows of the unembedding from the files of a model, without the model."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from operators.core.errors import ModelError
from operators.model.checkpoint_files import CheckpointFiles
from operators.model.loading import load_model
from operators.model.unembedding import find_unembedding, loaded_unembedding


def _save(loaded, directory, **options):
    loaded.model.save_pretrained(directory, **options)
    return directory


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_its_rows_are_those_of_the_loaded_model(tiny, tmp_path, family, dtype):
    loaded = tiny(family, dtype=dtype, fresh=True)
    found = find_unembedding(str(_save(loaded, tmp_path)))
    table = loaded.model.get_output_embeddings().weight.float()
    assert torch.equal(found.rows([3, 0, 319, 3]), table[[3, 0, 319, 3]])
    torch.testing.assert_close(found.mean(), table.mean(0))
    assert torch.equal(found.mean(), loaded_unembedding(loaded.model).mean())
    assert (found.vocabulary, found.hidden_size, found.tied) == (*table.shape, family != "llama")


def test_a_checkpoint_in_several_files_is_read_through_its_index(tiny, tmp_path):
    loaded = tiny("llama", dtype="float32", fresh=True)
    _save(loaded, tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(find_unembedding(str(tmp_path)).rows([7]), loaded.model.lm_head.weight[[7]])


def test_half_precision_is_widened(tiny, tmp_path):
    loaded = tiny("llama", dtype="float32", fresh=True)
    loaded.model.half()
    found = find_unembedding(str(_save(loaded, tmp_path))).rows([7])
    assert torch.equal(found, loaded.model.lm_head.weight[[7]].float())


def test_a_token_without_a_row_is_an_error(tiny_directory):
    with pytest.raises(ModelError, match="token 320 has no row; the unembedding has 320"):
        find_unembedding(str(tiny_directory("llama"))).rows([320])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("lm_head.weight"), "quantised"),
        (lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"].to(torch.int8)}), "I8 of shape"),
        (lambda tensors: tensors.update({"a.lm_head.weight": torch.zeros(1)}), "could be the unembedding"),
    ],
    ids=["quantised", "int8", "two"],
)
def test_a_head_of_another_form_is_refused(tiny, tmp_path, change, message):
    _save(tiny("llama", dtype="float32", fresh=True), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=message):
        find_unembedding(str(tmp_path))


def test_files_that_are_not_safetensors_are_refused(tiny, tmp_path):
    _save(tiny("llama", dtype="float32", fresh=True), tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="it has no model"):
        find_unembedding(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"PK\x03\x04")
    with pytest.raises(ModelError, match="no whole safetensors file"):
        find_unembedding(str(tmp_path))


@pytest.mark.parametrize("part", ["../elsewhere.safetensors", "/elsewhere.safetensors"])
def test_an_index_cannot_name_files_elsewhere(tiny, tmp_path, part):
    _save(tiny("llama", dtype="float32", fresh=True), tmp_path)
    index = {"weight_map": {"lm_head.weight": part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="which is not beside it"):
        find_unembedding(str(tmp_path))


def _write_again(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes())


def test_rows_of_a_file_that_was_changed_are_refused(tiny_directory, tmp_path):
    directory = shutil.copytree(tiny_directory("llama"), tmp_path / "model")
    found = find_unembedding(str(directory))
    found.rows([7])
    _write_again(directory)
    for read in (lambda: found.rows([7]), found.mean):
        with pytest.raises(ModelError, match=r"model\.safetensors was changed after the model began to load"):
            read()
    assert torch.equal(find_unembedding(str(directory)).rows([7]), find_unembedding(str(directory)).rows([7]))
    (directory / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        found.rows([7])


def test_a_model_whose_files_are_no_longer_those_that_are_served_has_no_rows(tiny_directory, tmp_path):
    directory = shutil.copytree(tiny_directory("llama"), tmp_path / "model")
    files = CheckpointFiles.of(directory)
    assert find_unembedding(str(directory), files).vocabulary == 320
    _write_again(directory)
    with pytest.raises(ModelError, match="was changed after the model began to load"):
        find_unembedding(str(directory), files)


@pytest.mark.parametrize("how", ["an index beside it", "another file by the configuration"])
def test_of_two_checkpoints_the_one_is_read_that_the_model_is_loaded_from(tiny, tmp_path, how):
    loaded = tiny("llama", dtype="float32", fresh=True)
    loaded.tokenizer.save_pretrained(tmp_path)
    _save(loaded, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    other = {name: tensor + 1.0 for name, tensor in tensors.items()}
    save_file(other, tmp_path / "other.safetensors", {"format": "pt"})
    if how == "an index beside it":
        index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "other.safetensors")}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"transformers_weights": "other.safetensors"}))
    again = load_model(str(tmp_path))
    assert torch.equal(find_unembedding(str(tmp_path)).rows([7]), again.model.lm_head.weight[[7]])


def test_rows_are_those_of_the_files_whatever_the_name_means_now(tiny_directory, tmp_path):
    served, newer = (shutil.copytree(tiny_directory("llama"), tmp_path / name) for name in ("served", "newer"))
    files = CheckpointFiles.of(served)
    tensors = load_file(newer / "model.safetensors")
    save_file({name: -tensor for name, tensor in tensors.items()}, newer / "model.safetensors", {"format": "pt"})
    assert find_unembedding(str(newer), files).file.parent == served
