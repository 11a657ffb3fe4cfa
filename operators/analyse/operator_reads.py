"""What a stored operator reads, in words: its read direction over the vocabulary, and what each concept token gives."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from operators.analyse.results import ScoredToken, rounded
from operators.analyse.tokens import VocabularyProjection, visible
from operators.builder.verify import check_compatible
from operators.core.artifact import OperatorArtifact
from operators.core.errors import AnalysisError
from operators.core.header import ConceptText
from operators.maps.reads import TermSize, concept_terms, read_direction, term_sizes
from operators.model.loading import LoadedModel, block_input, embed

_TOKENS = 12


@dataclass(frozen=True)
class TokenTerm:
    """One token of a text and the size of its term J_i x_i."""

    id: int
    text: str
    norm: float
    cosine: float
    share: float


@dataclass(frozen=True)
class OperatorReads:
    """Filled by :func:`read_operator`; the scores are w . x, in the units of the hidden state.

    ``towards``, ``against``: the tokens that, in the concept's last place, move the result most along the anchor and
    most away from it. ``texts``: each text's tokens in order, with the operator's own matrices.
    """

    towards: tuple[ScoredToken, ...]
    against: tuple[ScoredToken, ...]
    texts: tuple[tuple[TokenTerm, ...], ...]

    def to_json(self) -> dict[str, Any]:
        """As JSON shows it."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For a person."""
        return [
            "reads (w = J'y/|y| of the last position, over the vocabulary):",
            f"  towards the concept:  {_scored(self.towards)}",
            f"  away from it:         {_scored(self.against)}",
            "what each token gives, J x: norm, cosine with the anchor y, share of y:",
            *(line for number, text in enumerate(self.texts, start=1) for line in self._text_lines(number, text)),
        ]

    def _text_lines(self, number: int, text: tuple[TokenTerm, ...]) -> list[str]:
        heading = [f"  text {number}"] if len(self.texts) > 1 else []
        width = max(len(visible(term.text)) for term in text)
        return heading + [
            f"    {visible(term.text):{width}}  {term.norm:8.3g}  {term.cosine:6.2f}  {term.share:7.1%}"
            for term in text
        ]


def read_operator(artifact: OperatorArtifact, loaded: LoadedModel) -> OperatorReads:
    """What ``artifact`` reads on its own model; its mathematics is :mod:`operators.maps.reads`.

    Raises:
        IncompatibleOperatorError: the model is not the one that the operator was built on.
        AnalysisError: the anchor is zero.
    """
    check_compatible(artifact.header, loaded)
    factors, basis, y = artifact.factors, artifact.basis, artifact.anchor
    if not bool(y.any()):
        raise AnalysisError("the operator's anchor is zero; it reads nothing")
    vocabulary = VocabularyProjection(loaded)
    towards, against = vocabulary.both_ends(read_direction(factors, basis, y), _TOKENS)
    return OperatorReads(
        towards=towards,
        against=against,
        texts=tuple(_text_terms(artifact, text, loaded, vocabulary) for text in artifact.header.texts),
    )


def _text_terms(
    artifact: OperatorArtifact, text: ConceptText, loaded: LoadedModel, vocabulary: VocabularyProjection
) -> tuple[TokenTerm, ...]:
    x = block_input(loaded.model, embed(loaded.model, torch.tensor(text.ids, device=loaded.device))).cpu()
    sizes = term_sizes(concept_terms(artifact.factors, artifact.basis, x), artifact.anchor)
    return tuple(_token_term(token, size, vocabulary) for token, size in zip(text.ids, sizes, strict=True))


def _token_term(token: int, size: TermSize, vocabulary: VocabularyProjection) -> TokenTerm:
    return TokenTerm(token, vocabulary.text(token), rounded(size.norm), rounded(size.cosine), rounded(size.share))


def _scored(tokens: tuple[ScoredToken, ...]) -> str:
    return "  ".join(f"{visible(token.text)} {token.score:.3g}" for token in tokens)
