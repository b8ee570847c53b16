"""The text that one-shot methods and the search for an order of channels see."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cast_train.config import TrainConfig
from cast_train.dataset import TokenBlocks, TokenCache, check_vocabulary, load_tokens
from cast_train.self_data import with_samples
from conversion.checkpoint import Checkpoint
from conversion.dense_model import dense_config


def calibration_samples(tokens: TokenCache, config: TrainConfig) -> Tensor:
    """Return int64 token ids [samples, block_length] drawn from the training text, `calibration_tokens` in all."""
    samples = max(1, config.calibration_tokens // config.block_length)
    blocks = TokenBlocks(tokens, config.block_length, samples, config.seed)
    return torch.stack([blocks[i]["input_ids"] for i in range(samples)])


def read_calibration(
    data: Sequence[str], dense: Checkpoint, tokenizer: PreTrainedTokenizerBase, config: TrainConfig
) -> Tensor:
    """Tokenize as much of the text `data` as is needed, and draw `calibration_samples` from it.

    InputError if the text is too short, or the tokenizer is not that of the model `dense`.
    """
    texts = with_samples(data, dense, tokenizer, config.calibration_tokens, config.block_length)
    tokens = load_tokens(texts, tokenizer, needed=config.calibration_tokens)
    calibration = calibration_samples(tokens, config)
    check_vocabulary(int(calibration.max()), dense_config(dense).vocab_size, dense.directory)
    return calibration
