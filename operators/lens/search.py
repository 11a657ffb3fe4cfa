"""Where a lens steers a model, and how strongly: a short search over positions, layers and strengths.

A first round brings every (positions, layer) to the same distance from the plain model, by a few words on a few
prompts: the strength at which the 95th percentile over the tokens of KL(plain || steered) uses up a budget. The most
promising ones, with the best of each kind of positions among them, are compared on more words and prompts, and the
doses of the best one are measured: its curve. A push on the first position alone is preferred as long as no other is
clearly better, since it costs nothing per decoded token. Where even the best one brings the words in too rarely within
the budget, no strength is recommended.

The words and prompts are for this choice only. What a lens achieves is measured on others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from operators.core.artifact import OperatorArtifact
from operators.core.budget import DEFAULT_KL
from operators.core.dose_curve import DoseCurve, DosePoint, strength_for
from operators.core.errors import BuildError, SettingError
from operators.core.header import DTypeName, OperatorHeader
from operators.core.lens_source import LensFinding, LensPositions
from operators.core.progress import Progress, silent
from operators.lens.matrices import texts_digest
from operators.lens.measure import LensTrials, Panel
from operators.model.loading import LoadedModel
from operators.model.words import UnembeddingRows
from operators.tune.prompts import calibration_prompts
from operators.tune.strength_search import MIN_STRENGTH, next_strength, round_strength

DEVELOPMENT_WORDS = ("ocean", "wedding", "winter", "football", "bridge", "tea")
_FIRST_STRENGTHS: Mapping[LensPositions, float] = {"first": 0.12, "others": 0.03, "all": 0.03}
_CURVE = (0.3, 0.45, 0.6, 0.75, 0.9, 1.0, 1.15, 1.4, 1.8, 2.4)
"""Strengths of the curve, over the one that uses the budget up."""
STEERS = 0.1
"""Texts with the word and without a loop, beyond the plain ones' share, from which on a lens is said to steer."""
CLEARLY = 1.25
"""How many times as good another lens must be than one of the first position: a standard error of 48 texts or two."""
_NEAR = 1.25
"""How far a few rounds may leave a lens above the budget that is compared all the same."""
_WEAKEST: Mapping[DTypeName, float] = {"float64": 0.001, "float32": 0.001, "bfloat16": MIN_STRENGTH}
"""Strengths below are not tried: what hidden states of the model resolve, or less than anybody types."""


_DEPTH_SHARES = (0.5, 0.6, 0.7)
_QUICK_DEPTH_SHARES = (0.5, 0.7)


def candidate_layers(num_layers: int, *, quick: bool = False) -> tuple[int, ...]:
    """The layers to try where none is given. Raises :class:`BuildError` for a model of one block."""
    if num_layers < 2:
        raise BuildError("the model has one block; a lens is for the input of a later one")
    shares = _QUICK_DEPTH_SHARES if quick else _DEPTH_SHARES
    return tuple(sorted({min(max(1, round(share * num_layers)), num_layers - 1) for share in shares}))


@dataclass(frozen=True)
class SearchPlan:
    """How much a search tries. ``scouts`` is the panel of the first round, ``finals`` that of the others."""

    scouts: Panel
    finals: Panel
    scout_rounds: int = 3
    finalists: int = 4
    curve: tuple[float, ...] = field(default=_CURVE)

    @classmethod
    def default(cls) -> SearchPlan:
        """What the ``lens`` command does."""
        prompts = calibration_prompts()
        return cls(Panel(DEVELOPMENT_WORDS[:3], prompts[:4], 16), Panel(DEVELOPMENT_WORDS, prompts[:8], 24))

    @classmethod
    def quick(cls) -> SearchPlan:
        """About a quarter of it."""
        prompts = calibration_prompts()
        return cls(
            Panel(DEVELOPMENT_WORDS[:2], prompts[:3], 12),
            Panel(DEVELOPMENT_WORDS[:3], prompts[:4], 16),
            scout_rounds=2,
            finalists=3,
            curve=_CURVE[1::2],
        )

    def most_texts(self, candidates: int) -> int:
        """How many texts the search decodes at most."""
        scouts = self.scouts.texts * self.scout_rounds * candidates if candidates > 1 else 0
        compared = min(self.finalists, candidates) if candidates > 1 else 1
        # Finals of one candidate bring it to the budget first; its curve ends with the recommended strength.
        finals = compared * (1 if candidates > 1 else self.scout_rounds) + len(self.curve) + 1
        return scouts + self.finals.texts * finals + len(self.finals.prompts)


@dataclass(frozen=True)
class SearchResult:
    """What a search found. Filled by :func:`search_lens`."""

    lens: OperatorArtifact
    """The best one that was given."""
    curve: DoseCurve
    strength: float | None
    """At the default budget; None where nothing steers, or the curve does not reach the budget."""
    findings: tuple[LensFinding, ...]
    best_hit_rate: float
    """Of the curve within the budget, of texts without a loop."""


def search_lens(
    lenses: Sequence[OperatorArtifact],
    loaded: LoadedModel,
    unembedding: UnembeddingRows,
    plan: SearchPlan,
    *,
    progress: Progress = silent,
) -> SearchResult:
    """Chooses among lenses of one model, one for each (positions, layer), and measures the doses of the best one.

    Raises:
        TrialError, VectorError, SteeringError: as :meth:`operators.lens.measure.LensTrials.measure`.
    """
    texts = _Texts(progress, plan.most_texts(len(lenses)))
    search = _Search(LensTrials(loaded, unembedding, texts.add), plan)
    best, strength = search.choose(lenses)
    curve, recommended, useful = search.measure_curve(best, strength)
    texts.finish()
    return SearchResult(best, curve, recommended, tuple(search.findings), useful)


class _Search:
    """``findings``: all points that were measured before the curve, in order."""

    def __init__(self, trials: LensTrials, plan: SearchPlan) -> None:
        self.findings: list[LensFinding] = []
        self._trials, self._plan = trials, plan

    def choose(self, lenses: Sequence[OperatorArtifact]) -> tuple[OperatorArtifact, float]:
        """The lens that steers best within the budget, and a strength near it."""
        if len(lenses) == 1:
            points = self._to_the_budget(lenses, self._plan.finals)[0]
            return lenses[0], _strongest(points).strength
        scouted = self._to_the_budget(lenses, self._plan.scouts)
        finalists = _finalists(lenses, scouted, self._plan.finalists)
        trials = [(lenses[index], _strongest(scouted[index]).strength) for index in finalists]
        qualities = [_quality(point) for point in self._measure(trials, self._plan.finals)]
        best = max(range(len(trials)), key=qualities.__getitem__)
        of_first = [index for index, (lens, _) in enumerate(trials) if _positions(lens) == "first"]
        cheap = max(of_first, key=qualities.__getitem__, default=best)
        return trials[cheap if qualities[cheap] * CLEARLY >= qualities[best] else best]

    def measure_curve(self, lens: OperatorArtifact, strength: float) -> tuple[DoseCurve, float | None, float]:
        """The doses around ``strength``; the one to recommend, and its share of useful texts."""
        panel = self._plan.finals
        strengths = sorted({round_strength(strength * factor) for factor in self._plan.curve})
        points = self._trials.measure([(lens, each) for each in strengths], panel)
        plain = self._trials.plain_hit_rate(panel)
        recommended: float | None = None
        try:
            recommended = strength_for([(point.strength, point.kl_p95) for point in points], DEFAULT_KL)
        except SettingError:
            # The curve does not reach the budget.
            recommended = None
        useful = max((point.useful_rate for point in points if point.kl_p95 <= DEFAULT_KL), default=0.0)
        if recommended is not None:
            (at_budget,) = self._trials.measure([(lens, recommended)], panel)
            if recommended not in strengths:
                points.append(at_budget)
                # With this point the curve may reach the budget elsewhere: what is recommended is what it gives.
                recommended = strength_for([(point.strength, point.kl_p95) for point in points], DEFAULT_KL)
            useful = at_budget.useful_rate
        curve = DoseCurve(
            words=panel.words,
            prompts=len(panel.prompts),
            prompts_digest=texts_digest(panel.prompts),
            tokens=panel.tokens,
            plain_hit_rate=plain,
            points=tuple(sorted(points, key=lambda point: point.strength)),
        )
        return curve, recommended if useful >= plain + STEERS else None, useful

    def _to_the_budget(self, lenses: Sequence[OperatorArtifact], panel: Panel) -> list[list[DosePoint]]:
        """Of each lens, its points on the way to the strength that uses the budget up; a round is decoded together."""
        found: list[list[DosePoint]] = [[] for _ in lenses]
        for _ in range(self._plan.scout_rounds):
            trials = [
                (index, strength)
                for index, lens in enumerate(lenses)
                if (strength := _next(found[index], lens.header)) is not None
            ]
            points = self._measure([(lenses[index], strength) for index, strength in trials], panel)
            for (index, _), point in zip(trials, points, strict=True):
                found[index].append(point)
        return found

    def _measure(self, trials: Sequence[tuple[OperatorArtifact, float]], panel: Panel) -> list[DosePoint]:
        points = self._trials.measure(trials, panel)
        self.findings += [
            LensFinding(positions=_positions(lens), layer=lens.header.layer, texts=panel.texts, point=point)
            for (lens, _), point in zip(trials, points, strict=True)
        ]
        return points


def _positions(lens: OperatorArtifact) -> LensPositions:
    assert lens.header.lens is not None  # noqa: S101 - for the type checker
    return lens.header.lens.positions


def _next(points: Sequence[DosePoint], header: OperatorHeader) -> float | None:
    assert header.lens is not None  # noqa: S101 - for the type checker
    tried = [(point.strength, point.kl_p95) for point in points]
    first, weakest = _FIRST_STRENGTHS[header.lens.positions], _WEAKEST[header.model_dtype]
    return next_strength(tried, DEFAULT_KL, first, weakest=weakest)


def _strongest(points: Sequence[DosePoint]) -> DosePoint:
    """The strongest point within the budget; the weakest of all where none is."""
    within = [point for point in points if point.kl_p95 <= DEFAULT_KL]
    return max(within, key=_strength) if within else min(points, key=_strength)


def _finalists(lenses: Sequence[OperatorArtifact], scouted: Sequence[Sequence[DosePoint]], count: int) -> list[int]:
    """Indices: the most promising lens of each kind of positions, then the most promising of the others.

    Lenses that do not come near the budget are left out where another does.
    """
    ranked = sorted(range(len(lenses)), key=lambda index: _promise(scouted[index]), reverse=True)
    within = [index for index in ranked if _promise(scouted[index]) >= 0.0]
    ranked = within or ranked
    kinds = [_positions(lenses[index]) for index in ranked]
    leaders = [index for place, index in enumerate(ranked) if kinds[place] not in kinds[:place]]
    return [*leaders, *(index for index in ranked if index not in leaders)][:count]


def _promise(points: Sequence[DosePoint]) -> float:
    return max((_quality(point) for point in points if point.kl_p95 <= _NEAR * DEFAULT_KL), default=-1.0)


def _quality(point: DosePoint) -> float:
    """What points near the budget are compared by: the share of the texts with the word, those with a loop for a half.

    One that exceeds the budget is worth what it would be at it, about.
    """
    return (point.hit_rate + point.useful_rate) / 2 * min(1.0, DEFAULT_KL / max(point.kl_p95, 1e-9))


def _strength(point: DosePoint) -> float:
    return point.strength


class _Texts:
    """Counts texts of the most that a search may decode; one that ends early jumps to the end."""

    def __init__(self, progress: Callable[[str, int, int], None], most: int) -> None:
        self._progress, self._most, self._done = progress, most, 0

    def add(self, texts: int) -> None:
        self._done += texts
        self._progress("texts", min(self._done, self._most), self._most)

    def finish(self) -> None:
        self._progress("texts", self._most, self._most)
