"""An unmodified client of OpenAI's API against the SDK: the same request gives the same ids by either door."""

from __future__ import annotations

from types import SimpleNamespace

import openai
import pytest
from steer_client import ChatMessage, OperatorUse, SamplingParams, SteerClient

TOKENS = 10
PROMPT = "the golden gate"
TURNS = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "where is the bridge?"}]


def client_of(address: str) -> openai.OpenAI:
    """A client that retries nothing and knows no proxy."""
    return openai.OpenAI(
        base_url=f"http://{address}/v1",
        api_key="unused",
        max_retries=0,
        http_client=openai.DefaultHttpxClient(trust_env=False),
    )


def check_parity(address: str, target: str, operator: str, *, chat: bool) -> None:
    """Completions, and chats where the model has a template: plain and steered, streamed and not, three of each."""
    with client_of(address) as asked, SteerClient(target, timeout=120) as sdk:
        model = sdk.model_info().model
        assert f"{model}+{operator}" in [each.id for each in asked.models.list()]
        assert asked.models.retrieve(model).id == model
        use = OperatorUse(operator, 0.4, blend=0.5)
        body = {"steering": {"operators": [{"name": operator, "strength": 0.4, "blend": 0.5}]}}
        ways = {
            "plain": (model, {}, ()),
            "in the body": (model, body, (use,)),
            "behind the model": (f"{model}+{operator}=0.4@0.5", {}, (use,)),
        }
        for name, extra, uses in ways.values():
            for is_chat in (False, True)[: 1 + chat]:
                check_texts(asked, sdk, name, extra, uses, is_chat=is_chat)


def check_texts(asked, sdk, model, extra, uses, *, is_chat) -> None:
    sampling = SamplingParams(max_tokens=TOKENS, temperature=1.0, top_p=0.9, seed=11, ignore_eos=True, logprobs=2)
    prompt = [ChatMessage(**turn) for turn in TURNS] if is_chat else PROMPT
    seeds = [11, 12, 13]
    expected = [sdk.generate(prompt, operators=uses, sampling=with_seed(sampling, seed)) for seed in seeds]
    own = {"messages": TURNS, "logprobs": True, "top_logprobs": 2} if is_chat else {"prompt": PROMPT, "logprobs": 2}
    create = asked.chat.completions.create if is_chat else asked.completions.create
    given = {
        "model": model,
        "max_tokens": TOKENS,
        "top_p": 0.9,
        "seed": 11,
        "n": 3,
        **own,
        "extra_body": {"ignore_eos": True, "return_token_ids": True, **extra},
    }
    whole = create(**given)
    found = {choice.index: whole_choice(choice, is_chat) for choice in whole.choices}
    streamed = {index: SimpleNamespace(text="", ids=[], logprobs=[], steering=None) for index in range(3)}
    for piece in create(**given, stream=True, stream_options={"include_usage": True}):
        usage = piece.usage
        for choice in piece.choices:
            add(streamed[choice.index], choice, is_chat)
    assert usage.model_dump() == whole.usage.model_dump()
    assert usage.completion_tokens == 3 * TOKENS
    for index, over_grpc in enumerate(expected):
        for text in (found[index], streamed[index]):
            assert text.text == over_grpc.text
            assert tuple(text.ids) == over_grpc.token_ids
            # Three rows of a batch and one are not added up in the same order.
            assert text.logprobs == pytest.approx([each.logprob for each in over_grpc.logprobs], abs=1e-4)
            assert text.steering["seed"] == over_grpc.seed
            assert [receipt["digest"] for receipt in text.steering["receipts"]] == [
                receipt.digest for receipt in over_grpc.receipts
            ]
            for receipt in text.steering["receipts"]:
                assert receipt["generated_tokens_steered"] == TOKENS - 1


def with_seed(sampling, seed):
    return SamplingParams(**{**{name: getattr(sampling, name) for name in sampling.__slots__}, "seed": seed})


def logprobs_of(choice, is_chat):
    if choice.logprobs is None:
        return []
    if is_chat:
        assert all(len(each.top_logprobs) == 2 for each in choice.logprobs.content)
        return [each.logprob for each in choice.logprobs.content]
    return choice.logprobs.token_logprobs


def whole_choice(choice, is_chat):
    assert choice.finish_reason == "length"
    text = choice.message.content if is_chat else choice.text
    logprobs = logprobs_of(choice, is_chat)
    return SimpleNamespace(text=text, ids=choice.token_ids, logprobs=logprobs, steering=choice.steering)


def add(text, choice, is_chat):
    text.text += (choice.delta.content or "") if is_chat else choice.text
    text.ids += getattr(choice, "token_ids", None) or []
    text.logprobs += logprobs_of(choice, is_chat)
    if choice.finish_reason is not None:
        assert choice.finish_reason == "length"
        text.steering = choice.steering
