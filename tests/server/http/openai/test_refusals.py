"""What OpenAI's API does not take is refused by the name that it has there."""

import pytest

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
TURNS = [{"role": "user", "content": "x"}]


@pytest.fixture
def ask(door):
    """``await ask(path, **parameters)``, of the model that is served."""

    async def post(path, **parameters):
        own = {"messages": TURNS} if path == CHAT else {"prompt": "x"}
        return await door.post(path, {"model": door.engine.model.model, **own, **parameters})

    return post


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"surprise": 1}, "surprise"),
        ({"best_of": 2}, "best_of"),
        ({"best_of": True}, "best_of"),
        ({"echo": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 2**40}, "top_k"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": "1"}, "frequency_penalty"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"99999999999": 1}}, "logit_bias"),
        ({"logit_bias": {"3": 101}}, "logit_bias[0].bias"),
        ({"logit_bias": {str(n): 1 for n in range(301)}}, "logit_bias"),
        ({"min_tokens": 17, "max_tokens": 16}, "min_tokens"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"n": 0}, "n"),
        ({"n": 18}, "n"),
        ({"n": True}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": 7}, "stop"),
        ({"stop": False}, "stop"),
        ({"stop": ["a", 7]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": ["x"] * 65}, "stop"),
        ({"stop_token_ids": [2**31]}, "stop_token_ids[0]"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"chunks": 7}}, "stream_options.chunks"),
        ({"steering": 7}, "steering"),
        ({"steering": {"operators": {}}}, "steering"),
        ({"steering": {"operators": [], "strength": 7}}, "steering"),
        ({"steering": {"operators": [{"nam": "a"}]}}, "steering.operators[0].nam"),
        ({"steering": {"operators": ["a=b"]}}, "steering.operators[0]"),
        ({"steering": {"operators": ["a:some"]}}, "steering.operators[0]"),
        ({"steering": {"operators": ["a:" + "s" * 10**5]}}, "steering.operators[0]"),
        ({"steering": {"operators": [{"name": "a", "positions": "some"}]}}, "steering.operators[0].positions"),
        ({"steering": {"operators": [{"name": "a", "rule": "thumb"}]}}, "steering.operators[0].rule"),
        ({"steering": {"operators": [{"name": "a", "strength": "much"}]}}, "steering.operators[0].strength"),
        ({"steering": {"operators": ["a"] * 17}}, "steering.operators"),
    ],
)
async def test_what_is_not_accepted_is_refused_by_the_name_that_it_has_here(door, ask, path, given, param):
    for options in ({}, {"stream": True} if "stream" not in given and "stream_options" not in given else {}):
        answer = await ask(path, **given, **options)
        assert (answer.status, answer.error["code"], answer.error["param"]) == (400, "INVALID_REQUEST", param)
        assert answer.error["message"].startswith(f"{param}: ")
        assert len(answer.body) < 3000
    assert not door.engine.jobs


@pytest.mark.parametrize(
    ("path", "given", "param"),
    [
        (COMPLETIONS, {"prompt": None}, "prompt"),
        (COMPLETIONS, {"prompt": []}, "prompt"),
        (COMPLETIONS, {"prompt": ""}, "prompt"),
        (COMPLETIONS, {"prompt": [1, "a"]}, "prompt"),
        (COMPLETIONS, {"prompt": ["a", 1]}, "prompt[1]"),
        (COMPLETIONS, {"prompt": ["a", ""]}, "prompt[1]"),
        (COMPLETIONS, {"prompt": [[1], []]}, "prompt[1]"),
        (COMPLETIONS, {"prompt": [[1], [2, 2**31]]}, "prompt[1][1]"),
        (COMPLETIONS, {"prompt": ["a"] * 257}, "prompt"),
        (COMPLETIONS, {"prompt": [1, True]}, "prompt"),
        (COMPLETIONS, {"prompt": [2**31]}, "prompt[0]"),
        (COMPLETIONS, {"prompt": "x" * 10**5}, "prompt"),
        (COMPLETIONS, {"prompt": [1] * 1000}, "prompt"),
        (COMPLETIONS, {"logprobs": 21}, "logprobs"),
        (COMPLETIONS, {"logprobs": True}, "logprobs"),
        (COMPLETIONS, {"messages": TURNS}, "messages"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": None}, "messages"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content"),
        (CHAT, {"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        (CHAT, {"messages": [{"role": "user", "content": "x", "name": "me"}]}, "messages[0].name"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        (CHAT, {"messages": [{"role": "user", "content": "x" * 10**5}]}, "messages"),
        (CHAT, {"messages": TURNS * 1025}, "messages"),
        (CHAT, {"top_logprobs": 2}, "top_logprobs"),
        (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (CHAT, {"max_tokens": 3, "max_completion_tokens": 3}, "max_tokens"),
        (CHAT, {"max_completion_tokens": -1}, "max_completion_tokens"),
        (CHAT, {"prompt": "x"}, "prompt"),
        (CHAT, {"continue_final_message": True}, "continue_final_message"),
        (CHAT, {"add_generation_prompt": False}, "add_generation_prompt"),
        (CHAT, {"chat_template_kwargs": {"a": [1]}}, "chat_template_kwargs.a"),
        (CHAT, {"chat_template_kwargs": {"a": None}}, "chat_template_kwargs.a"),
        (CHAT, {"chat_template_kwargs": {f"a{n}": 1 for n in range(17)}}, "chat_template_kwargs"),
        (CHAT, {"chat_template_kwargs": {"a": "x" * 2000}}, "chat_template_kwargs[0].text"),
    ],
)
async def test_what_a_path_does_not_take_is_refused_by_name(ask, path, given, param):
    answer = await ask(path, **given)
    assert (answer.status, answer.error["param"]) == (400, param), answer.error
