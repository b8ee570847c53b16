"""CAST: continuous and differentiable training of language models to 2:4 sparsity (arXiv:2509.25996)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cast_train.adams import AdamS
    from cast_train.budget import decay_budget
    from cast_train.config import AstConfig, CastConfig, GmpConfig, SrsteConfig, TrainConfig
    from cast_train.mask import nm_mask
    from cast_train.sparse_model import finalize, sparsify
    from cast_train.trainer import CastTrainer, parameter_groups

__all__ = [
    "AdamS",
    "AstConfig",
    "CastConfig",
    "CastTrainer",
    "GmpConfig",
    "SrsteConfig",
    "TrainConfig",
    "decay_budget",
    "finalize",
    "nm_mask",
    "parameter_groups",
    "sparsify",
]

_MODULES = {
    "AdamS": "adams",
    "AstConfig": "config",
    "CastConfig": "config",
    "CastTrainer": "trainer",
    "GmpConfig": "config",
    "SrsteConfig": "config",
    "TrainConfig": "config",
    "decay_budget": "budget",
    "finalize": "sparse_model",
    "nm_mask": "mask",
    "parameter_groups": "trainer",
    "sparsify": "sparse_model",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
