"""Every way to 2:4, one small file each.

One-shot methods are functions of one weight and its inputs, walked over a model by `cast_train.oneshot`; they need no
training and are the warm start of it. Trained methods are classes over a config (`cast_train.config`), run by
`cast_train.trainer`.
"""

from typing import Any

from cast_train.config import TrainConfig
from cast_train.methods.admm import admm
from cast_train.methods.ast import Ast
from cast_train.methods.cast import Cast
from cast_train.methods.finetune import Finetune
from cast_train.methods.gmp import Gmp
from cast_train.methods.magnitude import magnitude
from cast_train.methods.sparsegpt import sparsegpt
from cast_train.methods.srste import Srste
from cast_train.methods.trained import TrainedMethod
from cast_train.methods.wanda import wanda
from conversion.errors import InputError

__all__ = ["CALIBRATED", "DRIFT_CORRECTED", "ONE_SHOT", "TRAINED", "TrainedMethod", "trained_method"]

CALIBRATED = {"wanda": wanda, "sparsegpt": sparsegpt, "admm": admm}
"""One-shot methods that see calibration text: (weight [N, K], gram [K, K], shrink) -> weight."""
DRIFT_CORRECTED = {"admm"}
"""Those of them that aim at the dense model's outputs on its own inputs; the others are as published."""
ONE_SHOT = {"magnitude": magnitude, **CALIBRATED}

TRAINED: dict[str, type[TrainedMethod[Any]]] = {
    "cast": Cast,
    "srste": Srste,
    "gmp": Gmp,
    "ast": Ast,
    "finetune": Finetune,  # of a model that is 2:4 already; `cast_train.finetune`
}


def trained_method(config: TrainConfig) -> TrainedMethod[Any]:
    """Return the method that `config` belongs to. InputError if it is the bare base config."""
    if config.method not in TRAINED:
        raise InputError(f"this config names no training method: use that of one of {', '.join(TRAINED)}")
    return TRAINED[config.method](config)
