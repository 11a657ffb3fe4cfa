"""Analyses, draws and writes: what the command calls. Heavy imports are made inside, so that ``--help`` is quick."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from operators.core.errors import AnalysisError
from operators.core.progress import shown_progress

if TYPE_CHECKING:
    from operators.analyse.answers import Answer
    from operators.analyse.canvas import ThemedImage
    from operators.core.header import AttentionName, DTypeName
    from operators.model.loading import LoadedModel


@dataclass(frozen=True)
class ModelKind:
    """How models are loaded. Filled by the command."""

    dtype: DTypeName
    device: str
    attention: AttentionName | None

    def load(self, name: str) -> LoadedModel:
        """The model ``name``; refused before its weights are read where it has no detach table."""
        from operators.maps.detach import family_of
        from operators.model.loading import load_model

        return load_model(name, dtype=self.dtype, device=self.device, attention=self.attention, check=family_of)


def write_analysis(
    text: str, model: str | None, layer: int | None, out: Path, kind: ModelKind, *, lines: bool
) -> Answer:
    """Analyses one prompt and writes ``analysis.json``, ``analysis.html`` and the plots into ``out``.

    ``lines``: progress is said in lines where there is no terminal.
    """
    from operators.analyse import canvas, plots, report, results
    from operators.analyse.analysis import analyse_prompt
    from operators.analyse.answers import analysis_answer
    from operators.builder.concept import check_text
    from operators.model.loading import default_model

    # Everything that can be refused without the model is refused before it is loaded.
    canvas.check_installed()
    check_text(text)
    check_writable(out)
    loaded = kind.load(model or default_model())
    with shown_progress(lines=lines) as progress:
        analysis = analyse_prompt(text, loaded, layer=layer, progress=progress)
    images = plots.analysis_plots(analysis)
    document, html = results.to_json(analysis), report.analysis_page(analysis, images)
    return analysis_answer(analysis, write_files(out, "analysis", document, html, images))


def write_summaries(
    models: list[str], phrases: Path | None, limit: int | None, out: Path, kind: ModelKind, *, lines: bool
) -> Answer:
    """Summarises models over phrases; writes ``comparison.json``, ``comparison.html`` and the plot into ``out``.

    ``lines``: progress is said in lines where there is no terminal.
    """
    from operators.analyse import canvas, results
    from operators.analyse.answers import summaries_answer
    from operators.analyse.model_summary import DEFAULT_PHRASES, read_phrases, summarise_model
    from operators.analyse.summary_page import summary_page
    from operators.analyse.summary_plots import summary_plots

    canvas.check_installed()
    texts = read_phrases(phrases or DEFAULT_PHRASES, limit=limit)
    check_writable(out)
    with shown_progress(lines=lines) as progress:
        # One model in memory at a time.
        by_model = [summarise_model(texts, kind.load(name), progress=progress) for name in models]
    summaries = results.ModelSummaries(results.SUMMARIES_SCHEMA, texts, tuple(by_model))
    images = summary_plots(summaries)
    document, html = results.to_json(summaries), summary_page(summaries, images)
    return summaries_answer(summaries, write_files(out, "comparison", document, html, images))


def check_writable(out: Path) -> None:
    """Makes the directory ``out``. Raises :class:`AnalysisError` when it cannot be made or written to."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise AnalysisError(f"directory {out} cannot be written to: {error.strerror}") from error


def write_files(out: Path, name: str, document: str, html: str, images: Mapping[str, ThemedImage]) -> dict[str, str]:
    """Writes JSON, HTML and one PNG per image, each file whole or not at all; returns the paths by what they are."""
    contents = {f"{name}.json": document.encode(), f"{name}.html": html.encode()}
    contents |= {f"{plot}.png": image.light for plot, image in images.items()}
    for file, content in contents.items():
        try:
            _replace(out / file, content)
        except OSError as error:
            raise AnalysisError(f"{out / file} cannot be written: {error.strerror}") from error
    return {
        "report": str(out / f"{name}.html"),
        "data": str(out / f"{name}.json"),
        **{plot: str(out / f"{plot}.png") for plot in images},
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
