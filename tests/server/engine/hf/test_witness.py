"""A push that is not the plan's: whatever is changed in what pushes, the text fails."""

from dataclasses import replace

import pytest
import torch

from operators.core import hooks, pushes
from operators.core.apply import Setting
from operators.core.positions import Positions
from steer_server.engine.hf import decode as decode_module
from steer_server.engine.hf import steering
from steer_server.engine.hf.operator_cache import PreparedOperatorCache
from steer_server.errors import SteeringNotAppliedError
from steer_server.types import Application, Row, RowFinished, SteeringPlan

STEER, LAYER_PUSH = hooks.steer, hooks.layer_push
ADVANCE, ADVANCE_PUSHES = pushes.advance_directions, pushes.advance_pushes


def _steered_by(change):
    """A ``steer`` that applies changed pushes."""

    def steer(hidden, push):
        return STEER(hidden, change(push))

    return lambda patch: patch.setattr(hooks, "steer", steer)


def _random(push):
    noise = torch.randn(push.shape, generator=torch.Generator().manual_seed(1))
    return noise / noise.norm(dim=-1, keepdim=True) * push.norm(dim=-1, keepdim=True)


def _twice(patch):
    def steer(hidden, push):
        return STEER(STEER(hidden, push), push)

    patch.setattr(hooks, "steer", steer)


def _first_row_only(push):
    return torch.cat((push[:1], torch.zeros_like(push[1:])))


def _at_another_layer(patch):
    patch.setattr(decode_module, "decoder_layers", lambda model: [*model.model.layers[1:], model.model.layers[0]])


def _shifted(patch):
    def advance(sequences, x):
        at, push = ADVANCE_PUSHES(sequences, x)
        return at, push.roll(1, 1)

    patch.setattr(steering, "advance_pushes", advance)


def _each_others(patch):
    """Of rows that are worked out together, each has that of another."""

    def advance(directions, x, at):
        return ADVANCE(directions, x, at).roll(1, 0)

    patch.setattr(pushes, "advance_directions", advance)


def _stale(patch):
    """The direction of the prompt's last token at every later one."""

    def advance(directions, x, at):
        found = ADVANCE(directions, x, at)
        directions[0].last = found[:, -1:] if x.shape[1] > 1 else directions[0].last
        return found if x.shape[1] > 1 else directions[0].last

    patch.setattr(pushes, "advance_directions", advance)


def _without_running_sum(patch):
    def advance(directions, x, at):
        for direction in directions:
            direction.sum = torch.zeros_like(direction.sum)
        return ADVANCE(directions, x, at)

    patch.setattr(pushes, "advance_directions", advance)


def _another_operator(patch):
    get = PreparedOperatorCache.get

    def first_of_all(self, application):
        get(self, application)
        return next(iter(self._operators.values()))

    patch.setattr(PreparedOperatorCache, "get", first_of_all)


def _rows_of_the_batch_swapped(patch):
    def layer_push(pieces, tokens):
        made = LAYER_PUSH(pieces, tokens)
        return replace(made, rows=made.rows.flip(0))

    patch.setattr(steering, "layer_push", layer_push)


MUTATIONS = {
    "one hundredth": _steered_by(lambda push: 0.01 * push),
    "a random direction": _steered_by(_random),
    "the opposite sign": _steered_by(torch.neg),
    "rows swapped": _steered_by(lambda push: push.flip(0)),
    "tokens swapped": _steered_by(lambda push: push.flip(1)),
    "rows of the batch swapped": _rows_of_the_batch_swapped,
    "numbers swapped": _steered_by(lambda push: push.roll(1, -1)),
    "the first row only": _steered_by(_first_row_only),
    "twice": _twice,
    "at another layer": _at_another_layer,
    "at shifted positions": _shifted,
    "a stale direction": _stale,
    "a lost running sum": _without_running_sum,
    "another operator": _another_operator,
}


@pytest.fixture
def arms(artifact, other_artifact, plan_of):
    """Two arms of one strength, each of its own operator."""
    return plan_of((artifact, 0.4)), plan_of((other_artifact, 0.4))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_push_that_is_not_the_plans_fails_the_text(tiny, arms, decode, monkeypatch, mutation, dtype):
    loaded = tiny("llama", dtype=dtype)
    decode(loaded, None, *arms)
    MUTATIONS[mutation](monkeypatch)
    with pytest.raises(SteeringNotAppliedError):
        decode(loaded, None, *arms)


def _plan(artifact, rule, blend, positions="all", **how):
    setting = Setting(0.4, rule, blend, Positions.parse(positions), **how)
    return SteeringPlan((Application("operator", artifact, setting, ()),))


@pytest.mark.parametrize("positions", ["all", "first", "generated", "2..", "prompt:1..3"])
@pytest.mark.parametrize("how", [{}, {"anchor": "contrast", "first_token": "anchor"}], ids=str)
@pytest.mark.parametrize(("rule", "blend"), [("cumulative", 0.0), ("substitute", 0.0), ("cumulative", 0.5)])
def test_every_form_of_a_direction_is_proven_and_its_opposite_is_not(
    llama, artifact, low_artifact, decode, monkeypatch, rule, blend, positions, how
):
    for operator in (artifact, low_artifact):
        plan = _plan(operator, rule, blend, positions, **how)
        _, ((receipt,),), _ = decode(llama, plan, max_tokens=12)
        assert 1 <= receipt.positions_checked <= receipt.prompt_tokens_steered + receipt.generated_tokens_steered
        assert receipt.worst_cosine > 0.99999
    _steered = MUTATIONS["the opposite sign"]
    _steered(monkeypatch)
    with pytest.raises(SteeringNotAppliedError, match=r"layer 2, position \d+: what was added has cosine -1 with"):
        decode(llama, plan)


@pytest.mark.parametrize("strength", [2.0**-7, -0.01, 0.05, 0.4, 1.9])
def test_rounding_is_told_from_a_wrong_direction_at_every_strength(
    tiny, artifact, plan_of, decode, monkeypatch, strength
):
    coarse = tiny("llama", dtype="bfloat16")
    _, ((receipt,),), _ = decode(coarse, plan_of((artifact, strength)), max_tokens=12)
    assert receipt.worst_cosine > 0.9999
    MUTATIONS["a random direction"](monkeypatch)
    with pytest.raises(SteeringNotAppliedError):
        decode(coarse, plan_of((artifact, strength)))


def test_the_lengths_of_several_operators_together_are_proven(
    llama, artifact, other_artifact, plan_of, decode, monkeypatch
):
    plan = plan_of((artifact, 0.5), (other_artifact, -0.3))
    _, (receipts,), _ = decode(llama, plan)
    assert {receipt.worst_cosine > 0.99999 for receipt in receipts} == {True}
    # Each a little weaker: still within what both could give together.
    monkeypatch.setattr(steering, "layer_push", lambda pieces, tokens: weaker(LAYER_PUSH(pieces, tokens)))
    with pytest.raises(SteeringNotAppliedError, match=r"is 0\.9 times what the strengths give"):
        decode(llama, plan)


def weaker(made):
    return replace(made, push=0.9 * made.push)


def test_a_family_embeds_as_its_first_block_receives_it(tiny, family, make_operator, decode):
    loaded = tiny(family, dtype="float32")
    operator = make_operator(3, loaded.hidden_size, injection_layer=1, layer=1)
    _, ((receipt,),), _ = decode(loaded, _plan(operator, "cumulative", 0.2))
    assert receipt.worst_cosine > 0.99999


def test_nothing_is_looked_at_once_the_positions_are_over(llama, artifact, make_decoder, monkeypatch):
    seen = []
    watch = decode_module.Witness.watch
    monkeypatch.setattr(decode_module.Witness, "watch", lambda self, places: (seen.append(places), watch(self, places)))
    decoder = make_decoder(llama, [Row(_plan(artifact, "cumulative", 0.0, "first"))])
    ends = [event for event in decoder.run() if isinstance(event, RowFinished)]
    assert [bool(places) for places in seen] == [True] + [False] * 5
    assert ends[0].receipts[0].positions_checked == 1


def test_every_position_is_proven_where_that_is_asked_for(llama, artifact, plan_of, make_decoder):
    decoder = make_decoder(llama, [Row(plan_of((artifact, 0.5)))], max_tokens=20)
    decoder.prove_every_position = True
    (end,) = (event for event in decoder.run() if isinstance(event, RowFinished))
    (receipt,) = end.receipts
    assert receipt.positions_checked == receipt.prompt_tokens_steered + receipt.generated_tokens_steered


def test_rows_that_are_worked_out_together_each_have_their_own_direction(llama, artifact, plan_of, decode, monkeypatch):
    plans = [plan_of((artifact, strength)) for strength in (0.4, -1.5)]
    (one, other), _, _ = decode(llama, *plans)
    assert one[0] != other[0]
    _each_others(monkeypatch)
    with pytest.raises(SteeringNotAppliedError, match="what was added has cosine"):
        decode(llama, *plans)
