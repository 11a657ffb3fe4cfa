"""What of vLLM cannot be steered yet, by the names of its options. Refused at the start, here and in every worker."""

from __future__ import annotations

from typing import Any


def check_supported(config: Any) -> None:
    """Raises :class:`ValueError` for a vLLM configuration that the worker does not steer."""
    parallel, graphs = config.parallel_config, config.compilation_config.cudagraph_mode
    refused = {
        "pipeline_parallel_size above 1": parallel.pipeline_parallel_size > 1,
        # Calls to the workers reach one engine of several.
        "data_parallel_size above 1 (run several servers)": parallel.data_parallel_size > 1,
        "prefill_context_parallel_size above 1": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        # What a connector stores is found by token ids alone: steered and plain requests would share it.
        "kv_transfer_config": config.kv_transfer_config is not None,
        "kv_sharing_fast_prefill": bool(config.cache_config.kv_sharing_fast_prefill),
        "logprobs_mode other than raw_logprobs": config.model_config.logprobs_mode != "raw_logprobs",
        "speculative_config": config.speculative_config is not None,
        "enable_lora": config.lora_config is not None,
        "enable_prompt_embeds": config.model_config.enable_prompt_embeds,
        "sequence-parallel mixtures of experts": parallel.use_sequence_parallel_moe,
        "enable_dbo": parallel.use_ubatching,
        # A graph of the whole model would replay the pushes of the step that it was captured in.
        "full CUDA graphs (cudagraph_mode PIECEWISE is)": graphs is not None and graphs.has_full_cudagraphs(),
    }
    found = [name for name, wanted in refused.items() if wanted]
    if found:
        raise ValueError(f"steering does not support {', '.join(found)}")
