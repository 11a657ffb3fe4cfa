"""Running a sweep: several requests in flight, every finished text kept at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from steer_client import _calls as calls
from steer_client._defaults import NORMAL, Timeout
from steer_client._errors import (
    InvalidRequestError,
    OperatorUnusableError,
    ServerUnavailableError,
    UnknownOperatorError,
)
from steer_client._pool import Pool
from steer_client._results import ABResult, FinishReason, ModelInfo
from steer_client._streams import StartedCall
from steer_client._sweep.journal import Journal
from steer_client._sweep.packing import Unit, call_of, pack
from steer_client._sweep.plan import Plan, prompt_text
from steer_client._sweep.rows import SweepRow, make_row


class Caller(Protocol):
    """What a sweep needs of a client."""

    target: str

    async def _answer(self, call: calls.Unary[Any], timeout: Timeout) -> Any: ...
    async def _read_to_end(self, call: StartedCall[Any, Any]) -> Any: ...
    def _start(self, call: calls.Streaming[Any, Any], timeout: Timeout) -> StartedCall[Any, Any]: ...


async def served(plan: Plan, callers: Sequence[Caller], timeout: Timeout) -> tuple[ModelInfo, dict[str, Any]]:
    """The model, and what the servers have in common: its fingerprints, its dtype, the digests of the operators.

    Raises InvalidRequestError where two servers differ, UnknownOperatorError and OperatorUnusableError.
    """
    infos, found = [], []
    for caller in callers:
        info = await caller._answer(calls.model_info(), timeout)
        listed = {each.name: each for each in await caller._answer(calls.list_operators(), timeout)}
        digests = {}
        for use in (arm.use for arm in plan.arms):
            if use.name not in listed:
                names = ", ".join(listed) or "none"
                raise UnknownOperatorError(f"{caller.target} has no operator {use.name!r}; it has {names}")
            if (problem := listed[use.name].problem) is not None:
                raise OperatorUnusableError(f"{use.name} cannot be used at {caller.target}: {problem}")
            digests[use.name] = listed[use.name].digest
        infos.append(info)
        found.append(
            {
                "model": info.model,
                "model_fingerprint": info.model_fingerprint,
                "tokenizer_fingerprint": info.tokenizer_fingerprint,
                "dtype": info.dtype,
                "digests": digests,
            }
        )
    for caller, other in zip(callers[1:], found[1:], strict=True):
        for name, value in found[0].items():
            if name != "model" and other[name] != value:
                raise InvalidRequestError(
                    f"targets: {name} is {value} at {callers[0].target}, and {other[name]} at {caller.target}",
                    field="targets",
                )
    smallest = min(infos, key=lambda info: info.max_arms)
    return smallest, found[0]


def pinned(plan: Plan, digests: Mapping[str, str]) -> Plan:
    """The plan with every operator held to the version that is served now."""
    arms = [replace(arm, use=_pin(arm.use, digests[arm.use.name])) for arm in plan.arms]
    return replace(plan, arms=tuple(arms))


def _pin(use: Any, digest: str) -> Any:
    return use if use.digest is not None else replace(use, digest=digest)


async def run(
    plan: Plan,
    info: ModelInfo,
    callers: Sequence[Caller],
    pool: Pool,
    journal: Journal,
    *,
    in_flight: int,
    timeout: Timeout,
    on_texts: Callable[[int], None],
) -> None:
    """Runs what the journal lacks, `in_flight` requests at each server, and adds it to the journal.

    A server that goes away leaves its work to the others. Raises the first error that no server is left for.
    """
    waiting = deque(pack(plan, info, {row.key for row in journal.rows}))
    slots = deque(list(range(len(callers))) * in_flight)
    alive = set(range(len(callers)))
    running: dict[int, tuple[int, Unit]] = {}
    number = 0

    def keep(key: int, result: ABResult) -> None:
        slot, unit = running.pop(key)
        slots.append(slot)
        journal.add(_rows(unit, result))
        on_texts(unit.num_texts)

    try:
        while waiting or running:
            while waiting and slots:
                slot = slots.popleft()
                if slot not in alive:
                    continue
                running[number] = slot, waiting.popleft()
                pool.start(number, _one(callers[slot], plan, running[number][1], timeout))
                number += 1
            outcome = await pool.next()
            if outcome.error is None:
                keep(outcome.key, outcome.result)
                continue
            slot, unit = running.pop(outcome.key)
            if isinstance(outcome.error, ServerUnavailableError):
                alive.discard(slot)
                if alive:
                    waiting.appendleft(unit)
                    continue
            raise outcome.error
    finally:
        # What was finished when another one failed, or when somebody pressed Ctrl-C.
        for outcome in pool.ended():
            if outcome.error is None:
                keep(outcome.key, outcome.result)
        pool.stop()


async def _one(caller: Caller, plan: Plan, unit: Unit, timeout: Timeout) -> ABResult:
    result: ABResult = await caller._read_to_end(caller._start(call_of(plan, unit), timeout))
    texts = [arm.generation for arm in result.steered.values()] + ([result.normal] if unit.plain else [])
    if any(text.finish_reason is FinishReason.CANCELLED for text in texts):
        raise ServerUnavailableError(f"{caller.target} is shutting down, and ended a text early")
    return result


def _rows(unit: Unit, result: ABResult) -> list[SweepRow]:
    prompt = prompt_text(unit.prompt)
    arms = list(result.steered.values())
    rows = []
    if unit.plain:
        perplexity = next((arm.normal_perplexity for arm in arms), None)
        rows.append(make_row((unit.prompt_id, prompt, unit.seed, NORMAL, None), result.normal, (), perplexity))
    for arm, found in zip(unit.arms, arms, strict=True):
        where = (unit.prompt_id, prompt, unit.seed, arm.operator, arm.strength)
        kl = () if found.kl is None else found.kl.per_token
        rows.append(make_row(where, found.generation, kl, found.steered_perplexity))
    return rows
