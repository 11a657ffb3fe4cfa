"""Numbers, digests and other people's text, as short strings that are safe on a terminal."""

from __future__ import annotations

import steer_client

# A model can be made to write escape sequences, and a terminal would obey them. C0 controls become their pictures
# (U+2400 ...), C1 controls the replacement character.
_CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
_CONTROL_PICTURES |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def escape_controls(text: str) -> str:
    """The text with a visible character in place of each control character but newline and tab."""
    return text.translate(_CONTROL_PICTURES)


def format_number(value: float | None) -> str:
    """Three significant digits, or a dash for what was not measured."""
    if value is None:
        return "–"
    return f"{value:.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"


def format_count(size: int, noun: str) -> str:
    """For example "2 texts", "1 text"."""
    return f"{size} {noun}{'' if size == 1 else 's'}"


def positions_part(positions: steer_client.Positions) -> str:
    """What ends a setting on one line: which positions are pushed; nothing where all are."""
    return "" if positions == steer_client.ALL_POSITIONS else f", positions {positions}"


def anchor_part(blend: float, anchor: steer_client.Anchor, first_token: steer_client.FirstToken) -> str:
    """What stands behind a blend: the contrast anchor where it has a share, and what is put at the first token."""
    at_first = ", anchor at the first token" if first_token == "anchor" else ""
    return (", contrast anchor" if anchor == "contrast" and (blend or at_first) else "") + at_first


def short_digest(digest: str) -> str:
    """The digest's algorithm and first eight digits."""
    algorithm, colon, value = digest.partition(":")
    return f"{algorithm}:{value[:8]}…" if colon and len(value) > 8 else digest


def layer_part(layer: int, pushed: int) -> str:
    """An operator's layer, as `steer-operators list` counts it, and the block that is pushed where it is another."""
    return str(layer) if layer == pushed else f"{layer}, pushes {pushed}"
