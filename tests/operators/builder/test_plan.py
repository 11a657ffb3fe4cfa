"""What a build is said to take, before a weight is read."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig
from typer.testing import CliRunner

from operators.__main__ import app
from operators.builder.concept import Concept
from operators.builder.machine import Machine, measure_machine
from operators.builder.plan import plan_build
from operators.builder.spec import BuildSpec
from operators.maps.replay import Replay
from operators.model.loading import recognise
from tests.odd_models import odd_model
from tests.tiny_tokenizer import make_tokenizer

IDS = (5, 7, 9, 11, 2)
MACHINE = Machine(start=1, flop=1e9, flop_double=1e9, weights=1e9, cast=1e9, read=1e9, hashed=1e9)


# Plain; one projection for queries, keys and values; its gate in one with up; a plain MLP; experts.
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "qwen3_moe", "deepseek_v3"])
def test_the_arithmetic_of_a_plan_is_that_of_the_products(family):
    model = odd_model(family)
    loaded = recognise(family, model, make_tokenizer())
    spec = BuildSpec((Concept("x", IDS),), layer=3, rank=6)
    plan = plan_build(
        spec, loaded, MACHINE, streamed=False, stored_itemsize=8, digested=True, neutral_tokens=0, max_memory=1 << 30
    )
    replay = Replay(model, IDS, layer=3, profile="residual")
    with FlopCounterMode(display=False) as counted:
        replay.jvp(torch.zeros(8, *replay.shape, dtype=torch.float64))
    # Mixing by the attention weights is not counted: n (heads) to d numbers. Experts are, as many as a token has.
    assert plan.flop / plan.products == pytest.approx(counted.get_total_flops() / 8, rel=0.1)


def test_a_model_without_weights_is_planned_for(tmp_path, monkeypatch):
    monkeypatch.setattr("operators.builder.machine.measure_machine", lambda *_, **__: MACHINE)
    shape = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}
    config = LlamaConfig(**shape, num_hidden_layers=80, vocab_size=128256, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    command = ["build", "big", "--text", "The golden bridge is", "--model", str(tmp_path), "--dtype", "bfloat16"]
    ran = CliRunner().invoke(app, [*command, "--rank", "64", "--stream", "--max-memory", "24GiB", "--plan", "--json"])
    assert ran.exit_code == 0, ran.output
    plan = json.loads(ran.stdout)
    assert (plan["layer"], plan["passes"], plan["products"], plan["weights_are_here"]) == (53, 4, 236, False)
    assert plan["memory"] < 24 << 30 < plan["weights"]
    # Four passes over the blocks up to the layer, and the digest of everything.
    assert plan["weights"] + 4 * plan["weights"] * 0.5 < plan["read"] < 5 * plan["weights"]
    assert plan["seconds"] == pytest.approx(sum(plan["parts"].values()), abs=1)
    refused = CliRunner().invoke(app, [*command, "--stream", "--max-memory", "1GiB", "--plan"])
    assert refused.exit_code == 1
    assert "of memory beside the program; 1.0 GiB may be used" in refused.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_elsewhere_is_planned_for_by_what_is_said_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr("operators.builder.machine.measure_machine", lambda *_, **__: MACHINE)
    config = LlamaConfig(hidden_size=512, num_hidden_layers=6, vocab_size=1000, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    command = ["build", "big", "--text", "The golden bridge is", "--model", str(tmp_path), "--device", "cuda", "--plan"]
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 1
    assert "a plan for another machine needs --device-memory, such as 80GiB" in refused.output
    plan = json.loads(CliRunner().invoke(app, [*command, "--device-memory", "8GiB", "--json"]).stdout)
    assert not plan["streamed"]
    assert plan["weights"] < plan["device_memory"] < 8 << 30
    # Less than the weights take: these are streamed.
    small = CliRunner().invoke(app, [*command, "--device-memory", f"{plan['weights'] - 1}"])
    assert "streamed in" in small.output
    assert "on the CPU here, whatever the device does" in small.output


def test_a_machine_is_measured_in_a_moment(tmp_path):
    (tmp_path / "weights").write_bytes(bytes(1 << 20))
    found = measure_machine(
        32, (256, 128), torch.float32, torch.bfloat16, [tmp_path / "weights", tmp_path / "none"], start=2.0
    )
    assert found.start == 2.0
    assert min(vars(found).values()) > 0
