"""Builds on models whose blocks are read from the files one at a time."""

import functools
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from operators.__main__ import app
from operators.builder.build import build_operator
from operators.builder.concept import Concept
from operators.builder.memory import block_bytes
from operators.builder.spec import BuildSpec, estimate_memory, resolve_spec
from operators.core.errors import BuildError, ModelError
from operators.core.header import NeutralTexts
from operators.maps.streamed_map import StreamedMap
from operators.maps.sweeps import Sweeps, record_texts
from operators.model.digest_cache import keep_digest
from operators.model.loading import load_model
from tests.odd_models import odd_model
from tests.tiny_tokenizer import make_tokenizer

LAYER = 3
TEXTS = (Concept("one", (5, 7, 9)), Concept("two", (3, 2, 13, 8)))
SPEC = BuildSpec(TEXTS[:1], layer=LAYER, rank=7, neutral=NeutralTexts(digest=f"sha256:{'0' * 64}", ids=((3, 4), (7,))))
TENSORS = ("anchor", "substitute_base", "offset", "neutral")


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """``stored(family)``: the directory of that odd model, in float64."""

    @functools.cache
    def save(family):
        directory = tmp_path_factory.mktemp(f"odd-{family}")
        odd_model(family).save_pretrained(directory)
        make_tokenizer().save_pretrained(directory)
        return str(directory)

    return save


def jacobian(artifact):
    return artifact.factors if artifact.basis is None else artifact.basis @ artifact.factors


# Plain; tied, with other norms; biases and learned positions; fused projections; experts put together of many tensors.
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "phi3", "qwen3_moe", "gpt_oss"])
def test_a_streamed_build_is_the_build_in_memory(family, stored):
    streamed = load_model(stored(family), dtype="float64", stream=True)
    whole = load_model(stored(family), dtype="float64")
    assert streamed.fingerprint == whole.fingerprint
    for change in ({}, {"profile": "golden", "layer": 4}, {"texts": TEXTS}, {"rank": "full"}):
        spec = replace(SPEC, **change)
        found, expected = build_operator(spec, streamed), build_operator(spec, whole)
        for name in TENSORS:
            one, other = getattr(found, name), getattr(expected, name)
            assert (one is None) == (other is None)
            assert one is None or float((one - other).norm()) <= 1e-12 * float(other.norm())
        # Not the basis and the factors by themselves: a singular vector has either sign.
        ours, theirs = jacobian(found), jacobian(expected)
        assert float((ours - theirs).norm()) <= 1e-11 * float(theirs.norm())
        assert found.header.reconstruction_error <= 1e-13
        if expected.header.low_rank is not None:
            assert found.header.low_rank.residuals == pytest.approx(expected.header.low_rank.residuals, rel=1e-12)


def test_a_router_that_is_computed_in_float32_rounds_by_the_number_of_rows(stored):
    """DeepSeek V3 multiplies by its router's weights in float32, in a float64 model too."""
    streamed, whole = (load_model(stored("deepseek_v3"), dtype="float64", stream=stream) for stream in (True, False))
    found, expected = (build_operator(SPEC, loaded) for loaded in (streamed, whole))
    for one, other in zip(*((made.anchor, jacobian(made)) for made in (found, expected)), strict=True):
        assert float((one - other).norm()) <= 1e-12 * float(other.norm())
    # Neutral texts are side by side with others here, and not there.
    assert float((found.neutral - expected.neutral).norm()) <= 1e-6 * float(expected.neutral.norm())
    router, x = whole.model.model.layers[1].mlp.gate, torch.randn(7, 42, dtype=torch.float64)
    together, alone = router(x)[0], torch.cat([router(row[None])[0] for row in x])
    assert together.dtype == torch.float32
    assert 0 < float((together - alone).norm()) <= 1e-6 * float(alone.norm())


@pytest.mark.parametrize("profile", ["residual", "golden"])
def test_pushes_and_pulls_are_adjoint(profile, stored):
    loaded = load_model(stored("qwen3_moe"), dtype="float64", stream=True)
    sweeps = Sweeps(loaded, layer=LAYER, profile=profile, vectors_per_pass=2)
    streamed = StreamedMap(sweeps, record_texts(sweeps, [text.ids for text in TEXTS], []).texts, [0.3, 0.7])
    generator = torch.Generator().manual_seed(0)
    tangents = torch.randn(5, *streamed.shape, generator=generator, dtype=torch.float64)
    cotangents = torch.randn(5, streamed.shape[1], generator=generator, dtype=torch.float64)
    kept = tangents.clone(), cotangents.clone()
    pushed = (streamed.jvp(tangents) * cotangents).sum()
    assert float(pushed) == pytest.approx(float((streamed.vjp(cotangents) * tangents).sum()), rel=1e-12)
    assert torch.equal(tangents, kept[0])
    assert torch.equal(cotangents, kept[1])


def test_one_block_is_in_memory_at_a_time_and_none_beyond_the_layer(stored, monkeypatch):
    loaded = load_model(stored("llama"), dtype="float64", stream=True)
    blocks, visited = loaded.model.model.layers, []

    def with_weights():
        return [index for index, block in enumerate(blocks) if not any(weight.is_meta for weight in block.parameters())]

    inner = loaded.blocks._load
    monkeypatch.setattr(loaded.blocks, "_load", lambda part: (inner(part), visited.append((part, with_weights()))))
    build_operator(replace(SPEC, layer=2), loaded)
    # Record, pull, push, pull.
    assert [part for part, _ in visited] == [0, 1, 1, 0, 0, 1, 1, 0]
    assert all(present == [part] for part, present in visited)
    assert with_weights() == []
    assert loaded.model.lm_head.weight.is_meta


def test_a_block_is_run_four_times_to_record_a_short_text(stored):
    loaded = load_model(stored("llama"), dtype="float64", stream=True)
    runs = []
    for index, block in enumerate(loaded.model.model.layers):
        block.self_attn.register_forward_hook(lambda *_, index=index: runs.append(index))
    sweeps = Sweeps(loaded, layer=LAYER, profile="residual")
    # Plain texts side by side; recorded, which its gradients are checked with; their replay; c and the rest.
    record_texts(sweeps, [TEXTS[0].ids], [(3, 4), (7,)])
    assert runs == [index for index in range(LAYER) for _ in range(4)]


def test_a_bfloat16_model_is_recorded_as_such_and_multiplied_in_float32(stored):
    streamed, whole = (load_model(stored("llama"), dtype="bfloat16", stream=stream) for stream in (True, False))
    found, expected = (build_operator(SPEC, loaded) for loaded in (streamed, whole))
    assert found.factors.dtype == torch.float32
    assert float((jacobian(found) - jacobian(expected)).norm()) <= 1e-4 * float(jacobian(expected).norm())
    # The numbers that count are those of the files, and not their rounding.
    assert streamed.fingerprint == whole.fingerprint


def test_the_bound_of_a_streamed_build_has_what_stays_of_the_model(stored):
    loaded = load_model(stored("llama"), dtype="float64", stream=True)
    estimate = estimate_memory(SPEC, loaded, LAYER, 7, streamed=True)
    table = loaded.model.get_input_embeddings().weight
    assert estimate.fixed > block_bytes(loaded) + table.numel() * table.itemsize
    assert resolve_spec(SPEC, loaded, max_memory=estimate.fixed + estimate.per_row).vectors_per_pass == 1
    with pytest.raises(BuildError, match="beside the program"):
        resolve_spec(SPEC, loaded, max_memory=estimate.fixed)


def test_a_model_that_does_not_fit_is_streamed_by_itself_or_refused(stored, monkeypatch):
    monkeypatch.setattr("operators.model.preflight.free_memory", lambda _device: 1 << 10)
    assert load_model(stored("llama"), dtype="float64", stream=None).blocks is not None
    with pytest.raises(ModelError, match="may be used"):
        load_model(stored("llama"), dtype="float64", stream=False)
    monkeypatch.undo()
    assert load_model(stored("llama"), dtype="float64", stream=None).blocks is None


def test_a_kept_digest_is_not_computed_again(stored, monkeypatch):
    first = load_model(stored("llama"), dtype="float64", stream=True)
    monkeypatch.setattr("operators.model.digest_cache._SETTLED_NS", -(1 << 62))
    keep_digest(first.files, first.blocks.digest())
    monkeypatch.setattr("operators.model.block_weights.BlockWeights.digest", lambda _: pytest.fail("read again"))
    assert load_model(stored("llama"), dtype="float64", stream=True).fingerprint == first.fingerprint


def test_what_cannot_be_streamed_is_refused_by_name(stored, tmp_path):
    whole = odd_model("llama")
    whole.config.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    torch.save(whole.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin is no safetensors file"):
        load_model(str(tmp_path), stream=True)
    (tmp_path / "pytorch_model.bin").unlink()
    whole.model.layers[2].mlp.up_proj = None
    whole.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"has no model\.layers\.2\.mlp\.up_proj\.weight"):
        load_model(str(tmp_path), stream=True)


def test_the_command_streams_where_it_is_asked_to(tiny_directory, tmp_path):
    command = ["build", "one", "--text", "The golden bridge", "--model", str(tiny_directory("llama")), "--layer", "2"]
    built = CliRunner().invoke(app, [*command, "--rank", "5", "--stream", "--store", str(tmp_path), "--json"])
    assert built.exit_code == 0, built.output
    refused = CliRunner().invoke(app, [*command, "--stream", "--calibrate", "--words", "golden"])
    assert refused.exit_code == 2
    assert "needs the whole model" in refused.output
