"""An evaluation: strengths on development prompts, then texts of held-out prompts, into a journal that can go on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from operators.core.neutral_texts import neutral_texts
from operators.core.progress import Progress, silent
from operators.evaluate.arms import Arm, per_concept, plain_arms, steering_arms
from operators.evaluate.cells import Cell, CellWriter
from operators.evaluate.concepts import EvalConcept
from operators.evaluate.form import Form
from operators.evaluate.journal import Journal, Row
from operators.evaluate.material import Material
from operators.evaluate.measures import WordMatcher, decoded, text_values
from operators.evaluate.protocol import VERSION, Protocol, Regime, concept_digest, digest
from operators.evaluate.sampling import SAMPLINGS
from operators.evaluate.strengths import ROUNDS, Trial, closest, next_strengths
from operators.evaluate.writing import Written

SHOWN_TEXTS = 4
"""Texts that a row keeps, of its first prompts."""
_SEARCH = ("run", "form", "form_digest", "variant", "subject", "concepts", "regime")
"""What the trials of one search have in common."""


def run_digest(material: Material, protocol: Protocol) -> str:
    """What every row of a run depends on, beside its arm and its regime."""
    loaded = material.loaded
    described = protocol.describe()
    # More regimes may be added to a run, and a search may begin elsewhere: rows say their regime and their strength.
    for name in ("regimes", "strengths"):
        described.pop(name)
    fingerprints = [loaded.fingerprint, loaded.tokenizer_fingerprint]
    settings = [*map(str, SAMPLINGS), list(neutral_texts())]
    return digest([VERSION, *fingerprints, str(loaded.dtype), loaded.device.type, material.layer, settings, described])


class Evaluation:
    """One run of forms on concepts."""

    def __init__(
        self,
        material: Material,
        forms: Sequence[Form],
        concepts: Sequence[EvalConcept],
        protocol: Protocol,
        journal: Journal,
        *,
        rows: int,
        progress: Progress = silent,
        deadline: float | None = None,
    ) -> None:
        """``rows`` and ``deadline``: those of :class:`~operators.evaluate.cells.CellWriter`."""
        self._material, self._forms, self._concepts, self._protocol = material, forms, concepts, protocol
        self._journal, self._progress = journal, progress
        self._digest = run_digest(material, protocol)
        self._words = WordMatcher(concepts)
        self._writer = CellWriter(material.loaded, material.layer, protocol, concepts, rows=rows, deadline=deadline)
        self._arms: list[Arm] = []
        self._trials: dict[tuple[object, ...], list[Trial]] = {}

    def run(self) -> None:
        """Does what is not in the journal yet.

        Raises:
            OutOfTimeError: the deadline is near; the same run goes on from here.
            OperatorError: a form cannot be made, or a push moves nothing.
        """
        self._arms = steering_arms(self._forms, self._concepts, self._material, self._progress)
        for row in self._journal.rows.values():
            if row["of"]["kind"] == "trial":
                self._remember(row["of"], row)
        # Greedy texts first: they are most of the table, and other samplings begin with their strengths.
        regimes = self._protocol.regimes
        groups = {
            "greedy": [one for one in regimes if one.sampling.name == "greedy" and one.sign == 1],
            "other samplings": [one for one in regimes if one.sampling.name != "greedy" and one.sign == 1],
            "away": [one for one in regimes if one.sign == -1],
        }
        for name, group in groups.items():
            self._search(group, f"{name}, development texts")
            self._report(group, f"{name}, held-out texts")

    def _search(self, regimes: Sequence[Regime], what: str) -> None:
        """Tries strengths of all arms until each is close to every budget; those of a round are written together."""
        searches = [(arm, regime) for regime in regimes for arm in self._arms_of(regime)]
        texts, tokens = len(self._protocol.development), self._protocol.lengths[0]
        bounds = [len(self._first(arm, regime)) + ROUNDS * len(regime.budgets) for arm, regime in searches]
        most, done = sum(bounds) * texts, 0

        def add(cell: Cell, written: Written) -> None:
            values = text_values(written, slice(None), tokens)
            of = self._of("trial", cell)
            self._journal.add(of, {name: values[name] for name in ("kl_p95", "kl_mean")})
            self._remember(of, values)

        def count(written: int) -> None:
            self._progress(what, min(done + written, most), most)

        while True:
            cells: list[Cell] = []
            left = 0
            for (arm, regime), bound in zip(searches, bounds, strict=True):
                tried = self._tried(arm, regime)
                found = next_strengths(tried, regime.budgets, self._first(arm, regime))
                cells += [Cell(arm, regime, strength) for strength in found]
                left += max(bound - len(tried), len(found)) if found else 0
            # The total stays, for the time left; searches that end early bring it nearer.
            done = max(done, most - left * texts)
            if most:
                self._progress(what, done, most)
            if not cells:
                break
            self._writer.write(cells, "development", tokens, add=add, on_batch=count)

    def _report(self, regimes: Sequence[Regime], what: str) -> None:
        """Writes the texts of held-out prompts, at the strengths that were found."""
        cells: list[Cell] = []
        for regime in regimes:
            plain = plain_arms(self._forms, self._concepts, away=regime.sign == -1)
            cells += [Cell(arm, regime, 0.0) for arm in plain]
            for arm in self._arms_of(regime):
                tried = self._tried(arm, regime)
                cells += [Cell(arm, regime, closest(tried, budget)[0].strength, budget) for budget in regime.budgets]
        missing = [cell for cell in cells if self._journal.get(self._of("texts", cell)) is None]
        size = len(self._protocol.held_out)
        before, total = (len(cells) - len(missing)) * size, len(cells) * size
        if not missing:
            return
        self._progress(what, before, total)
        self._writer.write(
            missing,
            "held-out",
            self._protocol.lengths[-1],
            add=self._add_texts,
            on_batch=lambda count: self._progress(what, before + count, total),
        )

    def _add_texts(self, cell: Cell, written: Written) -> None:
        """One row: everything that tables are made of, by prompt, for each of the lengths."""
        loaded, everything = self._material.loaded, slice(None)
        values: dict[str, Any] = {}
        for tokens in self._protocol.lengths:
            texts = decoded(written, everything, tokens, loaded)
            words = {concept.name: self._words.hits(concept.name, texts) for concept in self._concepts_of(cell.arm)}
            values[str(tokens)] = text_values(written, everything, tokens) | {"words": words}
        shown = decoded(written, slice(0, SHOWN_TEXTS), self._protocol.lengths[-1], loaded)
        reached = cell.budget is None or closest(self._tried(cell.arm, cell.regime), cell.budget)[1]
        self._journal.add(self._of("texts", cell), {"reached": reached, "lengths": values, "shown": shown})

    def _arms_of(self, regime: Regime) -> list[Arm]:
        """Away from a concept there are texts of each concept to push: no arm is shared."""
        return self._arms if regime.sign == 1 else per_concept(self._arms, self._concepts)

    def _first(self, arm: Arm, regime: Regime) -> Sequence[float]:
        """The strengths that a search begins with."""
        greedy = [one for one in self._protocol.regimes if one.sampling.name == "greedy" and one.sign == regime.sign]
        if not greedy or regime in greedy:
            return self._protocol.strengths
        tried = self._tried(arm, greedy[0])
        return sorted({closest(tried, budget)[0].strength for budget in regime.budgets})

    def _tried(self, arm: Arm, regime: Regime) -> list[Trial]:
        of = self._of("trial", Cell(arm, regime, 0.0))
        return self._trials.get(tuple(of[name] for name in _SEARCH), [])

    def _remember(self, of: Mapping[str, Any], values: Mapping[str, Any] | Row) -> None:
        trial = Trial(of["strength"], values["kl_p95"], values["kl_mean"])
        self._trials.setdefault(tuple(of[name] for name in _SEARCH), []).append(trial)

    def _concepts_of(self, arm: Arm) -> Sequence[EvalConcept]:
        return self._concepts if arm.subject is None else (arm.subject,)

    def _of(self, kind: str, cell: Cell) -> dict[str, Any]:
        """Everything that the values of a row depend on."""
        arm = cell.arm
        # The KL of an arm that all share is of no concept: it stays when concepts are added.
        of_none = kind == "trial" and arm.subject is None
        of = {
            "kind": kind,
            "run": self._digest,
            "form": arm.form,
            "form_digest": arm.digest,
            "variant": arm.variant,
            "subject": None if arm.subject is None else arm.subject.name,
            "concepts": "" if of_none else digest(list(map(concept_digest, self._concepts_of(arm)))),
            "regime": cell.regime.name,
            "strength": cell.strength,
        }
        return of if kind == "trial" else of | {"budget": None if cell.budget is None else str(cell.budget)}
