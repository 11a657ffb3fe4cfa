"""Starts vLLM on a model, and tests that it serves that model and steers it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

import structlog
import torch
from vllm.v1.engine.async_llm import AsyncLLM

from operators.core.apply import Setting
from operators.core.errors import ModelError
from operators.core.header import DTypeName
from operators.core.neutral_texts import neutral_texts
from operators.core.positions import Positions
from operators.model.loading import LoadedModel
from operators.model.text_ids import text_ids
from steer_server.engine.proof import Proof
from steer_server.engine.random_operators import random_operators
from steer_server.engine.reference import EmbeddingRows, EmbedIds
from steer_server.engine.vllm.cache_salts import CacheSalts
from steer_server.engine.vllm.client import VLLMClient
from steer_server.engine.vllm.engine_config import USAGE, logprob_tolerance, make_engine_config
from steer_server.engine.vllm.measurements import prove
from steer_server.engine.vllm.processes import engine_core_in_its_own_session
from steer_server.engine.vllm.self_test import (
    TOKENS,
    SelfTestOutput,
    check_same_model,
    check_steering,
)
from steer_server.engine.vllm.start_problem import problem_file, read_problem
from steer_server.engine.vllm.transfer import OperatorSender
from steer_server.engine.vllm.weight_files import check_same_weights
from steer_server.engine.vllm.worker_protocol import OperatorSetting
from steer_server.errors import StartupError
from steer_server.types import Application, ModelInfo, SteeringPlan

log = structlog.get_logger(__name__)

_PROMPT = "The capital of France is the city of"
"""Ordinary text: on control tokens alone, rounding to bfloat16 changes what SmolLM2 says by more than 3 nats."""
_MAX_PROMPT = 9
"""Tokens: a short context is enough to see that every layer steers, whatever the tokenizer."""
_MAX_TEXT = 64
"""Tokens by which it is seen that the model is the same: what positions do to it shows behind the first few alone."""


async def boot_vllm(
    loaded: LoadedModel,
    model: ModelInfo,
    source: str,
    *,
    dtype: DTypeName,
    engine_args: Mapping[str, Any],
    operator_memory: int | None,
    salts: CacheSalts,
) -> VLLMClient:
    """A running vLLM that has passed its self-test.

    Args:
        loaded: the same model in transformers, for its files and what it makes of the self-test's prompt; not kept.
        model: its description.
        source: directory or Hugging Face id of the model.

    Raises:
        StartupError: an option that is not accepted, an engine that does not come up, or one that does not steer.
    """
    config, constructor_options = make_engine_config(source, dtype, engine_args, operator_memory)
    check_same_weights(source, config.load_config)
    prompt = text_ids(loaded.tokenizer, _PROMPT)[:_MAX_PROMPT]
    tolerance = logprob_tolerance(config)
    most = min(_MAX_TEXT, config.model_config.max_model_len - 1)
    text = text_ids(loaded.tokenizer, " ".join(neutral_texts()))[:most]
    expected = None if tolerance is None else await asyncio.to_thread(transformers_logprobs, loaded, text)
    with problem_file() as problem:
        try:
            llm = await asyncio.to_thread(start_processes, config, constructor_options)
        except Exception as error:
            # vLLM's parts raise exceptions of any class; its own log has the details.
            why = read_problem(problem) or f"{type(error).__name__}: {error}"
            raise StartupError(f"vLLM did not start: {why}") from error
    client = VLLMClient(llm, salts)
    began = time.monotonic()
    try:
        [memory, *_] = await client.call("steering_memory")
        log.info("memory taken", **memory)
        [client.attention, *_] = await client.call("steering_attention")
        await _self_test(client, prompt, model, EmbeddingRows(loaded.model))
        if expected is not None and tolerance is not None:
            check_same_model(await _vllm_logprobs(client, text), expected, tolerance=tolerance)
        check_same_files(loaded)
    except BaseException:
        await client.shutdown()
        raise
    log.info("self-test passed", layers=model.num_layers, seconds=round(time.monotonic() - began, 1))
    return client


def start_processes(config: Any, options: Mapping[str, bool]) -> AsyncLLM:
    """vLLM with its processes. To be run in a thread: it starts them even where nobody waits for it any more."""
    with engine_core_in_its_own_session():
        return AsyncLLM.from_vllm_config(config, usage_context=USAGE, **options)


def check_same_files(loaded: LoadedModel) -> None:
    """Raises :class:`StartupError` where vLLM may have read other weights than those that were fingerprinted.

    The self-test would not notice a few numbers that changed.
    """
    if loaded.files is None:
        return
    try:
        loaded.files.check_unchanged(loaded.name)
    except ModelError as error:
        raise StartupError(str(error)) from error


async def _self_test(
    client: VLLMClient,
    prompt: Sequence[int],
    model: ModelInfo,
    embed: EmbedIds,
) -> None:
    params = {"temperature": 0.0, "max_tokens": TOKENS, "ignore_eos": True, "logprobs": 5}

    dtype = client.config.model_config.dtype
    operators = random_operators(model)
    by_digest, proofs = {one.digest: one for one in operators}, dict[str, Proof]()

    def prove_one(key: str, measurement: Mapping[str, Any], output: SelfTestOutput) -> None:
        prove(proofs[key], measurement, ids=(*prompt, *output.ids), dtype=dtype)

    async def run(setting: OperatorSetting | None, key: str) -> SelfTestOutput:
        ids: list[int] = []
        first: dict[int, float] = {}
        looks_at: Mapping[int, Sequence[int]] = {}
        if setting is not None:
            applied = Setting(setting.strength, setting.rule, setting.blend, Positions(end=setting.end))
            plan = SteeringPlan((Application("self-test", by_digest[setting.digest], applied, ()),))
            proofs[key] = Proof(plan, embed, prompt_ids=prompt, max_tokens=TOKENS, every_position=True)
            looks_at = proofs[key].positions
        async for output in client.generate(prompt, params, [setting] if setting else [], key, looks_at=looks_at):
            choice = output.outputs[0]
            ids.extend(choice.token_ids)
            first = first or {token: entry.logprob for token, entry in choice.logprobs[0].items()}
        return SelfTestOutput(tuple(ids), first)

    try:
        await check_steering(
            run, client.call, operators, OperatorSender(client.call).send, prove_one, prompt_tokens=len(prompt)
        )
    except StartupError:
        raise
    except Exception as error:
        # An engine that dies under its first requests, or workers that refuse a call.
        raise StartupError(f"self-test: {type(error).__name__}: {error}") from error


async def _vllm_logprobs(client: VLLMClient, text: Sequence[int]) -> list[float]:
    """As :func:`transformers_logprobs`, by the engine."""
    params = {"temperature": 0.0, "max_tokens": 1, "ignore_eos": True, "prompt_logprobs": 0}
    found: list[float] = []
    try:
        async for output in client.generate(text, params, [], "self-test-text"):
            # Of the first token there are none.
            entries = (output.prompt_logprobs or [])[1:]
            found += [entry[token].logprob for entry, token in zip(entries, text[1:], strict=bool(entries))]
    except Exception as error:
        raise StartupError(f"self-test: {type(error).__name__}: {error}") from error
    if not found:
        raise StartupError("self-test: vLLM gave no log-probabilities of a text's tokens")
    return found


def transformers_logprobs(loaded: LoadedModel, text: Sequence[int]) -> list[float]:
    """Log-probabilities (T - 1,), in nats, of a text's tokens from the second on, by the model in transformers.

    Raises :class:`StartupError` where it cannot run there.
    """
    try:
        with torch.inference_mode():
            ids = torch.tensor([text], device=loaded.device)
            logits = loaded.model(ids, use_cache=False).logits[0, :-1]
    except Exception as error:
        raise StartupError(f"self-test: transformers cannot run the model: {type(error).__name__}: {error}") from error
    logprobs: list[float] = logits.float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].tolist()
    return logprobs
