"""What a build of a lens takes: told where nothing is to be done yet."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from operators.core.lens_source import LensPositions

if TYPE_CHECKING:
    from operators.core.store import Store
    from operators.lens.partial import PartialSums
    from operators.lens.search import SearchPlan
    from operators.model.loading import LoadedModel


@dataclass(frozen=True, eq=False)
class LensTask:
    """One lens to build. Filled by the ``lens`` command."""

    name: str
    store: Store
    loaded: LoadedModel
    texts: Sequence[str]
    layers: Sequence[int]
    positions: Sequence[LensPositions]
    plan: SearchPlan
    partial: PartialSums

    def planned(self) -> dict[str, Any]:
        """For JSON. Measures a few rows and a few tokens, for the seconds."""
        candidates = len(self.layers) * len(self.positions)
        kept = (self.partial.load() or (0,))[0]
        most = self.plan.most_texts(candidates)
        of_matrices = self._seconds_of_matrices(kept)
        of_search = self._seconds_of_search(candidates, most)
        return {
            "name": self.name,
            "model": self.loaded.name,
            "texts": len(self.texts),
            "layers": list(self.layers),
            "positions": list(self.positions),
            "rows": len(self.texts) * self.loaded.hidden_size,
            "kept_texts": kept,
            "candidates": candidates,
            "texts_decoded_at_most": most,
            "seconds_of_matrices": round(of_matrices, 1),
            "seconds_of_search": round(of_search, 1),
            "seconds": round(of_matrices + of_search, 1),
        }

    def planned_lines(self, planned: Mapping[str, Any]) -> list[str]:
        """For a person."""
        kept = f", {planned['kept_texts']} texts of which are kept from an earlier run" if planned["kept_texts"] else ""
        return [
            f"matrices: {planned['texts']} neutral texts, {planned['rows']} rows by backward passes through the blocks "
            f"from {min(self.layers)} on{kept}: about {planned['seconds_of_matrices']:.0f} s here",
            f"search: {', '.join(self.positions)} positions at layers {', '.join(map(str, self.layers))}; at most "
            f"{planned['texts_decoded_at_most']} texts of up to {self.plan.finals.tokens} tokens: about "
            f"{planned['seconds_of_search']:.0f} s here",
            f"about {planned['seconds']:.0f} s in all. Nothing was changed.",
        ]

    def _seconds_of_matrices(self, kept: int) -> float:
        """As many passes as are left, at what one takes for the first text, and the pass that freezes each."""
        import torch

        from operators.lens.matrices import encode_texts
        from operators.lens.pulls import VECTORS_PER_PASS, text_pulls

        texts = encode_texts(self.texts, self.loaded)
        rows = torch.eye(min(2 * VECTORS_PER_PASS, self.loaded.hidden_size), self.loaded.hidden_size)
        times = []
        # The first pass of all loads what the others find loaded.
        for count in (1, 1, len(rows)):
            start = time.monotonic()
            text_pulls(self.loaded.model, texts[0], self.layers, cotangents=rows[:count])
            times.append(time.monotonic() - start)
        *_, freezing, whole = times
        tokens = sum(map(len, texts[kept:])) / len(texts[0])
        per_row = max(whole - freezing, 0.0) / max(len(rows) - 1, 1)
        return tokens * (freezing + per_row * self.loaded.hidden_size)

    def _seconds_of_search(self, candidates: int, most: int) -> float:
        """At most ``most`` texts, each with a reference row beside it."""
        from operators.core.measured import Sampling
        from operators.tune.pace import seconds_per_row_token

        scouts, finals = self.plan.scouts, self.plan.finals
        scouted = scouts.texts * self.plan.scout_rounds * candidates if candidates > 1 else 0
        tokens = scouted * scouts.tokens + (most - scouted) * finals.tokens
        return 2 * tokens * seconds_per_row_token(self.loaded, finals.prompts, Sampling(repetition_penalty=1.0))
