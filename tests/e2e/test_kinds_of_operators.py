"""Low-rank operators, those of several texts and combinations of signed strengths, through a real server."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from steer_client import DoseTooHighError, InvalidRequestError, OperatorUse, SamplingParams, SteerClient

from operators import __version__
from operators.builder.build import build_operator
from operators.builder.concept import concept_from_text
from operators.builder.spec import BuildSpec
from operators.core.artifact import make_artifact
from operators.core.header import Calibration, CalibrationPoint, Recommended
from operators.core.store import Store

BIN = Path(sys.executable).parent
SHORT = SamplingParams(max_tokens=6, ignore_eos=True)
TEXTS = ("golden gate", "the golden bridge", "a bridge of gold in the bay")
RECOMMENDED = Recommended(strength=0.7, rule="substitute", blend=0.25)


@pytest.fixture(scope="module")
def several(server, tiny_store, loaded):
    """Puts ``several`` (three texts, rank 5, calibrated) into the shared server's store; takes it away again."""
    point = CalibrationPoint(
        layer=2,
        rule="substitute",
        blend=0.25,
        strength=0.7,
        texts=20,
        kl_p95=0.5,
        hit_rate=0.5,
        perplexity_ratio=1,
        distinct_2=1,
    )
    calibration = Calibration(
        words=("gold",),
        kl_budget=1,
        max_perplexity_ratio=2,
        prompts=20,
        tokens=8,
        plain_hit_rate=0.25,
        plain_perplexity=5,
        plain_distinct_2=0.9,
        min_distinct_ratio=0.75,
        chosen=0,
        points=(point,),
    )
    concepts = tuple(concept_from_text(text, loaded) for text in TEXTS)
    built = build_operator(BuildSpec(concepts, layer=2, rank=5, recommended=RECOMMENDED), loaded)
    header = built.header.model_copy(update={"calibration": calibration})
    vectors = (built.anchor, built.substitute_base, built.offset)
    Store(tiny_store).save(
        "several", make_artifact(header, built.factors, *vectors, basis=built.basis, neutral=built.neutral)
    )
    with SteerClient(server.target, timeout=60) as client:
        assert client.reload_operators().unusable == ()
        yield built
        (tiny_store / "several.safetensors").unlink()
        client.reload_operators()


def test_an_operator_of_three_texts_is_described_and_steers(several, client):
    info = client.operator("several")
    assert (info.rank, info.exact, info.calibrated, info.num_texts) == (5, False, True, 3)
    assert [info.concept, *(more.text for more in info.more_texts)] == list(TEXTS)
    assert info.positions == max(len(info.concept_token_ids), *(len(more.token_ids) for more in info.more_texts))
    assert 0 < info.low_rank.min_residual <= info.low_rank.max_residual
    result = client.compare("the golden gate", operators=[OperatorUse("several", 1.5)], sampling=SHORT)
    (receipt,) = result.steered["steered"].generation.receipts
    assert receipt.digest == info.digest
    assert receipt.mean_dose == pytest.approx(0.75, abs=1e-4)
    assert receipt.dose_bound == 0.75
    assert not receipt.calibrated
    assert result.steered["steered"].generation.token_ids != result.normal.token_ids


def test_the_recommended_setting_is_applied_and_said_to_be_calibrated(several, client, server):
    (receipt,) = client.generate("the bay", operators=[OperatorUse("several")], sampling=SHORT).receipts
    assert (receipt.strength, receipt.rule, receipt.blend, receipt.calibrated) == (0.7, "substitute", 0.25, True)
    words = ("generate", "the bay", "-o", "several", "-o", "golden", "--max-tokens", "3", "--ignore-eos")
    done = _run("steer", *words, STEER_TARGET=server.target)
    assert "layer 2, strength 0.7, blend 0.25, substitute (recommended, calibrated): " in done.stderr
    assert "layer 2, strength 0.6, blend 0, cumulative (recommended): " in done.stderr
    assert " of 1.3, direction checked at " in done.stderr
    shown = _run("steer", "operators", "several", STEER_TARGET=server.target).stdout
    assert "hit rate 0.5 (plain 0.25), KL p95 0.5 nats of 1" in shown


def test_signed_strengths_at_two_layers_are_bounded_layer_by_layer(several, client):
    uses = [OperatorUse("several", 0.8), OperatorUse("golden", -0.6), OperatorUse("dress", -1.0)]
    first, second, third = client.generate("the bay", operators=uses, sampling=SHORT).receipts
    assert first.dose_bound == second.dose_bound == pytest.approx(0.7)
    assert 0 < first.mean_dose <= first.max_dose <= 0.7 + 1e-5
    assert (third.dose_bound, third.layer) == (0.5, 3)
    assert third.max_dose == pytest.approx(0.5, abs=1e-4)


def test_an_operator_against_itself_is_an_error_by_name(client):
    with pytest.raises(InvalidRequestError, match=r"cancels .* at position 0 of layer 2 \(golden 0\.5, golden -0\.5\)"):
        client.generate("x", operators=[OperatorUse("golden", 0.5), OperatorUse("golden", -0.5)], sampling=SHORT)


def test_a_server_has_its_own_limit_and_says_so(start_tiny, client):
    assert client.model_info().max_dose == 1.0
    with start_tiny("--max-dose", "0.2") as strict, SteerClient(strict.target, timeout=20) as other:
        assert other.model_info().max_dose == 0.2
        assert other.generate("x", operators=[OperatorUse("golden", 0.4)], sampling=SHORT).receipts
        with pytest.raises(DoseTooHighError, match=r"golden 0\.6, the recommended strength") as caught:
            other.generate("x", operators=[OperatorUse("golden")], sampling=SHORT)
        assert caught.value.metadata == {"layer": "2", "dose": "0.3", "max_dose": "0.2"}


@pytest.mark.parametrize("command", ["steer", "steer-server"])
def test_a_command_says_its_version(command):
    assert _run(command, "--version").stdout == f"{command} {__version__}\n"


def _run(command, *arguments, **environment):
    done = subprocess.run(
        [BIN / command, *arguments],
        env=os.environ | {"COLUMNS": "100"} | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done
