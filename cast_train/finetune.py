"""`cast train --finetune`: a finished 2:4 model in, the same zeros out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cast_train.methods.finetune import FinetuneConfig
from cast_train.training import train
from conversion.checkpoint import Checkpoint
from conversion.errors import InputError
from conversion.hub import local_model


def finetune(
    source: str | Path, data: Sequence[str], out: str | Path, config: FinetuneConfig, **options: Any
) -> dict[str, Any]:
    """Fine-tune the exactly 2:4 model `source` and save it to `out`; return what training.json says.

    Every zero of a linear in scope is exactly zero in `out`; with full fine-tuning all other weights train, with a LoRA
    rank only an update of them. Arguments and errors as for `cast_train.training.train`.

    Raises:
        InputError: also if `source` is not 2:4; the first offending tensor, row and group are named.
    """
    directory = local_model(source)
    if (violation := Checkpoint(directory).first_violation()) is not None:
        raise InputError(f"{directory} is not 2:4: {violation}; train it to 2:4 first, without --finetune")
    return train(source, data, out, config, **options)
