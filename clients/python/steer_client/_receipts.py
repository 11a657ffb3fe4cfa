"""Checks receipts against the request: a text without proof of its steering is an error."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Final

from steer_client._defaults import NORMAL
from steer_client._errors import ProtocolError, SteeringNotAppliedError
from steer_client._positions import Positions
from steer_client._requests import OperatorUse
from steer_client._results import FinishReason, Generation, Receipt, TextScore, Usage

_NUMBERS: Final = ("strength", "blend")
_INTERRUPTIONS: Final = (FinishReason.TIME_LIMIT, FinishReason.CANCELLED)
_SETTINGS: Final = ("strength", "rule", "blend", "positions", "anchor", "first_token")
# Relative, for the rounding of sums of a few doubles.
_SUM_TOLERANCE: Final = 1e-9
# Twice the resolution of bfloat16, the coarsest dtype of hidden states.
_ROUNDING: Final = 2.0**-6
# What a server lets pass in that dtype.
_MIN_COSINE: Final = 0.9995


def check_receipts(uses: Sequence[OperatorUse], generation: Generation) -> Generation:
    """Returns `generation` if its receipts prove `uses`, one for one and in order.

    Raises SteeringNotAppliedError, naming the operator, for a receipt

    - that is missing or was not requested, or is of another version than the one that was pinned,
    - whose strength, rule, blend, positions, anchor or first token are not the request's, or whose `defaulted` is not
      what the request left unset,
    - whose words, weights or KL budget are not the request's, or that names no lens, or no tokens, for its words,
    - whose dose bound is not the sum of |λ|/2 over the receipts of its layer (λ is the strength, a dose half of it),
    - of a strength other than 0 whose steered and cached prompt tokens do not add up to those of the prompt that are
      among its positions, whose steered generated tokens are not those of its positions that were fed to the model, or
      whose doses are not positive and in order (0 < mean <= max <= bound, but for rounding to the model's dtype), or
      not the bound where no other operator pushes at its layer,
    - of a strength other than 0 that has steered tokens, of none of which the direction was checked, of more than there
      are, or with a cosine below 0.9995,
    - of a strength other than 0 none of whose positions the text reached, unless it was interrupted,
    - of strength 0 that reports a change, or a cached token.

    A cached token cannot be checked: its measurement belongs to the earlier request.

    A text without any token (its time ran out first) has no measurements: only the first four are checked.
    """
    requested = [use.name for use in uses]
    proven = [receipt.operator for receipt in generation.receipts]
    if requested != proven:
        raise _not_applied(
            f"asked for {_names(requested)}, but the server's receipts are for {_names(proven)}", generation
        )
    for use, receipt in zip(uses, generation.receipts, strict=True):
        problem = _setting_problem(use, receipt) or _bound_problem(receipt, generation.receipts)
        if problem is None and _has_tokens(generation):
            problem = (
                _count_problem(receipt, generation)
                or _dose_problem(receipt, generation.receipts)
                or _direction_problem(receipt)
            )
        if problem is not None:
            raise _not_applied(f"{use.name}: {problem}", generation)
    return generation


def check_score(arms: Mapping[str, Sequence[OperatorUse]], score: TextScore) -> TextScore:
    """Returns `score` if its arms are the plain one and these, in order, and the receipts of each prove its operators.

    Raises ProtocolError for other arms, and SteeringNotAppliedError as check_receipts does.
    """
    asked, found = [NORMAL, *arms], [each.arm for each in score.arms]
    if found != asked:
        raise ProtocolError(f"the server scored the arms {found}; asked for were {asked}")
    usage, ids = Usage(len(score.prompt_token_ids), len(score.token_ids)), score.token_ids
    for uses, arm in zip(((), *arms.values()), score.arms, strict=True):
        # To a receipt, a text that was read is what a generated one is.
        read = Generation(
            score.request_id, "", ids, FinishReason.MAX_TOKENS, None, usage, score.timings, arm.receipts, (), 0
        )
        check_receipts(uses, read)
    return score


def _setting_problem(use: OperatorUse, receipt: Receipt) -> str | None:
    # Of a lens, the receipt's digest is that of the direction.
    version = receipt.lens_digest if use.words else receipt.digest
    if use.digest is not None and version != use.digest:
        return f"the receipt says digest {version}, asked for was {use.digest}"
    for name in _SETTINGS:
        requested, applied = getattr(use, name), getattr(receipt, name)
        # A number is a double on the wire, whatever type the caller gave it.
        if requested is not None and applied != (float(requested) if name in _NUMBERS else requested):
            return f"the receipt says {name} {applied}, asked for was {requested}"
    # A strength that was read off a dose curve was asked for, in nats.
    unset = [
        name for name in _SETTINGS if getattr(use, name) is None and not (name == "strength" and use.kl is not None)
    ]
    if sorted(receipt.defaulted) != sorted(unset):
        defaulted = _names(receipt.defaulted, none="nothing")
        unset_names = _names(unset, none="nothing")
        return f"the receipt says that {defaulted} took a recommended value, left unset was {unset_names}"
    return _words_problem(use, receipt) or _kl_problem(use, receipt)


def _words_problem(use: OperatorUse, receipt: Receipt) -> str | None:
    # As the server reads them.
    asked = [(unicodedata.normalize("NFC", word.text).strip(), float(word.weight)) for word in use.words]
    read = [(word.text, word.weight) for word in receipt.words]
    if asked != read:
        return f"the receipt says words {_named(read)}, asked for were {_named(asked)}"
    if read and not (receipt.lens_digest and all(word.token_ids for word in receipt.words)):
        return "the receipt lacks the lens or the tokens that its words were read with"
    if receipt.lens_digest and not read:
        return "the receipt is that of a lens, but of no word"
    return None


def _kl_problem(use: OperatorUse, receipt: Receipt) -> str | None:
    # A lens has a budget of its own where the request gives neither a strength nor one.
    own = bool(use.words) and use.strength is None and use.kl is None
    if own or receipt.kl == (None if use.kl is None else float(use.kl)):
        return None
    return f"the receipt says that the strength is for a p95 KL of {receipt.kl}, asked for was {use.kl}"


def _named(words: Sequence[tuple[str, float]]) -> str:
    return ", ".join(f"{text!r} × {weight:g}" for text, weight in words) or "none"


def _bound_problem(receipt: Receipt, receipts: Sequence[Receipt]) -> str | None:
    bound = sum(abs(other.strength) / 2 for other in receipts if other.layer == receipt.layer)
    if math.isclose(receipt.dose_bound, bound, rel_tol=_SUM_TOLERANCE):
        return None
    return (
        f"the receipt says that λ adds up to {2 * receipt.dose_bound:g} at layer {receipt.layer}, the strengths there "
        f"give {2 * bound:g}"
    )


def _has_tokens(generation: Generation) -> bool:
    # The usage alone does not decide: a false count of 0 would skip the checks of every measurement.
    return bool(generation.usage.completion_tokens or generation.token_ids or generation.text)


def _count_problem(receipt: Receipt, generation: Generation) -> str | None:
    prompt, cached = receipt.prompt_tokens_steered, receipt.prompt_tokens_cached
    reported = prompt + cached, receipt.generated_tokens_steered
    expected = _steered_tokens(receipt.positions, generation) if receipt.strength != 0 else (0, 0)
    if receipt.strength != 0 and expected == (0, 0) and generation.finish_reason not in _INTERRUPTIONS:
        return f"the text ended before the first of the positions {receipt.positions}: nothing was steered"
    # With a count below 0 the other one could exceed the prompt.
    if reported == expected and min(prompt, cached) >= 0:
        return None
    cached_too = f" ({cached} more cached)" if cached else ""
    return (
        f"the receipt says {prompt} prompt{cached_too} + {reported[1]} generated tokens steered at "
        f"λ {receipt.strength:g}, expected were {expected[0]} + {expected[1]}"
    )


def _steered_tokens(positions: Positions, generation: Generation) -> tuple[int, int]:
    """How many tokens of prompt and text are among the positions, and were fed to the model."""
    usage = generation.usage
    # The last generated token is never fed back to the model. A usage below the number of tokens sent does not count.
    fed = usage.prompt_tokens + max(usage.completion_tokens, len(generation.token_ids), 1) - 1
    return (
        positions.count(0, usage.prompt_tokens, prompt_tokens=usage.prompt_tokens),
        positions.count(usage.prompt_tokens, fed, prompt_tokens=usage.prompt_tokens),
    )


def _dose_problem(receipt: Receipt, receipts: Sequence[Receipt]) -> str | None:
    bound = receipt.dose_bound
    # A token whose measurement an earlier request had gives none here.
    if receipt.prompt_tokens_steered or receipt.generated_tokens_steered:
        slack = (1 + bound) * _ROUNDING
        alone = sum(other.layer == receipt.layer and other.strength != 0 for other in receipts) == 1
        least = bound - slack if alone else 0.0
        fits = 0 < receipt.mean_dose <= receipt.max_dose <= bound + slack < math.inf and receipt.mean_dose >= least
        expected = f"{2 * bound:g} but for rounding" if alone else f"0 < mean <= max <= {2 * bound:g}"
    else:
        fits, expected = receipt.mean_dose == receipt.max_dose == 0, "0"
    if fits:
        return None
    return (
        f"the receipt says λ mean {receipt.mean_strength:g}, max {receipt.max_strength:g} measured at λ "
        f"{receipt.strength:g}, expected was {expected}"
    )


def _direction_problem(receipt: Receipt) -> str | None:
    steered = receipt.prompt_tokens_steered + receipt.generated_tokens_steered
    checked, cosine = receipt.positions_checked, receipt.worst_cosine
    if steered and receipt.strength != 0:
        fits = 1 <= checked <= steered and cosine is not None and _MIN_COSINE <= cosine <= 1
        expected = f"1 to {steered}, with a cosine of {_MIN_COSINE} to 1"
    else:
        fits, expected = checked == 0 and cosine is None, "none"
    if fits:
        return None
    return f"the receipt says that {checked} directions were checked, with cosine {cosine}; expected were {expected}"


def _names(names: Sequence[str], none: str = "no operator") -> str:
    return ", ".join(names) if names else none


def _not_applied(problem: str, generation: Generation) -> SteeringNotAppliedError:
    return SteeringNotAppliedError(
        f"the text is not steered as asked: {problem}", metadata={"request_id": generation.request_id}
    )
