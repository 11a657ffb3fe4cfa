"""A sweep: how it is packed, what it keeps, how it goes on, and what it refuses."""

import io
import json
from dataclasses import replace
from itertools import product

import grpc
import pytest
from steer_client import (
    ControlChangedError,
    InvalidRequestError,
    OperatorUnusableError,
    OperatorUse,
    SamplingParams,
    ServerError,
    ServerUnavailableError,
    SteerClient,
    UnknownOperatorError,
    Word,
)
from steering.v1 import comparison_pb2
from steering.v1 import generation_pb2 as pb
from steering.v1 import operators_pb2 as ops
from steering.v1 import steering_pb2 as sp

DIGEST = "sha256:" + "1a2b3c4d" * 8
OPERATORS = {"ocean": [0, 0.2, 0.4], "tea": 0.3}
DRAWN = SamplingParams(temperature=1.0, max_tokens=10)


def _operator(name, digest=DIGEST):
    return ops.Operator(name=name, digest=digest, recommended_rule=sp.RULE_CUMULATIVE)


@pytest.fixture(autouse=True)
def listed(request):
    scripts = request.getfixturevalue("pair") if "pair" in request.fixturenames else []
    if {"fake", "client", "async_client"} & set(request.fixturenames):
        scripts = [request.getfixturevalue("fake")]
    for script in scripts:
        script.listed.operators.extend(_operator(each) for each in ("ocean", "tea"))
        script.model.max_arms = 16
        script.model.model_fingerprint = "sha256:model"


def compares(fake):
    return [request for request in fake.requests if isinstance(request, comparison_pb2.CompareRequest)]


def test_every_prompt_and_seed_has_each_arm_and_one_plain_text(client, fake):
    result = client.sweep({"x": "one", "y": [1, 2]}, operators=OPERATORS, seeds=2, sampling=DRAWN, words=["MORE"])
    arms = ["normal", "ocean=0", "ocean=0.2", "ocean=0.4", "tea=0.3"]
    found = [(row.prompt_id, row.seed, row.arm) for row in result.rows]
    assert found == [(*pair, arm) for pair in product("xy", (0, 1)) for arm in arms]
    assert [(row.text, row.found) for row in result.rows[:2]] == [("one two", ()), ("one more", ("MORE",))]
    assert len(compares(fake)) == 4
    assert all(use.digest == DIGEST for sent in compares(fake) for arm in sent.arms for use in arm.operators)
    assert {(sent.sampling.seed, sent.sampling.max_tokens) for sent in compares(fake)} == {(0, 10), (1, 10)}


def test_each_operator_may_have_words_of_its_own(client):
    words = {"ocean": ["more", "sea"], "tea": ["two"]}
    rows = client.sweep(["one"], operators={"ocean": 0.2, "tea": 0.3}, words=words).rows
    # The plain text is "one two", every other "one more".
    assert [row.found for row in rows] == [("two",), ("more",), ()]


@pytest.mark.parametrize("limit", ["max_arms", "max_total_tokens", "max_messages", "max_request_bytes"])
def test_arms_are_packed_under_each_of_the_servers_limits_and_the_plain_text_runs_once(client, fake, limit):
    fake.model.limits.CopyFrom(pb.RequestLimits(max_messages=2000, max_request_bytes=10**6))
    if limit == "max_arms":
        fake.model.max_arms = 2
    elif limit == "max_total_tokens":
        fake.model.limits.max_total_tokens = 39
    elif limit == "max_messages":
        fake.model.limits.max_messages = 9
    else:
        fake.model.limits.max_request_bytes = 330
    client.sweep(["one"], operators=OPERATORS, sampling=SamplingParams(max_tokens=13))
    sent = compares(fake)
    assert [not each.HasField("normal") or each.normal for each in sent].count(True) == 1
    assert sorted(use.strength for each in sent for arm in each.arms for use in arm.operators) == [0, 0.2, 0.3, 0.4]
    assert 2 <= len(sent) <= 3
    for each in sent:
        assert len(each.arms) + (not each.HasField("normal") or each.normal) <= 3
        assert limit != "max_request_bytes" or each.ByteSize() <= 330
        # The control is held against the plain text of its own request.
        has_control = any(use.strength == 0 for arm in each.arms for use in arm.operators)
        assert has_control == (not each.HasField("normal") or each.normal)


async def test_the_asyncio_client_has_the_same_sweep(async_client, fake):
    result = await async_client.sweep(["one", "two"], operators=OPERATORS, in_flight=2)
    assert len(result.rows) == 10
    assert len(compares(fake)) == 2


def test_a_sweep_goes_on_where_its_file_ends(client, fake, tmp_path):
    out = tmp_path / "runs" / "ocean.jsonl"
    ask = {"prompts": ["one", "two", "three"], "operators": OPERATORS, "words": ["more"], "out": out}
    first = client.sweep(**ask)
    assert len(compares(fake)) == 3
    lines = out.read_bytes().splitlines(keepends=True)
    assert len(lines) == 16
    assert client.sweep(**ask) == first
    assert len(compares(fake)) == 3
    # The last line was torn, and so its text is decoded again.
    out.write_bytes(b"".join(lines[:-1]) + lines[-1][:20])
    assert client.sweep(**ask) == first
    (again,) = compares(fake)[3:]
    assert len(again.arms) == 1
    assert sorted(out.read_bytes().splitlines(keepends=True)) == sorted(lines)
    # Of a header that was torn nothing is left to keep.
    out.write_bytes(lines[0][:30])
    assert client.sweep(**ask) == first


def test_what_was_finished_before_an_error_is_kept(client, fake, make, tmp_path):
    out = tmp_path / "out.jsonl"
    refusals = iter([None, None, make.fault(grpc.StatusCode.INTERNAL, reason="ODD")])

    def watch(request, context):
        fake.requests.append(request)
        fault = next(refusals, None) if isinstance(request, comparison_pb2.CompareRequest) else None
        if fault:
            fault.abort(context)

    fake.watch = watch
    ask = {"prompts": ["one", "two", "three"], "operators": {"tea": 0.3}, "out": out, "in_flight": 1}
    with pytest.raises(ServerError):
        client.sweep(**ask)
    assert len(out.read_bytes().splitlines()) == 5
    client.sweep(**ask)
    assert [each.prompt.text for each in compares(fake)] == ["one", "two", "three", "three"]


def test_an_interrupt_keeps_what_had_finished(client, fake, tmp_path, monkeypatch):
    from steer_client._sweep import sweep as module

    out = tmp_path / "out.jsonl"
    from contextlib import contextmanager

    @contextmanager
    def interrupting(total, done, *, shown):
        def on_texts(_):
            raise KeyboardInterrupt

        yield on_texts

    monkeypatch.setattr(module, "progress_bar", interrupting)
    with pytest.raises(KeyboardInterrupt):
        client.sweep(["one", "two"], operators={"tea": 0.3}, out=out, in_flight=1)
    assert len(out.read_bytes().splitlines()) == 3
    assert client.health()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"prompts": ["one", "three"]}, "with other prompts"),
        ({"operators": {"ocean": 0.5}}, "with other operators"),
        ({"seeds": [4]}, "with other seeds"),
        ({"sampling": SamplingParams(max_tokens=5)}, "with other sampling"),
    ],
    ids=["prompts", "operators", "seeds", "sampling"],
)
def test_a_file_of_another_plan_is_refused_by_name(client, tmp_path, change, named):
    ask = {"prompts": ["one", "two"], "operators": {"ocean": 0.2}, "out": tmp_path / "out.jsonl"}
    client.sweep(**ask)
    kept = (tmp_path / "out.jsonl").read_bytes()
    with pytest.raises(InvalidRequestError, match=named) as caught:
        client.sweep(**ask | change)
    assert caught.value.field == "out"
    assert (tmp_path / "out.jsonl").read_bytes() == kept


def test_a_file_of_another_model_or_version_is_refused_by_name(client, fake, tmp_path):
    ask = {"prompts": ["one"], "operators": {"ocean": 0.2}, "out": tmp_path / "out.jsonl"}
    client.sweep(**ask)
    fake.listed.operators[0].digest = "sha256:new"
    with pytest.raises(InvalidRequestError, match=f"another version of an operator: ocean: {DIGEST}, now sha256:new"):
        client.sweep(**ask)
    fake.model.model_fingerprint = "sha256:other"
    with pytest.raises(InvalidRequestError, match="another model: sha256:model, now sha256:other"):
        client.sweep(**ask)


@pytest.mark.parametrize("content", ["my notes", "my notes\nof a day\n", '{"kind": "other"}\n'])
def test_a_file_that_is_none_of_a_sweep_is_left_alone(client, tmp_path, content):
    out = tmp_path / "notes.txt"
    out.write_text(content)
    with pytest.raises(InvalidRequestError, match="is no file of a sweep"):
        client.sweep(["one"], operators={"tea": 0.3}, out=out)
    assert out.read_text() == content


def test_a_control_that_is_not_the_plain_text_is_an_error_with_the_result(client, fake, make):
    fake.response = make.response(token_ids=[11, 12, 14])
    with pytest.raises(ControlChangedError, match=r"1 of 1 texts at strength 0.*ocean=0 of prompt '0'") as caught:
        client.sweep(["one"], operators=OPERATORS)
    assert len(caught.value.result.rows) == 5


def test_several_servers_share_the_work_and_one_that_leaves_is_no_loss(pair):
    one, other = pair
    with SteerClient("127.0.0.1:1", timeout=20) as client:
        result = client.sweep(
            [str(n) for n in range(12)], operators={"tea": 0.3}, targets=[one.target, other.target], in_flight=1
        )
        assert len(result.rows) == 24
        assert compares(one)
        assert compares(other)

        def leave(request, context):
            if isinstance(request, comparison_pb2.CompareRequest):
                context.abort(grpc.StatusCode.UNAVAILABLE, "gone")

        other.watch = leave
        targets = [one.target, other.target]
        assert len(client.sweep(["a", "b", "c"], operators={"tea": 0.3}, targets=targets).rows) == 6
        one.watch = leave
        with pytest.raises(ServerUnavailableError):
            client.sweep(["a", "b", "c"], operators={"tea": 0.3}, targets=targets)


def test_servers_that_differ_are_refused_by_name(pair):
    one, other = pair
    targets = [one.target, other.target]
    other.listed.operators[1].digest = "sha256:new"
    with SteerClient(one.target) as client:
        with pytest.raises(InvalidRequestError, match=r"targets: digests is .* and \{'tea': 'sha256:new'\} at"):
            client.sweep(["one"], operators={"tea": 0.3}, targets=targets)
        other.model.model_fingerprint = "sha256:other"
        with pytest.raises(InvalidRequestError, match="targets: model_fingerprint is sha256:model"):
            client.sweep(["one"], operators={"tea": 0.3}, targets=targets)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "prompts: at least one"),
        ({"prompts": "/nowhere.txt"}, "prompts: cannot read /nowhere.txt"),
        ({"operators": {}}, "operators: a mapping"),
        ({"operators": "ocean=0.4"}, "operators: a mapping"),
        ({"operators": {"ocean": []}}, "no strength"),
        ({"operators": {"ocean": "0.4"}}, "'0.4' is no strength"),
        ({"operators": {"ocean": [0.4, 0.40]}}, "ocean=0.4 comes twice"),
        ({"operators": {"ocean=0.3": 0.4}}, "strength of its own"),
        ({"operators": {"ocean": float("nan")}}, "nan is no strength"),
        ({"seeds": [1, 1]}, "seeds:"),
        ({"seeds": 2}, "at temperature 0 every one gives the same text"),
        ({"seeds": 1, "sampling": SamplingParams(seed=4)}, "one of both"),
        ({"words": "sea"}, "words: a sequence"),
        ({"words": [" "]}, "words: ' '"),
        ({"words": {"tea": ["tea"]}}, "words: are of tea; those of each operator are needed: ocean"),
        ({"in_flight": 0}, "in_flight: is 0"),
        ({"out": "/proc/none/x.jsonl"}, "out: cannot write"),
    ],
)
def test_what_cannot_be_run_is_refused_by_name(client, fake, changes, message):
    with pytest.raises(InvalidRequestError, match=message):
        client.sweep(**{"prompts": ["one"], "operators": {"ocean": 0.2}} | changes)
    assert not compares(fake)


def test_operators_that_are_not_there_or_unusable_are_named_before_anything_runs(client, fake):
    with pytest.raises(UnknownOperatorError, match="no operator 'sea'; it has ocean, tea"):
        client.sweep(["one"], operators={"sea": 0.2})
    fake.listed.operators[0].problem = "it is of another model"
    with pytest.raises(OperatorUnusableError, match="another model"):
        client.sweep(["one"], operators={"ocean": 0.2})
    assert not compares(fake)


def test_a_word_and_positions_have_their_place_in_the_arms_name():
    from steer_client._sweep.plan import make_plan

    plan = make_plan(["one"], {Word("coffee"): [0.1], "ocean:first": 0.4}, None, SamplingParams())
    assert [arm.name for arm in plan.arms] == ["lens(coffee)=0.1", "ocean:first=0.4"]
    assert plan.arms[1].use == OperatorUse.parse("ocean=0.4:first")
    assert plan.arms[0].use.words == Word("coffee").words


def test_prompts_of_a_file_are_lines_or_objects(tmp_path):
    from steer_client._sweep.plan import prompt_text, read_prompts

    lines = tmp_path / "prompts.txt"
    lines.write_text("one\n\n two \r\nthree")
    assert read_prompts(lines) == {"0": "one", "1": " two ", "2": "three"}
    objects = tmp_path / "prompts.jsonl"
    entries = [
        {"id": "a", "prompt": "one"},
        {"prompt": [1, 2]},
        {"id": 7, "prompt": [{"role": "user", "content": "x"}]},
    ]
    objects.write_text("\n".join(map(json.dumps, entries)))
    found = read_prompts(objects)
    assert list(found) == ["a", "1", "7"]
    assert [prompt_text(each) for each in found.values()] == ["one", "1 2", "user: x"]
    for bad in ('{"id": 1}', "text", '{"prompt": 4}', '{"prompt": []}', '{"id": "a", "prompt": "x"}'):
        objects.write_text(f"{json.dumps(entries[0])}\n{bad}\n")
        with pytest.raises(InvalidRequestError, match="line 2"):
            read_prompts(objects)


def test_csv_and_json_lines_hold_every_text(client, tmp_path):
    result = client.sweep(["a, b", 'c "d"'], operators=OPERATORS, words=["more"])
    text = result.to_csv(tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_text() == text
    import csv

    rows = list(csv.DictReader(text.splitlines()))
    assert [row["prompt"] for row in rows[::5]] == ["a, b", 'c "d"']
    assert rows[2]["arm"] == "ocean=0.2"
    assert (rows[2]["hit"], rows[0]["hit"], rows[0]["kl_mean"], rows[2]["kl_mean"]) == ("True", "False", "", "0.5")
    from steer_client._sweep.rows import read_row

    assert tuple(read_row(json.loads(line)) for line in result.to_jsonl().splitlines()) == result.rows
    assert json.loads(json.dumps(result.to_dict()))["controls"] == {"texts": 2, "changed": 0}


def test_the_table_has_a_line_per_arm_and_no_markup_of_other_peoples_text(client):
    from rich.console import Console

    result = client.sweep(["one"], operators=OPERATORS, words=["more"])
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(replace(result, model="[red]tiny"))
    shown = console.export_text()
    assert "[red]tiny: 5 texts" in shown
    (line,) = [line for line in shown.splitlines() if " 0.4 " in line]
    # One of one prompt has a word; KL of 0.25, 0.75 and 0.5; perplexity 9 where the plain one has 3.
    assert line.split() == ["ocean", "0.4", "1", *["1.00", "(0.21–1.00)"] * 2, "0.50", "0.72", "3.00"]
    assert "1 texts at λ = 0: all as without" in shown
