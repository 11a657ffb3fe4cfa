"""The start-up self-test: every decoder layer of the live engine steers the request that names it and no other.

One plain request runs alone. Then it runs again beside one steered request per layer, in one batch. The plain request
must give what it gave alone. Each steered one must give something else, and its measurement must show every token
pushed at its layer by what its strength gives, and in the direction that its operator gives there. One more is steered
at its first token only, and must be pushed there and nowhere else. An engine that fails is not served.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from operators.core.artifact import OperatorArtifact
from steer_server.engine.vllm.measurements import merge_measurements
from steer_server.engine.vllm.worker_protocol import OperatorSetting, WorkerCall
from steer_server.errors import StartupError, SteeringNotAppliedError

STRENGTH = 1.0
TOKENS = 2
_FIRST_KEY = "self-test-first-token"
_LOGPROB_TOLERANCE = 0.05
"""Nats by which log-probabilities of one request may differ between two batches: rounding of bfloat16."""


@dataclass(frozen=True)
class SelfTestOutput:
    """The tokens of a short greedy continuation and the log-probabilities of the first one's alternatives."""

    ids: tuple[int, ...]
    logprobs: Mapping[int, float]


RunPrompt = Callable[[OperatorSetting | None, str], Awaitable[SelfTestOutput]]
"""``await run(setting, key)``: continues the self-test's prompt, steered by one operator or by none."""


def check_same_model(logprobs: Sequence[float], expected: Sequence[float], *, tolerance: float) -> None:
    """Checks that vLLM computes with the weights whose fingerprints operators are checked against what they mean.

    Args:
        logprobs: log-probabilities (T,), in nats, of a text's tokens in vLLM, each after those before it.
        expected: the same, from the model that was fingerprinted.
        tolerance: by how much they may differ on average.

    Raises:
        StartupError: they differ by more; says by how much.
    """
    difference = sum(abs(one - other) for one, other in zip(logprobs, expected, strict=True)) / len(expected)
    # Negated, so that NaN is refused as well.
    if not difference <= tolerance:
        raise StartupError(
            f"self-test: vLLM serves another model than the one that operators are checked against: the "
            f"log-probabilities of {len(expected)} tokens of a text differ by {difference:.3g} nats on average from "
            f"those in transformers; at most {tolerance:g} is rounding"
        )


Load = Callable[[OperatorArtifact], Awaitable[None]]
"""Loads an operator into all workers."""
Prove = Callable[[str, Mapping[str, Any], SelfTestOutput], None]
"""``prove(key, measurement, output)``: raises :class:`SteeringNotAppliedError` where a request was not steered as its
operator does at every position of it."""


async def check_steering(
    run: RunPrompt,
    call: WorkerCall,
    operators: Sequence[OperatorArtifact],
    load: Load,
    prove: Prove,
    *,
    prompt_tokens: int,
) -> SelfTestOutput:
    """Steers every layer of the live engine and returns the plain request's continuation.

    Args:
        operators: one for each layer of the model.

    Raises :class:`StartupError` with what went wrong.
    """
    num_layers = len(operators)
    for layers in await call("steering_layers"):
        if layers != num_layers:
            raise StartupError(f"self-test: a worker has {layers} decoder layers, the model {num_layers}")
    settings = [OperatorSetting(one.digest, "cumulative", STRENGTH, 0.0) for one in operators]
    keys = [f"self-test-{layer}" for layer in range(num_layers)]
    first_token = replace(settings[0], end=1)
    try:
        for operator in operators:
            await load(operator)
        await call("steering_check_inputs", True)
        alone = await run(None, "self-test-alone")
        beside, at_first, *steered = await asyncio.gather(
            run(None, "self-test-beside"),
            run(first_token, _FIRST_KEY),
            *(run(setting, key) for setting, key in zip(settings, keys, strict=True)),
        )
        input_error = max(await call("steering_check_inputs", False))
        first_measurement, *measurements = merge_measurements(await call("steering_take", [_FIRST_KEY, *keys]))
    finally:
        await call("steering_unload", [one.digest for one in operators])
    if input_error > 0.0:
        raise StartupError(
            f"self-test: the first layer's input differs from the token embeddings by {input_error:.2g} of their size"
        )
    if not _equal(alone, beside):
        raise StartupError("self-test: a plain request is changed by the steered requests beside it")
    for layer, (output, measurement) in enumerate(zip(steered, measurements, strict=True)):
        problem = _problem(layer, measurement, prompt_tokens + TOKENS - 1) or _disproof(
            prove, keys[layer], measurement, output
        )
        if not problem and _equal(alone, output):
            problem = "its text is that of the plain one"
        if problem:
            raise StartupError(f"self-test: a request steered at layer {layer} failed: {problem}")
    if problem := _problem(0, first_measurement, 1, exactly=True) or _disproof(
        prove, _FIRST_KEY, first_measurement, at_first
    ):
        raise StartupError(f"self-test: a request steered at its first token only failed: {problem}")
    return alone


def _equal(one: SelfTestOutput, other: SelfTestOutput) -> bool:
    shared = one.logprobs.keys() & other.logprobs.keys()
    close = all(abs(one.logprobs[token] - other.logprobs[token]) <= _LOGPROB_TOLERANCE for token in shared)
    return bool(shared) and close and one.ids[0] == other.ids[0]


def _disproof(prove: Prove, key: str, measurement: Mapping[str, Any] | None, output: SelfTestOutput) -> str:
    """Why the directions of a request are not those of its operator; empty where they are."""
    if measurement is None:
        return "no worker knows of it"
    try:
        prove(key, measurement, output)
    except SteeringNotAppliedError as error:
        return str(error)
    return ""


def _problem(layer: int, measurement: Mapping[str, Any] | None, num_tokens: int, *, exactly: bool = False) -> str:
    """Why a measurement does not prove that the first ``num_tokens`` were pushed at ``layer``; empty where it does.

    ``exactly``: and no other. Otherwise the engine may have computed more than the text holds.
    """
    if measurement is None:
        return "no worker knows of it"
    if measurement["failure"]:
        return str(measurement["failure"])
    counts = {at: len(measured["doses"]) for at, measured in measurement["layers"].items()}
    count, first = counts.get(str(layer), 0), sum(measured["first"] for measured in measurement["layers"].values())
    if list(counts) != [str(layer)] or first or count < num_tokens or (exactly and count > num_tokens):
        return f"tokens pushed by layer: {counts}; {num_tokens} at layer {layer} were due"
    return ""
