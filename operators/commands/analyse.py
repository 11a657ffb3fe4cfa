"""``analyse``: what a model does with a text, as JSON, plots and one page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from operators.commands import _output as output
from operators.commands._options import (
    AttentionOption,
    DeviceOption,
    DTypeOption,
    JsonOption,
    ModelOption,
    default_device,
)


def analyse(
    models: Annotated[list[str] | None, typer.Argument(help="With --compare: the models.", show_default=False)] = None,
    text: Annotated[str | None, typer.Option(help="The prompt.", show_default=False)] = None,
    model: ModelOption = None,
    out: Annotated[Path, typer.Option(help="Directory for the report, the plots and the JSON.")] = Path("analysis"),
    layer: Annotated[
        int | None, typer.Option(help="Layer of the output embedding (default: the last).", show_default=False)
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Compare MODELS over many phrases.")] = False,
    phrases: Annotated[
        Path | None, typer.Option(help="One phrase per line (default: a hundred short ones).", show_default=False)
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Take the first phrases only.", show_default=False)] = None,
    dtype: DTypeOption = "float32",
    device: DeviceOption = None,
    attention: AttentionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a model does with a prompt: reconstruction, spectra, tokens, layer by layer. Writes a report."""
    of_one = {"--text": text, "--model": model, "--layer": layer}
    _check_usage(compare, models, of_one, {"--phrases": phrases, "--limit": limit})
    with output.exit_on_error(as_json):
        from operators.analyse.write_report import ModelKind, write_analysis, write_summaries

        kind = ModelKind(dtype, device or default_device(), attention)
        if compare:
            answer, lines = write_summaries(models or [], phrases, limit, out, kind, lines=not as_json)
        else:
            answer, lines = write_analysis(text or "", model, layer, out, kind, lines=not as_json)
        output.print_answer(answer, lines, as_json=as_json)


def _check_usage(
    compare: bool, models: list[str] | None, of_one: Mapping[str, object], of_many: Mapping[str, object]
) -> None:
    wrong, mode = (of_one, "without --compare") if compare else (of_many, "with --compare")
    for option, value in wrong.items():
        if value is not None:
            raise typer.BadParameter(f"{option} goes {mode}")
    if compare and not models:
        raise typer.BadParameter("--compare needs one or more models")
    if models and not compare:
        raise typer.BadParameter(f"{models[0]!r}: models go with --compare; one model is given as --model")
    if not compare and of_one["--text"] is None:
        raise typer.BadParameter("--text is needed, or --compare with models")
