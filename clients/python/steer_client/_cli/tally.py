"""What a blind vote came to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any

from steer_client._cli.vote_file import Answer


def tally(
    arms: tuple[str, str], answers: Iterable[Answer], is_swapped: Callable[[str], bool], total: int
) -> dict[str, Any]:
    """Wins of both arms, ties, and how sure that is.

    `share` is the first arm's of the decided votes, with its 95 % Wilson interval; `p` is the exact, two-sided sign
    test's. Both are None where nothing was decided.
    """
    # Imported here because it imports gRPC, and the commands' help does without.
    from steer_client._sweep.statistics import wilson

    votes = []
    wins = dict.fromkeys(arms, 0)
    for answer in answers:
        shown = arms[::-1] if is_swapped(answer.prompt_id) else arms
        winner = shown[int(answer.vote) - 1] if answer.vote in ("1", "2") else None
        if winner is not None:
            wins[winner] += 1
        votes.append(
            {"prompt_id": answer.prompt_id, "shown": list(shown), "vote": answer.vote, "winner": winner}
            | {"texts": list(answer.texts)}
        )
    kinds = [vote["vote"] for vote in votes]
    decided = sum(wins.values())
    share = wins[arms[0]] / decided if decided else None
    return {
        "arms": list(arms),
        "prompts": total,
        "wins": wins,
        "ties": kinds.count("tie") + kinds.count("same"),
        "same": kinds.count("same"),
        "skipped": kinds.count("skip"),
        "share": share,
        "interval": None if share is None else list(wilson(share, decided)),
        "p": sign_test(wins[arms[0]], wins[arms[1]]),
        "votes": votes,
    }


def sign_test(wins: int, losses: int) -> float | None:
    """How likely a fair coin falls at least as unevenly, to either side: exact. None without a throw."""
    throws, fewer = wins + losses, min(wins, losses)
    if not throws:
        return None
    tail = Fraction(sum(math.comb(throws, each) for each in range(fewer + 1)), 2**throws)
    return float(min(2 * tail, Fraction(1)))


def tally_lines(result: dict[str, Any]) -> list[str]:
    """The result in words."""
    first, second = result["arms"]
    wins = result["wins"]
    lines = [
        f"{first}: {wins[first]}, {second}: {wins[second]}, ties: {result['ties']} "
        f"({result['same']} of the same text), skipped: {result['skipped']}, of {result['prompts']} prompts"
    ]
    if result["share"] is None:
        return [*lines, "nothing was decided"]
    low, high = result["interval"]
    return [
        *lines,
        f"{first} is preferred in {result['share']:.2f} of the decided votes (95 % interval {low:.2f}–{high:.2f})",
        f"sign test, exact and two-sided: p = {result['p']:.3g}",
    ]
