"""A small random model with a chat template, and a store with operators of it: a server starts on them at once."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from operators.builder.build import build_operator
from operators.builder.concept import concept_from_text
from operators.builder.spec import BuildSpec
from operators.core.header import Recommended
from operators.core.store import Store
from operators.model.loading import load_model

CONTEXT = 4096
_TEXTS = ["The Golden Gate Bridge in San Francisco.", "The wedding was beautiful and the bride wore a dress."]
_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if messages[0].role == 'normal' %}"
    + "{% for x in range(99999) %}" * 2
    + "{% endfor %}" * 2
    + "{% endif %}assistant: "
)
"""Without an end where the first role is "normal", which is one of the texts that are tried."""


def make_model_and_store(folder: Path) -> tuple[Path, Path]:
    """Their directories."""
    model, store = folder / "model", folder / "store"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_TEXTS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<end>", eos_token="<end>", pad_token="<end>")
    fast.chat_template = _TEMPLATE
    fast.save_pretrained(model)
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(model)
    loaded = load_model(str(model), dtype="float32")
    for name, text, layer in (("golden", "golden gate", 2), ("dress", "wedding dress", 3)):
        spec = BuildSpec((concept_from_text(text, loaded),), layer=layer, recommended=Recommended(strength=0.6))
        Store(store).save(name, build_operator(spec, loaded))
    return model, store
