"""Two texts side by side, live and finished."""

from __future__ import annotations

from itertools import zip_longest

from rich.console import Console, ConsoleOptions, RenderResult
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from steer_client._cli.words import visible
from steer_client._events import NORMAL
from steer_client._results import ArmDelta

# Lines of a panel that are not text: its two borders.
_FRAME = 2
# Columns of a panel that are not text: two borders and two spaces.
_MARGIN = 4


class Column:
    """One arm's text so far, and where each of its tokens begins in it."""

    def __init__(self) -> None:
        self.text = ""
        self.token_ids: list[int] = []
        self._starts: list[int] = []

    def add(self, text: str, token_ids: tuple[int, ...]) -> None:
        """Appends a piece; its tokens all begin where the piece begins."""
        self._starts.extend([len(self.text)] * len(token_ids))
        self.token_ids.extend(token_ids)
        self.text += visible(text)

    def start_of(self, token: int) -> int:
        """Where a token begins; the end of the text for a token that is not there."""
        return self._starts[token] if token < len(self._starts) else len(self.text)


class Columns:
    """The normal text and a steered one; the steered one is bold from where they part."""

    def __init__(self, steered: str, *, live: bool = False, cut: bool = False) -> None:
        self._steered = steered
        self._live = live
        self._cut = cut
        self._columns = {NORMAL: Column(), steered: Column()}

    def add(self, piece: ArmDelta) -> None:
        """Takes the next piece of either arm."""
        self._columns[piece.arm].add(piece.delta.text, piece.delta.token_ids)

    def finished(self) -> Columns:
        """The same columns, at their full height."""
        return self._again(cut=False)

    def cut(self) -> Columns | None:
        """What has come of a request that was ended early, marked as cut; None where nothing has."""
        return self._again(cut=True) if any(column.text for column in self._columns.values()) else None

    def _again(self, *, cut: bool) -> Columns:
        done = Columns(self._steered, cut=cut)
        done._columns = self._columns
        return done

    def divergence(self) -> int | None:
        """Index of the first token that differs, as far as both texts have come."""
        normal, steered = (column.token_ids for column in self._columns.values())
        # Of texts that are not whole, one that is merely behind does not differ yet.
        pairs = zip(normal, steered, strict=False) if self._live or self._cut else zip_longest(normal, steered)
        return next((at for at, (left, right) in enumerate(pairs) if left != right), None)

    def texts(self) -> tuple[Text, Text]:
        """Both texts, styled."""
        normal, steered = self._columns.values()
        right = Text(steered.text)
        at = self.divergence()
        if at is not None:
            right.stylize("bold magenta", steered.start_of(at))
        return Text(normal.text), right

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = max(options.max_width // 2 - _MARGIN, 1)
        left, right = (list(text.wrap(console, width)) for text in self.texts())
        height = max(len(left), len(right), 1)
        if self._live:
            # A live display cannot scroll: of a text that is too tall, the newest lines are the ones to see.
            height = min(height, max(console.height - _FRAME - 1, 1))
        grid = Table.grid(expand=True, padding=0)
        grid.add_column(ratio=1)
        grid.add_column(ratio=1)
        grid.add_row(
            _panel(self._title(NORMAL), left[-height:], height),
            _panel(self._title(self._steered), right[-height:], height, border="magenta"),
        )
        yield grid

    def _title(self, arm: str) -> str:
        return f"{arm} – cut, without receipts" if self._cut else arm


def _panel(title: str, lines: list[Text], height: int, border: str = "none") -> Panel:
    body = Text("\n").join(lines)
    return Panel(body, title=title, title_align="left", height=height + _FRAME, border_style=border)
