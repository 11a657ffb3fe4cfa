"""One model over many phrases: the stable ranks of the first and last position's maps, and their leading tokens."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

import torch

from operators.analyse import spectra
from operators.analyse.analysis import next_tokens
from operators.analyse.positions import PROFILE
from operators.analyse.results import ModelSummary, PhraseSummary, mean, rounded
from operators.analyse.tokens import VocabularyProjection
from operators.builder.checks import dtype_name
from operators.builder.concept import concept_from_text
from operators.core.errors import AnalysisError, ConceptError
from operators.core.progress import Progress, silent
from operators.maps.replay import Replay
from operators.model.loading import LoadedModel

DEFAULT_PHRASES = Path(__file__).with_name("phrases.txt")
"""A hundred short phrases, one per line."""
_TOKENS = 6


def read_phrases(path: Path, *, limit: int | None = None) -> tuple[str, ...]:
    """The phrases of a file, one per line; the first ``limit`` of them.

    Raises:
        AnalysisError: it cannot be read, is empty, or a line is blank or not UTF-8; names the line.
    """
    if limit is not None and limit < 1:
        raise AnalysisError(f"limit is {limit}; 1 or more is accepted")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise AnalysisError(f"phrases {path} cannot be read: {error.strerror}") from error
    phrases = []
    for number, line in enumerate(raw.splitlines(), start=1):
        try:
            phrase = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise AnalysisError(f"phrases {path}, line {number}: byte {error.start + 1} is not UTF-8") from error
        if not phrase.strip():
            raise AnalysisError(f"phrases {path}, line {number}: is blank; one phrase per line is accepted")
        phrases.append(phrase)
    if not phrases:
        raise AnalysisError(f"phrases {path} is empty; one phrase per line is accepted")
    return tuple(phrases[:limit])


def summarise_model(phrases: Iterable[str], loaded: LoadedModel, *, progress: Progress = silent) -> ModelSummary:
    """All phrases under one model, at its output embedding. Spectra are sketched: see ``spectra.sketched_spectra``.

    Raises:
        AnalysisError: a phrase has no tokens or too many, or gives values that are not finite; names its number.
        UnsupportedModelError: the architecture has no detach table.
    """
    start = time.monotonic()
    phrases = tuple(phrases)
    vocabulary = VocabularyProjection(loaded)
    summaries = []
    for number, text in enumerate(phrases, start=1):
        try:
            ids = concept_from_text(text, loaded).ids
        except ConceptError as error:
            raise AnalysisError(f"phrase {number}: {error}") from error
        replay = Replay(loaded.model, ids, layer=loaded.num_layers, profile=PROFILE)
        if not bool(torch.isfinite(replay.y).all()):
            raise AnalysisError(
                f"phrase {number}: the output embedding of {text!r} under {loaded.name} is not finite in "
                f"{dtype_name(loaded.dtype)}"
            )
        summaries.append(_summarise_phrase(text, ids, replay, loaded, vocabulary))
        progress(f"Phrases, {loaded.name}", number, len(phrases))
    return ModelSummary(
        model=loaded.name,
        architecture=type(loaded.model).__name__,
        model_fingerprint=loaded.fingerprint,
        dtype=dtype_name(loaded.dtype),
        num_layers=loaded.num_layers,
        hidden_size=loaded.hidden_size,
        phrases=tuple(summaries),
        seconds=round(time.monotonic() - start, 2),
    )


def _summarise_phrase(
    text: str, ids: tuple[int, ...], replay: Replay, loaded: LoadedModel, vocabulary: VocabularyProjection
) -> PhraseSummary:
    by_position = spectra.sketched_spectra(replay, 1)
    stable = [None if spectrum.stable_rank is None else rounded(spectrum.stable_rank) for spectrum in by_position]
    first, last = by_position[0].facing(replay.x[0]), by_position[-1].facing(replay.x[-1])
    return PhraseSummary(
        text=text,
        num_tokens=len(ids),
        first=stable[0],
        last=stable[-1],
        mean=mean(stable),
        answer=next_tokens(loaded, ids, vocabulary),
        first_left=vocabulary.top(vocabulary.logits(first.left[:1], normed=True), _TOKENS)[0],
        last_left=vocabulary.top(vocabulary.logits(last.left[:1], normed=True), _TOKENS)[0],
        last_right=vocabulary.top(vocabulary.similarities(last.right[:1]), _TOKENS)[0],
    )
