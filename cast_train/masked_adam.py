"""Adam with a 2:4 mask beside each weight: what the optimizers of all trained methods share."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from cast_train.dtensor import local, sum_of_pieces
from cast_train.mask import nm_mask
from conversion.errors import InputError

# Elements updated together. On a CPU the elementwise passes over a bucket then run in cache instead of in memory; on an
# accelerator buckets only bound the scratch memory (one bucket-sized tensor).
_CPU_BUCKET = 1 << 18
_ACCELERATOR_BUCKET = 1 << 25


class MaskedAdam(Optimizer):
    """Adam, whose subclasses say what a mask does to the parameters of groups with `"sparse": True`.

    The mask lies in `optimizer.state[p]["mask"]` (bool, p's shape, 1 = kept). Other groups follow plain Adam.

    Args:
        params: parameters or groups, float32 or float64 (small steps are lost in 16-bit weights). Group keys beside
            Adam's: `sparse` (default False); `transposed` (default False), True where weights are stored [in, out] as
            in GPT-2's Conv1D, so that groups of four run along the first axis; `mask_interval`, steps between two mask
            refreshes (default 10).
        lr: learning rate, set per step by any torch scheduler.
        betas, eps: as in Adam.
        total_steps: T, which schedules of a method refer to. Part of the method: a state saved under another T is
            refused.
        settings: the subclass's own, defaults of its groups.

    Raises:
        InputError: an argument is out of range, or a parameter cannot be trained so.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        *,
        total_steps: int,
        **settings: Any,
    ) -> None:
        decay = settings.get("decay", 0.0)
        if lr < 0 or eps < 0 or decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise InputError(
                f"{type(self).__name__} needs lr, eps, decay >= 0 and betas in [0, 1), got {lr=}, {eps=}, {decay=}, "
                f"{betas=}"
            )
        if total_steps < 1:
            raise InputError(f"{type(self).__name__} needs total_steps >= 1, got {total_steps}")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "total_steps": total_steps,
            "sparse": False,
            "transposed": False,
            "mask_interval": 10,
            "step": 0,
            "mask_flips": 0,
        }
        super().__init__(params, {**defaults, **settings})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for p in group["params"]:
            if p.dtype not in (torch.float32, torch.float64):
                raise InputError(
                    f"{type(self).__name__} updates float32 weights, got {p.dtype}: keep master weights in float32 and "
                    "use autocast"
                )
            if group["sparse"] and p.shape[0 if group["transposed"] else -1] % 4:
                raise InputError(
                    f"a weight of shape {list(p.shape)} cannot be 2:4: its input axis is not divisible by 4"
                )

    @torch.no_grad()
    def start(self) -> None:
        """Call before the first forward pass, for methods whose forward needs a mask; else and later nothing."""

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Call before gradients are clipped, for methods that never use those of masked weights; else nothing."""

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Do one update. InputError after total_steps of them, where the schedule has no meaning."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            t = group["step"]
            if t >= group["total_steps"]:
                raise InputError(
                    f"{type(self).__name__} was made for {group['total_steps']} steps and has done them all"
                )
            if group["sparse"]:
                self._sparse_step(group, t)
            else:
                for params, grads, momenta, variances in self._buckets(group, self._adam_tensors):
                    self._adam(params, grads, momenta, variances, group, t, group["betas"][0], group["lr"])
            group["step"] = t + 1
        return loss

    @abstractmethod
    def _sparse_step(self, group: dict[str, Any], t: int) -> None:
        """Do 0-based step t of a sparse group, mask refresh included."""

    @property
    def mask_flips(self) -> int:
        """Mask bits that the last refresh changed, over this rank's rows; 0 before the second refresh."""
        return sum(group["mask_flips"] for group in self.param_groups)

    @torch.no_grad()
    def refresh_masks(self) -> None:
        """Recompute every mask from the weights as they are now."""
        for group in self._sparse_groups():
            self._refresh(group)

    @torch.no_grad()
    def health(self) -> dict[str, float]:
        """Return mean |masked| and mean |kept| weight, and the mask flips of the last refresh."""
        masked, kept, flips = self._over_ranks(*self._magnitudes(), self.mask_flips)
        count = sum(p.numel() for group in self._sparse_groups() for p in group["params"]) / 2
        return {"masked": masked / count, "kept": kept / count, "mask_flips": flips}

    def _magnitudes(self) -> tuple[Tensor, Tensor]:
        """Return the sums of |masked| and of |kept| over this rank's rows."""
        masked, kept = [], []
        for group in self._sparse_groups():
            for p in group["params"]:
                weight, mask = self._ranked(p), local(self.state[p]["mask"]).view(torch.uint8)
                masked.append(torch.linalg.vector_norm(weight * (mask ^ 1), 1))
                kept.append(torch.linalg.vector_norm(weight * mask, 1))
        return torch.stack(masked).sum(), torch.stack(kept).sum()

    def _over_ranks(self, *values: Tensor | float) -> list[float]:
        """Sum what each rank computed from its rows; every rank must ask."""
        p = next(self._sparse_groups())["params"][0]
        together = torch.stack([torch.as_tensor(value, dtype=torch.float32, device=p.device) for value in values])
        return sum_of_pieces(together, p).tolist()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict()` gave. InputError if it was saved under another total_steps."""
        for own, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            if own["total_steps"] != saved["total_steps"]:
                raise InputError(
                    f"this optimizer state belongs to a run of {saved['total_steps']} steps, not of "
                    f"{own['total_steps']}: its schedule goes over the whole run, so continue with the same number"
                )
        super().load_state_dict(state_dict)
        for state in self.state.values():
            if "mask" in state:  # torch casts all state to the parameter's dtype
                state["mask"] = state["mask"].bool()

    def _sparse_groups(self) -> Iterator[dict[str, Any]]:
        return (group for group in self.param_groups if group["sparse"])

    def _ranked(self, p: Tensor) -> Tensor:
        """Return the local weight whose magnitudes decide the mask."""
        return local(p)

    def _new_mask(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        """Return the mask (of this rank's shard) that a refresh gives p now."""
        weight = self._ranked(p)
        return nm_mask(weight.t()).t().contiguous() if group["transposed"] else nm_mask(weight)

    def _refresh(self, group: dict[str, Any]) -> None:
        flips = []
        for p in group["params"]:
            mask = self._new_mask(p, group)
            state = self.state[p]
            if "mask" in state:
                flips.append((local(state["mask"]) != mask).sum())
            else:
                state["mask"] = torch.zeros_like(p, dtype=torch.bool)
            local(state["mask"]).copy_(mask)
        group["mask_flips"] = int(torch.stack(flips).sum()) if flips else 0

    def _zero_masked_gradients(self) -> None:
        for group in self._sparse_groups():
            for _, grads, _, _, masks in self._buckets(group, self._masked_tensors):
                zero_masked(grads, masks)

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

    def _adam_tensors(self, p: Tensor) -> list[Tensor]:
        """Return (p, its gradient, first and second moment)."""
        state = self.state[p]
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(p)
            state["exp_avg_sq"] = torch.zeros_like(p)
        assert p.grad is not None
        return [p, p.grad, state["exp_avg"], state["exp_avg_sq"]]

    def _masked_tensors(self, p: Tensor) -> list[Tensor]:
        """Return (p, its gradient, first and second moment, mask)."""
        return [*self._adam_tensors(p), self.state[p]["mask"]]

    @staticmethod
    def _buckets(group: dict[str, Any], tensors_of: Callable[[Tensor], list[Tensor]]) -> Iterator[list[list[Tensor]]]:
        """Yield one list for each tensor that `tensors_of` a parameter gives: whole tensors or flat pieces of them."""
        bucket: list[list[Tensor]] = []
        filled = 0
        for p in group["params"]:
            if p.grad is None:
                continue
            tensors = [local(tensor) for tensor in tensors_of(p)]
            size = _CPU_BUCKET if tensors[0].device.type == "cpu" else _ACCELERATOR_BUCKET
            if all(tensor.is_contiguous() for tensor in tensors):
                pieces = zip(*(tensor.view(-1).split(size) for tensor in tensors), strict=True)
            else:
                pieces = zip(*((tensor,) for tensor in tensors), strict=True)
            for piece in pieces:
                if filled and filled + piece[0].numel() > size:
                    yield bucket
                    bucket, filled = [], 0
                bucket = bucket or [[] for _ in piece]
                for column, tensor in zip(bucket, piece, strict=True):
                    column.append(tensor)
                filled += piece[0].numel()
        if filled:
            yield bucket


def zero_masked(tensors: list[Tensor], masks: list[Tensor]) -> None:
    """Make zero, in place, what is not kept by a mask (bool, 1 = kept)."""
    torch._foreach_mul_(tensors, [mask.view(torch.uint8) for mask in masks])
