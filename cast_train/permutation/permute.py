"""Order a model's channels so that 2:4 takes least away, by calibration text; what the model computes stays."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cast_train.permutation.channels import Channels, channels_of
from cast_train.permutation.search import cut_part, search_order
from cast_train.sparse_model import linear_weight, scope
from conversion.block_walk import input_sums
from conversion.errors import InputError
from conversion.progress import track

_ROWS = 1 << 15  # of all readers together; more do not change the order found


@dataclass(frozen=True)
class Gain:
    """Part of the linears' squared outputs that 2:4 cuts, input channels taken as uncorrelated: mean over the sets."""

    kind: str
    before: float
    after: float


@torch.no_grad()
def permute(model: PreTrainedModel, calibration: Tensor) -> list[Gain]:
    """Reorder the channels of a float32 causal language model in place.

    Args:
        model: its logits stay the same, but for the order of sums.
        calibration: int64 token ids [samples, length].

    Returns:
        What was gained, for each kind of channels. Sets that no 2:4 linear reads stay as they are.

    Raises:
        InputError: the model's family is not supported, or it computes what is not finite.
    """
    linears: set[nn.Module] = {module for _, module in scope(model)}
    power: dict[nn.Module, Tensor] = {}
    for sums in input_sums(
        model, linears, calibration, "1 of 2: reading calibration text", lambda x: x.square().sum(0)
    ):
        power |= sums
    parts: dict[str, list[tuple[float, float]]] = {}
    for channels in track(list(channels_of(model)), "2 of 2: ordering channels"):
        saliency = torch.cat(list(_saliency(channels, power)))
        order = search_order(saliency)
        channels.reorder(order)
        parts.setdefault(channels.kind, []).append((cut_part(saliency), cut_part(saliency[:, order])))
    return [Gain(kind, *(sum(side) / len(pairs) for side in zip(*pairs, strict=True))) for kind, pairs in parts.items()]


def _saliency(channels: Channels, power: dict[nn.Module, Tensor]) -> Iterator[Tensor]:
    """Yield w^2 ||x||^2 [rows, channels] of each reader, as a part of all that its linear puts out."""
    rows = -(-_ROWS // len(channels.readers))
    for reader in channels.readers:
        weight = linear_weight(reader.linear)
        if len(weight) > rows:
            weight = weight[torch.randperm(len(weight), generator=torch.Generator().manual_seed(0))[:rows]]
        saliency = weight.square() * power[reader.linear]
        total = saliency.sum()
        if not total.isfinite():
            raise InputError("the model's weights or activations are not finite: take it from where it came from again")
        yield saliency.narrow(1, reader.start, channels.size) / (total if total else 1)
