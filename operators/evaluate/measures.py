"""What is measured of texts: hits, repetition, surprise, variety, and the distance from the plain model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from operators.evaluate.concepts import EvalConcept
from operators.evaluate.writing import Written
from operators.model.loading import LoadedModel
from operators.tune.metrics import WordList

_LOOP = 4
"""A text that has the same four tokens twice repeats itself."""


class WordMatcher:
    """The word lists of the concepts, made once."""

    def __init__(self, concepts: Sequence[EvalConcept]) -> None:
        self._lists = {concept.name: (WordList(concept.words), WordList([concept.word])) for concept in concepts}

    def hits(self, concept: str, texts: Sequence[str]) -> dict[str, str]:
        """``hits``: which texts hold a word of the concept, ``named``: which its name; one character 0 or 1 each."""
        words, name = self._lists[concept]
        return {"hits": _flags(map(words.matches, texts)), "named": _flags(map(name.matches, texts))}


def text_values(written: Written, at: slice, tokens: int) -> dict[str, Any]:
    """Of the first ``tokens`` tokens of the texts ``at``, without their words.

    ``nll``: mean negative log-probability per token under the plain model, in nats; ``distinct``: distinct pairs of
    neighbouring tokens over all pairs, 1 where there is none; ``loops``: whether four tokens occur twice; ``kl_p95``
    and ``kl_mean`` over the tokens of all these texts.
    """
    lengths = np.minimum(written.lengths[at], tokens)
    real = np.arange(tokens)[None] < lengths[:, None]
    kl = written.kl[at, :tokens][real]
    logprobs = np.where(real, written.logprobs[at, :tokens], 0.0)
    ids = written.ids[at, :tokens].astype(np.uint64)
    pairs, runs = _windows(ids, 2), _windows(ids, _LOOP)
    distinct, count = _distinct(pairs, lengths - 1)
    different, number = _distinct(runs, lengths - _LOOP + 1)
    return {
        "nll": _rounded(-logprobs.sum(1) / lengths),
        "distinct": _rounded(np.where(count > 0, distinct / np.maximum(count, 1), 1.0)),
        "loops": _flags(different < number),
        "kl_p95": float(f"{np.quantile(kl, 0.95):.4g}"),
        "kl_mean": float(f"{kl.mean(dtype=np.float64):.4g}"),
    }


def decoded(written: Written, at: slice, tokens: int, loaded: LoadedModel) -> list[str]:
    """The first ``tokens`` tokens of each of the texts ``at`` as text, without special tokens."""
    lengths = np.minimum(written.lengths[at], tokens)
    ids = [text[:length].tolist() for text, length in zip(written.ids[at], lengths, strict=True)]
    return list(loaded.tokenizer.batch_decode(ids, skip_special_tokens=True))


def flags(text: str) -> np.ndarray:
    """``"0110"`` as an array of floats."""
    return np.frombuffer(text.encode(), dtype=np.uint8).astype(float) - ord("0")


def is_useful(values: Mapping[str, Any], plain: Mapping[str, Any], *, away: bool = False) -> np.ndarray:
    """Which texts are hits worth reading, (texts,) of 0 and 1; ``away``: which avoid the words and are worth reading.

    Worth reading: no loop, a perplexity of at most twice that of the plain texts, and at least three quarters of their
    distinct-2; both of the plain texts together, since one plain text's own is noise.
    """
    ratio = np.exp(np.array(values["nll"]) - np.mean(plain["nll"]))
    variety = np.array(values["distinct"]) / np.mean(plain["distinct"])
    readable = (flags(values["loops"]) == 0) & (ratio <= 2.0) & (variety >= 0.75)
    hits = flags(values["hits"])
    return np.asarray(readable * ((1.0 - hits) if away else hits))


def _windows(ids: np.ndarray, size: int) -> np.ndarray:
    """A number for every ``size`` neighbouring tokens of ids (R, T), (R, T-size+1): equal where the tokens are."""
    count = max(ids.shape[1] - size + 1, 0)
    number = np.zeros((len(ids), count), dtype=np.uint64)
    for offset in range(size):
        # Modulo 2^64 with an odd factor: of two different windows the numbers all but never meet.
        number = number * np.uint64(0x9E3779B97F4A7C15) + ids[:, offset : offset + count] + np.uint64(1)
    return number


def _distinct(numbers: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many of the first ``counts`` (R,) numbers of each row are different, and how many there are."""
    counts = np.clip(counts, 0, numbers.shape[1])
    real = np.arange(numbers.shape[1])[None] < counts[:, None]
    # The rest of a row becomes one number more, which is taken off again.
    ordered = np.sort(np.where(real, numbers, np.iinfo(np.uint64).max), axis=1)
    different = (ordered[:, 1:] != ordered[:, :-1]).sum(1) + (numbers.shape[1] > 0)
    return different - (counts < numbers.shape[1]), counts


def _flags(values: Any) -> str:
    return "".join("1" if value else "0" for value in values)


def _rounded(values: Any) -> list[float]:
    return [round(float(value), 3) for value in values]
