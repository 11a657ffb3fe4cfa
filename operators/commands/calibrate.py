"""``calibrate``: the layer, rule, blend and strength at which a stored operator works best."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from operators.commands import _describe as describe
from operators.commands import _output as output
from operators.commands._options import (
    JsonOption,
    MaxMemoryOption,
    NameArgument,
    StoreOption,
    default_device,
    open_store,
    parse_memory,
)
from operators.core.progress import Progress, progress_bars, working

if TYPE_CHECKING:
    from operators.core.artifact import OperatorArtifact
    from operators.core.header import Calibration, CalibrationPoint, OperatorHeader
    from operators.model.loading import LoadedModel

_SHOWN = 6
"""Points that are printed for people; JSON has all of them."""


def calibrate(
    name: NameArgument,
    words: Annotated[
        str | None,
        typer.Option(
            help='What shows the concept in a text: "golden gate,bridge" (default: the words it was built with).',
            show_default=False,
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(help="Layers to try: 10,15,20 (default: its own, six over the middle).", show_default=False),
    ] = None,
    kl_budget: Annotated[
        float, typer.Option(help="95th percentile over the tokens of KL(plain || steered), in nats.")
    ] = 1.0,
    max_perplexity_ratio: Annotated[
        float, typer.Option(help="Perplexity of steered texts under the plain model, over that of plain texts.")
    ] = 2.0,
    min_distinct_ratio: Annotated[
        float, typer.Option(help="Distinct pairs of tokens of steered texts, over that of plain texts.")
    ] = 0.75,
    prompts: Annotated[
        Path | None,
        typer.Option(help="File of prompts, one per line (default: 24 neutral ones).", show_default=False),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens per text.")] = 24,
    model: Annotated[
        str | None,
        typer.Option(help="Model to calibrate on (default: the one it was built on).", show_default=False),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the curves into this file, such as curves.png.", show_default=False)
    ] = None,
    max_memory: MaxMemoryOption = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Store what is found even where the present recommendation is better.")
    ] = False,
    store_path: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find the setting at which an operator works best, and store it as the operator's recommendation.

    A recommendation that an earlier calibration found stays where it is better: where the same words were hit in more
    texts within the same bounds, or nothing is found now.
    """
    start = time.monotonic()
    with output.exit_on_error(as_json):
        from operators.core.errors import TrialError
        from operators.model.loading import load_model
        from operators.tune.calibrate import calibrate as calibrate_operator
        from operators.tune.calibration_spec import CalibrationSpec
        from operators.tune.comparison import is_worse
        from operators.tune.prompts import calibration_prompts, read_prompts

        store = open_store(store_path)
        artifact = store.load(name)
        budget = parse_memory(max_memory)
        header = artifact.header
        if header.lens is not None:
            raise TrialError(f"{name!r} is a lens: its doses are measured where it is built (steer-operators lens)")
        known = header.words or (header.calibration.words if header.calibration else ())
        if words is None and not known:
            raise TrialError(f"operator {name!r} has no words that show its concept; give some: --words 'one,another'")
        spec = CalibrationSpec(
            words=known if words is None else tuple(word.strip() for word in words.split(",")),
            prompts=calibration_prompts() if prompts is None else read_prompts(prompts),
            layers=None if layers is None else _parse_layers(layers),
            kl_budget=kl_budget,
            max_perplexity_ratio=max_perplexity_ratio,
            min_distinct_ratio=min_distinct_ratio,
            tokens=tokens,
        )
        if plot is not None:
            _check_plot(plot)
        with working(f"loading {model or header.model}"):
            loaded = load_model(model or header.model, dtype=header.model_dtype, device=default_device())
        with progress_bars() as progress:
            calibrated = calibrate_operator(artifact, loaded, spec, max_memory=budget, progress=progress)
        curves = calibrated.header.calibration
        assert curves is not None  # noqa: S101 - for the type checker
        kept = not replace and is_worse(curves, header)
        path = store.path_of(name) if kept else store.save(name, calibrated, replace=True)
        if plot is not None:
            _draw(curves, name, plot)
        answer = describe.operator_json(name, path, store.read_header(name))
        answer["found"] = curves.chosen is not None
        answer["kept"] = kept
        answer["previous"] = describe.point_json(header.calibrated_point)
        answer["new"] = describe.point_json(None if curves.chosen is None else curves.points[curves.chosen])
        answer["seconds"] = round(time.monotonic() - start, 2)
        lines = [*_lines(answer, curves), *_comparison_lines(answer, comparable=_is_comparable(header, curves))]
        output.print_answer(answer, lines, as_json=as_json)


def calibrate_with_defaults(
    artifact: OperatorArtifact,
    loaded: LoadedModel,
    *,
    layers: tuple[int, ...] | None,
    max_memory: int | None,
    progress: Progress,
) -> OperatorArtifact:
    """``artifact`` calibrated with the words that it was built with; everything but ``layers`` has its default."""
    from operators.tune.calibrate import calibrate as calibrate_operator
    from operators.tune.calibration_spec import CalibrationSpec
    from operators.tune.prompts import calibration_prompts

    spec = CalibrationSpec(words=artifact.header.words, prompts=calibration_prompts(), layers=layers)
    return calibrate_operator(artifact, loaded, spec, max_memory=max_memory, progress=progress)


def _parse_layers(text: str) -> tuple[int, ...]:
    from operators.core.errors import TrialError

    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise TrialError(f"layers are {text!r}; whole numbers separated by commas are accepted") from None


def _lines(answer: dict[str, Any], curves: Calibration) -> list[str]:
    setting = describe.setting_line(answer["recommended"])
    whole = [point for point in curves.points if point.texts == curves.prompts]
    shown = sorted(whole, key=lambda point: point.hit_rate, reverse=True)[:_SHOWN]
    if curves.chosen is not None and curves.points[curves.chosen] not in shown:
        shown = [curves.points[curves.chosen], *shown[:-1]]
    table = [
        ("layer", "rule", "blend", "strength", "p95 KL", "hits", "perplexity", "distinct-2"),
        *(_cells(point) for point in shown),
        ("plain", "", "", "", "", f"{curves.plain_hit_rate:.0%}", "1.00", f"{curves.plain_distinct_2:.2f}"),
    ]
    if curves.chosen is None:
        found = (
            f"{answer['name']}: no setting found: none names the concept more often than the plain model "
            f"({curves.plain_hit_rate:.0%}) at p95 KL up to {curves.kl_budget:g}, perplexity up to "
            f"{curves.max_perplexity_ratio:g} and distinct-2 from {curves.min_distinct_ratio:g} times the plain one. "
            f"The recommendation stays: layer {answer['layer']}, {setting}"
        )
    elif answer["kept"]:
        found = f"{answer['name']}: found {describe.point_line(answer['new'])}, which is not stored"
    else:
        found = f"{answer['name']}: recommended are layer {answer['layer']}, {setting}"
    measured = (
        f"{len(curves.points)} settings, {curves.prompts} prompts, {curves.tokens} tokens each; "
        f"words: {', '.join(curves.words)}; {answer['seconds']:.0f} s"
    )
    return [found, *output.align(table), measured]


def _comparison_lines(answer: dict[str, Any], *, comparable: bool) -> list[str]:
    """What became of an earlier calibration's recommendation, where there was one."""
    if answer["previous"] is None:
        return []
    previous = describe.point_line(answer["previous"])
    if answer["kept"]:
        return [f"kept, because it is better: {previous} (--replace stores what was found)"]
    if not comparable:
        return [f"replaced: {previous}; of other words or bounds, so that the two cannot be compared"]
    return [f"replaced: {previous}"]


def _is_comparable(header: OperatorHeader, curves: Calibration) -> bool:
    from operators.tune.comparison import is_comparable

    return header.calibration is not None and is_comparable(curves, header.calibration)


def _cells(point: CalibrationPoint) -> tuple[str, ...]:
    return (
        str(point.layer),
        point.rule,
        f"{point.blend:g}",
        f"{point.strength:g}",
        f"{point.kl_p95:.2f}",
        f"{point.hit_rate:.0%}",
        f"{point.perplexity_ratio:.2f}",
        f"{point.distinct_2:.2f}",
    )


def _check_plot(path: Path) -> None:
    """Before minutes are spent: whether there is something to draw with, and a place for it."""
    from operators.core.errors import TrialError

    if not path.absolute().parent.is_dir():
        raise TrialError(f"plot {path}: there is no directory {path.absolute().parent}")
    from operators.tune.plot import check_format

    check_format(path)


def _draw(curves: Calibration, name: str, path: Path) -> None:
    from operators.tune.plot import draw_calibration

    draw_calibration(curves, name, path)
