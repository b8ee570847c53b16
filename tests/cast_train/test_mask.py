"""The mask against sorting, and AdamS's promise of exactly n per group."""

import pytest
import torch

from cast_train import nm_mask
from conversion.errors import InputError


def sorted_mask(weight: torch.Tensor, n: int, m: int) -> torch.Tensor:
    groups = weight.abs().reshape(-1, m)
    kept = groups.argsort(dim=1, descending=True, stable=True)[:, :n]
    return torch.zeros_like(groups, dtype=torch.bool).scatter(1, kept, True).reshape(weight.shape)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 4), (4, 8), (1, 1)])
@pytest.mark.parametrize("shape", [(8,), (3, 16), (2, 5, 24), (0, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_keeps_the_largest_and_the_first_of_equals(n: int, m: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(n * m)
    ties = torch.randint(-2, 3, shape, generator=generator).to(dtype)
    for weight in (torch.randn(shape, generator=generator).to(dtype), ties, torch.zeros(shape, dtype=dtype)):
        mask = nm_mask(weight, n, m)
        assert mask.dtype == torch.bool
        assert torch.equal(mask, sorted_mask(weight, n, m))
        assert (mask.reshape(-1, m).sum(1) == n).all()


def test_takes_non_contiguous_weights() -> None:
    weight = torch.randn(16, 12)
    assert torch.equal(nm_mask(weight.t()), nm_mask(weight.t().contiguous()))


@pytest.mark.parametrize(("shape", "n", "m"), [((4, 6), 2, 4), ((), 2, 4), ((4, 8), 0, 4), ((4, 8), 5, 4)])
def test_refuses_impossible_patterns(shape: tuple[int, ...], n: int, m: int) -> None:
    with pytest.raises(InputError):
        nm_mask(torch.zeros(shape), n, m)
