"""Loading the tokenizer that is beside a model, or saying what is missing there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from operators.core.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
"""Files that most tokenizers have their tokens in, one of them; a kind of its own may have another."""


def load_tokenizer(name: str, source: str, revision: str, directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of model ``name``.

    Args:
        source, revision: where transformers gets it.
        directory: where its files are then.

    Raises:
        ModelError: there is none, or it cannot be read; says where, what is missing and what is accepted.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source, revision=revision, trust_remote_code=False
        )
    except Exception as error:
        # Of any class, for files that are missing or damaged.
        if not _found(directory, _VOCABULARIES):
            raise _missing(name, directory) from error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"model {name!r} cannot be loaded: the tokenizer in {directory} cannot be read: {reason}"
        ) from error
    # By its class alone, transformers makes a tokenizer without tokens.
    if not _found(directory, {*_VOCABULARIES, *tokenizer.vocab_files_names.values()}):
        raise _missing(name, directory)
    return tokenizer


def _found(directory: Path, names: set[str] | tuple[str, ...]) -> bool:
    return any((directory / name).is_file() for name in names)


def _missing(name: str, directory: Path) -> ModelError:
    return ModelError(
        f"model {name!r} cannot be loaded: {directory} has no tokenizer; its files are needed beside the weights: "
        f"tokenizer.json, or one of {', '.join(_VOCABULARIES[1:])} with what belongs to it"
    )
