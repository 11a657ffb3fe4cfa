"""Evaluating candidates: what a layer, rule and blend do to the texts at a given strength."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from operators.builder import memory
from operators.core.apply import Setting, prepare
from operators.core.artifact import OperatorArtifact
from operators.core.errors import TrialError
from operators.core.header import CalibrationPoint, Rule
from operators.model.loading import LoadedModel
from operators.tune.calibration_spec import CalibrationSpec
from operators.tune.continuations import (
    TEXTS_PER_BATCH,
    Continuation,
    ContinuationRequest,
    Injection,
    decode_continuations,
)
from operators.tune.metrics import TextMetrics, WordList, compute_metrics


@dataclass(frozen=True)
class Candidate:
    """What strengths are searched for."""

    layer: int
    rule: Rule
    blend: float


def candidates_of(layers: Sequence[int], spec: CalibrationSpec) -> list[Candidate]:
    """Every layer, blend and rule, in this order; at blend 1 one rule, because the anchor alone is the same by each."""
    return [
        Candidate(layer, rule, blend)
        for layer in sorted(layers)
        for blend in sorted(set(spec.blends))
        for rule in (spec.rules[:1] if blend == 1.0 else spec.rules)
    ]


class CandidateEvaluator:
    """Decodes the prompts of a calibration under candidates, and measures the texts against the plain ones."""

    def __init__(
        self, operators: Mapping[int, OperatorArtifact], loaded: LoadedModel, spec: CalibrationSpec, max_memory: int
    ) -> None:
        """Decodes the plain texts.

        Args:
            operators: by layer.
            max_memory: bytes beside model and operators.

        Raises:
            BuildError: not even one text fits into the memory.
            TrialError: a prompt has no tokens or too many.
        """
        self._operators = {layer: prepare(artifact, loaded.device) for layer, artifact in operators.items()}
        self._injection_layers = {layer: artifact.header.injection_layer for layer, artifact in operators.items()}
        self._loaded, self._spec = loaded, spec
        self._words = WordList(spec.words)
        self._prompts = [_encode(prompt, loaded) for prompt in spec.prompts]
        longest = max(map(len, self._prompts)) + spec.tokens
        self._texts_per_batch = memory.rows_within(
            max_memory,
            memory.estimate_trial(loaded, longest),
            TEXTS_PER_BATCH,
            f"a text of {longest} tokens of {loaded.name}, its prompt included,",
            "shorter prompts or texts, fewer layers or a lower rank need less",
        )
        self._plain = self._decode([ContinuationRequest(ids) for ids in self._prompts])
        self._plain_metrics: dict[int, TextMetrics] = {}

    def plain_metrics(self, num_prompts: int) -> TextMetrics:
        """Of the plain model's texts on the first prompts."""
        if num_prompts not in self._plain_metrics:
            texts = self._plain[:num_prompts]
            self._plain_metrics[num_prompts] = compute_metrics(texts, self._words, self._loaded)
        return self._plain_metrics[num_prompts]

    def evaluate(
        self,
        trials: Sequence[tuple[Candidate, float]],
        num_prompts: int,
        on_batch: Callable[[int], None] | None = None,
    ) -> list[CalibrationPoint]:
        """One point per (candidate, strength), from its texts on the first prompts; all are decoded together.

        ``on_batch`` is called with the number of texts of each batch that is done.

        Raises:
            SteeringError: a candidate has no direction at some token, or a push has no effect.
        """
        requests = [
            ContinuationRequest(ids, self._injection(candidate, strength))
            for candidate, strength in trials
            for ids in self._prompts[:num_prompts]
        ]
        texts = self._decode(requests, on_batch)
        return [
            self._point(candidate, strength, texts[first : first + num_prompts])
            for first, (candidate, strength) in zip(range(0, len(texts), num_prompts), trials, strict=True)
        ]

    def _injection(self, candidate: Candidate, strength: float) -> Injection:
        layer = candidate.layer
        setting = Setting(strength, candidate.rule, candidate.blend)
        return Injection(self._operators[layer], self._injection_layers[layer], setting)

    def _decode(
        self, requests: Sequence[ContinuationRequest], on_batch: Callable[[int], None] | None = None
    ) -> list[Continuation]:
        return decode_continuations(
            requests,
            self._loaded,
            tokens=self._spec.tokens,
            texts_per_batch=self._texts_per_batch,
            on_batch=on_batch,
        )

    def _point(self, candidate: Candidate, strength: float, texts: Sequence[Continuation]) -> CalibrationPoint:
        metrics, plain = compute_metrics(texts, self._words, self._loaded), self.plain_metrics(len(texts))
        return CalibrationPoint(
            layer=candidate.layer,
            rule=candidate.rule,
            blend=candidate.blend,
            strength=strength,
            texts=len(texts),
            kl_p95=metrics.kl_p95,
            hit_rate=metrics.hit_rate,
            perplexity_ratio=metrics.perplexity / plain.perplexity,
            distinct_2=metrics.distinct_2,
        )


def _encode(prompt: str, loaded: LoadedModel) -> tuple[int, ...]:
    ids = tuple(int(token) for token in loaded.tokenizer(prompt)["input_ids"])
    if not ids:
        raise TrialError(f"prompt {prompt!r} has no tokens; at least one is needed")
    return ids
