"""What becomes of the options of vLLM, and of calls without an answer, with vLLM's code and without an engine."""

import asyncio
import os

import pytest
import torch

from steer_server.config import ServerConfig
from steer_server.engine.vllm.cache_salts import CacheSalts
from steer_server.engine.vllm.self_test import check_same_model
from steer_server.engine.vllm.worker_protocol import SHARE_OF_FREE, STEERING_MEMORY
from steer_server.engines import ENGINES
from steer_server.errors import EngineFailedError, StartupError

pytestmark = pytest.mark.vllm

GIB = 1 << 30


@pytest.fixture(scope="module")
def engine_config():
    """The module: importing vLLM takes seconds, and only where a test runs."""
    from steer_server.engine.vllm import engine_config as module

    return module


@pytest.fixture(scope="module")
def transformers_logprobs():
    from steer_server.engine.vllm.boot import transformers_logprobs as function

    return function


@pytest.fixture(scope="module")
def directory(llama, tiny_tokenizer, tmp_path_factory):
    """A tiny model, as vLLM finds it."""
    place = tmp_path_factory.mktemp("model")
    llama.model.save_pretrained(place)
    tiny_tokenizer.save_pretrained(place)
    return place


@pytest.fixture
def configure(engine_config, directory):
    """``configure(memory=GIB, **options)``"""
    return lambda memory=GIB, **options: engine_config.make_engine_config(str(directory), "float32", options, memory)


def test_options_that_the_constructor_takes_itself_are_handed_on(configure):
    config, told = configure(disable_log_stats=True, enable_log_requests=True, max_model_len=64)
    assert config.model_config.max_model_len == 64
    assert told == {"disable_log_stats": True, "enable_log_requests": True, "aggregate_engine_logging": False}
    assert configure()[1] == dict.fromkeys(told, False)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"max_model_len": "wide"}, "max_model_len"),
        ({"no_such": 1}, "no_such"),
        ({"additional_config": 5}, "additional_config"),
        ({"load_format": "dummy"}, "load_format"),
        ({"offload_group_size": 2}, "offload_backend=prefetch"),
        ({"runner": "pooling"}, "do not generate"),
        ({"kv_sharing_fast_prefill": True}, "kv_sharing_fast_prefill"),
    ],
    ids=str,
)
def test_options_that_are_not_accepted_are_refused_as_options(configure, given, said):
    with pytest.raises(StartupError, match=r"^engine_args") as caught:
        configure(**given)
    assert said in str(caught.value)


@pytest.mark.parametrize("error", [NotImplementedError("no"), AssertionError(), KeyError("x"), RuntimeError("no")])
def test_whatever_vllm_raises_is_a_refusal(engine_config, configure, monkeypatch, error):
    def fail(_args, usage_context):
        raise error

    monkeypatch.setattr(engine_config.AsyncEngineArgs, "create_engine_config", fail)
    with pytest.raises(StartupError, match=r"^engine_args: they are refused: .") as caught:
        configure()
    assert caught.value.__cause__ is error


def test_batches_have_the_sizes_of_vllms_own_server(engine_config, configure, directory):
    args = engine_config.AsyncEngineArgs(model=str(directory))
    served = args.create_engine_config(usage_context=engine_config.UsageContext.OPENAI_API_SERVER).scheduler_config
    ours = configure()[0].scheduler_config
    assert (ours.max_num_seqs, ours.max_num_batched_tokens) == (served.max_num_seqs, served.max_num_batched_tokens)
    assert configure(max_num_seqs=7)[0].scheduler_config.max_num_seqs == 7


@pytest.fixture
def no_cache_size(monkeypatch):
    """The cache has no size of its own, which the tests give it."""
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)


@pytest.mark.parametrize(
    ("options", "takes_what_is_free"),
    [({}, True), ({"gpu_memory_utilization": 0.3}, False), ({"kv_cache_memory_bytes": GIB}, False)],
    ids=str,
)
def test_a_cpu_takes_what_is_free_unless_the_user_says_how_much(
    engine_config, configure, no_cache_size, options, takes_what_is_free
):
    told = configure(**options)[0].additional_config
    assert told[SHARE_OF_FREE] == (takes_what_is_free and engine_config.DEVICE == "cpu")
    assert told[STEERING_MEMORY] == GIB


def test_steering_takes_an_eighth_of_what_vllm_may_where_the_user_has_not_said(
    engine_config, configure, no_cache_size, monkeypatch
):
    monkeypatch.setattr(engine_config.current_platform, "get_device_total_memory", lambda: 24 * GIB)
    told = configure(None, gpu_memory_utilization=0.92)[0].additional_config
    assert told[STEERING_MEMORY] == 2 * GIB


def test_log_probabilities_in_transformers_are_those_of_each_token_after_those_before(transformers_logprobs, llama):
    found = transformers_logprobs(llama, [1, 2, 3])
    assert len(found) == 2
    assert found[:1] == pytest.approx(transformers_logprobs(llama, [1, 2]), abs=1e-5)
    every = [transformers_logprobs(llama, [1, token])[0] for token in range(llama.model.config.vocab_size)]
    assert sum(2.718281828459045**each for each in every) == pytest.approx(1.0, abs=1e-4)


def test_a_model_whose_positions_mean_something_else_is_told_from_rounding(transformers_logprobs, engine_config, llama):
    text = [token % 7 + 1 for token in range(64)]
    expected, [rotary] = (
        transformers_logprobs(llama, text),
        [m for m in llama.model.modules() if hasattr(m, "inv_freq")],
    )
    before = rotary.inv_freq.clone()
    rotary.inv_freq /= 2
    try:
        found = transformers_logprobs(llama, text)
    finally:
        rotary.inv_freq.copy_(before)
    with pytest.raises(StartupError, match="vLLM serves another model"):
        check_same_model(found, expected, tolerance=engine_config._EXACT_TOLERANCE)


def test_a_model_that_transformers_does_not_run_ends_the_start_by_name(transformers_logprobs, llama):
    with pytest.raises(StartupError, match=r"^self-test: transformers cannot run the model: IndexError: "):
        transformers_logprobs(llama, [10**6])


@pytest.mark.parametrize(
    ("part", "changes", "most"),
    [
        ("model_config", {}, 0.005),
        ("model_config", {"dtype": torch.bfloat16}, 0.15),
        ("model_config", {"quantization": "fp8"}, None),
        ("cache_config", {"cache_dtype": "bfloat16"}, 0.15),
        ("cache_config", {"cache_dtype": "fp8"}, None),
    ],
    ids=str,
)
def test_a_model_is_held_against_transformers_as_far_as_it_is_not_rounded(
    engine_config, configure, monkeypatch, part, changes, most
):
    config, _ = configure()
    for name, value in changes.items():
        monkeypatch.setattr(getattr(config, part), name, value)
    assert engine_config.logprob_tolerance(config) == (most if engine_config.DEVICE == "cpu" or most is None else 0.15)


async def test_a_device_that_vllm_does_not_compute_on_is_refused_before_a_model_is_loaded(engine_config):
    other = "cpu" if engine_config.DEVICE == "cuda" else "cuda"
    config = ServerConfig(model="no-such-model", engine="vllm", device=other)
    with pytest.raises(StartupError, match=r"^device: "):
        await ENGINES["vllm"](config, "float32", other)


class Stuck:
    """vLLM whose workers wait for one another."""

    errored = False

    async def collective_rpc(self, *_args, **_kwargs):
        await asyncio.Event().wait()


async def test_workers_that_give_no_answer_end_the_engine(monkeypatch):
    from steer_server.engine.vllm import client as module

    monkeypatch.setattr(module, "_CALL_SECONDS", 0.0)
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.01)
    client = module.VLLMClient(Stuck(), CacheSalts())
    with pytest.raises(EngineFailedError, match="steering_take: the workers gave no answer"):
        await client.call("steering_take", ["a"])
    assert "the workers gave no answer" in await asyncio.wait_for(client.failed(), 5)


@pytest.mark.parametrize(
    ("on_cpu", "asked", "method"), [(True, None, None), (False, None, "spawn"), (False, "fork", "fork")]
)
def test_an_accelerator_is_used_from_spawned_processes_unless_the_user_says_otherwise(
    engine_config, monkeypatch, on_cpu, asked, method
) -> None:
    # What the function sets is undone with what is set or deleted here.
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", asked or "")
    if asked is None:
        monkeypatch.delenv("VLLM_WORKER_MULTIPROC_METHOD")
    engine_config.set_process_defaults(on_cpu=on_cpu)
    assert os.environ.get("VLLM_WORKER_MULTIPROC_METHOD") == method


def test_less_than_the_pushes_of_a_step_is_refused_with_both_figures(configure):
    with pytest.raises(StartupError, match=r"^engine_args: .*--operator-memory is 1\.0 MiB.*max_num_batched_tokens"):
        configure(1 << 20, max_num_batched_tokens=2048)
    configure(GIB, max_num_batched_tokens=2048)
