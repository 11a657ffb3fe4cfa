"""What a sweep is expected to show: `[ARM:]METRIC[.low|.high] >= NUMBER`, for scripts and CI."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from steer_client._numbers import read_decimal

if TYPE_CHECKING:
    from steer_client._sweep.statistics import ArmSummary

#: What `ArmSummary` has of an arm.
METRICS: Final = ("hits", "useful_hits", "kl_mean", "kl_p95", "perplexity_ratio")
#: Of these, what is counted by --words.
COUNTED: Final = ("hits", "useful_hits")
_FORM = re.compile(
    rf"\s*(?:(?P<arm>\S.*):)?\s*(?P<metric>{'|'.join(METRICS)})(?:\.(?P<bound>low|high))?"
    r"\s*(?P<sign>>=|<=|>|<)\s*(?P<number>[^\s<>=]+)\s*"
)
_SIGNS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}


@dataclass(frozen=True, slots=True)
class Expectation:
    """One bound on a metric, or on an end of its interval; of one arm, or where `arm` is None of any."""

    text: str
    arm: str | None
    metric: str
    bound: str | None
    sign: str
    number: float

    def value(self, summary: ArmSummary) -> float | None:
        """What it speaks of; None where that was not measured, or has no interval."""
        estimate = getattr(summary, self.metric)
        if estimate is None:
            return None
        found: float | None = getattr(estimate, self.bound or "value")
        return found

    def holds(self, summary: ArmSummary) -> bool:
        """Whether the arm is as expected. What was not measured is not."""
        value = self.value(summary)
        return value is not None and _SIGNS[self.sign](value, self.number)


@dataclass(frozen=True, slots=True)
class Verdict:
    """An expectation, whether it is met, and the arms that meet it."""

    expect: str
    met: bool
    arms: tuple[str, ...]


def read_expectation(text: str) -> Expectation:
    """Raises ValueError, naming the text and the accepted form."""
    found = _FORM.fullmatch(text)
    try:
        if found is None:
            raise ValueError(text)
        number = read_decimal(found["number"])
    except ValueError:
        raise ValueError(
            f"cannot read {text!r}: write METRIC>=NUMBER or ARM:METRIC>=NUMBER, for example useful_hits>=0.5 or "
            f"ocean=0.4:kl_p95<=2; the metrics are {', '.join(METRICS)}, each also as METRIC.low and METRIC.high, the "
            "ends of its 95 % interval; the signs are >=, <=, > and <"
        ) from None
    arm = None if found["arm"] is None else _normal_name(found["arm"].strip())
    return Expectation(text, arm, found["metric"], found["bound"], found["sign"], number)


def judge(expectations: Sequence[Expectation], summaries: Sequence[ArmSummary]) -> tuple[Verdict, ...]:
    """Those that name an arm are judged by it. The others speak of one setting: one steered arm must meet them all."""
    steered = {arm_name(each): each for each in summaries if each.strength is not None}
    general = [each for each in expectations if each.arm is None]
    candidates = [name for name, each in steered.items() if each.strength != 0]
    chosen = tuple(name for name in candidates if all(each.holds(steered[name]) for each in general))
    verdicts = []
    for each in expectations:
        if each.arm is None:
            alone = tuple(name for name in candidates if each.holds(steered[name]))
            verdicts.append(Verdict(each.text, bool(chosen), chosen or alone))
        else:
            met = each.holds(steered[each.arm])
            verdicts.append(Verdict(each.text, met, (each.arm,) if met else ()))
    return tuple(verdicts)


def arm_name(summary: ArmSummary) -> str:
    """As rows and tables call the arm."""
    return summary.operator if summary.strength is None else f"{summary.operator}={summary.strength:g}"


def _normal_name(arm: str) -> str:
    name, has_strength, strength = arm.rpartition("=")
    try:
        return f"{name}={read_decimal(strength):g}" if has_strength else arm
    except ValueError:
        return arm
