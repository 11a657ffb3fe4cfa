"""What is refused of vLLM's configuration and of devices. No vLLM is needed."""

from types import SimpleNamespace

import pytest

from steer_server.engine.vllm.limits import check_device, check_supported


class Graphs:
    """A mode of CUDA graphs: ``parts`` are PIECEWISE, FULL, both or none."""

    def __init__(self, *parts):
        self.parts = parts

    def has_full_cudagraphs(self):
        return "FULL" in self.parts

    def requires_piecewise_compilation(self):
        return "PIECEWISE" in self.parts


def _config(**changed):
    """A configuration that is steered, with parts of it changed: ``parallel_config__enable=1``."""
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=1,
            data_parallel_size=1,
            prefill_context_parallel_size=1,
            use_sequence_parallel_moe=False,
            use_ubatching=False,
        ),
        compilation_config=SimpleNamespace(cudagraph_mode=Graphs("PIECEWISE")),
        model_config=SimpleNamespace(
            logprobs_mode="raw_logprobs",
            enable_prompt_embeds=False,
            runner_type="generate",
            is_encoder_decoder=False,
            max_model_len=4096,
            hf_text_config=SimpleNamespace(rope_parameters={"rope_type": "default"}),
        ),
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=False),
        offload_config=SimpleNamespace(
            offload_backend="auto",
            uva=SimpleNamespace(cpu_offload_gb=0),
            prefetch=SimpleNamespace(offload_group_size=0),
        ),
        kv_transfer_config=None,
        speculative_config=None,
        diffusion_config=None,
        lora_config=None,
    )
    for path, value in changed.items():
        *parts, name = path.split("__")
        owner = config
        for part in parts:
            owner = getattr(owner, part)
        setattr(owner, name, value)
    return config


@pytest.fixture(autouse=True)
def no_uva(monkeypatch):
    """As in WSL: weights that are kept on the host are fetched in every pass."""
    monkeypatch.delenv("VLLM_USE_BREAKABLE_CUDAGRAPH", raising=False)
    monkeypatch.setattr("steer_server.engine.vllm.limits._reads_host_memory", lambda: False)


def test_what_is_steered_is_accepted():
    check_supported(_config())
    check_supported(_config(compilation_config__cudagraph_mode=None))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"parallel_config__pipeline_parallel_size": 2}, "pipeline_parallel_size"),
        ({"parallel_config__data_parallel_size": 2}, "data_parallel_size"),
        ({"parallel_config__prefill_context_parallel_size": 2}, "prefill_context_parallel_size"),
        ({"parallel_config__use_sequence_parallel_moe": True}, "sequence-parallel"),
        ({"parallel_config__use_ubatching": True}, "enable_dbo"),
        ({"kv_transfer_config": object()}, "kv_transfer_config"),
        ({"cache_config__kv_sharing_fast_prefill": True}, "kv_sharing_fast_prefill"),
        ({"model_config__logprobs_mode": "processed_logits"}, "logprobs_mode"),
        ({"model_config__enable_prompt_embeds": True}, "enable_prompt_embeds"),
        ({"model_config__runner_type": "pooling"}, "models that do not generate"),
        ({"model_config__is_encoder_decoder": True}, "encoder-decoder models"),
        ({"speculative_config": object()}, "speculative_config"),
        ({"diffusion_config": object()}, "diffusion_config"),
        ({"lora_config": object()}, "enable_lora"),
        ({"compilation_config__cudagraph_mode": Graphs("FULL", "PIECEWISE")}, "full CUDA graphs"),
        ({"offload_config__offload_backend": "prefetch"}, "offload_backend=prefetch"),
        ({"offload_config__prefetch__offload_group_size": 8}, "offload_backend=prefetch"),
        ({"offload_config__uva__cpu_offload_gb": 4}, "cpu_offload_gb without UVA"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_steered_is_refused_by_name(changed, said):
    with pytest.raises(ValueError, match=f"^steering does not support {said}[^,]*$"):
        check_supported(_config(**changed))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_latent_attention_is_refused_on_a_cpu(device):
    config = _config(model_config__use_mla=True)
    config.device_config = SimpleNamespace(device_type=device)
    if device == "cuda":
        check_supported(config)
        return
    with pytest.raises(ValueError, match=r"does not support latent attention \(MLA\) on a CPU$"):
        check_supported(config)


def test_breakable_graphs_are_refused_where_graphs_are_captured(monkeypatch):
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
    check_supported(_config(compilation_config__cudagraph_mode=Graphs()))
    with pytest.raises(ValueError, match=r"does not support VLLM_USE_BREAKABLE_CUDAGRAPH=1$"):
        check_supported(_config())


def test_weights_on_the_host_that_the_device_reads_itself_are_accepted(monkeypatch):
    monkeypatch.setattr("steer_server.engine.vllm.limits._reads_host_memory", lambda: True)
    check_supported(_config(offload_config__uva__cpu_offload_gb=4))


def test_a_device_that_the_installed_vllm_does_not_compute_on_is_refused():
    check_device(None, "cuda")
    check_device("cpu", "cpu")
    with pytest.raises(ValueError, match=r"^device: .* computes on 'cpu', not on 'cuda'"):
        check_device("cuda", "cpu")


@pytest.mark.parametrize(
    ("rope", "length", "refused"),
    [
        ({"rope_type": "longrope", "original_max_position_embeddings": 4096}, 4096, False),
        ({"rope_type": "longrope", "original_max_position_embeddings": 4096}, 4097, True),
        ({"full": {"rope_type": "longrope", "original_max_position_embeddings": 512}, "other": None}, 4096, True),
        ({"rope_type": "dynamic", "factor": 2.0}, 2048, False),
        ({"rope_type": "dynamic", "factor": 2.0}, 4096, True),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}, 4096, False),
        (None, 4096, False),
    ],
)
def test_texts_of_other_rotary_factors_than_their_own_are_refused(rope, length, refused):
    text = SimpleNamespace(rope_parameters=rope, max_position_embeddings=2048)
    config = _config(model_config__hf_text_config=text, model_config__max_model_len=length)
    if not refused:
        check_supported(config)
        return
    with pytest.raises(ValueError, match=r"max_model_len above \d+ for this model, whose rotary factors"):
        check_supported(config)


@pytest.mark.parametrize(
    ("model", "length"),
    [
        (
            {
                "model_type": "ministral3",
                "rope_parameters": {
                    "rope_type": "yarn",
                    "llama_4_scaling_beta": 0.1,
                    "original_max_position_embeddings": 512,
                },
            },
            512,
        ),
        ({"model_type": "cohere2", "sliding_window": 256, "rope_parameters": {"rope_type": "default"}}, 256),
    ],
    ids=["ministral3", "cohere2"],
)
def test_a_model_is_served_no_further_than_vllm_computes_what_it_is(model, length):
    config = _config(model_config__hf_text_config=SimpleNamespace(**model), model_config__max_model_len=length)
    check_supported(config)
    config.model_config.max_model_len = length + 1
    with pytest.raises(ValueError, match=rf"max_model_len above {length} for this model, which .* engine hf"):
        check_supported(config)
