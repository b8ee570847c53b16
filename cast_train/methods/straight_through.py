"""Masked forward, straight-through gradient: the parameter is the masked weight, the optimizer keeps the dense one."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from cast_train.dtensor import local
from cast_train.masked_adam import MaskedAdam


class StraightThroughAdam(MaskedAdam):
    """Trains a dense weight W by the gradient that the masked weight m * W gets in the forward and backward passes.

    A linear layer's gradient does not depend on its weight being masked, so p.grad of the parameter p = m * W is the
    straight-through gradient of W. W lies in `state[p]["dense"]`; the mask is recomputed from W every `mask_interval`
    steps, at their end, and p is always exactly 2:4. Call `start()` before the first forward pass.
    """

    @torch.no_grad()
    def start(self) -> None:
        """Take the parameters for the dense weights and mask them, unless that was done (or loaded) before."""
        for group in self._sparse_groups():
            if all("dense" in self.state[p] for p in group["params"]):
                continue
            for p in group["params"]:
                self.state[p]["dense"] = p.detach().clone()
            self._refresh(group)
            self._write_masked(group)

    def _sparse_step(self, group: dict[str, Any], t: int) -> None:
        if "dense" not in self.state[group["params"][0]]:
            self.start()
        for bucket in self._buckets(group, self._masked_tensors):
            self._update(bucket, group, t)
        if (t + 1) % group["mask_interval"] == 0:
            self._refresh(group)
        self._write_masked(group)

    @abstractmethod
    def _update(self, bucket: list[list[Tensor]], group: dict[str, Any], t: int) -> None:
        """Update (dense weights, gradients, first moments, second moments, masks) at 0-based step t."""

    def _write_masked(self, group: dict[str, Any]) -> None:
        for p in group["params"]:
            state = self.state[p]
            torch.mul(local(state["dense"]), local(state["mask"]).view(torch.uint8), out=local(p))

    def _ranked(self, p: Tensor) -> Tensor:
        return local(self.state[p]["dense"])

    def _masked_tensors(self, p: Tensor) -> list[Tensor]:
        _, grad, momentum, variance, mask = super()._masked_tensors(p)
        return [self.state[p]["dense"], grad, momentum, variance, mask]


def masked_pull(weights: list[Tensor], masks: list[Tensor], decay: float) -> list[Tensor]:
    """Return decay * (1 - mask) * weight, the gradient of the L2 decay on masked weights."""
    pulls = torch._foreach_mul(weights, decay)
    torch._foreach_mul_(pulls, [mask.view(torch.uint8) ^ 1 for mask in masks])
    return list(pulls)
