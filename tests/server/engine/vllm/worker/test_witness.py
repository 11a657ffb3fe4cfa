"""A push that is not the plan's in a worker: the server, which works it out for itself, refuses the text.

Two requests of one strength, each with its own operator, in one batch: their prompts in two chunks, then token by
token, and one is thrown out and comes back. Only what a worker sends is judged.
"""

from dataclasses import replace

import pytest
import torch
from torch import nn

from operators.core.apply import prepare
from steer_server.engine.proof import Proof
from steer_server.engine.reference import EmbeddingRows
from steer_server.engine.vllm.measurements import measured_receipts, merge_measurements, prove
from steer_server.engine.vllm.worker import layer_hooks, push_plan, step_steering
from steer_server.engine.vllm.worker.layer_hooks import forward_pass, install_hooks
from steer_server.engine.vllm.worker.pushes import TokenSpan
from steer_server.engine.vllm.worker.step_plan import SteadyBatch
from steer_server.engine.vllm.worker.step_push import LayerRows
from steer_server.engine.vllm.worker.step_steering import LoadedOperator, StepSteering
from steer_server.engine.vllm.worker.witness import Witness
from steer_server.engine.vllm.worker_protocol import operator_settings
from steer_server.errors import SteeringNotAppliedError

STEER, STEP_PUSH, LAYERS = layer_hooks.steer, LayerRows.step_push, 4
IDS = {"a": tuple(range(20, 34)), "b": tuple(range(60, 74))}
PROMPT = 6
STEPS = (
    {"a": (0, 4), "b": (0, 2)},
    {"a": (4, 2), "b": (2, 4)},
    {"a": (6, 1), "b": (6, 1)},
    {"a": (7, 1), "b": (7, 1)},
    # "a" comes back, its first tokens cached.
    {"a": (4, 4), "b": (8, 1)},
    *({"a": (8 + step, 1), "b": (9 + step, 1)} for step in range(4)),
)
FED = {"a": 12, "b": 13}


class Layer(nn.Module):
    def forward(self, positions, hidden_states, residual):
        return hidden_states, residual


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, hidden, residual):
        for layer in self.model.layers:
            layer(None, hidden, residual)


class Worker:
    """Does in each step what vLLM's worker does, on hidden states of random numbers."""

    def __init__(self, plans, embed, dtype):
        self.plans, self.embed, self.dtype = plans, embed, dtype
        self.steering, self.witness, self.model = StepSteering(), Witness(), Model()
        install_hooks(self.model)
        self.proofs = {
            name: Proof(plan, embed, prompt_ids=IDS[name][:PROMPT], max_tokens=len(IDS[name]) - PROMPT)
            for name, plan in plans.items()
        }
        for name, plan in plans.items():
            for use in plan.applications:
                self.load(use.artifact)
            settings = operator_settings(plan, PROMPT)
            self.steering.add_request(name, settings, name)
            self.witness.add(name, self.proofs[name].positions)

    def load(self, artifact):
        operator = prepare(artifact, torch.device("cpu"))
        self.steering.load(artifact.digest, LoadedOperator(operator, artifact.header.injection_layer))

    def run(self):
        at = dict.fromkeys(self.plans, 0)
        for number, step in enumerate(STEPS):
            spans, start = [], 1
            for name, (first, count) in step.items():
                if first != at[name]:
                    self.steering.start_at(name, first)
                    self.witness.start_at(name, first)
                at[name] = first + count
                spans.append(TokenSpan(name, start, first, count))
                start += count + 1
            self.step(number, spans, start)
        self.witness.read()

    def step(self, number, spans, rows):
        ids = torch.zeros(rows, dtype=torch.int64)
        for span in spans:
            ids[span.start_row : span.start_row + span.num_tokens] = torch.tensor(
                IDS[span.request][span.first_position : span.end_position]
            )
        forward_pass.sights = self.witness.watch(spans, ids)
        forward_pass.pushes = self.steering.prepare(spans, self.embed_spans, self.embed_prefix)
        generator = torch.Generator().manual_seed(number)
        hidden, residual = (torch.randn(rows, 40, generator=generator).to(self.dtype) for _ in range(2))
        self.model(hidden, residual)
        forward_pass.movements.measure()
        self.steering.record(forward_pass.pushes)
        forward_pass.clear()

    def embed_spans(self, spans):
        parts = [
            self.embed(IDS[one.request][one.first_position : one.end_position], one.first_position) for one in spans
        ]
        return torch.cat(parts)

    def embed_prefix(self, request, start, end):
        return self.embed(IDS[request][start:end], start)

    def receipts(self, name):
        measured = self.steering.measurement(name)
        told = {
            "cached": measured.cached,
            "layers": {str(one.layer): {"first": one.first, "doses": list(one.doses)} for one in measured.layers},
            "failure": measured.failure,
            "seen": {str(layer): states for layer, states in self.witness.take(name).items()},
        }
        [merged] = merge_measurements([[told], [told]])
        ids, proof = IDS[name][: FED[name] + 1], self.proofs[name]
        prove(proof, merged, ids=ids, dtype=self.dtype)
        return measured_receipts(self.plans[name], merged, proof, prompt_tokens=PROMPT, fed=FED[name])


def _steered_by(change):
    def steer(hidden, push, residual=None):
        return STEER(hidden, change(push), residual)

    return lambda patch: patch.setattr(layer_hooks, "steer", steer)


def _random(push):
    noise = torch.randn(push.shape, generator=torch.Generator().manual_seed(1))
    return noise / noise.norm(dim=-1, keepdim=True) * push.norm(dim=-1, keepdim=True)


def _twice(patch):
    patch.setattr(
        layer_hooks,
        "steer",
        lambda hidden, push, residual=None: STEER(STEER(hidden, push, residual), push, residual),
    )


def _rows_shifted(patch):
    def step_push(self, *args):
        made = STEP_PUSH(self, *args)
        made.rows = made.rows - 1
        return made

    patch.setattr(LayerRows, "step_push", step_push)


def _at_another_layer(patch):
    load = StepSteering.load
    patch.setattr(StepSteering, "load", lambda self, digest, one: load(self, digest, replace(one, layer=one.layer + 1)))


def _another_operator(patch):
    load = StepSteering.load

    def mixed_up(self, digest, one):
        load(self, digest, next(iter(self.loaded.values()), one))

    patch.setattr(StepSteering, "load", mixed_up)


def _lost_running_sum(patch):
    """After it came back, a request goes on with the sum of nothing."""
    patch.setattr(step_steering, "terms", lambda operator, x, positions: operator.factors.new_zeros(1, 40))


def _stale_block(patch):
    """Each next token of a steady batch is multiplied with the block of the first one."""
    compute = push_plan._Product.compute
    patch.setattr(push_plan._Product, "compute", lambda self, x, steps: compute(self, x, 0))


def _stale_sum(patch):
    """A steady batch leaves behind the sums that it began with."""
    step = SteadyBatch.step

    def forgetful(self, *args):
        before = [[each.clone() for each in state.running_sums] for state in self._states]
        made = step(self, *args)
        for state, sums in zip(self._states, before, strict=True):
            state.running_sums = sums
        return made

    patch.setattr(SteadyBatch, "step", forgetful)


def _stale_embeddings(patch):
    patch.setattr(Worker, "embed_spans", lambda self, spans: OWN_EMBED(self, spans).flip(0))


OWN_EMBED = Worker.embed_spans

MUTATIONS = {
    "one hundredth": _steered_by(lambda push: 0.01 * push),
    "a random direction": _steered_by(_random),
    "the opposite sign": _steered_by(torch.neg),
    "rows swapped": _steered_by(lambda push: push.flip(0)),
    "rows shifted": _rows_shifted,
    "the first row only": _steered_by(lambda push: torch.cat((push[:1], 0 * push[1:]))),
    "numbers swapped": _steered_by(lambda push: push.roll(1, -1)),
    "twice": _twice,
    "at another layer": _at_another_layer,
    "another operator": _another_operator,
    "a lost running sum": _lost_running_sum,
    "a block twice": _stale_block,
    "a sum that stands still": _stale_sum,
    "other tokens' embeddings": _stale_embeddings,
}


@pytest.fixture
def make_worker(llama, artifact, other_artifact, plan_of):
    def make(dtype=torch.float32, **options):
        plans = {"a": plan_of((artifact, 0.4), **options), "b": plan_of((other_artifact, 0.4), **options)}
        return Worker(plans, EmbeddingRows(llama.model), dtype)

    yield make
    forward_pass.clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", ["cumulative", "substitute"])
@pytest.mark.parametrize("blend", [0.0, 0.5, 1.0])
def test_what_a_worker_did_right_is_proven(make_worker, dtype, rule, blend):
    worker = make_worker(dtype, rule=rule, blend=blend)
    worker.run()
    for name in IDS:
        (receipt,) = worker.receipts(name)
        assert receipt.positions_checked >= 5
        assert receipt.worst_cosine > 0.9999


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_push_that_is_not_the_plans_fails_the_text(make_worker, monkeypatch, mutation, dtype):
    MUTATIONS[mutation](monkeypatch)
    worker = make_worker(dtype)
    worker.run()
    # The first operator is the right one for the first request; the other request never lost its sum.
    right = {"another operator": "a", "a lost running sum": "b", "a sum that stands still": "a"}.get(mutation)
    for name in IDS:
        if name != right:
            with pytest.raises(SteeringNotAppliedError):
                worker.receipts(name)


def test_where_a_request_comes_back_is_looked_at(make_worker):
    worker = make_worker()
    asked = worker.proofs["a"].positions[2]
    worker.run()
    seen = [position for position, *_ in worker.witness.take("a")[2]]
    assert 4 in seen
    assert set(seen) == {position for position in (*asked, 4) if position < FED["a"]}
    assert len(worker.witness) == 1


def test_a_position_that_no_worker_looked_at_is_missed(make_worker):
    worker = make_worker()
    worker.witness.take("a")
    worker.run()
    with pytest.raises(SteeringNotAppliedError, match="layer 2: nothing was seen of what was done to position 0"):
        worker.receipts("a")


def test_a_state_of_another_token_proves_nothing(make_worker, monkeypatch):
    worker = make_worker()
    worker.run()
    monkeypatch.setitem(IDS, "a", (21, *IDS["a"][1:]))
    with pytest.raises(SteeringNotAppliedError, match="token 20 was looked at for position 0 of the text, which is 21"):
        worker.receipts("a")


def test_a_hook_on_another_layer_than_its_number_is_refused_at_the_start(monkeypatch):
    layers = layer_hooks._decoder_layers
    monkeypatch.setattr(layer_hooks, "_decoder_layers", lambda model: [*layers(model)[1:], layers(model)[0]])
    with pytest.raises(RuntimeError, match=r"Model: model\.layers\.1 was taken for its decoder layer 0"):
        install_hooks(Model())
