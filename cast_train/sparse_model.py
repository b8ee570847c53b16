"""Take a dense model into training and out of it again."""

from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cast_train.config import TrainConfig
from cast_train.mask import nm_mask
from cast_train.methods import trained_method
from cast_train.methods.finetune import fold_low_rank
from cast_train.scaling import ScaledLinear
from conversion.errors import InputError
from conversion.families import family_of, in_scope


def scope(model: PreTrainedModel) -> Iterator[tuple[str, nn.Linear | Conv1D | ScaledLinear]]:
    """Yield (name, module) of the layers that become 2:4: all linears in the blocks, K a multiple of 8."""
    family = family_of(model.config.model_type)
    for name, module in model.named_modules():
        linear = isinstance(module, nn.Linear | Conv1D | ScaledLinear)
        if linear and in_scope(family, f"{name}.weight", module.weight.shape):
            yield name, module


def is_transposed(module: nn.Module) -> bool:
    """Tell whether a layer stores its weight as [in, out]."""
    return module.transposed if isinstance(module, ScaledLinear) else isinstance(module, Conv1D)


def linear_weight(module: nn.Module) -> torch.Tensor:
    """Return a layer's weight as [out, in], a view, whatever it stores."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight.T if is_transposed(module) else weight


def sparsify(model: PreTrainedModel, config: TrainConfig) -> PreTrainedModel:
    """Prepare a dense float32 model for the config's method, in place: for CAST weight scaling is attached.

    What the config freezes is frozen.

    Raises:
        InputError: the model's family is not supported, or nothing in it can be 2:4.
    """
    layers: list[tuple[str, nn.Module]] = list(scope(model))
    if not layers:
        raise InputError("the model has no linear layer whose input size is a multiple of 8, so nothing can be 2:4")
    trained_method(config).prepare(model, layers)
    if not config.train_embeddings:
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            if module is not None:
                module.requires_grad_(False)
    return model


@torch.no_grad()
def finalize(model: PreTrainedModel) -> PreTrainedModel:
    """Cut every layer in scope to exact 2:4, by the mask of its weights as they are now, and fold in what was attached.

    In place; afterwards the model is plain again and computes what it did, but for the masked weights.
    """
    fold_low_rank(model)
    for name, module in list(scope(model)):
        weight = module.weight
        mask = nm_mask(weight.t()).t() if is_transposed(module) else nm_mask(weight)
        weight.mul_(mask)
        if isinstance(module, ScaledLinear):
            model.set_submodule(name, module.fold())
        weight.add_(0.0)  # turns -0.0 into +0.0
    return model
