"""What the server and its workers agree on: the steering of a request as it travels, and how workers are called."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from operators.core.header import Anchor, FirstToken, Rule
from steer_server.engine.vllm.memory import SCORE_BYTES
from steer_server.types import SteeringPlan

EXTRA_ARGS_KEY = "steering"
"""Key of vLLM's ``SamplingParams.extra_args`` under which a request carries its :class:`SteeringArgs`."""

STEERING_MEMORY, SHARE_OF_FREE = "steering_memory", "steering_share_of_free"
"""Keys of vLLM's ``additional_config``: bytes that steering may take of a worker's share of memory, and whether that
share is what is free when the worker starts."""

_MAX_POSITIONS = 64


def positions_per_call(vocab_size: int) -> int:
    """Positions of a text that one call scores.

    It bounds the logits (positions, vocabulary) that a worker holds at once, and how long the engine's next step waits.
    """
    return max(1, min(_MAX_POSITIONS, SCORE_BYTES // (4 * vocab_size)))


SeenState = tuple[int, int, float, bytes, bytes]
"""One hidden state that a worker looked at: its position and token id, |h|, and the state before and after its push,
as the bytes of its numbers."""

WorkerCall = Callable[..., Awaitable[Sequence[Any]]]
"""``await call(method, *args)``: the answers of all workers, in order of their ranks."""


@dataclass(frozen=True)
class OperatorSetting:
    """One operator of one request, by its digest, with its scalars. The strength is never 0."""

    digest: str
    rule: Rule
    strength: float
    blend: float
    start: int = 0
    """First position of the text that it pushes."""
    end: int | None = None
    """First position that it does not push any more; None pushes all from ``start`` on."""
    anchor: Anchor = "concept"
    first_token: FirstToken = "operator"


def operator_settings(plan: SteeringPlan, prompt_tokens: int) -> tuple[OperatorSetting, ...]:
    """The operators of a plan that the workers apply to a prompt of so many tokens: those of a strength not 0."""
    return tuple(
        OperatorSetting(
            use.artifact.digest,
            use.setting.rule,
            use.setting.strength,
            use.setting.blend,
            *use.setting.positions.interval(prompt_tokens),
            anchor=use.setting.anchor,
            first_token=use.setting.first_token,
        )
        for use in plan.applications
        if use.setting.strength != 0.0
    )


@dataclass(frozen=True)
class SteeringArgs:
    """What a worker is to do for one request. Filled by the client, read by the worker."""

    key: str
    """Names the request in later calls to the workers."""
    salt: str
    """The request's cache salt; empty where it has none."""
    settings: tuple[OperatorSetting, ...]
    keep_from: int | None
    """Position from which on the last hidden states are kept, for a score; None keeps none."""
    looks_at: Mapping[int, Sequence[int]] = field(default_factory=dict)
    """By layer, the positions at which hidden states are looked at before and after their pushes."""

    def to_extra_args(self) -> dict[str, Any]:
        """Plain lists and scalars, which vLLM serialises."""
        operators = [list(dataclasses.astuple(setting)) for setting in self.settings]
        return {
            EXTRA_ARGS_KEY: {
                "key": self.key,
                "salt": self.salt,
                "operators": operators,
                "keep_from": self.keep_from,
                "looks_at": [[layer, list(positions)] for layer, positions in self.looks_at.items()],
            }
        }

    @classmethod
    def from_extra_args(cls, extra_args: Mapping[str, Any] | None) -> SteeringArgs | None:
        """The inverse of :meth:`to_extra_args`; None for a request that carries no steering."""
        fields = (extra_args or {}).get(EXTRA_ARGS_KEY)
        if fields is None:
            return None
        settings = tuple(OperatorSetting(*values) for values in fields["operators"])
        looks_at = {layer: tuple(positions) for layer, positions in fields["looks_at"]}
        return cls(fields["key"], fields["salt"], settings, fields["keep_from"], looks_at)
