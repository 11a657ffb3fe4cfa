"""The normal and the steered text side by side, while they arrive and finished."""

from __future__ import annotations

from itertools import zip_longest

from rich.console import Console, ConsoleOptions, RenderResult
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

import steer_client
from steer_client._cli.formatting import escape_controls
from steer_client._defaults import NORMAL

# Lines of a panel that are not text: its two borders.
_FRAME_LINES = 2
# Terminal columns of a panel that are not text: two borders and two spaces.
_FRAME_COLUMNS = 4


class ArmText:
    """One arm's text so far, and where each of its tokens begins in it."""

    def __init__(self) -> None:
        self.text = ""
        self.token_ids: list[int] = []
        self._starts: list[int] = []

    def add(self, text: str, token_ids: tuple[int, ...]) -> None:
        """Appends a piece; its tokens all begin where the piece begins."""
        self._starts.extend([len(self.text)] * len(token_ids))
        self.token_ids.extend(token_ids)
        self.text += escape_controls(text)

    def start_of(self, token: int) -> int:
        """The index in `text` where a token begins; the end of the text for a token past the last."""
        return self._starts[token] if token < len(self._starts) else len(self.text)


class SideBySide:
    """The normal text and a steered one; the steered one is bold from their first divergence.

    `live`: more may arrive. `cut`: the request ended early, and nothing more arrives. `by`: what steered, in words.
    """

    def __init__(self, steered: str, *, live: bool = False, cut: bool = False, by: str = "") -> None:
        self._steered = steered
        self._by = by
        self._live = live
        self._cut = cut
        self._arms = {NORMAL: ArmText(), steered: ArmText()}

    def add(self, piece: steer_client.ArmDelta) -> None:
        """Appends the next piece of either arm."""
        self._arms[piece.arm].add(piece.delta.text, piece.delta.token_ids)

    def finished(self, by: str = "") -> SideBySide:
        """The same texts, at their full height, under what steered the second."""
        return self._no_longer_live(cut=False, by=by)

    def cut(self) -> SideBySide | None:
        """What arrived of a request that ended early, marked as cut; None if no text arrived."""
        return self._no_longer_live(cut=True) if any(arm.text for arm in self._arms.values()) else None

    def _no_longer_live(self, *, cut: bool, by: str = "") -> SideBySide:
        copy = SideBySide(self._steered, cut=cut, by=by)
        copy._arms = self._arms
        return copy

    def divergence(self) -> int | None:
        """Index of the first token that differs, as far as both texts have arrived; None if none does."""
        normal, steered = (arm.token_ids for arm in self._arms.values())
        # While texts are incomplete, the shorter one does not differ by its length.
        pairs = zip(normal, steered, strict=False) if self._live or self._cut else zip_longest(normal, steered)
        return next((index for index, (left, right) in enumerate(pairs) if left != right), None)

    def texts(self) -> tuple[Text, Text]:
        """Both texts, styled."""
        normal, steered = self._arms.values()
        right = Text(steered.text)
        divergence = self.divergence()
        if divergence is not None:
            right.stylize("bold magenta", steered.start_of(divergence))
        return Text(normal.text), right

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = max(options.max_width // 2 - _FRAME_COLUMNS, 1)
        left, right = (list(text.wrap(console, width)) for text in self.texts())
        height = max(len(left), len(right), 1)
        if self._live:
            # A live display cannot scroll, so a text taller than the screen shows its newest lines.
            height = min(height, max(console.height - _FRAME_LINES - 1, 1))
        grid = Table.grid(expand=True, padding=0)
        grid.add_column(ratio=1)
        grid.add_column(ratio=1)
        grid.add_row(
            _panel(self._title(NORMAL), left[-height:], height),
            _panel(self._title(self._steered), right[-height:], height, border="magenta"),
        )
        yield grid

    def _title(self, arm: str) -> Text:
        by = f": {self._by}" if self._by and arm == self._steered else ""
        # No markup: what steered is other people's text.
        return Text(f"{arm} – cut, without receipts" if self._cut else f"{arm}{by}")


def _panel(title: Text, lines: list[Text], height: int, border: str = "none") -> Panel:
    body = Text("\n").join(lines)
    return Panel(body, title=title, title_align="left", height=height + _FRAME_LINES, border_style=border)
