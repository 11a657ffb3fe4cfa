"""A build on a model that does not fit into the memory it may use: planned, built block by block, and measured.

    python tests/bench/bench_large_build.py /tmp/big [--shape 8b] [--layers 32] [--limit 12GiB] [--rank 64] [--tokens 8]
        [--dtype float32] [--keep] [--json]

Makes a random Llama of that shape in bfloat16 under the directory (16 GB for 8b; one that is there is used), asks
``steer-operators build --plan`` what a build will take, builds with ``--stream --max-memory LIMIT`` in a process of its
own, prints what both say beside what was measured, and removes the model unless --keep says otherwise.

    anonymous   the most of the process's own memory (RssAnon), sampled every 50 ms: what a limit is about
    files       the most of mapped files (RssFile), which the kernel drops when it wants memory
    peak        FLOP/s of a 4096 x 4096 x 4096 float32 matmul here, best of 3, before and after
    share       the products' FLOP of the plan, over the build's seconds, over that peak

Where it may (a control group with a memory controller that can be written to), the build runs in a group of that limit,
page cache included; the output says whether. Not a test; run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from operators.core.capacity import format_bytes, parse_bytes

SHAPES: dict[str, dict[str, int]] = {
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 32,
        "vocab_size": 128256,
    },
    "small": {
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "num_hidden_layers": 6,
        "vocab_size": 512,
    },
}


def main() -> None:
    """Makes, plans, builds and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="8b")
    parser.add_argument("--layers", type=int, help="other than the shape's")
    parser.add_argument("--limit", default="12GiB")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--make-only", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    shape = SHAPES[options.shape] | ({"num_hidden_layers": options.layers} if options.layers else {})
    options.directory = options.directory.absolute()
    try:
        if not (options.directory / "model.safetensors.index.json").is_file():
            make_model(options.directory, shape)
        if not options.make_only:
            found = measure(options.directory, options)
            print(json.dumps(found) if options.json else "\n".join(f"{key}: {value}" for key, value in found.items()))
    finally:
        if not (options.keep or options.make_only):
            shutil.rmtree(options.directory)


def make_model(directory: Path, shape: dict[str, int]) -> None:
    """Writes configuration, tokenizer and weights, one block in each file."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    directory.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(**shape, max_position_embeddings=8192, tie_word_embeddings=False, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(directory)
    words = Tokenizer(models.WordLevel({"?": 0, **{f"w{token}": token for token in range(1, 400)}}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(directory)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict().items():
        block = re.match(r"model\.layers\.(\d+)\.", name)
        files.setdefault(f"block-{int(block[1]):03}" if block else name, {})[name] = tensor
    index: dict[str, str] = {}
    torch.manual_seed(7)
    for file, tensors in files.items():
        made = {name: _random(tensor) for name, tensor in tensors.items()}
        save_file(made, directory / f"{file}.safetensors", metadata={"format": "pt"})
        index |= dict.fromkeys(made, f"{file}.safetensors")
    listing = {"metadata": {}, "weight_map": index}
    (directory / "model.safetensors.index.json").write_text(json.dumps(listing), encoding="utf-8")


def _random(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.ndim == 1:
        return torch.ones(tensor.shape, dtype=torch.bfloat16)
    return torch.empty(tensor.shape, dtype=torch.bfloat16).normal_(std=tensor.shape[-1] ** -0.5)


def measure(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The plan, the build, and the two side by side."""
    before = gemm_rate()
    text = " ".join(f"w{11 * place + 5}" for place in range(options.tokens))
    command = [sys.executable, "-m", "operators", "build", "large", "--text", text, "--rank", str(options.rank)]
    command += ["--model", str(directory), "--dtype", options.dtype, "--store", str(directory / "store")]
    command += ["--stream", "--max-memory", options.limit, "--replace", "--json"]
    # A cache of its own: the digest of the weights is part of what is measured.
    cache = {**os.environ, "XDG_CACHE_HOME": str(directory / "cache")}
    planned = subprocess.run([*command, "--plan"], stdout=subprocess.PIPE, text=True, check=True, env=cache)
    plan = json.loads(planned.stdout)
    start = time.monotonic()
    group = _group(parse_bytes(options.limit))
    build = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=_joining(group), env=cache)
    peaks: dict[str, int] = {}
    watching = threading.Thread(target=_watch, args=(build.pid, peaks))
    watching.start()
    answer, _ = build.communicate()
    seconds = time.monotonic() - start
    watching.join()
    if build.returncode:
        raise SystemExit(f"the build ended with {build.returncode}: {answer}")
    rate = max(before, gemm_rate())
    built = json.loads(answer)
    return {
        "seconds": round(seconds, 1),
        "predicted": plan["seconds"],
        "predicted over measured": round(plan["seconds"] / seconds, 3),
        "products": plan["products"],
        "passes": plan["passes"],
        "anonymous": format_bytes(peaks["RssAnon"]),
        "files": format_bytes(peaks["RssFile"]),
        "planned memory": format_bytes(plan["memory"]),
        "limit": options.limit,
        "in a group of that limit": group is not None,
        "peak GFLOP/s": round(rate / 1e9, 1),
        "share": round(plan["flop"] / seconds / rate, 3),
        "reconstruction error": built["reconstruction_error"],
        "plan": plan,
    }


def gemm_rate() -> float:
    """FLOP/s of a large float32 matmul, best of 3."""
    torch.set_num_threads(os.cpu_count() or 1)
    side = 4096
    left, right, times = torch.randn(side, side), torch.randn(side, side), []
    for _ in range(3):
        start = time.monotonic()
        left @ right
        times.append(time.monotonic() - start)
    return float(2 * side**3 / min(times))


def _watch(pid: int, peaks: dict[str, int]) -> None:
    while True:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return
        found = dict(re.findall(r"^(RssAnon|RssFile):\s+(\d+) kB", status, re.MULTILINE))
        if not found:
            return
        for field, kilobytes in found.items():
            peaks[field] = max(peaks.get(field, 0), int(kilobytes) << 10)
        time.sleep(0.05)


def _group(limit: int) -> Path | None:
    """A control group of that limit; None where this process may not make one."""
    for root, file in (
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
        (Path("/sys/fs/cgroup"), "memory.max"),
    ):
        group = root / "bench-large-build"
        try:
            group.mkdir(exist_ok=True)
            (group / file).write_text(str(limit))
        except OSError:
            continue
        return group
    return None


def _joining(group: Path | None) -> Any:
    return None if group is None else lambda: (group / "cgroup.procs").write_text(str(os.getpid()))


if __name__ == "__main__":
    main()
