"""The decoder of text in a checkpoint: all of it, or the part of one that reads images too.

A model of images and text has a decoder of text in it, with a configuration of its own, which is the same as that of a
model of text alone. That part is loaded as such a model, without the rest: given text, the whole would compute nothing
else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from operators.core.errors import ModelError

_HOLDERS = frozenset({"gemma3", "internvl", "llava", "llava_next", "mistral3"})
"""Kinds of models whose decoder computes from text what the model of text alone does."""
_NAMES = {
    r"^model\.language_model\.": "model.",
    r"^language_model\.model\.": "model.",
    r"^language_model\.lm_head\.": "lm_head.",
}
"""From the names of tensors in such a checkpoint, of any version of transformers, to those of the model of text."""


@dataclass(frozen=True, eq=False)
class TextDecoder:
    """The configuration that a model of text is made of, and how the checkpoint names its tensors."""

    config: Any
    names: Mapping[str, str] = field(default_factory=dict)
    """Patterns of names in the checkpoint, and what stands for them in the model."""


def read_decoder(name: str, source: str, revision: str) -> TextDecoder:
    """The decoder of the checkpoint at ``source``, from its configuration alone.

    Raises:
        ModelError: it is of a kind that has none, or of one that is not known to compute from text what its decoder
            alone does.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig

    config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    if config.model_type not in _HOLDERS:
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ModelError(
                f"model {name!r}: its configuration is of the kind {config.model_type!r}, which is no decoder of text; "
                f"decoders inside of {', '.join(sorted(_HOLDERS))} are accepted, and by themselves those that "
                "docs/ARCHITECTURES.md lists"
            )
        return TextDecoder(config)
    stored, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
    text = config.get_text_config()
    if (tied := stored_tie(stored)) is not None:
        text.tie_word_embeddings = tied
    return TextDecoder(text, _NAMES)


def stored_tie(config: Mapping[str, Any]) -> bool | None:
    """Whether a stored configuration ties head and embedding table: the whole model, else its text; None if neither."""
    for place in (config, config.get("text_config")):
        if isinstance(place, Mapping) and isinstance(place.get("tie_word_embeddings"), bool):
            return bool(place["tie_word_embeddings"])
    return None
