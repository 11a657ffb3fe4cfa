"""Words that a lens pushes towards."""

from __future__ import annotations

from collections.abc import Mapping

from steer_client._numbers import read_decimal
from steer_client._positions import Positions
from steer_client._requests import LENS, OperatorUse, WeightedWord


class Words(OperatorUse):
    """Several words that a lens mixes into one direction: `Words({"ocean": 1, "storm": 0.5}, kl=0.5)`.

    Each word's unit direction counts with its weight; a negative one pushes away from the word. Without `strength` and
    `kl` the strength is the one that the lens's dose curve gives for a p95 KL of 0.5 nats. `digest` pins the version of
    the lens.
    """

    __slots__ = ()

    def __init__(
        self,
        words: Mapping[str, float],
        strength: float | None = None,
        *,
        kl: float | None = None,
        positions: Positions | None = None,
        lens: str = LENS,
        digest: str | None = None,
    ) -> None:
        weighted = tuple(WeightedWord(text, weight) for text, weight in words.items())
        OperatorUse.__init__(self, lens, strength, positions=positions, words=weighted, kl=kl, digest=digest)

    @staticmethod
    def parse_words(text: str, *, kl: float | None = None, lens: str = LENS) -> Words:
        """Reads `WORD`, or `WORD*WEIGHT, WORD*WEIGHT`, and behind it `=λ` and `:POSITIONS`: `"ocean, storm*0.5=0.12"`.

        `kl` is for a text without λ. `lens` is its name, or `NAME,digest=sha256:DIGITS`. Raises ValueError, naming the
        text and the accepted form, for anything else.
        """
        setting, has_positions, positions = text.partition(":")
        where = Positions.parse(positions) if has_positions else None
        mixture, has_strength, strength = setting.partition("=")
        name, pinned, digest = lens.partition(",digest=")
        words: dict[str, float] = {}
        try:
            for part in mixture.split(","):
                word, has_weight, weight = part.partition("*")
                if not word.strip() or word.strip() in words:
                    raise ValueError(word)
                words[word.strip()] = read_decimal(weight) if has_weight else 1.0
            return Words(
                words,
                read_decimal(strength) if has_strength else None,
                kl=None if has_strength else kl,
                positions=where,
                lens=name,
                digest=digest if pinned else None,
            )
        except ValueError:
            raise ValueError(
                f"cannot read the words {text!r}: write WORD or WORD=λ, for example coffee=0.12; of several, each once "
                'and with its weight, WORD*WEIGHT, for example "ocean, storm*-0.5=0.12"; and :POSITIONS behind it, for '
                "example coffee=0.12:first"
            ) from None


class Word(Words):
    """A word that a lens pushes towards: `Word("coffee")`, `Word("coffee", 0.12)` or `Word("coffee", kl=0.5)`.

    Without `strength` and `kl` the strength is the one that the lens's dose curve gives for a p95 KL of 0.5 nats.
    """

    __slots__ = ()

    def __init__(
        self,
        text: str,
        strength: float | None = None,
        *,
        kl: float | None = None,
        positions: Positions | None = None,
        lens: str = LENS,
        digest: str | None = None,
    ) -> None:
        super().__init__({text: 1.0}, strength, kl=kl, positions=positions, lens=lens, digest=digest)
