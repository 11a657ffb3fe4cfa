"""The mean of neutral hidden states, against which what a concept adds is measured.

    m = (1/N) sum_t y_t        y_t the target (:func:`~operators.maps.replay.target_hidden_state`) at the last token of
                               the neutral text t, by the same profile and at the same layer as the concept's y

y - m is the contrast anchor. Of a mixture, whose y is a weighted sum of its texts', m is multiplied by the sum of the
weights, so that y - m is the weighted sum of the texts' contrast anchors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from weakref import WeakKeyDictionary

import torch

from operators.builder.concept import Concept, concept_from_text
from operators.core.errors import ArtifactError, BuildError, ConceptError
from operators.core.file_format import open_regular
from operators.core.header import MAX_CONCEPT, MAX_NEUTRAL_TEXTS, NeutralTexts, Profile
from operators.core.neutral_texts import neutral_texts
from operators.maps.replay import target_hidden_state
from operators.maps.sweeps import PLAIN_POSITIONS
from operators.model.loading import LoadedModel, embed
from operators.model.rope import rope_changes

_MAX_FILE_BYTES = 1 << 20
_TEXTS_AT_ONCE = 16
_VANISHED = 1e-4
"""The contrast anchor has no direction where |y - m| is below this share of |y|: it is made of rounding errors."""
_kept: WeakKeyDictionary[LoadedModel, dict[tuple[object, ...], torch.Tensor]] = WeakKeyDictionary()


def read_neutral_texts(path: Path) -> tuple[str, ...]:
    """The texts of a file, one per line; what begins with # is a remark.

    Raises:
        BuildError: there is no text, or there are too many, or the file cannot be read, is no UTF-8 or too large.
    """
    try:
        with open_regular(path, _MAX_FILE_BYTES) as (file, num_bytes):
            lines = file.read(num_bytes).decode().splitlines()
    except ArtifactError as error:
        raise BuildError(f"neutral texts: {error}") from error
    except UnicodeDecodeError as error:
        raise BuildError(f"neutral texts: {path.name}: not UTF-8 text (at byte {error.start})") from error
    texts = tuple(line for line in lines if line.strip() and not line.startswith("#"))
    if not 1 <= len(texts) <= MAX_NEUTRAL_TEXTS:
        raise BuildError(
            f"neutral texts: {path.name} has {len(texts)}, one per line; 1 to {MAX_NEUTRAL_TEXTS} are accepted"
        )
    return texts


def tokenise_neutral(loaded: LoadedModel, texts: Sequence[str] | None = None) -> NeutralTexts:
    """What a header says of neutral texts; None means those that ship with the package.

    Raises:
        BuildError: the model's tokenizer refuses a text, or they have too many tokens.
    """
    texts = neutral_texts() if texts is None else texts
    try:
        ids = tuple(concept_from_text(text, loaded).ids for text in texts)
    except ConceptError as error:
        raise BuildError(f"neutral texts: {error}") from error
    if (total := sum(map(len, ids))) > MAX_CONCEPT:
        raise BuildError(f"neutral texts: they have {total} tokens; at most {MAX_CONCEPT} are accepted")
    digest = hashlib.sha256("".join(f"{text}\n" for text in texts).encode()).hexdigest()
    return NeutralTexts(digest=f"sha256:{digest}", ids=ids)


def is_shipped(neutral: NeutralTexts) -> bool:
    """Whether these are the texts that ship with the package."""
    shipped = hashlib.sha256("".join(f"{text}\n" for text in neutral_texts()).encode()).hexdigest()
    return neutral.digest == f"sha256:{shipped}"


def compute_neutral_mean(neutral: NeutralTexts, loaded: LoadedModel, *, layer: int, profile: Profile) -> torch.Tensor:
    """m (d,) float64 on the model's device."""
    total = torch.zeros(loaded.hidden_size, dtype=torch.float64, device=loaded.device)
    # Factors that depend on the length of a text are those of the longest of texts side by side.
    padded = not rope_changes(loaded.model.config.get_text_config())
    for texts in _side_by_side(neutral.ids, padded=padded):
        total += _last_targets(texts, loaded, layer, profile).sum(0)
    return total / len(neutral.ids)


def _side_by_side(texts: Sequence[tuple[int, ...]], *, padded: bool) -> list[list[tuple[int, ...]]]:
    """The texts in groups that go through the model together, of one length each unless ``padded``."""
    groups: list[list[tuple[int, ...]]] = []
    for ids in sorted(texts, key=len):
        last = groups[-1] if groups else []
        fits = len(last) < _TEXTS_AT_ONCE and len(ids) * (len(last) + 1) <= PLAIN_POSITIONS
        if last and fits and (padded or len(ids) == len(last[0])):
            last.append(ids)
        else:
            groups.append([ids])
    return groups


def neutral_mean(neutral: NeutralTexts, loaded: LoadedModel, *, layer: int, profile: Profile) -> torch.Tensor:
    """:func:`compute_neutral_mean`, once for each layer of a model: every operator of a file needs it.

    For a model whose weights stay as they are; a check of a model computes it anew.
    """
    kept = _kept.setdefault(loaded, {})
    key = (neutral.ids, layer, profile)
    if key not in kept:
        kept[key] = compute_neutral_mean(neutral, loaded, layer=layer, profile=profile)
    return kept[key]


def last_target(ids: Sequence[int], loaded: LoadedModel, *, layer: int, profile: Profile) -> torch.Tensor:
    """y (d,) float64 of one text."""
    return _last_targets([ids], loaded, layer, profile)[0]


def _last_targets(texts: Sequence[Sequence[int]], loaded: LoadedModel, layer: int, profile: Profile) -> torch.Tensor:
    """y (texts, d) float64. Shorter texts are padded at their end, which no token before it sees."""
    lengths = [len(ids) for ids in texts]
    padded = [(*ids, *[ids[-1]] * (max(lengths) - len(ids))) for ids in texts]
    # Not by output_hidden_states: what transformers captures them with stays on the model's modules.
    embeddings = embed(loaded.model, torch.tensor(padded, device=loaded.device))
    with torch.inference_mode():
        targets = target_hidden_state(loaded.model, embeddings, layer=layer, profile=profile, lengths=lengths).double()
    return targets.clone()


def check_contrast_anchor(y: torch.Tensor, neutral: torch.Tensor, texts: Sequence[Concept]) -> None:
    """Raises :class:`BuildError` where y - m (d,) has no direction, because the texts of the concept are neutral."""
    left = float(torch.linalg.vector_norm(y.double() - neutral.double()))
    if not left > _VANISHED * float(torch.linalg.vector_norm(y.double())):
        raise BuildError(
            f"the hidden state of {texts[0].text!r} is the mean of the neutral texts (they differ by {left:.1e}): "
            "there is no contrast between them; other texts, of the concept or --neutral, are accepted"
        )
