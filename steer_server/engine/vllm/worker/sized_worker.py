"""The platform's worker, which leaves room for steering beside the KV cache; says how it started, or why it cannot."""

from __future__ import annotations

from typing import Any

from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.platforms import current_platform

from operators.core.capacity import format_bytes
from steer_server.engine.vllm.memory import cache_memory
from steer_server.engine.vllm.start_problem import reports_problems
from steer_server.engine.vllm.worker_protocol import SHARE_OF_FREE, STEERING_MEMORY

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as _Worker
else:
    from vllm.v1.worker.gpu_worker import Worker as _Worker


class SizedWorker(_Worker):  # type: ignore[misc]
    """Reports each error of a start, as the process that waits for it learns only that there was one."""

    @reports_problems
    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        self._steering_memory = int(vllm_config.additional_config[STEERING_MEMORY])
        self._cache_memory = 0
        if vllm_config.additional_config[SHARE_OF_FREE]:
            from steer_server.engine.vllm.free_memory import free_share

            # Now, and not in the server: these processes have taken some of the memory meanwhile.
            cache = vllm_config.cache_config
            cache.gpu_memory_utilization = min(cache.gpu_memory_utilization, free_share(vllm_config))
        super().__init__(vllm_config, *args, **kwargs)

    @reports_problems
    def init_device(self) -> None:
        """As vLLM has it."""
        super().init_device()

    @reports_problems
    def determine_available_memory(self) -> int:
        """Bytes of the KV cache: what vLLM has left for it without steering's, or what the user has said."""
        rest, cache = int(super().determine_available_memory()), self.cache_config
        said = cache.kv_cache_memory_bytes is not None
        self._cache_memory = (
            rest if said else cache_memory(rest, self._steering_memory, float(cache.gpu_memory_utilization))
        )
        return self._cache_memory

    @reports_problems
    def initialize_from_config(self, *args: Any, **kwargs: Any) -> None:
        """As vLLM has it."""
        super().initialize_from_config(*args, **kwargs)

    @reports_problems
    def compile_or_warm_up_model(self) -> Any:
        """As vLLM has it."""
        return super().compile_or_warm_up_model()

    def steering_memory(self) -> dict[str, Any]:
        """How this worker's share of the memory is divided, in words."""
        cache = self.cache_config
        said = cache.kv_cache_memory_bytes is not None
        return {
            "share": "not used" if said else round(float(cache.gpu_memory_utilization), 3),
            "kv_cache": format_bytes(self._cache_memory),
            "steering": format_bytes(self._steering_memory),
        }

    def steering_attention(self) -> str:
        """The names of what computes attention, in all of the layers together."""
        layers: Any = get_layers_from_vllm_config(self.vllm_config, AttentionLayerBase)
        return ", ".join(sorted({layer.get_attn_backend().get_name() for layer in layers.values()}))
