"""Where the vector of an operator of rank 0 comes from: a file, two sets of texts, other vectors, or words."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_WORD = 1024
"""Characters."""
MAX_LENS_WORD = 64
"""Characters of a word that a lens takes."""
MAX_WORD_TOKENS = 32
MAX_LENS_WORDS = 16
"""Words in one mixture."""
Fingerprint = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=1, lt=1 << 31)]
Word = Annotated[str, Field(max_length=MAX_WORD)]
STRICT = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
_Norm = Annotated[float, Field(gt=0.0)]


class ImportedVector(BaseModel):
    """A vector that another program made. Filled by :mod:`operators.vectors.imported`."""

    model_config = STRICT

    method: Literal["import"] = "import"
    norm: _Norm
    """|v|, as the file has it: what programs that add c v without regard to |h| multiply their coefficient c with."""
    file_format: Literal["gguf", "safetensors", "npz"]
    file_digest: Fingerprint
    tensor: Word
    """Its name in the file."""
    model_hint: Word | None = None
    """The kind of model that a GGUF file says it is for, such as "llama"; other formats have none."""


class TextFile(BaseModel):
    """A file of texts, one per line, without the texts. Filled by :mod:`operators.vectors.contrast`."""

    model_config = STRICT

    name: Word
    digest: Fingerprint
    texts: Count


class ContrastVector(BaseModel):
    """A difference of mean hidden states. Filled by :mod:`operators.vectors.contrast`."""

    model_config = STRICT

    method: Literal["contrast"] = "contrast"
    norm: _Norm
    positive: TextFile
    negative: TextFile


class VectorMixture(BaseModel):
    """A weighted sum of the unit vectors of ``members``. Filled by :mod:`operators.vectors.mixture`."""

    model_config = STRICT

    method: Literal["mixture"] = "mixture"
    norm: _Norm


class LensWord(BaseModel):
    """A word as a lens takes it. Filled by :mod:`operators.model.words`."""

    model_config = STRICT

    text: Annotated[str, Field(min_length=1, max_length=MAX_LENS_WORD)]
    weight: float
    """Signed; of the word's unit direction in the sum."""
    ids: Annotated[tuple[Annotated[int, Field(ge=0, lt=1 << 31)], ...], Field(min_length=1, max_length=MAX_WORD_TOKENS)]
    """The tokens whose rows of the unembedding are averaged."""


class WordVector(BaseModel):
    """What a lens makes of words. Filled by :mod:`operators.model.words`."""

    model_config = STRICT

    method: Literal["lens"] = "lens"
    norm: _Norm
    lens: Fingerprint
    """The digest of the lens."""
    words: tuple[LensWord, ...] = Field(min_length=1, max_length=MAX_LENS_WORDS)


VectorSource = Annotated[ImportedVector | ContrastVector | VectorMixture | WordVector, Field(discriminator="method")]
