"""What the workers measured of a request: collected from them, merged, and turned into receipts."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from math import isclose
from typing import Any

import structlog
import torch

from steer_server.engine.dose import DoseStatistics
from steer_server.engine.proof import Proof, Sample
from steer_server.engine.receipts import make_receipts
from steer_server.engine.vllm.cache_salts import CacheSalts
from steer_server.engine.vllm.worker_protocol import OperatorSetting
from steer_server.errors import SteeringNotAppliedError
from steer_server.types import Receipt, SteeringPlan

_DOSE_TOLERANCE = 1e-3
"""Relative difference of a dose between workers that counts as rounding: all have the same hidden states."""

log = structlog.get_logger(__name__)

TakeMeasurements = Callable[[list[str]], Awaitable[Sequence[Mapping[str, Any] | None]]]
"""Measurements of requests by key, which the workers then forget; None for one that never reached a worker.

A measurement holds ``cached``, ``layers`` (by layer, as text, the position ``first`` and ``doses`` from there on),
``failure`` (see :class:`.request_state.RequestMeasurement`) and, by layer, as text, the states that were ``seen``
(:data:`.worker_protocol.SeenState`).
"""


class MeasurementCollector:
    """Collects the measurements of ended requests; those requested during a call share the next one.

    A call waits for the running step of the engine, so one per request would slow all of them down.
    """

    def __init__(self, take_measurements: TakeMeasurements, salts: CacheSalts) -> None:
        self._take_measurements, self._salts = take_measurements, salts
        self._collecting: set[asyncio.Task[Any]] = set()
        self._requested: dict[str, asyncio.Future[Mapping[str, Any] | None]] = {}
        self._calls: asyncio.Task[None] | None = None

    async def take(self, key: str) -> Mapping[str, Any] | None:
        """The measurement of a request; None for one that never reached a worker."""
        future: asyncio.Future[Mapping[str, Any] | None] = asyncio.get_running_loop().create_future()
        self._requested[key] = future
        if self._calls is None or self._calls.done():
            self._calls = asyncio.create_task(self._call_until_none_requested())
        return await future

    def collect(
        self, key: str, settings: Sequence[OperatorSetting], *, begun: bool = False
    ) -> asyncio.Task[Mapping[str, Any] | None]:
        """Takes the measurement of an ended row, and renews the salt of its steering if the row failed.

        The task runs to its end even if nobody awaits it: what a failed row left in the prefix cache must become
        unreachable, whether or not somebody reads its text.

        Args:
            begun: the row has a token, so that the workers must know of it.
        """
        task = asyncio.create_task(self._collect(key, settings, begun))
        self._collecting.add(task)
        task.add_done_callback(self._collected)
        return task

    async def _collect(self, key: str, settings: Sequence[OperatorSetting], begun: bool) -> Mapping[str, Any] | None:
        try:
            measurement = await self.take(key)
        except BaseException:
            if settings:
                # Whether the row failed is now unknown.
                self._salts.renew(settings)
            raise
        if settings and (begun if measurement is None else measurement["failure"]):
            self._salts.renew(settings)
        return measurement

    def _collected(self, task: asyncio.Task[Any]) -> None:
        self._collecting.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the workers gave no measurement of a request", error=str(error) or type(error).__name__)

    async def _call_until_none_requested(self) -> None:
        while self._requested:
            requested, self._requested = self._requested, {}
            try:
                measurements = await self._take_measurements(list(requested))
                for future, measurement in zip(requested.values(), measurements, strict=True):
                    if not future.done():
                        future.set_result(measurement)
            except Exception as error:  # noqa: BLE001 - handed on to all who wait
                # Whatever broke the call: a future without a result would be awaited for ever.
                for future in requested.values():
                    if not future.done():
                        future.set_exception(error)


def merge_measurements(workers: Sequence[Sequence[Mapping[str, Any] | None]]) -> list[Mapping[str, Any] | None]:
    """One measurement per request, from those of every worker.

    Under tensor parallelism each worker has the whole hidden states and must measure the same: a request of which the
    workers measured different things has failed.
    """
    merged = []
    for measurements in zip(*workers, strict=True):
        first = measurements[0]
        failures = [one["failure"] for one in measurements if one is not None and one["failure"]]
        if first is not None and failures:
            first = {**first, "failure": failures[0]}
        elif first is not None and not all(_agree(first, other) for other in measurements[1:]):
            first = {**first, "failure": "the workers do not agree on what was steered"}
        if first is not None:
            # What any of them saw is held against the reference.
            first = {**first, "seen": _all_seen(measurements)}
        merged.append(first if all(one is not None for one in measurements) else None)
    return merged


def _all_seen(measurements: Sequence[Mapping[str, Any] | None]) -> dict[str, list[Any]]:
    seen: dict[str, list[Any]] = defaultdict(list)
    for one in measurements:
        for layer, states in one["seen"].items() if one is not None else ():
            seen[layer].extend(states)
    return dict(seen)


def _agree(one: Mapping[str, Any], other: Mapping[str, Any] | None) -> bool:
    if other is None or one["cached"] != other["cached"] or one["layers"].keys() != other["layers"].keys():
        return False
    pairs = [(measured, other["layers"][layer]) for layer, measured in one["layers"].items()]
    return all(
        first["first"] == second["first"]
        and len(first["doses"]) == len(second["doses"])
        and all(isclose(a, b, rel_tol=_DOSE_TOLERANCE) for a, b in zip(first["doses"], second["doses"], strict=True))
        for first, second in pairs
    )


def prove(proof: Proof, measurement: Mapping[str, Any] | None, *, ids: Sequence[int], dtype: torch.dtype) -> None:
    """Holds what the workers saw of a text against the reference.

    Does nothing for a measurement that :func:`measured_receipts` refuses anyway.

    Args:
        ids: of the prompt and the text, whose last token is never fed.
        dtype: of the hidden states.

    Raises:
        SteeringNotAppliedError: what was added is not what the plan adds, or was not seen where it is due.
    """
    if measurement is None or measurement["failure"]:
        return

    def state(data: bytes) -> torch.Tensor:
        return torch.frombuffer(bytearray(data), dtype=dtype)

    fed = len(ids) - 1
    for layer, seen in measurement["seen"].items():
        samples = [
            Sample(position, token, norm, state(before), state(after))
            for position, token, norm, before, after in seen
            if position < fed
        ]
        proof.check(int(layer), samples, ids)
    proof.require(int(measurement["cached"]), fed)


def measured_receipts(
    plan: SteeringPlan,
    measurement: Mapping[str, Any] | None,
    proof: Proof | None = None,
    *,
    prompt_tokens: int,
    fed: int,
) -> tuple[Receipt, ...]:
    """One receipt per operator of the plan, each of the operator's own positions.

    Args:
        proof: of what was held against the reference, for the receipts.
        fed: number of tokens, the prompt's first to the last one fed to the model, that the text depends on. Measured
            tokens beyond them are ignored: the engine may have run ahead of a text that had ended.

    Raises:
        SteeringNotAppliedError: the plan was not applied, or not at every one of its positions; says why.
    """
    if measurement is None:
        raise SteeringNotAppliedError("no worker knows of this request: it was not steered")
    if measurement["failure"]:
        raise SteeringNotAppliedError(str(measurement["failure"]))
    cached, doses = int(measurement["cached"]), []
    if cached >= prompt_tokens:
        raise SteeringNotAppliedError(
            f"{cached} tokens count as cached; of a prompt of {prompt_tokens} the last is always computed"
        )
    for use in plan.applications:
        statistics = DoseStatistics()
        if use.setting.strength != 0.0:
            statistics.cached_tokens = use.setting.positions.count(0, cached, prompt_tokens=prompt_tokens)
            for first, end, prompt in ((cached, prompt_tokens, True), (prompt_tokens, fed, False)):
                found = _doses_at(measurement["layers"].get(str(use.layer)), first, end)
                pushed = found[use.setting.positions.among(first, end - first, prompt_tokens=prompt_tokens)]
                steered = [dose for dose in pushed if dose > 0.0]
                if len(steered) < len(pushed):
                    kind = "prompt" if prompt else "generated"
                    raise SteeringNotAppliedError(
                        f"layer {use.layer}: {len(steered)} of {len(pushed)} {kind} tokens were steered"
                    )
                statistics.add(steered, prompt=prompt)
        doses.append(statistics)
    return make_receipts(plan, doses, proof)


def generated_doses(
    plan: SteeringPlan, measurement: Mapping[str, Any] | None, *, prompt_tokens: int, fed: int
) -> tuple[float, ...]:
    """The doses at the lowest layer that is pushed, of every token behind the prompt that was fed; 0 where none is."""
    if measurement is None or plan.first_layer is None:
        return ()
    return tuple(_doses_at(measurement["layers"].get(str(plan.first_layer)), prompt_tokens, fed))


def _doses_at(measured: Mapping[str, Any] | None, first: int, end: int) -> list[float]:
    """The doses of the positions ``first`` to ``end`` - 1; 0 where none was measured."""
    if measured is None:
        return [0.0] * (end - first)
    before, doses = int(measured["first"]), measured["doses"]
    found = [0.0] * (min(before, end) - first) + list(doses[max(0, first - before) : max(0, end - before)])
    return found + [0.0] * (end - first - len(found))
