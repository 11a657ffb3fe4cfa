"""How well an anchor says the words of its concept where it stands: a cheap score to choose layers by.

The logit lens: the anchor z of a layer, as the last block's output would be read, W_U (g * z/rms(z)), with g the final
norm's scale. The score is that of the concept's best word, in standard deviations over the vocabulary. One matrix
product per layer, and no text is decoded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from operators.core.header import Profile
from operators.model.loading import LoadedModel, final_norm


def accessibility(anchor: torch.Tensor, words: Sequence[str], loaded: LoadedModel, profile: Profile) -> float:
    """The largest standardised logit of a word's first token, over the words, for an anchor (d,)."""
    with torch.inference_mode():
        z = anchor.to(device=loaded.device, dtype=loaded.dtype)
        # An anchor of the profile "golden" has been through the final norm.
        read = z if profile == "golden" else final_norm(loaded.model)(z[None])[0]
        logits = loaded.model.get_output_embeddings()(read[None])[0].float()
        scores = (logits - logits.mean()) / logits.std().clamp_min(1e-12)
        ids = {token for word in words for token in _first_tokens(word, loaded) if token < len(scores)}
        return max((float(scores[token]) for token in ids), default=0.0)


def _first_tokens(word: str, loaded: LoadedModel) -> list[int]:
    """The first token of a word, and of one that follows a space, in both cases of its first letter."""
    variants = {space + form for space in ("", " ") for form in (word, word.capitalize())}
    ids = (loaded.tokenizer(variant, add_special_tokens=False)["input_ids"] for variant in variants)
    return [int(each[0]) for each in ids if each]
