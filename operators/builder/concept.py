"""The text of a concept and its tokens: an operator is read off the model's linear map at such a text."""

from __future__ import annotations

from dataclasses import dataclass

from operators.core.errors import ConceptError
from operators.core.header import MAX_CONCEPT
from operators.model.loading import LoadedModel


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
    if not text.strip():
        raise ConceptError(f"concept {text[:40]!r} has no tokens; at least one is needed")
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
    """Tokenises a concept as the model's own tokenizer does, special tokens included.

    Raises:
        ConceptError: the text is empty, not Unicode, or longer than the model's context; the model has no embedding
            for a token of it; or the tokenizer puts a token of its own behind it.
    """
    check_text(text)
    # Not verbose: the tokenizer would log a warning about a long text, which the error below reports.
    ids = tuple(int(token) for token in loaded.tokenizer(text, verbose=False)["input_ids"])
    if not ids:
        raise ConceptError(f"concept {text!r} has no tokens; at least one is needed")
    _check_end(text, ids, loaded)
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


def _check_end(text: str, ids: tuple[int, ...], loaded: LoadedModel) -> None:
    """Refuses a token that the tokenizer puts behind every text: the map's target would be that, and not a word."""
    plain = tuple(loaded.tokenizer(text, verbose=False, add_special_tokens=False)["input_ids"])
    if plain and ids[-len(plain) :] != plain:
        appended = loaded.tokenizer.decode([ids[-1]])
        raise ConceptError(
            f"the tokenizer of {loaded.name} puts {appended!r} behind every text: the last position of {text[:40]!r} "
            "would be that token and not a word. A tokenizer that ends with the text is accepted "
            "(in tokenizer_config.json, often add_eos_token: false)"
        )
