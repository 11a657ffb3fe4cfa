"""Steering the steps of continuous batching: many requests, each at its own position, in one forward pass.

This module knows nothing of vLLM. It is told which request owns which tokens of a step (:class:`.pushes.TokenSpan`),
and asks for the embeddings of those tokens that it needs.

Tokens that meet the same operator are computed together, whatever requests they belong to, so that the cost grows with
the number of operators in a step and not with that of strengths, blends or requests. A request keeps its running sums
with the position up to which they go. If it comes back at another position (preempted and resumed, or begun after a
cached prefix), they are computed anew from its token ids.

An operator pushes the positions of its setting. Tokens before them count into its running sum, where its rule has one;
after them nothing is computed for it, nor is anything embedded, pushed or measured.

Every position before a token was either pushed in a step that was prepared here, or announced as cached
(:meth:`StepSteering.start_at`). An unannounced gap is a failure, never taken for a cached prefix.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from operators.core.apply import PreparedOperator, terms
from steer_server.engine.vllm.worker.chunked_pushes import compute_in_chunks, tokens_per_chunk
from steer_server.engine.vllm.worker.dose_ranges import dose_ranges
from steer_server.engine.vllm.worker.prepared_setting import PreparedSetting
from steer_server.engine.vllm.worker.pushes import GroupKey, OperatorGroup, SpanPush, TokenSpan
from steer_server.engine.vllm.worker.request_state import RequestMeasurement, RequestState, not_steered
from steer_server.engine.vllm.worker.step_plan import EmbedSpans, SteadyBatch, StepPlan
from steer_server.engine.vllm.worker.step_push import StepPush, read_movements
from steer_server.engine.vllm.worker_protocol import OperatorSetting

EmbedPrefix = Callable[[str, int, int], torch.Tensor]
"""``embed_prefix(request, start, end)``: the embeddings (end - start, d) of these tokens of a request."""


@dataclass(frozen=True, eq=False)
class LoadedOperator:
    """An operator on the worker's device and the layer whose input it pushes."""

    operator: PreparedOperator
    layer: int


class StepSteering:
    """The steering of all requests of a worker: :meth:`prepare` before each forward pass, :meth:`record` after it."""

    def __init__(self, *, chunk: int | None = None) -> None:
        """``chunk``: tokens, counted once per operator, worked on at once; None for :func:`.tokens_per_chunk`."""
        self._chunk = chunk
        self._operators: dict[str, LoadedOperator] = {}
        self._requests: dict[str, RequestState] = {}
        self._step = 0
        self._steady: SteadyBatch | None = None
        """What the last step brought, where the next one may bring the same requests one more token each."""
        self._first_failed_step: dict[str, int] = {}
        """By salt, the first step in which a request failed: what is cached from then on may be what it left.

        Never pruned, because any later request may bring the salt again. It grows with failures only, which are rare.
        """

    def load(self, digest: str, loaded: LoadedOperator) -> None:
        """Makes an operator known by its digest. Loading a digest again changes nothing but the object."""
        self._steady = None
        self._operators[digest] = loaded

    def unload(self, digest: str) -> None:
        """Forgets an operator. A request that still uses it fails."""
        self._steady = None
        self._operators.pop(digest, None)

    @property
    def loaded(self) -> Mapping[str, LoadedOperator]:
        """Operators by digest."""
        return self._operators

    def add_request(self, request: str, settings: tuple[OperatorSetting, ...], salt: str) -> None:
        """A new request; nothing happens where it is known already.

        Args:
            salt: of its keys and values. What a failed request left under one fails whoever reads it.
        """
        if request in self._requests:
            return
        unknown = [setting.digest for setting in settings if setting.digest not in self._operators]
        at_layer: dict[int, list[OperatorSetting]] = defaultdict(list)
        prepared = []
        for index, setting in enumerate(settings):
            loaded = self._operators.get(setting.digest)
            if loaded is None:
                continue
            at_layer[loaded.layer].append(setting)
            if setting.anchor != "contrast" or loaded.operator.unit_contrast is not None:
                is_vector = loaded.operator.is_vector
                prepared.append(PreparedSetting.of(setting, index, layer=loaded.layer, is_vector=is_vector))
        ranges = {layer: dose_ranges(pushing) for layer, pushing in at_layer.items()} if not unknown else {}
        state = RequestState(settings, tuple(prepared), salt, ranges, running_sums=[None] * len(settings))
        self._requests[request] = state
        if unknown:
            self._fail(state, self._step, f"operator {unknown[0]} is not loaded")
        for setting in settings:
            if setting.blend != 1.0 and self._is_vector(setting.digest):
                self._fail(state, self._step, f"{setting.digest} is a vector: blend is {setting.blend:g}, not 1")
            if self._lacks_anchor(setting):
                self._fail(state, self._step, f"{setting.digest} has no contrast anchor")

    def remove_request(self, request: str) -> None:
        """Drops the state of a request."""
        self._steady = None
        self._requests.pop(request, None)

    def __contains__(self, request: str) -> bool:
        return request in self._requests

    def __len__(self) -> int:
        return len(self._requests)

    def measurement(self, request: str) -> RequestMeasurement:
        """What was done to a request so far. Raises :class:`KeyError` for an unknown one."""
        state = self._requests[request]
        if state.salt in self._first_failed_step and state.prefix_step >= self._first_failed_step[state.salt]:
            self._fail(state, state.prefix_step, "its prompt's beginning was left by a request that failed")
        return state.measurement()

    def start_at(self, request: str, position: int) -> None:
        """A request begins, or comes back, in the coming step: all before ``position`` is in the KV cache.

        Does nothing for a request that is not steered.
        """
        if request in self._requests:
            self._steady = None
            self._requests[request].start_at(position, self._step + 1)

    def fail_unprepared(self, request: str) -> None:
        """Tokens of a request were computed in a step that was not prepared for it.

        Does nothing for a request that is not steered.
        """
        if request in self._requests:
            self._fail(self._requests[request], self._step, "a step ran without its pushes")

    def prepare(self, spans: Sequence[TokenSpan], embed: EmbedSpans, embed_prefix: EmbedPrefix) -> dict[int, StepPush]:
        """The pushes of the coming step, by layer; a layer at which nothing is pushed is not among them.

        A request that cannot be steered (an operator was unloaded, a token has no direction, or was not announced) has
        its failure noted, for :meth:`measurement`.

        Args:
            spans: the tokens of known requests in this step: all of them, whether they are pushed or not.
            embed: not called where none of the tokens is needed.
        """
        self._step += 1
        if self._steady is not None and self._steady.goes_on(spans):
            return self._steady.step(spans, embed, self._step)
        self._steady = None
        span_pushes: list[SpanPush] = []
        needed: list[int] = []
        parts: list[TokenSpan] = []
        num_needed = 0
        for index, span in enumerate(spans):
            state = self._requests[span.request]
            if span.first_position > state.position:
                self._fail(state, self._step, not_steered(state.position, span.first_position))
            pushes = self._span_pushes(state, span, embed_prefix)
            state.advance(span)
            if not pushes:
                continue
            # All that its operators need.
            first = min(push.first_position for push in pushes)
            needed.append(index)
            parts.append(span.part(first, max(push.span.end_position for push in pushes)))
            for push in pushes:
                push.offset = num_needed + push.first_position - first
            span_pushes += pushes
            num_needed += parts[-1].num_tokens
        plan, step_pushes = None, dict[int, StepPush]()
        if span_pushes:
            x = embed(parts).to(torch.float32)
            plan, step_pushes = self._step_pushes(self._grouped(span_pushes), x)
        if (plan is not None or not span_pushes) and all(span.num_tokens == 1 for span in spans):
            states = [self._requests[span.request] for span in spans]
            num_steps = min((state.steps_unchanged for state in states), default=0)
            self._steady = SteadyBatch(spans, states, needed, plan, num_steps)
        return step_pushes

    def _span_pushes(self, state: RequestState, span: TokenSpan, embed_prefix: EmbedPrefix) -> list[SpanPush]:
        """What the operators of a request have to do with its tokens of a step; their offsets are left at 0."""
        pushes = []
        for one in state.prepared:
            of_setting = one.pushes(span)
            if of_setting and one.group.digest not in self._operators:
                self._fail(state, self._step, f"operator {one.group.digest} was unloaded")
            else:
                pushes += of_setting
        self._complete_running_sums(state, span, pushes, embed_prefix)
        return pushes

    def _grouped(self, span_pushes: Sequence[SpanPush]) -> list[tuple[int, OperatorGroup]]:
        """Groups with their layers: by layers, so that the pushes of each are one slice."""
        groups: dict[GroupKey, list[SpanPush]] = defaultdict(list)
        for push in span_pushes:
            groups[push.group].append(push)
        return [
            (key.layer, OperatorGroup(self._operators[key.digest].operator, key.rule, key.anchor, groups[key]))
            for key in sorted(groups, key=lambda key: key.layer)
        ]

    def _step_pushes(
        self, ordered: Sequence[tuple[int, OperatorGroup]], x: torch.Tensor
    ) -> tuple[StepPlan | None, dict[int, StepPush]]:
        """What a step pushes, and its plan if it was worked out at once."""
        size, plan = self._chunk_of(x.shape[1]), None
        if sum(group.num_tokens for _, group in ordered) > size:
            step_pushes = compute_in_chunks(ordered, x, size, self._step)
        else:
            plan = StepPlan(ordered, x)
            step_pushes = plan.compute(x, self._step)
        for push in (push for _, group in ordered for push in group.span_pushes if push.running_sum is not None):
            self._requests[push.span.request].running_sums[push.setting_index] = push.running_sum
        return plan, step_pushes

    def _chunk_of(self, width: int) -> int:
        return self._chunk or tokens_per_chunk(width)

    def record(self, step_pushes: Mapping[int, StepPush]) -> None:
        """Records what was measured in a forward pass. Reads it from the device, which waits for the pass."""
        found = read_movements(list(step_pushes.values()))
        for (layer, step_push), (moved, usable) in zip(step_pushes.items(), found, strict=True):
            all_usable, start = all(usable), 0
            for span in step_push.spans:
                end = start + span.num_tokens
                state = self._requests.get(span.request)
                if state is not None:
                    of_span = () if all_usable else usable[start:end]
                    problem = state.record(layer, span, moved[start:end], of_span)
                    if step_push.times > 1:
                        problem = f"layer {layer} was pushed {step_push.times} times in one step"
                    if problem:
                        self._fail(state, step_push.step, problem)
                start = end

    def _complete_running_sums(
        self, state: RequestState, span: TokenSpan, pushes: Sequence[SpanPush], embed_prefix: EmbedPrefix
    ) -> None:
        """Gives the pushes of a span their running sums before it: the request's own, or made from its tokens."""
        continues = span.first_position == state.position
        missing = []
        for push in pushes:
            if push.group.has_running_sum:
                push.running_sum = state.running_sums[push.setting_index] if continues else None
                if push.running_sum is None:
                    missing.append(push)
        operators = [self._operators[push.group.digest].operator for push in missing]
        sums = [operator.factors.new_zeros(operator.factors.shape[1]) for operator in operators]
        size = self._chunk_of(operators[0].factors.shape[2]) if missing else 1
        for start in range(0, span.first_position if missing else 0, size):
            end = min(start + size, span.first_position)
            x = embed_prefix(span.request, start, end).to(torch.float32)
            for total, operator in zip(sums, operators, strict=True):
                total += terms(operator, x, torch.arange(start, end)).sum(0)
        for push, total in zip(missing, sums, strict=True):
            push.running_sum = total

    def _lacks_anchor(self, setting: OperatorSetting) -> bool:
        loaded = self._operators.get(setting.digest)
        return loaded is not None and setting.anchor == "contrast" and loaded.operator.unit_contrast is None

    def _is_vector(self, digest: str) -> bool:
        loaded = self._operators.get(digest)
        return loaded is not None and loaded.operator.is_vector

    def _fail(self, state: RequestState, step: int, problem: str) -> None:
        state.failure = state.failure or problem
        self._first_failed_step[state.salt] = min(step, self._first_failed_step.get(state.salt, step))
