"""Where vLLM's model runners (0.32, 0.33) can be told of a step before its forward pass. One class per runner.

Only the worker's own instances are changed, never vLLM's classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from steer_server.engine.vllm.worker.version_check import require_attributes

BeforeStep = Callable[[Sequence[str], "np.ndarray[Any, Any]", "np.ndarray[Any, Any]", torch.Tensor], None]
"""``before_step(requests, starts, computed, ids)``: called before every forward pass.

Request i owns rows starts[i] to starts[i + 1] - 1 of the token ids (T,); before them, computed[i] of its tokens have
keys and values.
"""


class V1RunnerHook:
    """V1 runner (CPU, and CUDA where it is selected): its ``_model_forward`` is wrapped."""

    def __init__(self, runner: Any, before_step: BeforeStep) -> None:
        require_attributes(runner, "_model_forward", "input_batch", "query_start_loc", "input_ids")
        self._runner = runner
        forward = runner._model_forward

        def model_forward(*args: Any, **kwargs: Any) -> Any:
            batch = runner.input_batch
            before_step(batch.req_ids, runner.query_start_loc.np, batch.num_computed_tokens_cpu, runner.input_ids.gpu)
            return forward(*args, **kwargs)

        runner._model_forward = model_forward

    def ids_of(self, request: str, start: int, end: int) -> torch.Tensor:
        """Ids (end - start,) of tokens of a request, which have been fed to the model."""
        batch = self._runner.input_batch
        return torch.from_numpy(batch.token_ids_cpu[batch.req_id_to_index[request], start:end])


class V2RunnerHook:
    """V2 runner: ``prepare_inputs`` of its ``model_state`` is wrapped."""

    def __init__(self, runner: Any, before_step: BeforeStep) -> None:
        require_attributes(runner, "model_state", "req_states")
        self._runner = runner
        model_state = runner.model_state
        require_attributes(model_state, "prepare_inputs")
        original = model_state.prepare_inputs

        def prepare_inputs(batch: Any, states: Any) -> Any:
            before_step(batch.req_ids, batch.query_start_loc_np, batch.num_computed_tokens_np, batch.input_ids)
            return original(batch, states)

        model_state.prepare_inputs = prepare_inputs

    def ids_of(self, request: str, start: int, end: int) -> torch.Tensor:
        """Ids (end - start,) of tokens of a request, which have been fed to the model."""
        states = self._runner.req_states
        ids: torch.Tensor = states.all_token_ids.gpu[states.req_id_to_index[request], start:end]
        return ids
