"""Steering a continuous batch, held against one sequence at a time (``operators.apply.Direction``)."""

import random
from dataclasses import dataclass, field

import pytest
import torch

from operators.apply import Direction, PreparedOperator, Setting, prepare, steer
from steer_server.engine.batch import BatchSteering, Measured, Segment, Sited, Use, uses_of
from steer_server.engine.dose import dose_limit

CPU = torch.device("cpu")
D = 5


def embeddings(length, seed=0):
    return torch.randn(length, D, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def sited(make_operator):
    """Operators at two layers: exact and affine ones of several lengths, and one of low rank."""
    generator = torch.Generator().manual_seed(5)
    basis = torch.linalg.qr(torch.randn(D, 2, generator=generator)).Q
    factors = torch.randn(4, 2, D, generator=generator)
    base, anchor = torch.randn(2, D, generator=generator)
    return {
        "exact": Sited(prepare(make_operator(3, D, seed=1), CPU), 2),
        "affine": Sited(prepare(make_operator(1, D, affine=True, seed=2), CPU), 2),
        "higher": Sited(prepare(make_operator(2, D, seed=3), CPU), 3),
        "low": Sited(PreparedOperator(factors, basis, None, base, anchor / anchor.norm()), 3),
    }


@dataclass
class Engine:
    """Feeds texts as an engine with continuous batching does; rows that are nobody's lie between them."""

    sited: dict[str, Sited]
    dtype: torch.dtype = torch.float32
    texts: dict[str, torch.Tensor] = field(default_factory=dict)
    uses: dict[str, tuple[Use, ...]] = field(default_factory=dict)
    asked: list[tuple[str, int]] = field(default_factory=list)

    def __post_init__(self):
        self.steering = BatchSteering(self.dtype)
        for digest, operator in self.sited.items():
            self.steering.load(digest, operator)

    def begin(self, request, *uses, x=None, salt=None):
        self.texts[request] = embeddings(12) if x is None else x
        self.uses[request] = uses
        self.steering.follow(request, uses, request if salt is None else salt)

    def earlier(self, request, count):
        self.asked.append((request, count))
        return self.texts[request][:count]

    def prepare(self, *parts):
        """``parts``: (request, first position, number of tokens). The segments and the sites of one step."""
        segments, start = [], 1
        for request, first, count in parts:
            segments.append(Segment(request, start, first, count))
            start += count + 1
        x = torch.cat([self.texts[request][first : first + count] for request, first, count in parts])
        return segments, self.steering.prepare(segments, x, self.earlier)

    def step(self, *parts, change=None):
        """One forward pass. The push (count, d) of each request at each layer; zero where there is none."""
        segments, sites = self.prepare(*parts)
        owned = {row for segment in segments for row in range(segment.start, segment.start + segment.count)}
        hidden = torch.randn(max(owned) + 2, D, generator=torch.Generator().manual_seed(len(owned))).to(self.dtype)
        pushed = {}
        for layer, site in sites.items():
            rows = site.rows.tolist()
            assert len(set(rows)) == len(rows)
            assert set(rows) <= owned
            _, site.doses = steer(hidden[site.rows], site.push)
            dense = torch.zeros(len(hidden), D).index_copy(0, site.rows, site.push)
            pushed |= {(each.request, layer): dense[each.start : each.start + each.count] for each in segments}
        if change is not None:
            change(sites)
        self.steering.book(sites)
        return pushed

    def expected(self, request, layer):
        """The pushes (T, d) of the whole text, worked out alone."""
        x = self.texts[request]
        total = torch.zeros_like(x)
        for use in self.uses[request]:
            if self.sited[use.digest].layer == layer:
                setting = Setting(use.strength, use.rule, use.blend)
                total = total + use.strength / 2 * Direction(self.sited[use.digest].operator, setting).advance(x)
        return total

    def failure(self, request):
        return self.steering.account(request).failure


@pytest.fixture
def engine(sited):
    return Engine(sited)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


PLAIN_RULES = [Use("exact", "cumulative", 0.5, 0.0), Use("exact", "substitute", 0.5, 0.0)]


@pytest.mark.parametrize("seed", range(8))
def test_every_request_of_a_mixed_batch_is_pushed_as_if_it_were_alone(engine, seed):
    chance = random.Random(seed)
    lengths = {f"r{number}": chance.randint(1, 20) for number in range(7)}
    for request, length in lengths.items():
        uses = [
            Use(
                chance.choice(sorted(engine.sited)),
                chance.choice(["cumulative", "substitute"]),
                chance.choice([0.7, -0.4, 0.2]),
                chance.choice([0.0, 0.0, 0.3, 1.0]),
            )
            for _ in range(chance.randint(1, 4))
        ]
        engine.begin(request, *uses, x=embeddings(length, seed=chance.randrange(1 << 20)))
    at = dict.fromkeys(lengths, 0)
    while left := [request for request in lengths if at[request] < lengths[request]]:
        parts = [
            (request, at[request], chance.randint(1, min(6, lengths[request] - at[request])))
            for request in chance.sample(left, chance.randint(1, len(left)))
        ]
        pushed = engine.step(*parts)
        for (request, layer), push in pushed.items():
            close(push, engine.expected(request, layer)[at[request] : at[request] + len(push)])
        for request, _, count in parts:
            layers = {engine.sited[use.digest].layer for use in engine.uses[request]}
            assert layers <= {layer for other, layer in pushed if other == request}
            at[request] += count
    for request, length in lengths.items():
        account = engine.steering.account(request)
        assert (account.cached, account.failure) == (0, "")
        assert {len(measured.doses) for measured in account.layers} == {length}


@pytest.mark.parametrize("rule", ["cumulative", "substitute"])
@pytest.mark.parametrize("blend", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("cuts", [[12], [1] * 12, [5, 7], [7, 1, 1, 3], [2, 9, 1]], ids=str)
def test_any_chunking_of_a_prompt_gives_the_same(engine, rule, blend, cuts):
    engine.begin("a", Use("exact", rule, 0.6, blend))
    expected, first = engine.expected("a", 2), 0
    for count in cuts:
        close(engine.step(("a", first, count))["a", 2], expected[first : first + count])
        first += count
    assert engine.asked == []
    (measured,) = engine.steering.account("a").layers
    assert measured.doses == pytest.approx([0.3] * 12, abs=1e-5)


@pytest.mark.parametrize("rule", ["cumulative", "substitute"])
@pytest.mark.parametrize("first", [0, 3, 6, 9])
def test_a_request_that_comes_back_at_another_position_goes_on_from_its_token_ids(engine, rule, first):
    engine.begin("a", Use("exact", rule, 0.6, 0.2), Use("low", rule, 0.4, 0.0))
    engine.step(("a", 0, 7))
    for at, count in ((first, 2), (first + 2, 1)):
        pushed = engine.step(("a", at, count))
        for layer in (2, 3):
            close(pushed["a", layer], engine.expected("a", layer)[at : at + count])
    # A rule that sums up nothing needs nothing of what came before.
    assert engine.asked == ([("a", first)] if rule == "cumulative" and first else [])


def test_a_request_that_begins_after_a_cached_prefix_sums_it_up_and_says_so(engine):
    engine.begin("a", Use("exact", "cumulative", 0.6, 0.0))
    close(engine.step(("a", 8, 3))["a", 2], engine.expected("a", 2)[8:11])
    account = engine.steering.account("a")
    assert (account.cached, len(account.layers[0].doses), account.failure) == (8, 3, "")


@pytest.mark.parametrize("rules", [("cumulative", "substitute"), ("substitute", "cumulative")])
def test_two_operators_at_one_layer_add_up(engine, rules):
    uses = [Use("exact", rules[0], 0.7, 0.0), Use("affine", rules[1], -0.4, 0.3)]
    engine.begin("both", *uses)
    engine.begin("one", uses[0], x=embeddings(12, seed=1))
    engine.begin("other", uses[1], x=embeddings(12, seed=2))
    pushed = engine.step(("one", 0, 4), ("both", 0, 12), ("other", 0, 5))
    for request, count in (("one", 4), ("both", 12), ("other", 5)):
        close(pushed[request, 2], engine.expected(request, 2)[:count])
    (measured,) = engine.steering.account("both").layers
    assert measured.doses == pytest.approx(engine.expected("both", 2).norm(dim=-1).tolist(), abs=1e-5)


def test_an_operator_that_one_request_uses_twice_is_pushed_twice_in_that_request_alone(engine):
    twice = Use("exact", "cumulative", 0.5, 0.0), Use("exact", "cumulative", 0.3, 0.6)
    engine.begin("twice", *twice)
    # As many tokens as the first one brings a second time: the sizes of the two groups of rows are the same.
    engine.begin("another", Use("affine", "cumulative", 0.5, 0.0), x=embeddings(12, seed=1))
    pushed = engine.step(("another", 0, 4), ("twice", 0, 4))
    close(pushed["twice", 2], engine.expected("twice", 2)[:4])
    close(pushed["another", 2], engine.expected("another", 2)[:4])


def test_the_bits_of_a_row_do_not_depend_on_its_neighbours_blend(sited):
    found = []
    for blend in (0.0, 0.5):
        engine = Engine(sited)
        engine.begin("a", Use("exact", "cumulative", 0.6, 0.0))
        engine.begin("b", Use("exact", "cumulative", -0.2, blend), x=embeddings(12, seed=1))
        found.append(engine.step(("a", 0, 6), ("b", 0, 6))["a", 2])
    assert torch.equal(*found)


def test_hidden_states_of_half_precision_are_steered_from_embeddings_in_full(sited):
    engine = Engine(sited)
    engine.begin("a", Use("exact", "cumulative", 0.6, 0.0), x=embeddings(12).bfloat16())
    engine.step(("a", 0, 4))
    close(engine.step(("a", 6, 2))["a", 2], engine.expected("a", 2)[6:8])


# Accounts.


def test_a_position_that_is_computed_once_more_is_counted_once(engine):
    engine.begin("a", Use("exact", "cumulative", 0.6, 0.0), Use("low", "cumulative", 0.2, 0.0))
    doses = []

    def change(sites):
        for site in sites.values():
            site.doses = torch.full_like(site.doses, 0.01 * (1 + len(doses)))
        doses.append(None)

    for first, count in ((0, 5), (2, 4), (0, 7), (7, 1)):
        engine.step(("a", first, count), change=change)
    lower, higher = engine.steering.account("a").layers
    assert (lower.layer, higher.layer) == (2, 3)
    # Each as it was measured first.
    assert lower.doses == higher.doses == pytest.approx([0.01] * 5 + [0.02] + [0.03] + [0.04])


def test_a_prefix_that_is_found_half_way_through_the_prompt_is_cached_as_well(engine):
    # Preempted after 3 of its tokens; by then another request with the same steering had computed more.
    engine.begin("a", Use("exact", "cumulative", 0.6, 0.0), Use("low", "cumulative", 0.2, 0.0))
    engine.step(("a", 0, 3))
    engine.step(("a", 8, 2))
    engine.step(("a", 10, 1))
    account = engine.steering.account("a")
    assert (account.cached, account.failure) == (8, "")
    assert [len(measured.doses) for measured in account.layers] == [3, 3]


def test_each_layer_of_a_request_has_its_own_measurement(engine):
    engine.begin("a", Use("exact", "cumulative", 0.6, 0.0), Use("low", "substitute", -0.2, 0.0))
    engine.begin("b", Use("higher", "cumulative", 1.0, 0.5), x=embeddings(12, seed=1))
    engine.step(("a", 0, 2), ("b", 0, 3))
    lower, higher = engine.steering.account("a").layers
    assert (lower.layer, higher.layer) == (2, 3)
    assert lower.doses == pytest.approx([0.3] * 2, abs=1e-5)
    assert higher.doses == pytest.approx([0.1] * 2, abs=1e-5)
    assert [(each.layer, len(each.doses)) for each in engine.steering.account("b").layers] == [(3, 3)]


def test_a_request_that_never_ran_has_an_empty_account(engine):
    engine.begin("a", PLAIN_RULES[0])
    account = engine.steering.account("a")
    assert (account.cached, account.layers, account.failure) == (0, (), "")


def test_following_a_request_again_leaves_it_as_it_is(engine):
    engine.begin("a", PLAIN_RULES[0])
    engine.step(("a", 0, 4))
    engine.begin("a", PLAIN_RULES[0])
    close(engine.step(("a", 4, 2))["a", 2], engine.expected("a", 2)[4:6])
    assert len(engine.steering.account("a").layers[0].doses) == 6


def test_a_forgotten_request_leaves_nothing_and_may_still_have_been_in_a_step(engine):
    engine.begin("a", PLAIN_RULES[0])
    engine.begin("b", PLAIN_RULES[0], x=embeddings(12, seed=1))
    assert len(engine.steering) == 2
    engine.step(("a", 0, 3), ("b", 0, 2), change=lambda _: engine.steering.forget("a"))
    assert "a" not in engine.steering
    assert "b" in engine.steering
    assert len(engine.steering) == 1
    with pytest.raises(KeyError):
        engine.steering.account("a")
    assert engine.steering.account("b").layers[0].doses == pytest.approx([0.25] * 2, abs=1e-5)
    engine.steering.forget("a")


def test_what_travels_to_the_workers_is_every_operator_of_a_strength_other_than_zero(artifact, other_artifact, plan_of):
    plan = plan_of((artifact, 0.5), (other_artifact, 0.0), (artifact, -0.25), rule="substitute", blend=0.125)
    assert uses_of(plan) == (
        Use(artifact.digest, "substitute", 0.5, 0.125),
        Use(artifact.digest, "substitute", -0.25, 0.125),
    )


# Failures.


def set_doses(value):
    def change(sites):
        for site in sites.values():
            site.doses = None if value is None else torch.full_like(site.doses, value)

    return change


def test_an_operator_that_was_never_loaded_is_a_failure(engine):
    engine.begin("a", Use("exact", "cumulative", 0.5, 0.0), Use("unknown", "cumulative", 0.5, 0.0))
    engine.step(("a", 0, 2))
    assert engine.failure("a") == "operator unknown is not loaded"


@pytest.mark.parametrize("use", [*PLAIN_RULES, Use("exact", "cumulative", 0.5, 1.0)], ids=str)
def test_an_operator_that_is_unloaded_under_a_request_is_its_failure(engine, use):
    engine.begin("a", use)
    engine.begin("b", Use("affine", "cumulative", 0.5, 0.0), x=embeddings(12, seed=1))
    engine.step(("a", 0, 2), ("b", 0, 2))
    engine.steering.unload("exact")
    engine.steering.unload("exact")
    assert set(engine.steering.loaded) == {"affine", "higher", "low"}
    pushed = engine.step(("a", 2, 2), ("b", 2, 2))
    assert not pushed["a", 2].any()
    close(pushed["b", 2], engine.expected("b", 2)[2:4])
    assert engine.failure("a") == "operator exact was unloaded"
    assert engine.failure("b") == ""


def test_a_request_whose_only_operator_is_gone_is_a_failure_even_when_nothing_else_is_steered(engine):
    engine.begin("a", PLAIN_RULES[0])
    engine.steering.unload("exact")
    assert engine.step(("a", 0, 2)) == {}
    assert engine.failure("a") == "operator exact was unloaded"


@pytest.mark.parametrize("blend", [0.0, 0.5])
@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_direction_that_does_not_exist_is_a_failure_of_its_request_alone(engine, value, blend):
    x = embeddings(12)
    x[:3] = 0.0 if value == 0.0 else embeddings(3)
    x[2] = value
    engine.begin("a", Use("exact", "cumulative", 0.5, blend), x=x)
    engine.begin("b", Use("exact", "cumulative", 0.5, 0.3), x=embeddings(12, seed=1))
    pushed = engine.step(("b", 0, 2), ("a", 0, 3))
    place = 0 if value == 0.0 else 2
    assert engine.failure("a") == f"the steering direction at position {place} is zero or not finite"
    assert not pushed["a", 2][2].any()
    close(pushed["b", 2], engine.expected("b", 2)[:2])
    assert engine.failure("b") == ""


def test_the_anchor_is_a_direction_whatever_the_embeddings_are(engine):
    engine.begin("a", Use("exact", "cumulative", 0.5, 1.0), x=torch.zeros(12, D))
    close(engine.step(("a", 0, 3))["a", 2], engine.expected("a", 2)[:3])
    assert engine.failure("a") == ""


def test_a_hook_that_never_ran_is_a_failure(engine):
    engine.begin("a", PLAIN_RULES[0])
    engine.begin("b", Use("low", "cumulative", 0.5, 0.0))
    engine.step(("a", 0, 2), ("b", 0, 2), change=lambda sites: setattr(sites[2], "doses", None))
    assert engine.failure("a") == "layer 2 was not reached: the model did not call its hook"
    assert engine.failure("b") == ""


@pytest.mark.parametrize("dose", [0.0, -0.1, float("nan"), float("inf")])
def test_a_hidden_state_that_did_not_move_by_a_positive_amount_is_a_failure(engine, dose):
    engine.begin("a", PLAIN_RULES[0])
    engine.step(("a", 0, 2), change=set_doses(dose))
    assert f"layer 2: the hidden state moved by {dose:g} of its norm" in engine.failure("a")


def test_a_dose_above_what_the_strengths_of_its_layer_give_is_a_failure(engine):
    limit = dose_limit(0.25 + 0.1, torch.float32)
    uses = PLAIN_RULES[0], Use("affine", "cumulative", -0.2, 0.0)
    for request, dose in (("a", limit * (1 - 1e-6)), ("b", limit * (1 + 1e-6))):
        engine.begin(request, *uses, Use("low", "cumulative", 9.0, 0.0))
        engine.step((request, 0, 2), change=lambda sites, dose=dose: setattr(sites[2], "doses", torch.full((2,), dose)))
    assert engine.failure("a") == ""
    assert "layer 2: the hidden state moved by 0.35" in engine.failure("b")


@pytest.mark.parametrize("count", range(1, 13))
def test_strengths_that_cancel_are_a_failure_however_they_are_rounded(engine, make_operator, count):
    # Worked out in places of their own, equal directions may differ in their last bits.
    engine.steering.load("same", Sited(prepare(make_operator(3, D, seed=1), CPU), 2))
    for request, other in (("a", "exact"), ("b", "same")):
        engine.begin(request, PLAIN_RULES[0], Use(other, "cumulative", -0.5, 0.0))
        engine.begin(f"beside {request}", Use(other, "cumulative", 0.5, 0.0), x=embeddings(12, seed=1))
    engine.step(*((request, 0, count) for request in engine.texts))
    assert "they may cancel" in engine.failure("a")
    assert "they may cancel" in engine.failure("b")
    assert engine.failure("beside a") == engine.failure("beside b") == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weakest_strength_that_a_dtype_resolves_is_no_rounding(sited, dtype):
    engine = Engine(sited, dtype)
    engine.begin("a", Use("exact", "cumulative", torch.finfo(dtype).eps, 0.0))
    engine.step(("a", 0, 12))
    assert engine.failure("a") == ""


def test_a_dose_is_looked_at_when_its_position_is_computed_once_more(engine):
    engine.begin("a", PLAIN_RULES[0])
    engine.step(("a", 0, 4))
    engine.step(("a", 0, 4), change=set_doses(0.9))
    assert "moved by 0.9" in engine.failure("a")
    assert engine.steering.account("a").layers == (Measured(2, pytest.approx([0.25] * 4, abs=1e-5)),)


def test_the_first_failure_is_the_one_that_is_told(engine):
    engine.begin("a", PLAIN_RULES[0])
    engine.step(("a", 0, 2), change=set_doses(None))
    engine.step(("a", 2, 2), change=set_doses(0.9))
    engine.steering.unload("exact")
    engine.step(("a", 4, 1))
    assert "was not reached" in engine.failure("a")


# What a request that failed left in the cache of keys and values.

TAINTED = "its prompt's beginning was left by a request that failed"


def _fails(engine, request="bad", salt="s"):
    engine.begin(request, PLAIN_RULES[0], salt=salt)
    engine.step((request, 0, 4), change=set_doses(None))


@pytest.mark.parametrize("taken", [True, False], ids=["its account taken", "still running"])
def test_a_request_that_begins_on_what_a_failed_one_left_fails_too(engine, taken):
    _fails(engine)
    if taken:
        engine.steering.account("bad")
        engine.steering.forget("bad")
    for request, salt, first in (("after", "s", 4), ("whole", "s", 0), ("other", "another salt", 4)):
        engine.begin(request, PLAIN_RULES[0], salt=salt)
        engine.step((request, first, 2))
    assert engine.failure("after") == TAINTED
    # These two share none of its keys and values.
    assert engine.failure("whole") == engine.failure("other") == ""


def test_a_request_that_begins_on_what_an_unknown_operator_left_fails_too(engine):
    engine.begin("bad", Use("late", "cumulative", 0.5, 0.0), salt="s")
    engine.step(("bad", 0, 4))
    engine.steering.load("late", engine.sited["exact"])
    engine.begin("after", Use("late", "cumulative", 0.5, 0.0), salt="s")
    engine.step(("after", 4, 2))
    assert engine.failure("after") == TAINTED


def test_a_request_that_was_under_way_before_is_not_to_blame_for_a_later_failure(engine):
    for request in ("first", "bad"):
        engine.begin(request, PLAIN_RULES[0], salt="s")
        engine.step((request, 2, 2))
    engine.step(("bad", 4, 2), change=set_doses(None))
    engine.step(("first", 4, 2))
    assert engine.failure("bad") != ""
    assert engine.failure("first") == ""


def test_a_failure_that_is_noticed_late_reaches_those_who_began_in_between(engine):
    # Measurements are read from the device some steps after they were made.
    for request in ("before", "bad", "after"):
        engine.begin(request, PLAIN_RULES[0], salt="s")
    engine.step(("before", 2, 2))
    _, failing = engine.prepare(("bad", 0, 4))
    engine.step(("after", 4, 2))
    engine.steering.book(failing)
    assert "was not reached" in engine.failure("bad")
    assert engine.failure("after") == TAINTED
    assert engine.failure("before") == ""


def test_a_request_that_comes_back_finds_what_a_failed_one_left(engine):
    engine.begin("a", PLAIN_RULES[0], salt="s")
    engine.step(("a", 0, 6))
    _fails(engine)
    engine.step(("a", 4, 2))
    assert engine.failure("a") == TAINTED
