"""Can decay bring the masked weights to zero with this schedule? Known before the first step (CAST, Sec. IV-A)."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cast_train.config import CastConfig
from cast_train.dtensor import whole
from cast_train.mask import nm_mask
from cast_train.schedule import lr_factor
from cast_train.sparse_model import is_transposed, scope
from conversion.errors import InputError

_SAMPLE = 1 << 24  # magnitudes that the percentile is taken of
_MANY_STEPS = 50_000  # from here on the distance grows as the number of steps does: moments follow within a thousand


@dataclass(frozen=True)
class DecayBudget:
    """How far decay can carry a masked weight, against how far the masked weights have to go.

    Attributes:
        distance: how far, in units of the weights.
        masked_mean: mean magnitude of the masked weights now.
        masked_p99: their 99th percentile.
        lr: peak learning rate.
        steps: number of steps.
        lr_needed: peak learning rate that covers masked_p99 in as many steps; None without decay, or in a single step.
        steps_needed: number of steps that covers it at this learning rate; None without decay.
    """

    distance: float
    masked_mean: float
    masked_p99: float
    lr: float
    steps: int
    lr_needed: float | None
    steps_needed: int | None

    @property
    def hopeless(self) -> bool:
        """Not even a masked weight of average size can reach zero."""
        return self.distance < self.masked_mean

    def check(self) -> None:
        """InputError, naming the learning rate or step count that would do, if the schedule is hopeless."""
        if not self.hopeless:
            return
        if self.steps_needed is None:
            raise InputError(
                f"a decay of 0 moves no masked weight, and they average {self.masked_mean:.2g}, so the cut would hurt: "
                "give a decay ('auto' measures one), start from masked weights of zero (a warm start), or force it"
            )
        faster = "" if self.lr_needed is None else f"learning rate {self.lr_needed:.2g} or "
        raise InputError(
            f"decay can move a weight by {self.distance:.2g} in {self.steps} steps at learning rate {self.lr:.2g}, but "
            f"masked weights average {self.masked_mean:.2g} (99th percentile {self.masked_p99:.2g}), so the cut would "
            f"hurt: use {faster}{self.steps_needed} steps, start from smaller masked weights (a warm start), or force "
            "it"
        )

    def __str__(self) -> str:
        verdict = "enough for most, not for all"
        if self.hopeless:
            verdict = "hopeless"
        elif self.distance >= self.masked_p99:
            verdict = "enough"
        return (
            f"decay can move a weight by {self.distance:.3g}; masked weights average {self.masked_mean:.3g}, "
            f"99th percentile {self.masked_p99:.3g}: {verdict}"
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def decay_budget(model: PreTrainedModel, config: CastConfig, momentum: float | None = None) -> DecayBudget:
    """Compare the distance that decay can cover with the magnitudes of the weights that are masked now.

    Args:
        model: dense or sparsified.
        config: its schedule, and its decay if `momentum` is given.
        momentum: root mean square of the momentum on masked weights. With it the distance is what AdamS is expected
            to do to a masked weight whose gradients are noise of that size; without, the rule of thumb sum(lr_t * a_t),
            which late in a long run does not depend on decay.
    """
    count = sum(module.weight.numel() // 2 for _, module in scope(model))
    stride = math.ceil(count / _SAMPLE)
    sampled, total = [], 0.0
    for magnitudes in masked_magnitudes(model):
        total += magnitudes.sum(dtype=torch.float64).item()
        sampled.append(magnitudes[::stride].to("cpu", copy=True))  # a view would keep the layer's all on the device
    sample = torch.cat(sampled)
    p99 = torch.kthvalue(sample, math.ceil(0.99 * sample.numel())).values.item()

    distance = _distance(config, config.total_steps, momentum)
    lr_needed = config.lr * p99 / distance if distance else None
    steps_needed = None if config.decay == 0 else _steps_needed(config, p99, momentum)
    return DecayBudget(distance, total / count, p99, config.lr, config.total_steps, lr_needed, steps_needed)


@torch.no_grad()
def masked_magnitudes(model: PreTrainedModel) -> Iterator[Tensor]:
    """Yield, layer by layer, the magnitudes [count] of the weights that the mask of now would cut."""
    for _, module in scope(model):
        weight = whole(module.weight)
        weight = weight.t() if is_transposed(module) else weight
        yield weight[~nm_mask(weight)].abs()


def _steps_needed(config: CastConfig, far: float, momentum: float | None) -> int:
    """Return the least number of steps, to one percent and not below the config's, that covers the distance `far`."""
    few = enough = config.total_steps
    while (distance := _distance(config, enough, momentum)) < far:
        if enough >= _MANY_STEPS:
            return math.ceil(enough * far / distance)
        few, enough = enough, 2 * enough
    while enough - few > 1 + few // 100:
        middle = (few + enough) // 2
        if _distance(config, middle, momentum) < far:
            few = middle
        else:
            enough = middle
    return enough


def _distance(config: CastConfig, steps: int, momentum: float | None) -> float:
    """Sum the expected moves of a masked weight towards zero (Algorithm 1, with E[mu~^2] in the place of mu~^2)."""
    beta1, beta2 = config.betas
    distance = v = 0.0
    for t in range(steps) if config.decay else ():
        lr = config.lr * lr_factor(t, steps, config.warmup_ratio, config.schedule)
        ramp = t / steps
        if momentum is None:
            distance += lr * ramp
            continue
        if config.decay == "auto":
            raise InputError("the decay must be measured before its budget is")
        pull = ramp * config.decay
        if config.second_moment == "update":
            noise = ((1 - ramp) * momentum) ** 2 * (1 - beta1 ** (2 * (t + 1)))  # the momentum starts at zero
            square = noise + pull**2
        else:
            square = momentum**2 * (1 + beta1) / (1 - beta1)  # of the gradient, see measure_momentum
        v = beta2 * v + (1 - beta2) * square
        distance += lr * (pull / (1 - beta1 ** (t + 1))) / (math.sqrt(v / (1 - beta2 ** (t + 1))) + config.eps)
    return distance
