"""What is reported of every token of a text, beside its log-probabilities: asked for, bounded, and put into words."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from itertools import zip_longest
from typing import Any

from operators.core.errors import VectorError
from operators.model.words import first_ids, normalised_word
from steer_server.errors import InvalidRequestError
from steer_server.types import Completion, Report, Score, TokenComparison, TokenReport, TopLogprob, WordMass

MAX_FIGURES = 1 << 18
"""Of all texts of a request: a hundred megabytes, about, while they are put together."""


async def work_out(report: TokenReport | None, tokenizer: Any) -> Report | None:
    """The report as the engine takes it. Raises :class:`InvalidRequestError` for a word that has no tokens."""
    if report is None:
        return None
    words = await asyncio.to_thread(_word_ids, report.words, tokenizer) if report.words else ()
    return Report(report.top, words, report.doses)


def check_figures(report: TokenReport | None, tokens: int, field: str) -> None:
    """Raises :class:`InvalidRequestError`, at ``field``, where there is too much to say of so many ``tokens``."""
    each = 1 if report is None else 1 + 2 * report.top + len(report.words)
    if tokens * each > MAX_FIGURES:
        raise InvalidRequestError(
            field,
            f"asks for up to {tokens * each} figures, {each} of each of {tokens} tokens in all texts together; at most "
            f"{MAX_FIGURES} are accepted",
        )


async def token_texts(texts: Iterable[Completion], tokenizer: Any) -> Mapping[int, str]:
    """The text of every token that is spoken of, each decoded on its own, in another thread."""
    ids = {token for text in texts for token in text.token_ids}
    for score in (score for text in texts for score in text.scores):
        ids.update(token for token, _ in (*score.gained, *score.lost))
    return await asyncio.to_thread(lambda: {token: str(tokenizer.decode([token])) for token in sorted(ids)})


def token_comparisons(
    text: Completion, report: TokenReport | None, texts: Mapping[int, str]
) -> tuple[TokenComparison, ...]:
    """One entry per token of a text that was scored; none otherwise."""
    words = () if report is None else report.words
    return tuple(
        _comparison(token, score, dose, words, texts)
        for token, score, dose in zip_longest(text.token_ids, text.scores, text.doses)
        if score is not None
    )


def _comparison(
    token: int, score: Score, dose: float | None, words: tuple[str, ...], texts: Mapping[int, str]
) -> TokenComparison:
    return TokenComparison(
        token_id=token,
        token=texts[token],
        logprob=score.logprob,
        normal_logprob=score.plain_logprob,
        kl=score.kl,
        gained=tuple(TopLogprob(other, texts[other], logprob) for other, logprob in score.gained),
        lost=tuple(TopLogprob(other, texts[other], logprob) for other, logprob in score.lost),
        words=tuple(WordMass(word, *masses) for word, masses in zip(words, score.words, strict=True)),
        dose=dose,
    )


def _word_ids(words: tuple[str, ...], tokenizer: Any) -> tuple[tuple[int, ...], ...]:
    found = []
    for index, word in enumerate(words):
        try:
            found.append(first_ids(normalised_word(word), tokenizer))
        except VectorError as error:
            raise InvalidRequestError(f"report.words[{index}]", str(error)) from None
    return tuple(found)
