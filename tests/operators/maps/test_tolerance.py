"""A tolerance is a bound of what is true, and not of what the probes say; the rank is what it takes."""

import pytest
import torch

from operators.maps.sketch import sketch_within


class _DenseMap:
    """Any n matrices (d, d), as an affine map."""

    def __init__(self, jacobian: torch.Tensor) -> None:
        self._jacobian = jacobian
        self.shape = tuple(jacobian.shape[:2])
        self.offset = torch.zeros(jacobian.shape[1])
        self.y = jacobian.sum(0) @ torch.randn(jacobian.shape[1], generator=torch.Generator().manual_seed(4))

    def jvp(self, tangents):
        return torch.einsum("nij,lnj->li", self._jacobian, tangents)

    def vjp(self, cotangents):
        return torch.einsum("nij,li->lnj", self._jacobian, cotangents)


def _long_tail(n=5, d=192):
    """The shape of real maps: a few large singular values, and a tail that decays slowly."""
    generator = torch.Generator().manual_seed(2)
    left = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(n * d, d, generator=generator)).Q
    values = torch.arange(1, d + 1) ** -0.6
    return (left * values @ right.T).reshape(d, n, d).permute(1, 0, 2).contiguous()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("tolerance", [0.5, 0.3])
def test_the_true_residual_is_within_the_tolerance_at_the_rank_that_it_takes(tolerance, weighted):
    jacobian = _long_tail()
    n, d, _ = jacobian.shape
    flat = jacobian.permute(1, 0, 2).reshape(d, n * d)
    values = torch.linalg.svdvals(flat).square()
    least = int(((1 - values.cumsum(0) / values.sum()).clamp_min(0).sqrt() > tolerance).sum()) + 1
    root = torch.diag(torch.linspace(0.2, 1.8, d)) if weighted else None
    for seed in range(12):
        found = sketch_within(_DenseMap(jacobian), tolerance, root=root, seed=seed)
        assert found is not None
        missed = flat - found.basis @ (found.basis.T @ flat)
        assert float(missed.norm() / flat.norm()) <= tolerance
        # One vector is that of the anchor, and the certificate's error has a margin.
        assert least <= found.basis.shape[1] <= 1.05 * least + 3
