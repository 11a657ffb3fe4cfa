"""Trials against a loop that recomputes everything, in float64, one text at a time."""

import functools

import pytest
import torch

from operators.builder.build import build_operator
from operators.builder.concept import concept_from_text
from operators.builder.spec import BuildSpec
from operators.core.apply import Setting, prepare
from operators.core.artifact import make_artifact
from operators.core.errors import SteeringError, TrialError
from operators.core.positions import Positions
from operators.model.loading import block_input, decoder_layers, embed
from operators.tune.continuations import ContinuationRequest, Injection, decode_continuations

PROMPTS = ["The bay", "Here is a painting of the bridge in San Francisco", "My"]
SETTINGS = [
    Setting(0.9, "cumulative", 0.0),
    Setting(0.7, "substitute", 0.5),
    Setting(-0.8, "cumulative", 1.0),
    Setting(0.9, "cumulative", 0.0, Positions.parse("first")),
    Setting(0.9, "cumulative", 0.25, Positions.parse("generated:1..3")),
    Setting(-0.8, "substitute", 0.0, Positions.parse("1..")),
]
PUSHED = {
    "all": lambda k, n: True,
    "first": lambda k, n: k == 0,
    "generated:1..3": lambda k, n: n + 1 <= k < n + 3,
    "1..": lambda k, n: k >= 1,
}
"""Whether position k is pushed in a text whose prompt has n tokens."""
TOKENS = 5


@pytest.fixture(scope="module")
def model(tiny):
    """``model(family)``: a tiny model with a head of its own. Tied to its embeddings, each would repeat one token."""

    @functools.cache
    def make(family):
        loaded = tiny(family, fresh=True)
        head = torch.nn.Linear(loaded.hidden_size, 320, bias=False, dtype=loaded.dtype).requires_grad_(False)
        torch.nn.init.normal_(head.weight, std=0.3, generator=torch.Generator().manual_seed(3))
        loaded.model.set_output_embeddings(head)
        loaded.model.generation_config.eos_token_id = None
        return loaded

    return make


def _artifact(loaded, layer=2, profile="residual"):
    # Short: a sliding window of 3 tokens must not leave its first block empty.
    concept = concept_from_text("The bay", loaded)
    return build_operator(BuildSpec((concept,), profile, layer=layer, rank=6), loaded)


def _ids(loaded, text):
    return tuple(loaded.tokenizer(text)["input_ids"])


def _pushed(artifact, setting, x):
    """(lambda/2) d_k/|d_k| of every position, (T, d), from the equations, in float64."""
    blocks, y, n = artifact.jacobian().double(), artifact.anchor.double(), artifact.positions
    a = torch.zeros_like(y) if artifact.offset is None else artifact.offset.double()
    directions = []
    for k, one in enumerate(x.double()):
        a = a + blocks[k % n] @ one
        b = a if setting.rule == "cumulative" else artifact.substitute_base.double() + blocks[-1] @ one
        d = (1 - setting.blend) * b / b.norm() + setting.blend * y / y.norm()
        directions.append(setting.strength / 2 * d / d.norm())
    return torch.stack(directions)


def _logits(loaded, artifact, setting, ids, prompt_tokens):
    """The model's logits (V,) after ``ids``, everything computed anew."""
    model, layer = loaded.model, artifact.header.injection_layer
    push = _pushed(artifact, setting, block_input(model, embed(model, torch.tensor(ids)))) if setting else None
    for k in range(len(ids) if setting else 0):
        push[k] *= PUSHED[str(setting.positions)](k, prompt_tokens)

    def hook(_module, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        hidden = hidden if push is None else hidden + hidden.norm(dim=-1, keepdim=True) * push
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    handle = decoder_layers(model)[layer].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double()
    finally:
        handle.remove()


def _slowly(loaded, artifact, setting, prompt, tokens=TOKENS):
    ids, kl, logprobs = list(prompt), [], []
    for _ in range(tokens):
        q = _logits(loaded, artifact, setting, ids, len(prompt)).log_softmax(-1)
        p = _logits(loaded, artifact, None, ids, len(prompt)).log_softmax(-1)
        ids.append(int(q.argmax()))
        kl.append(float((p.exp() * (p - q)).sum()))
        logprobs.append(float(p[ids[-1]]))
    return tuple(ids[len(prompt) :]), kl, logprobs


@pytest.mark.parametrize(
    ("family", "profile"),
    [("llama", "golden"), ("gpt2", "residual"), ("gemma3", "residual"), ("mistral", "residual"), ("qwen2", "golden")],
)
def test_a_batch_of_everything_is_what_a_loop_that_recomputes_everything_gives_one_by_one(model, family, profile):
    loaded = model(family)
    artifacts = {layer: _artifact(loaded, layer, profile) for layer in (1, 3)}
    cases = [
        (artifact, setting, _ids(loaded, prompt))
        for artifact in artifacts.values()
        for setting in (None, *SETTINGS)
        for prompt in PROMPTS
    ]
    prepared = {layer: prepare(artifact, loaded.device) for layer, artifact in artifacts.items()}
    rows = [
        ContinuationRequest(
            ids, setting and Injection(prepared[artifact.header.layer], artifact.header.injection_layer, setting)
        )
        for artifact, setting, ids in cases
    ]
    steered_differently = 0
    for text, (artifact, setting, prompt) in zip(decode_continuations(rows, loaded, tokens=TOKENS), cases, strict=True):
        ids, kl, logprobs = _slowly(loaded, artifact, setting, prompt)
        assert text.ids == ids
        # Pushes are worked out in float32.
        assert text.kl == pytest.approx(kl, rel=2e-4, abs=2e-5)
        assert text.logprobs == pytest.approx(logprobs, rel=2e-4, abs=2e-4)
        # A push of some positions alone may be out of the window's sight.
        steered_differently += setting in SETTINGS[:3] and max(kl) > 0.01
    assert steered_differently == 2 * 3 * len(PROMPTS)


def test_how_rows_are_batched_changes_nothing(model):
    loaded = model("gemma3")
    artifact = _artifact(loaded)
    operator = prepare(artifact, loaded.device)
    rows = [
        ContinuationRequest(_ids(loaded, prompt), Injection(operator, 2, setting))
        for prompt in PROMPTS
        for setting in SETTINGS
    ]
    rows.insert(5, ContinuationRequest(_ids(loaded, PROMPTS[1])))
    counted = []
    one_by_one = decode_continuations(rows, loaded, tokens=TOKENS, texts_per_batch=1)
    for size in (3, 5, 64):
        counted.clear()
        for text, alone in zip(
            decode_continuations(rows, loaded, tokens=TOKENS, texts_per_batch=size, on_batch=counted.append),
            one_by_one,
            strict=True,
        ):
            assert text.ids == alone.ids
            assert text.kl == pytest.approx(alone.kl, rel=1e-4, abs=1e-6)
        assert sum(counted) == len(rows)
        assert max(counted) == min(size, len(rows))


def test_a_plain_row_is_what_the_model_generates_and_is_at_no_distance_from_itself(model):
    loaded = model("llama")
    ids = _ids(loaded, PROMPTS[1])
    (text,) = decode_continuations([ContinuationRequest(ids)], loaded, tokens=TOKENS)
    expected = loaded.model.generate(torch.tensor([ids]), max_new_tokens=TOKENS, do_sample=False)[0, len(ids) :]
    assert text.ids == tuple(expected.tolist())
    assert set(text.kl) == {0.0}


def test_a_text_ends_with_the_token_that_ends_it_and_the_others_go_on(model, monkeypatch):
    loaded = model("llama")
    rows = [ContinuationRequest(_ids(loaded, prompt)) for prompt in PROMPTS]
    before = decode_continuations(rows, loaded, tokens=TOKENS)
    end = before[0].ids[2]
    monkeypatch.setattr(loaded.model.generation_config, "eos_token_id", [end, 319])
    after = decode_continuations(rows, loaded, tokens=TOKENS)
    for old, new in zip(before, after, strict=True):
        stop = old.ids.index(end) + 1 if end in old.ids else TOKENS
        assert new.ids == old.ids[:stop]
        assert len(new.kl) == len(new.logprobs) == stop
    assert len(after[0].ids) <= 3


def test_the_model_is_left_as_it_was_even_after_an_error(tiny):
    loaded = tiny("llama", fresh=True)
    row = ContinuationRequest(
        _ids(loaded, "My"), Injection(prepare(_artifact(loaded), loaded.device), 2, Setting(1e38, "cumulative", 0.0))
    )
    with pytest.raises(SteeringError):
        decode_continuations([row], loaded, tokens=2)
    assert not any(block._forward_pre_hooks for block in decoder_layers(loaded.model))


@pytest.mark.parametrize("strength", [0.0, 1e-12])
def test_a_push_that_does_nothing_is_an_error(tiny, strength):
    loaded = tiny("llama", dtype="float32")
    push = Injection(prepare(_artifact(loaded), loaded.device), 2, Setting(strength, "cumulative", 0.0))
    with pytest.raises(
        SteeringError, match=rf"strength {strength:g}, cumulative, blend 0 at .* 2 moved a hidden state by 0"
    ):
        decode_continuations(
            [ContinuationRequest(_ids(loaded, "My")), ContinuationRequest(_ids(loaded, "My"), push)], loaded, tokens=2
        )


def test_a_direction_that_is_zero_names_the_setting(tiny):
    loaded = tiny("llama")
    built = _artifact(loaded)
    # A prompt's first token meets the first block.
    blocks = built.factors.clone()
    blocks[0] = 0
    operator = make_artifact(
        built.header,
        blocks,
        built.anchor,
        built.substitute_base,
        built.offset,
        basis=built.basis,
        neutral=built.neutral,
    )
    push = Injection(prepare(operator, loaded.device), 1, SETTINGS[0])
    with pytest.raises(
        SteeringError, match=r"strength 0\.9, cumulative, blend 0 at .* block 1: .* position 0 has norm 0"
    ):
        decode_continuations([ContinuationRequest(_ids(loaded, "My"), push)], loaded, tokens=2)


def test_a_layer_that_the_model_does_not_call_is_an_error(tiny, monkeypatch):
    loaded = tiny("llama", fresh=True)
    push = Injection(prepare(_artifact(loaded), loaded.device), 2, SETTINGS[0])
    monkeypatch.setattr(
        "operators.tune.continuations.decoder_layers", lambda _model: torch.nn.ModuleList([torch.nn.Identity()] * 4)
    )
    with pytest.raises(SteeringError, match="layer 2 was not reached"):
        decode_continuations([ContinuationRequest(_ids(loaded, "My"), push)], loaded, tokens=2)


def test_a_plain_model_that_is_broken_is_named(tiny):
    loaded = tiny("llama", fresh=True)
    loaded.model.get_output_embeddings().weight[3] = torch.nan
    with pytest.raises(TrialError, match="plain model's logits are not finite"):
        decode_continuations([ContinuationRequest(_ids(loaded, "My"))], loaded, tokens=2)


@pytest.mark.parametrize("length", [0, 60])
def test_a_prompt_that_does_not_fit_is_refused(tiny, length):
    with pytest.raises(TrialError, match=rf"prompt has {length} tokens; tiny-llama takes 1 to 59 with 5 more"):
        decode_continuations([ContinuationRequest((5,) * length)], tiny("llama"), tokens=TOKENS)
