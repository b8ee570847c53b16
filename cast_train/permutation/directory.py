"""`cast permute`: a dense model directory in; out one that computes the same, its channels in a better order."""

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from cast_train.config import TrainConfig
from cast_train.oneshot.calibration import read_calibration
from cast_train.permutation.permute import permute
from cast_train.saving import save_model
from conversion.atomic import new_directory
from conversion.checkpoint import Checkpoint
from conversion.dense_model import context_length, dense_model
from conversion.errors import InputError
from conversion.hub import local_model
from conversion.tokenizer import load_tokenizer


def permute_directory(
    source: str | Path, data: Sequence[str], out: Path, config: TrainConfig, overwrite: bool = False
) -> None:
    """Permute the model `source` and save it, in its own dtype, to the new directory `out`.

    Of `config` only calibration_tokens, block_length and seed matter. InputError if anything given is wrong.
    """
    directory = local_model(source)
    with new_directory(out, overwrite, directory) as building:
        dense = Checkpoint(directory)
        if dense.first_violation() is None:
            raise InputError(f"{directory} is 2:4 already, which another order would undo: give the dense model")
        tokenizer = load_tokenizer(directory)
        model = dense_model(dense, torch.float32)
        calibration = read_calibration(data, dense, tokenizer, config.within_context(context_length(dense)))
        gains = permute(model, calibration)
        save_model(model, tokenizer, directory, building)
    console = Console(highlight=False)
    for gain in gains:
        console.print(f"{gain.kind}: 2:4 cuts {gain.after:.1%} instead of {gain.before:.1%} of what is put out")
    console.print(f"saved {out}")
