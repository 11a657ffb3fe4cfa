"""``with steered(...)``: transformers' own ``generate`` gives what the calibration's decoder gives."""

import pytest
import torch

from operators.builder.build import build_operator
from operators.builder.concept import concept_from_text
from operators.builder.spec import BuildSpec
from operators.core.apply import Setting, prepare
from operators.core.artifact import with_header
from operators.core.errors import IncompatibleOperatorError, SteeringError
from operators.core.header import Recommended
from operators.core.positions import Positions
from operators.model.steered import steered
from operators.tune.continuations import ContinuationRequest, Injection, decode_continuations

SETTING = Setting(0.7, "cumulative", 0.25)
IDS = (35, 72, 11, 5, 99, 102)


def _operator(loaded, **spec):
    return build_operator(BuildSpec((concept_from_text("golden bridge", loaded),), layer=2, **spec), loaded)


def _generate(loaded, tokens=6, **options):
    ids = loaded.model.generate(
        torch.tensor([IDS]), max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0, **options
    )
    return tuple(ids[0, len(IDS) :].tolist())


def _reference(loaded, operator, setting, tokens=6):
    injection = Injection(prepare(operator, loaded.device), operator.header.injection_layer, setting)
    (found,) = decode_continuations([ContinuationRequest(IDS, injection)], loaded, tokens=tokens)
    return found.ids


@pytest.fixture
def endless(tiny):
    """``endless(family)``: a tiny model of its own whose texts do not end by themselves."""

    def make(family):
        loaded = tiny(family, fresh=True)
        loaded.model.generation_config.eos_token_id = None
        return loaded

    return make


def _check_against_the_reference(loaded, setting, use_cache):
    operator, ids = _operator(loaded), torch.tensor([IDS])
    plain, logits = _generate(loaded), loaded.model(ids).logits
    with steered(loaded, operator, setting):
        # Twice: the second sequence begins anew.
        found = [_generate(loaded, use_cache=use_cache) for _ in range(2)]
        assert not torch.equal(loaded.model(ids).logits, logits)
    assert found == [_reference(loaded, operator, setting)] * 2
    assert _generate(loaded) == plain


def test_every_family_writes_what_the_reference_decoder_writes(family, endless):
    _check_against_the_reference(endless(family), SETTING, use_cache=True)


@pytest.mark.parametrize(("rule", "use_cache"), [("substitute", True), ("cumulative", False), ("substitute", False)])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_every_rule_does_with_a_kv_cache_and_without(name, endless, rule, use_cache):
    _check_against_the_reference(endless(name), Setting(0.7, rule, 0.25), use_cache=use_cache)


@pytest.mark.parametrize("positions", ["first", "2..", "prompt", "generated", "generated:1..3", "4..9"])
def test_positions_are_those_of_the_reference_decoder(endless, positions):
    loaded, setting = endless("llama"), Setting(1.5, "cumulative", 0.25, Positions.parse(positions))
    operator, plain = _operator(loaded), _generate(loaded)
    with steered(loaded, operator, setting):
        found = [_generate(loaded) for _ in range(2)]
    assert found == [_reference(loaded, operator, setting)] * 2 != [plain] * 2


def test_without_a_kv_cache_positions_of_the_whole_text_are_right_and_those_of_a_part_are_refused(endless):
    loaded = endless("llama")
    operator, setting = _operator(loaded), Setting(1.5, "cumulative", 0.25, Positions.parse("2..8"))
    with steered(loaded, operator, setting):
        found = _generate(loaded, use_cache=False)
    assert found == _reference(loaded, operator, setting)
    for part in ("prompt", "generated:1.."):
        with (
            steered(loaded, operator, Setting(1.5, "cumulative", 0.25, Positions.parse(part))),
            pytest.raises(SteeringError, match=f"positions {part} in a forward pass without a KV cache"),
        ):
            _generate(loaded, use_cache=False)


def test_the_recommended_setting_is_used_where_none_is_given(endless):
    loaded = endless("llama")
    operator = with_header(_operator(loaded), recommended=Recommended(strength=-0.6, rule="substitute", blend=0.5))
    with steered(loaded, operator):
        found = _generate(loaded)
    assert found == _reference(loaded, operator, Setting(-0.6, "substitute", 0.5))
    first = with_header(operator, recommended=Recommended(strength=1.5, positions=Positions(end=1)))
    with steered(loaded, first):
        found = _generate(loaded)
    assert found == _reference(loaded, first, Setting(1.5, "cumulative", 0.0, Positions(end=1)))


def test_a_strength_of_zero_leaves_every_bit_alone(endless):
    loaded = endless("llama")
    plain = loaded.model(torch.tensor([IDS])).logits
    with steered(loaded, _operator(loaded), Setting(0.0, "cumulative", 0.0)):
        assert torch.equal(loaded.model(torch.tensor([IDS])).logits, plain)


def test_the_model_is_plain_again_after_an_error(endless):
    loaded = endless("llama")
    plain = _generate(loaded)
    with pytest.raises(ZeroDivisionError), steered(loaded, _operator(loaded), SETTING):
        raise ZeroDivisionError
    assert _generate(loaded) == plain
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in loaded.model.modules())


def test_what_cannot_be_steered_is_refused(endless):
    loaded = endless("llama")
    two = torch.tensor([IDS, IDS])
    with steered(loaded, _operator(loaded), SETTING):
        with pytest.raises(SteeringError, match="a forward pass over 2 rows; token ids of one sequence are accepted"):
            loaded.model(two)
        with pytest.raises(SteeringError, match="a forward pass over embeddings"):
            loaded.model(inputs_embeds=loaded.model.get_input_embeddings()(two[:1]))
        cache = loaded.model(two[:1], use_cache=True).past_key_values
        cache.crop(3)
        with pytest.raises(SteeringError, match="a forward pass after 3 tokens; the last one ended after 6"):
            loaded.model(two[:1, 3:], past_key_values=cache)
        assert torch.isfinite(loaded.model(two[:1]).logits).all()


def test_a_cache_that_the_last_pass_did_not_fill_is_refused(endless):
    loaded = endless("llama")
    ids, last = torch.tensor([IDS]), torch.tensor([[7]])
    plain = loaded.model(ids, use_cache=True).past_key_values
    with steered(loaded, _operator(loaded), SETTING):
        first = loaded.model(ids, use_cache=True).past_key_values
        second = loaded.model(ids.flip(1), use_cache=True).past_key_values
        # All three have as many tokens as the last pass ended with.
        for cache in (first, plain):
            with pytest.raises(SteeringError, match="a KV cache that the last pass did not fill"):
                loaded.model(last, past_key_values=cache)
        assert torch.isfinite(loaded.model(last, past_key_values=second).logits).all()


def test_an_operator_of_another_model_is_refused(tiny):
    operator = _operator(tiny("llama"))
    with (
        pytest.raises(IncompatibleOperatorError, match="model fingerprint of 'tiny-qwen2' is"),
        steered(tiny("qwen2"), operator, SETTING),
    ):
        pass
