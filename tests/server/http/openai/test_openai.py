"""OpenAI's API: what is asked becomes a request of the contract, and what is answered has OpenAI's shape."""

import asyncio

import pytest
from steer_client import OperatorUse as ClientUse
from steering.convert import reader
from steering.v1 import steering_pb2 as sp

from steer_server.errors import InvalidRequestError, SteeringNotAppliedError
from steer_server.http.openai.steering import operators_of, read_operator
from steer_server.types import FinishReason, OperatorUse, SamplingParams, TokenBias

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
TURNS = [{"role": "user", "content": "x"}]


@pytest.fixture
def ask(door):
    """``await ask(path, **parameters)``, of the model that is served."""

    async def post(path, **parameters):
        own = {"messages": TURNS} if path == CHAT else {"prompt": "x"}
        return await door.post(path, {"model": door.engine.model.model, **own, **parameters})

    return post


def sampling_of(door):
    return door.engine.jobs[-1].rows[0].sampling


async def test_defaults_are_those_of_openai(door, ask):
    assert (await ask(COMPLETIONS)).status == 200
    seed = sampling_of(door).seed
    assert sampling_of(door) == SamplingParams(temperature=1.0, max_tokens=16, seed=seed, fit_max_tokens=True)
    assert (await ask(CHAT)).status == 200
    context = door.engine.model.context_length
    other = sampling_of(door).seed
    assert sampling_of(door) == SamplingParams(temperature=1.0, max_tokens=context, seed=other, fit_max_tokens=True)
    assert seed < 2**53
    assert seed != other


async def test_defaults_keep_within_the_caps_of_the_server(start):
    door = await start(max_tokens=12, max_total_tokens=60)
    model = door.engine.model.model
    for path, given, most in (
        (COMPLETIONS, {"prompt": "x"}, 12),
        (COMPLETIONS, {"prompt": ["x"] * 5, "n": 3}, 4),
        (CHAT, {"messages": TURNS, "n": 10}, 6),
    ):
        assert (await door.post(path, {"model": model, **given})).status == 200
        assert sampling_of(door).max_tokens == most


async def test_what_is_given_reaches_the_engine(door, ask):
    given = {
        "temperature": 0.5,
        "top_p": 0.75,
        "seed": 2**64 - 1,
        "stop": ["a", "b"],
        "top_k": 5,
        "min_p": 0.25,
        "repetition_penalty": 1.5,
        "ignore_eos": True,
        "stop_token_ids": [3, 4],
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "logit_bias": {"3": 5, "4": -100.0},
        "min_tokens": 2,
        "skip_special_tokens": False,
    }
    assert (await ask(COMPLETIONS, **given, max_tokens=7, logprobs=2, user="me")).status == 200
    expected = {
        "temperature": 0.5,
        "top_p": 0.75,
        "seed": 2**64 - 1,
        "stop_strings": ("a", "b"),
        "top_k": 5,
        "min_p": 0.25,
        "repetition_penalty": 1.5,
        "ignore_eos": True,
        "stop_token_ids": (3, 4),
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "logit_bias": (TokenBias(3, 5.0), TokenBias(4, -100.0)),
        "min_tokens": 2,
        "skip_special_tokens": False,
    }
    assert sampling_of(door) == SamplingParams(**expected, max_tokens=7, logprobs=2)
    for most in ({"max_tokens": 7}, {"max_completion_tokens": 7}):
        assert (await ask(CHAT, **given, **most, logprobs=True, top_logprobs=2)).status == 200
        assert sampling_of(door) == SamplingParams(**expected, max_tokens=7, logprobs=2)
    assert (await ask(CHAT, top_k=-1, stop=None, n=None, logprobs=False, echo=False, best_of=1, tools=[])).status == 200
    assert (sampling_of(door).top_k, sampling_of(door).logprobs) == (0, None)


async def test_prompts_are_texts_ids_and_turns_with_parts(door, ask):
    for given, expected in (("a b", "a b"), (["a b"], "a b"), ([5, 6], (5, 6)), ([[5, 6]], (5, 6))):
        assert (await ask(COMPLETIONS, prompt=given)).status == 200
        assert (door.engine.prompt.text or door.engine.prompt.token_ids) == expected
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": parts}]
    assert (await ask(CHAT, messages=turns)).status == 200
    assert [(turn.role, turn.content) for turn in door.engine.prompt.chat.messages] == [
        ("system", "be brief"),
        ("user", "one\ntwo"),
    ]


async def test_a_turn_that_was_answered_can_be_sent_back_with_all_that_is_null_in_it(door, ask):
    message = (await ask(CHAT)).json()["choices"][0]["message"]
    given = [*TURNS, message | {"name": None, "tool_calls": None, "audio": None}, *TURNS]
    assert (await ask(CHAT, messages=given)).status == 200
    assert [turn.role for turn in door.engine.prompt.chat.messages] == ["user", "assistant", "user"]
    options = {"include_usage": True, "include_obfuscation": None}
    assert (await ask(CHAT, stream=True, stream_options=options)).status == 200


async def test_a_chat_may_go_on_with_its_last_turn_and_tell_its_template(door, ask):
    turns = [*TURNS, {"role": "assistant", "content": "So"}]
    given = {"continue_final_message": True, "add_generation_prompt": False}
    options = {"enable_thinking": False, "tone": "dry", "depth": 3}
    assert (await ask(CHAT, messages=turns, **given, chat_template_kwargs=options)).status == 200
    chat = door.engine.prompt.chat
    assert chat.continue_final_message
    assert {option.name: option.value for option in chat.template_options} == options
    assert (await ask(CHAT, add_generation_prompt=True)).status == 200
    assert not door.engine.prompt.chat.continue_final_message


async def test_what_an_engine_says_of_a_chat_is_said_of_its_messages(door, ask, monkeypatch):
    async def refuse(prompt):
        raise InvalidRequestError("prompt.chat", "the model has no chat template; send text")

    monkeypatch.setattr(door.engine, "encode", refuse)
    for options in ({}, {"stream": True}):
        answer = await ask(CHAT, **options)
        assert (answer.status, answer.error["param"]) == (400, "messages")
        assert answer.error["message"].startswith("messages: the model has no chat template")


async def test_a_completion_has_the_shape_of_openais(door, ask):
    answer = (await ask(COMPLETIONS, logprobs=2, max_tokens=2, return_token_ids=True, seed=9)).json()
    assert (answer["object"], answer["model"]) == ("text_completion", door.engine.model.model)
    assert answer["id"].startswith("cmpl-")
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    [choice] = answer["choices"]
    assert (choice["index"], choice["text"], choice["finish_reason"], choice["stop_reason"]) == (
        0,
        "a secret",
        "length",
        None,
    )
    assert (choice["token_ids"], choice["prompt_token_ids"]) == ([0, 1], [1, 2, 3])
    assert choice["steering"] == {"receipts": [], "finish_reason": "MAX_TOKENS", "seed": 9}
    assert choice["logprobs"] == {
        "tokens": ["a", " secret"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"a": -0.5, "t0": -1.0, "t1": -2.0}, {" secret": -0.5, "t0": -1.0, "t1": -2.0}],
        "text_offset": [0, 1],
    }


async def test_a_chat_has_the_shape_of_openais(door, ask):
    door.engine.reason = FinishReason.EOS
    answer = (await ask(CHAT, logprobs=True, top_logprobs=1)).json()
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    [choice] = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "a secret \u2603", "refusal": None}
    assert choice["finish_reason"] == "stop"
    top = [{"token": "t0", "logprob": -1.0, "bytes": [116, 48]}]
    first, _, last = choice["logprobs"]["content"]
    assert first == {"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": top}
    assert last["bytes"] == list(" \u2603".encode())


@pytest.mark.parametrize(
    ("reason", "expected", "stop"),
    [("EOS", "stop", None), ("STOP_STRING", "stop", None), ("STOP_TOKEN", "stop", 2), ("TIME_LIMIT", "length", None)],
)
async def test_why_a_text_ended_is_said_twice(door, ask, reason, expected, stop):
    door.engine.reason = FinishReason(reason)
    [choice] = (await ask(COMPLETIONS)).json()["choices"]
    assert (choice["finish_reason"], choice["stop_reason"], choice["steering"]["finish_reason"]) == (
        expected,
        stop,
        reason,
    )


async def test_a_text_that_the_server_cut_short_is_no_answer(door, ask):
    door.engine.reason = FinishReason.CANCELLED
    answer = await ask(COMPLETIONS)
    assert (answer.status, answer.error["code"]) == (503, "SHUTTING_DOWN")
    *_, (_, last) = (await ask(COMPLETIONS, stream=True)).events()
    assert last["error"]["code"] == "SHUTTING_DOWN"


@pytest.mark.parametrize("usage", [True, False])
async def test_a_stream_is_pieces_and_then_done(ask, usage):
    options = {"stream_options": {"include_usage": True}} if usage else {}
    answer = await ask(CHAT, stream=True, return_token_ids=True, **options)
    assert answer.headers["content-type"] == "text/event-stream"
    *pieces, (_, done) = answer.events()
    assert done == "[DONE]"
    pieces = [piece for _, piece in pieces]
    assert {piece["object"] for piece in pieces} == {"chat.completion.chunk"}
    if usage:
        assert {piece["usage"] for piece in pieces[:-1]} == {None}
        last = pieces.pop()
        assert (last["choices"], last["usage"]["total_tokens"]) == ([], 6)
    else:
        assert not any("usage" in piece for piece in pieces)
    assert pieces[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert pieces[0]["prompt_token_ids"] == [1, 2, 3]
    assert "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces) == "a secret \u2603"
    assert [token for piece in pieces[1:-1] for token in piece["choices"][0]["token_ids"]] == [0, 1, 2]
    assert [piece["choices"][0]["finish_reason"] for piece in pieces] == [None] * 4 + ["length"]
    assert pieces[-1]["choices"][0]["steering"]["receipts"] == []


async def test_several_texts_of_one_prompt_have_an_index_each(door, ask):
    answer = (await ask(COMPLETIONS, n=3, seed=5, logprobs=0)).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert [choice["steering"]["seed"] for choice in answer["choices"]] == [5, 6, 7]
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 9, "total_tokens": 12}
    *pieces, _ = (await ask(COMPLETIONS, n=3, stream=True, logprobs=0)).events()
    texts = {0: "", 1: "", 2: ""}
    offsets = {0: [], 1: [], 2: []}
    for _, piece in pieces:
        [choice] = piece["choices"]
        texts[choice["index"]] += choice["text"]
        offsets[choice["index"]] += (choice["logprobs"] or {"text_offset": []})["text_offset"]
    assert texts == dict.fromkeys(range(3), "a secret \u2603")
    assert offsets == {index: [0, 1, 8] for index in range(3)}


async def test_several_prompts_have_their_texts_one_behind_another(door, ask):
    answer = (await ask(COMPLETIONS, prompt=["a", "b"], n=2, seed=5)).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [choice["steering"]["seed"] for choice in answer["choices"]] == [5, 6, 5, 6]
    assert answer["usage"] == {"prompt_tokens": 6, "completion_tokens": 12, "total_tokens": 18}
    drawn = (await ask(COMPLETIONS, prompt=["a", "a", "a"], n=2)).json()
    assert len({choice["steering"]["seed"] for choice in drawn["choices"]}) == 6
    assert [[row.sampling.seed for row in job.rows] for job in door.engine.jobs[-3:]] == [
        [choice["steering"]["seed"] for choice in drawn["choices"][first : first + 2]] for first in (0, 2, 4)
    ]
    door.engine.reason = FinishReason.STOP_TOKEN
    *pieces, _ = (await ask(COMPLETIONS, prompt=[[5], [6, 7]], stream=True)).events()
    texts = {0: "", 1: ""}
    for _, piece in pieces:
        [choice] = piece["choices"]
        texts[choice["index"]] += choice["text"]
    assert texts == dict.fromkeys(range(2), "a secret \u2603")
    assert pieces[-1][1]["choices"][0]["stop_reason"] == 2


async def test_a_stream_that_fails_midway_says_so_and_is_not_done(door, ask):
    door.engine.error = SteeringNotAppliedError("layer 3 was not reached")
    *_, (name, last) = (await ask(COMPLETIONS, stream=True)).events()
    assert (name, last["error"]["code"]) == ("", "STEERING_NOT_APPLIED")


async def test_a_model_that_is_not_served_is_not_found(door, ask):
    name = door.engine.model.model
    for model in ("gpt-4", "", f"{name}x", f"x+{name}"):
        answer = await ask(COMPLETIONS, model=model)
        assert (answer.status, answer.error["code"], answer.error["param"]) == (404, "model_not_found", "model")
    for model in (f"{name}+tide", f"{name}+tide=0.4"):
        answer = await ask(COMPLETIONS, model=model)
        assert (answer.status, answer.error["code"]) == (404, "UNKNOWN_OPERATOR")
    for model in (f"{name}+", f"{name}+a+", f"{name}+a=much"):
        answer = await ask(COMPLETIONS, model=model)
        assert (answer.status, answer.error["param"]) == (400, "model")
    both = await ask(COMPLETIONS, model=f"{name}+tide", steering={"operators": ["tide"]})
    assert (both.status, both.error["param"]) == (400, "steering")
    assert (await door.post(COMPLETIONS, {"prompt": "x"})).error["param"] == "model"


async def test_the_models_are_listed(door):
    name = door.engine.model.model
    answer = (await door.get("/v1/models")).json()
    assert [each["id"] for each in answer["data"]] == [name]
    assert (await door.get(f"/v1/models/{name}")).json() == answer["data"][0]
    for other in ("x", "%2e%2e/%2e%2e", ""):
        assert (await door.get(f"/v1/models/{other}")).status == 404


SPECS = [
    "ocean",
    "ocean=0.4",
    "ocean=-1e-3@0.5",
    "ocean:first",
    "ocean=0.4@0.5:generated:0..5",
    "ocean=0.4:4..,anchor=concept",
    f"ocean,first_token=anchor,digest=sha256:{'1' * 64}",
]


@pytest.mark.parametrize("text", SPECS)
def test_an_operator_as_a_text_is_what_the_command_line_makes_of_it(text):
    expected, found = ClientUse.parse(text), reader(sp.OperatorUse, OperatorUse)(read_operator(text, "model"))
    for name in ("name", "strength", "blend", "rule", "anchor", "first_token", "digest", "kl"):
        assert getattr(found, name) == getattr(expected, name), name
    assert str(found.positions) == str(expected.positions)


@pytest.mark.parametrize(
    "text",
    ["", "=0.4", " ocean", "o@1", "ocean=", "ocean=0.4@", "ocean:x", "ocean,rule=x", "ocean,anchor=x", "ocean,a"],
)
def test_what_is_no_operator_is_refused(text):
    with pytest.raises(InvalidRequestError):
        read_operator(text, "model")
    with pytest.raises(ValueError, match="cannot read"):
        ClientUse.parse(text)


def test_an_operator_as_an_object_is_the_contracts():
    given = {
        "name": "lens",
        "kl": 0.5,
        "rule": "substitute",
        "anchor": "ANCHOR_CONCEPT",
        "first_token": "anchor",
        "positions": "prompt:1..4",
        "words": ["sea", {"text": "storm", "weight": -0.5}],
    }
    [use], field = operators_of({"operators": [given]}, "m", "m")
    assert field == "steering.operators"
    assert use == sp.OperatorUse(
        name="lens",
        kl=0.5,
        rule=sp.RULE_SUBSTITUTE,
        anchor=sp.ANCHOR_CONCEPT,
        first_token=sp.FIRST_TOKEN_ANCHOR,
        positions=sp.Positions(part=sp.Positions.PART_PROMPT, start=1, end=4),
        words=[sp.WeightedWord(text="sea"), sp.WeightedWord(text="storm", weight=-0.5)],
    )


async def test_a_client_that_leaves_a_stream_stops_its_work(door):
    door.engine.may_go_on.clear()
    reader, writer = await door.open()
    body = {"model": door.engine.model.model, "messages": TURNS, "stream": True}
    writer.write(door.request("POST", CHAT, body))
    await reader.readuntil(b"assistant")
    writer.close()
    async with asyncio.timeout(5):
        while not door.engine.cancelled:
            await asyncio.sleep(0.01)
