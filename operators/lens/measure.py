"""What a lens does to neutral texts: one word at a time is steered towards, and compared with plain texts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from operators.core import capacity
from operators.core.apply import PreparedOperator, Setting, prepare
from operators.core.artifact import OperatorArtifact
from operators.core.dose_curve import DosePoint
from operators.core.errors import TrialError
from operators.core.statistics import percentile
from operators.model.loading import LoadedModel
from operators.model.text_ids import text_ids
from operators.model.words import UnembeddingRows, word_operator
from operators.tune.continuations import (
    TEXTS_PER_BATCH,
    Continuation,
    ContinuationRequest,
    Injection,
    decode_continuations,
)
from operators.tune.metrics import WordList, continuation_text, repeats
from operators.tune.trial_memory import texts_within


@dataclass(frozen=True)
class Panel:
    """What a lens is measured on: every word on every prompt, greedily, ``tokens`` per text."""

    words: tuple[str, ...]
    prompts: tuple[str, ...]
    tokens: int

    def __post_init__(self) -> None:
        """Raises :class:`TrialError` for a panel without texts."""
        if not self.words or not self.prompts or self.tokens < 1:
            raise TrialError(
                f"{len(self.words)} words on {len(self.prompts)} prompts for {self.tokens} tokens; 1 or more of each "
                "are accepted"
            )

    @property
    def texts(self) -> int:
        """How many texts there are."""
        return len(self.words) * len(self.prompts)


class LensTrials:
    """Steers and measures on one model. ``lens`` (positions, layer) artifacts are given with each trial."""

    def __init__(
        self, loaded: LoadedModel, unembedding: UnembeddingRows, on_batch: Callable[[int], None] | None = None
    ) -> None:
        """``on_batch`` is called with the number of texts of each batch that is done."""
        self._loaded, self._unembedding, self._on_batch = loaded, unembedding, on_batch
        self._prepared: dict[tuple[str, str], PreparedOperator] = {}

    def measure(self, trials: Sequence[tuple[OperatorArtifact, float]], panel: Panel) -> list[DosePoint]:
        """One point for each pair (lens, strength), at the positions that the lens recommends; decoded together.

        Raises:
            TrialError: a prompt has no tokens or too many.
            VectorError: a word has no tokens.
            SteeringError: a push has no effect, or makes the logits not finite.
        """
        requests = [
            ContinuationRequest(ids, self._injection(lens, word, strength))
            for lens, strength in trials
            for word in panel.words
            for ids in self._prompts(panel)
        ]
        texts = self._decode(requests, panel)
        return [
            self._point(strength, panel, texts[first : first + panel.texts])
            for first, (_, strength) in zip(range(0, len(texts), panel.texts), trials, strict=True)
        ]

    def plain_hit_rate(self, panel: Panel) -> float:
        """Share of (word, prompt) of which the plain text holds the word."""
        texts = self._decode([ContinuationRequest(ids) for ids in self._prompts(panel)], panel)
        hits = [self._hits(word, text) for word in panel.words for text in texts]
        return sum(hits) / len(hits)

    def _prompts(self, panel: Panel) -> list[tuple[int, ...]]:
        return [self._encoded(prompt) for prompt in panel.prompts]

    @functools.cache  # noqa: B019 - lives as long as one search
    def _encoded(self, prompt: str) -> tuple[int, ...]:
        ids = text_ids(self._loaded.tokenizer, prompt)
        if not ids:
            raise TrialError(f"prompt {prompt!r} has no tokens; at least one is needed")
        return ids

    def _injection(self, lens: OperatorArtifact, word: str, strength: float) -> Injection:
        key = (lens.digest, word)
        if key not in self._prepared:
            operator = word_operator(lens, {word: 1.0}, self._unembedding, self._loaded.tokenizer)
            self._prepared[key] = prepare(operator, self._loaded.device)
        setting = Setting(strength, "cumulative", 1.0, lens.header.recommended.positions)
        return Injection(self._prepared[key], lens.header.injection_layer, setting)

    def _decode(self, requests: Sequence[ContinuationRequest], panel: Panel) -> list[Continuation]:
        longest = max(len(request.ids) for request in requests) + panel.tokens
        budget = capacity.free_memory(self._loaded.device)
        rows = texts_within(budget, self._loaded, longest, TEXTS_PER_BATCH)
        return decode_continuations(
            requests, self._loaded, tokens=panel.tokens, texts_per_batch=rows, on_batch=self._on_batch
        )

    def _hits(self, word: str, text: Continuation) -> bool:
        return WordList((word,)).matches(continuation_text(text, self._loaded))

    def _point(self, strength: float, panel: Panel, texts: Sequence[Continuation]) -> DosePoint:
        words = [word for word in panel.words for _ in panel.prompts]
        hits = [self._hits(word, text) for word, text in zip(words, texts, strict=True)]
        useful = [hit and not repeats(text.ids) for hit, text in zip(hits, texts, strict=True)]
        kl = [value for text in texts for value in text.kl]
        return DosePoint(
            strength=strength,
            kl_p95=percentile(kl, 0.95),
            kl_mean=sum(kl) / len(kl),
            hit_rate=sum(hits) / len(hits),
            useful_rate=sum(useful) / len(useful),
        )
