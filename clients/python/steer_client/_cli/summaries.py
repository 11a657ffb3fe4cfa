"""One line each for a generation, a receipt and a comparison."""

from __future__ import annotations

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
            f"steered{cached}, dose mean {format_number(receipt.mean_dose)}, max {format_number(receipt.max_dose)} "
            f"of {format_number(receipt.dose_bound)}"
        )
    else:
        mark, effect = "○", f"no token steered{cached}"
    return (
        f"{mark} {escape_controls(receipt.operator)} {short_digest(receipt.digest)} layer {receipt.layer}, "
        f"strength {format_number(receipt.strength)}, blend {format_number(receipt.blend)}, {receipt.rule}"
        f"{anchor_part(receipt.blend, receipt.anchor, receipt.first_token)}{positions_part(receipt.positions)}"
        f"{_origin(receipt)}: {effect}"
    )


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
        lines.append(f"KL(plain‖steered) mean {mean}, p95 {p95} nats per token")
    lines.append(
        f"perplexity under the plain model: normal {format_number(arm.normal_perplexity)}, "
        f"steered {format_number(arm.steered_perplexity)}"
    )
    return lines


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
