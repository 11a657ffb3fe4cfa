"""A tiny model with an operator of its own, for tests of the server's rooms."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from operators.builder.build import build_operator
from operators.builder.concept import concept_from_text
from operators.builder.spec import BuildSpec
from operators.core.apply import Direction, PreparedOperator, Setting, prepare
from operators.core.artifact import OperatorArtifact, make_artifact
from operators.core.defaults import PUBLISHED
from operators.core.header import Calibration, CalibrationPoint, OperatorHeader, Recommended
from operators.core.measured import HeldOut, Sampling
from operators.model.loading import LoadedModel
from steer_server.engine.hf.decode import Decoder, InterruptionCheck
from steer_server.engine.hf.operator_cache import PreparedOperatorCache
from steer_server.engine.vllm.worker.layer_hooks import push_rows
from steer_server.engine.vllm.worker.pushes import TokenSpan
from steer_server.engine.vllm.worker.step_movements import StepMovements
from steer_server.engine.vllm.worker.step_push import StepPush
from steer_server.engine.vllm.worker.step_steering import LoadedOperator, StepSteering
from steer_server.engine.vllm.worker_protocol import OperatorSetting
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

_BATCH_WIDTH = 5
"""Of the hidden states in a :class:`Batch`; that of ``make_operator``."""


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
    return build_operator(
        BuildSpec((concept_from_text("wedding dress", llama),), layer=2, recommended=PUBLISHED), llama
    )


@pytest.fixture(scope="session")
def low_artifact(llama: LoadedModel) -> OperatorArtifact:
    """An operator of rank 5 of three texts, at the same layer."""
    texts = ("golden gate", "the golden bridge in the bay", "a wedding dress")
    return build_operator(
        BuildSpec(tuple(concept_from_text(text, llama) for text in texts), layer=2, rank=5, recommended=PUBLISHED),
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
            anchor=header.recommended.anchor,
            first_token=header.recommended.first_token,
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
            sampling=Sampling(temperature=0.5, top_p=0.75, seed=3),
            held_out=HeldOut(
                prompts=50,
                prompts_digest=f"sha256:{'5' * 64}",
                hit_rate=0.5,
                useful_rate=0.375,
                useful_low=0.25,
                useful_high=0.5,
                kl_p95=0.75,
                kl_mean=0.25,
                perplexity_ratio=1.5,
                distinct_2=0.875,
                plain_useful_rate=0.0625,
            ),
            chosen=len(points) - 1,
        )

    return make


@pytest.fixture(scope="session")
def remake() -> Callable[..., OperatorArtifact]:
    """``remake(artifact, **header)``: the same tensors under a changed header, signed again."""

    def make(artifact: OperatorArtifact, **fields: object) -> OperatorArtifact:
        header = artifact.header.model_copy(update=fields)
        vectors = (artifact.anchor, artifact.substitute_base, artifact.offset)
        return make_artifact(header, artifact.factors, *vectors, basis=artifact.basis, neutral=artifact.neutral)

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
        model_fingerprint=llama.fingerprint,
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
        attention=llama.attention,
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
    """``make_decoder(loaded, rows, max_tokens=6, check_interruption=..., ids=..., **sampling)``: of one new job."""

    def make(
        loaded: LoadedModel,
        rows: Sequence[Row],
        *,
        max_tokens: int = 6,
        check_interruption: InterruptionCheck = lambda: None,
        ids: tuple[int, ...] = prompt_ids,
        **sampling: object,
    ) -> Decoder:
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, **sampling)
        return Decoder(
            loaded=loaded,
            job=DecodeJob.of(ids, params, tuple(rows)),
            operators=PreparedOperatorCache(loaded.device, budget=1 << 30),
            check_interruption=check_interruption,
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


class Batch:
    """Texts that are fed as an engine with continuous batching does; rows that are nobody's lie between them."""

    def __init__(self, loaded: dict[str, LoadedOperator], dtype: torch.dtype) -> None:
        self.loaded, self.dtype = loaded, dtype
        self.texts: dict[str, torch.Tensor] = {}
        self.settings: dict[str, tuple[OperatorSetting, ...]] = {}
        self.positions: dict[str, int] = {}
        """Of the next token of each text."""
        self.embedded_prefixes: list[tuple[str, int, int]] = []
        """Texts of which tokens were embedded again, and from where to where."""
        self.embedded: list[TokenSpan] = []
        """The tokens that were needed."""
        self.steering = StepSteering()
        for digest, operator in loaded.items():
            self.steering.load(digest, operator)

    @staticmethod
    def embeddings(length: int = 12, seed: int = 0) -> torch.Tensor:
        return torch.randn(length, _BATCH_WIDTH, generator=torch.Generator().manual_seed(seed))

    def begin(
        self,
        request: str,
        *settings: OperatorSetting,
        x: torch.Tensor | None = None,
        seed: int = 0,
        salt: str | None = None,
    ) -> None:
        """A text of random embeddings, or of those given; under a salt of its own, or a shared one."""
        self.texts[request] = self.embeddings(seed=seed) if x is None else x
        self.settings[request] = settings
        self.steering.add_request(request, settings, request if salt is None else salt)

    def embed(self, spans: Sequence[TokenSpan]) -> torch.Tensor:
        self.embedded.extend(spans)
        return torch.cat([self.texts[span.request][span.first_position : span.end_position] for span in spans])

    def embed_prefix(self, request: str, start: int, end: int) -> torch.Tensor:
        self.embedded_prefixes.append((request, start, end))
        return self.texts[request][start:end]

    def prepare(
        self, *parts: tuple[str, int, int], announced: bool = True
    ) -> tuple[list[TokenSpan], dict[int, StepPush]]:
        """The spans and pushes of a step of (request, first position, number of tokens).

        ``announced``: requests that begin or come back at another position are announced, as an engine does.
        """
        spans, start = [], 1
        for request, first, count in parts:
            if announced and first != self.positions.get(request):
                self.steering.start_at(request, first)
            self.positions[request] = first + count
            spans.append(TokenSpan(request, start, first, count))
            start += count + 1
        return spans, self.steering.prepare(spans, self.embed, self.embed_prefix)

    def step(
        self,
        *parts: tuple[str, int, int],
        change: Callable[[dict[int, StepPush]], None] | None = None,
        announced: bool = True,
    ) -> dict[tuple[str, int], torch.Tensor]:
        """One forward pass: the pushes (count, d) of each request at each layer, zero where there is none.

        ``change`` may forge what was measured.
        """
        spans, pushes = self.prepare(*parts, announced=announced)
        owned = {row for span in spans for row in range(span.start_row, span.start_row + span.num_tokens)}
        hidden = torch.randn(max(owned) + 2, _BATCH_WIDTH, generator=torch.Generator().manual_seed(len(owned)))
        hidden = hidden.to(self.dtype)
        pushed, movements = {}, StepMovements()
        for layer, push in pushes.items():
            rows = push.rows.tolist()
            assert len(set(rows)) == len(rows)
            assert set(rows) <= owned
            push_rows(push, hidden, None, movements)
            dense = torch.zeros(hidden.shape).index_copy(0, push.rows, push.push)
            pushed |= {(span.request, layer): dense[span.start_row :][: span.num_tokens] for span in spans}
        movements.measure()
        if change is not None:
            change(pushes)
        self.steering.record(pushes)
        return pushed

    def expected(self, request: str, layer: int) -> torch.Tensor:
        """The pushes (T, d) of a whole text at a layer, worked out alone."""
        x = self.texts[request]
        total = torch.zeros(x.shape)
        for setting in self.settings[request]:
            loaded = self.loaded[setting.digest]
            if loaded.layer == layer:
                direction = Direction(loaded.operator, setting_of(setting))
                pushes = setting.strength / 2 * direction.advance(x)
                total[setting.start : setting.end] += pushes[setting.start : setting.end]
        return total

    def failure(self, request: str) -> str:
        return self.steering.measurement(request).failure


def setting_of(setting: OperatorSetting) -> Setting:
    """The setting, at all positions, that travels as this."""
    names = ("strength", "rule", "blend", "anchor", "first_token")
    return Setting(**{name: getattr(setting, name) for name in names})


@pytest.fixture(scope="session")
def make_batch(make_operator: Callable[..., OperatorArtifact]) -> Callable[..., Batch]:
    """``make_batch(dtype)``: operators "exact" and "affine" at layer 2, "higher" and "low" (of low rank) at layer 3."""
    cpu = torch.device("cpu")
    generator = torch.Generator().manual_seed(5)
    basis = torch.linalg.qr(torch.randn(_BATCH_WIDTH, 2, generator=generator)).Q
    factors = torch.randn(4, 2, _BATCH_WIDTH, generator=generator)
    base, anchor = torch.randn(2, _BATCH_WIDTH, generator=generator)
    loaded = {
        "exact": LoadedOperator(prepare(make_operator(3, seed=1, neutral=True), cpu), 2),
        "affine": LoadedOperator(prepare(make_operator(1, affine=True, seed=2, neutral=True), cpu), 2),
        "higher": LoadedOperator(prepare(make_operator(2, seed=3), cpu), 3),
        "low": LoadedOperator(PreparedOperator(factors, basis, None, base, anchor / anchor.norm()), 3),
    }
    return lambda dtype=torch.float32: Batch(loaded, dtype)


@pytest.fixture
def batch(make_batch: Callable[..., Batch]) -> Batch:
    """An empty batch of hidden states in float32."""
    return make_batch()
