"""A concept: the text whose linear map becomes an operator."""

from __future__ import annotations

from dataclasses import dataclass

from operators.errors import ConceptError
from operators.models import LoadedModel


@dataclass(frozen=True)
class Concept:
    """A text and its n >= 1 token ids."""

    text: str
    ids: tuple[int, ...]


def concept_from_text(text: str, loaded: LoadedModel) -> Concept:
    """Tokenises a concept as the model's own tokenizer does, special tokens included.

    Raises:
        ConceptError: the text is empty, or longer than the model's context.
    """
    if not text.strip():
        raise ConceptError(f"concept {text!r} has no tokens; at least one is needed")
    ids = tuple(int(token) for token in loaded.tokenizer(text)["input_ids"])
    if not ids:
        raise ConceptError(f"concept {text!r} has no tokens; at least one is needed")
    if len(ids) > loaded.context_length:
        raise ConceptError(f"concept has {len(ids)} tokens; {loaded.name} takes at most {loaded.context_length}")
    return Concept(text, ids)
