"""Directories with more weights than a model's, which vLLM and transformers would not read alike."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from steer_server.errors import StartupError

pytestmark = pytest.mark.vllm


def _two_files(directory):
    shutil.copy(directory / "model.safetensors", directory / "model_ema.safetensors")


def _stale_index(directory):
    shutil.copy(directory / "model.safetensors", directory / "old.safetensors")
    index = {"weight_map": dict.fromkeys(load_file(directory / "model.safetensors"), "old.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _consolidated(directory):
    shutil.copy(directory / "model.safetensors", directory / "consolidated.safetensors")


def _named_by_the_configuration(directory):
    save_file(load_file(directory / "model.safetensors"), directory / "other.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"transformers_weights": "other.safetensors"}))


def _pickled(directory):
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.pt")


def _nothing(_directory):
    pass


def _check(directory, load_format="auto"):
    from vllm.config.load import LoadConfig

    from steer_server.engine.vllm.weight_files import check_same_weights

    check_same_weights(str(directory), LoadConfig(load_format=load_format))


@pytest.mark.parametrize(
    ("add", "load_format", "named"),
    [
        (_two_files, "auto", "model_ema.safetensors"),
        (_two_files, "runai_streamer", "model_ema.safetensors"),
        (_stale_index, "auto", "model.safetensors, old.safetensors"),
        (_consolidated, "auto", "consolidated.safetensors"),
        (_named_by_the_configuration, "auto", "model.safetensors"),
        (_pickled, "pt", "model.safetensors, pytorch_model.pt"),
        (_nothing, "npcache", "finds no weights"),
    ],
)
def test_vllm_is_not_started_on_other_weights_than_those_that_were_fingerprinted(
    tiny_directory, tmp_path, add, load_format, named
):
    directory = shutil.copytree(tiny_directory("llama"), tmp_path / "model")
    add(directory)
    with pytest.raises(StartupError, match=named):
        _check(directory, load_format)


def test_what_both_read_alike_is_accepted(tiny, tiny_directory, tmp_path):
    one = shutil.copytree(tiny_directory("llama"), tmp_path / "one")
    _pickled(one)
    (one / "training_args.bin").write_bytes(b"")
    _check(one)
    tiny("llama", fresh=True).model.save_pretrained(tmp_path / "many", max_shard_size="60KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    _check(tmp_path / "many")
