"""A stored operator, as JSON and as lines for a person."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from operators.commands._lens_lines import lens_lines
from operators.commands._output import align, model_line
from operators.core.defaults import is_default
from operators.core.header import Recommended
from operators.core.measured import Sampling
from operators.core.positions import ALL_POSITIONS

if TYPE_CHECKING:
    from pathlib import Path

    from operators.builder.spec import BuildSpec
    from operators.core.file_format import FileHeader
    from operators.core.header import CalibrationPoint, OperatorHeader
    from operators.model.loading import LoadedModel


DEFAULT_NOTE = "the default of docs/MEASURED.md, not measured for this concept: 'steer-operators calibrate' does that"


def operator_json(name: str, path: Path, found: FileHeader) -> dict[str, Any]:
    """A stored operator as JSON shows it: its header, and what the header does not say."""
    point = found.header.calibrated_point
    return {
        "name": name,
        "digest": found.digest,
        "path": str(path),
        "size_bytes": found.num_bytes,
        "affine": found.affine,
        "calibrated": point_json(point),
        "default": _is_default(found.header),
        **_header_json(found.header),
    }


def _header_json(header: OperatorHeader) -> dict[str, Any]:
    """The header, its token ids under the name that they have on the wire and in `steer operators --json`."""
    found = header.model_dump(mode="json")
    found["concept_token_ids"] = found.pop("concept_ids")
    for text in found["more_texts"]:
        text["token_ids"] = text.pop("ids")
    return found


def _is_default(header: OperatorHeader) -> bool:
    return header.lens is None and header.calibration is None and is_default(header.recommended)


def operator_lines(operator: Mapping[str, Any], **further: object) -> list[str]:
    """One operator for a person. ``operator`` is what :func:`operator_json` returns; ``further`` goes last."""
    if operator["lens"] is not None:
        return lens_lines(operator, **further)
    if operator["vector"] is not None:
        return _vector_lines(operator, **further)
    tokens = operator["concept_tokens"] or operator["concept_token_ids"]
    more = [repr(text["text"]) for text in operator["more_texts"]]
    fields: dict[str, object] = {
        "name": operator["name"],
        "digest": operator["digest"],
        "concept": repr(operator["concept"]),
        # What an earlier version built knows only their ids.
        "tokens" if operator["concept_tokens"] else "token ids": f"{len(tokens)}: "
        + " ".join(repr(token) for token in tokens),
        **({"more texts": "; ".join(more)} if more else {}),
        **({"last token": _last_tokens(operator["last_tokens"])} if "last_tokens" in operator else {}),
        **({"words": ", ".join(map(repr, operator["words"]))} if operator["words"] else {}),
        "model": model_line(operator),
        "profile": operator["profile"],
        "layer": f"{operator['layer']} of {operator['num_layers']}, "
        f"added to the input of block {operator['injection_layer']}",
        "reconstruction": f"{operator['reconstruction_error']:.2e} (|sum J x - y| / |y|)",
        "rank": _rank(operator),
        "neutral": _neutral(operator["neutral"]),
        "recommended": _recommended(operator),
        **({"calibration": _calibration(operator)} if operator["calibration"] else {}),
        "file": f"{operator['path']} ({file_size(operator['size_bytes'])})",
        **further,
    }
    return align([(f"{key}:", str(value)) for key, value in fields.items()])


def build_warnings(spec: BuildSpec, loaded: LoadedModel) -> list[str]:
    """What a user should be told of an operator that was built."""
    from operators.builder.guidance import strength_warnings, text_warnings

    texts = text_warnings(spec.texts, loaded.tokenizer.all_special_ids)
    return [*texts, *strength_warnings(spec.setting_on(loaded).strength)]


def _vector_lines(operator: Mapping[str, Any], **further: object) -> list[str]:
    fields: dict[str, object] = {
        "name": operator["name"],
        "digest": operator["digest"],
        "about": repr(operator["concept"]),
        **({"words": ", ".join(map(repr, operator["words"]))} if operator["words"] else {}),
        "model": model_line(operator),
        "layer": f"{operator['layer']} of {operator['num_layers']}, added to its input",
        "rank": "0: a vector, which pushes every token the same way (blend is always 1)",
        "source": _source(operator),
        "norm": f"{operator['vector']['norm']:.6g}; coefficient c of programs that add c times the vector is strength "
        f"{2 * operator['vector']['norm']:.4g} c / |h|, another at each token",
        "recommended": _recommended(operator),
        **({"calibration": _calibration(operator)} if operator["calibration"] else {}),
        "file": f"{operator['path']} ({file_size(operator['size_bytes'])})",
        **further,
    }
    return align([(f"{key}:", str(value)) for key, value in fields.items()])


def _source(operator: Mapping[str, Any]) -> str:
    """Where a vector comes from."""
    source = operator["vector"]
    if source["method"] == "import":
        hint = f", for {source['model_hint']!r}" if source["model_hint"] is not None else ""
        return f"tensor {source['tensor']!r} of a {source['file_format']} file{hint}, {source['file_digest']}"
    if source["method"] == "contrast":
        return " minus ".join(
            f"mean of {side['texts']} texts ({side['name']!r}, {side['digest'].removeprefix('sha256:')[:12]})"
            for side in (source["positive"], source["negative"])
        )
    if source["method"] == "lens":
        return f"the lens {source['lens']}, words " + ", ".join(
            f"{word['text']!r}={word['weight']:g}" for word in source["words"]
        )
    return "mixture of " + ", ".join(f"{member['weight']:+g} {member['name']}" for member in operator["members"])


def list_lines(operators: Iterable[Mapping[str, Any]]) -> list[str]:
    """One line per operator; a broken one says what is wrong with it."""
    return align(map(_list_row, operators))


def setting_line(recommended: Mapping[str, Any]) -> str:
    """A recommended setting on one line."""
    where = "" if recommended["positions"] == str(ALL_POSITIONS) else f", positions {recommended['positions']}"
    first = ", anchor at the first token" if recommended["first_token"] == "anchor" else ""
    # Without a share of the anchor, it makes no difference which one.
    contrast = ", contrast anchor" if recommended["anchor"] == "contrast" and (first or recommended["blend"]) else ""
    setting = f"strength {recommended['strength']:g}, {recommended['rule']}, blend {recommended['blend']:g}"
    return f"{setting}{contrast}{first}{where}"


def point_json(point: CalibrationPoint | None) -> dict[str, Any] | None:
    """A point of a calibration as JSON shows it."""
    return None if point is None else point.model_dump(mode="json")


def point_line(point: Mapping[str, Any]) -> str:
    """A point of a calibration on one line: its setting, and what it measured."""
    measured = f"{point['hit_rate']:.0%} hits at p95 KL {point['kl_p95']:.2g}"
    return f"layer {point['layer']}, {setting_line(point)}: {measured}"


def nothing_found_line(recommended: Mapping[str, Any]) -> str:
    """What is recommended after a calibration that found no setting."""
    kept = "the default" if is_default(Recommended.model_validate(recommended)) else "what was recommended"
    return f"nothing within the bounds was found, and {kept} is kept"


def file_size(num_bytes: int) -> str:
    """12_300_000 -> ``"12.3 MB"``: powers of 1000, as file managers count."""
    amount = float(num_bytes)
    for unit in ("B", "kB", "MB"):
        if amount < 1000:
            return f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:.3g} GB"


def _last_tokens(tokens: Sequence[str]) -> str:
    whose = "the last position of the text" if len(tokens) == 1 else "the last positions of the texts"
    return " ".join(map(repr, tokens)) + f" ({whose}: what the map ends at)"


def _recommended(operator: Mapping[str, Any]) -> str:
    note = f" ({DEFAULT_NOTE})" if operator["default"] else ""
    return f"{setting_line(operator['recommended'])}{note}"


def _neutral(neutral: Mapping[str, Any] | None) -> str:
    """What the contrast anchor is measured against."""
    if neutral is None:
        return "none: there is no contrast anchor ('build' again with --replace makes one)"
    return f"mean of {len(neutral['ids'])} texts ({neutral['digest'].removeprefix('sha256:')[:12]})"


def _rank(operator: Mapping[str, Any]) -> str:
    low_rank, d = operator["low_rank"], operator["hidden_size"]
    if low_rank is None:
        return f"full ({d})"
    residuals = low_rank["residuals"]
    return f"{low_rank['rank']} of {d}, residual {min(residuals):.2g} to {max(residuals):.2g} per position"


def _calibration(operator: Mapping[str, Any]) -> str:
    calibration = operator["calibration"]
    words = ", ".join(map(repr, calibration["words"]))
    return (
        f"{_calibrated(operator)}; {calibration['prompts']} prompts x {calibration['tokens']} tokens, words {words} "
        f"({calibration['plain_hit_rate']:.0%} of the plain texts), budget p95 KL {calibration['kl_budget']:g}"
        f"{_sampling(calibration['sampling'])}"
    )


def _sampling(sampling: Mapping[str, Any] | None) -> str:
    """How the texts of a calibration were drawn: offered, and never applied by itself."""
    return "" if sampling is None else f"; texts {Sampling(**sampling)}"


def _calibrated(operator: Mapping[str, Any]) -> str:
    """What the calibration measured at the recommended setting, or why it says nothing about that."""
    point = operator["calibrated"]
    held_out = operator["calibration"]["held_out"]
    if point is not None and held_out is not None:
        interval = f"[{held_out['useful_low']:.0%}, {held_out['useful_high']:.0%}]"
        return (
            f"{held_out['useful_rate']:.0%} useful texts {interval} at p95 KL {held_out['kl_p95']:.2g} on "
            f"{held_out['prompts']} held-out prompts"
        )
    if point is not None:
        return f"{point['hit_rate']:.0%} hits at p95 KL {point['kl_p95']:.2g}"
    if operator["calibration"]["chosen"] is None:
        return nothing_found_line(operator["recommended"])
    return "the recommended setting is another than the one that was found"


def _calibrated_note(operator: Mapping[str, Any]) -> str:
    if not operator["calibration"]:
        return ""
    return f" ({'' if operator['calibrated'] else 'not '}calibrated: {_calibrated(operator)})"


def _list_row(entry: Mapping[str, Any]) -> tuple[str, ...]:
    if "problem" in entry:
        return (entry["name"], f"broken: {entry['problem']['message']}")
    more = len(entry["more_texts"])
    return (
        entry["name"],
        f"{entry['profile']}: layer {entry['layer']} of {entry['num_layers']}, pushes block {entry['injection_layer']}",
        "lens"
        if entry["lens"]
        else "vector"
        if entry["vector"]
        else f"rank {entry['low_rank']['rank'] if entry['low_rank'] else 'full'}",
        str(entry["model"]),
        entry["digest"].removeprefix("sha256:")[:12],
        repr(entry["concept"]) + (f" and {more} more" if more else "") + _calibrated_note(entry),
    )
