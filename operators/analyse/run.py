"""Analyses made and written: what the command calls. Heavy imports are made inside, so that ``--help`` is quick."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from operators.core import progress as bars
from operators.core.errors import AnalysisError

if TYPE_CHECKING:
    from operators.analyse.canvas import Picture
    from operators.analyse.results import Analysis, Comparison, Token
    from operators.core.header import DTypeName

Answer = tuple[dict[str, Any], list[str]]
"""What a command says: a JSON document, and lines."""


def analyse_text(text: str, model: str | None, layer: int | None, out: Path, dtype: DTypeName, device: str) -> Answer:
    """Analyses one prompt and writes ``analysis.json``, ``analysis.html`` and the plots into ``out``."""
    from operators.analyse import canvas, plots, report, results
    from operators.analyse.analysis import analyse
    from operators.builder.concept import check_text
    from operators.model.loading import default_model, load_model

    # Everything that can be refused without the model is refused before it is loaded.
    canvas.check_installed()
    check_text(text)
    writable(out)
    loaded = load_model(model or default_model(), dtype=dtype, device=device)
    with bars.progress_bars() as progress:
        found = analyse(text, loaded, layer=layer, progress=progress)
    pictures = plots.analysis_plots(found)
    files = write(out, "analysis", results.to_json(found), report.analysis_page(found, pictures), pictures)
    return _analysis_answer(found, files)


def compare_models(
    models: list[str], phrases: Path | None, limit: int | None, out: Path, dtype: DTypeName, device: str
) -> Answer:
    """Compares models over phrases and writes ``comparison.json``, ``comparison.html`` and the plot into ``out``."""
    from operators.analyse import canvas, plots, report, results
    from operators.analyse.model_summary import SHIPPED, read_phrases, summarise
    from operators.model.loading import load_model

    canvas.check_installed()
    texts = read_phrases(phrases or SHIPPED, limit=limit)
    writable(out)
    with bars.progress_bars() as progress:
        # One model in memory at a time.
        found = [summarise(texts, load_model(name, dtype=dtype, device=device), progress=progress) for name in models]
    comparison = results.Comparison(results.COMPARISON_SCHEMA, texts, tuple(found))
    pictures = plots.comparison_plots(comparison)
    document, html = results.to_json(comparison), report.comparison_page(comparison, pictures)
    return _comparison_answer(comparison, write(out, "comparison", document, html, pictures))


def writable(out: Path) -> None:
    """Makes the directory. Raises :class:`AnalysisError` when nothing can be written there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise AnalysisError(f"directory {out} cannot be written to: {error.strerror}") from error


def write(out: Path, name: str, document: str, html: str, pictures: Mapping[str, Picture]) -> dict[str, str]:
    """Writes everything, each file whole or not at all; returns the paths by what they are."""
    contents = {f"{name}.json": document.encode(), f"{name}.html": html.encode()}
    contents |= {f"{plot}.png": picture.light for plot, picture in pictures.items()}
    for file, content in contents.items():
        try:
            _replace(out / file, content)
        except OSError as error:
            raise AnalysisError(f"{out / file} cannot be written: {error.strerror}") from error
    return {
        "report": str(out / f"{name}.html"),
        "data": str(out / f"{name}.json"),
        **{plot: str(out / f"{plot}.png") for plot in pictures},
    }


def _replace(path: Path, content: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def _analysis_answer(found: Analysis, files: dict[str, str]) -> Answer:
    positions = [
        {
            "token": position.token.text,
            "stable_rank": position.stable_rank,
            "sigma": position.directions[0].sigma,
            "share": position.share,
            "reads": _texts(position.directions[0].right),
            "writes": _texts(position.directions[0].left),
        }
        for position in found.positions
    ]
    document: dict[str, Any] = {
        "schema": found.schema,
        "text": found.text,
        "model": found.model,
        "layer": found.layer,
        "num_layers": found.num_layers,
        "next_token": found.answer[0].text,
        "next_token_probability": found.answer[0].score,
        "detached_error": found.reconstruction.detached_error,
        "ordinary_error": found.reconstruction.ordinary_error,
        "mean_stable_rank": found.mean_stable_rank,
        "emergence": {name: getattr(found.emergence, name) for name in ("stream", "last", "first")},
        "positions": positions,
        "seconds": found.seconds,
        "files": files,
    }
    ranks = [position.stable_rank for position in found.positions]
    lines = _fields(
        {
            "next token": f"{found.answer[0].text!r}, probability {found.answer[0].score:.3g}",
            "reconstruction": f"{found.reconstruction.detached_error:.2e} detached, "
            f"{found.reconstruction.ordinary_error:.3g} ordinary Jacobian (|sum J x + c - h| / |h|)",
            "stable rank": f"{_number(ranks[0])} first, {_number(ranks[-1])} last, "
            f"{_number(found.mean_stable_rank)} mean over {len(ranks)} positions",
            "answer leads": f"stream {_layer(found.emergence.stream)}, u1 of the last position "
            f"{_layer(found.emergence.last)}, of the first {_layer(found.emergence.first)}",
            "u1 of the last": " ".join(map(repr, _texts(found.positions[-1].directions[0].left))),
            "report": files["report"],
            "seconds": found.seconds,
        }
    )
    return document, lines


def _comparison_answer(comparison: Comparison, files: dict[str, str]) -> Answer:
    from statistics import median

    from operators.analyse.report import spread

    kinds: tuple[Literal["first", "last", "mean"], ...] = ("first", "last", "mean")
    document: dict[str, Any] = {
        "schema": comparison.schema,
        "phrases": len(comparison.phrases),
        "models": [
            {
                "model": model.model,
                "architecture": model.architecture,
                "median_stable_rank": {
                    kind: median(values) if (values := model.values(kind)) else None for kind in kinds
                },
                "seconds": model.seconds,
            }
            for model in comparison.models
        ],
        "files": files,
    }
    lines = ["stable rank over phrases: median [middle half]"]
    for model in comparison.models:
        told = ", ".join(f"{kind} {spread(model, kind)}" for kind in kinds)
        lines.append(f"{model.model}: {told} ({model.seconds:g} s)")
    return document, [*lines, f"report: {files['report']}"]


def _fields(fields: Mapping[str, object]) -> list[str]:
    width = max(map(len, fields)) + 1
    return [f"{f'{name}:'.ljust(width)}  {value}" for name, value in fields.items()]


def _texts(tokens: Iterable[Token]) -> list[str]:
    return [token.text for token in tokens]


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3g}"


def _layer(layer: int | None) -> str:
    return "never" if layer is None else f"from layer {layer}"
