"""Operators of the default model, and an engine to hold against independent computations."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from pytest_asyncio import is_async_test
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from operators.builder.build import build_operator
from operators.builder.concept import concept_from_text
from operators.builder.spec import BuildSpec
from operators.core.apply import Setting
from operators.core.artifact import OperatorArtifact
from operators.core.defaults import PUBLISHED
from operators.core.positions import Positions
from operators.model.loading import LoadedModel, block_input, decoder_layers, load_model
from operators.model.obtain import obtain
from steer_server.engine.base import Engine
from steer_server.engine.hf.engine import HFEngine
from steer_server.types import (
    Admitted,
    Application,
    DecodeJob,
    EngineEvent,
    Prompt,
    Row,
    RowFinished,
    SamplingParams,
    SteeringPlan,
)

Build = Callable[..., OperatorArtifact]
_DEFAULT_ENGINE = repr((None, []))
PUSHED: dict[str, Callable[[int, int], bool]] = {
    "all": lambda k, n: True,
    "first": lambda k, n: k == 0,
    "2..": lambda k, n: k >= 2,
    "prompt": lambda k, n: k < n,
    "generated": lambda k, n: k >= n,
    "3..9": lambda k, n: 3 <= k < 9,
    "prompt:2..": lambda k, n: 2 <= k < n,
    "generated:1..4": lambda k, n: n + 1 <= k < n + 4,
}
"""Whether position k is pushed in a text whose prompt has n tokens, by the text form of the positions."""
ENGINES = ["hf", pytest.param("vllm", marks=pytest.mark.vllm)]


@pytest.fixture(scope="session")
def operator_of(smollm: Callable[..., LoadedModel]) -> Build:
    """``operator_of(text, profile, layer, rank=None)``: an operator of the default model, built once."""

    @functools.cache
    def build(text: str, profile: str, layer: int, rank: int | str | None = None) -> OperatorArtifact:
        loaded = smollm()
        texts = (concept_from_text(text, loaded),)
        return build_operator(BuildSpec(texts, profile, layer, rank, recommended=PUBLISHED), loaded)

    return build


@pytest.fixture(scope="session")
def even(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LoadedModel]:
    """A random Llama whose heads vLLM can divide and its CPU attention takes: its directory, and the model."""
    directory = tmp_path_factory.mktemp("even")
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=1.5 / parameter.shape[1] ** 0.5)
    model.save_pretrained(directory)
    tiny_tokenizer.save_pretrained(directory)
    return directory, load_model(str(directory), dtype="float32")


@pytest_asyncio.fixture(scope="package", loop_scope="session")
async def vllm_engine(smollm: Callable[..., LoadedModel]) -> AsyncIterator[Callable[..., Awaitable[Any]]]:
    """``await vllm_engine()``: the vLLM engine on the default model in float32, booted once. Options boot another.

    It lives in the session's event loop, and so must what uses it. Of the others only the last one asked for is kept,
    and none beyond these tests: each takes 2 GB, and a share of the processor even when idle.
    """
    booted: dict[str, Any] = {}

    async def boot(loaded: LoadedModel | None = None, source: str | None = None, **options: Any) -> Any:
        from steer_server.engine.vllm.engine import VLLMEngine

        key = repr((source, sorted(options.items())))
        if key not in booted:
            for other in [name for name in booted if _DEFAULT_ENGINE not in (key, name)]:
                await booted.pop(other).close()
            booted[key] = await VLLMEngine.start(
                loaded or smollm(),
                source or str(obtain("smollm2-135m")),
                dtype="float32",
                max_queue=256,
                engine_args={"enforce_eager": True, "max_model_len": 1024, "block_size": 32, **options},
            )
        return booted[key]

    yield boot
    for engine in booted.values():
        await engine.close()


@pytest_asyncio.fixture(loop_scope="session", params=ENGINES)
async def engine(
    request: pytest.FixtureRequest, smollm: Callable[..., LoadedModel], vllm_engine: Callable[[], Awaitable[Engine]]
) -> AsyncIterator[Engine]:
    """Each engine on the default model in float32. The same assertions hold for both."""
    if request.param == "vllm":
        yield await vllm_engine()
        return
    engine = HFEngine(smollm(), max_queue=64)
    yield engine
    await engine.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A vLLM engine lives in one event loop: that of the session."""
    for item in items:
        if Path(__file__).parent in item.path.parents and is_async_test(item):
            item.add_marker(pytest.mark.asyncio(loop_scope="session"), append=False)


@pytest.fixture
def decode() -> Callable[..., object]:
    """``await decode(engine, prompt, sampling, *rows)``: the token ids of each row, and its end."""

    async def run(
        engine: Engine, prompt: str, sampling: SamplingParams, *rows: Row
    ) -> list[tuple[list[int], RowFinished]]:
        ids: list[list[int]] = [[] for _ in rows]
        ends: dict[int, RowFinished] = {}
        event: EngineEvent
        async for event in engine.submit(DecodeJob.of(await engine.encode(Prompt(text=prompt)), sampling, rows)):
            if isinstance(event, RowFinished):
                ends[event.row] = event
            elif not isinstance(event, Admitted):
                ids[event.row].append(event.token_id)
        return [(ids[row], ends[row]) for row in range(len(rows))]

    return run


@pytest.fixture(scope="session")
def steered_row() -> Callable[..., Row]:
    """``steered_row(artifact, strength, rule="cumulative", blend=0.0, positions="all")``."""

    def make(
        artifact: OperatorArtifact,
        strength: float,
        rule: str = "cumulative",
        blend: float = 0.0,
        positions: str = "all",
        how: tuple[str, ...] = (),
    ) -> Row:
        setting = Setting(strength, rule, blend, Positions.parse(positions), *how)
        return Row(SteeringPlan((Application("operator", artifact, setting, ()),)))

    return make


@pytest.fixture(scope="session")
def recompute() -> Callable[..., list[list[int]]]:
    """``recompute(model, artifact, prompt_ids, strengths, tokens, rule, blend, positions, how)``, as ``steered_row``.

    The token ids of each strength.

    The procedure as it is written down and as slowly as it reads: everything again for every token, no KV cache, no
    code shared with the engine; a row per strength, greedily. Position k of the input of the injection layer gets
    (strength/2) |h_k| d_k/|d_k|, with d_k between a_k/|a_k| and z/|z|, where ``PUSHED[positions]`` says so. ``how`` is
    (anchor, first token); without, z = y and the first token is one like others.
    """

    known: dict[object, list[list[int]]] = {}

    def run(model, artifact, prompt_ids, strengths, tokens, rule="cumulative", blend=0.0, positions="all", how=()):  # type: ignore[no-untyped-def]
        asked = (id(model), artifact.digest, tuple(prompt_ids), tuple(strengths), tokens, rule, blend, positions, how)
        if asked not in known:
            # Every engine is held against the same answer.
            known[asked] = slowly(model, artifact, prompt_ids, strengths, tokens, rule, blend, positions, how)
        return known[asked]

    def slowly(model, artifact, prompt_ids, strengths, tokens, rule, blend, positions, how):  # type: ignore[no-untyped-def]
        site = decoder_layers(model)[artifact.header.injection_layer]
        rows, blocks = [list(prompt_ids) for _ in strengths], artifact.jacobian().double()
        for _ in range(tokens):
            inputs = [block_input(model, model.get_input_embeddings()(torch.tensor(ids))) for ids in rows]
            units = [_directions(artifact, blocks, x, rule, blend, *how) for x in inputs]

            def add(_module, args, units=units):  # type: ignore[no-untyped-def]
                hidden = args[0].clone()
                for row, strength in enumerate(strengths):
                    for k, unit in enumerate(units[row]):
                        if not PUSHED[positions](k, len(prompt_ids)):
                            continue
                        h = hidden[row, k]
                        hidden[row, k] = h + ((strength / 2) * h.norm() * unit).to(h.dtype)
                return (hidden, *args[1:])

            handle = site.register_forward_pre_hook(add)
            with torch.no_grad():
                logits = model(torch.tensor(rows), use_cache=False, logits_to_keep=1).logits[:, -1]
            handle.remove()
            for ids, token in zip(rows, logits.argmax(-1).tolist(), strict=True):
                ids.append(token)
        return [_until_end(ids[len(prompt_ids) :], model.config.eos_token_id) for ids in rows]

    run.pushed = PUSHED  # type: ignore[attr-defined]
    return run


def _directions(
    artifact: OperatorArtifact,
    blocks: torch.Tensor,
    x: torch.Tensor,
    rule: str,
    blend: float,
    anchor: str = "concept",
    first_token: str = "operator",
) -> list[torch.Tensor]:
    n, y = len(blocks), artifact.anchor.double()
    z = y - artifact.neutral.double() if anchor == "contrast" and artifact.neutral is not None else y
    units, total = [], torch.zeros_like(y) if artifact.offset is None else artifact.offset.double()
    for k in range(len(x)):
        total = total + blocks[k % n] @ x[k].double()
        a = total if rule == "cumulative" else artifact.substitute_base.double() + blocks[n - 1] @ x[k].double()
        beta = 1.0 if k == 0 and first_token == "anchor" else blend
        d = (1 - beta) * a / a.norm() + beta * z / z.norm()
        units.append(d / d.norm())
    return units


def _until_end(ids: list[int], end: int | None) -> list[int]:
    return ids[: ids.index(end) + 1] if end in ids else ids
