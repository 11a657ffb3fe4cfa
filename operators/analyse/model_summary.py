"""Many phrases under several models: how low-dimensional is the map of a position, and what does it say?"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

import torch

from operators.analyse import spectra
from operators.analyse.analysis import dtype_name, next_tokens
from operators.analyse.positions import PROFILE
from operators.analyse.results import ModelSummary, Phrase, mean, rounded
from operators.analyse.tokens import Readout
from operators.builder.concept import concept_from_text
from operators.core.errors import AnalysisError, ConceptError
from operators.core.progress import Progress, silent
from operators.maps.replay import Replay
from operators.model.loading import LoadedModel

SHIPPED = Path(__file__).with_name("phrases.txt")
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


def summarise(phrases: Iterable[str], loaded: LoadedModel, *, progress: Progress = silent) -> ModelSummary:
    """All phrases under one model, at its output embedding. Spectra are sketched, not exact: see ``spectra``.

    Raises:
        AnalysisError: a phrase has no tokens or too many, or gives what is not finite; names its number.
        UnsupportedModelError: the architecture has no detach table.
    """
    start = time.monotonic()
    phrases = tuple(phrases)
    readout = Readout(loaded)
    found = []
    for number, text in enumerate(phrases, start=1):
        try:
            ids = concept_from_text(text, loaded).ids
        except ConceptError as error:
            raise AnalysisError(f"phrase {number}: {error}") from error
        replay = Replay(loaded.model, ids, layer=loaded.num_layers, profile=PROFILE)
        if not bool(torch.isfinite(replay.y).all()):
            raise AnalysisError(
                f"phrase {number}: the output embedding of {text!r} under {loaded.name} is not finite in "
                f"{dtype_name(loaded)}"
            )
        found.append(_phrase(text, ids, replay, loaded, readout))
        progress(f"Phrases, {loaded.name}", number, len(phrases))
    return ModelSummary(
        model=loaded.name,
        architecture=type(loaded.model).__name__,
        model_fingerprint=loaded.fingerprint,
        dtype=dtype_name(loaded),
        num_layers=loaded.num_layers,
        hidden_size=loaded.hidden_size,
        phrases=tuple(found),
        seconds=round(time.monotonic() - start, 2),
    )


def _phrase(text: str, ids: tuple[int, ...], replay: Replay, loaded: LoadedModel, readout: Readout) -> Phrase:
    spectrums = spectra.sketched(replay, 1)
    stable = [None if s.stable_rank is None else rounded(s.stable_rank) for s in spectrums]
    first, last = spectrums[0].facing(replay.x[0]), spectrums[-1].facing(replay.x[-1])
    return Phrase(
        text=text,
        num_tokens=len(ids),
        first=stable[0],
        last=stable[-1],
        mean=mean(stable),
        answer=next_tokens(loaded, ids, readout),
        first_left=readout.top(readout.logits(first.left[:1], normed=True), _TOKENS)[0],
        last_left=readout.top(readout.logits(last.left[:1], normed=True), _TOKENS)[0],
        last_right=readout.top(readout.similarities(last.right[:1]), _TOKENS)[0],
    )
