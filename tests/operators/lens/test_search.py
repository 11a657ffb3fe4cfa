"""The search: how it chooses, and what it says where nothing steers."""

import pytest

from operators.core.budget import DEFAULT_KL
from operators.core.dose_curve import DosePoint, strength_for
from operators.core.errors import TrialError
from operators.lens import search
from operators.lens.build import lens_artifact
from operators.lens.matrices import lens_matrices
from operators.lens.measure import LensTrials, Panel
from operators.lens.search import DEVELOPMENT_WORDS, SearchPlan, candidate_layers, search_lens
from operators.model.unembedding import loaded_unembedding
from operators.tune.prompts import neutral_prompts

PLAN = SearchPlan(Panel(("tea",), ("a", "b"), 4), Panel(("tea",), ("a", "b", "c"), 4), finalists=2)


@pytest.fixture
def loaded(tiny):
    return tiny("llama", dtype="float32")


@pytest.fixture
def lenses(loaded):
    found = lens_matrices(("The bridge is painted.", "Here is the bay."), [1, 2], loaded)
    mean = loaded_unembedding(loaded.model).mean()
    return [
        lens_artifact(found, positions, layer, loaded, vocabulary_mean=mean)
        for positions in ("first", "others", "all")
        for layer in (1, 2)
    ]


class Invented:
    """Trials of a model in which KL is (strength/s)^2/2 and one lens steers: ``share`` of the texts at the budget."""

    def __init__(self, share, at=("others", 2), budget=0.2, floor=0.0):
        self.share, self.at, self.budget, self.floor, self.measured = share, at, budget, floor, []

    def measure(self, trials, panel):
        self.measured += trials
        return [self._point(lens, strength) for lens, strength in trials]

    def _point(self, lens, strength):
        kl = self.floor + DEFAULT_KL * (strength / self.budget) ** 2
        here = (lens.header.lens.positions, lens.header.layer) == self.at
        rate = min(1.0, self.share * kl / DEFAULT_KL) if here else 0.0
        return DosePoint(strength=strength, kl_p95=kl, kl_mean=kl / 4, hit_rate=rate, useful_rate=rate)

    def plain_hit_rate(self, _panel):
        return 0.05


def _search(lenses, loaded, invented, monkeypatch, plan=PLAN):
    monkeypatch.setattr(search, "LensTrials", lambda *_: invented)
    return search_lens(lenses, loaded, loaded_unembedding(loaded.model), plan)


def test_the_lens_that_steers_best_within_the_budget_is_chosen(lenses, loaded, monkeypatch):
    result = _search(lenses, loaded, Invented(0.6), monkeypatch)
    assert (result.lens.header.lens.positions, result.lens.header.layer) == ("others", 2)
    assert result.strength == pytest.approx(0.2, rel=0.01)
    assert result.best_hit_rate == pytest.approx(0.6, abs=0.02)
    # What is recommended was measured, and the curve reaches beyond it.
    assert result.strength in [point.strength for point in result.curve.points]
    assert result.curve.points[-1].kl_p95 > 2 * DEFAULT_KL
    assert {(finding.positions, finding.layer) for finding in result.findings} == {
        (positions, layer) for positions in ("first", "others", "all") for layer in (1, 2)
    }


def test_what_is_recommended_is_what_its_curve_gives_for_the_budget(lenses, loaded, monkeypatch):
    class Noisy(Invented):
        def _point(self, lens, strength):
            point = super()._point(lens, strength)
            # What is interpolated has a digit more than what is tried at first.
            more = 1.05 if float(f"{strength:.3g}") != strength else 1.0
            return point.model_copy(update={"kl_p95": more * point.kl_p95})

    result = _search(lenses[3:4], loaded, Noisy(0.6, budget=0.2007), monkeypatch)
    assert result.strength == strength_for(result.curve.doses, DEFAULT_KL)


def test_the_first_position_is_preferred_where_no_other_is_clearly_better(lenses, loaded, monkeypatch):
    class Close(Invented):
        def _point(self, lens, strength):
            self.at = (lens.header.lens.positions, 2)
            self.share = {"first": 0.5, "others": self.other, "all": 0.3}[lens.header.lens.positions]
            return super()._point(lens, strength)

    for other, expected in ((0.55, "first"), (0.8, "others")):
        invented = Close(0.5)
        invented.other = other
        result = _search(lenses, loaded, invented, monkeypatch, SearchPlan(PLAN.scouts, PLAN.finals))
        assert (result.lens.header.lens.positions, result.lens.header.layer) == (expected, 2)


def test_a_lens_that_exceeds_the_budget_at_every_strength_is_not_compared(lenses, loaded, monkeypatch):
    class Fragile(Invented):
        def _point(self, lens, strength):
            self.floor = 1.5 if lens.header.lens.positions == "first" else 0.0
            return super()._point(lens, strength)

    invented = Fragile(0.2)
    result = _search(lenses, loaded, invented, monkeypatch)
    assert result.lens.header.lens.positions == "others"
    compared = {finding.positions for finding in result.findings if finding.texts == PLAN.finals.texts}
    assert compared == {"others", "all"}
    # Far below what bfloat16 resolves, since this model is in float32.
    assert min(strength for _, strength in invented.measured) < 0.05


def test_where_nothing_steers_no_strength_is_recommended(lenses, loaded, monkeypatch):
    result = _search(lenses, loaded, Invented(0.1), monkeypatch)
    assert result.strength is None
    assert len(result.curve.points) > 5


def test_where_the_budget_is_exceeded_at_any_strength_none_is_recommended(lenses, loaded, monkeypatch):
    assert _search(lenses, loaded, Invented(1.0, floor=0.6), monkeypatch).strength is None


def test_one_lens_is_not_compared_and_its_doses_are_measured(lenses, loaded, monkeypatch):
    invented = Invented(0.6)
    result = _search(lenses[3:4], loaded, invented, monkeypatch)
    assert result.lens is lenses[3]
    assert result.strength == pytest.approx(0.2, rel=0.01)


def test_a_search_on_a_model_counts_its_texts_to_the_end(lenses, loaded):
    reports = []
    plan = SearchPlan(
        Panel(("tea",), ("The", "A"), 2), Panel(("tea", "bay"), ("The", "A"), 3), scout_rounds=1, curve=(0.5, 1.0)
    )
    result = search_lens(
        lenses[:2], loaded, loaded_unembedding(loaded.model), plan, progress=lambda *report: reports.append(report)
    )
    counts = [done for _, done, _ in reports]
    assert counts == sorted(counts)
    assert reports[-1] == ("texts", plan.most_texts(2), plan.most_texts(2))
    assert result.curve.words == ("tea", "bay")


def test_a_trial_steers_towards_the_word(loaded, lenses):
    # In a random model no text holds it, but its logit rises with the dose.
    trials = LensTrials(loaded, loaded_unembedding(loaded.model))
    weak, strong = trials.measure([(lenses[1], 0.05), (lenses[1], 0.5)], Panel(("the",), ("The bridge", "A bay"), 4))
    assert 0 < weak.kl_p95 < strong.kl_p95
    assert weak.kl_mean <= weak.kl_p95


def test_the_words_and_prompts_of_reports_are_not_searched_on():
    reported = {"volcano", "chess", "coffee", "dragon", "piano", "london", "robot", "honey"}
    assert not reported & set(DEVELOPMENT_WORDS)
    for plan in (SearchPlan.default(), SearchPlan.quick()):
        assert not {*plan.scouts.prompts, *plan.finals.prompts} & set(neutral_prompts())
        assert set(plan.scouts.words) <= set(DEVELOPMENT_WORDS)


def test_layers_to_try_exist():
    for depth in (2, 3, 4, 18, 30, 80):
        for quick in (False, True):
            assert all(1 <= layer < depth for layer in candidate_layers(depth, quick=quick))


def test_a_panel_without_texts_is_refused():
    with pytest.raises(TrialError, match="0 words on 1 prompts"):
        Panel((), ("a",), 4)
