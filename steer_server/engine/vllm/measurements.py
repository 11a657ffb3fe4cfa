"""What the workers say that they did to a request, and the receipts made of it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from math import isclose
from typing import Any

import structlog

from steer_server.engine.dose import Dose
from steer_server.engine.receipts import receipts_of
from steer_server.engine.vllm.cache_salts import Salts
from steer_server.engine.vllm.step_steering import Use
from steer_server.errors import SteeringNotAppliedError
from steer_server.types import Receipt, SteeringPlan

_AGREEMENT = 1e-3
"""Relative difference of a dose between workers that is one of rounding: all have the same hidden states."""

log = structlog.get_logger(__name__)

Take = Callable[[list[str]], Awaitable[Sequence[Mapping[str, Any] | None]]]
"""Asks the workers for the accounts of requests, which they then forget."""


class AccountDesk:
    """Asks for accounts: those wanted at the same time in one call, since a call waits for a step of the engine."""

    def __init__(self, take: Take, salts: Salts) -> None:
        self._ask, self._salts = take, salts
        self._settling: set[asyncio.Task[Any]] = set()
        self._wanted: dict[str, asyncio.Future[Mapping[str, Any] | None]] = {}
        self._asking: asyncio.Task[None] | None = None

    async def take(self, key: str) -> Mapping[str, Any] | None:
        """The account of a request; None for one that never reached a worker."""
        future: asyncio.Future[Mapping[str, Any] | None] = asyncio.get_running_loop().create_future()
        self._wanted[key] = future
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._work())
        return await future

    def settle(self, key: str, uses: Sequence[Use], *, begun: bool = False) -> asyncio.Task[Mapping[str, Any] | None]:
        """Takes the account of a row that is over, and renews the salt of its steering if it failed.

        Goes on when nobody waits for it: what a failed row left in the prefix cache is there, whoever reads its text.

        Args:
            begun: the row has a token, so that the workers must know of it.
        """
        task = asyncio.create_task(self._settle(key, uses, begun))
        self._settling.add(task)
        task.add_done_callback(self._settled)
        return task

    async def _settle(self, key: str, uses: Sequence[Use], begun: bool) -> Mapping[str, Any] | None:
        try:
            account = await self.take(key)
        except BaseException:
            if uses:
                # What the workers would have told of it is lost.
                self._salts.renew(uses)
            raise
        if uses and (begun if account is None else account["failure"]):
            self._salts.renew(uses)
        return account

    def _settled(self, task: asyncio.Task[Any]) -> None:
        self._settling.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the workers gave no account of a request", error=str(error) or type(error).__name__)

    async def _work(self) -> None:
        while self._wanted:
            wanted, self._wanted = self._wanted, {}
            try:
                found = await self._ask(list(wanted))
                for future, account in zip(wanted.values(), found, strict=True):
                    if not future.done():
                        future.set_result(account)
            except Exception as error:  # noqa: BLE001 - handed on to all who wait
                # Whatever broke the call, nobody is to wait for its answer.
                for future in wanted.values():
                    if not future.done():
                        future.set_exception(error)


def agreed(workers: Sequence[Sequence[Mapping[str, Any] | None]]) -> list[Mapping[str, Any] | None]:
    """One account per request, from those of every worker: under tensor parallel each steers its share alike.

    A request that the workers tell different things of has failed.
    """
    found = []
    for accounts in zip(*workers, strict=True):
        first = accounts[0]
        failures = [account["failure"] for account in accounts if account is not None and account["failure"]]
        if first is not None and failures:
            first = {**first, "failure": failures[0]}
        elif first is not None and not all(_same(first, account) for account in accounts[1:]):
            first = {**first, "failure": "the workers do not agree on what was steered"}
        found.append(first if all(account is not None for account in accounts) else None)
    return found


def _same(one: Mapping[str, Any], other: Mapping[str, Any] | None) -> bool:
    if other is None or one["cached"] != other["cached"] or one["layers"].keys() != other["layers"].keys():
        return False
    pairs = [(doses, other["layers"][layer]) for layer, doses in one["layers"].items()]
    return all(
        len(mine) == len(theirs) and all(isclose(a, b, rel_tol=_AGREEMENT) for a, b in zip(mine, theirs, strict=True))
        for mine, theirs in pairs
    )


def receipts(
    plan: SteeringPlan, account: Mapping[str, Any] | None, *, prompt_tokens: int, fed: int
) -> tuple[Receipt, ...]:
    """One receipt per operator of the plan.

    Args:
        fed: how many tokens, from the prompt's first on, the text is due to. The engine may have run ahead of a text
            that had ended.

    Raises:
        SteeringNotAppliedError: the plan was not applied, or not at every token; says why.
    """
    if account is None:
        raise SteeringNotAppliedError("no worker knows of this request: it was not steered")
    if account["failure"]:
        raise SteeringNotAppliedError(str(account["failure"]))
    cached, doses = int(account["cached"]), {}
    if cached >= prompt_tokens:
        raise SteeringNotAppliedError(
            f"{cached} tokens count as cached; of a prompt of {prompt_tokens} the last is always computed"
        )
    for layer in sorted({use.layer for use in plan.applications if use.setting.strength}):
        measured = account["layers"].get(str(layer), [])[: fed - cached]
        if cached + len(measured) < fed:
            raise SteeringNotAppliedError(f"layer {layer}: {len(measured)} of {fed - cached} tokens were steered")
        dose = doses[layer] = Dose()
        split = prompt_tokens - cached
        dose.add(measured[:split], prompt=True)
        dose.add(measured[split:], prompt=False)
    return receipts_of(plan, doses, cached=cached)
