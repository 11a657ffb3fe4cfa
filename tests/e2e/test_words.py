"""Words through the commands and a real server, and what a server refuses of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from steer_client import (
    InvalidRequestError,
    OperatorUse,
    SamplingParams,
    SteerClient,
    UnknownOperatorError,
    Word,
    Words,
)
from steering.v1 import generation_pb2 as pb
from steering.v1 import generation_pb2_grpc, text_pb2
from steering.v1 import steering_pb2 as sp

from operators.core.dose_curve import DoseCurve, DosePoint
from operators.core.header import Recommended
from operators.core.positions import Positions
from operators.core.store import Store

BIN = Path(sys.executable).parent
SHORT = SamplingParams(max_tokens=6, ignore_eos=True)
BRIDGE = sp.WeightedWord(text="bridge")


@pytest.fixture
def steer(server):
    """``steer(*arguments, code=0)``: stdout and stderr of the command at the shared server."""

    def run(*arguments, code=0):
        done = subprocess.run(
            [BIN / "steer", *arguments],
            env=os.environ | {"COLUMNS": "160", "STEER_TARGET": server.target},
            capture_output=True,
            text=True,
        )
        assert done.returncode == code, done.stderr
        return done.stdout, done.stderr

    return run


@pytest.fixture(scope="module")
def lens(server, tiny_store, loaded, make_random_lens):
    """Puts ``lens`` into the shared server's store, of 0.5 nats at strength 0.8; takes it away again."""
    points = tuple(
        DosePoint(strength=strength, kl_p95=kl, kl_mean=kl / 2, hit_rate=0.5, useful_rate=0.25)
        for strength, kl in ((0.4, 0.125), (0.8, 0.5), (1.6, 2.0))
    )
    curve = DoseCurve(
        words=("dress",), prompts=2, prompts_digest=f"sha256:{'5' * 64}", tokens=8, plain_hit_rate=0.0, points=points
    )
    recommended = Recommended(strength=0.8, blend=1.0, positions=Positions(end=1))
    made = make_random_lens(loaded, lens={"curve": curve, "default_kl": 0.5}, recommended=recommended)
    Store(tiny_store).save("lens", made)
    with SteerClient(server.target, timeout=60) as client:
        assert client.reload_operators().added == ("lens",)
        yield made
        (tiny_store / "lens.safetensors").unlink()
        client.reload_operators()


def test_a_word_is_all_that_a_request_needs(lens, client):
    result = client.compare("the golden gate", operators=[Word("bridge")], sampling=SHORT)
    arm = result.steered["steered"]
    (receipt,) = arm.generation.receipts
    assert [(word.text, word.weight) for word in receipt.words] == [("bridge", 1.0)]
    assert (receipt.operator, receipt.lens_digest) == ("lens", lens.digest)
    assert (receipt.strength, receipt.kl) == (0.8, 0.5)
    assert (receipt.prompt_tokens_steered, receipt.generated_tokens_steered) == (1, 0)
    assert receipt.mean_dose == pytest.approx(0.4, abs=1e-4)
    assert arm.kl is not None
    again = client.generate("the golden gate", operators=[Word("bridge", kl=0.5)], sampling=SHORT)
    assert (again.receipts[0].digest, again.token_ids) == (receipt.digest, arm.generation.token_ids)
    stronger = client.generate("the", operators=[Word("bridge", kl=1.0)], sampling=SHORT).receipts[0]
    assert 0.8 < stronger.strength < 1.6


def test_mixtures_and_operators_add_up(lens, client):
    uses = [Words({"bridge": 1, "dress": -0.5}, 0.4), Word("gate", 0.2), OperatorUse("golden", 0.3)]
    found = client.generate("the golden gate", operators=uses, sampling=SHORT)
    assert [receipt.strength for receipt in found.receipts] == [0.4, 0.2, 0.3]
    assert len({receipt.digest for receipt in found.receipts}) == 3


def test_the_command_shows_words_strength_and_both_budgets(lens, steer):
    out, _ = steer("ab", "the golden gate", "--word", "bridge", "--max-tokens", "6")
    assert "steered: bridge λ 0.8" in out
    assert "asked for: p95 0.5 for bridge" in out
    assert "✓ lens 'bridge' (tokens " in out
    assert "strength 0.8 for p95 KL 0.5, blend 1" in out
    assert "positions first (recommended" in out
    out, _ = steer("ab", "the gate", "--word", "bridge, dress*-0.5", "--kl", "1", "--max-tokens", "4", "--json")
    (receipt,) = json.loads(out)["steered"]["receipts"]
    assert [(word["text"], word["weight"]) for word in receipt["words"]] == [("bridge", 1.0), ("dress", -0.5)]
    assert receipt["kl"] == 1.0
    _, err = steer("generate", "the gate", "--word", "bridge=0.3", "--operator", "golden", "--max-tokens", "4")
    assert "strength 0.3, blend 1" in err


def test_a_lens_is_listed_as_one_with_its_curve(lens, steer, client):
    info = client.operator("lens")
    assert (info.lens.read_from, [point.kl_p95 for point in info.curve]) == ("first", [0.125, 0.5, 2.0])
    (row,) = [line for line in steer("operators")[0].splitlines() if line.startswith("lens")]
    assert row.split().count("lens") == 2
    shown, _ = steer("operators", "lens")
    assert "a lens for words at hidden size 32, read from first positions of 2 texts" in shown
    assert "strength 0.8: KL p95 0.5, mean 0.25 nats, hits 0.5, useful 0.25" in shown


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--word", "a,,b"], 2, "cannot read the words 'a,,b'"),
        (["--word", "bridge=0.3", "--kl", "1"], 2, "no word or operator without a λ of its own"),
        (["--kl", "1"], 2, "no word or operator"),
        (["--word", "bridge", "--lens", "none"], 1, "no operator 'none'"),
        (["--word", "bridge", "--lens", "golden"], 1, "'golden', which is no lens"),
        (["--word", "bridge", "--kl", "9"], 1, "0.125 to 2 nats"),
        (["--operator", "golden", "--kl", "1"], 1, "none was measured"),
        (["--operator", "lens"], 1, "'lens' is a lens"),
    ],
)
def test_the_command_says_what_is_wrong(lens, steer, arguments, code, says):
    _, err = steer("ab", "the gate", *arguments, code=code)
    assert says in " ".join(err.replace("│", " ").split())


@pytest.mark.parametrize(
    ("use", "field"),
    [
        (sp.OperatorUse(words=[sp.WeightedWord(text="x" * 65)]), "words[0].text"),
        (sp.OperatorUse(words=[sp.WeightedWord(text="")]), "words[0].text"),
        (sp.OperatorUse(words=[BRIDGE] * 17), "words"),
        (sp.OperatorUse(words=[BRIDGE] * 2), "words"),
        (
            sp.OperatorUse(words=[sp.WeightedWord(text="bridge", weight=float("nan"))]),
            "words[0].weight",
        ),
        (
            sp.OperatorUse(words=[sp.WeightedWord(text="bridge", weight=float("inf"))]),
            "words[0].weight",
        ),
        (sp.OperatorUse(words=[sp.WeightedWord(text="bridge", weight=0)]), "words"),
        (sp.OperatorUse(words=[sp.WeightedWord(text="\x00\t")]), "words"),
        (sp.OperatorUse(words=[BRIDGE], kl=0), "kl"),
        (sp.OperatorUse(words=[BRIDGE], kl=float("nan")), "kl"),
        (sp.OperatorUse(words=[BRIDGE], kl=-1), "kl"),
        (sp.OperatorUse(words=[BRIDGE], kl=0.5, strength=0.5), "kl"),
        (sp.OperatorUse(words=[BRIDGE], kl=1e-300), "kl"),
        (sp.OperatorUse(name="golden", words=[BRIDGE]), "words"),
        (sp.OperatorUse(name="lens"), "words"),
        (sp.OperatorUse(words=[BRIDGE], positions=sp.Positions(start=3)), "strength"),
    ],
)
def test_the_server_names_the_field_of_what_it_refuses(lens, server, use, field):
    with grpc.insecure_channel(server.target) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Generate(pb.GenerateRequest(prompt=text_pb2.Prompt(text="the"), operators=[use]))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details().startswith(f"operators[0].{field}: ")


def test_the_sdk_has_types_for_what_is_refused(lens, client):
    with pytest.raises(InvalidRequestError) as caught:
        client.generate("the", operators=[Word("bridge", 0.3, kl=0.5)])
    assert caught.value.field == "operators[0].kl"
    with pytest.raises(UnknownOperatorError, match="'none'"):
        client.generate("the", operators=[Word("bridge", lens="none")])
    # A text alone is the name of an operator, and no word.
    with pytest.raises(UnknownOperatorError, match="'bridge'"):
        client.generate("the", operators=["bridge"])
    with pytest.raises(InvalidRequestError, match="OperatorUse"):
        client.generate("the", operators=[7])
