"""AdamS: Adam whose masked weights decay to zero (CAST, Algorithm 1, Eq. 7-8)."""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from cast_train.masked_adam import MaskedAdam
from conversion.errors import InputError

DecayNorm = Literal["l1", "l2"]
SecondMoment = Literal["update", "gradient"]


class AdamS(MaskedAdam):
    """Adam that pulls the masked weights of 2:4 groups towards zero, at a pace that ramps up over the whole run.

    For a parameter of a group with `"sparse": True`, with mask bit m (1 = kept), at step t = 0..total_steps-1::

        mu  = b1 * mu + (1 - b1) * g
        a   = t / total_steps
        mu~ = mu                                              where kept
        mu~ = (1 - a) * mu + a * decay * sign(theta)          where masked
        v   = b2 * v + (1 - b2) * mu~^2
        theta -= lr * (mu~ / (1 - b1^(t+1))) / (sqrt(v / (1 - b2^(t+1))) + eps)

    Parameters of other groups follow plain Adam. The mask is recomputed from the weights every `mask_interval` steps,
    first at t = 0, before the update. It lies in `optimizer.state[p]["mask"]` (bool, p's shape).

    Args:
        params: parameters or groups, float32 or float64 (the decay is lost in 16-bit weights). Group keys beside
            Adam's: `sparse` (default False); `transposed` (default False), True where weights are stored [in, out] as
            in GPT-2's Conv1D, so that groups of four run along the first axis; `mask_interval` (default 10).
        lr: learning rate, set per step by any torch scheduler.
        betas, eps: as in Adam.
        decay: the paper's lambda, in units of the gradient: at the end of the run masked weights see a gradient of this
            size towards zero.
        total_steps: T, the length of the ramp. Part of the method: a state saved under another T is refused.
        decay_norm: "l1" as above; "l2", an ablation, pulls by `decay * theta` instead of `decay * sign(theta)`.
        second_moment: "update" as above; "gradient", an ablation, builds v from g instead of mu~.

    Raises:
        InputError: an argument is out of range, or a parameter cannot be trained so.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        decay: float = 4e-7,
        total_steps: int,
        decay_norm: DecayNorm = "l1",
        second_moment: SecondMoment = "update",
    ) -> None:
        if decay_norm not in ("l1", "l2") or second_moment not in ("update", "gradient"):
            raise InputError(
                f"decay_norm is l1 or l2, second_moment update or gradient, got {decay_norm}, {second_moment}"
            )
        super().__init__(
            params,
            lr,
            betas,
            eps,
            total_steps=total_steps,
            decay=decay,
            decay_norm=decay_norm,
            second_moment=second_moment,
        )

    def _sparse_step(self, group: dict[str, Any], t: int) -> None:
        if t % group["mask_interval"] == 0:
            self._refresh(group)
        beta1 = group["betas"][0]
        ramp = t / group["total_steps"]
        lr = group["lr"] / (1 - beta1 ** (t + 1))
        for params, grads, momenta, variances, masks in self._buckets(group, self._masked_tensors):
            torch._foreach_lerp_(momenta, grads, 1 - beta1)
            # mu~ = mu + (1 - m) * (a * decay * sign(theta) - a * mu): several times faster on a CPU than where(), as
            # is a mask of bytes than one of bools.
            if group["decay_norm"] == "l1":
                updates = torch._foreach_sign(params)
                torch._foreach_mul_(updates, ramp * group["decay"])
            else:
                updates = torch._foreach_mul(params, ramp * group["decay"])
            torch._foreach_add_(updates, momenta, alpha=-ramp)
            torch._foreach_mul_(updates, [mask.view(torch.uint8) ^ 1 for mask in masks])
            torch._foreach_add_(updates, momenta)
            if group["second_moment"] == "update":
                # The rest is an Adam step on the "gradient" mu~ without momentum of its own (beta1 = 0: the kernel's
                # first moment is overwritten by its gradient, hence the same tensors twice) and with the correction of
                # mu in lr.
                self._adam(params, updates, updates, variances, group, t, 0.0, lr)
                continue
            beta2 = group["betas"][1]
            torch._foreach_mul_(variances, beta2)
            torch._foreach_addcmul_(variances, grads, grads, value=1 - beta2)
            roots = torch._foreach_div(variances, 1 - beta2 ** (t + 1))
            torch._foreach_sqrt_(roots)
            torch._foreach_add_(roots, group["eps"])
            torch._foreach_addcdiv_(params, updates, roots, value=-lr)
