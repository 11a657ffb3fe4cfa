"""What every test folder may use: the default model, tiny random ones of each architecture, and operators."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    # Before torch is imported: threads of two test processes on one core wait for each other at every product.
    _share = max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    os.environ.setdefault("OMP_NUM_THREADS", str(_share))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

import functools
import signal
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MinistralConfig,
    MinistralForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from xdist.remote import Producer
from xdist.scheduler.loadfile import LoadFileScheduling

from operators.core.artifact import Lens, OperatorArtifact, make_artifact, make_lens, make_vector
from operators.core.header import NeutralTexts, OperatorHeader, Recommended
from operators.core.lens_source import PUSHED, LensSource
from operators.core.vector_source import ImportedVector
from operators.model.loading import LoadedModel, load_model, recognise
from operators.model.unembedding import loaded_unembedding
from tests.tiny_tokenizer import VOCABULARY, make_tokenizer

# A shell that starts this in the background has interrupts ignored, here and in every process that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# On a machine that is shared, one example in a thousand takes a second.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

# Sizes that hide nothing: grouped heads, a head size that is not d / heads, a window shorter than the prompts.
_SIZES = {
    "vocab_size": VOCABULARY,
    "intermediate_size": 56,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
# The head size of these is d / heads, whatever the configuration says.
_LIKE_LLAMA = {name: value for name, value in _SIZES.items() if name != "head_dim"} | {
    "hidden_size": 40,
    "num_hidden_layers": 4,
}
_FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SIZES, hidden_size=40, num_hidden_layers=4)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_LIKE_LLAMA)),
    "olmo2": lambda: Olmo2ForCausalLM(Olmo2Config(**_LIKE_LLAMA)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**_LIKE_LLAMA, sliding_window=None)),
    "mistral": lambda: MistralForCausalLM(
        MistralConfig(**_SIZES, hidden_size=40, num_hidden_layers=4, sliding_window=8)
    ),
    "ministral": lambda: MinistralForCausalLM(
        MinistralConfig(**_SIZES, hidden_size=40, num_hidden_layers=4, sliding_window=8)
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=64,
            n_embd=40,
            n_layer=4,
            n_head=4,
            bos_token_id=0,
            eos_token_id=0,
        )
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_SIZES, hidden_size=32, num_hidden_layers=3)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **_SIZES,
            hidden_size=32,
            num_hidden_layers=4,
            num_experts=5,
            num_experts_per_tok=2,
            moe_intermediate_size=20,
            mlp_only_layers=[1],
            norm_topk_prob=True,
        )
    ),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **_SIZES,
            hidden_size=48,
            num_hidden_layers=4,
            sliding_window=3,
            layer_types=["sliding_attention", "full_attention"] * 2,
            query_pre_attn_scalar=10,
        )
    ),
}
_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


@pytest.fixture(params=list(_FAMILIES))
def family(request) -> str:
    """Architectures that can be built, one after the other: every kind of block. ``tiny`` makes a model of it.

    All of them, in odd sizes, are in ``tests/operators/maps/test_exactness.py``.
    """
    return request.param


class _Scheduling(LoadFileScheduling):
    """Test processes take whole files; those that share vLLM's engine are taken as one, by one process."""

    def _split_scope(self, nodeid: str) -> str:
        is_of_vllm = nodeid.startswith(("tests/contract/", "tests/e2e/test_vllm_"))
        return "vLLM" if is_of_vllm else super()._split_scope(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> _Scheduling:
    """For ``pytest -n``, which ``make test`` calls."""
    return _Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without vLLM the tests that need it are skipped, not left out: a report that omits them reads as complete.

    What takes longest begins first, so that no test process has it left when the others have ended.
    """
    items.sort(key=lambda item: ("contract" not in item.path.parts, "e2e" not in item.path.parts))
    if find_spec("vllm") is None:
        for item in items:
            if item.get_closest_marker("vllm"):
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed (make vllm-cpu)"))


@pytest.fixture(scope="session")
def smollm() -> Callable[..., LoadedModel]:
    """``smollm(dtype="float32", attention="sdpa")``: the default model, loaded once per kind."""

    @functools.cache
    def load(dtype: str = "float32", attention: str = "sdpa") -> LoadedModel:
        return load_model("smollm2-135m", dtype=dtype, attention=attention)

    return load


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that can spell everything; token 0 is its special one, never added by itself."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny(tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[..., LoadedModel]:
    """``tiny(family, attention="sdpa", dtype="float64", fresh=False)``: a small random model, the same every time.

    Models are shared between tests; a test that changes one asks for a ``fresh`` one.
    """

    def make(family: str, attention: str = "sdpa", dtype: str = "float64") -> LoadedModel:
        with torch.random.fork_rng():
            torch.manual_seed(sum(family.encode()))
            model = _FAMILIES[family]()
            for name, parameter in model.named_parameters():
                # Large weights, and norms that are not all ones: gates open, attention prefers, RMS differs.
                if parameter.ndim == 1:
                    around_zero = family == "gemma3" or name.endswith("bias")
                    torch.nn.init.normal_(parameter, mean=0.0 if around_zero else 1.0, std=0.3)
                elif "embed" in name or "wte" in name or "wpe" in name:
                    torch.nn.init.normal_(parameter, std=1.0)
                else:
                    torch.nn.init.normal_(parameter, std=1.5 / parameter.shape[-1] ** 0.5)
        if model._can_set_experts_implementation():
            # The others are not for float64.
            model.set_experts_implementation("eager")
        loaded = recognise(f"tiny-{family}", model.eval().requires_grad_(False), tiny_tokenizer)
        # As a checkpoint's: a dtype that it is loaded in, with rounding or not, leaves the fingerprint.
        model.to(_DTYPES[dtype]).set_attn_implementation(attention)
        return loaded

    cached = functools.cache(make)

    def get(family: str, attention: str = "sdpa", dtype: str = "float64", *, fresh: bool = False) -> LoadedModel:
        return (make if fresh else cached)(family, attention, dtype)

    return get


@pytest.fixture(scope="session")
def tiny_directory(tiny: Callable[..., LoadedModel], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``tiny_directory(family)``: that tiny model and its tokenizer, saved in float32 as users save theirs."""

    @functools.cache
    def saved(family: str = "llama") -> Path:
        directory = tmp_path_factory.mktemp(family)
        loaded = tiny(family, dtype="float32", fresh=True)
        loaded.model.save_pretrained(directory)
        loaded.tokenizer.save_pretrained(directory)
        return directory

    return saved


@pytest.fixture(scope="session")
def make_operator() -> Callable[..., OperatorArtifact]:
    """``make_operator(n=3, d=5, affine=False, seed=0, neutral=False, **header)``: a random operator.

    Header fields are replaced; without ``neutral`` it is as an earlier version built it.
    """

    def build(
        n: int = 3, d: int = 5, *, affine: bool = False, seed: int = 0, neutral: bool = False, **fields: object
    ) -> OperatorArtifact:
        generator = torch.Generator().manual_seed(seed)
        jacobian = torch.randn(n, d, d, generator=generator)
        x = torch.randn(n, d, generator=generator)
        offset = torch.randn(d, generator=generator) if affine else None
        anchor = torch.einsum("nij,nj->i", jacobian, x) + (0 if offset is None else offset)
        header = OperatorHeader(
            **{
                "concept": "a concept",
                "concept_ids": tuple(range(n)),
                "model": "some-model",
                "architecture": "LlamaForCausalLM",
                "model_fingerprint": f"weights-sha256:{'1' * 64}",
                "tokenizer_fingerprint": f"sha256:{'2' * 64}",
                "profile": "residual",
                "rule_set": "up-live/1",
                "layer": 2,
                "injection_layer": 2,
                "num_layers": 4,
                "hidden_size": d,
                "dtype": "float32",
                "model_dtype": "float32",
                "recommended": Recommended(),
                "neutral": NeutralTexts(digest=f"sha256:{'4' * 64}", ids=((1, 2), (3,))) if neutral else None,
                "reconstruction_error": 1e-7,
                "builder_version": "0.1.0",
                "created": datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC),
                **fields,
            }
        )
        mean = torch.randn(d, generator=generator) if neutral else None
        return make_artifact(header, jacobian, anchor, anchor - jacobian[-1] @ x[-1], offset, neutral=mean)

    return build


@pytest.fixture(scope="session")
def make_rank_0() -> Callable[..., OperatorArtifact]:
    """``make_rank_0(d=5, loaded=None, seed=0, **header)``: a random vector as an operator, of that model or of none."""

    def build(d: int = 5, loaded: LoadedModel | None = None, *, seed: int = 0, **fields: object) -> OperatorArtifact:
        d = d if loaded is None else loaded.hidden_size
        vector = 3 * torch.randn(d, generator=torch.Generator().manual_seed(seed))
        source = ImportedVector(
            norm=float(vector.double().norm()),
            file_format="gguf",
            file_digest=f"sha256:{'3' * 64}",
            tensor="direction.1",
            model_hint="llama",
        )
        header = {
            "concept": "happy, not sad",
            "concept_ids": (),
            "vector": source,
            "model": "some-model" if loaded is None else loaded.name,
            "architecture": "LlamaForCausalLM",
            "model_fingerprint": f"weights-sha256:{'1' * 64}" if loaded is None else loaded.fingerprint,
            "tokenizer_fingerprint": f"sha256:{'2' * 64}" if loaded is None else loaded.tokenizer_fingerprint,
            "profile": "residual",
            "rule_set": "",
            "layer": 2,
            "injection_layer": 2,
            "num_layers": 4,
            "hidden_size": d,
            "dtype": "float32",
            "model_dtype": "float32",
            "recommended": Recommended(blend=1.0),
            "builder_version": "0.1.0",
            "created": datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC),
        }
        return make_vector(OperatorHeader(**{**header, **fields}), vector)

    return build


@pytest.fixture(scope="session")
def make_random_lens() -> Callable[..., OperatorArtifact]:
    """``make_random_lens(loaded, seed=0, lens={}, **header)``: a random lens of a model, from its first position."""

    def build(
        loaded: LoadedModel, *, seed: int = 0, lens: dict[str, object] | None = None, **fields: object
    ) -> OperatorArtifact:
        d = loaded.hidden_size
        unembedding = loaded_unembedding(loaded.model)
        source = LensSource(
            **{
                "positions": "first",
                "texts": 2,
                "texts_digest": f"sha256:{'6' * 64}",
                "vocabulary": unembedding.vocabulary,
                "tied": unembedding.tied,
                **(lens or {}),
            }
        )
        # Without a curve there is no strength to recommend.
        recommended = Recommended(strength=0.0, blend=1.0, positions=PUSHED[source.positions])
        header = {
            "concept": "any word",
            "concept_ids": (),
            "lens": source,
            "model": loaded.name,
            "architecture": type(loaded.model).__name__,
            "model_fingerprint": loaded.fingerprint,
            "tokenizer_fingerprint": loaded.tokenizer_fingerprint,
            "profile": "residual",
            "rule_set": "up-live/1",
            "layer": 2,
            "injection_layer": 2,
            "num_layers": loaded.num_layers,
            "hidden_size": d,
            "dtype": "float32",
            "model_dtype": "float32",
            "recommended": recommended,
            "builder_version": "0.1.0",
            "created": datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC),
        }
        pull = torch.randn(d, d, generator=torch.Generator().manual_seed(seed))
        return make_lens(OperatorHeader(**{**header, **fields}), Lens(pull, unembedding.mean()))

    return build
