"""The positions of a plan against those that the model is fed: the prompt, and every generated token but the last.

What no text of a request can have is refused before it is queued. What a text did not reach is an error at its end,
unless the time limit or the server ended it.
"""

from __future__ import annotations

from steer_server.errors import InvalidRequestError, SteeringNotAppliedError
from steer_server.types import FinishReason, Receipt, SteeringPlan

_INTERRUPTIONS = (FinishReason.TIME_LIMIT, FinishReason.CANCELLED)


def check_reachable(
    plan: SteeringPlan | None, field: str, *, prompt_tokens: int, max_tokens: int, context_length: int
) -> None:
    """Raises :class:`InvalidRequestError` for an operator whose positions no text of the request can have.

    Args:
        field: of the request's operators.
        max_tokens: most that are generated.
        context_length: tokens of prompt and text together that the model takes.
    """
    num_fed = min(prompt_tokens + max_tokens, context_length) - 1
    for index, use in enumerate(plan.applications if plan else ()):
        positions = use.setting.positions
        if positions.count(0, num_fed, prompt_tokens=prompt_tokens):
            continue
        begin, _ = positions.interval(prompt_tokens)
        accepted = f"the prompt has {prompt_tokens} tokens"
        if positions.part != "prompt":
            accepted += f", and the model is fed {num_fed} at most, all but the last that it may generate"
        raise InvalidRequestError(
            f"{field}[{index}].positions", f"is {positions}, which begins at position {begin}; {accepted}"
        )


def check_receipts(
    plan: SteeringPlan | None,
    receipts: tuple[Receipt, ...],
    *,
    prompt_tokens: int,
    generated_tokens: int,
    reason: FinishReason,
) -> None:
    """Checks once more, for any engine, that the plan was applied at each of its positions that the model was fed.

    Raises :class:`SteeringNotAppliedError`: then there is no text.
    """
    uses = plan.applications if plan else ()
    asked = [(use.artifact.digest, use.setting.positions) for use in uses]
    if asked != [(receipt.digest, receipt.positions) for receipt in receipts]:
        raise SteeringNotAppliedError("the engine's receipts are not those of the plan")
    if generated_tokens == 0 and reason in _INTERRUPTIONS:
        # Perhaps amid the prompt.
        return
    if generated_tokens == 0 and any(use.setting.strength for use in uses):
        raise SteeringNotAppliedError(f"the text ended ({reason}) without a token, so that nothing proves its steering")
    num_fed = prompt_tokens + generated_tokens - 1
    for use, receipt in zip(uses, receipts, strict=True):
        if use.setting.strength == 0.0:
            continue
        positions = use.setting.positions
        due = (
            positions.count(0, prompt_tokens, prompt_tokens=prompt_tokens),
            positions.count(prompt_tokens, num_fed, prompt_tokens=prompt_tokens),
        )
        if due == (0, 0) and reason not in _INTERRUPTIONS:
            raise SteeringNotAppliedError(
                f"{use.name}: positions {positions} begin at {positions.interval(prompt_tokens)[0]}; the text ended "
                f"({reason}) when the model had been fed {num_fed} tokens, and nothing was steered"
            )
        steered = receipt.prompt_tokens_steered + receipt.prompt_tokens_cached, receipt.generated_tokens_steered
        if steered != due:
            raise SteeringNotAppliedError(
                f"{use.name}: {steered[0]} prompt and {steered[1]} generated tokens were steered; {due[0]} and "
                f"{due[1]} of those fed to the model are among its positions ({positions})"
            )
        if receipt.prompt_tokens_steered + receipt.generated_tokens_steered and not receipt.positions_checked:
            raise SteeringNotAppliedError(f"{use.name}: at none of its positions was the direction looked at")
