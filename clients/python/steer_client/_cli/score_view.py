"""How a text reads under every arm: a table of its tokens for each, and one of the arms."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

import steer_client
from steer_client._cli.console import wide_console
from steer_client._cli.formatting import escape_controls, format_number
from steer_client._cli.summaries import receipt_line, steering_title

_BAR = 12
# Of the largest KL that is shown, and the colour of what lies below.
_SHADES = ((0.25, "green"), (0.6, "yellow"), (1.0, "red"))
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def show_score(score: steer_client.TextScore) -> None:
    """The tokens under each arm, or under the plain model where there is no other; then the arms, and receipts."""
    console = wide_console()
    steered = tuple(score.steered.values())
    most = max((token.kl for arm in steered for token in arm.tokens), default=0.0)
    for arm in steered or (score.normal,):
        if steered:
            title = f"{arm.arm}: {steering_title(arm.receipts)}" if arm.receipts else arm.arm
            console.print(Text(escape_controls(title), style="bold"), soft_wrap=True)
        console.print(_token_table(arm, most) if steered else _plain_table(arm))
        console.print()
    console.print(_arm_table(score.arms))
    for arm in steered:
        for receipt in arm.receipts:
            line = Text(f"{escape_controls(arm.arm)}: {receipt_line(receipt)}", style="dim")
            console.print(line, soft_wrap=not console.is_terminal)


def kl_bar(value: float, most: float) -> Text:
    """A bar as long as the share of `value` in `most`, green, yellow or red by that share."""
    share = min(max(value / most, 0.0), 1.0) if most > 0 else 0.0
    whole, part = divmod(round(share * _BAR * 8), 8)
    bar = "█" * whole + (_EIGHTHS[part] if part else "")
    return Text(bar, style=next(style for limit, style in _SHADES if share <= limit))


def _token_table(arm: steer_client.ArmScore, most: float) -> Table:
    words = [mass.word for mass in arm.tokens[0].words] if arm.tokens else []
    tops = any(token.gained or token.lost for token in arm.tokens)
    doses = any(token.dose is not None for token in arm.tokens)
    table = _table("token", ("log p", "plain", "difference", "KL"))
    table.add_column("", no_wrap=True, min_width=_BAR)
    for word in words:
        table.add_column(Text(f"p({escape_controls(word)})"), justify="right", no_wrap=True)
    if doses:
        table.add_column("dose", justify="right")
    if tops:
        table.add_column("gained", overflow="fold")
        table.add_column("lost", overflow="fold")
    for token in arm.tokens:
        cells: list[Text | str] = [
            _piece(token.token),
            f"{token.logprob:.3f}",
            f"{token.normal_logprob:.3f}",
            f"{token.logprob - token.normal_logprob:+.3f}",
            f"{token.kl:.3f}",
            kl_bar(token.kl, most),
            *(f"{mass.normal:.2g} → {mass.arm:.2g}" for mass in token.words),
        ]
        if doses:
            cells.append(format_number(token.dose))
        if tops:
            cells += [_alternatives(token.gained, "+"), _alternatives(token.lost, "-")]
        table.add_row(*cells)
    return table


def _plain_table(arm: steer_client.ArmScore) -> Table:
    words = [mass.word for mass in arm.tokens[0].words] if arm.tokens else []
    table = _table("token", ("log p", *(f"p({escape_controls(word)})" for word in words)))
    for token in arm.tokens:
        masses = (format_number(mass.normal) for mass in token.words)
        table.add_row(_piece(token.token), f"{token.logprob:.3f}", *masses)
    return table


def _arm_table(arms: Sequence[steer_client.ArmScore]) -> Table:
    table = _table("arm", ("perplexity", "KL mean", "KL p95"))
    for arm in arms:
        kl = ("–", "–") if arm is arms[0] else (format_number(arm.kl_mean), format_number(arm.kl_p95))
        table.add_row(Text(escape_controls(arm.arm)), format_number(arm.perplexity), *kl)
    return table


def _table(first: str, numbers: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(first, no_wrap=True)
    for title in numbers:
        # No markup: a word is the user's text.
        table.add_column(Text(title), justify="right", no_wrap=True)
    return table


def _piece(token: str) -> Text:
    # As Python writes it, so that spaces and line ends show.
    return Text(escape_controls(repr(token)))


def _alternatives(tokens: Sequence[steer_client.TopLogprob], sign: str) -> Text:
    return Text(" ".join(f"{sign}{escape_controls(repr(each.token))}" for each in tokens))
