"""What an operator does at many settings: curves of one concept over layers, rules, blends and strengths.

Every candidate (layer, rule, blend) is brought to the same distance from the plain model: the strength at which the
95th percentile, over the tokens of its texts, of KL(plain || steered) uses up a budget. A first look at all takes a few
prompts; the most promising ones of each blend are then tried on all prompts. Where texts at the budget are not fluent,
weaker pushes follow. The setting whose texts name the concept most often wins, among those whose texts are neither much
more surprising to the plain model than its own, nor much more repetitive: a loop over the concept's name would be sure
of its hits, and no surprise at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from operators.builder import memory
from operators.core import capacity
from operators.core.apply import Setting, prepare
from operators.core.artifact import OperatorArtifact
from operators.core.errors import TrialError
from operators.core.header import MAX_WORD, MAX_WORDS, Calibration, CalibrationPoint, Rule
from operators.model.loading import LoadedModel
from operators.tune.evaluate import WordList, figures
from operators.tune.search import FIRST_STRENGTH, MIN_STRENGTH, next_strength, rounded
from operators.tune.trial import ROWS, Push, Row, Text, write

SCOUT_PROMPTS = 8
SCOUT_ROUNDS = 3
FINALISTS = 2
"""Of each blend, so that the curves say what operator, anchor and what lies between them do at the same distance."""
FINAL_ROUNDS = 5
WEAKER = 0.8
"""Times the weakest strength so far: the next to try where that one's texts are not fluent."""

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, done, in all); the last shrinks when a search ends early."""


@dataclass(frozen=True)
class CalibrationSpec:
    """What to try. ``words``: what the concept is recognised by. ``prompts``: how the texts begin.

    ``layers`` None takes the operator's own and six over the middle of the model. ``kl_budget`` in nats;
    ``max_perplexity_ratio`` bounds the perplexity of the steered texts under the plain model, over that of the plain
    texts; ``min_distinct_ratio`` their distinct-2, likewise. ``tokens`` is per text.
    """

    words: tuple[str, ...]
    prompts: tuple[str, ...]
    layers: tuple[int, ...] | None = None
    rules: tuple[Rule, ...] = ("cumulative", "substitute")
    blends: tuple[float, ...] = (0.0, 0.5, 1.0)
    kl_budget: float = 1.0
    max_perplexity_ratio: float = 2.0
    min_distinct_ratio: float = 0.75
    tokens: int = 24

    def __post_init__(self) -> None:
        """Raises :class:`TrialError` or :class:`SettingError` for what makes no sense."""
        WordList(self.words)
        if len(self.words) > MAX_WORDS or max(map(len, self.words)) > MAX_WORD:
            raise TrialError(f"words: at most {MAX_WORDS} of {MAX_WORD} characters are accepted")
        for field, values in (("prompts", self.prompts), ("rules", self.rules), ("blends", self.blends)):
            if not values:
                raise TrialError(f"there are no {field}; at least one is needed")
        for rule in self.rules:
            for blend in self.blends:
                Setting(0.0, rule, blend)
        if not (math.isfinite(self.kl_budget) and self.kl_budget > 0):
            raise TrialError(f"KL budget is {self.kl_budget:g}; a finite number of nats above 0 is accepted")
        if not (math.isfinite(self.max_perplexity_ratio) and self.max_perplexity_ratio > 0):
            raise TrialError(f"perplexity ratio is {self.max_perplexity_ratio:g}; a finite number above 0 is accepted")
        if not 0 <= self.min_distinct_ratio <= 1:
            raise TrialError(f"distinct-2 ratio is {self.min_distinct_ratio:g}; a number from 0 to 1 is accepted")
        if self.tokens < 1:
            raise TrialError(f"tokens per text are {self.tokens}; 1 or more are accepted")


@dataclass(frozen=True)
class _Candidate:
    layer: int
    rule: Rule
    blend: float


_Curves = dict[_Candidate, list[CalibrationPoint]]


def explore(
    operators: Mapping[int, OperatorArtifact],
    loaded: LoadedModel,
    spec: CalibrationSpec,
    *,
    max_memory: int | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """The curves of one concept's operators, given by layer, and which of their points is best.

    ``max_memory``: bytes beside model and operators; most of what is free when not given.

    Raises:
        BuildError: not even one text fits into the memory.
        TrialError: a prompt has no tokens or too many.
        SteeringError: a candidate has no direction at some token.
    """
    budget = capacity.free(loaded.device) if max_memory is None else max_memory
    trials = _Trials(operators, loaded, spec, budget, progress or _quiet)
    blends = sorted(set(spec.blends))
    candidates = [
        _Candidate(layer, rule, blend)
        for layer in sorted(operators)
        for blend in blends
        # The anchor alone is the same by every rule.
        for rule in (spec.rules[:1] if blend == 1.0 else spec.rules)
    ]
    places = FINALISTS * len(blends)
    scouted: _Curves = {}
    if len(candidates) > places and len(spec.prompts) > SCOUT_PROMPTS:
        scouted = trials.curves(candidates, SCOUT_PROMPTS, SCOUT_ROUNDS, {}, afterwards=places)
        ranked = sorted(candidates, key=lambda candidate: trials.promise(scouted[candidate]), reverse=True)
        candidates = [one for blend in blends for one in [each for each in ranked if each.blend == blend][:FINALISTS]]
    final = trials.curves(candidates, len(spec.prompts), FINAL_ROUNDS, scouted)
    found = [point for points in final.values() if (point := trials.best(points)) is not None]
    best = max((point for point in found if point.hit_rate > trials.plain.hit_rate), key=_merit, default=None)
    return Calibration(
        words=spec.words,
        kl_budget=spec.kl_budget,
        max_perplexity_ratio=spec.max_perplexity_ratio,
        min_distinct_ratio=spec.min_distinct_ratio,
        prompts=len(spec.prompts),
        tokens=spec.tokens,
        plain_hit_rate=trials.plain.hit_rate,
        plain_perplexity=trials.plain.perplexity,
        plain_distinct_2=trials.plain.distinct_2,
        points=tuple(trials.points),
        chosen=None if best is None else trials.points.index(best),
    )


def within(point: CalibrationPoint, spec: CalibrationSpec, plain_distinct_2: float) -> bool:
    """Whether a point keeps to the KL budget and to both bounds of fluency."""
    fluent = point.perplexity_ratio <= spec.max_perplexity_ratio
    return fluent and point.kl_p95 <= spec.kl_budget and point.distinct_2 >= spec.min_distinct_ratio * plain_distinct_2


def _merit(point: CalibrationPoint) -> tuple[float, float, float]:
    return point.hit_rate, -point.perplexity_ratio, point.distinct_2


class _Trials:
    """Runs candidates and keeps every point. ``plain``: the figures of the plain model on all prompts."""

    def __init__(
        self,
        operators: Mapping[int, OperatorArtifact],
        loaded: LoadedModel,
        spec: CalibrationSpec,
        budget: int,
        progress: Progress,
    ) -> None:
        self.points: list[CalibrationPoint] = []
        self._operators = {layer: prepare(artifact, loaded.device) for layer, artifact in operators.items()}
        self._sites = {layer: artifact.header.injection_layer for layer, artifact in operators.items()}
        self._loaded, self._spec, self._progress = loaded, spec, progress
        self._words = WordList(spec.words)
        self._prompts = [_encoded(prompt, loaded) for prompt in spec.prompts]
        self._done = self._planned = 0
        longest = max(map(len, self._prompts)) + spec.tokens
        self._rows = memory.columns_within(
            budget,
            memory.trial_need(loaded, longest),
            ROWS,
            f"a text of {longest} tokens of {loaded.name}, its prompt included,",
            "shorter prompts or texts, fewer layers or a lower rank need less",
        )
        texts = write([Row(ids) for ids in self._prompts], loaded, tokens=spec.tokens, rows_per_batch=self._rows)
        sizes = {len(texts), min(SCOUT_PROMPTS, len(texts))}
        self._plain = {size: figures(texts[:size], self._words, loaded) for size in sizes}
        self.plain = self._plain[len(texts)]

    def curves(
        self,
        candidates: Sequence[_Candidate],
        size: int,
        rounds: int,
        scouted: Mapping[_Candidate, Sequence[CalibrationPoint]],
        *,
        afterwards: int = 0,
    ) -> _Curves:
        """Brings every candidate to the budget on the first ``size`` prompts; the strengths of a round in one go.

        ``scouted``: what is known of them from fewer prompts. ``afterwards``: how many candidates will be tried on all
        prompts later, for the progress.
        """
        found: _Curves = {candidate: [] for candidate in candidates}
        later = afterwards * len(self._prompts) * FINAL_ROUNDS
        for left in range(rounds, 0, -1):
            settings = [
                (candidate, Setting(strength, candidate.rule, candidate.blend))
                for candidate, points in found.items()
                if (strength := self._next(points, scouted.get(candidate, ()))) is not None
            ]
            self._planned = self._done + len(settings) * size * left + later
            for (candidate, _), point in zip(settings, self._tried(settings, size), strict=True):
                found[candidate].append(point)
                self.points.append(point)
        return found

    def best(self, points: Sequence[CalibrationPoint]) -> CalibrationPoint | None:
        """The one that names the concept most often, of those within the bounds."""
        return max((point for point in points if self._within(point)), key=_merit, default=None)

    def promise(self, points: Sequence[CalibrationPoint]) -> tuple[bool, float, float, float]:
        """What candidates are ranked by."""
        best = self.best(points)
        return best is not None, *_merit(best or self._strongest(points))

    def _within(self, point: CalibrationPoint) -> bool:
        return within(point, self._spec, self._plain[point.texts].distinct_2)

    def _strongest(self, points: Sequence[CalibrationPoint]) -> CalibrationPoint:
        """The strongest within the KL budget, or the weakest."""
        inside = [point for point in points if point.kl_p95 <= self._spec.kl_budget]
        return max(inside or [min(points, key=_strength)], key=_strength)

    def _next(self, points: Sequence[CalibrationPoint], scouted: Sequence[CalibrationPoint]) -> float | None:
        tried = [(point.strength, point.kl_p95) for point in points]
        first = self._strongest(scouted).strength if scouted else FIRST_STRENGTH
        strength = next_strength(tried, self._spec.kl_budget, first)
        if strength is not None or self.best(points) is not None:
            return strength
        weakest = min(point.strength for point in points)
        known = self.best(scouted)
        weaker = known.strength if known and known.strength < weakest else rounded(weakest * WEAKER)
        return weaker if weaker >= MIN_STRENGTH else None

    def _tried(self, settings: Sequence[tuple[_Candidate, Setting]], size: int) -> list[CalibrationPoint]:
        rows = [
            Row(ids, Push(self._operators[candidate.layer], self._sites[candidate.layer], setting))
            for candidate, setting in settings
            for ids in self._prompts[:size]
        ]
        texts = write(rows, self._loaded, tokens=self._spec.tokens, rows_per_batch=self._rows, tick=self._tick)
        return [
            self._point(candidate, setting, texts[first : first + size])
            for first, (candidate, setting) in zip(range(0, len(texts), size), settings, strict=True)
        ]

    def _point(self, candidate: _Candidate, setting: Setting, texts: Sequence[Text]) -> CalibrationPoint:
        found, plain = figures(texts, self._words, self._loaded), self._plain[len(texts)]
        return CalibrationPoint(
            layer=candidate.layer,
            rule=candidate.rule,
            blend=candidate.blend,
            strength=setting.strength,
            texts=len(texts),
            kl_p95=found.kl_p95,
            hit_rate=found.hit_rate,
            perplexity_ratio=found.perplexity / plain.perplexity,
            distinct_2=found.distinct_2,
        )

    def _tick(self, rows: int) -> None:
        self._done += rows
        self._progress("texts written", self._done, max(self._planned, self._done))


def _strength(point: CalibrationPoint) -> float:
    return point.strength


def _encoded(prompt: str, loaded: LoadedModel) -> tuple[int, ...]:
    ids = tuple(int(token) for token in loaded.tokenizer(prompt)["input_ids"])
    if not ids:
        raise TrialError(f"prompt {prompt!r} has no tokens; at least one is needed")
    return ids


def _quiet(_what: str, _done: int, _total: int) -> None:
    pass
