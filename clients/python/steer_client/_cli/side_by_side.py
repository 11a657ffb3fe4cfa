"""The plain text and the steered ones side by side, while they arrive and finished."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle

from rich.console import Console, ConsoleOptions, RenderResult
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

import steer_client
from steer_client._cli.arm_text import ArmText
from steer_client._cli.marked_text import DIVERGENCE_STYLE, changed_spans, mark_words
from steer_client._defaults import NORMAL

# Lines of a panel that are not text: its two borders.
_FRAME_LINES = 2
# Terminal columns of a panel that are not text: two borders and two spaces.
_FRAME_COLUMNS = 4
# Of a column, below which texts are stacked.
_MIN_COLUMNS = 30
_COLOURS = ("magenta", "cyan", "yellow", "blue", "red")


class SideBySide:
    """The plain text and one per arm, the plain one first; of several samples, one row each.

    In a steered text the first token that differs is reversed; finished, every word that is not the plain text's is
    bold, and before that all from the first difference on. `marked`: words to underline.
    """

    def __init__(self, arms: Sequence[str], *, n: int = 1, marked: Sequence[str] = ()) -> None:
        self._names = (NORMAL, *arms)
        self._colours = dict(zip(arms, cycle(_COLOURS), strict=False))
        self._samples = range(n)
        self._marked = marked
        self._texts = {(arm, sample): ArmText() for sample in self._samples for arm in self._names}
        self._titles: Mapping[str, str] = {}
        # More may arrive; the request ended early, and nothing more does.
        self._is_live, self._is_cut = True, False

    def add(self, piece: steer_client.ArmDelta) -> None:
        """Appends the next piece of an arm."""
        self._texts[piece.arm, piece.sample].add(piece.delta.text, piece.delta.token_ids)

    def finish(self, titles: Mapping[str, str]) -> None:
        """The texts are whole: from here at their full height, under what steered each, by arm."""
        self._is_live, self._titles = False, titles

    def cut(self) -> bool:
        """The request ended early: what arrived is marked as cut. False if no text arrived."""
        self._is_live, self._is_cut = False, True
        return any(arm.text for arm in self._texts.values())

    def divergence(self, arm: str, sample: int = 0) -> int | None:
        """Index of the first token that differs from the plain text's; None if none does so far."""
        is_whole = not self._is_live and not self._is_cut
        return self._texts[arm, sample].divergence_from(self._texts[NORMAL, sample], is_whole=is_whole)

    def text(self, arm: str, sample: int = 0) -> Text:
        """One text, styled."""
        shown = self._texts[arm, sample]
        text = Text(shown.text)
        if arm != NORMAL:
            self._style_differences(text, arm, sample)
        mark_words(text, self._marked)
        return text

    def _style_differences(self, text: Text, arm: str, sample: int) -> None:
        shown, plain = self._texts[arm, sample], self._texts[NORMAL, sample]
        style = f"bold {self._colours[arm]}"
        divergence = self.divergence(arm, sample)
        if divergence is None:
            return
        if self._is_live or self._is_cut:
            text.stylize(style, shown.start_of(divergence))
        else:
            for start, end in changed_spans(plain.text, shown.text):
                text.stylize(style, start, end)
        text.stylize(DIVERGENCE_STYLE, shown.start_of(divergence), shown.end_of(divergence))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        fits = options.max_width // len(self._names) >= _MIN_COLUMNS
        columns = len(self._names) if fits else 1
        rows = len(self._samples) * (1 if fits else len(self._names))
        width = max(options.max_width // columns - _FRAME_COLUMNS, 1)
        # A live display cannot scroll, so a text taller than its share of the screen shows its newest lines.
        limit = max((console.height - 1) // rows - _FRAME_LINES, 1) if self._is_live else None
        grid = Table.grid(expand=True, padding=0)
        for _ in range(columns):
            grid.add_column(ratio=1)
        for sample in self._samples:
            lines = {arm: list(self.text(arm, sample).wrap(console, width)) for arm in self._names}
            tallest = max(1, *map(len, lines.values()))
            panels = []
            for arm in self._names:
                height = tallest if fits else max(len(lines[arm]), 1)
                height = min(height, limit or height)
                panels.append(self._panel(arm, sample, lines[arm][-height:], height))
            for start in range(0, len(panels), columns):
                grid.add_row(*panels[start : start + columns])
        yield grid

    def _panel(self, arm: str, sample: int, lines: list[Text], height: int) -> Panel:
        which = f" {sample}" if len(self._samples) > 1 else ""
        by = f": {self._titles[arm]}" if self._titles.get(arm) else ""
        # No markup: an arm's name and what steered are other people's text.
        title = Text(f"{arm}{which} – cut, without receipts" if self._is_cut else f"{arm}{which}{by}")
        body = Text("\n").join(lines)
        border = self._colours.get(arm, "none")
        return Panel(body, title=title, title_align="left", height=height + _FRAME_LINES, border_style=border)
