"""Searching the setting at which an operator works best: layer, rule, blend and strength.

Every candidate (layer, rule, blend) is brought to the same distance from the plain model: the strength at which the
95th percentile, over the tokens of its texts, of KL(plain || steered) uses up a budget. A first round on a few prompts
covers all candidates; the most promising ones of each blend are then evaluated on all prompts. Where texts at the
budget are not fluent, weaker pushes follow. The setting whose texts name the concept most often is chosen, among those
whose texts are neither much more surprising to the plain model than its own, nor much more repetitive: a loop over the
concept's name would have a hit in every text, and a low perplexity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from operators.core import capacity
from operators.core.artifact import OperatorArtifact
from operators.core.header import Calibration, CalibrationPoint
from operators.core.progress import Progress, silent
from operators.model.loading import LoadedModel
from operators.tune.calibration_spec import CalibrationSpec
from operators.tune.candidates import Candidate, CandidateEvaluator, candidates_of
from operators.tune.strength_search import FIRST_STRENGTH, MIN_STRENGTH, next_strength, round_strength

SCOUT_PROMPTS = 8
SCOUT_ROUNDS = 3
FINALISTS = 2
"""Per blend, so that the curves compare operator, anchor and their mixtures at the same distance."""
FINAL_ROUNDS = 5
WEAKER = 0.8
"""Factor on the weakest strength so far: gives the next one to try where that one's texts are not fluent."""

_Curves = dict[Candidate, list[CalibrationPoint]]


def search_settings(
    operators: Mapping[int, OperatorArtifact],
    loaded: LoadedModel,
    spec: CalibrationSpec,
    *,
    max_memory: int | None = None,
    progress: Progress = silent,
) -> Calibration:
    """The curves of one concept's operators, given by layer, and which of their points is best.

    ``max_memory``: bytes beside model and operators; None means most of what is free.

    Raises:
        BuildError: not even one text fits into the memory.
        TrialError: a prompt has no tokens or too many.
        SteeringError: a candidate has no direction at some token.
    """
    budget = capacity.free_memory(loaded.device) if max_memory is None else max_memory
    evaluator = CandidateEvaluator(operators, loaded, spec, budget)
    candidates = candidates_of(list(operators), spec)
    num_finalists = FINALISTS * len(set(spec.blends))
    scouts = len(candidates) > num_finalists and len(spec.prompts) > SCOUT_PROMPTS
    texts_later = (num_finalists if scouts else len(candidates)) * len(spec.prompts) * FINAL_ROUNDS
    texts_scouted = len(candidates) * SCOUT_PROMPTS * SCOUT_ROUNDS if scouts else 0
    search = _SettingSearch(evaluator, spec, _TextProgress(progress, texts_scouted + texts_later))
    scouted: _Curves = {}
    if scouts:
        scouted = search.curves(candidates, SCOUT_PROMPTS, SCOUT_ROUNDS, {}, texts_later=texts_later)
        candidates = search.finalists(scouted)
    final = search.curves(candidates, len(spec.prompts), FINAL_ROUNDS, scouted)
    plain = evaluator.plain_metrics(len(spec.prompts))
    best_points = [point for points in final.values() if (point := search.best(points)) is not None]
    best = max((point for point in best_points if point.hit_rate > plain.hit_rate), key=_quality, default=None)
    return Calibration(
        words=spec.words,
        kl_budget=spec.kl_budget,
        max_perplexity_ratio=spec.max_perplexity_ratio,
        min_distinct_ratio=spec.min_distinct_ratio,
        prompts=len(spec.prompts),
        tokens=spec.tokens,
        plain_hit_rate=plain.hit_rate,
        plain_perplexity=plain.perplexity,
        plain_distinct_2=plain.distinct_2,
        points=tuple(search.points),
        chosen=None if best is None else search.points.index(best),
    )


class _SettingSearch:
    """The strength search of every candidate. ``points``: all that were evaluated, in order."""

    def __init__(self, evaluator: CandidateEvaluator, spec: CalibrationSpec, progress: _TextProgress) -> None:
        self.points: list[CalibrationPoint] = []
        self._evaluator, self._spec, self._progress = evaluator, spec, progress

    def curves(
        self,
        candidates: Sequence[Candidate],
        num_prompts: int,
        rounds: int,
        scouted: Mapping[Candidate, Sequence[CalibrationPoint]],
        *,
        texts_later: int = 0,
    ) -> _Curves:
        """Brings every candidate to the budget on the first prompts; the strengths of a round are decoded together.

        Args:
            scouted: their points on fewer prompts, where there are any.
            texts_later: how many texts may be decoded after these curves; for the progress only.
        """
        curves: _Curves = {candidate: [] for candidate in candidates}
        for rounds_left in range(rounds, 0, -1):
            trials = [
                (candidate, strength)
                for candidate, points in curves.items()
                if (strength := self._next_strength(points, scouted.get(candidate, ()))) is not None
            ]
            self._progress.leave(len(trials) * num_prompts * rounds_left + texts_later)
            points = self._evaluator.evaluate(trials, num_prompts, self._progress.decoded)
            for (candidate, _), point in zip(trials, points, strict=True):
                curves[candidate].append(point)
                self.points.append(point)
        self._progress.leave(texts_later)
        return curves

    def finalists(self, scouted: _Curves) -> list[Candidate]:
        """The :data:`FINALISTS` most promising candidates of each blend, the best first."""
        ranked = sorted(scouted, key=lambda candidate: self._promise(scouted[candidate]), reverse=True)
        return [
            candidate
            for blend in sorted(set(self._spec.blends))
            for candidate in [one for one in ranked if one.blend == blend][:FINALISTS]
        ]

    def best(self, points: Sequence[CalibrationPoint]) -> CalibrationPoint | None:
        """The point of highest quality, of those within the bounds."""
        return max((point for point in points if self._is_admitted(point)), key=_quality, default=None)

    def _promise(self, points: Sequence[CalibrationPoint]) -> tuple[bool, float, float, float]:
        """Sorting key of candidates, by their points: whether one is within the bounds, then the best one's quality."""
        best = self.best(points)
        return best is not None, *_quality(best or self._strongest(points))

    def _is_admitted(self, point: CalibrationPoint) -> bool:
        return self._spec.admits(point, self._evaluator.plain_metrics(point.texts).distinct_2)

    def _strongest(self, points: Sequence[CalibrationPoint]) -> CalibrationPoint:
        """The strongest point within the KL budget; the weakest of all where none is."""
        within_budget = [point for point in points if point.kl_p95 <= self._spec.kl_budget]
        return max(within_budget or [min(points, key=_strength)], key=_strength)

    def _next_strength(self, points: Sequence[CalibrationPoint], scouted: Sequence[CalibrationPoint]) -> float | None:
        """The next strength to try, given those tried so far; None when the search has ended."""
        tried = [(point.strength, point.kl_p95) for point in points]
        first = self._strongest(scouted).strength if scouted else FIRST_STRENGTH
        strength = next_strength(tried, self._spec.kl_budget, first)
        if strength is not None or self.best(points) is not None:
            return strength
        # At the budget, and not fluent there.
        weakest = min(point.strength for point in points)
        scouted_best = self.best(scouted)
        if scouted_best is not None and scouted_best.strength < weakest:
            return scouted_best.strength
        weaker = round_strength(weakest * WEAKER)
        return weaker if weaker >= MIN_STRENGTH else None


class _TextProgress:
    """Counts texts that are decoded, or need not be any more, of the most that a search may take.

    The total stays: a time left can be told only of one that does. A search that ends early jumps to the end.
    """

    def __init__(self, progress: Progress, most: int) -> None:
        self._progress, self._total, self._left = progress, most, most

    def leave(self, texts: int) -> None:
        """At most so many texts are left."""
        if texts < self._left:
            self.decoded(self._left - texts)

    def decoded(self, texts: int) -> None:
        """So many texts were decoded."""
        self._left -= texts
        self._progress("texts", self._total - self._left, self._total)


def _quality(point: CalibrationPoint) -> tuple[float, float, float]:
    return point.hit_rate, -point.perplexity_ratio, point.distinct_2


def _strength(point: CalibrationPoint) -> float:
    return point.strength
