"""No request is silently unsteered: a text is handed on only with proof of its steering."""

from __future__ import annotations

from collections.abc import Sequence

from steer_client._errors import SteeringNotAppliedError
from steer_client._requests import OperatorUse
from steer_client._results import Generation


def check_receipts(uses: Sequence[OperatorUse], generation: Generation) -> Generation:
    """Gives `generation` back when its receipts answer for `uses`, one for one and in order.

    Raises SteeringNotAppliedError when a receipt is missing or unasked for, or when an operator of non-zero
    strength changed no position of a text that has tokens.
    """
    asked = [use.name for use in uses]
    proven = [receipt.operator for receipt in generation.receipts]
    if asked != proven:
        raise _error(f"asked for {_names(asked)}, but the server's receipts are for {_names(proven)}", generation)
    if generation.usage.completion_tokens == 0:
        return generation
    for use, receipt in zip(uses, generation.receipts, strict=True):
        strength = receipt.strength if use.strength is None else use.strength
        if strength != 0 and receipt.prompt_tokens_steered + receipt.generated_tokens_steered == 0:
            raise _error(f"{use.name} (λ {strength:g}) steered none of the tokens", generation)
    return generation


def _names(names: Sequence[str]) -> str:
    return ", ".join(names) if names else "no operator"


def _error(what: str, generation: Generation) -> SteeringNotAppliedError:
    return SteeringNotAppliedError(
        f"the text is not steered as asked: {what}", metadata={"request_id": generation.request_id}
    )
