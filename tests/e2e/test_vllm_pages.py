"""The options of vLLM that the pages name are options of the vLLM that is installed."""

import dataclasses
import re
from pathlib import Path

import pytest

from steer_server.engine.vllm.options import check_engine_args, read_engine_args

ROOT = Path(__file__).parents[2]


@pytest.mark.vllm
def test_the_engine_args_that_the_pages_name_are_accepted():
    from vllm import AsyncEngineArgs

    given = [
        argument
        for page in ("README.md", "docs/LARGE.md")
        for argument in re.findall(r"--engine-args ([a-z_]+=[\w.]+)", (ROOT / page).read_text(encoding="utf-8"))
    ]
    options = read_engine_args(given)
    assert {"max_model_len", "tensor_parallel_size", "distributed_executor_backend"} <= options.keys()
    check_engine_args(options, [field.name for field in dataclasses.fields(AsyncEngineArgs)])
