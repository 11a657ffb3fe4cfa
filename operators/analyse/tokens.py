"""Directions read as tokens: outputs through the unembedding, inputs against the embedding table."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from operators.analyse.results import ScoredToken
from operators.maps.detach import Tape, family_of
from operators.model.loading import LoadedModel, embed, final_norm

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROWS = 8192
"""Embeddings that are widened at a time."""
_VISIBLE = {" ": "␣", "\n": "⏎", "\t": "⇥"}


class VocabularyProjection:
    """Projects vectors (k, d) on a model's vocabulary of V tokens, and names the best tokens.

    Rows of the tables that no token has (padding) are left out.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        self._tokenizer = loaded.tokenizer
        head: torch.Tensor = loaded.model.get_output_embeddings().weight
        table: torch.Tensor = loaded.model.get_input_embeddings().weight
        size = min(len(loaded.tokenizer), len(table))
        self._head, self._table = head[:size], table[:size]
        self._dtype = torch.promote_types(table.dtype, torch.float32)
        self._lengths = torch.linalg.vector_norm(self._table, dim=1, dtype=self._dtype)

    def logits(self, vectors: torch.Tensor, *, normed: bool) -> torch.Tensor:
        """Logits (k, V) of directions (k, d): of the final norm's output if ``normed``, else of the residual stream."""
        if not normed:
            vectors = norm_direction(self._loaded.model, vectors)
        return (vectors.to(self._head) @ self._head.T).to(self._dtype)

    def lens(self, streams: torch.Tensor) -> torch.Tensor:
        """Logit lens (k, V): what the head would give if the streams (k, d) were the last layer's."""
        with torch.no_grad():
            return self.logits(final_norm(self._loaded.model)(streams), normed=True)

    def similarities(self, vectors: torch.Tensor) -> torch.Tensor:
        """Cosines (k, V) of directions (k, d) and each token's embedding; 0 where one of them is zero."""
        products = (vectors.to(self._table) @ self._table.T).to(self._dtype)
        scale = self._lengths * torch.linalg.vector_norm(vectors.to(self._dtype), dim=1)[:, None]
        return torch.where(scale > 0, products / scale.clamp_min(torch.finfo(scale.dtype).tiny), 0.0)

    def readings(self, direction: torch.Tensor) -> torch.Tensor:
        """w . x (1, V) of a direction w (d,) and each token's embedding x as the first block receives it.

        Learned positions are left out: they add one constant to all.
        """
        wide = direction.to(self._table.device, self._dtype)
        ids = torch.arange(len(self._table), device=self._table.device)
        parts = [embed(self._loaded.model, part).to(self._dtype) @ wide for part in torch.split(ids, _ROWS)]
        return torch.cat(parts)[None]

    def both_ends(self, direction: torch.Tensor, count: int) -> tuple[tuple[ScoredToken, ...], tuple[ScoredToken, ...]]:
        """The ``count`` tokens of largest and of least w . x, for w (d,) (:meth:`readings`)."""
        scores = self.readings(direction)
        (most,), (least,) = self.top(scores, count), self.top(-scores, count)
        return most, tuple(ScoredToken(token.id, token.text, -token.score) for token in least)

    def top(self, scores: torch.Tensor, count: int) -> list[tuple[ScoredToken, ...]]:
        """The ``count`` best tokens of each row of scores (k, V), best first."""
        best = scores.topk(min(count, scores.shape[1]), dim=1)
        rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [tuple(self.token(i, score) for i, score in zip(*row, strict=True)) for row in rows]

    def token(self, index: int, score: float = 0.0) -> ScoredToken:
        """One token, with its text."""
        return ScoredToken(index, self.text(index), float(f"{score:.4g}"))

    def text(self, index: int) -> str:
        """The decoded token; its vocabulary entry where it is only part of a character."""
        text: str = self._tokenizer.decode([index])
        if "\N{REPLACEMENT CHARACTER}" in text:
            text = str(self._tokenizer.convert_ids_to_tokens(index))
        return text


def ranks(scores: torch.Tensor, index: int) -> list[int]:
    """The rank of token ``index`` in each row of scores (k, V): one more than the tokens that score better."""
    better: list[int] = (scores > scores[:, index : index + 1]).sum(1).add(1).tolist()
    return better


def norm_direction(model: PreTrainedModel, vectors: torch.Tensor) -> torch.Tensor:
    """The final norm's linear part applied to directions (k, d), with its frozen scale 1/RMS set to 1.

    The scale is positive, so that the ranking of tokens does not depend on it.
    """
    norm = final_norm(model)
    rule = family_of(model).forwards[type(norm)]
    unit_scale = Tape("replay", {norm: torch.ones(1, 1, dtype=vectors.dtype, device=vectors.device)})
    with torch.no_grad():
        return rule(norm, vectors, unit_scale) - rule(norm, torch.zeros_like(vectors), unit_scale)


def visible(text: str) -> str:
    """``text`` on one line with its white space marked; what cannot be printed is escaped."""
    marked = "".join(_VISIBLE.get(c, c) for c in text)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in marked) or "∅"
