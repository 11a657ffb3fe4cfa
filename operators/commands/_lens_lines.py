"""A stored lens as lines for a person."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from operators.commands._output import align, model_line

_TAKEN_FROM = {"first": "the first position", "others": "all positions but the first", "all": "all positions"}


def lens_lines(lens: Mapping[str, Any], **further: object) -> list[str]:
    """One lens. ``lens`` is what :func:`operators.commands._describe.operator_json` returns; ``further`` goes last."""
    source = lens["lens"]
    fields: dict[str, object] = {
        "name": lens["name"],
        "digest": lens["digest"],
        "about": repr(lens["concept"]),
        "model": model_line(lens),
        "layer": f"{lens['layer']} of {lens['num_layers']}, added to its input",
        "lens": f"from {_TAKEN_FROM[source['positions']]} of {source['texts']} neutral texts, {source['certificate']}; "
        "any word is a push",
        **(
            {}
            if source["reconstruction_error"] is None
            else {"exactness": f"{source['reconstruction_error']:.1e} (|sum G h + c - out| / |out|, the worst text)"}
        ),
        "recommended": _recommended(lens),
        **further,
    }
    return [
        *align([(f"{key}:", str(value)) for key, value in fields.items()]),
        *_tried(source),
        *_curve_lines(source["curve"]),
    ]


def _tried(source: Mapping[str, Any]) -> list[str]:
    """Of each kind of positions and layer, the point of the search with the most texts, and of these the last."""
    last: dict[tuple[str, int], Mapping[str, Any]] = {}
    for finding in source["findings"]:
        place = (finding["positions"], finding["layer"])
        if place not in last or finding["texts"] >= last[place]["texts"]:
            last[place] = finding
    if len(last) < 2:
        return []
    rows: list[tuple[str, ...]] = [
        ("  positions", "layer", "strength", "p95 KL", "with the word", "and without a loop", "texts")
    ]
    for (positions, layer), finding in last.items():
        point = finding["point"]
        numbers = (f"{point['strength']:g}", *(f"{point[key]:.2f}" for key in ("kl_p95", "hit_rate", "useful_rate")))
        rows.append((f"  {positions}", str(layer), *numbers, str(finding["texts"])))
    return ["tried:", *align(rows)]


def _recommended(lens: Mapping[str, Any]) -> str:
    recommended, source = lens["recommended"], lens["lens"]
    where = f"positions {recommended['positions']}"
    if source["default_kl"] is None:
        why = (
            "no dose was measured" if source["curve"] is None else "no strength that was tried steers within its bound"
        )
        return f"{where}; no strength ({why}): a request must give one"
    return f"strength {recommended['strength']:g} (p95 KL {source['default_kl']:g}), {where}"


def _curve_lines(curve: Mapping[str, Any] | None) -> list[str]:
    if curve is None:
        return []
    words = ", ".join(curve["words"])
    rows = [("  strength", "p95 KL", "mean KL", "with the word", "and without a loop")]
    rows += [
        (
            f"  {point['strength']:g}",
            f"{point['kl_p95']:.2f}",
            f"{point['kl_mean']:.2f}",
            f"{point['hit_rate']:.2f}",
            f"{point['useful_rate']:.2f}",
        )
        for point in curve["points"]
    ]
    about = f"{curve['prompts']} prompts x {curve['tokens']} tokens, words {words}"
    return [f"dose curve ({about}; plain {curve['plain_hit_rate']:.2f}):", *align(rows)]
