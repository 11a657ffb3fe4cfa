"""The contract as JSON: every method, its events, its errors."""

import asyncio
import json
import re
from pathlib import Path

import pytest
from google.protobuf import descriptor_pool
from google.protobuf.json_format import ParseDict
from steering.v1 import comparison_pb2, text_pb2
from steering.v1 import generation_pb2 as pb

from steer_server.errors import SteeringNotAppliedError
from steer_server.rpc.server import SERVICES

PROMPT = {"prompt": {"text": "x"}}


async def test_every_method_of_the_contract_has_a_path(door):
    methods = [m for name in SERVICES for m in descriptor_pool.Default().FindServiceByName(name).methods]
    assert {"Generate", "GenerateStream", "Compare", "Tokenize", "ListOperators"} <= {m.name for m in methods}
    for method in methods:
        answer = await door.post(f"/api/{method.name}", {"surprise": 1})
        assert (answer.status, answer.error["param"]) == (400, "surprise"), method.name


async def test_a_text_is_the_message_of_the_contract(door):
    answer = await door.post(
        "/api/Generate", {**PROMPT, "request_id": "mine", "sampling": {"max_tokens": 2, "seed": "7"}}
    )
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    said = ParseDict(answer.json(), text_pb2.GenerateResponse())
    assert (said.text, list(said.token_ids), said.request_id, said.seed) == ("a secret", [0, 1], "mine", 7)
    # What is empty is there too: a page need not ask.
    assert answer.json()["receipts"] == []


async def test_a_stream_is_events_of_the_contract(door):
    answer = await door.post("/api/GenerateStream", PROMPT)
    assert (answer.status, answer.headers["content-type"]) == (200, "text/event-stream")
    events = [ParseDict(value, pb.GenerateEvent()) for _, value in answer.events()]
    assert [event.WhichOneof("event") for event in events] == ["started", "delta", "delta", "delta", "finished"]
    assert "".join(event.delta.text for event in events) == events[-1].finished.text == "a secret \u2603"
    compared = await door.post("/api/Compare", {**PROMPT, "arms": [{"name": "a", "operators": [{"name": "none"}]}]})
    assert (compared.status, compared.error["code"]) == (404, "UNKNOWN_OPERATOR")


async def test_several_samples_are_inside_the_first_of_them_and_in_a_stream_apart(door):
    said = (await door.post("/api/Generate", {**PROMPT, "n": 3, "sampling": {"seed": "7"}})).json()
    assert [(each["sample"], each["seed"]) for each in (said, *said["more"])] == [(0, "7"), (1, "8"), (2, "9")]
    assert [job.rows[2].sampling.seed for job in door.engine.jobs] == [9]
    answer = await door.post("/api/GenerateStream", {**PROMPT, "n": 2})
    events = [ParseDict(value, pb.GenerateEvent()) for _, value in answer.events()]
    for sample in (0, 1):
        kinds = [event.WhichOneof("event") for event in events if event.sample == sample]
        assert kinds == ["started", "delta", "delta", "delta", "finished"]
    most = (await door.get("/api/model")).json()["max_arms"] + 1
    refused = await door.post("/api/Generate", {**PROMPT, "n": most + 1})
    assert (refused.status, refused.error["param"]) == (400, "n")


async def test_the_end_of_a_stream_repeats_nothing_where_it_is_not_to(door):
    answer = await door.post("/api/GenerateStream", {**PROMPT, "repeat_in_finished": False})
    *_, end = [ParseDict(value, pb.GenerateEvent()).finished for _, value in answer.events()]
    assert (end.text, list(end.token_ids), end.usage.completion_tokens) == ("", [], 3)
    refused = await door.post("/api/Generate", {**PROMPT, "repeat_in_finished": False})
    assert (refused.status, refused.error["param"]) == (400, "repeat_in_finished")


async def test_a_call_of_several_prompts_is_one_request_of_many_texts(door, logged):
    prompts = [{"id": f"p{index}", "prompt": {"text": "x"}} for index in range(3)]
    answer = await door.post("/api/Compare", {"prompts": prompts, "n": 2, "repeat_in_finished": False})
    events = [ParseDict(value, comparison_pb2.CompareEvent()) for _, value in answer.events()]
    assert sorted(event.prompt_id for event in events if event.HasField("compared")) == ["p0", "p1", "p2"]
    assert {(event.prompt_id, event.sample) for event in events if event.HasField("finished")} == {
        (f"p{index}", sample) for index in range(3) for sample in range(2)
    }
    [line] = [line for line in logged if line["event"] == "/api/Compare"]
    counts = {name: line[name] for name in ("prompts", "texts", "prompt_tokens", "generated_tokens")}
    assert counts == {"prompts": 3, "texts": 6, "prompt_tokens": 9, "generated_tokens": 18}
    read = door.server._metrics.registry.get_sample_value
    assert read("steer_requests_total") == 1
    assert read("steer_completions_total", {"reason": "MAX_TOKENS", "steered": "false"}) == 6


async def test_model_operators_and_tokens_are_told(door):
    model = await door.get("/api/model")
    assert model.json()["context_length"] == door.engine.model.context_length
    assert model.json()["limits"]["max_operators"] == 16
    assert (await door.get("/api/operators")).json() == {"operators": []}
    assert (await door.post("/api/Tokenize", PROMPT)).json() == {"token_ids": [1, 2, 3], "tokens": ["t1", "t2", "t3"]}


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({}, "prompt", "is missing"),
        ([], "request", "no object"),
        ({"prompt": {"text": "x", "txt": "y"}}, "prompt.txt", "is no field of Prompt"),
        ({"prompt": {"text": 7}}, "prompt.text", "is 7; a text is accepted"),
        ({"prompt": {"text": "x", "chat": {}}}, "prompt", "oneof"),
        ({"prompt": []}, "prompt", "is a list; an object"),
        ({"prompt": "x"}, "prompt", "is a text; an object"),
        ({**PROMPT, "requestId": "a", "request_id": "b"}, "request_id", "both of its names"),
        ({**PROMPT, "sampling": {"max_tokens": 1.5}}, "sampling.max_tokens", "1.5"),
        ({**PROMPT, "sampling": {"max_tokens": 0}}, "sampling.max_tokens", "1 or more"),
        ({**PROMPT, "sampling": {"max_tokens": 2**31}}, "sampling.max_tokens", "is 2147483648; at most 2147483647"),
        ({**PROMPT, "sampling": {"temperature": "NaN"}}, "sampling.temperature", "nan"),
        ({**PROMPT, "sampling": {"seed": -1}}, "sampling.seed", "is -1; at least 0"),
        ({**PROMPT, "sampling": {"time_limit": 5}}, "sampling.time_limit", 'such as "1.5s"'),
        (
            {**PROMPT, "operators": [{"name": "a", "rule": "RULE_OF_THUMB"}]},
            "operators[0].rule",
            "is 'RULE_OF_THUMB'; RULE_CUM",
        ),
        ({**PROMPT, "operators": [{"name": "a", "words": [{"txt": "sea"}]}]}, "operators[0].words[0].txt", "no field"),
        ({**PROMPT, "operators": [{"name": "a"}] * 17}, "operators", "at most 16"),
        ({**PROMPT, "operators": {"name": "a"}}, "operators", "is an object; a list"),
        ({**PROMPT, "operators": [None]}, "operators[0]", "is null; an object"),
        ({**PROMPT, "operators": ["a"]}, "operators[0]", "is a text; an object"),
        ({"prompt": {"token_ids": {"ids": [1] * 300}}}, "prompt", "at most"),
        ({"prompt": {"text": "x" * 10**5}}, "prompt", "at most"),
    ],
)
async def test_what_is_wrong_with_a_request_is_named(door, body, param, said):
    for path in ("/api/Generate", "/api/GenerateStream"):
        answer = await door.post(path, body)
        assert answer.status == 400
        assert answer.error["code"] in {"INVALID_REQUEST", "PROMPT_TOO_LONG"}
        assert answer.error["status"] == "INVALID_ARGUMENT"
        assert answer.error["param"] == param, answer.error
        assert said in answer.error["message"], answer.error
        assert "secret" not in answer.error["message"]
    assert not door.engine.jobs


@pytest.mark.parametrize(
    "body",
    [
        {"sampling": {"temperature": "x" * 10**5}},
        {"sampling": {"time_limit": "x" * 10**5}},
        {"operators": [{"rule": "x" * 10**5}]},
        {"x" * 10**5: 1},
    ],
)
async def test_a_value_of_any_length_is_not_sent_back_whole(door, body):
    answer = await door.post("/api/Generate", {"prompt": {"text": "x"}, **body})
    assert answer.status == 400
    assert len(answer.body) < 3000


async def test_an_error_has_the_details_that_it_has_over_grpc(door):
    error = (await door.post("/api/Generate", {**PROMPT, "operators": [{"name": "tide"}]})).error
    assert (error["status"], error["code"], error["type"]) == ("NOT_FOUND", "UNKNOWN_OPERATOR", "invalid_request_error")
    info, resource = error["details"]
    assert (info["reason"], info["domain"]) == ("UNKNOWN_OPERATOR", "steering.v1")
    assert resource["resourceName"] == "tide"


async def test_the_error_that_the_page_shows_is_what_is_answered(door):
    page = (Path(__file__).parents[3] / "docs/HTTP.md").read_text(encoding="utf-8")
    [shown] = re.findall(r"^```json\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    answer = await door.post("/api/Generate", {**PROMPT, "sampling": {"top_p": 7}})
    assert answer.json() == {"error": json.loads(shown)["error"] | {"details": answer.error["details"]}}
    assert [each["@type"].rpartition(".")[2] for each in answer.error["details"]] == ["ErrorInfo", "BadRequest"]


@pytest.mark.parametrize("error", [SteeringNotAppliedError("layer 3 was not reached"), RuntimeError("a secret thing")])
async def test_a_stream_that_fails_midway_ends_with_an_event_that_says_why(door, logged, error):
    door.engine.error = error
    answer = await door.post("/api/GenerateStream", PROMPT)
    assert answer.status == 200
    names = [name for name, _ in answer.events()]
    assert names == ["", "", "error"]
    said = answer.events()[-1][1]["error"]
    assert (said["status"], said["type"]) == ("INTERNAL", "server_error")
    assert said["code"] == ("STEERING_NOT_APPLIED" if isinstance(error, SteeringNotAppliedError) else "ENGINE_FAILED")
    assert "secret" not in said["message"]
    whole = await door.post("/api/Generate", PROMPT)
    assert (whole.status, whole.error["code"]) == (500, said["code"])


async def test_calls_are_counted_and_logged_without_their_texts(door, logged):
    await door.post("/api/Generate", {**PROMPT, "request_id": "mine"})
    await door.post("/api/Generate", {"prompt": {"text": "x"}, "secret": 1})
    good, bad = (line for line in logged if line["event"] == "/api/Generate")
    assert (good["status"], good["code"], good["request_id"], good["generated_tokens"]) == (200, "OK", "mine", 3)
    assert good["peer"].startswith("ipv4:127.0.0.1:")
    assert (bad["status"], bad["code"], bad["reason"]) == (400, "INVALID_ARGUMENT", "INVALID_REQUEST")
    read = door.server._metrics.registry.get_sample_value
    assert read("steer_http_requests_total", {"path": "/api/Generate", "status": "200"}) == 1
    assert read("steer_http_request_seconds_count", {"path": "/api/Generate"}) == 2
    assert read("steer_errors_total", {"grpc_method": "/api/Generate", "reason": "INVALID_REQUEST"}) == 1
    assert read("steer_completions_total", {"reason": "MAX_TOKENS", "steered": "false"}) == 1
    assert not any(door.server._metrics.in_flight.values())


async def test_a_client_that_leaves_stops_its_work(door, logged):
    door.engine.may_go_on.clear()
    for path in ("/api/Generate", "/api/GenerateStream"):
        _, writer = await door.open()
        writer.write(door.request("POST", path, PROMPT))
        while len(door.engine.jobs) == door.engine.cancelled:
            await asyncio.sleep(0.01)
        writer.close()
        async with asyncio.timeout(5):
            while len(door.engine.jobs) > door.engine.cancelled:
                await asyncio.sleep(0.01)
    async with asyncio.timeout(5):
        while len([line for line in logged if line.get("status") == 499]) < 2:
            await asyncio.sleep(0.01)
    assert {line["code"] for line in logged if "code" in line} == {"CANCELLED"}
    assert not any(door.server._metrics.in_flight.values())
