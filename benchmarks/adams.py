"""Step time of AdamS against torch's AdamW(foreach=True), on the parameter shapes of SmolLM2-135M.

Run: python -m benchmarks.adams
The two alternate, a block of ten steps each (one mask refresh per block), and medians of the blocks are compared.
"""

import json
import statistics
import time

import torch
from torch import Tensor

from cast_train.adams import AdamS

_LAYERS, _HIDDEN, _KV, _INTERMEDIATE, _VOCAB = 30, 576, 192, 1536, 49152
_BLOCK_STEPS, _BLOCKS = 10, 5


def _parameters(seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return (weights in scope, other weights) with random values and gradients, float32."""
    generator = torch.Generator().manual_seed(seed)
    linear_shapes = [
        (_HIDDEN, _HIDDEN),
        (_KV, _HIDDEN),
        (_KV, _HIDDEN),
        (_HIDDEN, _HIDDEN),
        (_INTERMEDIATE, _HIDDEN),
        (_INTERMEDIATE, _HIDDEN),
        (_HIDDEN, _INTERMEDIATE),
    ]

    def parameter(*shape: int) -> Tensor:
        tensor = torch.randn(shape, generator=generator).mul_(0.1).requires_grad_()
        tensor.grad = torch.randn(shape, generator=generator).mul_(1e-4)
        return tensor

    sparse = [parameter(*shape) for _ in range(_LAYERS) for shape in linear_shapes]
    dense = [parameter(_HIDDEN) for _ in range(2 * _LAYERS + 1)] + [parameter(_VOCAB, _HIDDEN)]
    return sparse, dense


def _block(optimizer: torch.optim.Optimizer) -> float:
    """Return the seconds per step over one block."""
    start = time.perf_counter()
    for _ in range(_BLOCK_STEPS):
        optimizer.step()
    return (time.perf_counter() - start) / _BLOCK_STEPS


def measure() -> dict[str, float]:
    sparse, dense = _parameters(0)
    groups: list[dict[str, object]] = [{"params": sparse, "sparse": True}, {"params": dense}]
    adams = AdamS(groups, lr=1e-4, total_steps=1000)
    sparse, dense = _parameters(0)
    adamw = torch.optim.AdamW(sparse + dense, lr=1e-4, foreach=True)
    times: dict[str, list[float]] = {"adams": [], "adamw": []}
    for block in range(_BLOCKS + 1):
        for name, optimizer in (("adams", adams), ("adamw", adamw)):
            seconds = _block(optimizer)
            if block:  # the first one warms up
                times[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "adams_s": round(medians["adams"], 4),
        "adamw_foreach_s": round(medians["adamw"], 4),
        "ratio": round(medians["adams"] / medians["adamw"], 3),
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    print(json.dumps(measure(), indent=1))
