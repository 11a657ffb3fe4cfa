"""A tiny model with an operator of its own, for tests of the server's rooms."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from operators.apply import Setting
from operators.artifact import OperatorArtifact, Recommended, make_artifact
from operators.build import BuildSpec, build_operator
from operators.concept import concept_from_text
from operators.models import LoadedModel
from steer_server.types import Application, ModelInfo, SteeringPlan


@pytest.fixture(scope="session")
def llama(tiny: Callable[..., LoadedModel]) -> LoadedModel:
    """A random Llama of 4 layers in float32, shared: leave it as it was."""
    return tiny("llama", dtype="float32")


@pytest.fixture(scope="session")
def artifact(llama: LoadedModel) -> OperatorArtifact:
    """An operator of that Llama, recommending strength 0.6, rule substitute and blend 0.25."""
    recommended = Recommended(strength=0.6, rule="substitute", blend=0.25)
    concept = concept_from_text("golden gate", llama)
    assert len(concept.ids) > 1
    return build_operator(BuildSpec(concept, layer=2, recommended=recommended), llama)


@pytest.fixture(scope="session")
def other_artifact(llama: LoadedModel) -> OperatorArtifact:
    """A second operator at the same layer."""
    return build_operator(BuildSpec(concept_from_text("wedding dress", llama), layer=2), llama)


@pytest.fixture(scope="session")
def remake() -> Callable[..., OperatorArtifact]:
    """``remake(artifact, **header)``: the same tensors under a changed header, signed again."""

    def make(artifact: OperatorArtifact, **fields: object) -> OperatorArtifact:
        header = artifact.header.model_copy(update=fields)
        return make_artifact(header, artifact.jacobian, artifact.anchor, artifact.substitute_base, artifact.offset)

    return make


@pytest.fixture(scope="session")
def plan_of() -> Callable[..., SteeringPlan]:
    """``plan_of((artifact, strength), ...)``, with rule and blend as options."""

    def make(*uses: tuple[OperatorArtifact, float], rule: str = "cumulative", blend: float = 0.0) -> SteeringPlan:
        return SteeringPlan(
            tuple(
                Application(f"operator-{place}", artifact, Setting(strength, rule, blend), ())
                for place, (artifact, strength) in enumerate(uses)
            )
        )

    return make


@pytest.fixture(scope="session")
def model_info(llama: LoadedModel) -> ModelInfo:
    """The Llama as an engine describes it."""
    return ModelInfo(
        model=llama.name,
        architecture="LlamaForCausalLM",
        fingerprint=llama.fingerprint,
        tokenizer_fingerprint=llama.tokenizer_fingerprint,
        num_layers=llama.num_layers,
        hidden_size=llama.hidden_size,
        vocab_size=int(llama.model.config.vocab_size),
        context_length=llama.context_length,
        eos_token_ids=(0,),
        has_chat_template=False,
        engine="hf",
        dtype="float32",
        device="cpu",
    )


@pytest.fixture
def with_name(model_info: ModelInfo) -> Callable[..., ModelInfo]:
    """The same model with some of its description replaced."""
    return lambda **fields: replace(model_info, **fields)
