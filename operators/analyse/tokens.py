"""Vectors read as tokens: left singular vectors through the unembedding, right ones against the embedding table."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from operators.analyse.results import Token
from operators.maps.detach import Tape, family_of
from operators.model.loading import LoadedModel, final_norm

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_VISIBLE = {" ": "␣", "\n": "⏎", "\t": "⇥"}


class Readout:
    """The two tables of a model, and the texts of their rows.

    Rows that no token has (padding of the tables) are never read out.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        self._tokenizer = loaded.tokenizer
        head: torch.Tensor = loaded.model.get_output_embeddings().weight
        table: torch.Tensor = loaded.model.get_input_embeddings().weight
        size = min(len(loaded.tokenizer), len(table))
        self._head, self._table = head[:size], table[:size]
        self._wide = torch.promote_types(table.dtype, torch.float32)
        self._lengths = torch.linalg.vector_norm(self._table, dim=1, dtype=self._wide)

    def logits(self, vectors: torch.Tensor, *, normed: bool) -> torch.Tensor:
        """(k, V) for directions (k, d) of the final norm's output, or of the residual stream if not ``normed``."""
        if not normed:
            vectors = norm_direction(self._loaded.model, vectors)
        return (vectors.to(self._head) @ self._head.T).to(self._wide)

    def lens(self, streams: torch.Tensor) -> torch.Tensor:
        """(k, V): the logits that the head would give if the streams (k, d) were the last layer's (logit lens)."""
        with torch.no_grad():
            return self.logits(final_norm(self._loaded.model)(streams), normed=True)

    def similarities(self, vectors: torch.Tensor) -> torch.Tensor:
        """(k, V): cosine of the angle between directions (k, d) and each token's embedding; 0 for empty rows."""
        products = (vectors.to(self._table) @ self._table.T).to(self._wide)
        scale = self._lengths * torch.linalg.vector_norm(vectors.to(self._wide), dim=1)[:, None]
        return torch.where(scale > 0, products / scale.clamp_min(torch.finfo(scale.dtype).tiny), 0.0)

    def top(self, scores: torch.Tensor, count: int) -> list[tuple[Token, ...]]:
        """The ``count`` best tokens of each row of scores (k, V), best first."""
        best = scores.topk(min(count, scores.shape[1]), dim=1)
        rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [tuple(self.token(i, score) for i, score in zip(*row, strict=True)) for row in rows]

    def token(self, index: int, score: float = 0.0) -> Token:
        """One token, with its text."""
        return Token(index, self.text(index), float(f"{score:.4g}"))

    def text(self, index: int) -> str:
        """What the token writes; its vocabulary entry where it is part of a character."""
        text: str = self._tokenizer.decode([index])
        if "\N{REPLACEMENT CHARACTER}" in text:
            text = str(self._tokenizer.convert_ids_to_tokens(index))
        return text


def ranks(scores: torch.Tensor, index: int) -> list[int]:
    """How many tokens score better than ``index`` in each row of (k, V), plus one."""
    better: list[int] = (scores > scores[:, index : index + 1]).sum(1).add(1).tolist()
    return better


def norm_direction(model: PreTrainedModel, vectors: torch.Tensor) -> torch.Tensor:
    """What the final norm makes of directions (k, d), up to a positive scale: its linear part with 1 for 1/RMS."""
    norm = final_norm(model)
    rule = family_of(model).norms[type(norm)]
    unit = Tape("replay", {norm: torch.ones(1, 1, dtype=vectors.dtype, device=vectors.device)})
    with torch.no_grad():
        return rule(norm, vectors, unit) - rule(norm, torch.zeros_like(vectors), unit)


def visible(text: str) -> str:
    """``text`` on one line with its white space marked; what cannot be printed is escaped."""
    marked = "".join(_VISIBLE.get(c, c) for c in text)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in marked) or "∅"
