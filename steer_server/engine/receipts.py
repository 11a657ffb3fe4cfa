"""Receipts: what a row's plan did, as measured, one entry per operator."""

from __future__ import annotations

from collections.abc import Mapping

from steer_server.engine.dose import DoseStatistics
from steer_server.types import Application, Receipt, SteeringPlan


def make_receipts(plan: SteeringPlan, doses: Mapping[int, DoseStatistics], *, cached: int = 0) -> tuple[Receipt, ...]:
    """One receipt per operator of the plan, in its order.

    Args:
        doses: measured, by layer; a layer without an entry did not run.
        cached: prompt tokens whose keys and values came from the prefix cache.
    """
    return tuple(
        _receipt(plan, application, doses.get(application.layer) if application.setting.strength else None, cached)
        for application in plan.applications
    )


def empty_receipts(plan: SteeringPlan | None) -> tuple[Receipt, ...]:
    """The receipts of a row that never reached the model."""
    return make_receipts(plan, {}) if plan else ()


def _receipt(plan: SteeringPlan, application: Application, doses: DoseStatistics | None, cached: int) -> Receipt:
    cached, doses = (cached, doses) if doses else (0, DoseStatistics())
    count = doses.prompt_tokens + doses.generated_tokens
    return Receipt(
        operator=application.name,
        digest=application.artifact.digest,
        layer=application.layer,
        rule=application.setting.rule,
        strength=application.setting.strength,
        blend=application.setting.blend,
        prompt_tokens_steered=doses.prompt_tokens,
        generated_tokens_steered=doses.generated_tokens,
        prompt_tokens_cached=cached,
        mean_dose=doses.total / count if count else 0.0,
        max_dose=doses.highest,
        dose_bound=plan.dose_bound(application.layer),
        defaulted=application.defaulted,
        calibrated=application.calibrated,
    )
