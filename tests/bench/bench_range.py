"""A sketch whose range is found in bfloat16 against one in float32: residual and CPU seconds.

    python tests/bench/bench_range.py [--rank 64] [--pairs 3]

SmolLM2-135M at two layers, and random Llamas of width 576 with 32 and 60 layers, at the last. Residuals are the
certificate's, |J - U B| / |J| over all positions; seconds are medians, of alternating runs. Not a test.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from operators.maps.replay import Replay
from operators.maps.sketch import embedding_root, sketch
from operators.model.loading import load_model

TEXT = "The Golden Gate Bridge in San Francisco"
DTYPES = (None, torch.bfloat16)


def main() -> None:
    """Prints a line per model and layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=3)
    options = parser.parse_args()
    smollm = load_model("smollm2-135m")
    ids = tuple(smollm.tokenizer(TEXT)["input_ids"])
    for layer in (21, 29):
        compare(f"SmolLM2, layer {layer}", smollm.model, ids, layer, options)
    for layers in (32, 60):
        compare(f"random Llama, layer {layers - 1}", random_llama(layers), tuple(range(len(ids))), layers - 1, options)


def compare(name: str, model: PreTrainedModel, ids: tuple[int, ...], layer: int, options: argparse.Namespace) -> None:
    """Both, alternating, on one model."""
    replay = Replay(model, ids, layer=layer, profile="residual")
    root = embedding_root(model.get_input_embeddings().weight)
    seconds: dict[torch.dtype | None, list[float]] = {dtype: [] for dtype in DTYPES}
    residuals = {}
    for _ in range(options.pairs):
        for dtype in DTYPES:
            start = time.process_time()
            residuals[dtype] = sketch(replay, options.rank, root=root, rounded_to=dtype).residual
            seconds[dtype].append(time.process_time() - start)
    single, rounded = (statistics.median(seconds[dtype]) for dtype in DTYPES)
    print(
        f"{name}: residual {residuals[None]:.5f} in float32, {residuals[torch.bfloat16]:.5f} in bfloat16; "
        f"{single:.2f} and {rounded:.2f} CPU seconds ({single / rounded:.2f})",
        flush=True,
    )


def random_llama(layers: int) -> PreTrainedModel:
    """SmolLM2's shape with other depth, and random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


if __name__ == "__main__":
    main()
