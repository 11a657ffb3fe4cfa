"""Operators of random numbers, for the tests that an engine does at its start."""

from __future__ import annotations

from datetime import UTC, datetime

import torch

from operators.core.artifact import OperatorArtifact, make_artifact
from operators.core.header import LowRank, OperatorHeader, Recommended
from operators.core.version import __version__
from steer_server.types import ModelInfo


def random_operators(model: ModelInfo) -> list[OperatorArtifact]:
    """One for every layer of a model: of rank 2 and two positions, of random numbers."""
    d, made = model.hidden_size, []
    for layer in range(model.num_layers):
        generator = torch.Generator().manual_seed(layer)
        header = OperatorHeader(
            concept="of the self-test",
            concept_ids=(0, 1),
            model=model.model,
            architecture=model.architecture,
            model_fingerprint=model.model_fingerprint,
            tokenizer_fingerprint=model.tokenizer_fingerprint,
            # Whose map ends one layer above the one that is pushed: there is one for each.
            profile="golden",
            rule_set="none",
            layer=layer + 1,
            injection_layer=layer,
            num_layers=model.num_layers,
            hidden_size=d,
            low_rank=LowRank(
                rank=2, residuals=(0.0, 0.0), weighting="white", oversample=0, power_iterations=0, seed=layer
            ),
            dtype="float32",
            model_dtype="float32",
            recommended=Recommended(),
            reconstruction_error=0.0,
            builder_version=__version__,
            created=datetime.now(UTC),
        )
        basis = torch.linalg.qr(torch.randn(d, 2, generator=generator)).Q
        factors = torch.randn(2, 2, d, generator=generator)
        base, anchor = torch.randn(2, d, generator=generator)
        made.append(make_artifact(header, factors, anchor, base, basis=basis))
    return made
