"""Whether a build stays within --max-memory: its peak over the least bound that is accepted for it.

    python tests/bench/bench_memory.py [--tokens 512 1024] [--dtypes float32 bfloat16] [--rank 64] [--layer 21] [--json]

Each build runs in a fresh process, on SmolLM2-135M (or --model). What becomes resident after the model is loaded counts
as beside it. The peak is VmHWM of Linux, from there until the operator is stored, so that it has all that libraries
load meanwhile. ``--model random`` is a small one that needs no files; a test runs it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from operators.builder.build import build_operator
from operators.builder.concept import Concept
from operators.builder.memory import estimate_sketch
from operators.builder.spec import BuildSpec, resolve_spec
from operators.core.header import NeutralTexts
from operators.core.store import Store
from operators.maps.sketch import num_products
from operators.model.loading import LoadedModel, load_model, recognise

_NEUTRAL = NeutralTexts(digest=f"sha256:{'0' * 64}", ids=((1, 2, 3), (4, 5)))


def main() -> None:
    """Prints a line for each build; exit status 1 where one passed its bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--layer", type=int, default=21)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each build")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.model, options.dtypes[0], options.tokens[0], options.rank, options.layer)))
        return
    passed = False
    for tokens in options.tokens:
        for dtype in options.dtypes:
            command = [sys.executable, __file__, "--child", "--tokens", str(tokens), "--dtypes", dtype]
            command += ["--rank", str(options.rank), "--layer", str(options.layer), "--model", options.model]
            ran = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(ran.stdout.splitlines()[-1])
            passed |= found["peak"] > found["bound"]
            print(json.dumps(found) if options.json else _line(found), flush=True)
    sys.exit(passed)


def measure(name: str, dtype: str, tokens: int, rank: int, layer: int) -> dict[str, Any]:
    """Builds and stores an operator within the least memory that is accepted; bytes beside the model."""
    loaded = _random_model(dtype) if name == "random" else load_model(name, dtype=dtype)
    known = int(loaded.model.get_input_embeddings().weight.shape[0])
    ids = tuple(1 + 7 * place % (known - 1) for place in range(tokens))
    spec = BuildSpec((Concept("text " * tokens, ids),), layer=layer, rank=rank, neutral=_NEUTRAL)
    width = num_products(rank, loaded.hidden_size, power_iterations=0, probes=spec.num_probes)
    estimate = estimate_sketch(loaded, tokens, layer, width)
    bound = estimate.fixed + estimate.per_row
    assert resolve_spec(spec, loaded, max_memory=bound).vectors_per_pass == 1
    ctypes.CDLL(None).malloc_trim(0)
    before = _status("VmRSS")
    # The peak begins anew.
    Path("/proc/self/clear_refs").write_text("5")
    with tempfile.TemporaryDirectory() as folder:
        Store(Path(folder)).save("text", build_operator(spec, loaded, max_memory=bound))
    peak = _status("VmHWM") - before
    return {"model": name, "dtype": dtype, "tokens": tokens, "rank": rank, "layer": layer, "peak": peak, "bound": bound}


def _random_model(dtype: str) -> LoadedModel:
    """Small, and large enough for its arrays to be more than what libraries take."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=8,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=1024,
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    loaded = recognise("random", LlamaForCausalLM(config).eval().requires_grad_(False), tokenizer)
    loaded.model.to(getattr(torch, dtype))
    return loaded


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) << 10


def _line(found: dict[str, Any]) -> str:
    peak, bound = found["peak"] / (1 << 20), found["bound"] / (1 << 20)
    return (
        f"{found['model']}, {found['dtype']}, {found['tokens']} tokens, rank {found['rank']}, layer {found['layer']}: "
        f"{peak:.0f} MiB of {bound:.0f} ({peak / bound:.2f})"
    )


if __name__ == "__main__":
    main()
