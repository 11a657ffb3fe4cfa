"""The files of a model that vLLM has started on."""

import dataclasses
import os
import shutil

import pytest

from operators.model.loading import load_model
from steer_server.errors import StartupError

pytestmark = pytest.mark.vllm


def test_weights_that_were_replaced_before_vllm_had_read_them_are_noticed(tiny_directory, tmp_path):
    from steer_server.engine.vllm.boot import check_same_files

    directory = shutil.copytree(tiny_directory("llama"), tmp_path / "model")
    loaded = load_model(str(directory))
    check_same_files(loaded)
    shutil.copy2(directory / "model.safetensors", directory / "new")
    os.replace(directory / "new", directory / "model.safetensors")
    with pytest.raises(StartupError, match=r"model\.safetensors was changed after the model began to load"):
        check_same_files(loaded)
    # A model that was made in memory has no files that could change.
    check_same_files(dataclasses.replace(loaded, files=None))
