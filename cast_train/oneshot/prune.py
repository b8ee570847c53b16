"""Walk the transformer blocks: collect each linear's inputs behind the blocks already pruned, then prune it."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from cast_train.methods import CALIBRATED, ONE_SHOT
from cast_train.methods.magnitude import magnitude
from cast_train.sparse_model import is_transposed, scope
from conversion.errors import InputError
from conversion.progress import track

SEQUENCES_PER_FORWARD = 8


class _FirstBlockReached(Exception):
    """Carries the first block's inputs out of the model's forward."""


@torch.no_grad()
def prune(model: PreTrainedModel, method: str, calibration: torch.Tensor | None = None, shrink: float = 0.0) -> None:
    """Prune every linear in scope in place.

    Args:
        model: a float32 causal language model.
        method: a key of `cast_train.methods.ONE_SHOT`.
        calibration: int64 token ids [samples, length]; needed by wanda and sparsegpt.
        shrink: masked weights are multiplied by this; 0 cuts them and makes the model exactly 2:4.

    Raises:
        InputError: unknown method, or calibration text missing.
    """
    if method not in ONE_SHOT:
        raise InputError(f"unknown one-shot method '{method}': use one of {', '.join(ONE_SHOT)}")
    linears: set[nn.Module] = {module for _, module in scope(model)}
    if method == "magnitude":
        for linear in linears:
            _write(linear, magnitude(_read(linear), shrink))
        return
    if calibration is None:
        raise InputError(f"{method} needs calibration text: give training data")

    training = model.training
    model.eval()
    batches = calibration.split(SEQUENCES_PER_FORWARD)
    blocks = transformer_blocks(model)
    inputs = [_first_block_inputs(model, blocks[0], batch) for batch in batches]
    for block in track(blocks, f"{method}: pruning blocks"):
        own = [module for module in block.modules() if module in linears]
        grams = _gram_matrices(block, own, inputs)
        for linear in own:
            _write(linear, CALIBRATED[method](_read(linear), grams[linear], shrink))
        inputs = [((_forward(block, args, kwargs), *args[1:]), kwargs) for args, kwargs in inputs]
    model.train(training)


def transformer_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """Return the transformer blocks, which every supported family holds as one ModuleList."""
    count = model.config.num_hidden_layers
    return list(next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count))


def _read(linear: nn.Module) -> torch.Tensor:
    """The weight as [out, in] whatever the module stores."""
    weight = linear.weight
    assert isinstance(weight, torch.Tensor)
    return weight.T if is_transposed(linear) else weight


def _write(linear: nn.Module, weight: torch.Tensor) -> None:
    _read(linear).copy_(weight)


def _first_block_inputs(
    model: PreTrainedModel, first: nn.Module, batch: torch.Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
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


def _gram_matrices(
    block: nn.Module, linears: list[nn.Module], inputs: list[tuple[tuple[Any, ...], dict[str, Any]]]
) -> dict[nn.Module, torch.Tensor]:
    """Return X^T X [K, K] of each linear's inputs; linears that read the same tensor (q, k, v) share one matrix."""
    grams: dict[nn.Module, torch.Tensor] = {}
    last: tuple[torch.Tensor, torch.Tensor] | None = None

    def accumulate(module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal last
        if last is None or last[0] is not args[0]:
            x_TK = args[0].reshape(-1, args[0].shape[-1])
            last = (args[0], x_TK.T @ x_TK)
        grams[module] = grams[module] + last[1] if module in grams else last[1]

    handles = [linear.register_forward_pre_hook(accumulate) for linear in linears]
    for args, kwargs in inputs:
        _forward(block, args, kwargs)
        last = None
    for handle in handles:
        handle.remove()
    return grams


def _forward(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    output = block(*args, **kwargs)
    return output[0] if isinstance(output, tuple) else output
