"""Small random models that read images, each with a decoder of text in it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma3Config,
    InternVLConfig,
    InternVLVisionConfig,
    LlavaConfig,
    LlavaNextConfig,
    Mistral3Config,
    PixtralVisionConfig,
    PreTrainedModel,
    SiglipVisionConfig,
)

from tests.odd_models import draw_weights

_SIGHT = {"hidden_size": 12, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
_IMAGE = {"image_size": 8, "patch_size": 4}


def _siglip() -> SiglipVisionConfig:
    return SiglipVisionConfig(**_SIGHT, **_IMAGE, vision_use_head=False)


HOLDERS: dict[str, Any] = {
    "gemma3": lambda text: Gemma3Config(text_config=text, vision_config=_siglip(), mm_tokens_per_image=4),
    "ministral3": lambda text: Mistral3Config(
        text_config=text, vision_config=PixtralVisionConfig(**_SIGHT, **_IMAGE), tie_word_embeddings=False
    ),
    "llama": lambda text: LlavaConfig(
        text_config=text, vision_config=CLIPVisionConfig(**_SIGHT, **_IMAGE), tie_word_embeddings=False
    ),
    "mistral": lambda text: LlavaNextConfig(
        text_config=text,
        vision_config=CLIPVisionConfig(**_SIGHT, **_IMAGE),
        image_grid_pinpoints=[[8, 8]],
        tie_word_embeddings=False,
    ),
    "qwen3": lambda text: InternVLConfig(
        text_config=text,
        vision_config=InternVLVisionConfig(**_SIGHT, image_size=(8, 8), patch_size=(4, 4)),
        tie_word_embeddings=False,
    ),
}


def whole_model(decoder: str, text: Any) -> PreTrainedModel:
    """A model with that decoder in it, of this configuration."""
    config = HOLDERS[decoder](text)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager")
        draw_weights(model, around_zero=config.model_type == "gemma3")
    return model.eval().requires_grad_(False)
