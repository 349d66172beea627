"""The stratified estimate from a subset of the reference's queries: unbiased, with the variance that is documented."""

from __future__ import annotations

import pytest
import torch
from idar import stratified_subset, subject_attention

IMAGE, LENGTH = (0, 6), 7


def joint() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, 2, 6 + LENGTH, 4, generator=g, dtype=torch.float64) * 2 for _ in range(2))


def single_maps() -> torch.Tensor:
    """(q, m): the map of each query alone."""
    q, k = joint()
    return torch.cat([subject_attention(q, k, [(6 + i, 7 + i)], IMAGE)[0] for i in range(LENGTH)])


def shares(num_samples: int) -> torch.Tensor:
    """(stratum, q): how likely stratum t is to draw query q, from its overlap with [q, q + 1)."""
    step = LENGTH / num_samples
    rows = [
        [max(0.0, min((t + 1) * step, q + 1) - max(t * step, q)) / step for q in range(LENGTH)]
        for t in range(num_samples)
    ]
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("num_samples", [1, 2, 3, 5, 7])
def test_every_position_is_drawn_alike(num_samples: int) -> None:
    torch.testing.assert_close(shares(num_samples).sum(0), torch.full((LENGTH,), num_samples / LENGTH).double())
    g = torch.Generator().manual_seed(0)
    draws = torch.stack([stratified_subset(LENGTH, num_samples, g) for _ in range(4000)])
    for stratum, want in zip(draws.T, shares(num_samples), strict=True):
        found = torch.bincount(stratum, minlength=LENGTH) / len(draws)
        assert (found - want).abs().max() < 5 * (0.25 / len(draws)) ** 0.5
        assert (found[want == 0] == 0).all()


@pytest.mark.parametrize("num_samples", [2, 3, 5])
def test_mean_and_variance_of_the_estimate(num_samples: int) -> None:
    """Compared with the exact expectation and with the formula of the docstring; strata end between positions here."""
    q, k = joint()
    g = torch.Generator().manual_seed(1)
    draws = torch.cat(
        [subject_attention(q, k, [(6, 6 + LENGTH)], IMAGE, num_samples=num_samples, generator=g) for _ in range(1500)]
    )[:, 0]
    f, p = single_maps(), shares(num_samples)
    within = p @ f.square() - (p @ f).square()
    variance = within.sum(0) / num_samples**2
    error = (draws.mean(0) - f.mean(0)).abs() / (variance / len(draws)).sqrt()
    assert error.max() < 4.5
    assert ((draws.var(0) / variance) - 1).abs().max() < 0.25
    assert bool((variance <= f.var(0, correction=0) / num_samples + 1e-12).all())


def test_all_samples_are_the_exact_map() -> None:
    q, k = joint()
    exact = subject_attention(q, k, [(6, 13)], IMAGE)
    torch.testing.assert_close(subject_attention(q, k, [(6, 13)], IMAGE, num_samples=LENGTH), exact)
    assert stratified_subset(8, 8).tolist() == list(range(8))


def test_gradient_is_that_of_the_drawn_queries() -> None:
    q, k = (t.requires_grad_() for t in joint())
    maps = subject_attention(q, k, [(6, 13)], IMAGE, num_samples=3, generator=torch.Generator().manual_seed(4))
    drawn = 6 + stratified_subset(LENGTH, 3, torch.Generator().manual_seed(4))
    want = torch.softmax(q[:, :, drawn] @ k[:, :, :6].transpose(2, 3) / 2, -1).mean((1, 2))
    weight = torch.arange(6.0, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad((maps[:, 0] * weight).sum(), (q, k)),
        torch.autograd.grad((want * weight).sum(), (q, k)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_more_samples_than_queries_are_refused() -> None:
    with pytest.raises(ValueError, match="num_samples"):
        stratified_subset(4, 5)
