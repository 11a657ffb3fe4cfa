"""A tiny model with an operator of its own, for tests of the server's rooms."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from operators.builder.build import BuildSpec, build_operator
from operators.builder.concept import concept_from_text
from operators.core.apply import Direction, PreparedOperator, Setting, prepare, steer
from operators.core.artifact import OperatorArtifact, make_artifact
from operators.core.header import Calibration, CalibrationPoint, OperatorHeader, Recommended
from operators.model.loading import LoadedModel
from steer_server.engine.hf.decode import Decoder, Interrupted
from steer_server.engine.hf.steering import PreparedOperators
from steer_server.engine.vllm.pushes import Segment
from steer_server.engine.vllm.step_steering import BatchSteering, Site, Sited, Use
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


class Batch:
    """Texts that are fed as an engine with continuous batching does; rows that are nobody's lie between them."""

    def __init__(self, sited: dict[str, Sited], dtype: torch.dtype) -> None:
        self.sited, self.dtype = sited, dtype
        self.texts: dict[str, torch.Tensor] = {}
        self.uses: dict[str, tuple[Use, ...]] = {}
        self.at: dict[str, int] = {}
        """Where each text stands."""
        self.asked: list[tuple[str, int]] = []
        """Whose beginnings were asked for."""
        self.steering = BatchSteering(dtype)
        for digest, operator in sited.items():
            self.steering.load(digest, operator)

    @staticmethod
    def embeddings(length: int = 12, seed: int = 0) -> torch.Tensor:
        return torch.randn(length, _BATCH_WIDTH, generator=torch.Generator().manual_seed(seed))

    def begin(
        self, request: str, *uses: Use, x: torch.Tensor | None = None, seed: int = 0, salt: str | None = None
    ) -> None:
        """A text of random embeddings, or of those given; under a salt of its own, or a shared one."""
        self.texts[request] = self.embeddings(seed=seed) if x is None else x
        self.uses[request] = uses
        self.steering.follow(request, uses, request if salt is None else salt)

    def earlier(self, request: str, count: int) -> torch.Tensor:
        self.asked.append((request, count))
        return self.texts[request][:count]

    def prepare(self, *parts: tuple[str, int, int], announced: bool = True) -> tuple[list[Segment], dict[int, Site]]:
        """The segments and sites of a step of (request, first position, number of tokens).

        ``announced``: as an engine does, requests that begin or come back elsewhere than where they stand.
        """
        segments, start = [], 1
        for request, first, count in parts:
            if announced and first != self.at.get(request):
                self.steering.arrives(request, first)
            self.at[request] = first + count
            segments.append(Segment(request, start, first, count))
            start += count + 1
        x = torch.cat([self.texts[request][first : first + count] for request, first, count in parts])
        return segments, self.steering.prepare(segments, x, self.earlier)

    def step(
        self,
        *parts: tuple[str, int, int],
        change: Callable[[dict[int, Site]], None] | None = None,
        announced: bool = True,
    ) -> dict[tuple[str, int], torch.Tensor]:
        """One forward pass: the pushes (count, d) of each request at each layer, zero where there is none.

        ``change`` may forge what was measured.
        """
        segments, sites = self.prepare(*parts, announced=announced)
        owned = {row for each in segments for row in range(each.start, each.start + each.count)}
        hidden = torch.randn(max(owned) + 2, _BATCH_WIDTH, generator=torch.Generator().manual_seed(len(owned)))
        hidden = hidden.to(self.dtype)
        pushed = {}
        for layer, site in sites.items():
            rows = site.rows.tolist()
            assert len(set(rows)) == len(rows)
            assert set(rows) <= owned
            _, site.doses = steer(hidden[site.rows], site.push)
            dense = torch.zeros(hidden.shape).index_copy(0, site.rows, site.push)
            pushed |= {(each.request, layer): dense[each.start : each.start + each.count] for each in segments}
        if change is not None:
            change(sites)
        self.steering.book(sites)
        return pushed

    def expected(self, request: str, layer: int) -> torch.Tensor:
        """The pushes (T, d) of a whole text at a layer, worked out alone."""
        x = self.texts[request]
        total = torch.zeros_like(x)
        for use in self.uses[request]:
            if self.sited[use.digest].layer == layer:
                setting = Setting(use.strength, use.rule, use.blend)
                total = total + use.strength / 2 * Direction(self.sited[use.digest].operator, setting).advance(x)
        return total

    def failure(self, request: str) -> str:
        return self.steering.account(request).failure


@pytest.fixture(scope="session")
def make_batch(make_operator: Callable[..., OperatorArtifact]) -> Callable[..., Batch]:
    """``make_batch(dtype)``: operators "exact" and "affine" at layer 2, "higher" and "low" (of low rank) at layer 3."""
    cpu = torch.device("cpu")
    generator = torch.Generator().manual_seed(5)
    basis = torch.linalg.qr(torch.randn(_BATCH_WIDTH, 2, generator=generator)).Q
    factors = torch.randn(4, 2, _BATCH_WIDTH, generator=generator)
    base, anchor = torch.randn(2, _BATCH_WIDTH, generator=generator)
    sited = {
        "exact": Sited(prepare(make_operator(3, seed=1), cpu), 2),
        "affine": Sited(prepare(make_operator(1, affine=True, seed=2), cpu), 2),
        "higher": Sited(prepare(make_operator(2, seed=3), cpu), 3),
        "low": Sited(PreparedOperator(factors, basis, None, base, anchor / anchor.norm()), 3),
    }
    return lambda dtype=torch.float32: Batch(sited, dtype)


@pytest.fixture
def batch(make_batch: Callable[..., Batch]) -> Batch:
    """An empty batch of hidden states in float32."""
    return make_batch()
