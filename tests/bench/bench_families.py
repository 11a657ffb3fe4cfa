"""Whether vLLM and the engine hf give the same ids for every architecture that has a table, plain and steered.

    python -m tests.bench.bench_families [NAME ...]

Small random models in float32, of sizes that vLLM's CPU attention takes (heads of 32 numbers), greedy, 24 tokens after
two prompts: plain, and pushed by an operator of each profile at two strengths. Each architecture boots vLLM in a
process of its own (half a minute on two idle cores). A row that parts where float32 cannot tell two tokens apart is a
tie.

A decoder inside of a model that reads images is named in:DECODER, as in in:gemma3.

Without names: all of them. Prints a line for each, with the first lines of the reason where vLLM does not start.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch

from operators.builder.build import build_operator
from operators.builder.concept import concept_from_text
from operators.builder.spec import BuildSpec
from operators.core.apply import Setting
from operators.core.positions import Positions
from operators.maps.detach import family_of
from operators.model.loading import load_model
from steer_server.engine.base import Engine
from steer_server.engine.hf.engine import HFEngine
from steer_server.types import (
    Application,
    DecodeJob,
    Prompt,
    Row,
    RowFinished,
    SamplingParams,
    SteeringPlan,
    TokenEvent,
)
from tests.odd_models import ODD, odd_config, odd_model
from tests.operators.model.whole_models import HOLDERS, whole_model
from tests.tiny_tokenizer import make_tokenizer

PROMPTS = ("Here is a painting of the bridge", "The wedding was beautiful and")
TOKENS = 24
TIE = 1e-3
"""Nats between two tokens that may swap in float32."""
_SIZES: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "head_dim": 32,
    "max_position_embeddings": 256,
}
_OWN_SIZES: dict[str, dict[str, Any]] = {
    # Wide enough for every token of the concept to be read.
    **{name: {"sliding_window": 8} for name in ("mistral", "mixtral", "phi3", "starcoder2")},
    # By the names that the odd model has for them.
    # transformers takes no account of the number of key heads here, and vLLM does.
    "gpt2": {"hidden_size": 96, "n_embd": 96, "max_position_embeddings": 256, "n_positions": 256,
             "num_key_value_heads": 3},
    "gpt_neox": {"num_key_value_heads": 3},
    # Its window is one token wider in vLLM.
    "cohere2": {"logit_scale": 4.0, "sliding_window": 128},
    # Within its first length, where queries do not grow yet.
    "ministral3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.1,
                                       "original_max_position_embeddings": 256}},
    "gemma2": {"query_pre_attn_scalar": 32},
    "gemma3": {"query_pre_attn_scalar": 32},
    # vLLM has neither blocks side by side nor norms on q and k.
    "stablelm": {"use_parallel_residual": False, "qk_layernorm": False},
    "qwen3_moe": {"moe_intermediate_size": 64},
    # vLLM clamps at 7 and has windows on every other layer, whatever the configuration says.
    "gpt_oss": {"swiglu_limit": 7.0, "layer_types": ["sliding_attention", "full_attention"] * 2},
    # As checkpoints say it, and transformers does not; the latent vector and its rotary part are 576 wide on a CPU.
    "deepseek_v3": {"moe_intermediate_size": 64, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "head_dim": 64,
                    "qk_nope_head_dim": 32,
                    "v_head_dim": 32, "q_lora_rank": 48, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
}  # fmt: skip


_TIED = frozenset({"cohere2", "gemma", "gemma2", "gemma3"})
"""vLLM computes these with the embedding table as their head, whatever their configuration says."""
_IN = "in:"


def save(name: str, directory: Path) -> None:
    """A model of that architecture with a head of its own: tied to large embeddings, it would repeat its last token."""
    tokenizer = make_tokenizer()
    text, tied = name.removeprefix(_IN), name.removeprefix(_IN) in _TIED
    sizes = {**_SIZES, **_OWN_SIZES.get(text, {}), "vocab_size": len(tokenizer), "tie_word_embeddings": tied}
    if name == "gpt2":
        # It has no others.
        sizes = {key: value for key, value in sizes.items() if key not in _SIZES or key in _OWN_SIZES[name]}
    inside = name.startswith(_IN)
    model = whole_model(text, odd_config(text, **sizes)) if inside else odd_model(name, **sizes).float()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        if tied:
            model.get_input_embeddings().weight.mul_(0.1)
        else:
            torch.nn.init.normal_(model.get_output_embeddings().weight)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


async def run(engine: Engine, prompt: str, rows: list[Row]) -> list[list[TokenEvent]]:
    """The tokens of each row, with the two likeliest at each place."""
    sampling = SamplingParams(max_tokens=TOKENS, ignore_eos=True, logprobs=2)
    events: list[list[TokenEvent]] = [[] for _ in rows]
    async for event in engine.submit(DecodeJob.of(await engine.encode(Prompt(text=prompt)), sampling, tuple(rows))):
        if isinstance(event, TokenEvent):
            events[event.row].append(event)
        elif isinstance(event, RowFinished):
            assert all(receipt.generated_tokens_steered == TOKENS - 1 for receipt in event.receipts)
    return events


def parted(found: list[TokenEvent], expected: list[TokenEvent]) -> bool | None:
    """None where two rows have the same ids; else whether they part at a tie."""
    for one, other in zip(found, expected, strict=True):
        if one.token_id != other.token_id:
            first, second = other.logprob.top[:2]
            return first.logprob - second.logprob < TIE and one.token_id == second.token_id
    return None


async def compare(name: str, directory: Path) -> str:
    """One line on an architecture."""
    from steer_server.engine.vllm.engine import VLLMEngine

    loaded = load_model(str(directory), dtype="float32", check=family_of)
    rows = [Row()]
    for profile in ("residual", "golden"):
        text = concept_from_text("the golden dress", loaded)
        artifact = build_operator(BuildSpec((text,), profile, 2, "full"), loaded)
        settings = [Setting(strength, "cumulative", 0.0, Positions.parse("all")) for strength in (0.6, -0.4)]
        rows += [Row(SteeringPlan((Application("operator", artifact, setting, ()),))) for setting in settings]
    hf = HFEngine(loaded, max_queue=8)
    options = {"enforce_eager": True, "max_model_len": 128, "block_size": 32}
    vllm = await VLLMEngine.start(loaded, str(directory), dtype="float32", max_queue=64, engine_args=options)
    try:
        counts = {"equal": 0, "tie": 0, "different": 0}
        steered = 0
        for prompt in PROMPTS:
            expected, found = await run(hf, prompt, rows), await run(vllm, prompt, rows)
            for one, other in zip(found, expected, strict=True):
                counts[{None: "equal", True: "tie", False: "different"}[parted(one, other)]] += 1
            plain = [event.token_id for event in expected[0]]
            steered += sum([event.token_id for event in row] != plain for row in expected[1:])
    finally:
        await vllm.close()
        await hf.close()
    said = ", ".join(f"{count} {what}" for what, count in counts.items())
    return (
        f"{said} of {len(rows) * len(PROMPTS)} rows; {steered} of {4 * len(PROMPTS)} steered ones are not the plain one"
    )


def one(name: str) -> None:
    """Compares one architecture, in this process."""
    with tempfile.TemporaryDirectory() as directory:
        save(name, Path(directory))
        print(f"{name}: {asyncio.run(compare(name, Path(directory)))}", flush=True)


def main() -> None:
    """Each architecture in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="architectures, by the name of their table")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(ODD) - {f"{_IN}{name}" for name in HOLDERS}
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}; {', '.join(ODD)} are accepted")
    for name in arguments.names or ODD:
        if arguments.here:
            one(name)
            continue
        began = time.monotonic()
        ran = subprocess.run(
            [sys.executable, "-m", "tests.bench.bench_families", name, "--here"], capture_output=True, text=True
        )
        lines = [line for line in ran.stdout.splitlines() if line.startswith(f"{name}: ")]
        reason = " | ".join(ran.stderr.strip().splitlines()[-2:])
        print(
            lines[0] if lines else f"{name}: not run: {reason[-600:]}",
            f"({time.monotonic() - began:.0f} s)",
            flush=True,
        )


if __name__ == "__main__":
    main()
