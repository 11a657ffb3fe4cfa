"""The start-up self-test: every block of the model is pushed where it should be, in the direction that it should.

One text is pushed at all of its layers, at every position, by an operator of random numbers each, and held against the
reference at all of them. A model that fails is not served.
"""

from __future__ import annotations

from operators.core.apply import Setting
from operators.model.loading import LoadedModel
from operators.model.text_ids import text_ids
from steer_server.engine.describe import describe_model
from steer_server.engine.hf.decode import Decoder
from steer_server.engine.hf.operator_cache import PreparedOperatorCache
from steer_server.engine.random_operators import random_operators
from steer_server.errors import StartupError, SteerServerError
from steer_server.types import Application, DecodeJob, Row, RowFinished, SamplingParams, SteeringPlan

_PROMPT = "The capital of France is the city of"
_MAX_PROMPT, _TOKENS = 9, 3
_STRENGTH = 0.1
"""Of each layer: small, so that all of them together leave the logits finite."""


def check_steering(loaded: LoadedModel) -> None:
    """Raises :class:`StartupError` with what went wrong."""
    model = describe_model(loaded, engine="hf")
    ids = tuple(text_ids(loaded.tokenizer, _PROMPT)[:_MAX_PROMPT])
    setting = Setting(_STRENGTH, "cumulative", 0.0)
    uses = tuple(
        Application(f"self-test-{layer}", operator, setting, ())
        for layer, operator in enumerate(random_operators(model))
    )
    decoder = Decoder(
        loaded=loaded,
        job=DecodeJob.of(ids, SamplingParams(max_tokens=_TOKENS, ignore_eos=True), (Row(), Row(SteeringPlan(uses)))),
        operators=PreparedOperatorCache(loaded.device, budget=0),
        check_interruption=lambda: None,
        eos_ids=frozenset(),
        prove_every_position=True,
    )
    try:
        ends = [event for event in decoder.run() if isinstance(event, RowFinished) and event.receipts]
    except SteerServerError as error:
        raise StartupError(f"self-test: {error}") from error
    for receipt in ends[0].receipts:
        steered = receipt.prompt_tokens_steered + receipt.generated_tokens_steered
        if not 0 < steered == receipt.positions_checked:
            raise StartupError(
                f"self-test: layer {receipt.layer}: the direction was checked at {receipt.positions_checked} of "
                f"{steered} positions"
            )
