"""What an engine is given: a prompt, and the rows that continue it, each with its steering. Filled by ``generate``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from operators.core.apply import Setting
from operators.core.artifact import OperatorArtifact
from steer_server.caller import CALLER, Caller
from steer_server.types.events import SteeredWord
from steer_server.types.requests import SamplingParams


@dataclass(frozen=True, eq=False)
class Application:
    """One operator, at one setting, of one request. Holds the very version that the request started with."""

    name: str
    artifact: OperatorArtifact
    setting: Setting
    defaulted: tuple[str, ...]
    """Which parts of the setting the artifact recommended."""
    calibrated: bool = False
    """Whether the setting is the recommended one, and the artifact holds what a calibration measured there."""
    words: tuple[SteeredWord, ...] = ()
    """Where a lens made the artifact: of which words."""
    lens_digest: str = ""
    """Where a lens made the artifact: its digest."""
    kl: float | None = None
    """The p95 KL in nats that the strength was read off the dose curve for."""

    @property
    def layer(self) -> int:
        """The decoder layer whose input is pushed."""
        return self.artifact.header.injection_layer


@dataclass(frozen=True, eq=False)
class SteeringPlan:
    """What is added to the layer inputs of one row; never empty."""

    applications: tuple[Application, ...]

    @property
    def digests(self) -> tuple[tuple[str, str], ...]:
        """Name and digest of each operator."""
        return tuple((use.name, use.artifact.digest) for use in self.applications)

    @property
    def first_layer(self) -> int | None:
        """The lowest layer that is pushed; None where every strength is 0."""
        return min((use.layer for use in self.applications if use.setting.strength), default=None)

    def dose_bound(self, layer: int) -> float:
        """Sum of |lambda|/2 over the operators at ``layer``: what the dose there cannot pass, but for rounding."""
        return sum(abs(use.setting.strength) / 2.0 for use in self.applications if use.layer == layer)


_DEFAULTS = SamplingParams()


@dataclass(frozen=True)
class Report:
    """A :class:`.requests.TokenReport` as the engine works it out."""

    top: int = 0
    words: tuple[tuple[int, ...], ...] = ()
    """Of each word the tokens that stand for it."""
    doses: bool = False


@dataclass(frozen=True, eq=False)
class Row:
    """One continuation of a job. ``score`` asks for KL and log-probabilities under the plain model."""

    plan: SteeringPlan | None = None
    score: bool = False
    sampling: SamplingParams = _DEFAULTS
    """Its time limit is the job's."""
    sampling_field: str = "sampling"
    """Of the request: where the sampling stands, but for the seed."""
    report: Report | None = None
    """What every score of the row says beside the token's own."""

    @property
    def is_plain_score(self) -> bool:
        """Whether the row is scored and its own log-probabilities are all that its score needs."""
        return self.score and self.plan is None and not (self.report and self.report.words)

    def of_at_most(self, tokens: int) -> Row:
        """The row with so many tokens, where it asks for more and may have fewer (``fit_max_tokens``)."""
        sampling = self.sampling
        if not sampling.fit_max_tokens or sampling.max_tokens <= tokens:
            return self
        return replace(self, sampling=replace(sampling, max_tokens=max(tokens, sampling.min_tokens, 1)))


@dataclass(frozen=True, eq=False)
class DecodeJob:
    """One prompt and the rows that continue it in one batch."""

    prompt_ids: tuple[int, ...]
    rows: tuple[Row, ...]
    time_limit: float | None = None
    """Seconds, waiting included."""
    forced_ids: tuple[int, ...] = ()
    """A text that every row reads in place of choosing tokens: as many as each row's ``max_tokens``, and prompt and
    text fit into the context. The first row is then the plain one, and every row is scored.
    """
    caller: Caller = field(default_factory=CALLER.get)
    """For whom: who called where this was made."""

    @classmethod
    def of(cls, prompt_ids: tuple[int, ...], sampling: SamplingParams, rows: Sequence[Row], **fields: Any) -> DecodeJob:
        """Rows that are all sampled alike."""
        alike = tuple(replace(row, sampling=sampling) for row in rows)
        return cls(prompt_ids, alike, sampling.time_limit, **fields)

    @property
    def samplings(self) -> Mapping[str, SamplingParams]:
        """By the field of the request that holds each: samples of one text differ by their seeds alone."""
        return {row.sampling_field: row.sampling for row in self.rows}
