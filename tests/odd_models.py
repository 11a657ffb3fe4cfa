"""A small random model of every architecture that has a table, of sizes in which nothing divides by accident.

Three query heads over one key head, a width and a vocabulary that are no powers of two, windows shorter than the texts
on some layers and not on others, four layers; of mixtures, experts that no token chooses, and dense layers among them.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

LAYERS = 4
VOCABULARY = 97
_BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 42,
    "intermediate_size": 29,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_HEAD = {"head_dim": 10}
_WINDOW = {"sliding_window": 3}
_WINDOWS = {**_WINDOW, "layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]}
_GPT2 = {"n_embd": 42, "n_layer": LAYERS, "n_head": 3, "n_positions": 64}
_BIASES = {"attention_bias": True, "attention_out_bias": True, "mlp_bias": True}
_LATENT = {"q_lora_rank": 12, "kv_lora_rank": 14, "qk_rope_head_dim": 6, "qk_nope_head_dim": 8, "v_head_dim": 10}
_GROUPS = {"n_routed_experts": 6, "n_group": 2, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
_MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.3,
    "attention_multiplier": 0.2,
    "logits_scaling": 2.0,
}
_FURTHER_FACTOR = {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 4}

ODD: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**_HEAD}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {**_HEAD}),
    "mistral": ("MistralConfig", {**_HEAD, **_WINDOW}),
    "ministral": ("MinistralConfig", {**_HEAD, **_WINDOWS}),
    "ministral3": (
        "Ministral3Config",
        {**_HEAD, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, **_FURTHER_FACTOR}},
    ),
    "smollm3": ("SmolLM3Config", {**_WINDOWS, "use_sliding_window": True, "no_rope_layers": [1, 0, 1, 1]}),
    "seed_oss": ("SeedOssConfig", {**_HEAD, **_BIASES}),
    "exaone4": ("Exaone4Config", {**_HEAD, **_WINDOWS}),
    "granite": ("GraniteConfig", _MULTIPLIERS),
    "olmo2": ("Olmo2Config", {}),
    "olmo3": ("Olmo3Config", _WINDOWS),
    "glm4": ("Glm4Config", {**_HEAD, "attention_bias": True}),
    "gemma": ("GemmaConfig", {**_HEAD}),
    "gemma2": ("Gemma2Config", {**_HEAD, **_WINDOWS, "query_pre_attn_scalar": 10, "attn_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3TextConfig", {**_HEAD, **_WINDOWS, "query_pre_attn_scalar": 10}),
    "cohere2": ("Cohere2Config", {**_HEAD, **_WINDOWS}),
    # The width is the number of heads times their size, of which a part of even size is turned.
    "stablelm": (
        "StableLmConfig",
        {"hidden_size": 48, "use_parallel_residual": True, "qk_layernorm": True, "use_qkv_bias": True},
    ),
    "nemotron": ("NemotronConfig", {**_HEAD}),
    "starcoder2": ("Starcoder2Config", {**_WINDOW, "use_bias": True}),
    "phi3": ("Phi3Config", {**_WINDOW}),
    "gpt2": ("GPT2Config", _GPT2),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**_HEAD, "num_experts": 9, "num_experts_per_tok": 2, "moe_intermediate_size": 11, "mlp_only_layers": [1]},
    ),
    "mixtral": ("MixtralConfig", {**_WINDOW, "num_local_experts": 3, "num_experts_per_tok": 2}),
    "olmoe": ("OlmoeConfig", {"num_experts": 9, "num_experts_per_tok": 2}),
    "deepseek_v3": (
        "DeepseekV3Config",
        {**_LATENT, **_GROUPS, "num_key_value_heads": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 11},
    ),
    "gpt_oss": (
        "GptOssConfig",
        {**_HEAD, **_WINDOWS, "num_local_experts": 3, "num_experts_per_tok": 2, "swiglu_limit": 1.0},
    ),
}


def odd_config(name: str, **options: Any) -> Any:
    """The configuration of that odd model, with other ``options``."""
    kind, own = ODD[name]
    return getattr(transformers, kind)(**{**_BASE, **own, **options})


def odd_model(name: str, **options: Any) -> PreTrainedModel:
    """That model in float64, computed with its own (eager) attention; the same numbers every time.

    Weights are large, and norms not all ones: gates open, attention prefers, routers choose, limits are met.
    """
    with torch.random.fork_rng():
        torch.manual_seed(sum(name.encode()))
        model = AutoModelForCausalLM.from_config(odd_config(name, **options), attn_implementation="eager")
        draw_weights(model, around_zero=name.startswith("gemma"))
    if model._can_set_experts_implementation():
        # The others are not for float64.
        model.set_experts_implementation("eager")
    return model.double().eval().requires_grad_(False)


def draw_weights(model: PreTrainedModel, *, around_zero: bool) -> None:
    """Draws every weight; ``around_zero``: norms weigh by 1 + w."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            zero = around_zero or name.endswith(("bias", "sinks"))
            torch.nn.init.normal_(parameter, mean=0.0 if zero else 1.0, std=0.3)
        elif any(part in name for part in ("embed", "wte", "wpe")):
            torch.nn.init.normal_(parameter, std=1.0)
        else:
            torch.nn.init.normal_(parameter, std=1.5 / parameter.shape[-1] ** 0.5)
