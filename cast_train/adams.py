"""AdamS: Adam whose masked weights decay to zero (CAST, Algorithm 1, Eq. 7-8)."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from cast_train.mask import nm_mask
from conversion.errors import InputError

# Elements updated together. On a CPU the eight elementwise passes over a bucket then run in cache instead of in memory;
# on an accelerator buckets only bound the scratch memory (one bucket-sized tensor).
_CPU_BUCKET = 1 << 18
_ACCELERATOR_BUCKET = 1 << 25


class AdamS(Optimizer):
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
    ) -> None:
        if lr < 0 or eps < 0 or decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise InputError(
                f"AdamS needs lr, eps, decay >= 0 and betas in [0, 1), got {lr=}, {eps=}, {decay=}, {betas=}"
            )
        if total_steps < 1:
            raise InputError(f"AdamS needs total_steps >= 1, got {total_steps}")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "decay": decay,
            "total_steps": total_steps,
            "sparse": False,
            "transposed": False,
            "mask_interval": 10,
            "step": 0,
            "mask_flips": 0,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for p in group["params"]:
            if p.dtype not in (torch.float32, torch.float64):
                raise InputError(
                    f"AdamS updates float32 weights, got {p.dtype}: keep master weights in float32 and use autocast"
                )
            if group["sparse"] and p.shape[0 if group["transposed"] else -1] % 4:
                raise InputError(
                    f"a weight of shape {list(p.shape)} cannot be 2:4: its input axis is not divisible by 4"
                )

    @property
    def mask_flips(self) -> int:
        """Mask bits that the last refresh changed, over all sparse parameters; 0 before the second refresh."""
        return sum(group["mask_flips"] for group in self.param_groups)

    @torch.no_grad()
    def refresh_masks(self) -> None:
        """Recompute every mask from the weights as they are now."""
        for group in self.param_groups:
            if group["sparse"]:
                self._refresh(group)

    def _refresh(self, group: dict[str, Any]) -> None:
        flips = 0
        for p in group["params"]:
            weight = _local(p)
            mask = nm_mask(weight.t()).t().contiguous() if group["transposed"] else nm_mask(weight)
            state = self.state[p]
            if "mask" in state:
                old = _local(state["mask"])
                flips += int((old != mask).sum())
            else:
                state["mask"] = torch.zeros_like(p, dtype=torch.bool)
                old = _local(state["mask"])
            old.copy_(mask)
        group["mask_flips"] = flips

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Do one update. InputError after total_steps of them, where the ramp has no meaning."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            t = group["step"]
            if t >= group["total_steps"]:
                raise InputError(f"AdamS was made for {group['total_steps']} steps and has done them all")
            if group["sparse"] and t % group["mask_interval"] == 0:
                self._refresh(group)
            self._update(group, t)
            group["step"] = t + 1
        return loss

    def _update(self, group: dict[str, Any], t: int) -> None:
        beta1 = group["betas"][0]
        ramp = t / group["total_steps"]
        for params, grads, momenta, variances, masks in self._buckets(group):
            if not group["sparse"]:
                self._adam(params, grads, momenta, variances, group, t, beta1, group["lr"])
                continue
            torch._foreach_lerp_(momenta, grads, 1 - beta1)
            # mu~ = mu + (1 - m) * (a * decay * sign(theta) - a * mu): several times faster on a CPU than where(), as
            # is a mask of bytes than one of bools.
            updates = torch._foreach_sign(params)
            torch._foreach_mul_(updates, ramp * group["decay"])
            torch._foreach_add_(updates, momenta, alpha=-ramp)
            torch._foreach_mul_(updates, [mask.view(torch.uint8) ^ 1 for mask in masks])
            torch._foreach_add_(updates, momenta)
            # The rest is an Adam step on the "gradient" mu~ without momentum of its own (beta1 = 0: the kernel's first
            # moment is overwritten by its gradient, hence the same tensors twice) and with the correction of mu in lr.
            self._adam(params, updates, updates, variances, group, t, 0.0, group["lr"] / (1 - beta1 ** (t + 1)))

    @staticmethod
    def _adam(
        params: list[Tensor],
        grads: Sequence[Tensor],
        momenta: Sequence[Tensor],
        variances: list[Tensor],
        group: dict[str, Any],
        t: int,
        beta1: float,
        lr: float,
    ) -> None:
        """Adam in one pass over memory, by the kernel behind torch.optim.Adam(fused=True)."""
        step = torch.tensor(float(t + 1), device=params[0].device)
        torch._fused_adam_(
            params,
            list(grads),
            list(momenta),
            variances,
            [],
            [step] * len(params),
            lr=lr,
            beta1=beta1,
            beta2=group["betas"][1],
            weight_decay=0.0,
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )

    def _buckets(self, group: dict[str, Any]) -> Iterator[list[list[Tensor]]]:
        """Yield parallel lists (params, grads, momenta, variances, masks): whole tensors or flat pieces of them."""
        bucket: list[list[Tensor]] = [[] for _ in range(5)]
        filled = 0
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if "exp_avg" not in state:
                state["exp_avg"] = torch.zeros_like(p)
                state["exp_avg_sq"] = torch.zeros_like(p)
            tensors = [_local(p), _local(p.grad), _local(state["exp_avg"]), _local(state["exp_avg_sq"])]
            if group["sparse"]:
                tensors.append(_local(state["mask"]))
            size = _CPU_BUCKET if tensors[0].device.type == "cpu" else _ACCELERATOR_BUCKET
            if all(tensor.is_contiguous() for tensor in tensors):
                pieces = zip(*(tensor.view(-1).split(size) for tensor in tensors), strict=True)
            else:
                pieces = zip(*((tensor,) for tensor in tensors), strict=True)
            for piece in pieces:
                if filled and filled + piece[0].numel() > size:
                    yield bucket
                    bucket, filled = [[] for _ in range(5)], 0
                for column, tensor in zip(bucket, piece, strict=False):
                    column.append(tensor)
                filled += piece[0].numel()
        if filled:
            yield bucket

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict()` gave. InputError if it was saved under another total_steps."""
        for own, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            if own["total_steps"] != saved["total_steps"]:
                raise InputError(
                    f"this optimizer state belongs to a run of {saved['total_steps']} steps, not of "
                    f"{own['total_steps']}: the decay ramps over the whole run, so continue with the same number"
                )
        super().load_state_dict(state_dict)
        for state in self.state.values():
            if "mask" in state:  # torch casts all state to the parameter's dtype
                state["mask"] = state["mask"].bool()


def _local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor (FSDP2 shards rows, so groups stay whole), or the tensor itself."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()
