"""Quantizing a checkpoint's linears, 2:4 or dense, on calibration text."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from conversion.checkpoint import Checkpoint
from conversion.dense_model import context_length
from conversion.errors import InputError
from conversion.families import place_in_blocks
from conversion.quantization.formats import Quantization
from conversion.quantization.quantize import quantize_model
from conversion.text import read_documents
from conversion.tokenizer import load_tokenizer

CALIBRATION_TOKENS = 32_768
SEQUENCE_TOKENS = 512


def calibrated_codes(
    model: PreTrainedModel,
    source: Checkpoint,
    quantization: Quantization,
    data: Sequence[str | Path],
    tokens: int = CALIBRATION_TOKENS,
    *,
    sparse: bool,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Quantize the linears in the scope of a checkpoint in place; return codes [N, K] and scales [N, G] by tensor name.

    Args:
        model: of `source`, float32.
        source: where its tokenizer lies, too.
        quantization: format and groups.
        data: text files; the first `tokens` tokens of them are used.
        tokens: most tokens to calibrate on.
        sparse: keep zero weights at zero (a 2:4 model); else every weight may move.

    Raises:
        InputError: there is no text, too little of it, or no tokenizer in the source's directory.
    """
    length = min(SEQUENCE_TOKENS, context_length(source))
    calibration = calibration_sequences(data, load_tokenizer(source.directory), length, tokens)
    names = {module: name for name, module in scope_modules(model, source).items()}
    found = quantize_model(model, names, quantization, calibration, sparse=sparse)
    return {
        # stored by the byte: codes are whole numbers, or 8-bit floats
        names[linear]: (codes.to(torch.int8 if quantization.values.bits == 4 else quantization.values.dtype), scale)
        for linear, codes, scale in found
    }


def calibration_sequences(
    data: Sequence[str | Path], tokenizer: PreTrainedTokenizerBase, length: int, tokens: int
) -> Tensor:
    """Return int64 token ids [samples, length]: documents joined by the EOS token, as many as make `tokens` tokens.

    Raises:
        InputError: there is no text, or less than one sequence of it.
    """
    ids: list[int] = []
    for document in read_documents(data):
        ids += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        if tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        if len(ids) >= tokens:
            break
    samples = min(len(ids), tokens) // length
    if samples == 0:
        raise InputError(f"the calibration text has {len(ids)} tokens, less than one sequence of {length}: give more")
    return torch.tensor(ids[: samples * length]).view(samples, length)


def scope_modules(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, nn.Module]:
    """The model's linears by the checkpoint's tensor names, which may lack the base model's prefix."""
    family = checkpoint.family
    by_place = {place_in_blocks(family, f"{name}.weight"): module for name, module in model.named_modules()}
    return {name: by_place[place_in_blocks(family, name)] for name in checkpoint.scope}
