"""Configurations of vLLM that steering does not support, by the names of their options.

Refused at the start, by the server and by every worker.
"""

from __future__ import annotations

import os
from typing import Any

from operators.model.rope import rope_change_within


def check_supported(config: Any) -> None:
    """Raises :class:`ValueError` for a vLLM configuration that the worker does not steer."""
    parallel, graphs, model = config.parallel_config, config.compilation_config.cudagraph_mode, config.model_config
    captured = graphs is not None and graphs.requires_piecewise_compilation()
    refused = {
        "pipeline_parallel_size above 1": parallel.pipeline_parallel_size > 1,
        # collective_rpc reaches the workers of one engine only.
        "data_parallel_size above 1 (run several servers)": parallel.data_parallel_size > 1,
        "prefill_context_parallel_size above 1": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        # Connectors look keys and values up by token ids alone: steered and plain requests would share them.
        "kv_transfer_config": config.kv_transfer_config is not None,
        "kv_sharing_fast_prefill": bool(config.cache_config.kv_sharing_fast_prefill),
        "logprobs_mode other than raw_logprobs": model.logprobs_mode != "raw_logprobs",
        "speculative_config": config.speculative_config is not None,
        # Tokens are replaced over and over while they are denoised: no position has one embedding.
        "diffusion_config": config.diffusion_config is not None,
        "models that do not generate (runner)": model.runner_type != "generate",
        "encoder-decoder models": model.is_encoder_decoder,
        # In vLLM 0.32 a plain text is another one there when others are beside it; the engine hf serves such models.
        "latent attention (MLA) on a CPU": _has_latent_attention(model) and config.device_config.device_type == "cpu",
        "enable_lora": config.lora_config is not None,
        "enable_prompt_embeds": model.enable_prompt_embeds,
        "sequence-parallel mixtures of experts": parallel.use_sequence_parallel_moe,
        "enable_dbo": parallel.use_ubatching,
        # A graph of the whole model would replay the pushes of the step in which it was captured.
        "full CUDA graphs (cudagraph_mode PIECEWISE is)": graphs is not None and graphs.has_full_cudagraphs(),
        # Captured pieces of a breakable graph end at vLLM's own operations only, so a push would be captured.
        "VLLM_USE_BREAKABLE_CUDAGRAPH=1": captured and os.environ.get("VLLM_USE_BREAKABLE_CUDAGRAPH") == "1",
        **_rope(model),
        **_otherwise_in_vllm(model),
        **_offloading(config.offload_config),
    }
    requested = [name for name, is_requested in refused.items() if is_requested]
    if requested:
        raise ValueError(f"steering does not support {', '.join(requested)}")


def _has_latent_attention(model: Any) -> bool:
    return bool(getattr(model, "use_mla", False))


def _rope(model: Any) -> dict[str, bool]:
    """Lengths at which one set of rotary factors would do for all texts of a server, and did not for each of them."""
    change = rope_change_within(model.hf_text_config, 1, model.max_model_len)
    if change is None:
        return {}
    return {
        f"max_model_len above {change.length} for this model, whose rotary factors ({change.rope_type}) change there "
        "(the engine hf serves longer texts)": True
    }


def _otherwise_in_vllm(model: Any) -> dict[str, bool]:
    """Lengths beyond which vLLM computes something else than the model in transformers, plain."""
    config = model.hf_text_config
    kind, rope = getattr(config, "model_type", ""), getattr(config, "rope_parameters", None) or {}
    found: dict[int, str] = {}
    if rope.get("llama_4_scaling_beta") and not getattr(config, "llama_4_scaling", None):
        found[int(rope["original_max_position_embeddings"])] = "scales its queries beyond, which vLLM does not"
    if kind == "cohere2" and getattr(config, "sliding_window", None):
        found[int(config.sliding_window)] = "has a window of so many tokens, which in vLLM is one wider"
    return {
        f"max_model_len above {length} for this model, which {why} (the engine hf serves longer texts)": True
        for length, why in found.items()
        if model.max_model_len > length
    }


def _offloading(config: Any) -> dict[str, bool]:
    """Ways of offloading weights that replace the ``forward`` of a layer: its hook is then skipped, or runs twice.

    Where the device reads the host's memory itself (UVA), ``cpu_offload_gb`` replaces no ``forward``.
    """
    backend = config.offload_backend
    if backend == "auto":
        backend = "prefetch" if config.prefetch.offload_group_size > 0 else "uva"
    return {
        "offload_backend=prefetch (offload_group_size)": backend == "prefetch",
        "cpu_offload_gb without UVA": backend == "uva" and config.uva.cpu_offload_gb > 0 and not _reads_host_memory(),
    }


def _reads_host_memory() -> bool:
    # Imported late: this module is also used where vLLM is not installed.
    from vllm import envs
    from vllm.utils.platform_utils import is_uva_available

    return bool(is_uva_available()) and not envs.VLLM_WEIGHT_OFFLOADING_DISABLE_UVA


def check_device(requested: str | None, platform: str) -> None:
    """Raises :class:`ValueError` where the requested device is not the one that the installed vLLM computes on."""
    if requested is not None and requested != platform:
        raise ValueError(f"device: the vLLM that is installed computes on {platform!r}, not on {requested!r}")
