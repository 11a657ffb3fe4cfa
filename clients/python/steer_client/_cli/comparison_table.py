"""What was measured of every text of a comparison, one row each."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

import steer_client
from steer_client._cli.formatting import escape_controls, format_number
from steer_client._defaults import NORMAL


def comparison_table(result: steer_client.ABResult, *, scored: bool) -> Table:
    """Where each text parts from the plain one of its sample, how far it is from it, and how it ended.

    Perplexities are under the plain model; the plain text's own is its arm's.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    several = len(result.samples) > 1
    for title in ("arm", *(("sample", "seed") if several else ()), "differs from token"):
        table.add_column(title, justify="left" if title == "arm" else "right")
    for title in ("KL mean", "KL p95", "perplexity") if scored else ():
        table.add_column(title, justify="right")
    table.add_column("tokens", justify="right")
    table.add_column("ended by")
    for sample in result.samples:
        which = [str(sample.normal.sample), str(sample.normal.seed)] if several else []
        plain = next((each.normal_perplexity for each in sample.steered.values()), None)
        scores = ["–", "–", format_number(plain)] if scored else []
        table.add_row(NORMAL, *which, "–", *scores, *_end(sample.normal))
        for name, arm in sample.steered.items():
            first = "never" if arm.first_divergence is None else str(arm.first_divergence)
            table.add_row(Text(escape_controls(name)), *which, first, *(_scores(arm) if scored else ()), *_end(arm))
    return table


def _scores(arm: steer_client.ArmResult) -> tuple[str, ...]:
    kl = (None, None) if arm.kl is None else (arm.kl.mean, arm.kl.p95)
    return tuple(map(format_number, (*kl, arm.steered_perplexity)))


def _end(text: steer_client.Generation | steer_client.ArmResult) -> tuple[str, str]:
    generation = text if isinstance(text, steer_client.Generation) else text.generation
    return str(generation.usage.completion_tokens), generation.finish_reason.value
