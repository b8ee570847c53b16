"""Gradual magnitude pruning (Zhu & Gupta 2017, arXiv:1710.01878) to 2:4, then fine-tuning under the final mask."""

import math
from typing import Any

import torch
from torch import Tensor

from cast_train.config import GmpConfig
from cast_train.dtensor import local
from cast_train.mask import nm_mask
from cast_train.masked_adam import MaskedAdam, zero_masked
from cast_train.methods.trained import TrainedMethod


class GmpAdam(MaskedAdam):
    """Adam, with more and more groups of four cut to their two largest weights.

    At step t the part `pruned_part(t)` of each output row's groups is cut; those go first whose two smallest magnitudes
    have the least sum. What is cut stays cut. Ranking within a row compares weights of one scale, and it needs no other
    rank's rows where the weight is sharded; which groups of a layer go first matters little, as all go.
    """

    def pruned_part(self, t: int, group: dict[str, Any]) -> float:
        """Return the part of groups that is cut at 0-based step t: cubic from 0 to 1 (their Eq. 1)."""
        end = self._ramp_steps(group)
        return 1.0 if t >= end else 1 - (1 - t / end) ** 3

    @torch.no_grad()
    def mask_gradients(self) -> None:
        if any(group["step"] > 0 for group in self._sparse_groups()):  # there are no masks before the first step
            self._zero_masked_gradients()

    def health(self) -> dict[str, float]:
        """Return mean |weight| still to be cut and mean |kept|, mask flips, and the part of groups that is cut."""
        groups = list(self._sparse_groups())
        sparse = [p for group in groups for p in group["params"]]
        total = torch.stack([torch.linalg.vector_norm(local(p), 1) for p in sparse]).sum()
        cut = torch.stack([(~local(self.state[p]["mask"])).sum() for p in sparse]).sum()
        here = (sum(group["left"] for group in groups), total, cut, self.mask_flips)
        left, magnitude, pruned, flips = self._over_ranks(*here)
        count = sum(p.numel() for p in sparse) / 2
        return {
            "masked": left / count,
            "kept": (magnitude - left) / count,
            "mask_flips": flips,
            "pruned": pruned / count,
        }

    def _ramp_steps(self, group: dict[str, Any]) -> int:
        return min(math.ceil(group["ramp_end"] * group["total_steps"]), group["total_steps"] - 1)

    def _sparse_step(self, group: dict[str, Any], t: int) -> None:
        end = self._ramp_steps(group)
        if t == end or (t < end and t % group["mask_interval"] == 0):
            self._refresh(group)
        elif t > end:
            group["mask_flips"] = 0
        for params, grads, momenta, variances, masks in self._buckets(group, self._masked_tensors):
            self._adam(params, grads, momenta, variances, group, t, group["betas"][0], group["lr"])
            zero_masked(params, masks)

    def _refresh(self, group: dict[str, Any]) -> None:
        self._left: list[Tensor] = []
        super()._refresh(group)
        group["left"] = torch.stack(self._left).sum().item()

    def _new_mask(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        """Cut as many groups of each row as are due; note the magnitude of what is still to be cut."""
        weight = local(p)
        mask = local(self.state[p]["mask"]) if "mask" in self.state[p] else torch.ones_like(weight, dtype=torch.bool)
        if group["transposed"]:
            weight, mask = weight.t(), mask.t()
        two_of_four = nm_mask(weight).unflatten(1, (-1, 4))  # [R, G, 4], as the next
        old = mask.unflatten(1, (-1, 4))
        was_cut = old.sum(2) == 2
        loss = (weight.unflatten(1, (-1, 4)) * ~two_of_four).abs().sum(2)
        loss[was_cut] = -1.0  # first in the order: they count as due
        due = int(self.pruned_part(group["step"], group) * loss.shape[1])
        is_cut = was_cut.scatter(1, loss.argsort(dim=1, stable=True)[:, :due], True)
        self._left.append((loss * ~is_cut).sum())
        new = torch.where((is_cut & ~was_cut)[..., None], two_of_four, old).flatten(1)
        return new.t().contiguous() if group["transposed"] else new


class Gmp(TrainedMethod[GmpConfig]):
    def optimizer(self, groups: list[dict[str, Any]]) -> GmpAdam:
        config = self.config
        return GmpAdam(
            groups,
            config.lr,
            config.betas,
            config.eps,
            total_steps=config.total_steps,
            ramp_end=config.ramp_end,
            left=0.0,
        )
