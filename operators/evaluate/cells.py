"""Cells of an evaluation: the texts of one arm at one strength on one list of prompts, written in full batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from operators.evaluate.arms import Arm, prefixed_text
from operators.evaluate.batch import TextJob
from operators.evaluate.concepts import EvalConcept
from operators.evaluate.protocol import Budget, Protocol, Regime
from operators.evaluate.sampling import uniforms
from operators.evaluate.writing import Written, write_texts
from operators.model.loading import LoadedModel
from operators.model.text_ids import text_ids

PromptList = Literal["development", "held-out"]


class OutOfTimeError(Exception):
    """The time that was given is over; what was done is in the journal."""


@dataclass(frozen=True, eq=False)
class Cell:
    """``strength`` is positive; the regime has the sign. ``budget`` None: of an arm without a push."""

    arm: Arm
    regime: Regime
    strength: float
    budget: Budget | None = None

    @property
    def prefixed(self) -> bool:
        """Whether its texts continue the concept's first text and the prompt."""
        return self.arm.prefixed or self.regime.sign == -1


class CellWriter:
    """Writes cells on one model at one layer."""

    def __init__(
        self,
        loaded: LoadedModel,
        layer: int,
        protocol: Protocol,
        concepts: Sequence[EvalConcept],
        *,
        rows: int,
        deadline: float | None,
    ) -> None:
        """``rows``: texts per batch. ``deadline``: of ``time.monotonic``; no batch that would end later begins."""
        self._loaded, self._layer, self._protocol = loaded, layer, protocol
        self._rows, self._deadline = rows, deadline
        self._longest_batch = 0.0
        texts: dict[PromptList, tuple[str, ...]] = {
            "development": protocol.development,
            "held-out": protocol.held_out,
        }
        self._prompts = {
            (which, None if concept is None else concept.name): self._tokenised(prompts, concept)
            for which, prompts in texts.items()
            for concept in (None, *concepts)
        }

    def write(
        self,
        cells: Sequence[Cell],
        which: PromptList,
        tokens: int,
        *,
        add: Callable[[Cell, Written], None],
        on_batch: Callable[[int], None],
    ) -> None:
        """Writes the texts of all cells; ``add`` is called for each that is whole, ``on_batch`` with the texts so far.

        Raises:
            OutOfTimeError: the deadline is near. Cells that are not whole are lost.
            OperatorError: a push moves nothing, or a prompt is too short or too long.
        """
        done = 0
        for sampling in dict.fromkeys(cell.regime.sampling for cell in cells):
            # Prompts of like length together: less padding.
            chosen = sorted((cell for cell in cells if cell.regime.sampling == sampling), key=lambda one: one.prefixed)
            size = len(self._prompts[which, None])
            noise = uniforms(size, tokens, self._protocol.seed)
            waiting, rest = iter(chosen), None
            for jobs in _batches((job for cell in chosen for job in self._jobs(cell, which)), self._rows):
                start = time.monotonic()
                if self._deadline is not None and start + self._longest_batch > self._deadline:
                    raise OutOfTimeError
                written = write_texts(jobs, self._loaded, self._layer, sampling, noise, tokens=tokens)
                rest = written if rest is None else _joined(rest, written)
                while len(rest.ids) >= size:
                    add(next(waiting), _rows_of(rest, slice(0, size)))
                    rest = _rows_of(rest, slice(size, None))
                self._longest_batch = max(self._longest_batch, time.monotonic() - start)
                done += len(jobs)
                on_batch(done)

    def _jobs(self, cell: Cell, which: PromptList) -> Iterator[TextJob]:
        bare = self._prompts[which, None]
        prompts = bare
        if cell.prefixed:
            assert cell.arm.subject is not None  # noqa: S101 - for the type checker: arms that all share are bare
            prompts = self._prompts[which, cell.arm.subject.name]
        scored = bare if cell.arm.scored_bare else prompts
        strength = cell.regime.sign * cell.strength
        for number, (prompt, other) in enumerate(zip(prompts, scored, strict=True)):
            yield TextJob(prompt, number, cell.arm.push, strength, None if other is prompt else other)

    def _tokenised(self, prompts: Sequence[str], concept: EvalConcept | None) -> list[tuple[int, ...]]:
        texts = prompts if concept is None else [prefixed_text(concept, prompt) for prompt in prompts]
        return [text_ids(self._loaded.tokenizer, text) for text in texts]


def _batches(jobs: Iterable[TextJob], size: int) -> Iterator[list[TextJob]]:
    batch: list[TextJob] = []
    for job in jobs:
        batch.append(job)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _joined(first: Written, second: Written) -> Written:
    names = ("ids", "lengths", "kl", "logprobs")
    return Written(*(np.concatenate([getattr(first, name), getattr(second, name)]) for name in names))


def _rows_of(written: Written, at: slice) -> Written:
    return Written(written.ids[at], written.lengths[at], written.kl[at], written.logprobs[at])
