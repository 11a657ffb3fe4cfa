"""The texts of a sweep, one row each, and rows as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from steer_client._defaults import NORMAL
from steer_client._matching import repeats
from steer_client._positions import Positions
from steer_client._results import FinishReason, Generation, Receipt, SteeredWord


@dataclass(frozen=True, slots=True)
class SweepRow:
    """One text. Of a plain one, `operator` is "normal" and `strength` None."""

    prompt_id: str
    #: As people read it.
    prompt: str
    seed: int
    operator: str
    #: λ.
    strength: float | None
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    #: KL(plain ‖ steered) in nats, by token; empty for a plain text.
    kl_per_token: tuple[float, ...]
    #: Of the text, under the plain model. None where the server did not report it.
    perplexity: float | None
    receipts: tuple[Receipt, ...]
    #: Which of the sweep's words are in the text.
    found: tuple[str, ...] = ()

    @property
    def arm(self) -> str:
        """The name of operator and strength, "normal" of a plain text."""
        return NORMAL if self.strength is None else f"{self.operator}={self.strength:g}"

    @property
    def key(self) -> tuple[str, int, str, float | None]:
        """What tells it from the other rows of its sweep."""
        return self.prompt_id, self.seed, self.operator, self.strength

    @property
    def is_hit(self) -> bool:
        """It has one of the words."""
        return bool(self.found)

    @property
    def is_useful(self) -> bool:
        """It has one of the words, and no four tokens in a row come twice."""
        return self.is_hit and not repeats(self.token_ids)

    def to_dict(self) -> dict[str, Any]:
        """Every field as JSON has it."""
        return dataclasses.asdict(self) | {"finish_reason": str(self.finish_reason)}


def make_row(
    where: tuple[str, str, int, str, float | None],
    generation: Generation,
    kl_per_token: tuple[float, ...],
    perplexity: float | None,
) -> SweepRow:
    """`where`: prompt id, prompt, seed, operator and strength."""
    return SweepRow(
        *where,
        generation.text,
        generation.token_ids,
        generation.finish_reason,
        kl_per_token,
        perplexity,
        generation.receipts,
    )


def read_row(entry: Mapping[str, Any]) -> SweepRow:
    """A row that to_dict wrote. Raises KeyError, TypeError or ValueError for anything else."""
    values = dict(entry)
    for name in ("token_ids", "kl_per_token", "found"):
        values[name] = tuple(values[name])
    values["finish_reason"] = FinishReason(values["finish_reason"])
    values["receipts"] = tuple(_read_receipt(each) for each in values["receipts"])
    return SweepRow(**values)


def _read_receipt(entry: Mapping[str, Any]) -> Receipt:
    words = tuple(SteeredWord(**each | {"token_ids": tuple(each["token_ids"])}) for each in entry["words"])
    changes = {"positions": Positions(**entry["positions"]), "defaulted": tuple(entry["defaulted"]), "words": words}
    return Receipt(**{**entry, **changes})
