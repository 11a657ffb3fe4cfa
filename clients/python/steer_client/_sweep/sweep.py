"""A sweep from its plan to its result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from steer_client._defaults import NORMAL, Timeout
from steer_client._errors import InvalidRequestError
from steer_client._matching import WordFinder
from steer_client._pool import Pool
from steer_client._requests import Prompts, SamplingParams
from steer_client._sweep.journal import Journal, make_header
from steer_client._sweep.plan import Plan, Strengths, make_plan
from steer_client._sweep.progress import progress_bar
from steer_client._sweep.result import ControlChangedError, SweepResult
from steer_client._sweep.rows import SweepRow
from steer_client._sweep.run import Caller, pinned, run, served


async def sweep(
    prompts: Prompts | str | Path,
    operators: Strengths,
    words: Sequence[str] | Mapping[str, Sequence[str]],
    seeds: int | Sequence[int] | None,
    sampling: SamplingParams,
    *,
    callers: Sequence[Caller],
    pool: Pool,
    out: str | Path | None,
    in_flight: int,
    progress: bool | None,
    timeout: Timeout,
) -> SweepResult:
    """See the clients' method."""
    if isinstance(in_flight, bool) or not isinstance(in_flight, int) or in_flight < 1:
        raise InvalidRequestError(f"in_flight: is {in_flight!r}; a number from 1 is accepted", field="in_flight")
    plan = make_plan(prompts, operators, seeds, sampling)
    finder, by_operator = _finders(plan, words)
    info, common = await served(plan, callers, timeout)
    journal = Journal(None if out is None else Path(out), make_header(plan.described(), common))
    try:
        total = len(plan.prompts) * len(plan.seeds) * (len(plan.arms) + 1)
        with progress_bar(total, len(journal.rows), shown=progress) as on_texts:
            await run(
                pinned(plan, common["digests"]),
                info,
                callers,
                pool,
                journal,
                in_flight=in_flight,
                timeout=timeout,
                on_texts=on_texts,
            )
    finally:
        journal.close()
    result = SweepResult(
        tuple(
            replace(row, found=by_operator.get(row.operator, finder).found(row.text))
            for row in _ordered(plan, journal.rows)
        ),
        finder.words,
        common["model"],
        common["model_fingerprint"],
        common["digests"],
    )
    if result.changed_controls:
        raise ControlChangedError(result)
    return result


def _finders(
    plan: Plan, words: Sequence[str] | Mapping[str, Sequence[str]]
) -> tuple[WordFinder, dict[str, WordFinder]]:
    """What looks for any of the words, and where each operator has its own, what looks for those."""
    if not isinstance(words, Mapping):
        return WordFinder(words), {}
    labels = {arm.operator for arm in plan.arms}
    if set(words) != labels:
        given, needed = ", ".join(words) or "none", ", ".join(sorted(labels))
        raise InvalidRequestError(f"words: are of {given}; those of each operator are needed: {needed}", field="words")
    by_operator = {label: WordFinder(each) for label, each in words.items()}
    return WordFinder([word for each in by_operator.values() for word in each.words]), by_operator


def _ordered(plan: Plan, rows: Sequence[SweepRow]) -> list[SweepRow]:
    """The rows in the plan's order, whenever they came."""
    by_key = {row.key: row for row in rows}
    arms: list[tuple[str, float | None]] = [(NORMAL, None), *((arm.operator, arm.strength) for arm in plan.arms)]
    return [by_key[name, seed, *arm] for name in plan.prompts for seed in plan.seeds for arm in arms]
