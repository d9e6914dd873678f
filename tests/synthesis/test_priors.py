from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.synthesis.priors import density_entropy, similarity_entropy, variation

pytestmark = pytest.mark.quick


def by_quadrature(values: torch.Tensor, bandwidth: float) -> float:
    """-int f log (f + 1e-4) of the kernel density, one exponential per value and point of a very fine grid."""
    grid = torch.linspace(-1.2, 1.2, 48_001, dtype=torch.float64)
    kernels = torch.exp(-0.5 * ((grid[:, None] - values.double()) / bandwidth) ** 2)
    density = (kernels / (bandwidth * math.sqrt(2 * math.pi))).mean(1)
    return float(-torch.trapezoid(density * torch.log(density + 1e-4), grid))


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 1000), count=st.integers(1, 40), spread=st.floats(0, 1), bandwidth=st.sampled_from([0.01, 0.03])
)
def test_entropy_is_the_kernel_densitys(seed: int, count: int, spread: float, bandwidth: float) -> None:
    values = (torch.rand(2, count, generator=torch.Generator().manual_seed(seed)) * 2 - 1) * spread
    for row, found in zip(values, density_entropy(values.double(), bandwidth), strict=True):
        assert float(found) == pytest.approx(by_quadrature(row, bandwidth), abs=0.04)


def test_one_similarity_for_all_pairs_has_a_gaussians_entropy() -> None:
    gaussian = 0.5 * math.log(2 * math.pi * math.e * 0.01**2)
    for value in (-1.0, 0.0, 0.123, 1.0):
        assert float(density_entropy(torch.full((1, 50), value))) == pytest.approx(gaussian, abs=0.04)


def test_gradients_are_those_of_the_function() -> None:
    values = (torch.rand(1, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64) - 0.5).requires_grad_()
    (gradient,) = torch.autograd.grad(density_entropy(values, 0.05).sum(), values)
    moved = values.detach() + 1e-7 * torch.eye(12, dtype=torch.float64)
    expected = (density_entropy(moved, 0.05) - density_entropy(values.detach(), 0.05)) / 1e-7
    assert torch.allclose(gradient[0], expected, atol=1e-5)
    assert gradient.abs().max() > 1e-3


def test_prefix_tokens_heads_and_the_diagonal_do_not_count() -> None:
    output = torch.randn(2, 3, 9, 4, generator=torch.Generator().manual_seed(0))
    joined = output.transpose(1, 2).flatten(2)
    assert torch.equal(similarity_entropy(output, 2), similarity_entropy(joined[:, 2:]))
    pairs = [
        float(torch.cosine_similarity(joined[0, i], joined[0, j], dim=0)) for i in range(2, 9) for j in range(i + 1, 9)
    ]
    found = density_entropy(torch.tensor([pairs]))
    assert float(similarity_entropy(output, 2)[0]) == pytest.approx(float(found), abs=1e-3)


def test_patches_that_differ_in_kind_have_more_entropy_than_patches_that_are_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    alike = torch.ones(1, 16, 8) + 0.01 * torch.randn(1, 16, 8, generator=generator)
    spread = torch.randn(1, 16, 8, generator=generator)
    assert similarity_entropy(spread) > similarity_entropy(alike) + 1


def test_variation_is_per_pixel() -> None:
    steps = torch.zeros(1, 1, 6, 6)
    steps[..., ::2] = 1.0  # every step right is 1, every step down 0, every diagonal step 1
    assert float(variation(steps)) == pytest.approx(0.75, abs=1e-5)
    noise = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert float(variation(noise)) == pytest.approx(math.sqrt(2), rel=0.03)
    assert float(variation(noise[..., :32])) == pytest.approx(math.sqrt(2), rel=0.05)
