"""The pushes of a step by layer, and of the steps after it that bring the same requests one more token each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import torch

from steer_server.engine.vllm.worker.push_plan import PushPlan
from steer_server.engine.vllm.worker.pushes import OperatorGroup, TokenSpan
from steer_server.engine.vllm.worker.request_state import RequestState
from steer_server.engine.vllm.worker.step_push import LayerRows, StepPush

EmbedSpans = Callable[[Sequence[TokenSpan]], torch.Tensor]
"""``embed(spans)``: the embeddings of tokens of the coming step as the first block receives them, (sum of their numbers
of tokens, d), span after span."""


class StepPlan:
    """What is pushed in a step, laid out."""

    def __init__(self, ordered: Sequence[tuple[int, OperatorGroup]], like: torch.Tensor) -> None:
        """Lays out a step that is worked out at once.

        Args:
            ordered: groups with their layers, layer by layer.
            like: (..., d) float32, on the device of the embeddings.
        """
        self._pushes = PushPlan([group for _, group in ordered], like)
        spans: dict[int, list[TokenSpan]] = defaultdict(list)
        for layer, group in ordered:
            spans[layer].extend(push.span for push in group.span_pushes if push.span.num_tokens)
        self._layers = {layer: LayerRows(of_layer, like.device) for layer, of_layer in spans.items() if of_layer}
        self._counts = [sum(span.num_tokens for span in of_layer) for of_layer in spans.values() if of_layer]

    def compute(self, x: torch.Tensor, step: int, later: Mapping[str, TokenSpan] | None = None) -> dict[int, StepPush]:
        """The pushes by layer; ``x`` (R, d) float32. The running sums of the groups' pushes are advanced.

        Args:
            later: in a step after the first one, each request's token; None in the first one.
        """
        pushes, usable = self._pushes.compute(x)
        of_layers = zip(torch.split(pushes, self._counts), torch.split(usable, self._counts), strict=True)
        return {
            layer: rows.step_push(*of_layer, step, later)
            for (layer, rows), of_layer in zip(self._layers.items(), of_layers, strict=True)
        }


class SteadyBatch:
    """Requests that each brought one token in the last step, for as long as the next ones bring theirs.

    Nothing is worked out anew but what depends on the tokens. Any other step, and whatever changes a request or an
    operator, ends it: what is known of the requests (:class:`.RequestState`) is then as if it had not been.
    """

    def __init__(
        self,
        spans: Sequence[TokenSpan],
        states: Sequence[RequestState],
        needed: Sequence[int],
        plan: StepPlan | None,
        num_steps: float,
    ) -> None:
        """A batch of which one step was prepared.

        Args:
            spans: one token of each request; ``states``: of each, what is known of it.
            needed: which of the spans are pushed or summed.
            plan: of that step, which it has computed; None where nothing is needed.
            num_steps: how many steps more the same operators push the same requests.
        """
        self._requests = [span[:2] for span in spans]
        """Name and row of each."""
        self._states, self._needed, self._plan, self._steps_left = states, needed, plan, num_steps

    def goes_on(self, spans: Sequence[TokenSpan]) -> bool:
        """Whether these are the next tokens of the same requests, one each, in the same rows and to the same end."""
        return (
            self._steps_left > 0
            and [span[:2] for span in spans] == self._requests
            and all(
                span.num_tokens == 1 and span.first_position == state.position
                for span, state in zip(spans, self._states, strict=True)
            )
        )

    def step(self, spans: Sequence[TokenSpan], embed: EmbedSpans, step: int) -> dict[int, StepPush]:
        """The pushes of a step with which it goes on, by layer; ``step`` is its number."""
        self._steps_left -= 1
        for span, state in zip(spans, self._states, strict=True):
            state.advance(span)
        if self._plan is None:
            return {}
        x = embed([spans[index] for index in self._needed]).to(torch.float32)
        return self._plan.compute(x, step, {span.request: span for span in spans})
