import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from operators.core.apply import Direction, PreparedOperator, Setting, check_setting, prepare, steer
from operators.core.errors import SettingError, SteeringError

CPU = torch.device("cpu")
RULES = ["cumulative", "substitute"]


def _naive(artifact, x, rule, blend, anchor="concept", first_token="operator"):
    """The unit directions d_k/|d_k|, from the equations at the top of ``operators.core.apply``, in float64."""
    blocks, y = artifact.jacobian().double(), artifact.anchor.double()
    z = y if anchor == "concept" else y - artifact.neutral.double()
    n = artifact.positions
    directions = []
    for k in range(len(x)):
        if rule == "cumulative":
            a = torch.zeros_like(y) if artifact.offset is None else artifact.offset.double()
            for j in range(k + 1):
                a = a + blocks[j % n] @ x[j].double()
        else:
            a = artifact.substitute_base.double() + blocks[n - 1] @ x[k].double()
        beta = 1.0 if k == 0 and first_token == "anchor" else blend
        d = (1 - beta) * a / a.norm() + beta * z / z.norm()
        directions.append(d / d.norm())
    return torch.stack(directions)


def _embeddings(length, d=5, seed=9):
    return torch.randn(length, d, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("blend", [0.0, 0.3, 1.0])
def test_directions_of_a_slice_are_those_of_the_whole_and_the_running_sum_is_over_all_tokens(
    make_operator, rule, blend
):
    operator, setting, x = prepare(make_operator(3, affine=True), CPU), Setting(0.5, rule, blend), _embeddings(9)
    whole = Direction(operator, setting).advance(x)
    direction = Direction(operator, setting)
    for start, end, at in ((0, 4, slice(1, 3)), (4, 5, slice(0, 0)), (5, 9, slice(2, 4))):
        torch.testing.assert_close(direction.advance(x[start:end], at), whole[start:end][at], rtol=0, atol=1e-6)


def test_a_direction_that_is_not_asked_for_may_be_zero(make_operator):
    x = _embeddings(4)
    x[0] = 0
    direction = Direction(prepare(make_operator(3), CPU), Setting(0.5, "cumulative", 0.0))
    assert direction.advance(x, slice(1, 4)).shape == (3, 5)
    with pytest.raises(SteeringError, match="position 0 has norm 0"):
        Direction(prepare(make_operator(3), CPU), Setting(0.5, "cumulative", 0.0)).advance(x, slice(0, 1))


def _directions(artifact, setting, x):
    return Direction(prepare(artifact, CPU), setting).advance(x)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("blend", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("n", [1, 3, 20])
def test_directions_are_those_of_the_equation(make_operator, n, rule, blend, affine):
    artifact = make_operator(n, affine=affine)
    x = _embeddings(11)
    found = _directions(artifact, Setting(0.5, rule, blend), x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), _naive(artifact, x, rule, blend), rtol=0, atol=2e-6)


ANCHORS = [(anchor, first) for anchor in ("contrast", "concept") for first in ("operator", "anchor")]


@pytest.mark.parametrize(("anchor", "first_token"), ANCHORS)
@pytest.mark.parametrize("blend", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("rule", RULES)
def test_the_anchor_of_a_setting_is_the_one_it_names_and_stands_alone_at_the_first_token(
    make_operator, rule, blend, anchor, first_token
):
    artifact, x = make_operator(3, affine=True, neutral=True), _embeddings(11)
    setting = Setting(0.5, rule, blend, anchor=anchor, first_token=first_token)
    expected = _naive(artifact, x, rule, blend, anchor, first_token)
    torch.testing.assert_close(_directions(artifact, setting, x).double(), expected, rtol=0, atol=2e-6)
    for cuts in ([1] * 11, [4, 7], [1, 10]):
        direction = Direction(prepare(artifact, CPU), setting)
        chunked = torch.cat([direction.advance(part) for part in x.split(cuts)])
        torch.testing.assert_close(chunked.double(), expected, rtol=0, atol=2e-6)
    late = Direction(prepare(artifact, CPU), setting).advance(x, slice(2, 5))
    torch.testing.assert_close(late.double(), expected[2:5], rtol=0, atol=2e-6)


def test_where_the_anchor_is_put_the_operator_need_not_have_a_direction(make_operator):
    x = _embeddings(4)
    x[0] = 0
    setting = Setting(0.5, "cumulative", 0.0, anchor="contrast", first_token="anchor")
    found = Direction(prepare(make_operator(3, neutral=True), CPU), setting).advance(x)
    assert torch.isfinite(found).all()


def test_the_contrast_anchor_of_an_operator_without_one_is_an_error_that_says_how_to_have_it(
    make_operator, make_rank_0
):
    setting = Setting(0.5, "cumulative", 1.0, anchor="contrast")
    with pytest.raises(SettingError, match="only 'concept' is accepted"):
        Direction(prepare(make_operator(3), CPU), setting)
    for artifact, says in ((make_operator(3), "build it again with --replace"), (make_rank_0(), "is a vector")):
        with pytest.raises(SettingError, match=says):
            check_setting(setting, artifact.header, "operator 'a'")
    check_setting(setting, make_operator(3, neutral=True).header, "operator 'a'")


@pytest.mark.parametrize("field", [{"anchor": "mean"}, {"first_token": "both"}])
def test_an_anchor_that_does_not_exist_is_refused(field):
    with pytest.raises(SettingError, match="are accepted"):
        Setting(0.5, "cumulative", 0.0, **field)


@settings(max_examples=60)
@given(
    cuts=st.lists(st.integers(0, 12), max_size=6),
    rule=st.sampled_from(RULES),
    blend=st.sampled_from([0.0, 0.25, 1.0]),
    n=st.integers(1, 6),
)
def test_any_chunking_gives_the_directions_of_all_tokens_at_once(make_operator, cuts, rule, blend, n):
    artifact, x = make_operator(n, affine=True), _embeddings(12)
    setting = Setting(0.5, rule, blend)
    direction = Direction(prepare(artifact, CPU), setting)
    bounds = [0, *sorted(cuts), 12]
    chunks = [direction.advance(x[a:b]) for a, b in itertools.pairwise(bounds)]
    torch.testing.assert_close(torch.cat(chunks), _directions(artifact, setting, x), rtol=0, atol=2e-6)


@pytest.mark.parametrize("rule", RULES)
def test_token_by_token_gives_the_directions_of_all_tokens_at_once(make_operator, rule):
    artifact, x = make_operator(4), _embeddings(15)
    setting = Setting(0.5, rule, 0.25)
    direction = Direction(prepare(artifact, CPU), setting)
    one_by_one = torch.cat([direction.advance(token[None]) for token in x])
    torch.testing.assert_close(one_by_one, _directions(artifact, setting, x), rtol=0, atol=2e-6)


def test_at_its_own_concept_the_cumulative_operator_ends_at_its_anchor(make_operator):
    artifact = make_operator(3, affine=True)
    # The embeddings that `make` built the anchor from are drawn after the Jacobian, from the same seed.
    generator = torch.Generator().manual_seed(0)
    torch.randn(3, 5, 5, generator=generator)
    x = torch.randn(3, 5, generator=generator)
    anchor = artifact.anchor / artifact.anchor.norm()
    for rule in RULES:
        last = _directions(artifact, Setting(0.5, rule, 0.0), x)[-1]
        torch.testing.assert_close(last, anchor, rtol=0, atol=1e-6)


def test_two_sequences_share_an_operator_and_no_state(make_operator):
    operator = prepare(make_operator(3), CPU)
    first, second = (Direction(operator, Setting(0.5, "cumulative", 0.0)) for _ in range(2))
    x = _embeddings(4)
    alone = first.advance(x)
    first.advance(x)
    assert torch.equal(second.advance(x), alone)


def test_half_precision_embeddings_are_summed_in_float32(make_operator):
    x = _embeddings(9).to(torch.bfloat16)
    found = _directions(make_operator(3), Setting(0.5, "cumulative", 0.0), x)
    torch.testing.assert_close(found.double(), _naive(make_operator(3), x.float(), "cumulative", 0), rtol=0, atol=2e-6)


def test_no_tokens_give_no_directions(make_operator):
    direction = Direction(prepare(make_operator(3), CPU), Setting(0.5, "cumulative", 0.0))
    assert direction.advance(torch.empty(0, 5)).shape == (0, 5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_strength_that_is_no_number_is_refused(value):
    with pytest.raises(SteeringError, match=rf"strength is {value}"):
        Setting(value, "cumulative", 0.0)


@pytest.mark.parametrize("value", [-0.01, 1.01, math.nan, math.inf])
def test_a_blend_outside_of_0_to_1_is_refused(value):
    with pytest.raises(SteeringError, match=rf"blend is {value}; a number from 0 .* to 1"):
        Setting(0.5, "cumulative", value)


def test_an_unknown_rule_is_refused_with_the_known_ones():
    with pytest.raises(SteeringError, match=r"rule is 'average'; 'cumulative' and 'substitute'"):
        Setting(0.5, "average", 0.0)


@pytest.mark.parametrize("strength", [-3.0, 0.0, 7])
def test_any_finite_strength_is_accepted(strength):
    assert Setting(strength, "substitute", 1.0).strength == strength


def test_a_zero_direction_is_refused_with_its_position():
    blocks = torch.stack([torch.eye(5), torch.eye(5), -torch.eye(5)])
    operator = PreparedOperator(blocks, None, None, torch.zeros(5), torch.ones(5))
    direction = Direction(operator, Setting(0.5, "cumulative", 0.0))
    direction.advance(torch.ones(1, 5))
    # a_2 = 1 + 1 - 2.
    with pytest.raises(SteeringError, match=r"position 2 has norm 0\.0"):
        direction.advance(torch.tensor([[1.0], [2.0]]).expand(2, 5))


def test_a_direction_that_is_not_finite_is_refused_with_its_position(make_operator):
    direction = Direction(prepare(make_operator(3), CPU), Setting(0.5, "substitute", 0.0))
    x = _embeddings(4)
    x[3, 0] = math.nan
    with pytest.raises(SteeringError, match="position 3 has norm nan"):
        direction.advance(x)


def test_an_operator_that_cancels_its_anchor_is_refused():
    operator = PreparedOperator(-torch.eye(5)[None], None, None, torch.zeros(5), torch.eye(5)[0])
    direction = Direction(operator, Setting(0.5, "cumulative", 0.5))
    with pytest.raises(SteeringError, match=r"position 0 has norm 0\.0"):
        direction.advance(torch.eye(5)[:1])


def test_an_anchor_without_a_direction_is_refused(make_operator):
    artifact = make_operator(1)
    artifact.anchor.zero_()
    with pytest.raises(SteeringError, match=r"norm 0\.0"):
        prepare(artifact, CPU)


@pytest.mark.parametrize("strength", [0.8, -0.8])
def test_steering_adds_half_the_strength_times_the_norm_along_the_direction(strength):
    hidden, push = _embeddings(4), torch.nn.functional.normalize(_embeddings(4, seed=2), dim=-1)
    after = steer(hidden, strength / 2 * push)
    wide = hidden.double()
    expected = wide + strength / 2 * wide.norm(dim=-1, keepdim=True) * push.double()
    torch.testing.assert_close(after.double(), expected, rtol=1e-6, atol=1e-6)


def test_the_negative_strength_pushes_the_other_way():
    hidden, push = _embeddings(4), _embeddings(4, seed=2)
    toward, away = steer(hidden, push), steer(hidden, -push)
    torch.testing.assert_close((toward + away) / 2, hidden, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(toward, away)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_push_of_0_leaves_the_values(dtype):
    hidden = _embeddings(6).to(dtype)
    after = steer(hidden, torch.zeros(6, 5))
    assert torch.equal(after, hidden)
    assert after.dtype == dtype


def test_a_hidden_state_of_zero_stays_zero_and_one_of_nan_is_not_hidden():
    hidden = torch.stack([torch.zeros(4), torch.full((4,), math.nan)])
    after = steer(hidden, torch.ones(2, 4))
    assert not after[0].any()
    assert after[1].isnan().all()


def test_steering_takes_any_leading_shape():
    hidden, push = _embeddings(12).view(2, 6, 5), 0.1 * torch.ones(2, 6, 5)
    after = steer(hidden, push)
    assert after.shape == (2, 6, 5)
    assert torch.equal(after[1, 3], steer(hidden[1, 3], push[1, 3]))
