"""Directions of words, by lens: each is worked out once, in a thread beside the event loop, and kept for the next time;
so is the direction of each single word, of which the others are mixed.

A direction is a vector with a digest of its own, so that whatever holds, sends or salts operators by digest takes it as
it takes any other.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

from operators.core.artifact import OperatorArtifact
from operators.core.errors import VectorError
from operators.model.words import LensWords, UnembeddingRows
from steer_server.fair_threads import FairRoom, FairThreads
from steer_server.types import WeightedWord

MAX_KEPT = 1024
"""Directions kept: d numbers and a header of a few kilobytes each."""
_MAX_WAITING = 256
"""Requests whose words wait to be read."""

_T = TypeVar("_T")


class Words(Protocol):
    """What makes directions of words."""

    def check(self, words: tuple[WeightedWord, ...]) -> None:
        """Raises as :meth:`direction` does for words that make none of any lens; works none out."""
        ...

    def learn(self, lens: OperatorArtifact, word: WeightedWord) -> None:
        """Works out and keeps what one word comes to, whatever its weight. Raises as :meth:`direction` does."""
        ...

    def direction(self, lens: OperatorArtifact, words: tuple[WeightedWord, ...]) -> OperatorArtifact:
        """The vector of some words; may read files.

        Raises:
            VectorError, IncompatibleOperatorError, ModelError: they make none.
        """
        ...


class WordDirections:
    """Implements :class:`Words` for one model."""

    def __init__(
        self, find_unembedding: Callable[[], UnembeddingRows], tokenizer: Any, *, max_kept: int = MAX_KEPT
    ) -> None:
        """``find_unembedding`` is called with the first word: a server without a lens reads nothing."""
        self._find_unembedding, self._tokenizer, self._max_kept = find_unembedding, tokenizer, max_kept
        self._lens_words: LensWords | None = None
        self._kept: OrderedDict[tuple[str, tuple[WeightedWord, ...]], OperatorArtifact] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def direction(self, lens: OperatorArtifact, words: tuple[WeightedWord, ...]) -> OperatorArtifact:
        """See :meth:`Words.direction`."""
        key = (lens.digest, words)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = self._make(lens, words)
                if len(self._kept) > self._max_kept:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
            return self._kept[key]

    def check(self, words: tuple[WeightedWord, ...]) -> None:
        """See :meth:`Words.check`."""
        with self._lock:
            self._of_model().check(_weights(words))

    def learn(self, lens: OperatorArtifact, word: WeightedWord) -> None:
        """See :meth:`Words.learn`."""
        with self._lock:
            self._of_model().learn(lens, word.text)

    def _make(self, lens: OperatorArtifact, words: tuple[WeightedWord, ...]) -> OperatorArtifact:
        return self._of_model().operator(lens, _weights(words))

    def _of_model(self) -> LensWords:
        if self._lens_words is None:
            self._lens_words = LensWords(self._find_unembedding(), self._tokenizer, max_kept=self._max_kept)
        return self._lens_words


def _weights(words: tuple[WeightedWord, ...]) -> dict[str, float]:
    """Raises :class:`VectorError` for a word that is there twice."""
    weights = {word.text: word.weight for word in words}
    if len(weights) < len(words):
        twice = next(word.text for index, word in enumerate(words) if word.text in {w.text for w in words[:index]})
        raise VectorError(f"word {twice!r} is there twice")
    return weights


class BesideTheLoop:
    """Works out the words of requests in a thread of its own, piece by piece: callers take turns with each piece."""

    def __init__(self, *, max_waiting: int = _MAX_WAITING) -> None:
        self._thread = FairThreads(1, "words")
        self._room = FairRoom(max_waiting, "requests wait for their words")

    def place(self) -> AbstractContextManager[None]:
        """Around all pieces of a request. Raises :class:`QueueFullError` where too many wait."""
        return self._room.place()

    async def run(self, piece: Callable[[], _T]) -> _T:
        """Its result, or its error."""
        return await self._thread.run(piece)
