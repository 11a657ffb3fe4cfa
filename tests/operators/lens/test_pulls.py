"""The matrices of a lens against brute force: one backward pass through the detached model per number of the output."""

import pytest
import torch

from operators.core.errors import BuildError
from operators.lens.matrices import lens_matrices
from operators.lens.pulls import text_pulls
from operators.maps.detach import detached
from operators.model.loading import decoder_layers, embed

IDS = (5, 17, 60, 99, 3)


def _brute_force(loaded, ids, layer):
    """d out_t / d h_s for all t and s, (n, d, n, d), of the detached model itself."""
    model = loaded.model
    n, d = len(ids), loaded.hidden_size
    streams = []

    def keep(_module, args, kwargs):
        hidden = (args[0] if args else kwargs["hidden_states"]).detach().requires_grad_()
        streams.append(hidden)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    handle = decoder_layers(model)[layer].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with detached(model):
            out = model.get_decoder()(
                inputs_embeds=embed(model, torch.tensor([ids])), use_cache=False
            ).last_hidden_state
    finally:
        handle.remove()
    rows = [torch.autograd.grad(out[0, t, k], streams[0], retain_graph=True)[0][0] for t in range(n) for k in range(d)]
    return torch.stack(rows).view(n, d, n, d)


def test_they_are_the_sums_over_positions_that_they_claim(tiny, family):
    loaded = tiny(family)
    n = len(IDS)
    pulls, error = text_pulls(loaded.model, IDS, [1, 2])
    assert error < 1e-11
    for layer in (1, 2):
        full = _brute_force(loaded, IDS, layer)
        first = sum(full[t, :, 0] for t in range(1, n))
        others = sum(full[t, :, s] for s in range(1, n) for t in range(s, n))
        torch.testing.assert_close(pulls[layer].first, first, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(pulls[layer].others, others, atol=1e-9, rtol=1e-9)


def test_products_are_the_transposed_map(tiny, family):
    # <u, G v> = <G^T u, v>: with random u, G^T u comes out of one pass each.
    loaded = tiny(family)
    whole, _ = text_pulls(loaded.model, IDS, [2])
    probes = torch.randn(3, loaded.hidden_size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    some, error = text_pulls(loaded.model, IDS, [2], cotangents=probes)
    assert error < 1e-10
    torch.testing.assert_close(some[2].first, probes @ whole[2].first, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(some[2].others, probes @ whole[2].others, atol=1e-9, rtol=1e-9)


def test_a_lens_is_the_mean_of_its_texts(tiny):
    loaded = tiny("llama")
    texts = ("The bridge is painted.", "Here is the bay.", "A wedding")
    found = lens_matrices(texts, [2], loaded)
    each = [text_pulls(loaded.model, loaded.tokenizer(text)["input_ids"], [2])[0][2] for text in texts]
    first, others = (sum(getattr(one, kind) for one in each) / 3 for kind in ("first", "others"))
    torch.testing.assert_close(found.first[2], first, atol=1e-12, rtol=1e-12)
    for positions, expected in (("first", first), ("others", others), ("all", first + others)):
        torch.testing.assert_close(found.pull(positions, 2), expected.T.float())


def test_the_model_is_left_as_it_was(tiny):
    loaded = tiny("llama", fresh=True)
    before = {name: dict(module.__dict__) for name, module in loaded.model.named_modules()}
    text_pulls(loaded.model, IDS, [1])
    for name, module in loaded.model.named_modules():
        assert module.__dict__.keys() == before[name].keys()
        assert not module._forward_pre_hooks


def test_a_text_of_one_token_and_a_layer_that_is_not_there_are_refused(tiny):
    loaded = tiny("llama")
    with pytest.raises(BuildError, match="1 token; 2 or more"):
        lens_matrices(["a"], [2], loaded)
    for layer in (0, 4):
        with pytest.raises(BuildError, match=rf"layer {layer} of tiny-llama; 1 to 3"):
            lens_matrices(["The bridge"], [layer], loaded)
    with pytest.raises(BuildError, match="0 neutral texts"):
        lens_matrices([], [2], loaded)


def test_a_model_in_bfloat16_gives_its_lens_in_float32(tiny, family):
    loaded = tiny(family, dtype="bfloat16")
    exact, _ = text_pulls(tiny(family).model, IDS, [2])
    pulls, error = text_pulls(loaded.model, IDS, [2])
    assert error < 5e-2
    # Gates and attention of the rounded weights differ by more than rounding where large random weights are sharp.
    cosine = torch.cosine_similarity(pulls[2].first.flatten(), exact[2].first.flatten(), dim=0)
    assert float(cosine) > 0.9
