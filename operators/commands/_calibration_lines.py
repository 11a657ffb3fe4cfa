"""What a calibration came to, or would take, as lines for a person."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from operators.commands import _describe as describe
from operators.commands import _output as output

if TYPE_CHECKING:
    from operators.core.artifact import OperatorArtifact
    from operators.core.header import Calibration, CalibrationPoint
    from operators.model.loading import LoadedModel
    from operators.tune.calibration_spec import CalibrationSpec

_SHOWN = 6
"""Points that are printed for people; JSON has all of them."""


def plan_json(artifact: OperatorArtifact, loaded: LoadedModel, spec: CalibrationSpec) -> dict[str, Any]:
    """What a calibration would do, and about how long it would take: as long as a few tokens of it took just now."""
    from operators.tune.form import forms_for
    from operators.tune.operators_at_layers import layers_to_try
    from operators.tune.pace import seconds_per_row_token
    from operators.tune.setting_search import num_tokens

    layers, forms = layers_to_try(artifact, loaded, spec), forms_for(artifact.header, spec.forms)
    anchors = [form for form in forms if form.is_anchor]
    searched = num_tokens(spec, len(layers), len(forms), len(anchors))
    plain = (len(spec.prompts) + len(spec.held_out)) * spec.tokens
    held_out = len(spec.held_out) * spec.tokens
    # A steered text has a reference row beside it; a plain one has none.
    rows = 2 * (searched + held_out) + plain
    return {
        "layers": list(layers),
        "forms": [str(form) for form in forms],
        "stages": [dict(vars(stage)) for stage in spec.stages],
        "sampling": str(spec.sampling),
        "steered_tokens": searched + held_out,
        "row_tokens": rows,
        "seconds": round(rows * seconds_per_row_token(loaded, spec.prompts, spec.sampling), 1),
    }


def plan_lines(name: str, plan: Mapping[str, Any]) -> list[str]:
    """The plan for a person."""
    stages = ("layers, by anchors alone", "forms at the best layer", "finalists", "the last")
    rows: list[tuple[str, ...]] = [("", "prompts", "tokens", "strengths", "kept")]
    for title, stage in zip(stages, plan["stages"], strict=True):
        rows.append((title, *(str(stage[key]) for key in ("prompts", "tokens", "rounds", "kept"))))
    return [
        f"{name}: {len(plan['layers'])} layers ({', '.join(map(str, plan['layers']))}), {len(plan['forms'])} forms:",
        *(f"  {form}" for form in plan["forms"]),
        *output.align(rows),
        f"texts are {plan['sampling']}; at most {plan['steered_tokens']} steered tokens, {plan['row_tokens']} with "
        f"those that they are compared with: about {plan['seconds']:.0f} s here. Nothing was changed.",
    ]


def calibration_lines(answer: Mapping[str, Any], curves: Calibration) -> list[str]:
    """The outcome, the best points, what became of an earlier recommendation, and texts to judge it by."""
    setting = describe.setting_line(answer["recommended"])
    if curves.chosen is None:
        found = (
            f"{answer['name']}: no setting found: none names the concept in more texts without a repeated 4-gram than "
            f"the plain model at p95 KL up to {curves.kl_budget:g}, perplexity up to {curves.max_perplexity_ratio:g} "
            f"and distinct-2 from {curves.min_distinct_ratio:g} times the plain one. "
            f"The recommendation stays: layer {answer['layer']}, {setting}"
        )
    else:
        found = f"{answer['name']}: recommended are layer {answer['layer']}, {setting}"
    measured = (
        f"{len(curves.points)} settings, up to {curves.prompts} prompts of {curves.tokens} tokens each, "
        f"{curves.sampling}; words: {', '.join(curves.words)}; {answer['seconds']:.0f} s"
    )
    return [
        found,
        *_held_out_lines(curves),
        *output.align(_table(curves)),
        measured,
        *_previous_lines(answer),
        *_stronger_lines(answer),
        *_example_lines(answer),
    ]


def _held_out_lines(curves: Calibration) -> list[str]:
    at = curves.held_out
    if at is None:
        return []
    return [
        f"on {at.prompts} held-out prompts: {at.useful_rate:.0%} useful texts [{at.useful_low:.0%}, "
        f"{at.useful_high:.0%}] (plain {at.plain_useful_rate:.0%}), {at.hit_rate:.0%} hits, KL p95 {at.kl_p95:.2f}, "
        f"mean {at.kl_mean:.2f}, perplexity x {at.perplexity_ratio:.2f}, distinct-2 {at.distinct_2:.2f}"
    ]


def _table(curves: Calibration) -> list[tuple[str, ...]]:
    whole = [point for point in curves.points if point.texts == curves.prompts]
    shown = sorted(whole, key=lambda point: point.useful_rate or 0.0, reverse=True)[:_SHOWN]
    if curves.chosen is not None and curves.points[curves.chosen] not in shown:
        shown = [curves.points[curves.chosen], *shown[:-1]]
    plain = f"{curves.plain_hit_rate:.0%}", "1.00", f"{curves.plain_distinct_2:.2f}"
    return [
        ("layer", "form", "strength", "p95 KL", "mean KL", "useful", "hits", "perplexity", "distinct-2"),
        *(_cells(point) for point in shown),
        ("plain", "", "", "", "", "", *plain),
    ]


def _cells(point: CalibrationPoint) -> tuple[str, ...]:
    from operators.tune.form import Form

    return (
        str(point.layer),
        str(Form.of(point)),
        f"{point.strength:g}",
        f"{point.kl_p95:.2f}",
        f"{point.kl_mean or 0.0:.2f}",
        f"{point.useful_rate or 0.0:.0%}",
        f"{point.hit_rate:.0%}",
        f"{point.perplexity_ratio:.2f}",
        f"{point.distinct_2:.2f}",
    )


def _previous_lines(answer: Mapping[str, Any]) -> list[str]:
    """What became of an earlier calibration's recommendation, where there was one."""
    if answer["previous"] is None:
        return []
    previous = describe.point_line(answer["previous"])
    if answer["kept"]:
        return [f"kept, because nothing better was found: {previous} (--replace stores what is found without it)"]
    return [f"replaced: {previous}"]


def _stronger_lines(answer: Mapping[str, Any]) -> list[str]:
    if not answer["found"]:
        return []
    if answer["stronger"] is None:
        return ["stronger: none of this form was measured"]
    point = answer["stronger"]
    return [f"next stronger: {describe.point_line(point)}, perplexity x {point['perplexity_ratio']:.2f}"]


def _example_lines(answer: Mapping[str, Any]) -> list[str]:
    lines = []
    for example in answer["examples"]:
        lines += [f"{example['prompt']!r}", f"  plain:   {example['plain']!r}", f"  steered: {example['steered']!r}"]
    return lines
