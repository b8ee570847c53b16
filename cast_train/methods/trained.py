"""What a trained method adds to the trainer that all of them share."""

from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

from torch import nn
from transformers import PreTrainedModel

from cast_train.config import TrainConfig
from cast_train.masked_adam import MaskedAdam

Config = TypeVar("Config", bound=TrainConfig)


class TrainedMethod(ABC, Generic[Config]):
    """A method is its config, what it does to the layers before training, and its optimizer.

    Masks live in the optimizer, in step with the weights however those are sharded; where a method's forward is masked,
    the optimizer keeps the parameters themselves masked. `cast_train.sparse_model.finalize` ends every method alike: it
    cuts by the mask of the weights, which changes nothing where they are 2:4 already.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def prepare(self, model: PreTrainedModel, layers: list[tuple[str, nn.Module]]) -> None:
        """Change the layers in scope, given as (name, module), where training needs them otherwise than they are."""
        return

    @abstractmethod
    def optimizer(self, groups: list[dict[str, Any]]) -> MaskedAdam:
        """Return the optimizer of the groups that `cast_train.trainer.parameter_groups` made."""
