"""Vectors in the server: what a request may ask of them, their receipts, and how they are described."""

import pytest
import torch
from steer_client import _decode as decode
from steering.v1 import operators_pb2 as ops

from operators.core.hooks import LayerPush, PushHooks
from operators.core.store import Store
from operators.model.loading import decoder_layers
from steer_server.errors import InvalidRequestError
from steer_server.registry import OperatorEntry, Registry
from steer_server.rpc.operator_codec import operator
from steer_server.types import OperatorUse


@pytest.fixture
def vector(make_rank_0, llama):
    return make_rank_0(loaded=llama)


@pytest.fixture
def registry(tmp_path, vector, artifact, model_info):
    Store(tmp_path).save("happy", vector)
    Store(tmp_path).save("golden", artifact)
    return Registry(Store(tmp_path), model_info, max_bytes=1 << 20, max_dose=1.0)


def test_a_vector_is_usable_and_its_setting_is_the_recommended_one(registry):
    assert registry.entry("happy").problem == ""
    (use,) = registry.plan((OperatorUse("happy"),)).applications
    assert (use.setting.strength, use.setting.blend) == (0.5, 1.0)


@pytest.mark.parametrize("blend", [0.0, 0.5])
def test_another_blend_is_refused_and_the_field_named(registry, blend):
    with pytest.raises(InvalidRequestError, match="operator 'happy' is a vector") as caught:
        registry.plan((OperatorUse("golden"), OperatorUse("happy", blend=blend)))
    assert caught.value.field == "operators[1].blend"


def test_a_vector_of_another_model_is_unusable(tmp_path, make_rank_0, model_info):
    Store(tmp_path).save("other", make_rank_0(40))
    made = Registry(Store(tmp_path), model_info, max_bytes=1 << 20, max_dose=1.0)
    assert "model some-model" in made.entry("other").problem


@pytest.mark.parametrize("rule", ["cumulative", "substitute"])
def test_every_token_is_pushed_and_the_receipt_says_so(llama, vector, registry, decode, prompt_ids, rule):
    plan = registry.plan((OperatorUse("happy", -0.8, rule),))
    ids, ((receipt,), _), _ = decode(llama, plan, None)
    assert (receipt.operator, receipt.digest, receipt.layer, receipt.blend) == ("happy", vector.digest, 2, 1.0)
    assert (receipt.prompt_tokens_steered, receipt.generated_tokens_steered) == (len(prompt_ids), 5)
    assert receipt.mean_dose == pytest.approx(0.4, abs=1e-5)
    assert receipt.dose_bound == 0.4
    # The same texts without anything of the server: every state of layer 2 moved by 0.4 of its norm along -v.
    push = (-0.4 * vector.anchor / vector.anchor.norm()).expand(1, 1, -1)
    text = list(prompt_ids)
    with PushHooks(decoder_layers(llama.model), [2]) as hooks:
        for _ in range(6):
            hooks.load({2: LayerPush(torch.tensor([0]), push.expand(1, len(text), -1))})
            text.append(int(llama.model(input_ids=torch.tensor([text])).logits[0, -1].argmax()))
            hooks.take_doses()
    assert ids[0] == text[len(prompt_ids) :]
    assert ids[0] != ids[1]


def test_a_client_is_told_that_it_is_a_vector(vector):
    message = operator(OperatorEntry("happy", "", 99, vector))
    info = decode.operator_info(ops.Operator.FromString(message.SerializeToString()))
    assert (info.rank, info.positions, info.num_texts, info.concept_token_ids) == (0, 0, 0, ())
    assert (info.vector, info.exact, info.usable) == (True, False, True)
    assert (info.concept, info.recommended_blend, info.reconstruction_error) == ("happy, not sad", 1.0, 0.0)


def test_an_unusable_operator_is_no_vector():
    message = operator(OperatorEntry("broken", "it is damaged", 9, None))
    assert not decode.operator_info(message).vector
