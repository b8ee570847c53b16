"""Everything a CAST run can be told, with the paper's values and a preset for a small budget."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cast_train.schedule import Schedule
from conversion.errors import InputError

Preset = Literal["full", "quick"]


class CastConfig(BaseModel):
    """A run's method and budget; the defaults are the `full` preset. Bad values raise InputError."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # Optimizer (Sec. IV-A)
    lr: float = Field(2e-5, gt=0)
    """Peak learning rate."""
    schedule: Schedule = "cosine"
    """How the learning rate falls, to zero at the last step (the residual of masked weights is of its final size)."""
    warmup_ratio: float = Field(0.05, ge=0, lt=1)
    """Part of all steps in which the learning rate rises linearly."""
    decay: float | Literal["auto"] = 4e-7
    """The paper's lambda; "auto" is decay_ratio times the momentum on masked weights, measured at the start."""
    decay_ratio: float = Field(50.0, gt=0)
    """Only for decay "auto"."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    mask_interval: int = Field(10, ge=1)
    """Steps between two mask refreshes."""
    max_grad_norm: float = Field(1.0, gt=0)
    train_embeddings: bool = True
    """False freezes embedding and lm_head, which saves their gradient and optimizer step."""

    # Weight scaling and distillation (Sec. IV-B, IV-C)
    scaling_blocks: int = Field(2, ge=0)
    """Column blocks with a scale of their own per row; 0 leaves weight scaling out."""
    eta: float = Field(1 / 3, ge=0, le=1)
    """Weight of KL(teacher || student); 0 trains without a teacher."""

    # Start
    warm_start: Literal["none", "magnitude", "wanda", "sparsegpt"] = "none"
    """One-shot pruning whose kept weights training starts from."""
    shrink: float = Field(0.0, ge=0, le=1)
    """Masked weights are multiplied by this at a warm start, instead of being cut."""
    calibration_tokens: int = Field(65536, ge=1)
    """Training tokens that wanda and sparsegpt see."""

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

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise InputError(f"bad training setting{' ' + where if where else ''}: {first['msg']}") from None

    @model_validator(mode="after")
    def _check(self) -> "CastConfig":
        if self.decay != "auto" and self.decay < 0:
            raise ValueError("decay must be 0 or more, or 'auto'")
        if self.batch_tokens % self.block_length:
            raise ValueError(
                f"batch_tokens ({self.batch_tokens}) must be a multiple of block_length ({self.block_length})"
            )
        if self.steps is not None and self.tokens is not None:
            raise ValueError("give steps or tokens, not both")
        if self.tokens is not None and self.tokens < self.batch_tokens:
            raise ValueError(f"tokens ({self.tokens}) is less than one step's batch_tokens ({self.batch_tokens})")
        return self

    @classmethod
    def preset(cls, name: Preset, **changes: Any) -> "CastConfig":
        """Return preset `name` with those `changes` that are not None; steps replaces the preset's tokens and back."""
        changes = {key: value for key, value in changes.items() if value is not None}
        values: dict[str, Any] = dict(PRESETS[name])
        if "steps" in changes or "tokens" in changes:
            values.pop("steps", None)
            values.pop("tokens", None)
        return cls(**{**values, **changes})

    def within_context(self, context: int) -> "CastConfig":
        """Return these settings with blocks of at most `context` tokens that still divide batch_tokens."""
        if self.block_length <= context:
            return self
        length = next(n for n in range(context, 0, -1) if self.batch_tokens % n == 0)
        return CastConfig(**self.model_dump() | {"block_length": length})

    @property
    def blocks_per_step(self) -> int:
        """Sequences in one optimizer step."""
        return self.batch_tokens // self.block_length

    @property
    def total_steps(self) -> int:
        """T. InputError if neither steps nor tokens is set."""
        if self.steps is not None:
            return self.steps
        if self.tokens is not None:
            return self.tokens // self.batch_tokens
        raise InputError("say how long to train: give a number of steps or of tokens")


PRESETS: dict[Preset, dict[str, Any]] = {
    # The paper's recipe for LLaMA2-7B (Table XI): 7.5 B tokens.
    "full": {"steps": 7500},
    # Ten minutes on two CPU cores: starts at SparseGPT's weights, and lets CAST win back what they lost. With masked
    # weights already at zero, little depends on decay; learning rates from 2e-4 up ended worse at this budget.
    "quick": {
        "lr": 1e-4,
        "schedule": "linear",
        "decay": 1e-3,
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
