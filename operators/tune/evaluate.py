"""What a set of texts shows: whether they speak of a concept, how far they are from plain, and how well they read."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from operators.core.errors import TrialError
from operators.model.loading import LoadedModel
from operators.tune.trial import Text


@dataclass(frozen=True)
class Figures:
    """Of one setting's texts.

    ``hit_rate``: share of the texts that hold one of the concept's words. ``kl_p95``: 95th percentile over their tokens
    of KL(plain || steered), in nats. ``perplexity``: of their tokens under the plain model. ``distinct_2``: pairs of
    neighbouring tokens that a text has not had before, over all pairs; 1 where there is none.
    """

    hit_rate: float
    kl_p95: float
    perplexity: float
    distinct_2: float


def figures(texts: Sequence[Text], words: WordList, loaded: LoadedModel) -> Figures:
    """``texts``: one or more, without their prompts."""
    kl = [value for text in texts for value in text.kl]
    logprobs = [value for text in texts for value in text.logprobs]
    pairs = [list(zip(text.ids, text.ids[1:], strict=False)) for text in texts]
    num_pairs = sum(len(each) for each in pairs)
    return Figures(
        hit_rate=sum(words.hit(continuation(text, loaded)) for text in texts) / len(texts),
        kl_p95=percentile(kl, 0.95),
        # Beyond e^700 no float follows, and every bound was passed long before.
        perplexity=math.exp(min(-math.fsum(logprobs) / len(logprobs), 700.0)),
        distinct_2=sum(len(set(each)) for each in pairs) / num_pairs if num_pairs else 1.0,
    )


def continuation(text: Text, loaded: LoadedModel) -> str:
    """The text as people read it."""
    return str(loaded.tokenizer.decode(text.ids, skip_special_tokens=True))


class WordList:
    """The words that a concept is recognised by: whole, in any case, any white space between those of one entry."""

    def __init__(self, words: Sequence[str]) -> None:
        """Raises :class:`TrialError` for no words, or one that is blank."""
        if not words:
            raise TrialError("no words to recognise the concept by; at least one is needed")
        for word in words:
            if not word.strip():
                raise TrialError(f"word {word!r} is blank; a word or several separated by spaces are accepted")
        self.words = tuple(words)
        each = (r"\s+".join(re.escape(part) for part in word.split()) for word in words)
        self._pattern = re.compile(rf"(?<!\w)(?:{'|'.join(each)})(?!\w)", re.IGNORECASE)

    def hit(self, text: str) -> bool:
        """Whether the text holds one of them."""
        return self._pattern.search(text) is not None


def percentile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between order statistics."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
