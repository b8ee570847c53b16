"""AST (Huang et al., AAAI 2025, arXiv:2407.20584): straight-through gradient, annealed decay, logit distillation.

Without their SLoRB, which adds parameters that do not fold into a 2:4 weight ("AST-Naive" in their tables).
"""

from typing import Any

import torch
from torch import Tensor

from cast_train.config import AstConfig
from cast_train.methods.straight_through import StraightThroughAdam, masked_pull
from cast_train.methods.trained import TrainedMethod


class AstAdam(StraightThroughAdam):
    """Adam whose step is mu + decay_t * (1 - m) * W, and whose second moment is built from that step.

    decay_t rises linearly from 0 to `decay` over the first `ramp_end` part of all steps and stays there. As in the
    authors' code the stored momentum mu never sees the decay.
    """

    def _update(self, bucket: list[list[Tensor]], group: dict[str, Any], t: int) -> None:
        weights, grads, momenta, variances, masks = bucket
        beta1 = group["betas"][0]
        ramp_steps = group["ramp_end"] * group["total_steps"]
        ramp = min(1.0, t / ramp_steps) if ramp_steps else 1.0
        torch._foreach_lerp_(momenta, grads, 1 - beta1)
        updates = masked_pull(weights, masks, ramp * group["decay"])
        torch._foreach_add_(updates, momenta)
        # as in AdamS: no momentum of the update itself, mu's bias correction in lr
        self._adam(weights, updates, updates, variances, group, t, 0.0, group["lr"] / (1 - beta1 ** (t + 1)))


class Ast(TrainedMethod[AstConfig]):
    def optimizer(self, groups: list[dict[str, Any]]) -> AstAdam:
        config = self.config
        return AstAdam(
            groups,
            config.lr,
            config.betas,
            config.eps,
            total_steps=config.total_steps,
            decay=config.decay,
            ramp_end=config.ramp_end,
        )
