"""What one operator of a request has to do with its tokens: worked out once per request, asked for in every step."""

from __future__ import annotations

from dataclasses import dataclass

from steer_server.engine.vllm.worker.pushes import GroupKey, SpanPush, TokenSpan
from steer_server.engine.vllm.worker_protocol import OperatorSetting


@dataclass(frozen=True, eq=False)
class PreparedSetting:
    """One operator of a request. Made by :meth:`of`."""

    setting: OperatorSetting
    index: int
    """Which of the request's operators it is."""
    group: GroupKey
    first_group: GroupKey | None
    """Of the first token, where the anchor is put there in place of what the others get."""
    start: int
    """First position that it pushes as one of ``group``."""
    half_strength: float

    @classmethod
    def of(cls, setting: OperatorSetting, index: int, *, layer: int, is_vector: bool) -> PreparedSetting:
        """``layer`` and ``is_vector`` are those of its operator."""
        # At blend 1 every rule is the anchor, which is all that a vector has.
        rule = None if setting.blend == 1.0 or is_vector else setting.rule
        group = GroupKey(layer, setting.digest, rule, setting.anchor)
        has_own_first = setting.first_token == "anchor" and setting.start == 0 and setting.blend != 1.0
        first_group = group._replace(rule=None) if has_own_first else None
        return cls(setting, index, group, first_group, max(setting.start, int(has_own_first)), setting.strength / 2.0)

    def pushes(self, span: TokenSpan) -> list[SpanPush]:
        """Its pushes of a span: one, and one of its own for an anchor at the first token."""
        end = self.setting.end
        if end is not None and span.first_position >= end:
            # Told apart here so that it costs next to nothing: most tokens of a text that is pushed at its first.
            return []
        if self.first_group is not None and span.first_position == 0:
            first = span.part(0, 1)
            rest = self._pushes(span) if end is None or end > self.start else []
            return [SpanPush(first, 0, self.index, self.first_group, self.half_strength, 1.0), *rest]
        return self._pushes(span)

    def _pushes(self, span: TokenSpan) -> list[SpanPush]:
        pushed = span.part(self.start, self.setting.end)
        num_summed = pushed.first_position - span.first_position if self.group.has_running_sum else 0
        if not num_summed + pushed.num_tokens:
            return []
        return [SpanPush(pushed, num_summed, self.index, self.group, self.half_strength, self.setting.blend)]

    def change_after(self, position: int) -> float:
        """The first position after this one at which it has something else to do; infinity where there is none."""
        changes = (self.setting.start, self.start, self.setting.end)
        return min((one for one in changes if one is not None and one > position), default=float("inf"))
