"""`cast train --method` with a one-shot method: a dense model directory in, an exact 2:4 one out, no training."""

from collections.abc import Sequence
from pathlib import Path

import torch

from cast_train.config import CONFIGS, TrainConfig
from cast_train.methods import CALIBRATED, ONE_SHOT
from cast_train.oneshot.calibration import read_calibration
from cast_train.oneshot.prune import prune
from cast_train.saving import save_model
from conversion.atomic import new_directory
from conversion.checkpoint import Checkpoint
from conversion.dense_model import context_length, dense_model
from conversion.errors import InputError
from conversion.hub import local_model
from conversion.tokenizer import load_tokenizer


def prune_directory(
    source: str | Path, data: Sequence[str], out: Path, method: str, config: TrainConfig, overwrite: bool = False
) -> None:
    """Prune the model `source` with `method` and save it, in the dtype it has, to the new directory `out`.

    Of `config` only calibration_tokens, block_length and seed matter. InputError if anything given is wrong.
    """
    if method not in ONE_SHOT:
        raise InputError(f"unknown method '{method}': use {', '.join([*CONFIGS, *ONE_SHOT])}")
    directory = local_model(source)
    with new_directory(out, overwrite, directory) as building:
        dense = Checkpoint(directory)
        config = config.within_context(context_length(dense))
        model = dense_model(dense, torch.float32)
        tokenizer = load_tokenizer(directory)
        calibration = None
        if method in CALIBRATED:
            calibration = read_calibration(data, dense, tokenizer, config)
        prune(model, method, calibration)
        save_model(model, tokenizer, directory, building)
