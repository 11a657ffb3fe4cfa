"""What tells one model, and one tokenizer, from another.

A model's fingerprint is ``weights-sha256:`` and a sha256 over what its map depends on: its class, the settings of its
forward pass, and every number of its weights (:mod:`operators.model.weights_digest`). Of a checkpoint, these are the
numbers in its files, whatever dtype the model is loaded in; of a model in memory, the numbers that it has, so that the
two agree where nothing was rounded, and a model that was rounded after loading is another.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from operators.core.model_fingerprint import SCHEME
from operators.model.weights_digest import weights_digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Of a model's configuration: what changes its map without changing a weight. These count with whatever value they have;
# every other setting counts where it is not what its class has by default.
_FORWARD_SETTINGS = (
    *("hidden_act", "hidden_activation", "activation_function", "rms_norm_eps", "layer_norm_epsilon"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "query_pre_attn_scalar", "attn_logit_softcapping"),
    *("layer_norm_eps", "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"),
    *("rope_parameters", "sliding_window", "layer_types", "final_logit_softcapping", "tie_word_embeddings"),
)
# What says where a model comes from, how it was trained, how it is called or what stops it, and no number of its map.
_NOT_OF_THE_MAP = frozenset(
    {
        *("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "name_or_path", "use_cache"),
        *("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "unk_token_id", "decoder_start_token_id"),
        *("id2label", "label2id", "num_labels", "problem_type", "task_specific_params", "finetuning_task", "license"),
        *("output_attentions", "output_hidden_states", "return_dict", "gradient_checkpointing", "pretraining_tp"),
        *("initializer_range", "attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"),
        *("tokenizer_class", "transformers_weights", "chunk_size_feed_forward", "is_encoder_decoder"),
    }
)
_TOKENIZER_PROBE = "The Golden Gate Bridge, 1937: café, naïve, 東京, 🌉\n\tdef f(x): return x"


def model_fingerprint(model: PreTrainedModel, *, weights: str | None = None) -> str:
    """The fingerprint of a model in memory.

    Args:
        weights: the digest of its weights where that is known, as of a checkpoint's files; None means that the
            numbers in memory are read.
    """
    config = model.config.get_text_config()
    described = json.dumps([type(model).__name__, _settings(config)], sort_keys=True, default=str)
    weights = weights_digest(model) if weights is None else weights
    return f"{SCHEME}:{hashlib.sha256(f'{described} {weights}'.encode()).hexdigest()}"


def _settings(config: Any) -> list[dict[str, Any]]:
    """The settings of the forward pass, and the others that differ from what their class has by default.

    Those that a later transformers adds have their default value in every earlier checkpoint.
    """
    default = type(config)().to_dict()
    others = {
        name: value
        for name, value in config.to_dict().items()
        if name not in _NOT_OF_THE_MAP and not name.startswith("_") and (name not in default or default[name] != value)
    }
    return [forward_settings(config), others]


def forward_settings(config: Any) -> dict[str, Any]:
    """The settings that change a model's map without changing a weight, by name."""
    return {name: getattr(config, name) for name in _FORWARD_SETTINGS if hasattr(config, name)}


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 over the vocabulary and over what the tokenizer makes of a probe text.

    An operator holds token ids, and the vocabulary says what each of them stands for. How texts are cut into tokens
    shows in the probe alone: tokenizers of one vocabulary that cut only other texts otherwise have one fingerprint.
    They give prompts other ids, for which the operators are right all the same. So what stays unseen is how texts are
    cut that the probe has no example of (a normalizer of compatibility forms, flags of added tokens), how ids become
    text again, and the template of chats: none of them changes what an id stands for.

    Not over the serialised tokenizer, which its library may write in other words in its next version; and to read every
    token's text takes seconds at each start (49152 tokens: 4 s of CPU time, 262144: 15 s).
    """
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=False)
    probe = tokenizer(_TOKENIZER_PROBE)["input_ids"]
    return f"sha256:{hashlib.sha256(f'{vocabulary}{probe}'.encode()).hexdigest()}"
