"""Searching the setting at which an operator works best: layer, form and strength, by successive halving.

Every candidate (a form at a layer) is brought to the same distance from the plain model: the strength at which the
95th percentile, over the tokens of its texts, of KL(plain || steered) uses up a budget. Layers come first, by the
anchors alone, of which no map need be built; then all forms at the best layer; then ever fewer candidates on ever more
prompts. Where texts at the budget are not fluent, weaker pushes follow. The setting whose texts most often name the
concept and repeat no four tokens is chosen, among those whose texts are neither much more surprising to the plain model
than its own, nor much more repetitive.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from operators.core.header import Calibration, CalibrationPoint
from operators.core.progress import Progress, silent
from operators.model.loading import LoadedModel
from operators.tune.calibration_spec import CalibrationSpec, Stage
from operators.tune.candidates import Candidate, CandidateEvaluator, Example, trial_of
from operators.tune.form import forms_for
from operators.tune.journal import Journal
from operators.tune.operators_at_layers import OperatorsAtLayers
from operators.tune.strength_search import FIRST_STRENGTH, MIN_STRENGTH, next_strength, round_strength

WEAKER = 0.8
"""Factor on the weakest strength so far: gives the next one to try where that one's texts are not fluent."""

Curves = dict[Candidate, list[CalibrationPoint]]


def search_settings(
    operators: OperatorsAtLayers,
    layers: Sequence[int],
    loaded: LoadedModel,
    spec: CalibrationSpec,
    *,
    max_memory: int,
    journal: Journal,
    incumbent: CalibrationPoint | None = None,
    progress: Progress = silent,
) -> tuple[Calibration, tuple[Example, ...]]:
    """The curves of one concept's operators, which of their points is best, and texts at that one.

    Args:
        max_memory: bytes beside model and operators.
        journal: what is measured is written there, and not measured again where it is there.
        incumbent: of the operator's own layer; measured beside the last candidates, and the one that stays where it
            is as good as they are.

    Raises:
        BuildError: not even one text fits into the memory, or an operator at another layer does not.
        TrialError: a prompt has no tokens or too many.
        SteeringError: a candidate has no direction at some token.
    """
    forms = forms_for(operators.own.header, spec.forms)
    anchor_forms = [form for form in forms if form.is_anchor]
    evaluator = CandidateEvaluator(loaded, spec, max_memory, journal)
    most_tokens = num_tokens(spec, len(layers), len(forms), len(anchor_forms))
    search = SettingSearch(evaluator, spec, progress, most_tokens)
    tried = [(layer, form) for layer in layers for form in forms]
    if len(layers) > 1 and anchor_forms:
        evaluator.operators.update({layer: operators.anchors(layer) for layer in layers})
        layer = search.best_layer([Candidate(layer, form) for layer in layers for form in anchor_forms])
        tried = [(layer, form) for form in forms]
    own = operators.own.header.layer
    for layer in {own, *(layer for layer, _ in tried)} if incumbent is not None else {layer for layer, _ in tried}:
        evaluator.operators[layer] = operators.placed(layer)
    chosen = search.best_point([Candidate(*each) for each in tried], None if incumbent is None else trial_of(incumbent))
    last = spec.stages[-1]
    plain = evaluator.plain_metrics(last.prompts, last.tokens)
    held_out, examples = (None, ()) if chosen is None else evaluator.hold_out(*trial_of(search.points[chosen]))
    calibration = Calibration(
        words=spec.words,
        kl_budget=spec.kl_budget,
        max_perplexity_ratio=spec.max_perplexity_ratio,
        min_distinct_ratio=spec.min_distinct_ratio,
        prompts=last.prompts,
        tokens=spec.tokens,
        sampling=spec.sampling,
        plain_hit_rate=plain.hit_rate,
        plain_perplexity=plain.perplexity,
        plain_distinct_2=plain.distinct_2,
        points=tuple(search.points),
        held_out=held_out,
        chosen=chosen,
    )
    return calibration, examples


def num_tokens(spec: CalibrationSpec, num_layers: int, num_forms: int, num_anchor_forms: int) -> int:
    """The most tokens of steered texts that a search may decode, for what is told of its progress and its cost."""
    layers, forms, finalists, last = spec.stages
    counts = [
        num_layers * num_anchor_forms if num_layers > 1 else 0,
        num_forms,
        min(forms.kept, num_forms),
        min(finalists.kept, num_forms),
    ]
    stages = zip((layers, forms, finalists, last), counts, strict=True)
    return sum(stage.prompts * stage.tokens * stage.rounds * count for stage, count in stages)


class SettingSearch:
    """The strength search of every candidate. ``points``: all that were evaluated, in order."""

    def __init__(
        self, evaluator: CandidateEvaluator, spec: CalibrationSpec, progress: Progress, most_tokens: int
    ) -> None:
        self.points: list[CalibrationPoint] = []
        self._evaluator, self._spec = evaluator, spec
        self._progress = _TokenProgress(progress, most_tokens)
        self._left = most_tokens

    def best_layer(self, candidates: Sequence[Candidate]) -> int:
        """The layer at which one of these candidates, which are anchors, does best."""
        curves = self._curves(candidates, self._spec.stages[0], {})
        return self._ranked(curves)[0].layer

    def best_point(self, candidates: Sequence[Candidate], incumbent: tuple[Candidate, float] | None) -> int | None:
        """The index among ``points`` of the best one; None where none beats the plain model within the bounds.

        Args:
            incumbent: a setting that is measured on all prompts beside the last candidates.
        """
        _, *stages = self._spec.stages
        curves: Curves = {}
        for stage in stages:
            curves = self._curves(candidates, stage, curves)
            candidates = self._ranked(curves)[: stage.kept]
        last = stages[-1]
        if incumbent is not None:
            point = self._evaluator.evaluate([incumbent], last.prompts, last.tokens)[0]
            self.points.append(point)
            curves.setdefault(incumbent[0], []).append(point)
        self._progress.leave(0)
        plain = self._evaluator.plain_metrics(last.prompts, last.tokens)
        admitted = [point for points in curves.values() for point in points if self._is_admitted(point)]
        # The incumbent first: of two that are as good, the one that is there stays.
        admitted.sort(key=lambda point: incumbent is not None and trial_of(point) == incumbent, reverse=True)
        best = max((point for point in admitted if _useful(point) > plain.useful_rate), key=_quality, default=None)
        return None if best is None else self.points.index(best)

    def _curves(
        self, candidates: Sequence[Candidate], stage: Stage, scouted: Mapping[Candidate, Sequence[CalibrationPoint]]
    ) -> Curves:
        """Brings every candidate to the budget; the strengths of a round are decoded together.

        ``scouted``: their points on fewer prompts, where there are any.
        """
        curves: Curves = {candidate: [] for candidate in candidates}
        size = stage.prompts * stage.tokens
        for _ in range(stage.rounds):
            trials = [
                (candidate, strength)
                for candidate, points in curves.items()
                if (strength := self._next_strength(points, scouted.get(candidate, ()))) is not None
            ]
            points = self._evaluator.evaluate(trials, stage.prompts, stage.tokens, self._progress.decoded)
            self._progress.leave(self._left - size * len(candidates))
            self._left -= size * len(candidates)
            for (candidate, _), point in zip(trials, points, strict=True):
                curves[candidate].append(point)
                self.points.append(point)
        return curves

    def _ranked(self, curves: Curves) -> list[Candidate]:
        """The candidates, the most promising one first."""
        return sorted(curves, key=lambda candidate: self._promise(curves[candidate]), reverse=True)

    def _best(self, points: Sequence[CalibrationPoint]) -> CalibrationPoint | None:
        """The point of highest quality, of those within the bounds."""
        return max((point for point in points if self._is_admitted(point)), key=_quality, default=None)

    def _promise(self, points: Sequence[CalibrationPoint]) -> tuple[bool, float, float, float]:
        """Sorting key of candidates, by their points: whether one is within the bounds, then the best one's quality."""
        best = self._best(points)
        return best is not None, *_quality(best or self._strongest(points))

    def _is_admitted(self, point: CalibrationPoint) -> bool:
        plain = self._evaluator.plain_metrics(point.texts, point.tokens or self._spec.tokens)
        return self._spec.admits(point, plain.distinct_2)

    def _strongest(self, points: Sequence[CalibrationPoint]) -> CalibrationPoint:
        """The strongest point within the KL budget; the weakest of all where none is."""
        within_budget = [point for point in points if point.kl_p95 <= self._spec.kl_budget]
        return max(within_budget or [min(points, key=_strength)], key=_strength)

    def _next_strength(self, points: Sequence[CalibrationPoint], scouted: Sequence[CalibrationPoint]) -> float | None:
        """The next strength to try, given those tried so far; None when the search has ended."""
        tried = [(point.strength, point.kl_p95) for point in points]
        # What the last round of fewer prompts would have tried next.
        first = self._continued(scouted) if scouted else FIRST_STRENGTH
        strength = next_strength(tried, self._spec.kl_budget, first)
        if strength is not None or self._best(points) is not None:
            return strength
        # At the budget, and not fluent there.
        weakest = min(point.strength for point in points)
        scouted_best = self._best(scouted)
        if scouted_best is not None and scouted_best.strength < weakest:
            return scouted_best.strength
        weaker = round_strength(weakest * WEAKER)
        return weaker if weaker >= MIN_STRENGTH else None

    def _continued(self, scouted: Sequence[CalibrationPoint]) -> float:
        """Where a search on more prompts begins: where that on fewer would have gone on, or ended."""
        following = next_strength([(point.strength, point.kl_p95) for point in scouted], self._spec.kl_budget)
        return self._strongest(scouted).strength if following is None else following


class _TokenProgress:
    """Counts tokens that are decoded, or need not be any more, of the most that a search may take.

    The total stays: a time left can be told only of one that does. A search that ends early jumps to the end.
    """

    def __init__(self, progress: Progress, most: int) -> None:
        self._progress, self._total, self._left = progress, most, most

    def leave(self, tokens: int) -> None:
        """At most so many tokens are left."""
        if tokens < self._left:
            self.decoded(self._left - max(tokens, 0))

    def decoded(self, tokens: int) -> None:
        """So many tokens were decoded."""
        self._left = max(self._left - tokens, 0)
        self._progress("tokens of texts", self._total - self._left, self._total)


def _useful(point: CalibrationPoint) -> float:
    return 0.0 if point.useful_rate is None else point.useful_rate


def _quality(point: CalibrationPoint) -> tuple[float, float, float]:
    return _useful(point), -point.perplexity_ratio, point.distinct_2


def _strength(point: CalibrationPoint) -> float:
    return point.strength
