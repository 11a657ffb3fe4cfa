import copy
import dataclasses
import re
from types import MappingProxyType

import pytest
import torch
from tokenizers import normalizers, processors

import operators
from operators.builder import build as builder
from operators.builder import checks, verify
from operators.builder import spec as build_spec
from operators.builder.build import build_operator
from operators.builder.concept import Concept, check_text, concept_from_text
from operators.builder.spec import BuildSpec, check_first_token, resolve_layer
from operators.builder.verify import verify_operator
from operators.core.artifact import from_bytes, make_artifact, to_bytes
from operators.core.errors import (
    BuildError,
    ConceptError,
    IncompatibleOperatorError,
    ReconstructionError,
    UnsupportedModelError,
)
from operators.core.header import Recommended
from operators.core.positions import Positions
from operators.maps.detach import context, rules
from operators.model.loading import recognise
from operators.recipes.concept_entry import ConceptEntry
from operators.recipes.tasks import recommended_of

TEXT = "The Golden Gate Bridge"


@pytest.fixture
def built(tiny):
    """``built(family="llama", **spec)``: an operator of ``TEXT`` on a tiny model, and that model."""

    def build(family="llama", dtype="float64", **spec):
        loaded = tiny(family, dtype=dtype)
        concept = concept_from_text(TEXT, loaded)
        return build_operator(BuildSpec((concept,), **spec), loaded), loaded

    return build


@pytest.mark.parametrize("profile", ["golden", "residual"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_a_built_operator_survives_its_file_and_fits_its_model(built, family, profile):
    artifact, loaded = built(family, profile=profile)
    read = from_bytes(to_bytes(artifact), source="x")
    assert verify_operator(read, loaded) <= 1e-12
    assert read.header.reconstruction_error <= 1e-12


def test_the_header_says_what_was_built(built):
    artifact, loaded = built("qwen3", profile="golden", layer=3, recommended=Recommended(strength=-2, blend=0.5))
    header = artifact.header
    assert header.concept == TEXT
    assert header.concept_ids == tuple(loaded.tokenizer(TEXT)["input_ids"])
    assert (header.model, header.architecture) == ("tiny-qwen3", "Qwen3ForCausalLM")
    assert header.model_fingerprint == loaded.fingerprint
    assert header.tokenizer_fingerprint == loaded.tokenizer_fingerprint
    assert (header.profile, header.layer, header.injection_layer, header.num_layers) == ("golden", 3, 2, 3)
    assert (header.hidden_size, header.dtype, header.rule_set) == (32, "float64", "up-live/1")
    assert header.recommended == Recommended(strength=-2, blend=0.5)
    assert header.builder_version == operators.__version__
    assert artifact.offset is None


def test_anchor_and_base_are_those_of_the_equations(built):
    artifact, loaded = built("gemma3")
    x = loaded.model.get_input_embeddings()(torch.tensor(artifact.header.concept_ids))
    y = sum(block @ vector for block, vector in zip(artifact.factors, x, strict=True))
    torch.testing.assert_close(artifact.anchor, y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(artifact.substitute_base, y - artifact.factors[-1] @ x[-1], rtol=1e-12, atol=1e-12)


def test_building_twice_gives_the_same_numbers(built):
    first, second = built()[0], built()[0]
    assert torch.equal(first.factors, second.factors)


def test_float32_and_float64_give_the_same_operator_up_to_rounding(built):
    narrow, wide = built(dtype="float32")[0], built(dtype="float64")[0]
    assert (narrow.header.dtype, wide.header.dtype) == ("float32", "float64")
    assert float((narrow.factors.double() - wide.factors).norm() / wide.factors.norm()) < 1e-5


@pytest.mark.parametrize(("family", "layer"), [("llama", 2), ("qwen3", 2), ("gemma3", 2)])
def test_the_default_layer_is_at_two_thirds(tiny, family, layer):
    assert resolve_layer(None, "residual", tiny(family)) == layer
    assert resolve_layer(None, "golden", tiny(family)) == layer


@pytest.mark.parametrize(("profile", "last"), [("residual", 3), ("golden", 4)])
def test_layers_from_1_to_the_last_of_the_profile_are_accepted(tiny, profile, last):
    loaded = tiny("llama")
    assert [resolve_layer(layer, profile, loaded) for layer in (1, last)] == [1, last]
    for layer in (-1, 0, last + 1):
        with pytest.raises(BuildError, match=rf"layer {layer} of tiny-llama .*; 1 to {last} are accepted"):
            resolve_layer(layer, profile, loaded)


@pytest.mark.parametrize("size", [{"rank": "full"}, {"rank": 8}, {"tolerance": 0.5}])
@pytest.mark.parametrize("texts", [((1, 2),), ((1, 2), (3, 4, 5))])
def test_progress_only_grows_and_ends_at_its_end(tiny, texts, size):
    calls = []
    spec = BuildSpec(tuple(Concept("x", ids) for ids in texts), layer=1, **size)
    build_operator(spec, tiny("llama"), progress=lambda *call: calls.append(call))
    what, done, total = zip(*calls, strict=True)
    assert set(what) == {"Jacobian products"}
    assert done[-1] == total[-1]
    assert list(done) == sorted(done)


def test_an_operator_larger_than_any_reader_accepts_is_refused_before_it_is_computed(tiny, monkeypatch):
    monkeypatch.setattr(build_spec, "MAX_BYTES", 2 * 40 * 40 * 8)
    monkeypatch.setattr(builder, "exact_jacobian", None)
    with pytest.raises(BuildError, match=r"operator of 3 tokens at hidden size 40 takes 38400 bytes; at most"):
        build_operator(BuildSpec((Concept("x", (1, 2, 3)),)), tiny("llama"))


def test_memory_that_runs_out_during_a_build_is_a_build_error(tiny, monkeypatch):
    monkeypatch.setattr(builder, "exact_jacobian", lambda _map, **_: torch.empty(1 << 50))
    with pytest.raises(BuildError, match=r"there is not enough memory: [0-9]+ bytes more are needed; .*--max-memory"):
        build_operator(BuildSpec((Concept("x", (1, 2)),), rank="full"), tiny("llama"))


def test_a_dtype_that_no_artifact_has_is_refused(tiny):
    loaded = tiny("llama", dtype="float32", fresh=True)
    loaded.model.to(torch.float16)
    with pytest.raises(BuildError, match=r"torch\.float16; float32, float64, bfloat16 are accepted"):
        build_operator(BuildSpec((Concept("x", (1,)),)), loaded)


def test_a_replay_that_is_not_the_model_fails_the_build(tiny, monkeypatch):
    monkeypatch.setattr(context, "mix", lambda weights, values: 1.1 * rules.mix(weights, values))
    with pytest.raises(ReconstructionError, match=r"sum J x misses the hidden state by .* at most 1e-11"):
        build_operator(BuildSpec((Concept("x", (1, 2)),)), tiny("llama"))


def _louder(self, gate):
    return self._tape.factor(self._key[0], lambda: 1.1 * self.activation(gate))


def test_a_rule_that_changes_the_values_fails_the_build(tiny, monkeypatch):
    monkeypatch.setattr(rules.FrozenGate, "forward", _louder)
    with pytest.raises(ReconstructionError, match="detached forward pass differs from the plain one by"):
        build_operator(BuildSpec((Concept("x", (1, 2)),)), tiny("llama"))


def test_a_model_with_nan_fails_the_build(tiny):
    loaded = tiny("llama", fresh=True)
    loaded.model.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(ReconstructionError, match="is not finite in float64"):
        build_operator(BuildSpec((Concept("x", (1, 2)),)), loaded)


def test_an_architecture_without_a_table_is_refused(tiny):
    loaded = tiny("llama", fresh=True)
    loaded.model.model.layers[0].extra = torch.nn.Tanh()
    with pytest.raises(UnsupportedModelError, match="class Tanh"):
        build_operator(BuildSpec((Concept("x", (1,)),)), loaded)


# Concepts.


def test_an_empty_concept_is_refused(tiny):
    for refuse in (check_text, lambda text: concept_from_text(text, tiny("llama"))):
        with pytest.raises(ConceptError, match="has no tokens; at least one is needed"):
            refuse("")


@pytest.mark.parametrize("text", [" ", "\n\n", "\n\t", "\u3000"])
def test_white_space_that_has_tokens_is_a_text(tiny, text):
    loaded = tiny("llama")
    assert concept_from_text(text, loaded).ids == tuple(loaded.tokenizer(text)["input_ids"])


def test_a_text_of_which_the_tokenizer_leaves_nothing_is_refused(tiny):
    loaded = tiny("llama", fresh=True)
    tokenizer = copy.deepcopy(loaded.tokenizer)
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip()
    front = processors.TemplateProcessing(single="<end> $A", special_tokens=[("<end>", 0)])
    tokenizer.backend_tokenizer.post_processor = front
    stripping = dataclasses.replace(loaded, tokenizer=tokenizer)
    with pytest.raises(ConceptError, match=r"concept ' \\n' has no tokens; at least one is needed"):
        concept_from_text(" \n", stripping)


def test_a_token_without_an_embedding_is_named(tiny):
    loaded = tiny("llama", fresh=True)
    known = loaded.model.get_input_embeddings().weight.shape[0]
    tokenizer = copy.deepcopy(loaded.tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": [f"[PAD{i}]" for i in range(known)]})
    with pytest.raises(ConceptError, match=rf"which the tokenizer knows and the model does not: it has {known} embed"):
        concept_from_text(f"{TEXT} [PAD{known - 1}]", dataclasses.replace(loaded, tokenizer=tokenizer))


def test_a_concept_that_is_not_unicode_is_refused():
    with pytest.raises(ConceptError, match=r"is not Unicode text \(at character 3\)"):
        check_text("caf\udce9")


def test_a_concept_longer_than_the_context_is_refused(tiny):
    with pytest.raises(ConceptError, match=r"concept has 65 tokens; tiny-llama takes at most 64"):
        concept_from_text("!" * 65, tiny("llama"))
    assert len(concept_from_text("!" * 64, tiny("llama")).ids) == 64


# Verification.


def test_an_operator_fits_its_model_in_another_dtype_too(built, tiny):
    artifact, _ = built(dtype="float64")
    assert 1e-12 < verify_operator(artifact, tiny("llama", dtype="float32")) < 5e-5


def test_an_operator_of_one_token_fits_its_model(tiny):
    loaded = tiny("llama", dtype="float32")
    artifact = build_operator(BuildSpec((Concept("x", (7,)),)), loaded)
    assert verify_operator(artifact, loaded) < 5e-5


def _other(loaded, **fields):
    return dataclasses.replace(loaded, **fields)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda loaded: _other(loaded, fingerprint=f"sha256:{'0' * 64}"), r"model fingerprint of .* 'tiny-llama'"),
        (lambda loaded: _other(loaded, tokenizer_fingerprint=f"sha256:{'0' * 64}"), "tokenizer fingerprint of"),
    ],
)
def test_an_operator_of_another_checkpoint_or_tokenizer_is_refused(built, other, words):
    artifact, loaded = built()
    with pytest.raises(IncompatibleOperatorError, match=words):
        verify_operator(artifact, other(loaded))


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("qwen3", "number of layers of 'tiny-qwen3' is 3; the operator was built on 'tiny-llama' with 4"),
        ("gemma3", "hidden size of 'tiny-gemma3' is 48; the operator was built on 'tiny-llama' with 40"),
    ],
)
def test_an_operator_of_a_model_of_another_shape_is_refused(built, tiny, family, words):
    artifact, _ = built()
    with pytest.raises(IncompatibleOperatorError, match=words):
        verify_operator(artifact, tiny(family))


def _changed(artifact, header=None, **tensors):
    parts = {
        "factors": artifact.factors,
        "anchor": artifact.anchor,
        "substitute_base": artifact.substitute_base,
        "neutral": artifact.neutral,
        **tensors,
    }
    return make_artifact(artifact.header.model_copy(update=header or {}), **parts)


def test_an_operator_of_another_rule_set_is_refused(built):
    artifact, loaded = built()
    with pytest.raises(IncompatibleOperatorError, match=r"rule set of .* is up-live/1; .* with gate-live/1"):
        verify_operator(_changed(artifact, {"rule_set": "gate-live/1"}), loaded)


def test_a_concept_token_that_the_model_does_not_have_is_refused(built):
    artifact, loaded = built()
    ids = (320, *artifact.header.concept_ids[1:])
    with pytest.raises(IncompatibleOperatorError, match=r"token 320; 'tiny-llama' has tokens 0 to 319"):
        verify_operator(_changed(artifact, {"concept_ids": ids}), loaded)


@pytest.mark.parametrize("name", ["factors", "anchor", "substitute_base", "neutral"])
def test_an_operator_with_a_valid_digest_and_wrong_numbers_is_refused(built, name):
    artifact, loaded = built()
    wrong = _changed(artifact, **{name: getattr(artifact, name) * 1.001})
    with pytest.raises(ReconstructionError, match=r"misses the hidden state|is off by"):
        verify_operator(wrong, loaded)


def test_an_operator_of_another_layer_is_refused(built):
    artifact, loaded = built(layer=2)
    with pytest.raises(ReconstructionError, match=r"misses the hidden state by .* at layer 1"):
        verify_operator(_changed(artifact, {"layer": 1, "injection_layer": 1}), loaded)


def test_an_operator_is_not_held_to_a_finer_bound_than_its_model(built, tiny, monkeypatch):
    artifact, _ = built(dtype="float64", layer=1)
    coarse = MappingProxyType({"float64": 1e-30, "float32": 1e-29, "bfloat16": 0.2})
    monkeypatch.setattr(checks, "RECONSTRUCTION_TOLERANCE", coarse)
    monkeypatch.setattr(verify, "RECONSTRUCTION_TOLERANCE", coarse)
    with pytest.raises(ReconstructionError, match="in float32"):
        verify_operator(artifact, tiny("llama", dtype="float32"))
    assert verify_operator(artifact, tiny("llama", dtype="bfloat16")) < 0.2


def test_recognising_a_model_again_gives_the_same_fingerprints(tiny):
    loaded = tiny("gemma3")
    again = recognise("other name", loaded.model, loaded.tokenizer)
    assert (again.fingerprint, again.tokenizer_fingerprint) == (
        loaded.fingerprint,
        loaded.tokenizer_fingerprint,
    )


@pytest.mark.parametrize(
    ("profile", "given", "expected"),
    [
        ("residual", {}, (0.3, 1.0)),
        ("residual", {"strength": 0.7}, (0.7, 1.0)),
        ("residual", {"positions": Positions(end=1)}, (0.3, 1.0)),
        ("residual", {"blend": 1.0, "rule": "substitute"}, (0.3, 1.0)),
        # What speaks of the map would be given for nothing beside the anchor alone.
        ("residual", {"rule": "substitute"}, (0.5, 0.0)),
        ("residual", {"first_token": "anchor"}, (0.5, 0.0)),
        ("residual", {"blend": 0.5}, (0.5, 0.5)),
        ("golden", {}, (0.5, 0.0)),
        ("golden", {"strength": 0.7}, (0.7, 0.0)),
    ],
)
def test_the_default_is_the_contrast_anchor_and_what_speaks_of_the_map_is_as_published(tiny, profile, given, expected):
    entry = ConceptEntry(name="a", texts=("golden gate",), profile=profile, **given)
    setting = recommended_of(entry, "LlamaForCausalLM")
    assert (setting.strength, setting.blend) == expected
    assert {name: getattr(setting, name) for name in given} == given
    assert setting.anchor == "contrast"
    if not given:
        spec = BuildSpec((concept_from_text("golden gate", tiny("llama")),), profile, layer=2)
        assert build_operator(spec, tiny("llama")).header.recommended == setting


@pytest.mark.parametrize("where", ["1..", "generated", "prompt:2..", "4..9"])
def test_an_anchor_at_a_first_token_that_is_left_out_is_refused(tiny, where):
    concept = concept_from_text("golden gate", tiny("llama"))
    setting = Recommended(first_token="anchor", positions=Positions.parse(where))
    with pytest.raises(BuildError, match=rf"first_token is 'anchor', and positions {re.escape(where)} leave the first"):
        build_operator(BuildSpec((concept,), layer=2, recommended=setting), tiny("llama"))
    for fine in ("all", "first", "prompt", "..3"):
        check_first_token(setting.model_copy(update={"positions": Positions.parse(fine)}))
