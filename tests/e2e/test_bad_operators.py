"""Whatever a store holds, each bad file is listed with its problem, and the good ones are served."""

import json
import math
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
import torch
from steer_client import (
    FinishReason,
    OperatorUnusableError,
    OperatorUse,
    SamplingParams,
    ServerError,
    SteerClient,
)

from operators.core import artifact as artifacts
from operators.core.artifact import from_bytes, to_bytes
from operators.core.store import Store

BIN = Path(sys.executable).parent
GOLDEN = [OperatorUse("golden", 0.5)]
SHORT = SamplingParams(max_tokens=4, ignore_eos=True)
LONG = SamplingParams(max_tokens=4000, ignore_eos=True)
"""Several seconds of work."""
OTHER = f"sha256:{'0' * 64}"


class _Bomb:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.fixture(autouse=True)
def serves_afterwards(server):
    """After every test here: a normal request is served as ever, and nothing runs or waits."""
    yield
    with SteerClient(server.target, timeout=20) as client:
        result = client.generate("the golden gate", operators=GOLDEN, sampling=SHORT)
    assert result.finish_reason is FinishReason.MAX_TOKENS
    assert result.receipts[0].generated_tokens_steered == 3
    server.wait_for_jobs(0, 0)


def _signed(artifact, **changes):
    """The file of this operator with header fields changed, signed by somebody who knows how."""
    text = json.dumps({**json.loads(artifact.header_json), **changes}, ensure_ascii=False)
    tensors = artifacts._tensors(
        *(artifact.factors, artifact.basis, artifact.anchor, artifact.substitute_base, artifact.offset),
        artifact.neutral,
    )
    return to_bytes(replace(artifact, header_json=text, digest=artifacts._digest(text, tensors)))


@pytest.fixture(scope="module")
def trap(tmp_path_factory):
    return tmp_path_factory.mktemp("trap") / "sprung"


@pytest.fixture(scope="module")
def bad_store(server, tiny_store, tmp_path_factory, golden, loaded, remake, trap):
    """Puts one of every kind of bad artifact into the shared server's store; takes them away again."""
    good, ids = to_bytes(golden), golden.header.concept_ids
    contents = {
        "other-model": to_bytes(remake(golden, model="somebody/else", model_fingerprint=f"weights-{OTHER}")),
        "earlier": to_bytes(remake(golden, model_fingerprint=OTHER)),
        "other-tokenizer": to_bytes(remake(golden, tokenizer_fingerprint=OTHER)),
        "other-depth": to_bytes(remake(golden, num_layers=9)),
        "other-shape": to_bytes(remake(golden, hidden_size=16)),
        "truncated": good[:-100],
        "flipped": good[:-50] + bytes([good[-50] ^ 4]) + good[-49:],
        "not-a-number": to_bytes(replace(golden, anchor=torch.full_like(golden.anchor, math.nan))),
        "pickled": pickle.dumps(_Bomb(trap), protocol=4),
        "empty": b"",
        "foreign-token": to_bytes(remake(golden, concept_ids=(*ids[:-1], loaded.model.config.vocab_size))),
        "huge-token": _signed(golden, concept_ids=[*ids[:-1], 1 << 31]),
        "long-model": _signed(golden, model="x" * (5 << 20)),
        "long-concept": _signed(golden, concept="東" * (5 << 20)),
        "long-rule-set": _signed(golden, rule_set="x" * (5 << 20)),
        "long-field": _signed(golden, **{"x" * (5 << 20): 1}),
        "year-1": _signed(golden, created="0001-01-01T00:00:00+14:00"),
        "year-9999": _signed(golden, created="9999-12-31T23:59:59-12:00"),
    }
    for name, data in contents.items():
        (tiny_store / f"{name}.safetensors").write_bytes(data)
    with (tiny_store / "oversized.safetensors").open("wb") as file:
        file.truncate((4 << 30) + 1)
    elsewhere = Store(tmp_path_factory.mktemp("elsewhere")).save("golden", golden)
    (tiny_store / "linked.safetensors").symlink_to(elsewhere)
    names = [*contents, "oversized", "linked"]
    with SteerClient(server.target, timeout=60) as client:
        report = client.reload_operators()
        assert set(report.unusable) == set(report.added) == set(names)
        yield
        for name in names:
            (tiny_store / f"{name}.safetensors").unlink()
        assert set(client.reload_operators().removed) == set(names)


@pytest.mark.usefixtures("bad_store")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("other-model", "built for model somebody/else"),
        ("earlier", "'steer-operators renew earlier' holds it against its model"),
        ("other-tokenizer", "built for tokenizer"),
        ("other-depth", "built for number of layers 9; this server has 4"),
        ("other-shape", "built for hidden size 16; this server has 32"),
        ("truncated", "not a whole safetensors file"),
        ("flipped", "it is damaged"),
        ("not-a-number", "not finite"),
        ("pickled", "pickle"),
        ("empty", "not a whole safetensors file"),
        ("oversized", "at most 4294967296 are read"),
        ("linked", "a symbolic link, which is not followed"),
        ("foreign-token", "its concept has token"),
        ("huge-token", "header field 'concept_ids."),
        ("long-model", "header field 'model'"),
        ("long-concept", "header field 'concept'"),
        ("long-rule-set", "header field 'rule_set'"),
        ("long-field", "header field 'xxx"),
        ("year-1", "header field 'created'"),
        ("year-9999", "header field 'created'"),
    ],
)
def test_a_bad_artifact_is_listed_and_refused_with_its_problem(client, trap, name, words):
    info = client.operator(name)
    assert not info.usable
    assert words in info.problem
    for call in (
        lambda: client.generate("x", operators=[OperatorUse(name)]),
        lambda: client.compare("x", arms={"a": GOLDEN, "b": [OperatorUse(name)]}),
    ):
        with pytest.raises(OperatorUnusableError) as caught:
            call()
        assert repr(name) in str(caught.value)
        assert words in str(caught.value)
    assert not trap.exists()


@pytest.mark.usefixtures("bad_store")
def test_a_listing_of_a_store_with_bad_artifacts_has_the_good_ones_as_ever(client, tiny_store):
    listed = {info.name: info for info in client.operators()}
    assert set(listed) == {path.stem for path in tiny_store.glob("*.safetensors")}
    assert {name for name, info in listed.items() if info.usable} == {"golden", "dress"}
    assert all(0 < len(info.problem) <= 1024 for info in listed.values() if not info.usable)


def test_signing_by_hand_leaves_a_valid_operator_valid(golden):
    assert from_bytes(_signed(golden), source="x").header == golden.header


def test_a_store_that_became_a_file_is_an_error_of_the_server_and_the_old_operators_stay(start_tiny, golden, tmp_path):
    directory = tmp_path / "store"
    Store(directory).save("golden", golden)
    with start_tiny("--store", str(directory)) as server, SteerClient(server.target, timeout=20) as client:
        directory.rename(tmp_path / "elsewhere")
        directory.write_text("no directory")
        for _ in range(2):
            with pytest.raises(ServerError) as caught:
                client.reload_operators()
            assert type(caught.value) is ServerError
            assert caught.value.code is grpc.StatusCode.FAILED_PRECONDITION
            assert caught.value.reason == "STORE_UNREADABLE"
            assert str(directory) in str(caught.value)
        assert [info.name for info in client.operators()] == ["golden"]
        result = client.generate("the bay", operators=GOLDEN, sampling=SHORT)
        assert result.receipts[0].generated_tokens_steered == 3
        directory.unlink()
        (tmp_path / "elsewhere").rename(directory)
        report = client.reload_operators()
        assert report.added == report.changed == report.removed == ()
