"""Walk a model's transformer blocks: each linear's inputs on calibration text, behind the blocks already changed."""

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from conversion.progress import track

SEQUENCES_PER_FORWARD = 8

BlockInputs = tuple[tuple[Any, ...], dict[str, Any]]


class _FirstBlockReached(Exception):
    """Carries the first block's inputs out of the model's forward."""


def input_grams(
    model: PreTrainedModel, linears: Collection[nn.Module], calibration: Tensor, description: str
) -> Iterator[dict[nn.Module, Tensor]]:
    """`input_sums` of X^T X [K, K]."""
    return input_sums(model, linears, calibration, description, lambda x_TK: x_TK.T @ x_TK)


@torch.no_grad()
def input_sums(
    model: PreTrainedModel,
    linears: Collection[nn.Module],
    calibration: Tensor,
    description: str,
    of: Callable[[Tensor], Tensor],
) -> Iterator[dict[nn.Module, Tensor]]:
    """For each block in turn, yield the sum of `of` the inputs X [T, K] of those of its modules that are in `linears`.

    What the caller does to a block's weights before it asks for the next is what later blocks' inputs come through.

    Args:
        model: a causal language model; it is put into evaluation mode, and back at the end.
        linears: modules that take one input [..., K].
        calibration: int64 token ids [samples, length].
        description: of the progress bar.
        of: of a batch's inputs, added up over the batches.
    """
    training = model.training
    model.eval()
    blocks = transformer_blocks(model)
    inputs = [_first_block_inputs(model, blocks[0], batch) for batch in calibration.split(SEQUENCES_PER_FORWARD)]
    for block in track(blocks, description):
        yield _block_sums(block, [module for module in block.modules() if module in linears], inputs, of)
        inputs = [((_forward(block, args, kwargs), *args[1:]), kwargs) for args, kwargs in inputs]
    model.train(training)


def transformer_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """Return the transformer blocks, which every supported family holds as one ModuleList."""
    count = model.config.num_hidden_layers
    return list(next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count))


def _first_block_inputs(model: PreTrainedModel, first: nn.Module, batch: Tensor) -> BlockInputs:
    def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _FirstBlockReached(args, kwargs)

    handle = first.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        model(batch, use_cache=False)
    except _FirstBlockReached as reached:
        return reached.args[0], reached.args[1]
    finally:
        handle.remove()
    raise AssertionError("the model's forward never reached its first block")


def _block_sums(
    block: nn.Module, linears: list[nn.Module], inputs: list[BlockInputs], of: Callable[[Tensor], Tensor]
) -> dict[nn.Module, Tensor]:
    """Linears that read the same tensor (q, k, v) share one sum."""
    sums: dict[nn.Module, Tensor] = {}
    last: tuple[Tensor, Tensor] | None = None

    def accumulate(module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal last
        if last is None or last[0] is not args[0]:
            last = (args[0], of(args[0].reshape(-1, args[0].shape[-1])))
        sums[module] = sums[module] + last[1] if module in sums else last[1]

    handles = [linear.register_forward_pre_hook(accumulate) for linear in linears]
    for args, kwargs in inputs:
        _forward(block, args, kwargs)
        last = None
    for handle in handles:
        handle.remove()
    return sums


def _forward(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    output = block(*args, **kwargs)
    return output[0] if isinstance(output, tuple) else output
