"""``calibrate``: the layer, rule, blend and strength at which a stored operator works best."""

from __future__ import annotations

import dataclasses
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from operators.commands import _describe as describe
from operators.commands import _output as output
from operators.commands._calibration import WORK, calibrate_in_store
from operators.commands._calibration_lines import calibration_lines, plan_json, plan_lines
from operators.commands._options import (
    AttentionOption,
    JsonOption,
    MaxMemoryOption,
    NameArgument,
    StoreOption,
    default_device,
    open_store,
    parse_memory,
)
from operators.core.claims import claim
from operators.core.numbers import read_whole
from operators.core.progress import shown_progress, working

if TYPE_CHECKING:
    from operators.core.header import Calibration
    from operators.core.measured import Sampling


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
        typer.Option(
            help="Layers to try: 10,15,20 (default: its own, and two of the middle where its anchor says the words).",
            show_default=False,
        ),
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
        typer.Option(
            help="File of prompts to search with, one per line (default: 24 neutral ones).", show_default=False
        ),
    ] = None,
    held_out: Annotated[
        Path | None,
        typer.Option(help="File of other prompts, for the figure (default: 50 neutral ones).", show_default=False),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens per text.")] = 24,
    temperature: Annotated[float, typer.Option(help="Of the texts; 0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Of the texts, where the temperature is above 0.")] = 1.0,
    repetition_penalty: Annotated[float, typer.Option(help="Of the texts; 1 is off.")] = 1.2,
    seed: Annotated[int, typer.Option(help="Of texts that are drawn.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer layers, prompts and strengths.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and how long it takes; change nothing.")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(help="Model to calibrate on (default: the one it was built on).", show_default=False),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the curves into this file, such as curves.png.", show_default=False)
    ] = None,
    attention: AttentionOption = None,
    max_memory: MaxMemoryOption = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Store what is found even where the present recommendation is better.")
    ] = False,
    store_path: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find the setting at which an operator works best, and store it as the operator's recommendation.

    Texts that name the concept count where they repeat no four tokens. A recommendation that an earlier calibration
    found is measured too, and stays where it is better. One that is stopped goes on when the same command is given
    again.
    """
    start = time.monotonic()
    with output.exit_on_error(as_json), ExitStack() as held:
        from operators.core.errors import TrialError
        from operators.maps.detach import family_of
        from operators.model.loading import load_model
        from operators.tune.calibration_spec import CalibrationSpec
        from operators.tune.prompts import calibration_prompts, neutral_prompts, read_prompts

        store = open_store(store_path)
        artifact = store.load(name)
        header = artifact.header
        if header.lens is not None:
            raise TrialError(f"{name!r} is a lens: its doses are measured where it is built (steer-operators lens)")
        known = header.words or (header.calibration.words if header.calibration else ())
        if words is None and not known:
            raise TrialError(f"operator {name!r} has no words that show its concept; give some: --words 'one,another'")
        searched_with = calibration_prompts() if prompts is None else read_prompts(prompts)
        others = neutral_prompts() if held_out is None else read_prompts(held_out)
        with output.wrong_usage():
            spec = CalibrationSpec(
                words=known if words is None else tuple(word.strip() for word in words.split(",")),
                prompts=searched_with,
                held_out=others,
                layers=None if layers is None else _parse_layers(layers),
                kl_budget=kl_budget,
                max_perplexity_ratio=max_perplexity_ratio,
                min_distinct_ratio=min_distinct_ratio,
                tokens=tokens,
                sampling=_sampling(temperature, top_p, repetition_penalty, seed),
                quick=quick,
            )
        if plot is not None:
            _check_plot(plot)
        memory = parse_memory(max_memory)
        if not dry_run:
            held.enter_context(claim(store, name, WORK))
        with working(f"loading {model or header.model}"):
            loaded = load_model(
                model or header.model,
                dtype=header.model_dtype,
                device=default_device(),
                attention=attention,
                check=None if header.vector else family_of,
            )
        if dry_run:
            plan = plan_json(artifact, loaded, spec)
            output.print_answer({"name": name, "plan": plan}, plan_lines(name, plan), as_json=as_json)
            return
        with shown_progress(lines=not as_json) as progress:
            result, journal = calibrate_in_store(
                name,
                artifact,
                loaded,
                spec,
                store,
                max_memory=memory,
                keep_better=not replace,
                progress=progress,
            )
        curves = result.artifact.header.calibration
        assert curves is not None  # noqa: S101 - for the type checker
        # Where nothing was found, what is there stays untouched if an earlier calibration found something.
        untouched = curves.chosen is None and header.calibrated_point is not None and not replace
        path = store.path_of(name) if untouched else store.save(name, result.artifact, instead_of=artifact.digest)
        journal.delete()
        if plot is not None:
            _draw(curves, name, plot)
        answer = describe.operator_json(name, path, store.read_header(name))
        answer["found"] = curves.chosen is not None
        answer["kept"] = untouched or (result.kept and curves.chosen is not None)
        answer["previous"] = describe.point_json(header.calibrated_point)
        answer["new"] = describe.point_json(None if curves.chosen is None else curves.points[curves.chosen])
        answer["stronger"] = describe.point_json(result.stronger)
        answer["examples"] = [dataclasses.asdict(example) for example in result.examples]
        answer["resumed"] = journal.resumed
        answer["seconds"] = round(time.monotonic() - start, 2)
        output.print_answer(answer, calibration_lines(answer, curves), as_json=as_json)


def _sampling(temperature: float, top_p: float, repetition_penalty: float, seed: int) -> Sampling:
    from pydantic import ValidationError

    from operators.core.errors import TrialError
    from operators.core.measured import Sampling

    try:
        return Sampling(temperature=temperature, top_p=top_p, repetition_penalty=repetition_penalty, seed=seed)
    except ValidationError as error:
        first = error.errors()[0]
        raise TrialError(f"{first['loc'][0]} is {first['input']}: {first['msg'].lower()}") from error


def _parse_layers(text: str) -> tuple[int, ...]:
    from operators.core.errors import TrialError

    try:
        return tuple(read_whole(number) for number in text.split(","))
    except ValueError:
        raise TrialError(f"layers are {text!r}; whole numbers separated by commas are accepted") from None


def _check_plot(path: Path) -> None:
    """Before minutes are spent: whether there is something to draw with, and a place for it."""
    from operators.core.errors import TrialError

    if not path.absolute().parent.is_dir():
        raise TrialError(f"plot {path}: there is no directory {path.absolute().parent}")
    from operators.tune.plot import check_format

    with output.wrong_usage():
        check_format(path)


def _draw(curves: Calibration, name: str, path: Path) -> None:
    from operators.tune.plot import draw_calibration

    draw_calibration(curves, name, path)
