"""Walk a model's transformer blocks: each linear's inputs on calibration text, behind the blocks already changed."""

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from conversion.progress import track

SEQUENCES_PER_FORWARD = 8

BlockCall = tuple[tuple[Any, ...], dict[str, Any]]
"""What a block is called with; the hidden states are its first argument."""


class Reached(Exception):
    """Ends the model's forward where all that was wanted of it has been seen."""


def walk_blocks(
    model: PreTrainedModel, calibration: Tensor, description: str
) -> Iterator[tuple[nn.Module, list[BlockCall]]]:
    """Yield each block with its calls, one a batch, behind the blocks before it as the caller left them."""
    training = model.training
    model.eval()
    blocks = transformer_blocks(model)
    kinds = getattr(model.config, "layer_types", None) or ["every"] * len(blocks)
    given = [_first_calls(model, blocks, kinds, batch) for batch in calibration.split(SEQUENCES_PER_FORWARD)]
    hidden = [of_kind[kinds[0]][0][0] for of_kind in given]
    for block, kind in track(list(zip(blocks, kinds, strict=True)), description):
        calls = [((x, *of_kind[kind][0][1:]), of_kind[kind][1]) for x, of_kind in zip(hidden, given, strict=True)]
        yield block, calls
        hidden = [forward(block, call) for call in calls]
    model.train(training)


def forward(block: nn.Module, call: BlockCall) -> Tensor:
    """The hidden states that a block returns."""
    args, kwargs = call
    output = block(*args, **kwargs)
    return output[0] if isinstance(output, tuple) else output


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
    for block, calls in walk_blocks(model, calibration, description):
        yield _block_sums(block, [module for module in block.modules() if module in linears], calls, of)


def transformer_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """Return the transformer blocks, which every supported family holds as one ModuleList."""
    count = model.config.num_hidden_layers
    return list(next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count))


def _first_calls(
    model: PreTrainedModel, blocks: list[nn.Module], kinds: Sequence[str], batch: Tensor
) -> dict[str, BlockCall]:
    """What the first block of each kind is called with: those with a sliding window get a mask of their own."""
    found: dict[str, BlockCall] = {}

    def catch(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.setdefault(kinds[blocks.index(block)], (args, kwargs))
        if len(found) == len(set(kinds)):
            raise Reached

    handles = [block.register_forward_pre_hook(catch, with_kwargs=True) for block in blocks]
    with contextlib.suppress(Reached):
        model(batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def _block_sums(
    block: nn.Module, linears: list[nn.Module], calls: list[BlockCall], of: Callable[[Tensor], Tensor]
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
    for call in calls:
        forward(block, call)
        last = None
    for handle in handles:
        handle.remove()
    return sums
