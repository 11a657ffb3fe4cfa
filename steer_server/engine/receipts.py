"""Receipts: what a row's plan did, as measured, one entry per operator."""

from __future__ import annotations

from collections.abc import Sequence

from steer_server.engine.dose import DoseStatistics
from steer_server.engine.proof import Proof
from steer_server.types import Application, Receipt, SteeringPlan


def make_receipts(
    plan: SteeringPlan, doses: Sequence[DoseStatistics], proof: Proof | None = None
) -> tuple[Receipt, ...]:
    """One receipt per operator of the plan, in its order.

    Args:
        doses: measured, in the same order.
        proof: what was held against the reference; None where nothing was added.
    """
    return tuple(_receipt(plan, use, measured, proof) for use, measured in zip(plan.applications, doses, strict=True))


def empty_receipts(plan: SteeringPlan | None) -> tuple[Receipt, ...]:
    """The receipts of a row that never reached the model."""
    return make_receipts(plan, [DoseStatistics() for _ in plan.applications]) if plan else ()


def _receipt(plan: SteeringPlan, application: Application, doses: DoseStatistics, proof: Proof | None) -> Receipt:
    count = doses.prompt_tokens + doses.generated_tokens
    num_checked, worst_cosine = (0, None) if proof is None else proof.of(application)
    return Receipt(
        operator=application.name,
        digest=application.artifact.digest,
        layer=application.layer,
        rule=application.setting.rule,
        strength=application.setting.strength,
        blend=application.setting.blend,
        positions=application.setting.positions,
        anchor=application.setting.anchor,
        first_token=application.setting.first_token,
        prompt_tokens_steered=doses.prompt_tokens,
        generated_tokens_steered=doses.generated_tokens,
        prompt_tokens_cached=doses.cached_tokens,
        mean_dose=doses.total / count if count else 0.0,
        max_dose=doses.highest,
        dose_bound=plan.dose_bound(application.layer),
        defaulted=application.defaulted,
        calibrated=application.calibrated,
        words=application.words,
        lens_digest=application.lens_digest,
        kl=application.kl,
        positions_checked=num_checked,
        worst_cosine=worst_cosine,
    )
