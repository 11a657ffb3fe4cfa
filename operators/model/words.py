"""Words -> operator: what a lens makes of words that somebody typed.

    v_w = J^T (W_U[w] - mean of W_U)            the lens's matrix J^T and mean, the model's unembedding W_U
    v   = sum_w weight_w v_w/|v_w|              in float64, weights over the largest of them, then rounded to float32

The result is a vector (an operator of rank 0), so that everything that takes operators takes it. It depends on the
lens, the words, their weights and the model's files only: its digest is the same on every engine.

The word rule, W_U[w]. A word is stripped of white space around it, and put into Unicode's composed form (NFC). Its
*variants* are the word as typed, in lower case, with its first letter in upper case, and each of these with a space in
front. A variant counts where the tokenizer makes one token of it, beside tokens that are nothing but white space; then
W_U[w] is the mean over the distinct tokens of all variants that count. Where none counts ("hot air balloon"), it is the
mean over the distinct tokens of the word as typed, with a space in front, white space left out. Special tokens and the
tokenizer's token for what it does not know are never taken.
"""

from __future__ import annotations

import math
import unicodedata
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch

from operators.core.artifact import Lens, OperatorArtifact, make_vector
from operators.core.errors import IncompatibleOperatorError, VectorError
from operators.core.header import OperatorHeader
from operators.core.vector_source import MAX_LENS_WORD, MAX_LENS_WORDS, MAX_WORD_TOKENS, LensWord, WordVector

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_Key = TypeVar("_Key", bound=Hashable)
_Value = TypeVar("_Value")
_CANCELS = 1e-3
"""Of the sum of the weights' sizes: a shorter sum of directions is rounding and not a direction."""
_LOST = 1e-6
"""Of the largest weight: a smaller one leaves next to nothing in the float32 numbers of the sum."""

_ROWS_AT_A_TIME = 64


class UnembeddingRows(Protocol):
    """Rows of W_U by token id: :class:`operators.model.unembedding.Unembedding`, or that of a loaded model."""

    @property
    def vocabulary(self) -> int:
        """Number of rows."""
        ...

    @property
    def hidden_size(self) -> int:
        """d."""
        ...

    def rows(self, ids: Sequence[int]) -> torch.Tensor:
        """(len(ids), d) float32 on the CPU."""
        ...


def word_operator(
    lens: OperatorArtifact,
    words: Mapping[str, float],
    unembedding: UnembeddingRows,
    tokenizer: PreTrainedTokenizerBase,
) -> OperatorArtifact:
    """The vector that steers towards ``words``, word -> weight; negative weights push away from theirs.

    Raises:
        VectorError: it is no lens; there are no words or too many; a word is empty, too long, twice there or without
            tokens; a weight is 0, not finite or lost beside another; or the words' directions cancel.
        IncompatibleOperatorError: the unembedding has another size than the lens was built with.
        ModelError: the unembedding cannot be read.
    """
    return LensWords(unembedding, tokenizer).operator(lens, words)


class LensWords:
    """:func:`word_operator` for one model, again and again: what single words come to is kept, and mixed anew."""

    def __init__(
        self, unembedding: UnembeddingRows, tokenizer: PreTrainedTokenizerBase, *, max_kept: int = 1024
    ) -> None:
        """``max_kept``: words, each with d numbers in float64."""
        self._unembedding, self._tokenizer, self._max_kept = unembedding, tokenizer, max_kept
        self._ids: OrderedDict[str, tuple[int, ...]] = OrderedDict()
        self._units: OrderedDict[tuple[str, tuple[int, ...]], torch.Tensor] = OrderedDict()
        """(d,) float64, by the lens's digest and the tokens of the word."""

    def operator(self, lens: OperatorArtifact, words: Mapping[str, float]) -> OperatorArtifact:
        """Raises as :func:`word_operator` does."""
        return _mixture(lens, self.check(words), self._unembedding, self._unit)

    def check(self, words: Mapping[str, float]) -> tuple[LensWord, ...]:
        """The words and their tokens, before any direction is worked out. Raises :class:`VectorError`."""
        found = lens_words(words, self._find_ids)
        _shares(found)
        return found

    def learn(self, lens: OperatorArtifact, word: str) -> None:
        """Works out the direction of one word, and keeps it. Raises as :func:`word_operator` does."""
        [found] = lens_words({word: 1.0}, self._find_ids)
        self._unit(_lens_of(lens, self._unembedding), lens.digest, found)

    def _find_ids(self, text: str) -> tuple[int, ...]:
        return self._kept(self._ids, text, lambda: word_ids(text, self._tokenizer))

    def _unit(self, lens: Lens, digest: str, word: LensWord) -> torch.Tensor:
        def make() -> torch.Tensor:
            return _unit(word_direction(lens, self._unembedding.rows(word.ids)), word)

        return self._kept(self._units, (digest, word.ids), make)

    def _kept(self, kept: OrderedDict[_Key, _Value], key: _Key, make: Callable[[], _Value]) -> _Value:
        if key not in kept:
            kept[key] = make()
            if len(kept) > self._max_kept:
                kept.popitem(last=False)
        kept.move_to_end(key)
        return kept[key]


def lens_words(words: Mapping[str, float], find_ids: Callable[[str], tuple[int, ...]]) -> tuple[LensWord, ...]:
    """The words with the tokens that stand for them, in the order given. Raises :class:`VectorError`.

    ``find_ids``: :func:`word_ids` with the model's tokenizer.
    """
    if not 1 <= len(words) <= MAX_LENS_WORDS:
        raise VectorError(f"{len(words)} words; 1 to {MAX_LENS_WORDS} are accepted")
    found: dict[str, LensWord] = {}
    for word, weight in words.items():
        text = normalised_word(word)
        if text in found:
            raise VectorError(f"word {text!r} is there twice")
        if not math.isfinite(weight) or weight == 0.0:
            raise VectorError(f"word {text!r} has the weight {weight:g}; a finite number other than 0 is accepted")
        found[text] = LensWord(text=text, weight=weight, ids=find_ids(text))
    return tuple(found.values())


def normalised_word(word: str) -> str:
    """A word without white space around it, in Unicode's composed form.

    Raises:
        VectorError: nothing is left, it is too long, or no Unicode text.
    """
    # Before anything is done with it: what a client sends has any length.
    if len(word) > MAX_LENS_WORD:
        raise VectorError(f"word {word[:24]!r}… has {len(word)} characters; 1 to {MAX_LENS_WORD} are accepted")
    text = unicodedata.normalize("NFC", word).strip()
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise VectorError(f"word {word!r} is not Unicode text (at character {error.start})") from error
    if not 1 <= len(text) <= MAX_LENS_WORD:
        raise VectorError(f"word {word!r} has {len(text)} characters; 1 to {MAX_LENS_WORD} are accepted")
    if not any(character.isprintable() and not character.isspace() for character in text):
        raise VectorError(f"word {word!r} has no visible character")
    return text


def first_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens with which a text goes on that goes on with this word, in the order of their ids.

    Those of its variants that count; where none does, the first one of the word as typed, with a space in front.
    Raises :class:`VectorError`: it has no tokens but special and unknown ones.
    """
    ids = _single_ids(text, tokenizer) or _proper_ids(f" {text}", tokenizer)[:1]
    if not ids:
        raise VectorError(f"word {text!r} has no tokens of the model, or only special or unknown ones")
    return tuple(sorted(set(ids)))


def word_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that stand for a word, in the order of their ids; :mod:`operators.model.words` has the rule.

    Raises:
        VectorError: it has no tokens but special and unknown ones, or too many.
    """
    ids = sorted(set(_single_ids(text, tokenizer) or _proper_ids(f" {text}", tokenizer)))
    if not ids:
        raise VectorError(f"word {text!r} has no tokens of the model, or only special or unknown ones")
    if len(ids) > MAX_WORD_TOKENS:
        raise VectorError(f"word {text!r} has {len(ids)} tokens; at most {MAX_WORD_TOKENS} are accepted")
    return tuple(ids)


def _single_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of the variants that count."""
    cased = dict.fromkeys((text, text.lower(), text[:1].upper() + text[1:]))
    return [
        ids[0]
        for variant in cased
        for spaced in (variant, f" {variant}")
        if len(ids := _proper_ids(spaced, tokenizer)) == 1
    ]


def _proper_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of ``text``, without white space; none where one of them is special or unknown."""
    ids = [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    improper = {*tokenizer.all_special_ids, tokenizer.unk_token_id}
    if any(token in improper for token in ids):
        return []
    return [token for token in ids if str(tokenizer.decode([token])).strip()]


def _mixture(
    lens: OperatorArtifact,
    words: Sequence[LensWord],
    unembedding: UnembeddingRows,
    unit_of: Callable[[Lens, str, LensWord], torch.Tensor],
) -> OperatorArtifact:
    """The vector of words whose tokens are known. Raises as :func:`word_operator` does."""
    matrix, shares = _lens_of(lens, unembedding), _shares(words)
    parts = [share * unit_of(matrix, lens.digest, word) for word, share in zip(words, shares, strict=True)]
    total = torch.stack(parts).sum(0)
    if float(torch.linalg.vector_norm(total)) < _CANCELS * sum(map(abs, shares)):
        raise VectorError(f"the directions of {', '.join(repr(word.text) for word in words)} cancel")
    vector = total.to(torch.float32)
    norm = float(torch.linalg.vector_norm(vector.double()))
    if not 0.0 < norm < float("inf"):
        raise VectorError(f"the sum of the words has norm {norm:g} in float32; a positive, finite one is needed")
    return make_vector(_header(lens, WordVector(norm=norm, lens=lens.digest, words=tuple(words))), vector)


def _lens_of(lens: OperatorArtifact, unembedding: UnembeddingRows) -> Lens:
    """The matrix and the mean of a lens that belongs to this unembedding."""
    if lens.lens is None or lens.header.lens is None:
        raise VectorError("words are for a lens; this operator is none")
    expected = (lens.header.lens.vocabulary, lens.header.hidden_size)
    found = (unembedding.vocabulary, unembedding.hidden_size)
    if found != expected:
        raise IncompatibleOperatorError(
            f"the model's unembedding has the shape {found}; the lens was built with {expected}"
        )
    return lens.lens


def word_direction(lens: Lens, rows: torch.Tensor) -> torch.Tensor:
    """v_w = J^T (mean of ``rows`` - mean of W_U), (d,) float64, for the rows (m, d) of a word's tokens."""
    wanted = rows.double().mean(0) - lens.vocabulary_mean.double()
    # Some rows at a time: they stay in the processor's cache, and no copy of the whole matrix is made.
    return torch.cat([(part.double() * wanted).sum(1) for part in torch.split(lens.pull, _ROWS_AT_A_TIME)])


def _shares(words: Sequence[LensWord]) -> list[float]:
    """The weights over the size of the largest: only the direction counts, and float32 does not hold every size."""
    largest = max(abs(word.weight) for word in words)
    shares = [word.weight / largest for word in words]
    for word, share in zip(words, shares, strict=True):
        if abs(share) < _LOST:
            raise VectorError(
                f"word {word.text!r} has the weight {word.weight:g}, which is lost beside {largest:g}; at least "
                f"{_LOST:g} of the largest is accepted"
            )
    return shares


def _unit(direction: torch.Tensor, word: LensWord) -> torch.Tensor:
    norm = float(torch.linalg.vector_norm(direction))
    if not 0.0 < norm < float("inf"):
        raise VectorError(f"word {word.text!r} has a direction of norm {norm:g}; a positive, finite one is needed")
    return direction / norm


def _header(lens: OperatorArtifact, source: WordVector) -> OperatorHeader:
    """The header of a word's vector; everything in it comes from the lens or the words, the time included."""
    about = " ".join(f"{word.text}={word.weight:g}" if word.weight != 1.0 else word.text for word in source.words)
    return OperatorHeader(
        **{**dict(lens.header), "concept": about, "vector": source, "lens": None, "rule_set": "", "dtype": "float32"}
    )
