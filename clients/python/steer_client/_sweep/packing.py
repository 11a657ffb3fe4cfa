"""Which texts share a request: as many of one prompt and seed as the server takes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from google.protobuf.message import Message

from steer_client import _calls as calls
from steer_client._defaults import NORMAL
from steer_client._requests import Prompt
from steer_client._results import ABResult, ArmDelta, ModelInfo
from steer_client._sweep.plan import Plan, SweepArm

# Of a request that sets none.
_DEFAULT_MAX_TOKENS = 128


@dataclass(frozen=True, slots=True)
class Unit:
    """One request: some arms of one prompt and seed, with or without the plain text."""

    prompt_id: str
    prompt: Prompt
    seed: int
    arms: tuple[SweepArm, ...]
    plain: bool

    @property
    def num_texts(self) -> int:
        """Texts that it brings."""
        return len(self.arms) + self.plain


def pack(plan: Plan, info: ModelInfo, done: Collection[tuple[str, int, str, float | None]]) -> list[Unit]:
    """Every text of the plan that is not done, in requests that the server takes."""
    units = []
    width = _width(plan, info)
    # A control shares its request with the plain text that it is held against.
    ordered = sorted(plan.arms, key=lambda arm: arm.strength != 0)
    for name, prompt in plan.prompts.items():
        for seed in plan.seeds:
            plain = (name, seed, NORMAL, None) not in done
            arms = [arm for arm in ordered if (name, seed, arm.operator, arm.strength) not in done]
            texts = len(arms) + plain
            num_requests = -(-texts // width)
            for number in range(num_requests):
                # As even as can be: requests of one size take the same time.
                size = texts * (number + 1) // num_requests - texts * number // num_requests
                has_plain = plain and number == 0
                taken, arms = arms[: size - has_plain], arms[size - has_plain :]
                units += _split(plan, info, Unit(name, prompt, seed, tuple(taken), has_plain))
    return units


def call_of(plan: Plan, unit: Unit) -> calls.Streaming[ArmDelta, ABResult]:
    """The request for a unit; its arms are named by their places."""
    arms = {str(place): [arm.use] for place, arm in enumerate(unit.arms)}
    sampling = replace(plan.sampling, seed=unit.seed)
    return calls.compare(unit.prompt, (), arms, sampling, "", normal=unit.plain)


def _width(plan: Plan, info: ModelInfo) -> int:
    width = info.max_arms + 1
    total = info.limits.max_total_tokens if info.limits else None
    if total is not None:
        width = min(width, total // (plan.sampling.max_tokens or _DEFAULT_MAX_TOKENS))
    # What is too much even alone is the server's to refuse, by name.
    return max(width, 1)


def _split(plan: Plan, info: ModelInfo, unit: Unit) -> list[Unit]:
    """The unit in parts, each as large as a request may be."""
    if info.limits is None or len(unit.arms) <= 1:
        return [unit]
    request = call_of(plan, unit).request
    if request.ByteSize() <= info.limits.max_request_bytes and _messages(request) <= info.limits.max_messages:
        return [unit]
    half = len(unit.arms) // 2
    first, second = replace(unit, arms=unit.arms[:half]), replace(unit, arms=unit.arms[half:], plain=False)
    return _split(plan, info, first) + _split(plan, info, second)


def _messages(message: Message) -> int:
    found = 0
    for field, value in message.ListFields():
        if field.message_type is not None:
            children = [value] if isinstance(value, Message) else value
            found += sum(1 + _messages(each) for each in children)
    return found
