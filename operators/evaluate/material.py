"""What forms are made of: states, operators, lenses and vectors of one model at one layer, each computed once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import nn

from operators.builder.build import build_operator
from operators.builder.concept import concept_from_text
from operators.builder.spec import BuildSpec, resolve_layer
from operators.core.apply import PreparedOperator, prepare
from operators.core.errors import TrialError
from operators.core.neutral_texts import neutral_texts
from operators.core.positions import Positions
from operators.core.progress import Progress, silent
from operators.evaluate.directions import normalised
from operators.lens.word_pulls import WordPulls
from operators.maps.reads import read_direction
from operators.maps.sketch import embedding_root
from operators.model.loading import LoadedModel, decoder_layers, embed
from operators.model.words import normalised_word, word_ids

LENS_POSITIONS = ("first", "1..", "all", "..4")
_ROWS = 8192
"""Embeddings that are widened at a time."""
_SHORTEST_WORD = 3
_Value = TypeVar("_Value")


def default_layer(loaded: LoadedModel) -> int:
    """Seven tenths of the depth: block 21 of SmolLM2's 30, 13 of Gemma 3 270M's 18."""
    return max(1, round(0.7 * loaded.num_layers))


class Material:
    """Of a model at the input of block ``layer``; vectors are (d,) float32 on the model's device."""

    def __init__(
        self,
        loaded: LoadedModel,
        layer: int | None = None,
        *,
        progress: Progress = silent,
    ) -> None:
        """Raises :class:`BuildError` where there is no such layer."""
        self.loaded = loaded
        self.layer = resolve_layer(default_layer(loaded) if layer is None else layer, "residual", loaded)
        self._progress = progress
        self._imported: dict[str, tuple[torch.Tensor, str]] = {}
        self._known: dict[tuple[object, ...], Any] = {}
        self._lens: dict[tuple[str, str], torch.Tensor] = {}
        """By word and positions."""

    @property
    def device(self) -> torch.device:
        """Where the directions are."""
        return self.loaded.device

    @property
    def hidden_size(self) -> int:
        """d."""
        return self.loaded.hidden_size

    def mean_state(self, texts: Sequence[str]) -> torch.Tensor:
        """The mean over the texts of h^(s) at their last tokens."""
        return torch.stack([self._states(text)[-1] for text in texts]).mean(0)

    def mean_token_state(self, texts: Sequence[str]) -> torch.Tensor:
        """The mean over the texts of the mean of h^(s) over their tokens but the first."""
        return torch.stack([self._states(text)[1:].mean(0) for text in texts if len(self._states(text)) > 1]).mean(0)

    def contrast_anchor(self, texts: Sequence[str]) -> torch.Tensor:
        """y_c: the mean state of the texts minus that of the neutral ones."""
        return self.mean_state(texts) - self.mean_state(neutral_texts())

    def operator(self, texts: Sequence[str]) -> PreparedOperator:
        """The operator of the mean of the texts' maps, of the default rank."""

        def build() -> PreparedOperator:
            concepts = tuple(concept_from_text(text, self.loaded) for text in texts)
            spec = BuildSpec(concepts, layer=self.layer)
            root = self._once(("root",), lambda: embedding_root(self.loaded.model.get_input_embeddings().weight))
            return prepare(build_operator(spec, self.loaded, root=root), self.device)

        return self._once(("operator", tuple(texts)), build)

    def lens_vector(self, words: Sequence[str], where: str) -> torch.Tensor:
        """The mean over the words of the unit vectors of J̄ᵀ (W_U[w] - mean W_U), J̄ taken from positions ``where``."""

        missing = [word for word in dict.fromkeys(words) if (word, where) not in self._lens]
        if missing:
            pulls = self._once(
                ("pulls",),
                lambda: WordPulls(self.loaded, neutral_texts(), self.layer, progress=self._progress),
            )
            rows = torch.stack([self._unembedding(word) for word in missing]) - self._vocabulary_mean()
            pulled = pulls.pull(rows, [Positions.parse(one) for one in LENS_POSITIONS])
            for name, vectors in zip(LENS_POSITIONS, pulled, strict=True):
                self._lens.update(((word, name), vector) for word, vector in zip(missing, vectors, strict=True))
        return normalised(torch.stack([self._lens[word, where] for word in words])).mean(0)

    def read_words(self, texts: Sequence[str], count: int) -> tuple[str, ...]:
        """The words that the operator of ``texts`` reads most, by w . x with w = J_{n-1}ᵀ y_c/|y_c|; all lower case.

        Raises:
            TrialError: there are none among its best tokens.
        """
        operator = self.operator(texts)
        direction = read_direction(operator.factors, operator.basis, self.contrast_anchor(texts))
        table = self.loaded.model.get_input_embeddings().weight
        size = min(len(self.loaded.tokenizer), len(table))
        scores = torch.cat([embed(self.loaded.model, ids).float() @ direction.float() for ids in self._all_ids(size)])
        words: dict[str, None] = {}
        for index in scores.topk(min(64 * count, size)).indices.tolist():
            word = str(self.loaded.tokenizer.decode([index])).strip().lower()
            if len(word) >= _SHORTEST_WORD and word.isalpha():
                words[word] = None
            if len(words) == count:
                break
        if not words:
            raise TrialError(f"the operator of {texts[0]!r} reads no token that is a word")
        return tuple(words)

    def add_vectors(self, vectors: Mapping[str, tuple[torch.Tensor, str]]) -> None:
        """Vectors (d,) from elsewhere and the digests of their files, by the concept that they are about."""
        self._imported.update(vectors)

    def imported(self, concept: str) -> tuple[torch.Tensor, str] | None:
        """The vector (d,) that was given for a concept, and its file's digest."""
        found = self._imported.get(concept)
        return None if found is None else (found[0].to(self.device, torch.float32), found[1])

    def _states(self, text: str) -> torch.Tensor:
        """h^(s) (n, d) float32 of every token of a text."""

        def run() -> torch.Tensor:
            ids = torch.tensor([concept_from_text(text, self.loaded).ids], device=self.device)
            seen: list[torch.Tensor] = []

            def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                seen.append((args[0] if args else kwargs["hidden_states"]).float())

            block = decoder_layers(self.loaded.model)[self.layer]
            handle = block.register_forward_pre_hook(keep, with_kwargs=True)
            try:
                with torch.no_grad():
                    self.loaded.model.get_decoder()(input_ids=ids, use_cache=False)
            finally:
                handle.remove()
            return seen[0][0]

        return self._once(("states", text), run)

    def _unembedding(self, word: str) -> torch.Tensor:
        """W_U[w] (d,), by the word rule of :mod:`operators.model.words`. Raises :class:`VectorError`."""
        head = self.loaded.model.get_output_embeddings().weight
        ids = torch.tensor(word_ids(normalised_word(word), self.loaded.tokenizer), device=head.device)
        row: torch.Tensor = head[ids].float().mean(0)
        return row

    def _vocabulary_mean(self) -> torch.Tensor:
        head = self.loaded.model.get_output_embeddings().weight
        mean: torch.Tensor = self._once(("mean",), lambda: head.double().mean(0).float())
        return mean

    def _all_ids(self, size: int) -> tuple[torch.Tensor, ...]:
        return torch.split(torch.arange(size, device=self.device), _ROWS)

    def _once(self, key: tuple[object, ...], compute: Callable[[], _Value]) -> _Value:
        if key not in self._known:
            self._known[key] = compute()
        return cast("_Value", self._known[key])
