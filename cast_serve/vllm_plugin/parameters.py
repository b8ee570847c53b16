"""The portable tensors of a layer while vLLM loads them: cut for tensor parallelism by vLLM, counted here."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from conversion.errors import InputError

Loader = Callable[..., None]


def counting(load: Loader, layer: str, columns: int) -> Loader:
    """`load`, which vLLM calls with a parameter and a tensor of the checkpoint, checked.

    vLLM itself takes what it needs of a tensor that is too large, and says nothing of one that never comes.

    Args:
        load: the layer's own loader, which cuts the tensor to the shard.
        layer: its name.
        columns: of the tensor in the checkpoint.
    """

    def checked(parameter: nn.Parameter, loaded: torch.Tensor, *shard: Any, **named: Any) -> None:
        if loaded.dim() != 2 or loaded.shape[1] != columns:
            raise InputError(
                f"layer '{layer}' needs tensors [N, {columns}], and the checkpoint holds {list(loaded.shape)}: "
                "make it again"
            )
        load(parameter, loaded, *shard, **named)
        parameter.loaded_rows += loaded.shape[0]  # type: ignore[attr-defined]

    return checked


def check_loaded(module: nn.Module, names: list[str], layer: str, rows: int) -> None:
    """InputError unless all rows of the layer's tensors came; `rows` is what all shards have together."""
    for name in names:
        loaded = getattr(module, name).loaded_rows
        if loaded != rows:
            raise InputError(
                f"layer '{layer}' got {loaded} of {rows} rows of {name}: a tensor is missing, or the "
                "checkpoint was made for another config.json; make it again"
            )
