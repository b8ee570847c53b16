"""Fine-tuning a finished 2:4 model under its own mask: zeros stay zero, whatever is trained."""

from typing import Any, ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from cast_train.config import Preset, TrainConfig
from cast_train.dtensor import local
from cast_train.masked_adam import MaskedAdam, zero_masked
from cast_train.methods.trained import TrainedMethod


class FinetuneConfig(TrainConfig):
    """Fine-tuning with a fixed mask, on cross entropy over all tokens."""

    method = "finetune"
    own_presets: ClassVar[dict[Preset, dict[str, Any]]] = {"quick": {"eta": 0.0, "warm_start": "none"}}

    eta: float = Field(0.0, ge=0, le=1)
    """Weight of KL(model before || model) against cross entropy, which holds the model close to what it was."""
    lora_rank: int = Field(0, ge=0)
    """Train an update of this rank under the mask, W + mask * (B A), and nothing else; 0 trains all weights."""
    lora_alpha: float = Field(16.0, gt=0)
    """Multiplies the low-rank update, divided by its rank."""

    @model_validator(mode="after")
    def _check_finetune(self) -> Self:
        if self.warm_start != "none":
            raise ValueError("a finished 2:4 model is fine-tuned as it is: leave the warm start out")
        if self.lora_rank and self.fsdp:
            raise ValueError("low-rank updates are not sharded: leave fsdp out")
        return self


class FixedMaskAdam(MaskedAdam):
    """Adam that leaves zero weights at zero.

    The mask is the weights' own at the start: their gradients are zeroed where it is 0, so both moments there, and with
    them the step, are exactly zero.
    """

    @torch.no_grad()
    def start(self) -> None:
        for group in self._sparse_groups():
            if not all("mask" in self.state[p] for p in group["params"]):
                self._refresh(group)

    @torch.no_grad()
    def mask_gradients(self) -> None:
        self.start()
        self._zero_masked_gradients()

    def health(self) -> dict[str, float]:
        """Return mean |masked|, 0, and mean |kept|; both 0 where only low-rank updates are trained."""
        if not any(True for _ in self._sparse_groups()):
            return {"masked": 0.0, "kept": 0.0, "mask_flips": 0.0}
        return super().health()

    def _new_mask(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        return local(p) != 0

    def _sparse_step(self, group: dict[str, Any], t: int) -> None:
        self.start()
        for params, grads, momenta, variances, masks in self._buckets(group, self._masked_tensors):
            zero_masked(grads, masks)  # again, for loops that clip no gradients
            self._adam(params, grads, momenta, variances, group, t, group["betas"][0], group["lr"])


class MaskedLowRank(nn.Module):
    """W -> W + mask * (B A) * alpha / rank, as a parametrization of a frozen weight (LoRA, arXiv:2106.09685).

    Args:
        weight: [R, C], zero where masked.
        rank: of B [R, rank], zero at first, and A [rank, C], random.
        alpha: scale of the update, times the rank.
    """

    mask: Tensor

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        self.register_buffer("mask", (weight != 0).to(weight.dtype), persistent=False)
        self.b = nn.Parameter(torch.zeros(weight.shape[0], rank, device=weight.device))
        self.a = nn.Parameter(torch.randn(rank, weight.shape[1], device=weight.device) * weight.shape[1] ** -0.5)
        self.factor = alpha / rank

    def forward(self, weight: Tensor) -> Tensor:
        return torch.addcmul(weight, self.mask, self.b @ self.a, value=self.factor)


class Finetune(TrainedMethod[FinetuneConfig]):
    def prepare(self, model: PreTrainedModel, layers: list[tuple[str, nn.Module]]) -> None:
        """With a LoRA rank, freeze everything and attach the updates."""
        if not self.config.lora_rank:
            return
        model.requires_grad_(False)
        generator_state = torch.get_rng_state()
        torch.manual_seed(self.config.seed)
        for _, layer in layers:
            weight = layer.weight
            assert isinstance(weight, Tensor)
            update = MaskedLowRank(weight, self.config.lora_rank, self.config.lora_alpha)
            parametrize.register_parametrization(layer, "weight", update)
        torch.set_rng_state(generator_state)

    def optimizer(self, groups: list[dict[str, Any]]) -> FixedMaskAdam:
        config = self.config
        return FixedMaskAdam(groups, config.lr, config.betas, config.eps, total_steps=config.total_steps)


def fold_low_rank(model: PreTrainedModel) -> None:
    """Make weights out of the low-rank updates that `Finetune` attached, in place; nothing where it attached none."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
