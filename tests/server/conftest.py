"""A tiny model with an operator of its own, for tests of the server's rooms."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from operators.apply import Setting
from operators.artifact import OperatorArtifact, make_artifact
from operators.build import BuildSpec, build_operator
from operators.concept import concept_from_text
from operators.header import Calibration, CalibrationPoint, OperatorHeader, Recommended
from operators.models import LoadedModel
from steer_server.engine.decode import Decoder, Interrupted
from steer_server.engine.steering import PreparedOperators
from steer_server.types import (
    Application,
    DecodeJob,
    ModelInfo,
    Row,
    RowFinished,
    SamplingParams,
    SteeringPlan,
    TokenEvent,
)


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
    return build_operator(BuildSpec((concept,), layer=2, recommended=recommended), llama)


@pytest.fixture(scope="session")
def other_artifact(llama: LoadedModel) -> OperatorArtifact:
    """A second operator at the same layer."""
    return build_operator(BuildSpec((concept_from_text("wedding dress", llama),), layer=2), llama)


@pytest.fixture(scope="session")
def low_artifact(llama: LoadedModel) -> OperatorArtifact:
    """An operator of rank 5 of three texts, at the same layer."""
    texts = ("golden gate", "the golden bridge in the bay", "a wedding dress")
    return build_operator(
        BuildSpec(tuple(concept_from_text(text, llama) for text in texts), layer=2, rank=5),
        llama,
    )


@pytest.fixture(scope="session")
def calibration_of() -> Callable[..., Calibration]:
    """``calibration_of(header, at_recommended=True)``: measured settings of an operator, the recommended one or not."""

    def make(header: OperatorHeader, *, at_recommended: bool = True) -> Calibration:
        weak = CalibrationPoint(
            layer=header.layer,
            rule=header.recommended.rule,
            blend=header.recommended.blend,
            strength=header.recommended.strength / 2,
            texts=20,
            kl_p95=0.125,
            hit_rate=0.25,
            perplexity_ratio=1.125,
            distinct_2=0.875,
        )
        # The same setting at another layer comes first: it is another operator's.
        elsewhere = weak.model_copy(update={"strength": header.recommended.strength, "layer": header.layer + 1})
        best = {"strength": header.recommended.strength, "kl_p95": 0.75, "hit_rate": 0.5, "perplexity_ratio": 1.5}
        points = (elsewhere, weak, *([weak.model_copy(update=best)] if at_recommended else []))
        return Calibration(
            words=("golden", "bridge"),
            kl_budget=1.0,
            max_perplexity_ratio=2.0,
            prompts=20,
            tokens=28,
            plain_hit_rate=0.0625,
            plain_perplexity=5.0,
            plain_distinct_2=0.9,
            min_distinct_ratio=0.75,
            points=points,
            chosen=len(points) - 1,
        )

    return make


@pytest.fixture(scope="session")
def remake() -> Callable[..., OperatorArtifact]:
    """``remake(artifact, **header)``: the same tensors under a changed header, signed again."""

    def make(artifact: OperatorArtifact, **fields: object) -> OperatorArtifact:
        header = artifact.header.model_copy(update=fields)
        vectors = (artifact.anchor, artifact.substitute_base, artifact.offset)
        return make_artifact(header, artifact.factors, *vectors, basis=artifact.basis)

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


@pytest.fixture(scope="session")
def prompt_ids(llama: LoadedModel) -> tuple[int, ...]:
    """The prompt of every decoder that is made here."""
    return tuple(llama.tokenizer("the golden bridge in the bay")["input_ids"])


@pytest.fixture(scope="session")
def make_decoder(prompt_ids: tuple[int, ...]) -> Callable[..., Decoder]:
    """``make_decoder(loaded, rows, max_tokens=6, interrupted=..., ids=..., **sampling)``: one job, not yet begun."""

    def make(
        loaded: LoadedModel,
        rows: Sequence[Row],
        *,
        max_tokens: int = 6,
        interrupted: Interrupted = lambda: None,
        ids: tuple[int, ...] = prompt_ids,
        **sampling: object,
    ) -> Decoder:
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, **sampling)
        return Decoder(
            loaded=loaded,
            job=DecodeJob(ids, params, tuple(rows)),
            prepared=PreparedOperators(loaded.device, budget=1 << 30),
            interrupted=interrupted,
            eos_ids=frozenset(),
        )

    return make


@pytest.fixture(scope="session")
def decode(make_decoder: Callable[..., Decoder]) -> Callable[..., tuple[list, list, list]]:
    """``decode(loaded, *plans, **options)``: token ids and receipts of each row, and the logits of every step."""

    def run(loaded: LoadedModel, *plans: SteeringPlan | None, **options: object) -> tuple[list, list, list]:
        logits = []
        handle = loaded.model.register_forward_hook(lambda module, args, output: logits.append(output.logits.clone()))
        try:
            events = list(make_decoder(loaded, [Row(plan) for plan in plans], **options).run())
        finally:
            handle.remove()
        ids = [
            [event.token_id for event in events if isinstance(event, TokenEvent) and event.row == row]
            for row in range(len(plans))
        ]
        ends = {event.row: event for event in events if isinstance(event, RowFinished)}
        return ids, [ends[row].receipts for row in range(len(plans))], logits

    return run
