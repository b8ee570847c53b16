"""SR-STE (Zhou et al., ICLR 2021, arXiv:2102.04010): straight-through gradient, L2 decay on masked weights."""

from typing import Any

import torch
from torch import Tensor

from cast_train.config import SrsteConfig
from cast_train.methods.straight_through import StraightThroughAdam, masked_pull
from cast_train.methods.trained import TrainedMethod


class SrsteAdam(StraightThroughAdam):
    """Adam on the gradient g + decay * (1 - m) * W (their Eq. 9); g is clipped before, the decay is not."""

    def _update(self, bucket: list[list[Tensor]], group: dict[str, Any], t: int) -> None:
        weights, grads, momenta, variances, masks = bucket
        total = masked_pull(weights, masks, group["decay"])
        torch._foreach_add_(total, grads)
        self._adam(weights, total, momenta, variances, group, t, group["betas"][0], group["lr"])


class Srste(TrainedMethod[SrsteConfig]):
    def optimizer(self, groups: list[dict[str, Any]]) -> SrsteAdam:
        config = self.config
        return SrsteAdam(
            groups, config.lr, config.betas, config.eps, total_steps=config.total_steps, decay=config.decay
        )
