"""The start-up self-test: every decoder layer of the live engine steers the request that asks for it and no other.

One plain request runs alone. Then it runs again beside one steered request per layer, in one batch: the plain one must
give what it gave alone, each steered one must give something else, and its account must show every token pushed at its
layer by what its strength gives. An engine that fails is not served.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from steer_server.engine.vllm.measurements import agreed
from steer_server.engine.vllm.step_steering import Use
from steer_server.errors import StartupError

STRENGTH = 1.0
TOKENS = 2
_SAME = 0.05
"""Most that log-probabilities of one request may differ between two batches, in nats: rounding of bfloat16."""


@dataclass(frozen=True)
class Trial:
    """The tokens of a short greedy continuation and the log-probabilities of the first one's alternatives."""

    ids: tuple[int, ...]
    logprobs: Mapping[int, float]


Try = Callable[[Use | None, str], Awaitable[Trial]]
"""``run(use, key)``: a short prompt, steered by one operator or by none."""
Rpc = Callable[..., Awaitable[Sequence[Any]]]


def check_same_model(found: Mapping[int, float], expected: Sequence[float], *, most: float) -> None:
    """Holds the engine's weights against those that operators are recognised by.

    Args:
        found: log-probabilities of the engine's likeliest tokens after a prompt, in nats.
        expected: those of every token after the same prompt, from the model that was fingerprinted.
        most: by how much they may differ on average.

    Raises:
        StartupError: they differ by more; says by how much.
    """
    apart = sum(abs(logprob - expected[token]) for token, logprob in found.items()) / len(found)
    # Negated: what is no number is no agreement either.
    if not apart <= most:
        raise StartupError(
            f"self-test: vLLM serves another model than the one that operators are checked against: the "
            f"log-probabilities of its {len(found)} likeliest tokens differ by {apart:.3g} nats on average from those "
            f"in transformers; at most {most:g} is rounding"
        )


async def check_live(run: Try, rpc: Rpc, *, prompt_tokens: int, num_layers: int) -> Trial:
    """The plain request's trial. Raises :class:`StartupError` with what went wrong."""
    for layers in await rpc("steering_layers"):
        if layers != num_layers:
            raise StartupError(f"self-test: a worker has {layers} decoder layers, the model {num_layers}")
    uses = [Use(f"self-test-{layer}", "cumulative", STRENGTH, 0.0) for layer in range(num_layers)]
    for layer, use in enumerate(uses):
        await rpc("steering_load_random", use.digest, layer)
    try:
        await rpc("steering_watch_inputs", True)
        alone = await run(None, "self-test-alone")
        beside, *steered = await asyncio.gather(run(None, "self-test-beside"), *(run(use, use.digest) for use in uses))
        worst = max(await rpc("steering_watch_inputs", False))
        accounts = agreed(await rpc("steering_take", [use.digest for use in uses]))
    finally:
        await rpc("steering_unload", [use.digest for use in uses])
    if worst > 0.0:
        raise StartupError(
            f"self-test: the first layer's input differs from the token embeddings by {worst:.2g} of their size"
        )
    if not _same(alone, beside):
        raise StartupError("self-test: a plain request is changed by the steered requests beside it")
    for layer, (trial, account) in enumerate(zip(steered, accounts, strict=True)):
        problem = _problem(layer, account, prompt_tokens + TOKENS - 1)
        if not problem and _same(alone, trial):
            problem = "its text is that of the plain one"
        if problem:
            raise StartupError(f"self-test: a request steered at layer {layer} failed: {problem}")
    return alone


def _same(one: Trial, other: Trial) -> bool:
    known = one.logprobs.keys() & other.logprobs.keys()
    near = all(abs(one.logprobs[token] - other.logprobs[token]) <= _SAME for token in known)
    return bool(known) and near and one.ids[0] == other.ids[0]


def _problem(layer: int, account: Mapping[str, Any] | None, tokens: int) -> str:
    if account is None:
        return "no worker knows of it"
    if account["failure"]:
        return str(account["failure"])
    doses = account["layers"].get(str(layer), [])
    if list(account["layers"]) != [str(layer)] or len(doses) < tokens:
        counts = {at: len(found) for at, found in account["layers"].items()}
        return f"tokens pushed by layer: {counts}; {tokens} at layer {layer} were due"
    return ""
