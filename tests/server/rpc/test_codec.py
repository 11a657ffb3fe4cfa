import math
from dataclasses import fields, replace

import pytest
from google.protobuf.duration_pb2 import Duration
from steering.v1 import comparison_pb2, text_pb2
from steering.v1 import generation_pb2 as pb
from steering.v1 import steering_pb2 as sp

from operators.core.apply import Setting
from operators.core.positions import Positions
from steer_server.errors import InvalidRequestError
from steer_server.registry import Registry
from steer_server.rpc import codec
from steer_server.types import (
    ArmEvent,
    Compared,
    Comparison,
    Completion,
    Delta,
    FinishReason,
    OperatorUse,
    Receipt,
    RequestLimits,
    Started,
    Timings,
    TokenLogprob,
    TopLogprob,
    Usage,
)

_TEXT = text_pb2.Prompt(text="hello")
_RULES = {sp.RULE_CUMULATIVE: "cumulative", sp.RULE_SUBSTITUTE: "substitute"}


def _request(**fields):
    return pb.GenerateRequest(**({"prompt": _TEXT} | fields))


def _sampling(**fields):
    return codec.generation_request(_request(sampling=text_pb2.SamplingParams(**fields))).sampling


def _completion(**changes):
    values = {
        "request_id": "r1",
        "text": "one two",
        "token_ids": (4, 5),
        "finish_reason": FinishReason.STOP_STRING,
        "stop_string": "\n",
        "usage": Usage(3, 2),
        "timings": Timings(0.25, 0.5, 1.75),
        "receipts": (
            Receipt(
                *("g", "sha256:" + "0" * 64, 2, "substitute", -0.5, 0.25),
                *(
                    Positions("generated", end=5),
                    "contrast",
                    "anchor",
                    1,
                    1,
                    2,
                    0.2,
                    0.25,
                    0.25,
                    ("rule", "blend"),
                    True,
                ),
            ),
        ),
        "logprobs": (TokenLogprob(4, "one", -0.5, (TopLogprob(4, "one", -0.5), TopLogprob(7, "uno", -1.5))),),
        "scores": (),
        "seed": 2**64 - 1,
    }
    return Completion(**(values | changes))


def test_what_is_not_set_takes_the_documented_default():
    sampling = _sampling()
    found = {field.name: getattr(sampling, field.name) for field in fields(sampling)}
    assert 0 <= found.pop("seed") < 2**53
    documented = {
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "max_tokens": 128,
        "stop_strings": (),
        "stop_token_ids": (),
        "ignore_eos": False,
        "logprobs": None,
        "time_limit": None,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "logit_bias": (),
        "min_tokens": 0,
        "skip_special_tokens": True,
    }
    # What the contract says of every field, these too, is held by tests/architecture/test_wire.py.
    assert {name: found[name] for name in documented} == documented


def test_seeds_and_request_ids_that_are_not_given_are_drawn():
    requests = [codec.generation_request(_request()) for _ in range(2)]
    assert requests[0].sampling.seed != requests[1].sampling.seed
    assert requests[0].request_id != requests[1].request_id
    assert all(request.request_id for request in requests)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0.0),
        ("temperature", 0.7),
        ("top_p", 0.25),
        ("top_k", 0),
        ("top_k", 40),
        ("min_p", 0.0),
        ("min_p", 1.0),
        ("repetition_penalty", 1.25),
        ("seed", 0),
        ("seed", 2**64 - 1),
        ("max_tokens", 1),
        ("logprobs", 0),
        ("logprobs", 20),
        ("ignore_eos", True),
        ("ignore_eos", False),
        ("presence_penalty", -2.0),
        ("frequency_penalty", 2.0),
        ("min_tokens", 128),
        ("skip_special_tokens", False),
        ("stop_strings", ("a", "\n\n")),
        ("stop_token_ids", (0, 5)),
    ],
)
def test_a_set_value_survives_zero_included(name, value):
    assert getattr(_sampling(**{name: value}), name) == value


def test_a_time_limit_comes_in_seconds():
    assert _sampling(time_limit=Duration(seconds=2, nanos=500_000_000)).time_limit == 2.5


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("temperature", value) for value in (math.nan, math.inf, -math.inf, -0.1)),
        *(("top_p", value) for value in (math.nan, math.inf, 0.0, -0.5, 1.01)),
        *(("top_k", value) for value in (-1, -(2**31))),
        *(("min_p", value) for value in (math.nan, math.inf, -0.1, 1.5)),
        *(("repetition_penalty", value) for value in (math.nan, math.inf, 0.0, -1.0)),
        *(("max_tokens", value) for value in (0, -1, -(2**31))),
        *(("presence_penalty", value) for value in (math.nan, math.inf, -2.01, 2.01)),
        *(("frequency_penalty", value) for value in (math.nan, -math.inf, -2.01, 2.01)),
        *(("min_tokens", value) for value in (-1, 129, 2**31 - 1)),
        *(("logprobs", value) for value in (-1, 21)),
        ("stop_strings", ["fine", ""]),
        ("time_limit", Duration()),
        ("time_limit", Duration(seconds=-3)),
    ],
)
def test_a_sampling_value_out_of_range_is_refused_by_its_name(name, value):
    with pytest.raises(InvalidRequestError) as caught:
        _sampling(**{name: value})
    assert caught.value.field == f"sampling.{name}"
    assert str(caught.value).startswith(f"sampling.{name}: ")


@pytest.mark.parametrize(
    ("biases", "field", "words"),
    [
        ([(1, math.nan)], "[0].bias", "is nan; accepted: a number from -100 to 100"),
        ([(1, 0.0), (2, math.inf)], "[1].bias", "is inf"),
        ([(1, -100.5)], "[0].bias", "is -100.5"),
        ([(7, 1.0), (8, 1.0), (7, 1.0)], "[2].token_id", r"is 7, as of sampling\.logit_bias\[0\]; accepted: once"),
        ([(token, 1.0) for token in range(301)], "", "is 301 biases; accepted: at most 300"),
    ],
)
def test_biases_that_are_not_accepted_are_refused_by_their_place(biases, field, words):
    with pytest.raises(InvalidRequestError, match=words) as caught:
        _sampling(logit_bias=[text_pb2.TokenBias(token_id=token, bias=bias) for token, bias in biases])
    assert caught.value.field == f"sampling.logit_bias{field}"


@pytest.mark.parametrize(
    ("sampling", "field"),
    [
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"logit_bias": [text_pb2.TokenBias(token_id=1), text_pb2.TokenBias(token_id=1)]}, "logit_bias[1].token_id"),
        ({"logit_bias": [text_pb2.TokenBias(bias=101)]}, "logit_bias[0].bias"),
    ],
)
def test_what_an_arm_asks_for_is_refused_by_its_own_place(sampling, field):
    arms = [
        comparison_pb2.Arm(name=name, sampling=text_pb2.SamplingParams(**own))
        for name, own in (("a", {}), ("b", sampling))
    ]
    with pytest.raises(InvalidRequestError) as caught:
        codec.compare_request(comparison_pb2.CompareRequest(prompt=text_pb2.Prompt(text="x"), arms=arms))
    assert caught.value.field == f"arms[1].sampling.{field}"


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        (text_pb2.Prompt(), "prompt"),
        (text_pb2.Prompt(text=""), "prompt.text"),
        (text_pb2.Prompt(token_ids=text_pb2.TokenIds()), "prompt.token_ids"),
        (text_pb2.Prompt(chat=text_pb2.Chat()), "prompt.chat.messages"),
    ],
)
def test_a_prompt_of_nothing_is_refused_by_its_name(prompt, field):
    for decode in (codec.generation_request, codec.compare_request):
        kind = pb.GenerateRequest if decode is codec.generation_request else comparison_pb2.CompareRequest
        with pytest.raises(InvalidRequestError) as caught:
            decode(kind(prompt=prompt))
        assert caught.value.field == field
    with pytest.raises(InvalidRequestError) as caught:
        codec.prompt(prompt)
    assert caught.value.field == field


def test_each_kind_of_prompt_arrives_as_it_was():
    assert codec.prompt(_TEXT).text == "hello"
    assert codec.prompt(text_pb2.Prompt(token_ids=text_pb2.TokenIds(ids=[3, 0]))).token_ids == (3, 0)
    chat = text_pb2.Chat(messages=[text_pb2.ChatMessage(role="user", content="hi")])
    (turn,) = codec.prompt(text_pb2.Prompt(chat=chat)).chat.messages
    assert (turn.role, turn.content) == ("user", "hi")


def test_a_request_id_is_kept_to_its_limit():
    assert codec.generation_request(_request(request_id="x" * 128)).request_id == "x" * 128
    for decode, message in (
        (codec.generation_request, _request(request_id="x" * 129)),
        (codec.compare_request, comparison_pb2.CompareRequest(request_id="x" * 129, prompt=_TEXT)),
    ):
        with pytest.raises(InvalidRequestError) as caught:
            decode(message)
        assert caught.value.field == "request_id"


def test_an_operator_of_which_only_the_name_is_set_leaves_the_rest_to_the_artifact():
    (use,) = codec.generation_request(_request(operators=[sp.OperatorUse(name="g")])).operators
    assert use == OperatorUse("g", None, None, None)


def test_an_operators_explicit_zeros_survive():
    (use,) = codec.generation_request(_request(operators=[sp.OperatorUse(name="g", strength=0, blend=0)])).operators
    assert use == OperatorUse("g", 0.0, None, 0.0)


@pytest.mark.parametrize(("number", "rule"), _RULES.items())
def test_every_rule_maps_there_and_back(number, rule):
    (use,) = codec.generation_request(_request(operators=[sp.OperatorUse(name="g", rule=number)])).operators
    assert use.rule == rule
    receipt = replace(_completion().receipts[0], rule=rule)
    assert codec.completion(_completion(receipts=(receipt,))).receipts[0].rule == number


def test_no_rule_of_the_contract_is_forgotten():
    assert set(sp.Rule.values()) == {sp.RULE_UNSPECIFIED, *_RULES}


def test_an_unknown_rule_is_refused_by_its_name():
    with pytest.raises(InvalidRequestError, match="RULE_CUMULATIVE, RULE_SUBSTITUTE") as caught:
        codec.generation_request(_request(operators=[sp.OperatorUse(name="a"), sp.OperatorUse(name="b", rule=7)]))
    assert caught.value.field == "operators[1].rule"
    arms = [comparison_pb2.Arm(name="x", operators=[sp.OperatorUse(name="a", rule=-3)])]
    with pytest.raises(InvalidRequestError) as caught:
        codec.compare_request(comparison_pb2.CompareRequest(prompt=_TEXT, arms=arms))
    assert caught.value.field == "arms[0].operators[0].rule"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("strength", value) for value in (math.nan, math.inf, -math.inf)),
        *(("blend", value) for value in (math.nan, math.inf, -0.01, 1.01)),
    ],
)
def test_an_operators_value_out_of_range_is_refused_by_the_registry(name, value, artifact, model_info, tmp_path):
    from operators.core.store import Store

    Store(tmp_path).save("g", artifact)
    registry = Registry(Store(tmp_path), model_info, max_bytes=1 << 20, max_dose=1.0)
    (_, use) = codec.generation_request(
        _request(operators=[sp.OperatorUse(name="g"), sp.OperatorUse(name="g", **{name: value})])
    ).operators
    with pytest.raises(InvalidRequestError, match=f"{name}: is ") as caught:
        registry.plan((OperatorUse("g"), use))
    assert caught.value.field == f"operators[1].{name}"


def test_a_negative_strength_is_accepted():
    (use,) = codec.generation_request(_request(operators=[sp.OperatorUse(name="g", strength=-0.5)])).operators
    assert Setting(use.strength, "cumulative", 0.0).strength == -0.5


def test_a_comparison_is_scored_unless_it_says_no():
    arms = [comparison_pb2.Arm(name="x", operators=[sp.OperatorUse(name="g")])]
    assert codec.compare_request(comparison_pb2.CompareRequest(prompt=_TEXT, arms=arms)).score is True
    assert codec.compare_request(comparison_pb2.CompareRequest(prompt=_TEXT, arms=arms, score=False)).score is False


def test_every_finish_reason_has_its_number_and_every_number_its_reason():
    numbers = {codec.completion(_completion(finish_reason=reason)).finish_reason for reason in FinishReason}
    assert numbers == set(text_pb2.FinishReason.values()) - {text_pb2.FINISH_REASON_UNSPECIFIED}
    for reason in FinishReason:
        number = codec.completion(_completion(finish_reason=reason)).finish_reason
        assert text_pb2.FinishReason.Name(number) == f"FINISH_REASON_{reason.value}"


def test_a_completion_crosses_whole():
    message = codec.completion(_completion())
    assert (message.request_id, message.text, list(message.token_ids)) == ("r1", "one two", [4, 5])
    assert (message.stop_string, message.seed) == ("\n", 2**64 - 1)
    assert (message.usage.prompt_tokens, message.usage.completion_tokens) == (3, 2)
    assert message.timings.queued.ToTimedelta().total_seconds() == 0.25
    assert message.timings.time_to_first_token.ToTimedelta().total_seconds() == 0.5
    assert message.timings.total.ToTimedelta().total_seconds() == 1.75
    (receipt,) = message.receipts
    assert receipt == sp.Receipt(
        operator="g",
        digest="sha256:" + "0" * 64,
        layer=2,
        rule=sp.RULE_SUBSTITUTE,
        strength=-0.5,
        blend=0.25,
        positions=sp.Positions(part=sp.Positions.PART_GENERATED, start=0, end=5),
        anchor=sp.ANCHOR_CONTRAST,
        first_token=sp.FIRST_TOKEN_ANCHOR,
        prompt_tokens_steered=1,
        generated_tokens_steered=1,
        prompt_tokens_cached=2,
        mean_dose=0.2,
        max_dose=0.25,
        dose_bound=0.25,
        defaulted=["rule", "blend"],
        calibrated=True,
    )
    (logprob,) = message.logprobs
    assert (logprob.token_id, logprob.token, logprob.logprob) == (4, "one", -0.5)
    assert [(top.token_id, top.token, top.logprob) for top in logprob.top] == [(4, "one", -0.5), (7, "uno", -1.5)]


def test_a_text_without_tokens_has_no_time_to_its_first_token():
    message = codec.completion(_completion(token_ids=(), timings=Timings(0.1, None, 0.2)))
    assert not message.timings.HasField("time_to_first_token")
    assert message.timings.HasField("total")


def test_each_event_is_of_its_own_kind():
    started, delta, finished = Started("r1", (1, 2)), Delta("a", (3,), ()), _completion()
    kinds = [codec.generate_event(event).WhichOneof("event") for event in (started, delta, finished)]
    assert kinds == ["started", "delta", "finished"]
    messages = [codec.compare_event(ArmEvent("x", event)) for event in (started, delta, finished)]
    assert [message.WhichOneof("event") for message in messages] == kinds
    assert {message.arm for message in messages} == {"x"}
    assert list(messages[0].started.prompt_token_ids) == [1, 2]


def test_a_comparison_says_what_was_not_measured_by_leaving_it_unset():
    bare = Comparison("x", None, (), None, None, None, None)
    full = Comparison("y", 0, (0.0, 2.0), 1.0, 1.9, 3.0, 4.0)
    message = codec.compare_event(Compared((bare, full)))
    assert message.arm == ""
    first, second = message.compared.comparisons
    optional = ("first_divergence", "kl_mean", "kl_p95", "normal_perplexity", "steered_perplexity")
    assert not any(first.HasField(name) for name in optional)
    assert all(second.HasField(name) for name in optional)
    assert (second.first_divergence, list(second.kl_per_token)) == (0, [0.0, 2.0])
    assert (second.kl_mean, second.kl_p95) == (1.0, 1.9)
    assert (second.normal_perplexity, second.steered_perplexity) == (3.0, 4.0)


def test_the_model_is_described_in_full(model_info):
    limits = RequestLimits(*range(1, 10))
    message = codec.model_info(
        model_info, version="1.2.3", max_queue=4, max_arms=5, max_dose=1.5, operator_admin=True, limits=limits
    )
    assert {descriptor.name for descriptor, _ in message.ListFields()} | {"has_chat_template"} == {
        field.name for field in message.DESCRIPTOR.fields
    }
    assert (message.model, message.num_layers) == (model_info.model, 4)
    assert (message.server_version, message.max_queue, message.max_arms) == ("1.2.3", 4, 5)
    assert message.max_dose == 1.5
    assert [value for _, value in message.limits.ListFields()] == list(range(1, 10))
