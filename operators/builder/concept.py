"""The text of a concept and its tokens: an operator is read off the model's linear map at such a text."""

from __future__ import annotations

from dataclasses import dataclass

from operators.core.errors import ConceptError
from operators.core.header import MAX_CONCEPT
from operators.model.loading import LoadedModel
from operators.model.text_ids import text_ids


@dataclass(frozen=True)
class Concept:
    """A text and its n >= 1 token ids."""

    text: str
    ids: tuple[int, ...]


def check_text(text: str) -> str:
    """Returns the text, after the checks that need no tokenizer.

    Raises:
        ConceptError: the text is empty, not Unicode, or longer than MAX_CONCEPT characters.
    """
    if not text:
        raise ConceptError("concept '' has no tokens; at least one is needed")
    if len(text) > MAX_CONCEPT:
        raise ConceptError(
            f"concept has {len(text)} characters; at most {MAX_CONCEPT} are accepted (it begins {text[:40]!r})"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConceptError(f"concept {text!r} is not Unicode text (at character {error.start})") from error
    return text


def concept_from_text(text: str, loaded: LoadedModel) -> Concept:
    """Tokenises a concept as the model's own tokenizer does, special tokens in front included.

    Raises:
        ConceptError: the text is empty, not Unicode, or longer than the model's context; or the model has no embedding
            for a token of it.
    """
    check_text(text)
    if not loaded.tokenizer(text, verbose=False, add_special_tokens=False)["input_ids"]:
        raise ConceptError(f"concept {text!r} has no tokens; at least one is needed")
    ids = text_ids(loaded.tokenizer, text)
    known = loaded.model.get_input_embeddings().weight.shape[0]
    if max(ids) >= known:
        raise ConceptError(
            f"concept {text[:40]!r} has token {max(ids)} ({loaded.tokenizer.decode([max(ids)])!r}), which the "
            f"tokenizer knows and the model does not: it has {known} embeddings"
        )
    limit = min(loaded.context_length, MAX_CONCEPT)
    if len(ids) > limit:
        raise ConceptError(
            f"concept has {len(ids)} tokens; {loaded.name} takes at most {limit} (it begins {text[:40]!r})"
        )
    return Concept(text, ids)
