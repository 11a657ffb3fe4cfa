"""Evaluating candidates: what a form at a layer does to the texts at a given strength."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from operators.core.apply import PreparedOperator
from operators.core.errors import TrialError
from operators.core.header import CalibrationPoint
from operators.core.measured import HeldOut
from operators.core.statistics import bootstrap_interval
from operators.model.loading import LoadedModel
from operators.model.text_ids import text_ids
from operators.tune import trial_memory
from operators.tune.calibration_spec import CalibrationSpec
from operators.tune.continuations import (
    TEXTS_PER_BATCH,
    Continuation,
    ContinuationRequest,
    Injection,
    decode_continuations,
)
from operators.tune.form import Form
from operators.tune.journal import Journal
from operators.tune.metrics import TextMetrics, WordList, compute_metrics, continuation_text
from operators.tune.prompts import prompts_digest


@dataclass(frozen=True)
class Candidate:
    """What strengths are searched for."""

    layer: int
    form: Form


@dataclass(frozen=True, eq=False)
class PlacedOperator:
    """An operator, or its anchors alone, on the model's device; and the block whose input it pushes."""

    operator: PreparedOperator
    injection_layer: int


@dataclass(frozen=True)
class Example:
    """One prompt with its plain continuation and that of the chosen setting."""

    prompt: str
    plain: str
    steered: str


class CandidateEvaluator:
    """Decodes the prompts of a calibration under candidates, and measures the texts against the plain ones.

    ``operators``, by layer, may be added to. What the journal has is not decoded again.
    """

    def __init__(self, loaded: LoadedModel, spec: CalibrationSpec, max_memory: int, journal: Journal) -> None:
        """Decodes the plain texts, once for all candidates.

        Args:
            max_memory: bytes beside model and operators.

        Raises:
            BuildError: not even one text fits into the memory.
            TrialError: a prompt has no tokens or too many.
        """
        self.operators: dict[int, PlacedOperator] = {}
        self._loaded, self._spec, self._journal = loaded, spec, journal
        self._words = WordList(spec.words)
        self._prompts = [_encode(prompt, loaded) for prompt in spec.prompts]
        self._held_out = [_encode(prompt, loaded) for prompt in spec.held_out]
        longest = max(map(len, [*self._prompts, *self._held_out])) + spec.tokens
        self._texts_per_batch = trial_memory.texts_within(max_memory, loaded, longest, TEXTS_PER_BATCH)
        self._plain = self._decode([ContinuationRequest(ids) for ids in self._prompts], spec.tokens)
        self._plain_metrics: dict[tuple[int, int], TextMetrics] = {}

    def plain_metrics(self, num_prompts: int, tokens: int) -> TextMetrics:
        """Of the first tokens of the plain model's texts on the first prompts."""
        key = (num_prompts, tokens)
        if key not in self._plain_metrics:
            # A shorter text is the beginning of a longer one.
            texts = [_cut(text, tokens) for text in self._plain[:num_prompts]]
            self._plain_metrics[key] = compute_metrics(texts, self._words, self._loaded)
        return self._plain_metrics[key]

    def evaluate(
        self,
        trials: Sequence[tuple[Candidate, float]],
        num_prompts: int,
        tokens: int,
        on_tokens: Callable[[int], None] | None = None,
    ) -> list[CalibrationPoint]:
        """One point per (candidate, strength), from its texts on the first prompts; all are decoded together.

        ``on_tokens`` is called after each batch with the tokens that its texts may have.

        Raises:
            SteeringError: a candidate has no direction at some token, or a push has no effect.
        """
        keys = [_trial_key(candidate, strength, num_prompts, tokens) for candidate, strength in trials]
        missing = [trial for trial, key in zip(trials, keys, strict=True) if key not in self._journal]
        known = len(trials) - len(missing)
        if known and on_tokens is not None:
            on_tokens(known * num_prompts * tokens)
        requests = [
            ContinuationRequest(ids, self._injection(candidate, strength))
            for candidate, strength in missing
            for ids in self._prompts[:num_prompts]
        ]
        on_batch = None if on_tokens is None else lambda texts: on_tokens(texts * tokens)
        texts = self._decode(requests, tokens, on_batch)
        for place, (candidate, strength) in enumerate(missing):
            own = texts[place * num_prompts : (place + 1) * num_prompts]
            point = self._point(candidate, strength, own, tokens)
            self._journal.add(_trial_key(candidate, strength, num_prompts, tokens), point)
        return [self._journal.point(key) for key in keys]

    def hold_out(self, candidate: Candidate, strength: float) -> tuple[HeldOut, tuple[Example, ...]]:
        """The figures of one setting on the held-out prompts, and its first five texts beside the plain ones."""
        tokens = self._spec.tokens
        plain = self._decode([ContinuationRequest(ids) for ids in self._held_out], tokens)
        injection = self._injection(candidate, strength)
        texts = self._decode([ContinuationRequest(ids, injection) for ids in self._held_out], tokens)
        metrics, reference = (compute_metrics(each, self._words, self._loaded) for each in (texts, plain))
        low, high = bootstrap_interval(metrics.useful)
        figures = HeldOut(
            prompts=len(texts),
            prompts_digest=prompts_digest(self._spec.held_out),
            hit_rate=metrics.hit_rate,
            useful_rate=metrics.useful_rate,
            useful_low=low,
            useful_high=high,
            kl_p95=metrics.kl_p95,
            kl_mean=metrics.kl_mean,
            perplexity_ratio=metrics.perplexity / reference.perplexity,
            distinct_2=metrics.distinct_2,
            plain_useful_rate=reference.useful_rate,
        )
        pairs = zip(self._spec.held_out, plain, texts, strict=True)
        examples = tuple(
            Example(prompt, *(continuation_text(text, self._loaded) for text in pair)) for prompt, *pair in pairs
        )
        return figures, examples[:5]

    def _injection(self, candidate: Candidate, strength: float) -> Injection:
        placed = self.operators[candidate.layer]
        return Injection(placed.operator, placed.injection_layer, candidate.form.setting(strength))

    def _decode(
        self, requests: Sequence[ContinuationRequest], tokens: int, on_batch: Callable[[int], None] | None = None
    ) -> list[Continuation]:
        return decode_continuations(
            requests,
            self._loaded,
            tokens=tokens,
            sampling=self._spec.sampling,
            texts_per_batch=self._texts_per_batch,
            on_batch=on_batch,
        )

    def _point(
        self, candidate: Candidate, strength: float, texts: Sequence[Continuation], tokens: int
    ) -> CalibrationPoint:
        metrics, plain = compute_metrics(texts, self._words, self._loaded), self.plain_metrics(len(texts), tokens)
        form = candidate.form
        return CalibrationPoint(
            layer=candidate.layer,
            rule=form.rule,
            blend=form.blend,
            strength=strength,
            positions=form.positions,
            anchor=form.anchor,
            first_token=form.first_token,
            texts=len(texts),
            tokens=tokens,
            kl_p95=metrics.kl_p95,
            kl_mean=metrics.kl_mean,
            hit_rate=metrics.hit_rate,
            useful_rate=metrics.useful_rate,
            perplexity_ratio=metrics.perplexity / plain.perplexity,
            distinct_2=metrics.distinct_2,
        )


def trial_of(point: CalibrationPoint) -> tuple[Candidate, float]:
    """What a point measured."""
    return Candidate(point.layer, Form.of(point)), point.strength


def _trial_key(candidate: Candidate, strength: float, num_prompts: int, tokens: int) -> str:
    form = candidate.form
    how = (form.rule, form.blend, str(form.positions), form.anchor, form.first_token)
    return repr((candidate.layer, *how, strength, num_prompts, tokens))


def _cut(text: Continuation, tokens: int) -> Continuation:
    return Continuation(text.ids[:tokens], text.kl[:tokens], text.logprobs[:tokens])


def _encode(prompt: str, loaded: LoadedModel) -> tuple[int, ...]:
    ids = text_ids(loaded.tokenizer, prompt)
    if not ids:
        raise TrialError(f"prompt {prompt!r} has no tokens; at least one is needed")
    return ids
