"""What a changed model's linears are given and what their outputs are added to, beside the model as it was.

Blocks already changed make a linear's inputs X drift from the inputs X0 that it had, and the residual stream R, to
which some linears add their outputs, from R0. A weight can make up for both (as GPTAQ, arXiv:2504.02692, does for X).
"""

import contextlib
import copy
import functools
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from conversion.block_walk import BlockCall, Reached, forward, walk_blocks
from conversion.families import family_of
from conversion.hessian import damped

DAMPING = 0.5
"""Large, or the calibration text's own errors are learnt: ADMM on SmolLM2 with 24,576 tokens of it had perplexity 37.7,
35.3 and 35.0 on other text with 0.01, 0.1 and 0.5."""


@dataclass(frozen=True)
class DriftingInputs:
    """What linears that read the same tensor are given."""

    linears: list[nn.Module]
    gram: Tensor
    """X^T X [K, K]."""
    drift: Tensor
    """(X0 - X)^T X [K, K]."""
    stream_drift: Tensor | None
    """(R0 - R)^T X [N, K], R being what an output is added to; None where it is not added to the residual stream."""

    def corrected(self, weight: Tensor) -> Tensor:
        """Return the weight [N, K] that makes up for the drift: least squares, damped towards `weight`.

        That is, of `W X^T + R^T` nearest to `weight X0^T + R0^T`.
        """
        missing = weight @ self.drift
        if self.stream_drift is not None:
            missing += self.stream_drift
        return weight + torch.cholesky_solve(missing.T, torch.linalg.cholesky(damped(self.gram, DAMPING))).T


@torch.no_grad()
def drifting_inputs(
    model: PreTrainedModel, linears: Collection[nn.Module], calibration: Tensor, description: str
) -> Iterator[DriftingInputs]:
    """Yield what `linears` are given, those that read the same tensor at once, in the order in which they run.

    What the caller does to their weights before it asks for the next is what the next ones' inputs come through.

    Args:
        model: a causal language model of a supported family, put into evaluation mode, and back at the end.
        linears: modules of its blocks that take one input [..., K].
        calibration: int64 token ids [samples, length].
        description: of the progress bar.
    """
    adders = family_of(model.config.model_type).residual_adders
    share = getattr(model.config, "residual_multiplier", 1.0)  # Granite's: of an output, what is added
    before: list[Tensor] = []
    for block, calls in walk_blocks(model, calibration, description):
        before = before or [args[0] for args, _ in calls]
        original = copy.deepcopy(block)
        original_calls = [((x, *args[1:]), kwargs) for x, (args, kwargs) in zip(before, calls, strict=True)]
        names = {module: name for name, module in block.named_modules()}
        for readers in _readers(block, linears, calls[0]):
            first = names[readers[0]]
            stream = adders.get(first)
            pairs = (
                (_seen(block, first, stream, call), _seen(original, first, stream, original_call))
                for call, original_call in zip(calls, original_calls, strict=True)
            )
            products = (
                torch.cat([x_TK.T @ x_TK, (x0_TK - x_TK).T @ x_TK, (r0_TN - r_TN).T @ x_TK / share])
                for (x_TK, r_TN), (x0_TK, r0_TN) in pairs
            )
            sums = functools.reduce(torch.add, products)
            size = sums.shape[1]
            gram, drift, stream_drift = sums.split([size, size, len(sums) - 2 * size])
            yield DriftingInputs(readers, gram, drift, stream_drift if len(stream_drift) else None)
        before = [forward(original, call) for call in original_calls]


def _readers(block: nn.Module, linears: Collection[nn.Module], call: BlockCall) -> list[list[nn.Module]]:
    """The block's `linears` in the order in which they run, those that read the same tensor together."""
    groups: list[tuple[Tensor, list[nn.Module]]] = []

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        if not groups or groups[-1][0] is not args[0]:
            groups.append((args[0], []))
        groups[-1][1].append(module)

    handles = [module.register_forward_pre_hook(note) for module in block.modules() if module in linears]
    forward(block, call)
    for handle in handles:
        handle.remove()
    return [modules for _, modules in groups]


def _seen(block: nn.Module, linear: str, stream: str | None, call: BlockCall) -> tuple[Tensor, Tensor]:
    """Inputs [T, K] of the block's `linear`, and before it of `stream` [T, N], N being 0 where that did not run."""
    found: dict[str, Tensor] = {}

    def note(name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
        found[name] = args[0].reshape(-1, args[0].shape[-1])
        if name == linear:
            raise Reached

    handles = [
        block.get_submodule(name).register_forward_pre_hook(functools.partial(note, name))
        for name in (linear, stream)
        if name is not None
    ]
    with contextlib.suppress(Reached):
        forward(block, call)
    for handle in handles:
        handle.remove()
    x_TK = found[linear]
    return x_TK, found.get(stream or "", x_TK.new_empty(len(x_TK), 0))
