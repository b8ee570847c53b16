"""Which order of a layer's input channels loses least when two of every four consecutive ones are cut in each row.

The permutation search of Pool and Yu (NeurIPS 2021), by linear assignments as in Zhang et al. (ICLR 2024).
"""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

SWEEPS = 20
_GROUPS = 256  # that exchange channels in one assignment; more gain little and cost their square
_COMPARISONS = 1 << 21  # at once: as many as stay in a cache


def cut_part(saliency: Tensor) -> float:
    """Return the part of `saliency` [R, K] that is cut when each row keeps the two largest of every four columns."""
    total = float(saliency.sum(dtype=torch.float64))
    kept = float(saliency.unflatten(1, (-1, 4)).topk(2).values.sum(dtype=torch.float64))
    return 1 - kept / total if total else 0.0


def search_order(saliency: Tensor, sweeps: int = SWEEPS, seed: int = 0) -> Tensor:
    """Return int64 `order` [K] such that saliency[:, order] loses less to 2:4 than `saliency`, or the same.

    In each sweep every group of four gives one of its channels, chosen at random, and the channels given are assigned
    to the groups anew, so that most is kept.

    Args:
        saliency: [R, K], not negative: what it costs to cut each weight. K is a multiple of 4.
        sweeps: how often.
        seed: of the choices.
    """
    generator = torch.Generator().manual_seed(seed)
    groups = torch.arange(saliency.shape[1]).view(-1, 4)
    for _ in range(sweeps):
        groups = groups[torch.randperm(len(groups), generator=generator)]
        groups = groups.gather(1, torch.rand(groups.shape, generator=generator).argsort(1))
        for some in groups.split(_GROUPS):
            some[:, 0] = some[_assign(saliency, some), 0]
    return groups.flatten()


def _assign(saliency: Tensor, groups: Tensor) -> Tensor:
    """Return which group's first channel each of `groups` [G, 4] should take, [G]."""
    given, *staying = (saliency[:, channels] for channels in groups.unbind(1))
    # Of three that stay the larger two; a fourth is worth what it exceeds the lesser of those by.
    second = torch.stack(staying).topk(2, dim=0).values[1]
    worth = torch.zeros(len(groups), len(groups), dtype=saliency.dtype)
    at_once = max(1, _COMPARISONS // worth.numel())
    for second_RG, given_RG in zip(second.split(at_once), given.split(at_once), strict=True):
        worth += torch.maximum(second_RG[:, :, None], given_RG[:, None, :]).sum(0)
    return torch.as_tensor(linear_sum_assignment(worth.numpy(), maximize=True)[1])
