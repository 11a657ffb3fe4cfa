"""One arm's text, while it arrives and finished."""

from __future__ import annotations

from itertools import zip_longest

from steer_client._cli.formatting import escape_controls


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

    def end_of(self, token: int) -> int:
        """The index in `text` where the next piece begins."""
        start = self.start_of(token)
        return next((each for each in self._starts[token:] if each > start), len(self.text))

    def divergence_from(self, plain: ArmText, *, is_whole: bool) -> int | None:
        """Index of the first token that differs, as far as both texts have arrived; None if none does."""
        # While texts are incomplete, the shorter one does not differ by its length.
        theirs, ours = plain.token_ids, self.token_ids
        pairs = zip_longest(theirs, ours) if is_whole else zip(theirs, ours, strict=False)
        return next((index for index, (left, right) in enumerate(pairs) if left != right), None)
