"""One line each for a generation, a receipt and a comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence

import steer_client
from steer_client._cli.formatting import (
    anchor_part,
    escape_controls,
    format_count,
    format_number,
    positions_part,
    short_digest,
)


def generation_line(result: steer_client.Generation) -> str:
    """Why the text ended, its size and its speed."""
    parts = [
        result.finish_reason.value if result.stop_string is None else f"STOP_STRING {result.stop_string!r}",
        f"{result.usage.prompt_tokens} prompt + {result.usage.completion_tokens} generated tokens",
        f"{result.timings.total:.2f} s",
    ]
    if result.timings.total > 0:
        parts.append(f"{result.usage.completion_tokens / result.timings.total:.1f} tok/s")
    return " · ".join(parts)


def receipt_line(receipt: steer_client.Receipt) -> str:
    """What the operator was, its setting, and what it did."""
    cached_tokens = receipt.prompt_tokens_cached
    cached = f", {format_count(cached_tokens, 'prompt token')} cached" if cached_tokens else ""
    if receipt.prompt_tokens_steered + receipt.generated_tokens_steered:
        mark = "✓"
        effect = (
            f"{receipt.prompt_tokens_steered} prompt + {receipt.generated_tokens_steered} generated tokens "
            f"steered{cached}, {_measured(receipt)}"
        )
    else:
        mark, effect = "○", f"no token steered{cached}"
    subject = f"{escape_controls(receipt.operator)}{_words_part(receipt)} {short_digest(receipt.digest)}"
    return (
        f"{mark} {subject} layer {receipt.layer}, "
        f"strength {format_number(receipt.strength)}{_budget_part(receipt)}, blend {format_number(receipt.blend)}, "
        f"{receipt.rule}{anchor_part(receipt.blend, receipt.anchor, receipt.first_token)}"
        f"{positions_part(receipt.positions)}{_origin(receipt)}: {effect}"
    )


def _measured(receipt: steer_client.Receipt) -> str:
    """What was measured, in strengths, of which a dose is half; and how well it kept to the direction."""
    # Only rounding to the model's dtype can pass the bound: the receipt was checked.
    mean, most = (min(dose, receipt.dose_bound) for dose in (receipt.mean_dose, receipt.max_dose))
    bound = format_number(2 * receipt.dose_bound)
    measured = f"measured λ mean {format_number(2 * mean)}, max {format_number(2 * most)} of {bound}"
    if receipt.worst_cosine is None:
        return measured
    # Rounded down, so that it is true as it stands.
    cosine = math.floor(1e4 * receipt.worst_cosine) / 1e4
    checked = format_count(receipt.positions_checked, "token")
    return f"{measured}, direction checked at {checked}: cosine ≥ {cosine:g}"


def steering_title(receipts: Sequence[steer_client.Receipt]) -> str:
    """What steered a text, in a few words: each operator or word with its strength."""
    return escape_controls(", ".join(f"{_subject(each)} λ {format_number(each.strength)}" for each in receipts))


def comparison_lines(arm: steer_client.ArmResult, *, scored: bool) -> list[str]:
    """Where and how far a steered text differs from the plain one."""
    first = arm.first_divergence
    lines = ["the texts are the same, token by token" if first is None else f"first divergence at token {first}"]
    if not scored:
        return lines
    if arm.kl is None:
        lines.append("KL(plain‖steered) was not measured")
    else:
        mean, p95 = format_number(arm.kl.mean), format_number(arm.kl.p95)
        lines.append(f"KL(plain‖steered) mean {mean}, p95 {p95} nats per token{_asked_part(arm)}")
    lines.append(
        f"perplexity under the plain model: normal {format_number(arm.normal_perplexity)}, "
        f"steered {format_number(arm.steered_perplexity)}"
    )
    return lines


def _subject(receipt: steer_client.Receipt) -> str:
    if not receipt.words:
        return receipt.operator
    return " + ".join(_weighted(word) for word in receipt.words)


def _weighted(word: steer_client.SteeredWord) -> str:
    return word.text if word.weight == 1.0 else f"{word.weight:g} × {word.text}"


def _words_part(receipt: steer_client.Receipt) -> str:
    """The words of a lens, each with its tokens' ids."""
    if not receipt.words:
        return ""
    words = (f"{_weighted(word)!r} (tokens {' '.join(map(str, word.token_ids))})" for word in receipt.words)
    return escape_controls(f" {' + '.join(words)}")


def _budget_part(receipt: steer_client.Receipt) -> str:
    return "" if receipt.kl is None else f" for p95 KL {format_number(receipt.kl)}"


def _asked_part(arm: steer_client.ArmResult) -> str:
    """What KL the strengths were read off the dose curves for."""
    budgets = [
        f"{format_number(receipt.kl)} for {escape_controls(_subject(receipt))}"
        for receipt in arm.generation.receipts
        if receipt.kl is not None
    ]
    return f"; asked for: p95 {', '.join(budgets)}" if budgets else ""


def _origin(receipt: steer_client.Receipt) -> str:
    """Which settings are recommended values; empty if the request gave all of them."""
    settings = ["strength", "rule", "blend"]
    if receipt.positions != steer_client.ALL_POSITIONS:
        settings.append("positions")
    if receipt.blend or receipt.first_token == "anchor":
        settings.append("anchor")
    if receipt.first_token == "anchor":
        settings.append("first_token")
    defaulted = [name for name in settings if name in receipt.defaulted]
    if not defaulted:
        return ""
    which = "" if defaulted == settings else f" {' and '.join(defaulted)}"
    return f" (recommended{which}{', calibrated' if receipt.calibrated else ''})"
