"""Operators that push some positions only: the others keep their bits, and cost nothing once all is pushed."""

import pytest
import torch

from operators.core import hooks as hooks_module
from operators.core.apply import Setting
from operators.core.artifact import make_artifact
from operators.core.positions import Positions
from operators.model.loading import decoder_layers, embed
from steer_server.engine.hf import decode as decode_module
from steer_server.engine.hf import steering as steering_module
from steer_server.errors import SteeringNotAppliedError
from steer_server.types import Application, Row, RowFinished, SteeringPlan, TokenEvent

_LAYER = 2
_TOKENS = 6
# What each means, for a position k of a text whose prompt has n tokens: independently of the code under test.
MEANS = {
    "all": lambda k, n: True,
    "first": lambda k, n: k == 0,
    "2..": lambda k, n: k >= 2,
    "prompt": lambda k, n: k < n,
    "generated": lambda k, n: k >= n,
    "3..8": lambda k, n: 3 <= k < 8,
    "prompt:1..3": lambda k, n: 1 <= k < min(n, 3),
    "generated:1..3": lambda k, n: n + 1 <= k < n + 3,
}


def _plan(*uses):
    """Of (artifact, strength, rule, blend, positions)."""
    return SteeringPlan(
        tuple(
            Application(f"operator-{place}", artifact, Setting(strength, rule, blend, Positions.parse(positions)), ())
            for place, (artifact, strength, rule, blend, positions) in enumerate(uses)
        )
    )


class _Inputs:
    """``with _Inputs(loaded) as inputs:`` - what leaves the layer before, and what the steered layer works on."""

    def __init__(self, loaded):
        self.before, self.after = [], []
        blocks = decoder_layers(loaded.model)
        self._handles = [
            blocks[_LAYER - 1].register_forward_hook(
                lambda module, args, output: self.before.append(output[0] if isinstance(output, tuple) else output)
            ),
            blocks[_LAYER].input_layernorm.register_forward_pre_hook(lambda module, args: self.after.append(args[0])),
        ]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self._handles:
            handle.remove()

    def rows(self):
        """(before, after), each (B, T, d) over the whole text."""
        return torch.cat(self.before, dim=1), torch.cat(self.after, dim=1)


def _push(loaded, artifact, strength, rule, blend, ids):
    """(lambda/2) d_k/|d_k| at every position, term by term in float64, straight from the definition."""
    jacobian, base, anchor = (
        each.double() for each in (artifact.jacobian(), artifact.substitute_base, artifact.anchor)
    )
    x = embed(loaded.model, torch.tensor(ids)).double()
    total, rows = torch.zeros_like(anchor), []
    for k in range(len(ids)):
        total = total + jacobian[k % len(jacobian)] @ x[k]
        a = total if rule == "cumulative" else base + jacobian[-1] @ x[k]
        d = (1 - blend) * a / a.norm() + blend * anchor / anchor.norm()
        rows.append(strength / 2 * d / d.norm())
    return torch.stack(rows)


@pytest.mark.parametrize("chunk", [2, 1024])
@pytest.mark.parametrize(("rule", "blend"), [("cumulative", 0.0), ("cumulative", 0.4), ("substitute", 0.0)])
@pytest.mark.parametrize("positions", MEANS)
def test_what_is_among_the_positions_is_pushed_by_the_equation_and_the_rest_keeps_its_bits(
    llama, artifact, decode, prompt_ids, monkeypatch, positions, rule, blend, chunk
):
    monkeypatch.setattr(decode_module, "prefill_positions", lambda _: chunk)
    with _Inputs(llama) as inputs:
        ids, ((receipt,),), _ = decode(llama, _plan((artifact, 0.7, rule, blend, positions)), max_tokens=_TOKENS)
    before, after = (each[0] for each in inputs.rows())
    fed, n = [*prompt_ids, *ids[0][:-1]], len(prompt_ids)
    pushed = [MEANS[positions](k, n) for k in range(len(fed))]
    push = _push(llama, artifact, 0.7, rule, blend, fed)
    for k, is_pushed in enumerate(pushed):
        if is_pushed:
            expected = before[k].double() + before[k].double().norm() * push[k]
            assert float((after[k] - expected).norm() / expected.norm()) < 1e-5
        else:
            assert torch.equal(after[k].view(torch.int32), before[k].view(torch.int32))
    assert receipt.positions == Positions.parse(positions)
    assert (receipt.prompt_tokens_steered, receipt.generated_tokens_steered) == (sum(pushed[:n]), sum(pushed[n:]))
    assert receipt.mean_dose == pytest.approx(0.35, abs=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_before_the_first_position_that_is_pushed_every_logit_keeps_its_bits(tiny, artifact, decode, prompt_ids, dtype):
    loaded, n = tiny("llama", dtype=dtype), len(prompt_ids)
    plain_ids, _, plain = decode(loaded, None, max_tokens=_TOKENS)
    ids, _, logits = decode(loaded, _plan((artifact, 1.5, "cumulative", 0.0, f"{n + 2}..")), max_tokens=_TOKENS)
    assert ids[0][:3] == plain_ids[0][:3]
    same = [torch.equal(one, other) for one, other in zip(logits, plain, strict=True)]
    assert same == [True] * 3 + [False] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_token_beside_a_pushed_one_keeps_every_bit_the_sign_of_a_zero_too(dtype):
    block = torch.nn.Identity()
    hidden = torch.tensor([[[-0.0, 1 / 3], [3.0, 4.0], [-0.0, float("inf")]]], dtype=dtype)
    push = hooks_module.layer_push({0: [(slice(1, 2), torch.tensor([[0.5, 0.0]]))]}, 3)
    with hooks_module.PushHooks([block], [0]) as hooks:
        hooks.load({0: push})
        after = block(hidden)
        assert hooks.take_doses()[0][0, 1] == 0.5
    assert torch.equal(after[0, 1], torch.tensor([5.5, 4.0], dtype=dtype))
    for token in (0, 2):
        assert torch.equal(after[0, token], hidden[0, token])
        assert torch.equal(after[0, token].signbit(), hidden[0, token].signbit())


def test_two_operators_at_one_layer_add_up_where_both_push(llama, artifact, other_artifact, decode, prompt_ids):
    uses = (artifact, 0.7, "cumulative", 0.0, "..8"), (other_artifact, -0.4, "substitute", 0.3, "3..10")
    with _Inputs(llama) as inputs:
        ids, ((first, second),), _ = decode(llama, _plan(*uses), max_tokens=_TOKENS)
    fed, n = [*prompt_ids, *ids[0][:-1]], len(prompt_ids)
    assert len(fed) > 10
    push = torch.zeros(len(fed), llama.hidden_size, dtype=torch.float64)
    push[:8] += _push(llama, *uses[0][:4], fed)[:8]
    push[3:10] += _push(llama, *uses[1][:4], fed)[3:10]
    before, after = (each[0].double() for each in inputs.rows())
    expected = before + before.norm(dim=-1, keepdim=True) * push
    assert float((after - expected).norm() / expected.norm()) < 1e-5
    assert torch.equal(after[10:], before[10:])
    # Each receipt is about its own positions, and the doses there are those of the sum.
    for receipt, span in ((first, slice(0, 8)), (second, slice(3, 10))):
        doses = push[span].norm(dim=-1)
        assert receipt.prompt_tokens_steered == n - span.start if span.stop > n else span.stop - span.start
        assert receipt.prompt_tokens_steered + receipt.generated_tokens_steered == len(doses)
        assert receipt.mean_dose == pytest.approx(float(doses.mean()), rel=1e-4)
        assert receipt.max_dose == pytest.approx(float(doses.max()), rel=1e-4)
        assert receipt.dose_bound == pytest.approx(0.55)


def test_each_layer_has_its_own_positions(llama, artifact, remake, decode, prompt_ids):
    higher = remake(artifact, layer=3, injection_layer=3)
    plan = _plan((artifact, 0.5, "cumulative", 0.0, "first"), (higher, 1.0, "cumulative", 0.0, "generated:1.."))
    _, (receipts, plain), _ = decode(llama, plan, None, max_tokens=_TOKENS)
    assert plain == ()
    counts = [(one.prompt_tokens_steered, one.generated_tokens_steered) for one in receipts]
    assert counts == [(1, 0), (0, _TOKENS - 2)]
    assert [one.mean_dose for one in receipts] == [pytest.approx(0.25, abs=1e-5), pytest.approx(0.5, abs=1e-5)]


def test_strengths_that_cancel_at_one_position_are_an_error_and_beside_each_other_are_none(llama, artifact, decode):
    cancelling = ("cumulative", 0.0)
    decode(llama, _plan((artifact, 0.5, *cancelling, "..3"), (artifact, -0.5, *cancelling, "3..")))
    with pytest.raises(SteeringNotAppliedError, match=r"operator-0=0\.5, operator-1=-0\.5 at layer 2: .* may cancel"):
        decode(llama, _plan((artifact, 0.5, *cancelling, "..4"), (artifact, -0.5, *cancelling, "3..")))


def test_a_dose_above_that_of_those_who_push_there_is_an_error(llama, artifact, other_artifact, decode, monkeypatch):
    # Below the sum of the strengths at the layer, which is never reached at any one position.
    steer = hooks_module.steer
    monkeypatch.setattr(hooks_module, "steer", lambda hidden, push: steer(hidden, 1.001 * push))
    plan = _plan((artifact, 0.5, "cumulative", 0.0, "first"), (other_artifact, 0.9, "cumulative", 0.0, "1.."))
    with pytest.raises(SteeringNotAppliedError, match=r"operator-0=0\.5 at layer 2: .* 0\.5005; 0\.5 was to be"):
        decode(llama, plan)


def test_a_direction_that_does_not_exist_is_an_error_where_it_is_pushed_alone(llama, artifact, decode):
    zero = torch.zeros_like
    dead = make_artifact(
        artifact.header,
        zero(artifact.factors),
        artifact.anchor,
        zero(artifact.substitute_base),
        neutral=artifact.neutral,
    )
    with pytest.raises(SteeringNotAppliedError, match="position 2 has norm 0"):
        decode(llama, _plan((dead, 0.5, "cumulative", 0.0, "2..")))


def test_strength_zero_changes_no_bit_wherever_it_would_push(llama, artifact, decode):
    plain_ids, _, plain = decode(llama, None)
    ids, ((receipt,),), logits = decode(llama, _plan((artifact, 0.0, "cumulative", 0.0, "first")))
    assert ids == plain_ids
    assert all(torch.equal(one, other) for one, other in zip(logits, plain, strict=True))
    assert (receipt.prompt_tokens_steered, receipt.max_dose, str(receipt.positions)) == (0, 0.0, "first")


@pytest.mark.parametrize(
    ("positions", "busy"), [("first", 1), ("prompt", 1), ("..11", 3), ("generated:..2", 3), ("all", 6)]
)
def test_no_embedding_direction_or_push_is_made_once_all_positions_have_passed(
    llama, artifact, prompt_ids, make_decoder, monkeypatch, positions, busy
):
    assert len(prompt_ids) == 9
    calls = []

    def count(owner, name):
        kept = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: (calls.append(name), kept(*args, **kwargs))[1])

    for owner, name in (
        (hooks_module, "steer"),
        (steering_module, "layer_push"),
        (steering_module, "advance_pushes"),
        (decode_module, "embed"),
    ):
        count(owner, name)
    per_step = []
    for event in make_decoder(llama, [Row(_plan((artifact, 0.9, "cumulative", 0.0, positions)))], max_tokens=6).run():
        if isinstance(event, TokenEvent):
            per_step.append(set(calls))
            calls.clear()
    # The steps in which something is embedded for the sake of a direction; nothing in any other.
    assert [bool(step) for step in per_step] == [place < busy for place in range(6)]


def test_a_scored_row_is_scored_by_a_plain_reference(llama, artifact, make_decoder):
    plan = _plan((artifact, 1.5, "cumulative", 0.0, "generated:1.."))
    events = list(make_decoder(llama, [Row(None, score=True), Row(plan, score=True)], max_tokens=_TOKENS).run())
    kl = [event.score.kl for event in events if isinstance(event, TokenEvent) and event.row == 1]
    # The first two tokens are chosen before the second generated one is fed.
    assert kl[:2] == [pytest.approx(0.0, abs=1e-6)] * 2
    assert min(kl[2:]) > 1e-4
    (end,) = [event for event in events if isinstance(event, RowFinished) and event.row == 1]
    assert end.receipts[0].generated_tokens_steered == _TOKENS - 2
