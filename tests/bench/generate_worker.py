"""The other side of bench_generate.py: texts by `generate` in a process of its own, plain or steered by a library.

    python tests/bench/generate_worker.py MODEL LAYER TOKENS PROMPT

Runs in any environment with transformers. Reads a line {"by": "transformers" | "steering-vectors" | "repeng",
"rows": B}, decodes, and answers with a line: seconds on the clock, CPU seconds of the process, and the ids.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import nullcontext
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

_NORM = 3.0
"""Of the vector that is added to every position: about a strength of 0.2 there."""


def main() -> None:
    """Answers line by line until its input ends."""
    source, layer, tokens, prompt = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    model = AutoModelForCausalLM.from_pretrained(source, torch_dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(source)(prompt, return_tensors="pt").input_ids
    vector = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    vector *= _NORM / vector.norm()
    print(json.dumps({"transformers": transformers.__version__, "torch": torch.__version__}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        prompts = ids.expand(asked["rows"], -1)
        options = {"attention_mask": torch.ones_like(prompts), "do_sample": False, "pad_token_id": 0}
        # The output of block layer - 1 is what the server pushes as the input of block `layer`.
        with _steered(asked["by"], model, layer - 1, vector) as steered:
            began, cpu = time.perf_counter(), time.process_time()
            texts = steered.generate(prompts, max_new_tokens=tokens, min_new_tokens=tokens, **options)
            taken = time.perf_counter() - began, time.process_time() - cpu
        answer = {"seconds": taken[0], "cpu": taken[1], "ids": texts[:, ids.shape[1] :].tolist()}
        print(json.dumps(answer), flush=True)


def _steered(by: str, model: Any, block: int, vector: torch.Tensor) -> Any:
    """A `with` block inside of which the model it gives is steered by the library ``by``."""
    if by == "steering-vectors":
        from steering_vectors import SteeringVector

        return _Applied(model, SteeringVector({block: vector}, "decoder_block"))
    if by == "repeng":
        return _Controlled(model, block, vector)
    return nullcontext(model)


class _Applied:
    def __init__(self, model: Any, vector: Any) -> None:
        self._model, self._applied = model, vector.apply(model)

    def __enter__(self) -> Any:
        self._applied.__enter__()
        return self._model

    def __exit__(self, *error: object) -> None:
        self._applied.__exit__(*error)


class _Controlled:
    def __init__(self, model: Any, block: int, vector: torch.Tensor) -> None:
        from repeng import ControlModel, ControlVector

        self._control = ControlModel(model, [block])
        self._control.set_control(ControlVector(model.config.model_type, {block: vector.numpy()}))

    def __enter__(self) -> Any:
        return self._control

    def __exit__(self, *error: object) -> None:
        self._control.unwrap()


if __name__ == "__main__":
    main()
