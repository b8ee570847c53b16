"""The text that one-shot methods see."""

import torch
from torch import Tensor

from cast_train.config import TrainConfig
from cast_train.dataset import TokenBlocks, TokenCache


def calibration_samples(tokens: TokenCache, config: TrainConfig) -> Tensor:
    """Return int64 token ids [samples, block_length] drawn from the training text, `calibration_tokens` in all."""
    samples = max(1, config.calibration_tokens // config.block_length)
    blocks = TokenBlocks(tokens, config.block_length, samples, config.seed)
    return torch.stack([blocks[i]["input_ids"] for i in range(samples)])
