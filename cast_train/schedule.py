"""The learning rate over a run: linear warm-up, then down to zero, or constant as an ablation."""

import math
from typing import Literal

Schedule = Literal["linear", "cosine", "constant"]


def lr_factor(step: int, total_steps: int, warmup_ratio: float, schedule: Schedule) -> float:
    """Return the learning rate of 0-based `step` as a part of the peak; a falling one is zero at step `total_steps`."""
    warmup_steps = math.ceil(total_steps * warmup_ratio)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
