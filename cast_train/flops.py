"""The arithmetic of one training token, from which speed is predicted and utilization computed."""

from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cast_train.config import TrainConfig
from cast_train.scaling import ScaledLinear


@dataclass(frozen=True)
class TokenFlops:
    """Floating-point operations for one token, a multiply-add counting as two.

    What gradient checkpointing computes a second time is not counted, so that utilization (MFU) compares useful work.
    """

    student_forward: float
    student_backward: float
    teacher: float

    @property
    def total(self) -> float:
        return self.student_forward + self.student_backward + self.teacher


def token_flops(model: PreTrainedModel, config: TrainConfig) -> TokenFlops:
    """Count the products of a training token: linears, lm_head and causal attention over half a block on average.

    Args:
        model: the student, sparsified or not; it may lie on the meta device.
        config: its block length, teacher and frozen parts.
    """
    linears = sum(
        module.weight.numel()
        for name, module in model.base_model.named_modules()
        if isinstance(module, nn.Linear | Conv1D | ScaledLinear)
    )
    head = model.get_output_embeddings().weight.numel()
    # scores and their product with the values: 2 * 2 * width * length / 2 per layer
    attention = model.config.num_hidden_layers * 2 * attention_width(model.config) * config.block_length
    forward = 2 * (linears + head) + attention
    backward = 4 * linears + (4 if config.train_embeddings else 2) * head + 2 * attention
    return TokenFlops(forward, backward, forward if config.runs_teacher else 0.0)


def attention_width(config: PretrainedConfig) -> int:
    """Return heads times their size."""
    heads: int = config.num_attention_heads
    return heads * int(getattr(config, "head_dim", None) or config.hidden_size // heads)
