"""Metrics of a set of texts: whether they name a concept, how far they are from plain ones, how fluent they are."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from operators.core.errors import TrialError
from operators.core.scripts import SPACELESS
from operators.core.statistics import percentile
from operators.model.loading import LoadedModel
from operators.tune.continuations import Continuation


@dataclass(frozen=True)
class TextMetrics:
    """Of the texts of one setting.

    ``hit_rate``: share of the texts with one of the concept's words. ``useful``: by text, whether it has one and
    repeats no 4-gram of tokens. ``kl_p95`` and ``kl_mean``: over their tokens, of KL(plain || steered), in nats.
    ``perplexity``: exp of the mean negative log-probability of their tokens under the plain model. ``distinct_2``:
    number of distinct pairs of neighbouring tokens within a text, summed over the texts, over the number of all pairs;
    1 where there is no pair.
    """

    hit_rate: float
    useful: tuple[bool, ...]
    kl_p95: float
    kl_mean: float
    perplexity: float
    distinct_2: float

    @property
    def useful_rate(self) -> float:
        """Share of the texts that are useful."""
        return sum(self.useful) / len(self.useful)


def compute_metrics(texts: Sequence[Continuation], words: WordList, loaded: LoadedModel) -> TextMetrics:
    """The metrics of one or more texts, without their prompts."""
    kl = [value for text in texts for value in text.kl]
    logprobs = [value for text in texts for value in text.logprobs]
    pairs = [list(zip(text.ids, text.ids[1:], strict=False)) for text in texts]
    num_pairs = sum(len(each) for each in pairs)
    hits = [words.matches(continuation_text(text, loaded)) for text in texts]
    return TextMetrics(
        hit_rate=sum(hits) / len(texts),
        useful=tuple(hit and not repeats(text.ids) for hit, text in zip(hits, texts, strict=True)),
        kl_p95=percentile(kl, 0.95),
        kl_mean=math.fsum(kl) / len(kl),
        # exp overflows a little above 700; every bound is far below.
        perplexity=math.exp(min(-math.fsum(logprobs) / len(logprobs), 700.0)),
        distinct_2=sum(len(set(each)) for each in pairs) / num_pairs if num_pairs else 1.0,
    )


def repeats(ids: Sequence[int], n: int = 4) -> bool:
    """Whether n tokens in a row come twice: a text that loops is read once."""
    grams = [tuple(ids[start : start + n]) for start in range(len(ids) - n + 1)]
    return len(set(grams)) < len(grams)


def continuation_text(text: Continuation, loaded: LoadedModel) -> str:
    """The tokens as text, without special tokens."""
    return str(loaded.tokenizer.decode(text.ids, skip_special_tokens=True))


class WordList:
    """The words that show a concept: matched whole, in any case; any white space separates the words of one entry.

    Where a word begins or ends in a script without spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese) it is found
    within a sentence, and characters of these end a word of another script. A Korean word may have particles behind it.
    Composed and decomposed characters are one.
    """

    def __init__(self, words: Sequence[str]) -> None:
        """Raises :class:`TrialError` where there are no words, or one is blank."""
        if not words:
            raise TrialError("no words to recognise the concept by; at least one is needed")
        for word in words:
            if not word.strip():
                raise TrialError(f"word {word!r} is blank; a word or several separated by spaces are accepted")
        self.words = tuple(words)
        self._pattern = re.compile("|".join(_word_pattern(_normalised(word)) for word in words))

    def matches(self, text: str) -> bool:
        """Whether one of them is in the text."""
        return self._pattern.search(_normalised(text)) is not None


_LETTER = rf"[^\W{SPACELESS}]"
"""A character of a word, of a script with spaces."""
_TAKES_PARTICLES = re.compile("[\uac00-\ud7af\u1100-\u11ff\u3130-\u318f]")
"""Hangul: words are set apart by spaces, but particles are written onto their end."""
_IS_SPACELESS = re.compile(f"[{SPACELESS}]")


def _word_pattern(word: str) -> str:
    parts = word.split()
    before = "" if _IS_SPACELESS.match(parts[0][0]) else f"(?<!{_LETTER})"
    last = parts[-1][-1]
    after = "" if _IS_SPACELESS.match(last) or _TAKES_PARTICLES.match(last) else f"(?!{_LETTER})"
    return before + r"\s+".join(map(re.escape, parts)) + after


def _normalised(text: str) -> str:
    """Composed (NFC) and without case; folding may take characters apart, hence twice."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
