"""A transformers model with the dense weights of a checkpoint, packed or not."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.utils.quantization_config import QuantizationConfigMixin

from conversion.checkpoint import Checkpoint
from conversion.errors import InputError
from conversion.packed_checkpoint import PackedCheckpoint
from conversion.progress import without_transformers_bars


def dense_config(checkpoint: Checkpoint | PackedCheckpoint) -> PretrainedConfig:
    """The model's config without the marks of packing."""
    fields = checkpoint.config.copy()
    fields.pop("quantization_config", None)
    config: PretrainedConfig = AutoConfig.for_model(**fields)
    return config


def context_length(checkpoint: Checkpoint | PackedCheckpoint) -> int:
    """The most tokens that the model's positions reach."""
    context: int = dense_config(checkpoint).max_position_embeddings
    return context


def dense_model(
    checkpoint: Checkpoint | PackedCheckpoint, dtype: torch.dtype | None = None, linear_dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """Build the causal language model of a checkpoint, in evaluation mode on the CPU.

    Packed weights are unpacked: masked entries are exact zeros. Holds the whole dense model in memory.

    Args:
        checkpoint: an open checkpoint of either kind.
        dtype: dtype of the weights; None takes the narrowest that holds all of them exactly.
        linear_dtype: dtype to round the linears of the blocks to first; None does not round.

    Raises:
        InputError: a tensor is missing, unexpected, damaged or of another shape than config.json implies.
    """
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.names}
    if linear_dtype is not None:
        tensors |= {name: tensors[name].to(linear_dtype) for name in checkpoint.scope}
    return model_of(checkpoint, tensors, dtype or checkpoint.dtype)


def model_of(
    checkpoint: Checkpoint | PackedCheckpoint,
    tensors: dict[str, Tensor],
    dtype: torch.dtype,
    quantizer: QuantizationConfigMixin | None = None,
) -> PreTrainedModel:
    """Build the causal language model of a checkpoint from `tensors`, in evaluation mode on the CPU.

    Args:
        checkpoint: whose config and family the model follows.
        tensors: by the names that they have in the dense checkpoint.
        dtype: of the floating weights.
        quantizer: config of a quantizer registered with transformers, which puts other modules into the model before
            `tensors` are loaded into it.

    Raises:
        InputError: a tensor is missing, or of another shape than config.json implies.
    """
    config = dense_config(checkpoint)
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with _quiet_loading():
        try:
            model, info = model_class.from_pretrained(
                None,
                config=config,
                state_dict=tensors,
                dtype=dtype,
                quantization_config=quantizer,
                output_loading_info=True,
            )
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise InputError(f"the tensors of {checkpoint.directory} do not fit its config.json: {reason}") from None
    for what, names in (("is missing from", info["missing_keys"]), ("has the wrong shape in", info["mismatched_keys"])):
        if names:
            raise InputError(f"tensor '{sorted(map(str, names))[0]}' {what} {checkpoint.directory}: make it again")
    result: PreTrainedModel = model.eval()
    return result


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Keep transformers' loading report off the terminal: what matters in it is raised as one sentence."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.CRITICAL)
    try:
        with without_transformers_bars():
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
