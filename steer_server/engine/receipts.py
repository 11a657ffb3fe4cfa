"""Receipts: what was measured of a row's plan, one entry per operator."""

from __future__ import annotations

from collections.abc import Mapping

from steer_server.engine.dose import Dose
from steer_server.types import Application, Receipt, SteeringPlan


def receipts_of(plan: SteeringPlan, doses: Mapping[int, Dose], *, cached: int = 0) -> tuple[Receipt, ...]:
    """One receipt per operator of the plan, in its order, from the doses at its layers."""
    return tuple(
        _receipt(plan, use, doses.get(use.layer) if use.setting.strength else None, cached) for use in plan.applications
    )


def untouched_receipts(plan: SteeringPlan | None) -> tuple[Receipt, ...]:
    """The receipts of a row that never reached the model."""
    return receipts_of(plan, {}) if plan else ()


def _receipt(plan: SteeringPlan, use: Application, dose: Dose | None, cached: int) -> Receipt:
    cached, dose = (cached, dose) if dose else (0, Dose())
    count = dose.prompt_tokens + dose.generated_tokens
    return Receipt(
        operator=use.name,
        digest=use.artifact.digest,
        layer=use.layer,
        rule=use.setting.rule,
        strength=use.setting.strength,
        blend=use.setting.blend,
        prompt_tokens_steered=dose.prompt_tokens,
        generated_tokens_steered=dose.generated_tokens,
        prompt_tokens_cached=cached,
        mean_dose=dose.total / count if count else 0.0,
        max_dose=dose.highest,
        dose_bound=plan.dose_bound(use.layer),
        defaulted=use.defaulted,
        calibrated=use.calibrated,
    )
