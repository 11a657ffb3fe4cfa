"""Dose and response: what is drawn, and drawn as SVG without any package."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from steer_client._html import escape
from steer_client._sweep.statistics import METRICS, ArmSummary, Estimate

_WIDTH, _HEIGHT = 520, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 16, 30, 44
#: Told apart by people who do not see every colour, on white and on black.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#999999")
#: What an axis says of a metric.
TITLES = {
    "hits": "texts with one of the words",
    "useful_hits": "texts with one of the words, without repetition",
    "kl_mean": "KL(plain ‖ steered), mean, nats",
    "kl_p95": "KL(plain ‖ steered), 95th percentile, nats",
    "perplexity_ratio": "perplexity over that of the plain texts",
}


@dataclass(frozen=True, slots=True)
class Curves:
    """One metric against λ: by operator its points, and the plain texts' value."""

    metric: str
    points: Mapping[str, Sequence[tuple[float, Estimate]]]
    plain: float | None


def curves(summaries: Sequence[ArmSummary], metric: str) -> Curves:
    """Raises ValueError, naming the metrics, for one that is none, or that nothing was measured of."""
    if metric not in METRICS:
        raise ValueError(f"metric {metric!r} is none of {', '.join(METRICS)}")
    points: dict[str, list[tuple[float, Estimate]]] = {}
    plain = None
    for each in summaries:
        estimate: Estimate | None = getattr(each, metric)
        if estimate is not None and each.strength is None:
            plain = estimate.value
        elif estimate is not None and each.strength is not None:
            points.setdefault(each.operator, []).append((each.strength, estimate))
    if not points:
        raise ValueError(f"metric {metric!r} was not measured; hits need `words`")
    return Curves(metric, {name: sorted(each, key=lambda point: point[0]) for name, each in points.items()}, plain)


def bounds(estimate: Estimate) -> tuple[float, float]:
    """The interval, or the value twice where there is none."""
    low, high = estimate.low, estimate.high
    return (estimate.value if low is None else low), (estimate.value if high is None else high)


def svg(drawn: Curves) -> str:
    """The curves with their intervals, in the colours of the text around them."""
    strengths = [strength for each in drawn.points.values() for strength, _ in each]
    tops = [bounds(estimate)[1] for each in drawn.points.values() for _, estimate in each]
    top = 1.0 if drawn.metric in ("hits", "useful_hits") else 1.05 * max([*tops, drawn.plain or 0.0, 1e-9])
    left, right = min(strengths), max(strengths)
    margin = 0.06 * (right - left) or 0.1
    left, right = left - margin, right + margin

    def x(value: float) -> float:
        return round(_LEFT + (value - left) / (right - left) * (_WIDTH - _LEFT - _RIGHT), 1)

    def y(value: float) -> float:
        return round(_HEIGHT - _BOTTOM - min(value, top) / top * (_HEIGHT - _TOP - _BOTTOM), 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" role="img" '
        f'font-family="sans-serif" font-size="11" fill="currentColor"><title>{escape(TITLES[drawn.metric])}</title>'
    ]
    for step in range(5):
        value = top * step / 4
        parts.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(value)}" y2="{y(value)}" stroke="currentColor" '
            f'stroke-opacity=".2"/><text x="{_LEFT - 6}" y="{y(value) + 4}" text-anchor="end">{value:.3g}</text>'
        )
    parts += [
        f'<text x="{x(strength)}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{strength:g}</text>'
        for strength in _spread(sorted(set(strengths)), x)
    ]
    parts.append(f'<text x="{(_LEFT + _WIDTH) / 2}" y="{_HEIGHT - 8}" text-anchor="middle">strength λ</text>')
    parts.append(f'<text x="{_LEFT}" y="12">{escape(TITLES[drawn.metric])}</text>')
    if drawn.plain is not None:
        parts.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(drawn.plain)}" y2="{y(drawn.plain)}" '
            'stroke="currentColor" stroke-dasharray="4 4" stroke-opacity=".7"/>'
        )
    for place, (name, points) in enumerate(drawn.points.items()):
        colour = COLOURS[place % len(COLOURS)]
        # Intervals of several operators stand beside one another.
        aside = 3 * (place - (len(drawn.points) - 1) / 2)
        path = " ".join(f"{x(strength) + aside},{y(estimate.value)}" for strength, estimate in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for strength, estimate in points:
            low, high = bounds(estimate)
            said = escape(f"{name} at λ = {strength:g}: {estimate}")
            parts.append(
                f'<g stroke="{colour}" fill="{colour}"><title>{said}</title><line x1="{x(strength) + aside}" '
                f'x2="{x(strength) + aside}" y1="{y(low)}" y2="{y(high)}"/>'
                f'<circle cx="{x(strength) + aside}" cy="{y(estimate.value)}" r="3.5"/></g>'
            )
        parts.append(f'<text x="{_LEFT + 6}" y="{_TOP + 12 + 14 * place}" fill="{colour}">■ {escape(name)}</text>')
    return "".join([*parts, "</svg>"])


def _spread(values: Sequence[float], x: Callable[[float], float]) -> list[float]:
    """Values whose labels do not touch."""
    kept: list[float] = []
    for value in values:
        if not kept or x(value) - x(kept[-1]) >= 26:
            kept.append(value)
    return kept
