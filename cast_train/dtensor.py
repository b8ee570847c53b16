"""Pieces and wholes of tensors that FSDP2 cut along their rows; plain tensors pass through."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """Return this process's piece of a sharded tensor; rows, and so groups of four, are whole in it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return all of a sharded tensor. All processes must ask together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sum_of_pieces(values: Tensor, of: Tensor) -> Tensor:
    """Sum over processes, in place, what each computed from its piece of `of`; if that is not sharded, do nothing."""
    if isinstance(of, DTensor):
        with torch.no_grad():
            dist.all_reduce(values)
    return values
