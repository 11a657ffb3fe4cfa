"""The files of a model that vLLM has started on."""

import dataclasses
import os
import shutil
from types import SimpleNamespace

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


def test_the_limit_of_an_inner_group_counts_for_what_is_free(monkeypatch):
    from vllm.config import ParallelConfig
    from vllm.utils.cpu_resource_utils import get_memory_node_info

    from steer_server.engine.vllm import free_memory

    # Of one node, which need not be all of the machine.
    nodes = []
    monkeypatch.setattr(
        free_memory, "get_memory_node_info", lambda node: nodes.append(get_memory_node_info(node)) or nodes[-1]
    )
    config = SimpleNamespace(parallel_config=ParallelConfig())
    monkeypatch.setattr(free_memory, "memory_left", lambda: None)
    without = free_memory.free_share(config)
    monkeypatch.setattr(free_memory, "memory_left", lambda: 64 << 20)
    assert 0.0 < free_memory.free_share(config) * nodes[-1].total_memory <= 64 << 20
    assert without * nodes[0].total_memory > 64 << 20
