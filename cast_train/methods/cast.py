"""CAST (arXiv:2509.25996): a dense forward to the end, masked weights pulled to zero by AdamS, weights scaled."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from cast_train.adams import AdamS
from cast_train.config import CastConfig
from cast_train.methods.trained import TrainedMethod
from cast_train.scaling import ScaledLinear
from conversion.errors import InputError


class Cast(TrainedMethod[CastConfig]):
    def prepare(self, model: PreTrainedModel, layers: list[tuple[str, nn.Module]]) -> None:
        """Attach weight scaling to the layers that have none."""
        if self.config.scaling_blocks:
            for name, layer in layers:
                if not isinstance(layer, ScaledLinear):
                    model.set_submodule(name, ScaledLinear(layer, self.config.scaling_blocks))  # type: ignore[arg-type]

    def optimizer(self, groups: list[dict[str, Any]]) -> AdamS:
        """InputError while the decay is still "auto"."""
        config = self.config
        if config.decay == "auto":
            raise InputError("decay 'auto' must be measured first: cast_train.training.train does so")
        return AdamS(
            groups,
            config.lr,
            config.betas,
            config.eps,
            decay=config.decay,
            total_steps=config.total_steps,
            decay_norm=config.decay_norm,
            second_moment=config.second_moment,
        )
