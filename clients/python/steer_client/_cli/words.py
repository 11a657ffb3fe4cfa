"""Results in words for a terminal."""

from __future__ import annotations

from steer_client._results import ArmResult, Generation, Receipt

# A model can be made to write escape sequences, and a terminal would obey them.
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
_VISIBLE |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
_ALL_DEFAULTED = {"strength", "rule", "blend"}


def visible(text: str) -> str:
    """The text with its control characters made harmless."""
    return text.translate(_VISIBLE)


def number(value: float | None) -> str:
    """A short number, or a dash for what was not measured."""
    if value is None:
        return "–"
    return f"{value:.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"


def count(size: int, word: str) -> str:
    """2 texts, 1 text."""
    return f"{size} {word}{'' if size == 1 else 's'}"


def short_digest(digest: str) -> str:
    """The digest's algorithm and first eight digits."""
    algorithm, colon, value = digest.partition(":")
    return f"{algorithm}:{value[:8]}…" if colon and len(value) > 8 else digest


def summary(result: Generation) -> str:
    """Why the text ended, its size and its speed."""
    parts = [
        result.finish_reason.value if result.stop_string is None else f"STOP_STRING {result.stop_string!r}",
        f"{result.usage.prompt_tokens} prompt + {result.usage.completion_tokens} generated tokens",
        f"{result.timings.total:.2f} s",
    ]
    if result.timings.total > 0:
        parts.append(f"{result.usage.completion_tokens / result.timings.total:.1f} tok/s")
    return " · ".join(parts)


def receipt(proof: Receipt) -> str:
    """One line of proof."""
    steered = proof.prompt_tokens_steered + proof.generated_tokens_steered
    head = (
        f"{'✓' if steered else '○'} {visible(proof.operator)} {short_digest(proof.digest)} "
        f"layer {proof.layer}, strength {number(proof.strength)}, blend {number(proof.blend)}, {proof.rule}"
    )
    cached = f", {count(proof.prompt_tokens_cached, 'prompt token')} cached" if proof.prompt_tokens_cached else ""
    body = (
        f"{proof.prompt_tokens_steered} prompt + {proof.generated_tokens_steered} generated tokens steered{cached}, "
        f"dose mean {number(proof.mean_dose)}, max {number(proof.max_dose)} of {number(proof.dose_bound)}"
        if steered
        else f"no token steered{cached}"
    )
    return f"{head}{_origin(proof)}: {body}"


def comparison(arm: ArmResult, *, scored: bool) -> list[str]:
    """Where and how far a steered text parts from the plain one."""
    at = arm.first_divergence
    lines = ["the texts are the same, token by token" if at is None else f"first divergence at token {at}"]
    if not scored:
        return lines
    if arm.kl is None:
        lines.append("KL(plain‖steered) was not measured")
    else:
        lines.append(f"KL(plain‖steered) mean {number(arm.kl.mean)}, p95 {number(arm.kl.p95)} nats per token")
    lines.append(
        f"perplexity under the plain model: normal {number(arm.normal_perplexity)}, "
        f"steered {number(arm.steered_perplexity)}"
    )
    return lines


def _origin(proof: Receipt) -> str:
    """Where the setting comes from: nothing to say where the request named all of it."""
    if not proof.defaulted:
        return ""
    which = "" if set(proof.defaulted) == _ALL_DEFAULTED else f" {' and '.join(proof.defaulted)}"
    return f" (recommended{which}{', calibrated' if proof.calibrated else ''})"
