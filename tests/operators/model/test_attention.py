import asyncio

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, GptOssConfig, GptOssForCausalLM

from operators.core.errors import ModelError
from operators.model import loading as models
from operators.model.attention import check_attention
from operators.model.loading import load_model, recognise
from steer_server.config import ServerConfig
from steer_server.engines import ENGINES
from steer_server.errors import StartupError

_SIZES = {
    "vocab_size": 320,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def _gemma2(**options):
    config = Gemma2Config(**_SIZES, query_pre_attn_scalar=16, sliding_window=8, **options)
    return Gemma2ForCausalLM(config)


def _gpt_oss():
    return GptOssForCausalLM(GptOssConfig(**_SIZES, num_local_experts=2, num_experts_per_tok=1, sliding_window=8))


@pytest.fixture
def saved(tiny_tokenizer, tmp_path):
    """``saved(model)``: the directory of a random model with large weights, as users have it."""

    def save(model):
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(3)
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=1.5 / parameter.shape[-1] ** 0.5)
        model.save_pretrained(tmp_path)
        tiny_tokenizer.save_pretrained(tmp_path)
        return str(tmp_path)

    return save


def _logits(model):
    with torch.inference_mode():
        return model(torch.arange(20)[None]).logits


@pytest.mark.parametrize("make", [_gemma2, _gpt_oss])
def test_a_model_whose_own_attention_does_more_is_computed_with_it(make, saved):
    directory = saved(make())
    loaded = load_model(directory)
    assert loaded.model.config._attn_implementation == "eager"
    own = type(loaded.model).from_pretrained(directory, attn_implementation="eager")
    assert torch.equal(_logits(loaded.model), _logits(own))


@pytest.mark.parametrize("make", [_gemma2, _gpt_oss])
def test_it_is_not_computed_with_another_where_that_is_asked_for(make, saved):
    with pytest.raises(ModelError, match=r"attention 'sdpa'.*'eager' is accepted \(--attention eager\)"):
        load_model(saved(make()), attention="sdpa")


def test_nothing_in_a_configuration_is_needed_to_see_it(saved, monkeypatch):
    monkeypatch.setattr("operators.model.attention._SOFT_CAPS", ())
    directory = saved(_gemma2())
    with pytest.raises(ModelError, match=r"'sdpa' leaves out what Gemma2Attention does \(layer 0: it differs by"):
        load_model(directory)


def test_a_model_in_memory_is_compared_too(saved, tiny_tokenizer):
    model = Gemma2ForCausalLM.from_pretrained(saved(_gemma2()), attn_implementation="sdpa")
    with pytest.raises(ModelError, match="leaves out what Gemma2Attention does"):
        recognise("mine", model, tiny_tokenizer)
    assert model.config._attn_implementation == "sdpa"


def test_without_soft_caps_it_is_the_same_and_the_faster_one_is_taken(saved):
    loaded = load_model(saved(_gemma2(attn_logit_softcapping=None)))
    assert loaded.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_architecture_of_a_table_has_the_same_attention_twice(tiny, family, dtype):
    loaded = tiny(family, "sdpa", dtype)
    check_attention(loaded.name, loaded.model)
    assert loaded.model.config._attn_implementation == "sdpa"


def test_a_model_that_the_caller_cannot_use_is_refused_before_its_weights_are_read(tiny_directory, monkeypatch):
    seen = []

    def refuse(model):
        seen.append({parameter.device.type for parameter in model.parameters()})
        raise ModelError("not this one")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_a, **_k: pytest.fail("read"))
    with pytest.raises(ModelError, match=r"^model '.*': not this one$"):
        load_model(str(tiny_directory("llama")), check=refuse)
    assert seen == [{"meta"}]


def test_a_model_without_a_list_of_blocks_is_refused_before_its_weights_are_read(tiny_directory, monkeypatch):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_a, **_k: pytest.fail("read"))
    monkeypatch.setattr(models, "decoder_layers", lambda _model: (_ for _ in ()).throw(ModelError("no blocks")))
    with pytest.raises(ModelError, match="no blocks"):
        load_model(str(tiny_directory("llama")))


def test_the_server_says_that_the_attention_of_vllm_is_an_option_of_vllm():
    config = ServerConfig(engine="vllm", attention="eager")
    with pytest.raises(StartupError, match="--engine-args attention_backend"):
        asyncio.run(ENGINES["vllm"](config, "float32", "cpu"))
