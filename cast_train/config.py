"""Everything a run can be told: what all methods share, then what each adds; published values and presets."""

import json
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cast_train.schedule import Schedule
from conversion.errors import InputError

Preset = Literal["full", "quick"]
# Adam divides by the gradient's size, AdamS by the momentum's, about a fourth of that where gradients are noise: a step
# as large as with AdamS takes four times the learning rate. A sweep found the same.
_QUICK_ADAM = {"lr": 4e-4}


class TrainConfig(BaseModel):
    """What every trained method can be told; the defaults are the `full` preset. Bad values raise InputError."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    method: ClassVar[str] = ""
    """Name of the method that a config of this class belongs to, a key of `cast_train.methods.TRAINED`."""
    own_presets: ClassVar[dict[Preset, dict[str, Any]]] = {}
    """What a preset sets beside PRESETS."""

    # Optimizer
    lr: float = Field(2e-5, gt=0)
    """Peak learning rate."""
    schedule: Schedule = "cosine"
    """How the learning rate falls, to zero at the last step (the residual of masked weights is of its final size)."""
    warmup_ratio: float = Field(0.05, ge=0, lt=1)
    """Part of all steps in which the learning rate rises linearly."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    mask_interval: int = Field(10, ge=1)
    """Steps between two mask refreshes."""
    max_grad_norm: float = Field(1.0, gt=0)
    train_embeddings: bool = True
    """False freezes embedding and lm_head, which saves their gradient and optimizer step."""
    dense_lr: float = Field(1.0, gt=0)
    """Multiplies the learning rate of what stays dense: embeddings, norms, biases, weight scales. They follow plain
    Adam, whose steps are about a quarter as long as those of AdamS at the same rate."""

    # Distillation
    eta: float = Field(1 / 3, ge=0, le=1)
    """Weight of KL(teacher || student) against cross entropy; 0 trains without a teacher."""
    temperature: float = Field(1.0, gt=0)
    """Divides both models' logits in the KL term, which is multiplied by its square."""

    teacher_top_k: int | None = Field(None, ge=1)
    """Most likely tokens of the teacher that are kept at each position; None runs the teacher itself."""

    # Start
    warm_start: Literal["none", "magnitude", "wanda", "sparsegpt", "admm"] = "none"
    """One-shot pruning whose kept weights training starts from."""
    shrink: float = Field(0.0, ge=0, le=1)
    """Masked weights are multiplied by this at a warm start, instead of being cut."""
    calibration_tokens: int = Field(65536, ge=1)
    """Training tokens that one-shot methods but magnitude see."""

    # Budget
    batch_tokens: int = Field(256 * 4096, ge=1)
    """Tokens per step, over all devices."""
    block_length: int = Field(4096, ge=2)
    """Tokens per training sequence; a model with a shorter context gets shorter ones."""
    steps: int | None = Field(None, ge=1)
    """Optimizer steps; give this or `tokens`."""
    tokens: int | None = Field(None, ge=1)
    """Training tokens, rounded down to whole steps."""
    micro_batch_tokens: int = Field(4096, ge=1)
    """Most tokens one device runs forward and backward at once; the rest of a step is accumulated."""

    # Running
    seed: int = 0
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Arithmetic of the forward and backward passes; weights and optimizer are always float32. "auto" takes bf16 where
    the processor has it."""
    save_steps: int = Field(500, ge=1)
    """Steps between two checkpoints to resume from."""
    log_steps: int = Field(10, ge=1)
    fsdp: bool = False
    """Share parameters, gradients and optimizer state between the devices (FSDP2), instead of copying them to all."""
    gradient_checkpointing: bool = False
    """Keep only each block's input for the backward pass and compute the rest again: less memory, more time."""
    compile: bool = False
    """Fuse each block's operations by torch.compile, student's and teacher's; takes a while at the start."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            if first["type"] == "extra_forbidden":
                raise InputError(f"{self.method or 'a run'} has no setting '{where}'") from None
            said = first["msg"].removeprefix("Value error, ")
            raise InputError(f"bad training setting{' ' + where if where else ''}: {said}") from None

    @model_validator(mode="after")
    def _check_budget(self) -> Self:
        if self.batch_tokens % self.block_length:
            raise ValueError(
                f"batch_tokens ({self.batch_tokens}) must be a multiple of block_length ({self.block_length})"
            )
        if self.steps is not None and self.tokens is not None:
            raise ValueError("give steps or tokens, not both")
        if self.tokens is not None and self.tokens < self.batch_tokens:
            raise ValueError(f"tokens ({self.tokens}) is less than one step's batch_tokens ({self.batch_tokens})")
        if self.teacher_top_k is not None and (self.eta == 0 or self.temperature != 1):
            raise ValueError("teacher_top_k needs a teacher (eta above 0) and temperature 1")
        return self

    @classmethod
    def preset(cls, name: Preset, /, **changes: Any) -> Self:
        """Return preset `name` with those `changes` that are not None; steps replaces the preset's tokens and back."""
        changes = {key: value for key, value in changes.items() if value is not None}
        values = PRESETS[name] | cls.own_presets.get(name, {})
        if "steps" in changes or "tokens" in changes:
            values.pop("steps", None)
            values.pop("tokens", None)
        return cls(**{**values, **changes})

    def within_context(self, context: int) -> Self:
        """Return these settings with blocks of at most `context` tokens that still divide batch_tokens."""
        if self.block_length <= context:
            return self
        length = next(n for n in range(context, 0, -1) if self.batch_tokens % n == 0)
        return type(self)(**self.model_dump() | {"block_length": length})

    @property
    def runs_teacher(self) -> bool:
        """Whether every step runs the teacher: not where there is none, or its most likely tokens are on disk."""
        return self.eta > 0 and self.teacher_top_k is None

    @property
    def blocks_per_step(self) -> int:
        """Sequences in one optimizer step."""
        return self.batch_tokens // self.block_length

    def split_step(self, devices: int) -> tuple[int, int]:
        """Return how many blocks a device runs at once, and how often it does so in one step.

        InputError if a step's blocks cannot be shared evenly by the devices.
        """
        blocks, remainder = divmod(self.blocks_per_step, devices)
        if remainder:
            raise InputError(f"{self.blocks_per_step} blocks a step cannot be shared by {devices} devices")
        most = max(1, self.micro_batch_tokens // self.block_length)
        at_once = next(size for size in range(min(most, blocks), 0, -1) if blocks % size == 0)
        return at_once, blocks // at_once

    @property
    def total_steps(self) -> int:
        """T. InputError if neither steps nor tokens is set."""
        if self.steps is not None:
            return self.steps
        if self.tokens is not None:
            return self.tokens // self.batch_tokens
        raise InputError("say how long to train: give a number of steps or of tokens")


class CastConfig(TrainConfig):
    """CAST (arXiv:2509.25996), with the paper's values; its ablations are switches."""

    method = "cast"
    # With masked weights already at zero (quick starts at SparseGPT's), little depends on decay.
    own_presets: ClassVar[dict[Preset, dict[str, Any]]] = {"quick": {"decay": 1e-3}}

    decay: float | Literal["auto"] = 4e-7
    """The paper's lambda; "auto" is decay_ratio times the momentum on masked weights, measured at the start."""
    decay_ratio: float = Field(50.0, gt=0)
    """Only for decay "auto"."""
    scaling_blocks: int = Field(2, ge=0)
    """Column blocks with a scale of their own per row (Sec. IV-B); 0 leaves weight scaling out."""
    decay_norm: Literal["l1", "l2"] = "l1"
    """Pull on masked weights: l1 by their sign (Eq. 7), l2 in proportion to them."""
    second_moment: Literal["update", "gradient"] = "update"
    """What AdamS builds its second moment from: the decayed momentum (Eq. 8) or the raw gradient."""

    @model_validator(mode="after")
    def _check_decay(self) -> Self:
        if self.decay != "auto" and self.decay < 0:
            raise ValueError("decay must be 0 or more, or 'auto'")
        if self.decay == "auto" and self.decay_norm == "l2":
            raise ValueError("decay 'auto' is measured for the l1 pull: give a number with decay_norm l2")
        return self


class SrsteConfig(TrainConfig):
    """SR-STE (arXiv:2102.04010)."""

    method = "srste"
    own_presets: ClassVar[dict[Preset, dict[str, Any]]] = {"quick": _QUICK_ADAM}
    mask_interval: int = Field(1, ge=1)
    """Steps between two mask refreshes."""
    decay: float = Field(2e-4, ge=0)
    """L2 decay on masked weights, added to their gradient (their lambda_W)."""


class GmpConfig(TrainConfig):
    """Gradual magnitude pruning (arXiv:1710.01878)."""

    method = "gmp"
    own_presets: ClassVar[dict[Preset, dict[str, Any]]] = {"quick": _QUICK_ADAM}
    ramp_end: float = Field(0.5, ge=0, le=1)
    """Part of all steps after which every group is cut; the rest is fine-tuning under the final mask."""


class AstConfig(TrainConfig):
    """AST (arXiv:2407.20584); the defaults of decay, ramp and loss are those of the authors' code."""

    method = "ast"
    eta: float = Field(2 / 3, ge=0, le=1)
    """Weight of KL(teacher || student) against cross entropy; 0 trains without a teacher."""
    temperature: float = Field(2.0, gt=0)
    """Divides both models' logits in the KL term, which is multiplied by its square."""
    decay: float = Field(6e-5, ge=0)
    """L2 decay on masked weights at the end of the ramp (their lambda_W)."""
    ramp_end: float = Field(0.25, ge=0, le=1)
    """Part of all steps over which the decay rises from zero."""


CONFIGS: dict[str, type[TrainConfig]] = {
    config.method: config for config in (CastConfig, SrsteConfig, GmpConfig, AstConfig)
}
"""Config of each trained method."""

PRESETS: dict[Preset, dict[str, Any]] = {
    # The paper's recipe for LLaMA2-7B (Table XI): 7.5 B tokens.
    "full": {"steps": 7500},
    # Ten minutes on two CPU cores: starts at SparseGPT's weights, and lets training win back what they lost. For CAST
    # and AST learning rates from 2e-4 up ended worse at this budget.
    "quick": {
        "lr": 1e-4,
        "schedule": "linear",
        "eta": 0.9,
        "train_embeddings": False,
        "warm_start": "sparsegpt",
        "calibration_tokens": 24576,
        "batch_tokens": 512,
        "block_length": 256,
        "tokens": 200 * 512,
        "save_steps": 50,
        "log_steps": 1,
    },
}


def setting_value(text: str) -> Any:
    """Return what a setting is given on a command line: a number, true, a list, or else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text
