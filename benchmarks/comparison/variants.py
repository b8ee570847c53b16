"""What is compared: every method, and CAST with one part taken away."""

from dataclasses import dataclass, field
from typing import Any

from cast_train.config import CONFIGS, Preset, TrainConfig
from cast_train.methods import ONE_SHOT
from conversion.errors import InputError

DENSE = "dense"


@dataclass(frozen=True)
class Variant:
    """A method with settings of its own.

    Attributes:
        name: in tables, and in --set NAME.KEY=VALUE.
        method: of `cast train`, or "dense" for the model as it is.
        settings: what it changes in the method's config.
    """

    name: str
    method: str
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def trained(self) -> bool:
        return self.method in CONFIGS

    def config(self, preset: Preset, tokens: int | None, changes: dict[str, Any]) -> TrainConfig:
        """The config of a run of `tokens` tokens; `changes` go before the variant's own settings."""
        return CONFIGS.get(self.method, TrainConfig).preset(preset, **(changes | self.settings), tokens=tokens)


METHODS = [Variant(name, name) for name in ("magnitude", "wanda", "sparsegpt", "admm", "gmp", "srste", "ast", "cast")]
ABLATIONS = [
    Variant("cast-no-scaling", "cast", {"scaling_blocks": 0}),
    Variant("cast-no-distillation", "cast", {"eta": 0.0}),
    Variant("cast-constant-lr", "cast", {"schedule": "constant"}),
    Variant("cast-l2-decay", "cast", {"decay_norm": "l2"}),
    Variant("cast-gradient-moment", "cast", {"second_moment": "gradient"}),
]
VARIANTS = {variant.name: variant for variant in [Variant(DENSE, DENSE), *METHODS, *ABLATIONS]}
assert {variant.method for variant in METHODS} == {*ONE_SHOT, *CONFIGS}


def find_variants(names: str) -> list[Variant]:
    """Return the variants of a comma-separated list. InputError naming the first that does not exist."""
    found = []
    for name in filter(None, (part.strip() for part in names.split(","))):
        if name not in VARIANTS:
            raise InputError(f"there is no method '{name}': use some of {', '.join(VARIANTS)}")
        found.append(VARIANTS[name])
    return found
