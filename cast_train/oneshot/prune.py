"""Prune a model's linears in one shot, block by block, each behind the blocks already pruned."""

import torch
from torch import nn
from transformers import PreTrainedModel

from cast_train.methods import CALIBRATED, DRIFT_CORRECTED, ONE_SHOT
from cast_train.methods.magnitude import magnitude
from cast_train.sparse_model import linear_weight, scope
from conversion.block_walk import input_grams
from conversion.drift import drifting_inputs
from conversion.errors import InputError


@torch.no_grad()
def prune(model: PreTrainedModel, method: str, calibration: torch.Tensor | None = None, shrink: float = 0.0) -> None:
    """Prune every linear in scope in place.

    Args:
        model: a float32 causal language model.
        method: a key of `cast_train.methods.ONE_SHOT`.
        calibration: int64 token ids [samples, length]; needed by all but magnitude.
        shrink: masked weights are multiplied by this; 0 cuts them and makes the model exactly 2:4.

    Raises:
        InputError: unknown method, calibration text missing, or a weight that is not finite.
    """
    if method not in ONE_SHOT:
        raise InputError(f"unknown one-shot method '{method}': use one of {', '.join(ONE_SHOT)}")
    linears: set[nn.Module] = set()
    for name, module in scope(model):
        if not torch.isfinite(module.weight).all():
            raise InputError(
                f"'{name}' has a weight that is not finite (NaN or infinite): the model is damaged, so copy it again "
                "from where it came from"
            )
        linears.add(module)
    if method == "magnitude":
        for linear in linears:
            _write(linear, magnitude(linear_weight(linear), shrink))
        return
    if calibration is None:
        raise InputError(f"{method} needs calibration text: give training data")

    description = f"{method}: pruning blocks"
    if method in DRIFT_CORRECTED:
        for inputs in drifting_inputs(model, linears, calibration, description):
            for linear in inputs.linears:
                target = inputs.corrected(linear_weight(linear))
                _write(linear, CALIBRATED[method](target, inputs.gram, shrink))
        return
    for grams in input_grams(model, linears, calibration, description):
        for linear, gram in grams.items():
            _write(linear, CALIBRATED[method](linear_weight(linear), gram, shrink))


def _write(linear: nn.Module, weight: torch.Tensor) -> None:
    linear_weight(linear).copy_(weight)
