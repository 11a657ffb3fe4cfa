"""``eval``: many forms of steering at the same distance from the plain model, and which of them to use."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

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
from operators.core.numbers import read_decimal, read_whole
from operators.core.progress import shown_progress, working

if TYPE_CHECKING:
    import torch

    from operators.model.loading import LoadedModel

_Number = TypeVar("_Number", int, float)
UNFINISHED = 75
"""Exit status of a run that has to be gone on with."""


def evaluate(
    out: Annotated[Path, typer.Option(help="Folder of rows and report; an interrupted run goes on there.")] = Path(
        "eval"
    ),
    forms: Annotated[
        str | None, typer.Option(help="Names from --list-forms, with commas (default: all).", show_default=False)
    ] = None,
    concepts: Annotated[
        Path | None, typer.Option(help="TOML file of concepts (default: ten that ship).", show_default=False)
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Held-out prompts to report on, one per line (default: 122).", show_default=False),
    ] = None,
    development_prompts: Annotated[
        Path | None,
        typer.Option(help="Prompts to find strengths on, one per line (default: 24).", show_default=False),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Only this concept; repeatable (default: all).", show_default=False),
    ] = None,
    num_prompts: Annotated[
        int | None, typer.Option(metavar="N", help="Only the first N held-out prompts.", show_default=False)
    ] = None,
    num_development_prompts: Annotated[
        int | None, typer.Option(metavar="N", help="Only the first N development prompts.", show_default=False)
    ] = None,
    regimes: Annotated[
        str | None,
        typer.Option(
            help="Of greedy, penalised, sampled, sampled-penalised, greedy-away, with commas (default: all).",
            show_default=False,
        ),
    ] = None,
    doses: Annotated[
        str | None,
        typer.Option(help="p95 KL in nats, with commas (default: those of the regimes).", show_default=False),
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(help="Lengths of the texts, with commas (default: 24,64).", show_default=False)
    ] = None,
    strengths: Annotated[
        str | None,
        typer.Option(help="λ that a search begins with, with commas (default: six, 0.03 to 1).", show_default=False),
    ] = None,
    vector: Annotated[
        list[str] | None,
        typer.Option(help="CONCEPT=FILE: a vector from elsewhere for a concept; repeatable.", show_default=False),
    ] = None,
    layer: Annotated[
        int | None, typer.Option(help="Block whose input is pushed (default: at 0.7 of the depth).", show_default=False)
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Six forms, two concepts, few prompts, short texts.")] = False,
    minutes: Annotated[
        float | None,
        typer.Option(help="Stop before so many minutes are over; the same command goes on.", show_default=False),
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, max=65536, help="Texts per batch (default: by memory).", show_default=False)
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Make the report of this folder anew, and nothing else.", show_default=False)
    ] = None,
    list_forms: Annotated[bool, typer.Option("--list-forms", help="Print the forms, and nothing else.")] = False,
    model: ModelOption = None,
    dtype: DTypeOption = "float32",
    device: DeviceOption = None,
    attention: AttentionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare forms of steering: hits, readable hits and damage at equal KL, on prompts that nothing was chosen on.

    Strengths are found on development prompts, by KL alone. Rows go to OUT/rows.jsonl as they are made; Ctrl-C loses
    the batch under way. The report is OUT/table.md, OUT/figures.json and OUT/plot.png.
    """
    start = time.monotonic()
    with output.exit_on_error(as_json):
        from operators.core.errors import TrialError
        from operators.evaluate.concepts import choose_concepts, packaged_concepts, read_concepts
        from operators.evaluate.form import all_forms, choose_forms
        from operators.evaluate.protocol import make_protocol
        from operators.evaluate.report import TABLE, write_report
        from operators.tune.prompts import read_prompts

        if list_forms:
            about = {name: form.about for name, form in all_forms().items()}
            output.print_answer({"forms": about}, output.align(about.items()), as_json=as_json)
            return
        if report is not None:
            figures = write_report(report)
            output.print_answer(figures, [f"{report / TABLE}"], as_json=as_json)
            return
        # Everything that can be refused without the model is refused before it is loaded.
        with output.wrong_usage():
            chosen = choose_forms(_names(forms), quick=quick)
            if minutes is not None and not minutes > 0:
                raise TrialError(f"minutes is {minutes:g}; a positive number is accepted")
        subjects = packaged_concepts() if concepts is None else read_concepts(concepts)
        if only:
            with output.wrong_usage():
                subjects = choose_concepts(subjects, only)
        elif quick:
            # One that development used, and one that it did not, where the file has both.
            subjects = tuple({concept.fresh: concept for concept in reversed(subjects)}.values())
        with output.wrong_usage():
            files = _vector_files(vector or [], [concept.name for concept in subjects])
        development = None if development_prompts is None else read_prompts(development_prompts)
        held_out = None if prompts is None else read_prompts(prompts)
        with output.wrong_usage():
            protocol = make_protocol(
                quick=quick,
                development=development,
                held_out=held_out,
                num_development=num_development_prompts,
                num_held_out=num_prompts,
                regimes=_names(regimes),
                doses=_numbers("doses", doses, read_decimal),
                lengths=_numbers("tokens", tokens, read_whole),
                strengths=_numbers("strengths", strengths, read_decimal),
            )

        from operators.evaluate.cells import OutOfTimeError
        from operators.evaluate.journal import open_journal
        from operators.evaluate.material import Material
        from operators.evaluate.record import describe_run, write_record
        from operators.evaluate.run import Evaluation
        from operators.maps.detach import family_of
        from operators.model.loading import default_model, load_model

        with working(f"loading {model or default_model()}"):
            loaded = load_model(
                model or default_model(),
                dtype=dtype,
                device=device or default_device(),
                attention=attention,
                check=family_of,
            )
        with open_journal(out) as journal, shown_progress(lines=not as_json) as progress:
            material = Material(loaded, layer, progress=progress)
            material.add_vectors(_read_vectors(files, loaded, material.layer))
            write_record(out, describe_run(material, chosen, subjects, protocol))
            evaluation = Evaluation(
                material,
                chosen,
                subjects,
                protocol,
                journal,
                rows=_rows(loaded) if rows is None else rows,
                progress=progress,
                deadline=None if minutes is None else start + 60 * minutes,
            )
            finished = True
            try:
                evaluation.run()
            except OutOfTimeError:
                finished = False
        answer: dict[str, Any] = {"finished": finished, "out": str(out), "rows": len(journal.rows)}
        if finished:
            answer |= write_report(out)
        answer["seconds"] = round(time.monotonic() - start, 2)
        said = f"{out / TABLE}" if finished else f"out of time with {len(journal.rows)} rows: the same command goes on"
        output.print_answer(answer, [f"{said} ({answer['seconds']:.0f} s)"], as_json=as_json)
        if not finished:
            raise typer.Exit(UNFINISHED)


def _names(option: str | None) -> list[str] | None:
    return None if option is None else [name.strip() for name in option.split(",")]


def _numbers(name: str, option: str | None, kind: Callable[[str], _Number]) -> list[_Number] | None:
    """Numbers with commas. Raises :class:`TrialError`."""
    from operators.core.errors import TrialError

    try:
        return None if option is None else [kind(value) for value in option.split(",")]
    except ValueError as error:
        raise TrialError(f"{name} are {option!r}; numbers with commas are accepted") from error


def _vector_files(options: list[str], names: list[str]) -> dict[str, Path]:
    """CONCEPT=FILE options as a mapping. Raises :class:`TrialError`."""
    from operators.core.errors import TrialError

    files: dict[str, Path] = {}
    for option in options:
        name, equals, file = option.partition("=")
        if not equals or not file or name not in names or name in files:
            raise TrialError(
                f"vector {option!r}; CONCEPT=FILE is accepted, once for each of the concepts {', '.join(names)}"
            )
        files[name] = Path(file)
    return files


def _read_vectors(files: dict[str, Path], loaded: LoadedModel, layer: int) -> dict[str, tuple[torch.Tensor, str]]:
    """The vectors (d,) and the digests of their files, by concept.

    Raises:
        VectorError: a file cannot be read, has several vectors for the layer, or one of another model or width.
    """
    from operators.vectors.imported import check_model_hint, choose_tensors, import_vector
    from operators.vectors.vector_file import read_vector_file

    vectors: dict[str, tuple[torch.Tensor, str]] = {}
    for name, path in files.items():
        file = read_vector_file(path)
        check_model_hint(file, loaded)
        tensor = choose_tensors(file, [layer], None)[layer]
        artifact = import_vector(file, tensor, loaded, layer=layer, about=name)
        vectors[name] = artifact.anchor, file.digest
    return vectors


def _rows(loaded: LoadedModel) -> int:
    """Texts per batch: on a GPU as many as its memory takes logits of, on a CPU a few."""
    if loaded.device.type != "cuda":
        return 64
    import torch

    vocabulary = int(loaded.model.get_output_embeddings().weight.shape[0])
    return int(min(4096, max(64, 0.3 * torch.cuda.mem_get_info(loaded.device)[1] // (24 * vocabulary))))
